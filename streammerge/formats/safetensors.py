"""The header of a safetensors file: read strictly, written deterministically.

Owns the layout (eight bytes of length, JSON, then data) and every limit on it; knows no tensor values. The one
invariant: a header accepted here is accepted by the `safetensors` library too, and its tensors tile the file from the
end of the header to the last byte, without hole or overlap. What the library lets pass and its format document
forbids (duplicate keys, unknown fields, NUL in names) is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.core import io, strict_json
from streammerge.core.dtypes import BITS
from streammerge.core.errors import MalformedInputError
from streammerge.core.tensors import TensorInfo
from streammerge.core.text import printable

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000
"""Bytes of JSON; the limit of the safetensors library, checked before anything is allocated."""
MAX_RANK = 64
"""numpy's limit, and more than torch computes with."""
MAX_NAME = 1000
"""Characters of a tensor's name; the longest of transformers' models have some 150."""
LIMIT = 2**63
"""Dimensions and element counts stay below it: they are signed 64-bit numbers in torch and numpy."""
ALIGNMENT = 8
"""The data of a header written here starts at a multiple of it, as the library's does."""

_FIELDS = ("dtype", "shape", "data_offsets")
_NAME_SHOWN = 120
# C0 and C1 controls, and surrogates, which have no UTF-8 form.
_BAD_CHARACTER = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Header:
    """The facts of one shard: its tensors in offset order, with absolute `start` offsets; `raw` is the header as
    stored, length included, so that an unchanged shard can keep it byte for byte."""

    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str]
    raw: bytes
    data_start: int


def read_header(path: str | os.PathLike[str], file: str) -> Header:
    """The header of the file at `path`, whose name inside the checkpoint is `file`; no tensor data is read."""
    shown = os.fspath(path)
    fd = io.open_input(path)
    try:
        size = io.state_of(fd, shown).size
        prefix = bytes(io.read_at(fd, shown, 0, min(size, LENGTH_BYTES)))
        length = _json_length(prefix, size, shown)
        raw = prefix + io.read_at(fd, shown, LENGTH_BYTES, length)
    finally:
        io.close(fd)
    return parse_header(raw, size, shown, file)


def parse_header(raw: bytes, file_size: int, path: str, file: str) -> Header:
    """The facts in `raw`, the first 8 + n bytes of a file of `file_size` bytes.

    Raises MalformedInputError naming `path` and the tensor. Dtypes outside the library's table are refused, because
    the library refuses them.
    """
    length = _json_length(raw[:LENGTH_BYTES], file_size, path)
    body = memoryview(raw)[LENGTH_BYTES:]
    if len(body) != length:
        raise MalformedInputError(path, f"{len(body):,} bytes of header where its length says {length:,}")
    if bytes(body[:1]) != b"{":
        raise MalformedInputError(path, "its header does not start with `{`")
    document = strict_json.loads(body, path)
    _refuse_minus_zero(raw, path)
    metadata = _metadata(document.pop("__metadata__", {}), path)
    found = [_tensor(name, entry, path) for name, entry in document.items()]
    tensors = tuple(
        TensorInfo(name, dtype, shape, file, len(raw) + begin, nbytes)
        for name, dtype, shape, begin, nbytes in sorted(found, key=lambda row: (row[3], row[4]))
    )
    _check_tiling(tensors, len(raw), file_size, path)
    return Header(tensors, metadata, bytes(raw), len(raw))


def encode_header(entries: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The header of a file that holds `entries`, (name, dtype, shape, bytes) in the order of their data, without gaps.

    The same arguments give the same bytes. Raises ValueError for what no safetensors file can hold: a repeated name,
    more header than the format allows.
    """
    document: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, dtype, shape, nbytes in entries:
        if name in document or name == "__metadata__":
            raise ValueError(f"the tensor name `{printable(name)}` is already taken in this header")
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    body = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    body += b" " * (-(LENGTH_BYTES + len(body)) % ALIGNMENT)
    if len(body) > strict_json.MAX_TEXT:
        raise ValueError(f"a header of {len(body):,} bytes, at most {strict_json.MAX_TEXT:,} would be read again")
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def tensor_name_problem(name: str) -> str | None:
    """Why `name` cannot be a tensor's name in a checkpoint of ours, None where it can."""
    if not name:
        return "a tensor with an empty name"
    bad = _BAD_CHARACTER.search(name)
    if bad is None and len(name) > MAX_NAME:
        return f"the tensor name {quoted(name)} is longer than {MAX_NAME:,} characters"
    if bad is None:
        return None
    kind = "a lone surrogate" if _SURROGATE.match(bad[0]) else "a control character"
    return f"the tensor name {quoted(name)} holds {kind}, U+{ord(bad[0]):04X}"


def quoted(name: str) -> str:
    """`name` in backticks, cut where a hostile one would fill the screen."""
    return f"`{name}`" if len(name) <= _NAME_SHOWN else f"`{name[:_NAME_SHOWN]}...` ({len(name):,} characters)"


def foreign_format(start: bytes) -> tuple[str, str] | None:
    """What a file that starts with `start` is instead, and what to do about it: downloads that went wrong."""
    if start.startswith(b"version "):
        return "it is a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull` or `hf download`"
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html"):
        return "it is an HTML page, not the file itself", "download the file again; the server sent a page instead"
    return None


def _json_length(prefix: bytes, file_size: int, path: str) -> int:
    """The length in the first eight bytes, once it is known to fit the file and the format's limit."""
    foreign = foreign_format(prefix)
    if foreign:
        raise MalformedInputError(path, *foreign)
    if file_size < LENGTH_BYTES or len(prefix) < LENGTH_BYTES:
        raise MalformedInputError(path, f"{file_size:,} bytes are too short for a safetensors file")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER:
        advice = "is it a safetensors file? `.bin` and `.gguf` files have other names"
        raise MalformedInputError(path, f"a header of {length:,} bytes, the format allows {MAX_HEADER:,}", advice)
    if length > strict_json.MAX_TEXT and length + LENGTH_BYTES <= file_size:
        raise MalformedInputError(path, f"a header of {length:,} bytes, at most {strict_json.MAX_TEXT:,} are read")
    if LENGTH_BYTES + length > file_size:
        reason = f"a header of {length:,} bytes does not fit a file of {file_size:,}"
        raise MalformedInputError(path, reason, "the file looks truncated; download or save it again")
    return length


def _refuse_minus_zero(raw: bytes, path: str) -> None:
    """Python reads `-0` as the integer 0, the library as a float, which it refuses."""
    if b"-0" not in raw:
        return

    def integer(digits: str) -> int:
        if digits == "-0":
            raise MalformedInputError(path, "the number -0 where a size or an offset should be")
        return 0

    json.loads(raw[LENGTH_BYTES:], parse_int=integer)


def _metadata(found: object, path: str) -> dict[str, str]:
    if not isinstance(found, dict):
        raise MalformedInputError(path, f"`__metadata__` is {_kind(found)}, not an object of strings")
    for key, value in found.items():
        if not isinstance(value, str):
            raise MalformedInputError(path, f"`__metadata__` entry {quoted(key)} is {_kind(value)}, not a string")
        if _SURROGATE.search(key) or _SURROGATE.search(value):
            raise MalformedInputError(path, f"`__metadata__` entry {quoted(key)} holds a lone surrogate")
    return found


def _tensor(name: str, entry: object, path: str) -> tuple[str, str, tuple[int, ...], int, int]:
    """One entry of the header as (name, dtype, shape, begin, bytes); `begin` counts from the start of the data."""
    problem = tensor_name_problem(name)
    if problem:
        raise MalformedInputError(path, problem)

    def refuse(reason: str) -> MalformedInputError:
        return MalformedInputError(path, f"tensor {quoted(name)}: {reason}")

    if not isinstance(entry, dict):
        raise refuse(f"its entry is {_kind(entry)}, not an object")
    for field in (*_FIELDS, *entry):
        if field not in entry:
            raise refuse(f"its entry has no `{field}`")
        if field not in _FIELDS:
            raise refuse(f"its entry has a field {quoted(field)} that safetensors does not define")
    dtype, shape, offsets = (entry[field] for field in _FIELDS)
    if not isinstance(dtype, str):
        raise refuse(f"its dtype is {_kind(dtype)}, not a string")
    if dtype not in BITS:
        raise refuse(f"{quoted(dtype)} is not a dtype of safetensors")
    reason = _shape_problem(shape) or _offsets_problem(offsets)
    if reason:
        raise refuse(reason)
    begin, end = offsets
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8:
        raise refuse(f"shape {shape} of {dtype} takes {bits} bits, which are not whole bytes")
    if bits // 8 != end - begin:
        raise refuse(f"shape {shape} of {dtype} takes {bits // 8:,} bytes, its data_offsets span {end - begin:,}")
    return name, dtype, tuple(shape), begin, end - begin


def _shape_problem(shape: object) -> str | None:
    if not isinstance(shape, list):
        return f"its shape is {_kind(shape)}, not a list"
    if len(shape) > MAX_RANK:
        return f"its rank is {len(shape):,}, at most {MAX_RANK} is read"
    for size in shape:
        # `type`, not isinstance: true is an int to Python.
        if type(size) is not int:
            return f"its shape holds {_kind(size)}, not an integer"
        if not 0 <= size < LIMIT:
            return f"its shape holds the size {size}, outside 0 ... 2^63 - 1"
    # Zeros are left out: the library multiplies from the left and may overflow before it meets one.
    if math.prod(size for size in shape if size) >= LIMIT:
        return f"its shape {shape} has 2^63 elements or more"
    return None


def _offsets_problem(offsets: object) -> str | None:
    if not isinstance(offsets, list) or len(offsets) != 2:
        return "its data_offsets are not a list of two"
    for offset in offsets:
        if type(offset) is not int:
            return f"its data_offsets hold {_kind(offset)}, not an integer"
        if not 0 <= offset < LIMIT:
            return f"its data_offsets hold {offset}, outside 0 ... 2^63 - 1"
    if offsets[1] < offsets[0]:
        return f"its data_offsets {offsets} run backwards"
    return None


def _check_tiling(tensors: Sequence[TensorInfo], data_start: int, file_size: int, path: str) -> None:
    """Each tensor starts where the one before it ends, the first at the data's start, and the last ends the file."""
    end, before = data_start, "the header"
    for info in tensors:
        if info.start < end:
            overlap = end - info.start
            raise MalformedInputError(path, f"tensor {quoted(info.name)} overlaps {before} by {overlap:,} bytes")
        if info.start > end:
            hole = info.start - end
            raise MalformedInputError(path, f"a hole of {hole:,} bytes between {before} and tensor {quoted(info.name)}")
        end, before = info.start + info.nbytes, f"tensor {quoted(info.name)}"
    if end > file_size:
        reason = f"the file has {file_size:,} bytes, {before} ends at byte {end:,}"
        raise MalformedInputError(path, reason, "the file looks truncated; download or save it again")
    if end < file_size:
        raise MalformedInputError(path, f"{file_size - end:,} trailing bytes after {before}")


def _kind(value: object) -> str:
    """A JSON value's kind, as a reader of the file would call it."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), f"the number {value}")
