"""The one JSON loader for everything that comes from outside: headers, indexes, configs, reports.

Stricter than `json.loads`: UTF-8 without BOM, an object at the top, no duplicate key, no NaN or Infinity, no number
out of range, bounded depth and size. Reading takes at most 64 MiB and 16 times the text, objects included: what would
take more is refused before it is parsed. Raises MalformedInputError naming the file.
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any

from streammerge.core.errors import MalformedInputError
from streammerge.core.text import size_text

MAX_BYTES = 100_000_000
"""The header limit of safetensors 0.8: no file of JSON that is read has more."""
MAX_TEXT, MAX_MEMORY = 30_000_000, 300_000_000
"""Bytes of one document, once what does not matter is taken out of it, and of what Python makes of it. The index of a
checkpoint of 140,000 tensors has 15 MB; a string takes up to nine times its bytes while it is read."""
MAX_DEPTH = 64
MAX_DIGITS = 40
"""Longer integers cost quadratic time to convert, and 2^64 has 20 digits."""

SMALL = 2**16
"""Bytes of text that cannot take much memory, whatever is in them."""
FREE, FACTOR = 48 * 2**20, 15
"""Bytes for objects, and bytes for each byte of text: what is left of the bound when the caller holds the text too."""
COSTS = ((b"{", 300), (b"[", 100), (b":", 150), (b",", 80))
"""Bytes that Python takes at most for what each of these stands for, measured with texts of little else; a tensor in a
header takes 12 times its 110 bytes or more, an empty list 30 times its three."""
WIDE = 40
"""What a string takes more where not all of the text is ASCII: a longer head, and four bytes for a character."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
# Some thousand strings and what is between them: taking strings out of a text costs 160 bytes for each of them.
_STRETCH = re.compile(rb'(?:[^"]++|"(?:[^"\\]++|\\.)*+"){1,10000}+', re.DOTALL)
_NO_VALUES = bytes(set(range(256)) - set(b"{}[]:,"))
_AS_LISTS = bytes.maketrans(b"{}", b"[]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def loads(data: bytes | memoryview, path: str, *, nan_ok: bool = False) -> dict[str, Any]:
    """The object in `data`. With `nan_ok`, NaN and Infinity pass as floats, for a caller that names them itself."""

    def refuse(reason: str) -> MalformedInputError:
        return MalformedInputError(path, reason)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise refuse(f"the key `{repeated}` stands twice in one object")
        return value

    def constant(name: str) -> float:
        if nan_ok:
            return float(name)
        raise refuse(f"{name} is not a JSON number")

    def integer(digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            raise refuse(f"a number of {len(digits)} digits")
        return int(digits)

    def real(digits: str) -> float:
        value = float(digits)
        if math.isinf(value) and not nan_ok:
            raise refuse(f"the number {digits[:MAX_DIGITS]} is out of range")
        return value

    if len(data) > MAX_TEXT:
        raise refuse(f"{len(data):,} bytes of JSON, at most {MAX_TEXT:,} are read")
    try:
        text = str(data, "utf-8")
        _check_structure(data, text, path)
        value = json.loads(text, object_pairs_hook=unique, parse_constant=constant, parse_int=integer, parse_float=real)
    except UnicodeDecodeError as error:
        raise refuse(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise refuse(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise refuse("nested too deeply") from None
    if not isinstance(value, dict):
        raise refuse("not a JSON object at the top")
    if _SURROGATE.search(text) and not _encodable(value):
        raise refuse("a string holds a lone surrogate")
    return value


def dumps(value: Any) -> bytes:
    """Canonical JSON as we write it: sorted keys, two spaces, a newline at the end, never NaN."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_structure(data: bytes | memoryview, text: str, path: str) -> None:
    """Refuse deep nesting before the parser recurses, and too many values before it makes them; what stands inside
    strings does not count."""
    if text.count("{") + text.count("[") <= MAX_DEPTH and len(data) <= SMALL:
        return
    most = sum(text.count(char.decode()) * cost for char, cost in COSTS)
    if most > MAX_MEMORY:
        raise MalformedInputError(
            path, f"its {len(data):,} bytes hold so many values that reading them could take {size_text(most)}"
        )
    outside = b"".join(_STRING.sub(b"", run[0]).translate(None, _NO_VALUES) for run in _STRETCH.finditer(data))
    brackets = outside.translate(_AS_LISTS, b":,")
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"[]", b"")
    if b"[]" in brackets or brackets.count(b"[") > MAX_DEPTH:
        raise MalformedInputError(path, f"nested deeper than {MAX_DEPTH} levels")
    wide = 0 if text.isascii() else WIDE * (outside.count(b",") + outside.count(b":"))
    needed = sys.getsizeof(text) + wide + sum(outside.count(char) * cost for char, cost in COSTS)
    if needed > FREE + FACTOR * len(data):
        raise MalformedInputError(
            path, f"its {len(data):,} bytes hold so many values that reading them could take {size_text(needed)}"
        )
