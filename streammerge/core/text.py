"""Text from files, made safe to print, and numbers in the units people read.

Names in headers, indexes and configs are written by strangers: before any of them reaches a terminal or a log,
control characters and bidirectional overrides are escaped here.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

# Cc control, Cf format (bidi overrides, zero width), Cs surrogates, Co private, Cn unassigned, Zl/Zp separators.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?i?B?)")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SECRETS = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}"
    r"|(?<=://)[^/\s@]+(?=@)"
    r"|(?<=authorization:)[^\n\"']+|(?<=bearer )[^\s\"']+"
    r"|(?<=[?&])[\w-]*(?:token|signature|credential|key|secret)[\w-]*=[^&\s]+",
    re.IGNORECASE,
)
"""Tokens of the Hub, the user of a URL, a header's value, the signed parameters of a URL."""
SHOWN = 5
"""How many items of a long list an error names before it counts the rest."""


def printable(text: object) -> str:
    """`text` with everything a terminal would act on, or that would hide, written as an escape."""
    if str(text).isprintable():
        return str(text)
    return "".join(
        char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in _UNPRINTABLE else char
        for char in str(text)
    )


def shortened(text: str, most: int = 1000) -> str:
    """`text`, or its beginning and how long it is."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def redacted(text: str) -> str:
    """`text` without what lets its reader act as somebody else: tokens, the user of a URL, its signed parameters."""
    return _SECRETS.sub("[secret]", text)


def parse_size(text: str) -> int:
    """Bytes in `text`: `5GB` is 5 x 10^9, `128MiB` is 128 x 2^20, a bare number is bytes.

    Raises ValueError for anything else, zero included.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"`{printable(text)}` is not a size such as 5GB, 128MB or 64MiB")
    unit = match[2].removesuffix("B").upper()
    factor = _BINARY_UNITS[unit[0]] if unit.endswith("I") and unit[0] in _BINARY_UNITS else _UNITS.get(unit)
    size = int(float(match[1]) * factor) if factor else 0
    if size <= 0:
        raise ValueError(f"`{printable(text)}` is not a size such as 5GB, 128MB or 64MiB")
    return size


def size_text(size: float) -> str:
    """`size` bytes in decimal units: `4.03 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            value = size / factor
            return f"{value:.3g} {unit}" if value < 999.5 else f"{value:.0f} {unit}"
    return f"{size:.0f} B"


def count_text(count: int, noun: str) -> str:
    """`1 tensor`, `2 tensors`."""
    plural = noun[:-1] + "ies" if noun.endswith("y") and noun[-2:] not in ("ay", "ey", "oy") else noun + "s"
    return f"{count:,} {noun if count == 1 else plural}"


def some_of(items: Iterable[object], shown: int = SHOWN) -> str:
    """The first few of `items` in backticks, and how many more there are."""
    names = [f"`{printable(item)}`" for item in items]
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def nearest(name: str, candidates: Sequence[str], count: int = 3) -> tuple[str, ...]:
    """The names of `candidates` most like `name`, best first; compares by segments, so that long shared prefixes
    do not hide a differing projection."""
    wanted = name.split(".")
    scored = sorted(
        ((_segment_likeness(wanted, other.split(".")), other) for other in candidates),
        key=lambda pair: (-pair[0], pair[1]),
    )
    return tuple(other for score, other in scored[:count] if score > 0.5)


def _segment_likeness(wanted: list[str], other: list[str]) -> float:
    same = sum(a == b for a, b in zip(reversed(wanted), reversed(other), strict=False))
    prefix = sum(a == b for a, b in zip(wanted, other, strict=False))
    longest = max(len(wanted), len(other))
    rough = max(same, prefix) / longest
    if rough < 0.5:
        return rough
    return rough + 0.01 * difflib.SequenceMatcher(None, ".".join(wanted), ".".join(other)).quick_ratio()
