"""The one JSON loader for everything that comes from outside: headers, indexes, configs, reports.

Stricter than `json.loads`: UTF-8 without BOM, an object at the top, no duplicate key, no NaN or Infinity, no number
out of range, bounded depth and size. Raises MalformedInputError naming the file.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from streammerge.core.errors import MalformedInputError

MAX_BYTES = 100_000_000
"""The header limit of safetensors 0.8; no config or index comes near it."""
MAX_DEPTH = 64
MAX_DIGITS = 40
"""Longer integers cost quadratic time to convert, and 2^64 has 20 digits."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_BRACKET = re.compile(r"[{}\[\]]")
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

    if len(data) > MAX_BYTES:
        raise refuse(f"{len(data):,} bytes of JSON, at most {MAX_BYTES:,} are read")
    try:
        text = str(data, "utf-8")
        _check_depth(text, path)
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


def _check_depth(text: str, path: str) -> None:
    """Refuse deep nesting before the parser recurses; brackets inside strings do not count."""
    if text.count("{") + text.count("[") <= MAX_DEPTH:
        return
    depth = 0
    for bracket in _BRACKET.finditer(_STRING.sub("", text)):
        depth += 1 if bracket[0] in "{[" else -1
        if depth > MAX_DEPTH:
            raise MalformedInputError(path, f"nested deeper than {MAX_DEPTH} levels")
