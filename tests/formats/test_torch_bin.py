"""Real `torch.save` files: the bytes at our offsets are torch's own values, and nothing but tensors is ever loaded."""

from __future__ import annotations

import collections
import io as stdio
import os
import re
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from streammerge.core.dtypes import BITS
from streammerge.core.errors import InputMissingError, MalformedInputError, UnsafeInputError
from streammerge.core.tensors import TensorInfo
from streammerge.formats.torch_bin import DTYPES, _info, read_torch_bin

BASE = torch.arange(12, dtype=torch.float32).reshape(3, 4)
TORCH_DTYPES = [getattr(torch, name.removeprefix("torch.")) for name in DTYPES]


def saved(path: Path, value: Any, **how: Any) -> Path:
    torch.save(value, path, **how)
    return path


def facts(path: Path) -> dict[str, TensorInfo]:
    found = read_torch_bin(path, "pytorch_model.bin")
    assert [info.start for info in found] == sorted(info.start for info in found)
    return {info.name: info for info in found}


def value_at(path: Path, info: TensorInfo) -> torch.Tensor:
    """The tensor that `info` describes, from the bytes of the file alone."""
    dtype = next(dtype for dtype in TORCH_DTYPES if DTYPES[str(dtype)] == info.dtype)
    strides = info.strides or torch.empty(info.shape, device="meta").stride()
    reach = 1 + sum((size - 1) * stride for size, stride in zip(info.shape, strides, strict=True))
    data = bytearray(path.read_bytes()[info.start :][: reach * dtype.itemsize])
    return torch.frombuffer(data, dtype=dtype).as_strided(info.shape, strides)


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8).tolist())


def rebuilt(path: Path, change: dict[str, bytes | None], *, compression: int = zipfile.ZIP_STORED) -> Path:
    """The archive at `path` with the records in `change` replaced or, where None, left out."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    folder = next(iter(records)).partition("/")[0]
    records |= {f"{folder}/{name}": data for name, data in change.items() if data is not None}
    for name in (name for name, data in change.items() if data is None):
        del records[f"{folder}/{name}"]
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return path


def test_every_kind_of_view_is_read_with_torchs_own_values(tmp_path: Path) -> None:
    tensors = collections.OrderedDict(
        plain=BASE,
        tied=BASE,
        parameter=torch.nn.Parameter(BASE),
        rows=BASE[1:],
        gaps=BASE[:, 1:3],
        transposed=BASE.t(),
        steps=BASE.reshape(-1)[1::3],
        expanded=BASE[1].expand(5, 4),
        permuted=torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1),
        scalar=torch.tensor(3.5),
        half=torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).half(),
        brain=torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).bfloat16(),
        count=torch.tensor([-1, 2**62]),
        flags=torch.tensor([True, False, True]),
        one_row=BASE[1:2].t().t(),
    )
    path = saved(tmp_path / "m.bin", tensors)
    found = facts(path)
    loaded = torch.load(path, weights_only=True)
    assert set(found) == set(tensors)
    for name, info in found.items():
        assert bits(value_at(path, info)) == bits(loaded[name]) == bits(tensors[name]), name
        assert info.shape == tuple(tensors[name].shape)
        assert info.nbytes == tensors[name].numel() * tensors[name].element_size()
        assert info.file == "pytorch_model.bin"
    start = found["plain"].start
    assert start % 64 == 0
    assert {name: info.strides for name, info in found.items() if info.strides} == {
        "gaps": (4, 1),
        "transposed": (1, 4),
        "steps": (3,),
        "expanded": (0, 1),
        "permuted": (1, 12, 4),
    }
    offsets = {"plain": 0, "tied": 0, "parameter": 0, "transposed": 0, "rows": 16, "one_row": 16, "gaps": 4, "steps": 4}
    assert {name: found[name].start - start for name in offsets} == offsets


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_dtype_of_the_table_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.arange(48, dtype=torch.uint8).view(dtype).reshape(2, -1) if dtype != torch.bool else BASE > 4
    path = saved(tmp_path / "m.bin", {"first": BASE, "t": tensor})
    info = facts(path)["t"]
    assert BITS[info.dtype] == 8 * dtype.itemsize
    assert path.read_bytes()[info.start : info.start + info.nbytes] == bits(tensor)


def test_every_dtype_torch_shares_with_safetensors_is_in_the_table() -> None:
    by_library = {str(dtype): name for name, dtype in safetensors.torch._TYPES.items()}
    assert {name: dtype for name, dtype in DTYPES.items() if name in by_library} == {
        name: dtype for name, dtype in by_library.items() if name != "torch.complex64"
    }


def test_tensors_without_elements_have_no_bytes(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"none": torch.empty(0, 3), "cut": BASE[0:0], "w": BASE})
    found = facts(path)
    assert (found["none"].shape, found["none"].nbytes) == ((0, 3), 0)
    assert (found["cut"].shape, found["cut"].nbytes, found["cut"].strides) == ((0, 4), 0, None)
    assert bits(value_at(path, found["w"])) == bits(BASE)


@pytest.mark.parametrize("value", [{}, {"none": torch.empty(0)}, {"cut": BASE[0:0]}], ids=["no tensor", "empty", "cut"])
def test_a_file_of_nothing_has_no_bytes(tmp_path: Path, value: dict[str, torch.Tensor]) -> None:
    assert [info.nbytes for info in read_torch_bin(saved(tmp_path / "m.bin", value), "m.bin")] == [0] * len(value)


def test_a_modules_state_dict_with_its_version_notes_is_read(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    assert hasattr(state, "_metadata")
    assert set(facts(saved(tmp_path / "m.bin", state))) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_repacked_archive_with_other_offsets_is_read(tmp_path: Path) -> None:
    path = rebuilt(saved(tmp_path / "m.bin", {"w": BASE, "v": BASE.t().contiguous()}), {})
    found = facts(path)
    assert found["w"].start % 64 != 0
    assert bits(value_at(path, found["w"])) == bits(BASE)
    assert bits(value_at(path, found["v"])) == bits(BASE.t())


# --- what is refused ------------------------------------------------------------------------------------------------
class Evil:
    """Unpickled without care, it creates a file."""

    def __init__(self, canary: Path, function: Any = os.system) -> None:
        self.call = (function, (f"touch {canary}",))

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec], ids=["os.system", "eval", "exec"])
@pytest.mark.parametrize("force", ["0", "1"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, force: str
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", force)
    canary = tmp_path / "canary"
    evil = Evil(canary, function)
    if function is not os.system:
        evil.call = (function, (f"__import__('pathlib').Path({str(canary)!r}).touch()",))
    path = saved(tmp_path / "m.bin", {"w": BASE, "x": evil})
    with pytest.raises(UnsafeInputError, match=rf"asks for `(posix\.)?{function.__name__}`") as caught:
        read_torch_bin(path, "m.bin")
    assert not canary.exists()
    assert "weights_only` set to `False" not in str(caught.value)
    torch.load(path, weights_only=False)
    assert canary.exists(), "the pickle is harmless, the test shows nothing"


def test_a_legacy_pickle_that_would_run_code_does_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = saved(tmp_path / "m.bin", {"x": Evil(canary)}, _use_new_zipfile_serialization=False)
    with pytest.raises(MalformedInputError, match="not a zip archive"):
        read_torch_bin(path, "m.bin")
    assert not canary.exists()


def test_a_numpy_value_is_refused_by_its_name(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"w": BASE, "step": BASE.numpy()[0, 0]})
    with pytest.raises(UnsafeInputError, match="asks for `numpy"):
        read_torch_bin(path, "m.bin")


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    path = rebuilt(saved(tmp_path / "m.bin", {"w": BASE}), {"constants.pkl": b"\x80\x02)."})
    with pytest.raises(UnsafeInputError, match="TorchScript"):
        read_torch_bin(path, "m.bin")


def test_a_torch_whose_safe_loader_is_not_safe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.bin", {"w": BASE})
    for version, safe in (("2.5.1", False), ("2.6.0", True), ("2.10.0+cpu", True)):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        if safe:
            assert len(read_torch_bin(path, "m.bin")) == 1
        else:
            with pytest.raises(UnsafeInputError, match=r"torch 2\.5\.1 can be made to run code"):
                read_torch_bin(path, "m.bin")


def test_a_legacy_file_is_refused_with_a_recipe_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"w": BASE, "tied": BASE, "t": BASE.t()}
    path = saved(tmp_path / "pytorch_model.bin", state, _use_new_zipfile_serialization=False)
    with pytest.raises(MalformedInputError, match=r"before torch 1\.6") as caught:
        read_torch_bin(path, "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    recipe = "\n".join(line.strip() for line in caught.value.hint().splitlines()[1:])
    exec(recipe, {"torch": torch, "safetensors": safetensors})
    written = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {name: bits(tensor) for name, tensor in written.items()} == {name: bits(t) for name, t in state.items()}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ([BASE], "holds a list"),
        (BASE, "holds a Tensor"),
        ({"model": {"w": BASE}, "epoch": 3}, r"also holds `model` \(dict\), `epoch` \(int\)"),
        ({"state_dict": {"w": BASE}}, r"save the dict under `state_dict` alone"),
        ({"w": BASE, "step": 1, "lr": 0.1}, r"also holds `step` \(int\), `lr` \(float\)"),
        ({f"s{n}": n for n in range(9)}, r"`s4` \(int\) and 4 more"),
        ({0: BASE}, "name of type int"),
        ({"": BASE}, "empty name"),
        ({"a\x1b": BASE}, r"control character, U\+001B"),
        ({"w": BASE.to(torch.complex64)}, "`w` is of torch.complex64"),
        ({"w": BASE.to(torch.uint8).view(torch.float4_e2m1fn_x2)}, "`w` is of torch.float4_e2m1fn_x2"),
        ({"w": BASE.to_sparse()}, r"`w` is not dense \(torch.sparse_coo\)"),
        ({"w": BASE.to("meta")}, r"`w` has no bytes in the file \(meta\)"),
        ({"w": torch._neg_view(BASE)}, "`w` is stored with its sign flipped"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_a_flat_dict_of_plain_tensors_is_refused(tmp_path: Path, value: Any, word: str) -> None:
    path = saved(tmp_path / "m.bin", value)
    with pytest.raises(MalformedInputError, match=word) as caught:
        read_torch_bin(path, "m.bin")
    assert caught.value.path == str(path)


@pytest.mark.filterwarnings(
    "ignore:torch.quantize_per_tensor:UserWarning", "ignore:TypedStorage is deprecated:UserWarning"
)
def test_a_quantized_tensor_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"w": torch.quantize_per_tensor(BASE, 1.0, 0, torch.qint8)})
    with pytest.raises(MalformedInputError, match=r"`w` is of torch\.qint8"):
        read_torch_bin(path, "m.bin")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"byteorder": b"big"}, "little-endian"),
        ({"byteorder": b"little endian"}, "little-endian"),
        ({"data.pkl": None}, "no `data.pkl`"),
        ({"data.pkl": b"\x80\x02}"}, "its pickle cannot be read"),
        ({"data.pkl": b"\x80\x02}q\x00."}, "0 storages that are not the 1"),
        ({"data/0": None}, "torch cannot read it"),
        ({"data/0": bytes(47)}, "1 storages that are not the 1"),
        ({"data/0": bytes(49)}, "1 storages that are not the 1"),
        ({"data/1": bytes(4)}, "1 storages that are not the 2"),
    ],
)
def test_an_archive_that_contradicts_its_pickle_is_refused(tmp_path: Path, change: dict[str, Any], word: str) -> None:
    path = rebuilt(saved(tmp_path / "m.bin", {"w": BASE}), change)
    with pytest.raises(MalformedInputError, match=word):
        read_torch_bin(path, "m.bin")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = rebuilt(saved(tmp_path / "m.bin", {"w": torch.zeros(100)}), {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(MalformedInputError, match="is compressed or encrypted"):
        read_torch_bin(path, "m.bin")


def test_a_huge_pickle_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streammerge.formats.torch_bin.MAX_PICKLE", 50)
    with pytest.raises(MalformedInputError, match=r"a pickle of \d+ bytes, at most 50"):
        read_torch_bin(saved(tmp_path / "m.bin", {"w": BASE}), "m.bin")


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_a_member_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"w": BASE})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("m/data/0", bytes(48))
    with pytest.raises(MalformedInputError, match="stands twice"):
        read_torch_bin(path, "m.bin")


def test_bytes_before_the_archive_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"w": BASE})
    path.write_bytes(b"PK\x03\x04" + bytes(60) + path.read_bytes())
    with pytest.raises(MalformedInputError, match="does not start at the first byte"):
        read_torch_bin(path, "m.bin")


def test_a_directory_that_points_into_another_member_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"w": BASE, "v": BASE + 1})
    with zipfile.ZipFile(path) as archive:
        first, second = (archive.getinfo(f"m/data/{n}").header_offset for n in (0, 1))
    data = bytearray(path.read_bytes())
    (at,) = (m.start() for m in re.finditer(re.escape(struct.pack("<I", second) + b"m/data/1"), data))
    data[at : at + 4] = struct.pack("<I", first)
    path.write_bytes(data)
    with pytest.raises(MalformedInputError, match="overlaps"):
        read_torch_bin(path, "m.bin")


def test_a_directory_that_points_at_the_end_of_the_members_is_refused(tmp_path: Path) -> None:
    path = rebuilt(saved(tmp_path / "m.bin", {"w": BASE}), {"zz": b"tail PK\x03\x04"})
    with zipfile.ZipFile(path) as archive:
        offset, end = archive.getinfo("m/zz").header_offset, archive.start_dir
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", offset) + b"m/zz", struct.pack("<I", end - 4) + b"m/zz"))
    with pytest.raises(MalformedInputError, match="`m/zz` is not where the directory says"):
        read_torch_bin(path, "m.bin")


def test_a_member_that_reaches_into_the_directory_is_refused(tmp_path: Path) -> None:
    path = rebuilt(saved(tmp_path / "m.bin", {"w": BASE}), {"zz": b"tail"})
    data = bytearray(path.read_bytes())
    name = data.rindex(b"m/zz")
    data[name - 26 : name - 18] = struct.pack("<II", 5, 5)  # both sizes in the directory, 4 before
    path.write_bytes(data)
    with pytest.raises(MalformedInputError, match="`m/zz` overlaps"):
        read_torch_bin(path, "m.bin")


def test_every_truncation_is_an_error_of_ours(tmp_path: Path) -> None:
    buffer = stdio.BytesIO()
    torch.save({"w": BASE}, buffer)
    data = buffer.getvalue()
    path = tmp_path / "m.bin"
    for size in range(0, len(data), 37):
        path.write_bytes(data[:size])
        with pytest.raises(MalformedInputError):
            read_torch_bin(path, "m.bin")


def test_a_missing_file_a_pipe_and_a_pointer_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissingError):
        read_torch_bin(tmp_path / "none.bin", "none.bin")
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(UnsafeInputError, match="not a regular file"):
        read_torch_bin(tmp_path / "pipe.bin", "pipe.bin")
    (tmp_path / "lfs.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(MalformedInputError, match="Git LFS pointer"):
        read_torch_bin(tmp_path / "lfs.bin", "lfs.bin")


class Labelled(torch.Tensor):
    """A tensor with a type of its own, as quantization libraries have them."""


def test_a_tensor_subclass_is_refused_even_where_the_process_allows_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.bin", {"w": BASE.as_subclass(Labelled)})
    with (
        torch.serialization.safe_globals([Labelled]),
        pytest.raises(MalformedInputError, match=r"asks for `.*Labelled`"),
    ):
        read_torch_bin(path, "m.bin")
    with pytest.raises(UnsafeInputError, match=r"asks for `.*Labelled`"):
        read_torch_bin(path, "m.bin")


def test_a_tensor_that_reaches_beyond_its_storage_is_refused() -> None:
    # torch refuses to load one, so only a torch that has changed could hand it to us.
    tensor = BASE.clone()
    tensor.untyped_storage().resize_(44)
    with pytest.raises(MalformedInputError, match="`w` reaches beyond its storage of 44 bytes"):
        _info("w", tensor, "m.bin", 0, "m.bin")


def test_a_storage_that_torch_places_elsewhere_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.bin", {"w": BASE, "v": BASE + 1})
    real = torch.load

    def shifted(*args: Any, **kwargs: Any) -> Any:
        loaded = real(*args, **kwargs)
        return {"w": loaded["w"], "v": loaded["v"].clone()}

    monkeypatch.setattr(torch, "load", shifted)
    with pytest.raises(MalformedInputError, match="2 storages that are not the 2"):
        read_torch_bin(path, "m.bin")
