"""What is typed: paths and identifiers that hold a secret, or lead elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from tests.hostile.case import TOKEN, Case, Place, missing, unsafe


def base(text: str) -> Callable[[Place], object]:
    """The base as it is typed."""
    return lambda place: setattr(place, "base_argument", text)


def adapter(text: str) -> Callable[[Place], object]:
    """The adapter as it is typed; `BASE` and `ADAPTER` stand for the folders."""

    def spoil(place: Place) -> None:
        place.adapter_argument = text.replace("ADAPTER", str(place.adapter))

    return spoil


CASES: tuple[Case, ...] = (
    missing("typed: a token for a base", base(TOKEN), "what looks like a secret"),
    missing("typed: a token for an adapter", adapter(f"org/{TOKEN}"), "what looks like a secret"),
    missing("typed: a URL with a token", base(f"https://user:{TOKEN}@huggingface.co/org/name"), "https://[secret]@"),
    missing("typed: a URL with a password", base("https://user:passw0rd@example.org/name"), "https://[secret]@"),
    missing("typed: a signed URL", base("https://example.org/a?X-Amz-Signature=abc&x=1"), "?[secret]&x=1"),
    missing("typed: NUL", base("a\0b"), "NUL"),
    missing("typed: an escape sequence", base("./\x1b[2J"), "\\x1b[2J"),
    unsafe("typed: a subfolder above", adapter("ADAPTER:../outside"), "could lead outside"),
    unsafe("typed: a subfolder at the root", adapter("ADAPTER:/etc"), "could lead outside"),
)
