"""The JSON loader: what is refused, with the file's name and the reason, and what passes."""

from __future__ import annotations

import json

import pytest

from streammerge.core import strict_json
from streammerge.core.errors import MalformedInputError

DEEP = strict_json.MAX_DEPTH
REFUSED = {
    "nothing": (b"", "not JSON"),
    "half of it": (b'{"a": ', "not JSON"),
    "something after it": (b"{} {}", "not JSON"),
    "a list": (b"[1]", "not a JSON object at the top"),
    "a number": (b"1", "not a JSON object at the top"),
    "null": (b"null", "not a JSON object at the top"),
    "a key twice": (b'{"a": 1, "b": 2, "a": 1}', "the key `a` stands twice"),
    "a key twice in depth": (b'{"x": [{"k": 1, "k": 2}]}', "the key `k` stands twice"),
    "a key twice by escape": (b'{"a": 1, "\\u0061": 2}', "the key `a` stands twice"),
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "Infinity": (b'{"a": Infinity}', "Infinity is not a JSON number"),
    "minus Infinity": (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
    "a float out of range": (b'{"a": 1e999}', "the number 1e999 is out of range"),
    "an integer of many digits": (b'{"a": ' + b"9" * 41 + b"}", "a number of 41 digits"),
    "a byte order mark": (b"\xef\xbb\xbf{}", "not JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16-le"), "JSON"),
    "bytes that are no UTF-8": (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
    "half of a surrogate pair": (b'{"a": "\\ud800"}', "surrogate"),
    "half of a pair as a key": (b'{"\\uDC00": 1}', "surrogate"),
    "objects too deep": (b'{"a":' * (DEEP + 1) + b"1" + b"}" * (DEEP + 1), "nested deeper than 64 levels"),
    "lists too deep": (b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}", "nested deeper than 64 levels"),
    "very deep": (b'{"a":' + b"[" * 10**6, "nested deeper than 64 levels"),
    "deep after strings with brackets": (b'{"]]]]": "\\"]]]", "a":' + b"[" * DEEP + b"]" * DEEP + b"}", "deeper"),
}


@pytest.mark.parametrize(("data", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_plain_json_is_refused_by_name_and_reason(data: bytes, reason: str) -> None:
    with pytest.raises(MalformedInputError, match="`dir/file.json` is malformed") as caught:
        strict_json.loads(data, "dir/file.json")
    assert reason in str(caught.value)


def test_too_many_bytes_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MAX_TEXT", 10)
    assert strict_json.loads(b'{"a": 123}', "f") == {"a": 123}
    with pytest.raises(MalformedInputError, match="11 bytes of JSON, at most 10"):
        strict_json.loads(b'{"a": 1234}', "f")


PASSED = {
    "an empty object": {},
    "all kinds": {"a": None, "b": [True, False, -1, 0.5, "x", {}], "c": {"d": []}},
    "large integers": {"a": 2**64, "b": -(10**38)},
    "a whole surrogate pair": {"a": "\U0001f600"},
    "brackets in strings": {"[" * 100: "{" * 100},
    "as deep as allowed": json.loads('{"a":' * DEEP + "1" + "}" * DEEP),
}


@pytest.mark.parametrize("value", PASSED.values(), ids=PASSED)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_plain_json_passes_as_the_standard_library_reads_it(value: dict[str, object], ascii_only: bool) -> None:
    assert strict_json.loads(json.dumps(value, ensure_ascii=ascii_only).encode(), "f") == value


def test_an_escaped_half_that_is_text_is_no_surrogate() -> None:
    assert strict_json.loads(b'{"a": "\\\\ud800"}', "f") == {"a": "\\ud800"}


def test_a_caller_may_ask_for_numbers_that_are_not_finite() -> None:
    value = strict_json.loads(b'{"a": NaN, "b": [Infinity, -Infinity], "c": 1e999}', "f", nan_ok=True)
    assert value["a"] != value["a"]
    assert value["b"] == [float("inf"), float("-inf")]
    assert value["c"] == float("inf")


def test_what_we_write_is_canonical_and_reads_back() -> None:
    value = {"b": [1, 2.5], "a": {"ü": None}}
    data = strict_json.dumps(value)
    assert data == '{\n  "a": {\n    "ü": null\n  },\n  "b": [\n    1,\n    2.5\n  ]\n}\n'.encode()
    assert strict_json.loads(data, "f") == value
    with pytest.raises(ValueError, match="not JSON compliant"):
        strict_json.dumps({"a": float("nan")})
