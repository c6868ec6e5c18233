"""Hostile headers: each row is a file, and a word of the reason it is refused for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streammerge.core.errors import InputError, MalformedInputError
from streammerge.formats.safetensors import parse_header, read_header


def framed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def one(data: bytes = b"\0" * 8, **changes: Any) -> bytes:
    """A file with the one tensor `t`, F32 [2], its entry changed."""
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return framed(json.dumps({"t": {key: value for key, value in entry.items() if value is not ...}}).encode(), data)


def literal(shape: bytes, offsets: bytes = b"[0,8]", data: bytes = b"\0" * 8) -> bytes:
    return framed(b'{"t":{"dtype":"F32","shape":' + shape + b',"data_offsets":' + offsets + b"}}", data)


def two(first: list[int], second: list[int], size: int) -> bytes:
    entries = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }
    return framed(json.dumps(entries).encode(), bytes(size))


def named(name: bytes) -> bytes:
    return framed(b'{"' + name + b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0")


def meta(value: bytes) -> bytes:
    return framed(b'{"__metadata__":' + value + b"}")


T = b'"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'

HOSTILE = {
    "empty file": (b"", "too short"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "too short"),
    "no header": (b"\0" * 8, "start with `{`"),
    "length past the end": (b"\x03\0\0\0\0\0\0\0{}", "does not fit"),
    "length over the limit": ((100_000_001).to_bytes(8, "little") + b"{}", "format allows"),
    "length 2^64 - 1": (b"\xff" * 8 + b"{}", "format allows"),
    "a pickle": (b"\x80\x02}q\x00X\x01\0\0\0w.", "format allows"),
    "a zip archive": (b"PK\x03\x04\0\0\x08\x08" + bytes(40), "format allows"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS pointer"),
    "an HTML page": (b"<!DOCTYPE html><html></html>", "HTML page"),
    "leading space": (framed(b" {}"), "start with `{`"),
    "byte order mark": (framed(b"\xef\xbb\xbf{}"), "start with `{`"),
    "a list": (framed(b"[]"), "start with `{`"),
    "NUL padding": (framed(b"{}\0\0"), "not JSON"),
    "text after the object": (framed(b"{}{}"), "not JSON"),
    "unfinished JSON": (framed(b'{"t":'), "not JSON"),
    "single quotes": (framed(b"{'t':1}"), "not JSON"),
    "a raw newline in a name": (named(b"a\nb"), "not JSON"),
    "not UTF-8": (named(b"\xff"), "UTF-8"),
    "deep nesting": (framed(b'{"t":' + b"[" * 200 + b"]" * 200 + b"}"), "nested deeper"),
    "very deep nesting": (framed(b'{"t":' + b"[" * 200_000), "nested deeper"),
    "a duplicate tensor": (framed(b"{" + T + b"," + T + b"}", b"\0"), "twice"),
    "a duplicate tensor by escape": (framed(b"{" + T + b"," + T.replace(b"t", b"\\u0074", 1) + b"}", b"\0"), "twice"),
    "duplicate metadata": (framed(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "a duplicate field": (
        framed(b'{"t":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"\0"),
        "twice",
    ),
    "an empty name": (named(b""), "empty name"),
    "NUL in a name": (named(b"a\\u0000b"), r"control character, U\+0000"),
    "an escape sequence in a name": (named(b"a\\u001b[2J"), r"control character, U\+001B"),
    "a C1 control in a name": (named(b"a\\u009b2J"), r"control character, U\+009B"),
    "a lone surrogate in a name": (named(b"a\\ud800"), "lone surrogate"),
    "metadata null": (meta(b"null"), "`__metadata__` is null"),
    "metadata list": (meta(b"[]"), "`__metadata__` is a list"),
    "metadata number": (meta(b'{"k":1}'), "the number 1, not a string"),
    "metadata nested": (meta(b'{"k":{}}'), "an object, not a string"),
    "metadata NaN": (meta(b'{"k":NaN}'), "NaN"),
    "metadata surrogate": (meta(b'{"k":"\\udfff"}'), "lone surrogate"),
    "entry is a list": (framed(b'{"t":["U8",[1],[0,1]]}', b"\0"), "a list, not an object"),
    "entry is null": (framed(b'{"t":null}'), "null, not an object"),
    "no dtype": (one(dtype=...), "no `dtype`"),
    "no shape": (one(shape=...), "no `shape`"),
    "no offsets": (one(data_offsets=...), "no `data_offsets`"),
    "an unknown field": (one(stride=[1]), "field `stride`"),
    "dtype is a number": (one(dtype=32), "dtype is the number 32"),
    "an unknown dtype": (one(dtype="F128"), "`F128` is not a dtype"),
    "a lower-case dtype": (one(dtype="f32"), "`f32` is not a dtype"),
    "shape is a number": (one(shape=2), "shape is the number 2"),
    "shape is null": (one(shape=None), "shape is null"),
    "a negative size": (one(shape=[-2]), "outside 0"),
    "a float size": (one(shape=[2.0]), "the number 2.0, not an integer"),
    "a size with an exponent": (literal(b"[2e0]"), "not an integer"),
    "a boolean size": (one(shape=[True, 2]), "a boolean, not an integer"),
    "a string size": (one(shape=["2"]), "a string, not an integer"),
    "a size of minus zero": (literal(b"[-0]", b"[0,0]", b""), "-0"),
    "an offset of minus zero": (literal(b"[2]", b"[-0,8]"), "-0"),
    "a leading zero": (literal(b"[02]"), "not JSON"),
    "a size of 2^63": (one(shape=[2**63]), "outside 0"),
    "a size of 2^64 + 2": (one(shape=[2**64 + 2]), "outside 0"),
    "a number of a thousand digits": (literal(b"[" + b"1" * 1000 + b"]"), "1000 digits"),
    "a product of 2^64 + 2^32": (one(shape=[2**32, 2**32 + 1]), "2\\^63 elements"),
    "an overflow hidden by a zero": (one(b"", shape=[2**62, 4, 0], data_offsets=[0, 0]), "2\\^63 elements"),
    "rank 65": (one(b"\0" * 4, shape=[1] * 65, data_offsets=[0, 4]), "rank is 65"),
    "rank 100,000": (one(b"\0" * 4, shape=[1] * 100_000, data_offsets=[0, 4]), "rank is 100,000"),
    "one offset": (one(data_offsets=[8]), "list of two"),
    "three offsets": (one(data_offsets=[0, 8, 8]), "list of two"),
    "offsets are a string": (one(data_offsets="08"), "list of two"),
    "a float offset": (one(data_offsets=[0, 8.0]), "not an integer"),
    "a negative offset": (one(data_offsets=[-8, 0]), "outside 0"),
    "offsets backwards": (one(data_offsets=[8, 0]), "backwards"),
    "offset of 2^64": (one(data_offsets=[0, 2**64]), "outside 0"),
    "extent too long for the shape": (one(b"\0" * 9, data_offsets=[0, 9]), "span 9"),
    "extent too short for the shape": (one(b"\0" * 7, data_offsets=[0, 7]), "span 7"),
    "F4 of half a byte": (one(b"\0" * 2, dtype="F4", shape=[3], data_offsets=[0, 2]), "whole bytes"),
    "F6 of half a byte": (one(b"\0" * 2, dtype="F6_E3M2", shape=[2], data_offsets=[0, 2]), "whole bytes"),
    "a hole before the first": (one(b"\0" * 16, data_offsets=[8, 16]), "hole of 8 bytes between the header"),
    "a hole between two": (two([0, 4], [6, 8], 8), "hole of 2 bytes between tensor `a`"),
    "an overlap": (two([0, 5], [4, 8], 8), "`b` overlaps tensor `a` by 1 bytes"),
    "the same bytes twice": (two([0, 4], [0, 4], 4), "`b` overlaps tensor `a` by 4 bytes"),
    "an empty tensor inside another": (two([0, 4], [2, 2], 4), "overlaps"),
    "trailing bytes": (one(b"\0" * 9), "1 trailing bytes"),
    "trailing bytes without tensors": (framed(b"{}", b"\0"), "1 trailing bytes after the header"),
    "truncated data": (one(b"\0" * 7), "tensor `t` ends at byte"),
}


@pytest.mark.parametrize(("data", "word"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused_for_its_reason(tmp_path: Path, data: bytes, word: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(MalformedInputError, match=word) as caught:
        read_header(path, "x.safetensors")
    assert caught.value.path == str(path)
    assert caught.value.exit_code == InputError.exit_code == 3


def test_the_corpus_is_built_on_a_file_that_is_accepted() -> None:
    data = one()
    assert parse_header(data[:-8], len(data), "x", "x").tensors[0].nbytes == 8
    fine = two([0, 4], [4, 8], 8)
    assert len(parse_header(fine[:-8], len(fine), "x", "x").tensors) == 2


@pytest.mark.parametrize("cut", range(8, 70, 7))
def test_a_header_that_is_not_whole_is_refused(cut: int) -> None:
    data = one()
    with pytest.raises(MalformedInputError):
        parse_header(data[:cut], len(data), "x", "x")


def test_what_an_error_shows_of_a_hostile_name_is_escaped_and_short() -> None:
    data = named(b"\\u202e\\u001b[2J" + b"x" * 100_000)
    with pytest.raises(MalformedInputError) as caught:
        parse_header(data[:-1], len(data), "x", "x")
    text = str(caught.value)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[2Jxxx" in text
    assert "(100,005 characters)" in text
    assert len(text) < 400
