"""Headers of safetensors files, in a base and in an adapter: what is wrong in JSON, and what is only meant to be too
much. The rows of `tests/formats/test_hostile.py` are here again, as shards of a base that is merged into."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.formats.test_hostile import HOSTILE
from tests.hostile.case import SHARD, Case, Place, fine, malformed, unfit
from tests.refusals.making import HIDDEN, PREFIX, RANK, Stored, factors, normal

QUERY = f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"
EMPTY = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A file with this header."""
    return len(header).to_bytes(8, "little") + header + data


def shard(make: Callable[[], bytes]) -> Callable[[Place], object]:
    """A base whose first shard is made so."""
    return lambda place: place.write(f"base/{SHARD}", make())


def weights(make: Callable[[], bytes]) -> Callable[[Place], object]:
    """An adapter whose weights are made so."""
    return lambda place: place.write("adapter/adapter_model.safetensors", make())


def empties(count: int) -> bytes:
    """A file of so many tensors without values."""
    return framed(b"{" + b",".join(EMPTY % number for number in range(count)) + b"}")


def named(name: str) -> Callable[[], bytes]:
    """A file of one byte under a name."""
    entry = {name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    return lambda: framed(json.dumps(entry).encode(), b"\0")


def terabyte(place: Place) -> None:
    """A shard with a tensor of a terabyte, in a file that has it, and takes no space."""
    size = 2**40
    entry = {"big": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    name = "model-00003-of-00002.safetensors"
    path = place.write(f"base/{name}", framed(json.dumps(entry).encode()))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    place.index(lambda found: found.update(big=name))


def with_tensor(name: str, tensor: Stored | None = None) -> Callable[[Place], object]:
    """A base with one more tensor."""
    extra = tensor or normal("extra", HIDDEN)
    return lambda place: place.tensors(lambda found: found.update({name: extra}))


def with_factor(name: str) -> Callable[[Place], object]:
    """An adapter with a pair of factors for one more module."""
    return lambda place: place.factors(lambda found: found.update(factors(name)))


def copied(name: str) -> Callable[[Place], str]:
    """Whether a tensor of the base is in the output."""

    def look(place: Place) -> str:
        texts = [path.read_bytes()[:100_000] for path in place.out.glob("*.safetensors")]
        return "" if any(json.dumps(name).encode() in text for text in texts) else f"{name!r} is not in the output"

    return look


unmatched = unfit("UnmatchedKeysError")
ROWS = tuple(
    malformed(f"header: {name}", shard(lambda data=data: data), words.replace("\\", ""))
    for name, (data, words) in HOSTILE.items()
)
BOMBS = (
    malformed(
        "header: a million empty tensors", shard(lambda: empties(1_000_000)), "bytes, at most 30,000,000 are read"
    ),
    malformed("header: 400,000 empty tensors", shard(lambda: empties(400_000)), "hold so many values"),
    malformed("header: 400,000 empty tensors in the adapter", weights(lambda: empties(400_000)), "hold so many values"),
    malformed(
        "header: 90 MB of spaces", shard(lambda: framed(b"{" + b" " * 90_000_000 + b"}")), "90,000,002 bytes, at most"
    ),
    malformed(
        "header: a name of 29 MB", shard(lambda: framed(b'{"' + b"x" * 29_000_000 + b'":{}}')), "longer than 1,000"
    ),
    malformed(
        "header: a name of 7 million characters of four bytes",
        shard(lambda: framed(('{"' + "\U0001f600" * 7_000_000 + '":{}}').encode())),
        "longer than 1,000 characters",
    ),
    malformed(
        "header: a million entries of metadata",
        shard(lambda: framed(b'{"__metadata__":{' + b",".join(b'"%d":""' % n for n in range(1_500_000)) + b"}}")),
        "hold so many values",
    ),
    malformed("header: ten million brackets", shard(lambda: framed(b'{"a":' + b"[" * 10_000_000)), "could take 1 GB"),
    malformed(
        "header: ten million brackets in a name",
        shard(lambda: framed(b'{"' + b"[" * 10_000_000 + b'":{}}')),
        "could take 1 GB",
    ),
    malformed("header: a name of 1,001 characters", shard(named("x" * 1001)), "longer than 1,000 characters"),
    Case("header: a tensor of a terabyte", terabyte, 7, "NoSpaceError", ("free, the plan writes 1.1 TB",)),
)
NAMES = (
    malformed("name: an escape sequence, in an adapter", weights(named("\x1b]0;owned\x07")), "control character"),
    malformed("name: a line feed, in an adapter", weights(named("a\nerror: forged")), "control character"),
    malformed("name: NUL, in an adapter", weights(named("a\0b")), "control character"),
    malformed("name: empty, in an adapter", weights(named("")), "an empty name"),
    malformed("name: a lone surrogate, in an adapter", weights(named("a\ud800")), "lone surrogate"),
    unmatched("name: a bidirectional override", with_factor("model.layers.0.\u202eself_attn.q_proj"), "\\u202eself"),
    unmatched("name: characters without width", with_factor("model.layers.0.self\u200b_attn.q_proj"), "self\\u200b_"),
    unmatched("name: a line separator", with_factor("model.layers.0.self\u2028attn.q_proj"), "self\\u2028attn"),
    unmatched("name: a path out of the checkpoint, in an adapter", with_factor("../../../../etc/passwd"), "etc/passwd"),
    unmatched("name: an absolute path, in an adapter", with_factor("/etc/passwd"), "/etc/passwd.lora_A"),
    unmatched("name: nothing but dots", with_factor("......"), "......."),
    unmatched("name: 300 parts", with_factor(".".join(["layers"] * 100)), "layers.layers.layers"),
    unmatched("name: a layer with a number of 400 digits", with_factor(f"model.layers.{'9' * 400}.q_proj"), "99999"),
    unmatched(
        "name: a layer with another script's digits", with_factor("model.layers.\u0661.self_attn.q_proj"), "tried"
    ),
    fine("name: a path, in a base", with_tensor("../../../etc/passwd"), look=copied("../../../etc/passwd")),
    fine("name: a directional override, in a base", with_tensor("a\u202eb"), look=lambda place: ""),
    fine("name: a dtype's, in a base", with_tensor("dtype"), look=copied("dtype")),
    fine("name: `__class__`, in a base", with_tensor("__class__"), look=copied("__class__")),
)
FACTORS = (
    unfit("UnmatchedKeysError")("key: nothing but a prefix", with_factor("base_model.model"), "match no tensor"),
    unfit("IncompleteFactorsError")(
        "factors: of rank zero",
        lambda place: place.factors(
            lambda found: found.update({QUERY: normal("", 0, HIDDEN), QUERY.replace("_A", "_B"): normal("", HIDDEN, 0)})
        ),
        "are empty",
    ),
    unfit("IncompleteFactorsError")(
        "factors: with a size of 2^40 beside a zero",
        lambda place: place.factors(lambda found: found.update({QUERY: Stored("F32", (0, 2**40), b"")})),
        "q_proj",
    ),
    unfit("NotMergeableError")(
        "factors: of 64 dimensions",
        lambda place: place.factors(
            lambda found: found.update({QUERY: Stored("F32", (*[1] * 63, RANK), normal("", RANK).data)})
        ),
        "q_proj",
    ),
)
CASES = (*ROWS, *BOMBS, *NAMES, *FACTORS)
