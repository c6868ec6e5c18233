"""Headers as literal bytes, and the safetensors library as the judge of what is written and what is accepted."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from streammerge.core.dtypes import BITS
from streammerge.core.errors import InputMissingError, MalformedInputError, UnsafeInputError
from streammerge.core.tensors import TensorInfo
from streammerge.formats.safetensors import Header, encode_header, parse_header, read_header

SMALL = (
    b"\x50\0\0\0\0\0\0\0"
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
    b'"__metadata__":{"k":"v"}} '
)  # fmt: skip


def parsed(data: bytes) -> Header:
    """The header of a whole file's bytes."""
    return parse_header(data[: 8 + int.from_bytes(data[:8], "little")], len(data), "x.safetensors", "x.safetensors")


def file_of(header: bytes, data_size: int) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(data_size)


def test_a_literal_header_gives_its_facts() -> None:
    header = SMALL.replace(b"\x50", bytes([len(SMALL) - 8]), 1)
    found = parse_header(header, len(header) + 8, "dir/m.safetensors", "m.safetensors")
    assert found.tensors == (TensorInfo("a", "F32", (2,), "m.safetensors", len(header), 8),)
    assert found.metadata == {"k": "v"}
    assert found.raw == header
    assert found.data_start == len(header)


def test_encoding_gives_these_bytes() -> None:
    entries = [("w", "BF16", (2, 3), 12), ("b", "U8", (), 1)]
    expected = (
        b'{"__metadata__":{"a":"1","format":"pt"},'
        b'"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"b":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}'
    )
    padded = expected + b" " * 2
    assert encode_header(entries, {"format": "pt", "a": "1"}) == (152).to_bytes(8, "little") + padded
    assert len(padded) == 152


@pytest.mark.parametrize("name", ["w", "ww", "www", "wwww", "wwwww", "wwwwww", "wwwwwww", "é", "日本"])
def test_data_after_an_encoded_header_starts_at_a_multiple_of_eight(name: str) -> None:
    header = encode_header([(name, "U8", (1,), 1)], {})
    assert len(header) % 8 == 0
    assert safetensors.deserialize(header + b"\7") == [(name, {"dtype": "U8", "shape": [1], "data": b"\7"})]


def test_an_empty_header_without_tensors_is_read_and_written() -> None:
    assert encode_header([], {}) == b"\x08\0\0\0\0\0\0\0{}      "
    assert parsed(b"\x08\0\0\0\0\0\0\0{}      ").tensors == ()


def test_encoding_a_name_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="already taken"):
        encode_header([("w", "U8", (1,), 1), ("w", "U8", (1,), 1)], {})
    with pytest.raises(ValueError, match="already taken"):
        encode_header([("__metadata__", "U8", (1,), 1)], {})


def test_encoding_more_header_than_would_be_read_again_is_an_error() -> None:
    with pytest.raises(ValueError, match="30,000,000"):
        encode_header([], {"k": "v" * 100_000_000})


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_every_dtype_is_written_as_the_library_reads_it(dtype: str) -> None:
    nbytes = 8 * BITS[dtype] // 8
    data = bytes(range(nbytes))
    written = encode_header([("t", dtype, (2, 4), nbytes)], {"format": "pt"}) + data
    assert safetensors.deserialize(written) == [("t", {"dtype": dtype, "shape": [2, 4], "data": data})]
    (info,) = parsed(written).tensors
    assert (info.dtype, info.shape, info.nbytes) == (dtype, (2, 4), nbytes)
    assert written[info.start : info.start + info.nbytes] == data


@pytest.mark.parametrize(
    "dtype", sorted(set(BITS) - {"BF16", "C64"} - {d for d in BITS if d.startswith(("F4", "F6", "F8"))})
)
def test_what_the_library_writes_is_read_with_the_same_bytes(dtype: str) -> None:
    import numpy as np

    kind = {"BOOL": "bool", "F": "float", "I": "int", "U": "uint"}
    numpy_name = kind["BOOL"] if dtype == "BOOL" else f"{kind[dtype[0]]}{dtype[1:]}"
    array = np.arange(6).reshape(2, 3).astype(numpy_name)
    data = save({"t": array, "other": np.zeros(3, np.int8)}, {"k": "v"})
    found = parsed(data)
    info = next(info for info in found.tensors if info.name == "t")
    assert data[info.start : info.start + info.nbytes] == array.tobytes()
    assert (info.dtype, info.shape, found.metadata) == (dtype, (2, 3), {"k": "v"})


def test_tensors_come_in_offset_order_whatever_the_header_order() -> None:
    header = (
        b'{"late":{"dtype":"U8","shape":[3],"data_offsets":[2,5]},'
        b'"none":{"dtype":"F32","shape":[0,7],"data_offsets":[2,2]},'
        b'"early":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    )
    found = parsed(file_of(header, 5))
    start = 8 + len(header)
    assert [(info.name, info.start - start, info.nbytes) for info in found.tensors] == [
        ("early", 0, 2),
        ("none", 2, 0),
        ("late", 2, 3),
    ]


def test_a_misaligned_tensor_and_trailing_space_are_legal() -> None:
    first, second = (
        b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}',
        b'{"dtype":"F32","shape":[],"data_offsets":[1,5]}',
    )
    header = b'{"a":' + first + b',"b":' + second + b"}\n\t "
    assert [info.start for info in parsed(file_of(header, 5)).tensors] == [8 + len(header), 9 + len(header)]


def test_a_name_with_minus_zero_in_it_is_only_a_name() -> None:
    data = encode_header([("layer-0.w", "U8", (1,), 1)], {}) + b"\1"
    assert parsed(data).tensors[0].name == "layer-0.w"


def test_an_escaped_name_is_the_decoded_one() -> None:
    header = rb'{"\u00e9\ud83d\ude00":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    assert parsed(file_of(header, 1)).tensors[0].name == "é\U0001f600"


def test_a_file_is_read_without_its_data(tmp_path: Path) -> None:
    header = encode_header([("w", "U8", (2**40,), 2**40)], {})
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as stream:
        stream.write(header)
    os.truncate(path, len(header) + 2**40)  # sparse: a terabyte that nobody could read
    found = read_header(path, "huge.safetensors")
    assert found.tensors == (TensorInfo("w", "U8", (2**40,), "huge.safetensors", len(header), 2**40),)
    assert found.raw == header


def test_the_name_inside_the_checkpoint_is_kept_and_the_path_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(encode_header([("w", "U8", (1,), 1)], {}))
    with pytest.raises(MalformedInputError, match="blob` is malformed") as caught:
        read_header(path, "model.safetensors")
    assert caught.value.path == str(path)
    path.write_bytes(encode_header([("w", "U8", (1,), 1)], {}) + b"\0")
    assert read_header(path, "model.safetensors").tensors[0].file == "model.safetensors"


def test_a_missing_file_and_a_pipe_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError):
        read_header(tmp_path / "none", "none")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        read_header(tmp_path / "pipe", "pipe")


@pytest.mark.parametrize("length", [100_000_001, 2**63, 2**64 - 1])
def test_a_length_bomb_is_refused_before_anything_is_allocated(tmp_path: Path, length: int) -> None:
    path = tmp_path / "bomb.safetensors"
    path.write_bytes(length.to_bytes(8, "little"))
    os.truncate(path, 2**42)
    with pytest.raises(MalformedInputError, match=r"100,000,000"):
        read_header(path, "bomb.safetensors")


def test_a_length_beyond_the_end_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes((99_999_999).to_bytes(8, "little") + b"{}")
    with pytest.raises(MalformedInputError, match="does not fit a file of 10"):
        read_header(path, "short.safetensors")


def library_accepts(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except (safetensors.SafetensorError, OverflowError, ValueError):
        return False
    return True


def ours_accepts(data: bytes) -> bool:
    try:
        parsed(data)
    except MalformedInputError:
        return False
    return True


_VALID = [
    encode_header([("a", "F32", (2, 3), 24), ("b.c", "BF16", (), 2), ("n", "U8", (0, 4), 0)], {"format": "pt"})
    + bytes(26),
    encode_header([("q", "F4", (2, 2), 2), ("r", "F6_E2M3", (4,), 3), ("z-0", "I64", (1,), 8)], {}) + bytes(13),
    encode_header([], {"k": "v"}),
]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(_VALID),
    st.lists(
        st.tuples(
            st.floats(0, 1, exclude_max=True),
            st.one_of(
                st.binary(min_size=1, max_size=1),
                st.sampled_from(rb'-0 0 00 1e0 true null NaN [] {} , } " \ud800 F8'.split()),
            ),
            st.sampled_from(["replace", "insert", "delete"]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_whatever_a_mutated_file_says_the_library_accepts_what_we_accept(
    data: bytes, edits: list[tuple[float, bytes, str]]
) -> None:
    for where, new, how in edits:
        at = int(where * len(data))
        data = data[:at] + (b"" if how == "delete" else new) + data[at + (0 if how == "insert" else len(new)) :]
    # The length is set right again in half of the cases by the edits' own position, so that JSON is reached.
    if edits[0][0] < 0.9 and len(data) > 8:
        end = data.rfind(b"}") + 1
        data = max(0, end - 8).to_bytes(8, "little") + data[8:]
    if ours_accepts(data):
        assert library_accepts(data)


_SIZE = st.one_of(
    st.integers(0, 4), st.sampled_from([-1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 1.0, True, None])
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from([*sorted(BITS), "F128", "f32"]), st.lists(_SIZE, max_size=3), st.integers(-1, 1)),
        max_size=4,
    )
)
def test_whatever_shapes_a_header_claims_the_library_accepts_what_we_accept(
    rows: list[tuple[str, list[int], int]],
) -> None:
    document, end = {}, 0
    for number, (dtype, shape, slack) in enumerate(rows):
        count = 1
        for size in shape:
            count *= int(size or 0)
        nbytes = count * BITS.get(dtype, 8) // 8
        begin, end = end, end + nbytes + slack
        document[f"t{number}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    data = file_of(json.dumps(document).encode(), min(max(end, 0), 1000))
    if ours_accepts(data):
        assert library_accepts(data)


def test_the_differential_tests_see_both_outcomes() -> None:
    assert all(ours_accepts(data) and library_accepts(data) for data in _VALID)
    assert not any(library_accepts(data + b"\0") or ours_accepts(data + b"\0") for data in _VALID)
    assert load(_VALID[2]) == {}
