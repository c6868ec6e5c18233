"""The index: what is read, what is written, and which shard names never get near a file system call."""

from __future__ import annotations

import json

import pytest

from streammerge.core.errors import MalformedInputError, UnsafeInputError
from streammerge.core.tensors import TensorInfo
from streammerge.formats.index import WeightIndex, check_index, encode_index, file_name_problem, parse_index

PATH = "model.safetensors.index.json"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def index_of(file: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": {"w": file}}).encode()


def tensors(file: str, *names: str) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name, "U8", (1,), file, 8, 1) for name in names)


def test_a_literal_index_gives_its_facts() -> None:
    data = b'{"metadata": {"total_size": 3, "x": [1]}, "weight_map": {"w": "m-1.safetensors", "b": "m-2.safetensors"}}'
    assert parse_index(data, PATH) == WeightIndex(
        {"w": "m-1.safetensors", "b": "m-2.safetensors"}, {"total_size": 3, "x": [1]}
    )


def test_an_index_without_metadata_is_read() -> None:
    assert parse_index(b'{"weight_map": {"w": "pytorch_model-1.bin"}}', PATH).metadata == {}


def test_the_index_is_written_as_transformers_writes_it() -> None:
    base = {"total_size": 1, "total_parameters": 7, "a": None}
    assert encode_index({"w": A, "b": B}, 12, base) == (
        b'{\n  "metadata": {\n    "a": null,\n    "total_parameters": 7,\n    "total_size": 12\n  },\n'
        b'  "weight_map": {\n    "b": "model-00002-of-00002.safetensors",\n'
        b'    "w": "model-00001-of-00002.safetensors"\n  }\n}\n'
    )
    again = {"metadata": {**base, "total_size": 12}, "weight_map": {"w": A, "b": B}}
    assert encode_index({"w": A, "b": B}, 12, base).decode() == json.dumps(again, indent=2, sort_keys=True) + "\n"
    assert base["total_size"] == 1


def test_a_written_index_reads_back() -> None:
    written = encode_index({"é": A}, 5, {"note": "日本"})
    assert parse_index(written, PATH) == WeightIndex({"é": A}, {"note": "日本", "total_size": 5})


TRAVERSAL = [
    "", ".", "..", "../model.safetensors", "../../etc/passwd", "sub/model.safetensors", "/etc/passwd", "/m.safetensors",
    "..\\model.safetensors", "sub\\model.safetensors", "\\\\server\\share\\m.safetensors", "C:m.safetensors",
    "C:\\m.safetensors", "m.safetensors:stream", "m.safetensors\0", "\0.safetensors", "m\n.safetensors",
    "m\x7f.safetensors", "m\x85.safetensors", "m\x1b[2J.safetensors", "m.safetensors.", "m.safetensors ", "...",
    "NUL", "nul.safetensors",
    "Con.safetensors", "aux.tar.safetensors", "COM1.safetensors", "lpt9.bin", "COM¹.safetensors", "CONOUT$.bin",
    "prn .safetensors", "./model.safetensors", "a/../model.safetensors", "~/m.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("file", TRAVERSAL)
def test_a_shard_name_that_could_leave_the_checkpoint_is_unsafe(file: str) -> None:
    with pytest.raises(UnsafeInputError, match="the shard name"):
        parse_index(index_of(file), PATH)


@pytest.mark.parametrize(
    "file",
    ["model.safetensors", A, "pytorch_model-00001-of-00002.bin", "model.fp16-00001-of-00003.safetensors",
     "é.safetensors", "console.safetensors", "com.safetensors", "com10.safetensors", "nullable.bin",
     "..hidden.bin", "a b.safetensors"],
)  # fmt: skip
def test_an_ordinary_shard_name_is_taken(file: str) -> None:
    assert file_name_problem(file) is None
    assert parse_index(index_of(file), PATH).weight_map == {"w": file}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"[]", "object"),
        (b"{}", "weight_map"),
        (b'{"weight_map": {}}', "weight_map"),
        (b'{"weight_map": []}', "weight_map"),
        (b'{"weight_map": {"w": 1}}', "`w` is not a string"),
        (b'{"weight_map": {"w": "m.safetensors", "w": "m.safetensors"}}', "twice"),
        (b'{"weight_map": {"": "m.safetensors"}}', "empty name"),
        (b'{"weight_map": {"a\\u0000b": "m.safetensors"}}', "control character, U\\+0000"),
        (b'{"weight_map": {"\\ud800": "m.safetensors"}}', "lone surrogate"),
        (b'{"weight_map": {"w": "m.safetensors"}, "metadata": []}', "metadata"),
        (b'{"weight_map": {"w": "m.safetensors"}, "metadata": {"x": NaN}}', "NaN"),
        (b'{"weight_map": {"w": "m.safetensors"}, "metadata": {"x": {"y": "\\udfff"}}}', "surrogate"),
        (b'{"weight_map": {"w": "model.pt"}}', "neither"),
        (b'{"weight_map": {"w": "model.SAFETENSORS"}}', "neither"),
        (b'{"weight_map": {"w": ".safetensors"}}', "neither"),
        (b'{"weight_map": {"w": "m.safetensors", "v": "m.bin"}}', "in one index"),
        (b'{"weight_map": ' + b"[" * 100_000, "deep"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"\xff{}", "UTF-8"),
    ],
)
def test_a_malformed_index_is_refused(data: bytes, word: str) -> None:
    with pytest.raises(MalformedInputError, match=word) as caught:
        parse_index(data, PATH)
    assert not isinstance(caught.value, UnsafeInputError)
    assert caught.value.path == PATH


def test_agreement_between_index_and_shards_is_silent() -> None:
    check_index(WeightIndex({"w": A, "b": B, "c": B}, {}), {A: tensors(A, "w"), B: tensors(B, "c", "b")}, PATH)


@pytest.mark.parametrize(
    ("weight_map", "headers", "word"),
    [
        ({"w": A}, {A: ()}, f"`w` is not in `{A}`"),
        ({"w": A}, {}, f"`w` is not in `{A}`"),
        ({"w": A}, {A: ("w", "extra")}, f"`extra` of `{A}` is not in the weight_map"),
        ({"w": A}, {A: ("w",), B: ("w",)}, f"`w` lies in `{B}` too, the weight_map says `{A}`"),
        ({"w": A, "b": B}, {A: ("b",), B: ("b", "w")}, f"`w` is not in `{A}`"),
    ],
)
def test_a_disagreement_is_named(weight_map: dict[str, str], headers: dict[str, tuple[str, ...]], word: str) -> None:
    stored = {file: tensors(file, *names) for file, names in headers.items()}
    with pytest.raises(MalformedInputError) as caught:
        check_index(WeightIndex(weight_map, {}), stored, PATH)
    assert word in caught.value.reason
    assert caught.value.path == PATH


def test_five_disagreements_are_named_and_the_others_counted() -> None:
    weight_map = {f"t{number}": A for number in range(12)}
    with pytest.raises(MalformedInputError) as caught:
        check_index(WeightIndex(weight_map, {}), {A: ()}, PATH)
    assert "`t4`" in caught.value.reason
    assert "`t5`" not in caught.value.reason
    assert caught.value.reason.endswith("and 7 more")
