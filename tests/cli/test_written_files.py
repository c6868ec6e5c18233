"""What is on disk after a run: header bytes, dtypes, files and their names, sidecars, config.json, modes."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from streammerge.core.digests import sealed
from tests.refusals.making import (
    ALPHA,
    BASE_CONFIG,
    CONFIG,
    INDEX,
    MARKER,
    RANK,
    TARGETS,
    Stored,
    all_factors,
    base_tensors,
    call,
    expected,
    factors,
    inputs_at,
    load,
    load_all,
    make_adapter,
    make_base,
    merged,
    save,
    shard_name,
    values_of,
    write_json,
)

Q0 = f"{TARGETS[0]}.weight"
FIRST, SECOND = shard_name(0, 2), shard_name(1, 2)


def header_of(path: Path) -> bytes:
    data = path.read_bytes()
    return data[: 8 + int.from_bytes(data[:8], "little")]


def framed(tensors: dict[str, Stored], metadata: dict[str, str], *, pad: int = 0, spaced: bool = False) -> bytes:
    """A file as another writer may have made it: its own order, spaces and padding, and any dtype by name."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "shape": list(tensor.shape),
            "data_offsets": [end, end + len(tensor.data)],
            "dtype": tensor.dtype,
        }
        end += len(tensor.data)
    text = json.dumps(header, indent=1 if spaced else None).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + b"".join(tensor.data for tensor in tensors.values())


# --- headers and bytes ----------------------------------------------------------------------------------------------
def test_header_bytes_are_the_bases_while_names_shapes_and_dtypes_stay(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    tensors = load(base / FIRST)
    odd = framed(tensors, {"format": "pt", "trained on": "Tuesdays", "note": "ünïcode"}, pad=13, spaced=True)
    (base / FIRST).write_bytes(odd)
    merged(base, adapter, tmp_path / "out")
    for file in (FIRST, SECOND):
        assert header_of(tmp_path / "out" / file) == header_of(base / file)
    assert (tmp_path / "out" / FIRST).read_bytes() != odd


def test_a_header_without_metadata_stays_without(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / FIRST).write_bytes(framed(load(base / FIRST), {}))
    merged(base, adapter, tmp_path / "out")
    assert header_of(tmp_path / "out" / FIRST) == header_of(base / FIRST)
    assert b"__metadata__" not in header_of(tmp_path / "out" / FIRST)


def test_metadata_is_kept_when_the_header_has_to_be_written_again(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / FIRST).write_bytes(framed(load(base / FIRST), {"format": "pt", "licence": "mine"}))
    merged(base, adapter, tmp_path / "out", "--dtype", "float32")
    header = json.loads(header_of(tmp_path / "out" / FIRST)[8:])
    assert header["__metadata__"] == {"format": "pt", "licence": "mine"}
    assert {item["dtype"] for name, item in header.items() if name != "__metadata__"} == {"F32"}


def test_only_what_the_adapter_touches_differs_from_the_base(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    before, after = load_all(base), load_all(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {f"{name}.weight" for name in TARGETS}
    a, b = factors(TARGETS[0]).values()
    want = expected(before[Q0], a, b, ALPHA / RANK).astype(np.float32)
    # BF16 keeps 8 bits of the fraction: half a step of the value's own power of two.
    assert np.abs(values_of(after[Q0]) - want).max() <= np.abs(want).max() * 2**-8
    exact = load_all(_merged_as(base, adapter, tmp_path / "wide", "float32"))[Q0]
    np.testing.assert_array_equal(values_of(exact), want)


def _merged_as(base: Path, adapter: Path, out: Path, dtype: str) -> Path:
    merged(base, adapter, out, "--dtype", dtype)
    return out


STRANGE = ("F8_E8M0", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "U16", "U32", "U64", "I8", "BOOL", "C64", "F4", "F6_E2M3")


def strange() -> dict[str, Stored]:
    bits = {"U16": 16, "U32": 32, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6}
    return {
        f"model.buffers.{dtype}": Stored(dtype, (4, 4), bytes(range(1, 1 + 16 * bits.get(dtype, 8) // 8)))
        for dtype in STRANGE
    } | {"model.buffers.flags": Stored("BOOL", (2,), b"\x01\x00")}


@pytest.mark.parametrize(
    "options", [(), ("--max-shard-size", "3kB"), ("--dtype", "float16")], ids=["keep", "reshard", "dtype"]
)
def test_tensors_of_dtypes_that_no_arithmetic_knows_are_copied_byte_for_byte(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    base, adapter = make_base(tmp_path / "base", shards=1), make_adapter(tmp_path / "adapter")
    (base / "model.safetensors").write_bytes(framed(base_tensors() | strange(), {"format": "pt"}))
    merged(base, adapter, tmp_path / "out", *options)
    written = load_all(tmp_path / "out")
    for name, tensor in strange().items():
        assert written[name] == tensor


def test_scalars_and_empty_tensors_are_copied(tmp_path: Path) -> None:
    odd = {"model.step": Stored("F32", (), b"\0\0\x80\x3f"), "model.nothing": Stored("BF16", (0, 16), b"")}
    base, adapter = make_base(tmp_path / "base", base_tensors() | odd), make_adapter(tmp_path / "adapter")
    merged(base, adapter, tmp_path / "out")
    written = load_all(tmp_path / "out")
    assert {name: written[name] for name in odd} == odd


# --- dtype ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("option", "dtype"), [("float32", "F32"), ("float16", "F16"), ("bfloat16", "BF16")])
def test_the_dtype_option_is_that_of_every_float_tensor_and_of_the_config(
    tmp_path: Path, option: str, dtype: str
) -> None:
    base, adapter = make_base(tmp_path / "base", base_tensors(dtype="F16")), make_adapter(tmp_path / "adapter")
    merged(base, adapter, tmp_path / "out", "--dtype", option)
    assert {tensor.dtype for tensor in load_all(tmp_path / "out").values()} == {dtype}
    assert json.loads((tmp_path / "out" / BASE_CONFIG).read_text())["dtype"] == option


def test_the_dtype_is_changed_under_its_old_name_and_in_sub_configs_and_nothing_else_is(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    config = {"z": 1, "torch_dtype": "bfloat16", "text_config": {"dtype": "bfloat16", "a": [1]}, **CONFIG}
    del config["dtype"]
    write_json(base / BASE_CONFIG, config)
    merged(base, adapter, tmp_path / "out", "--dtype", "float32")
    written = json.loads((tmp_path / "out" / BASE_CONFIG).read_text())
    assert list(written) == list(config)
    assert written == config | {"torch_dtype": "float32", "text_config": {"dtype": "float32", "a": [1]}}
    report = json.loads((tmp_path / "out" / MARKER).read_text())
    assert report["config_edits"] == [[["torch_dtype"], "float32"], [["text_config", "dtype"], "float32"]]


def test_a_config_that_nothing_changes_keeps_its_bytes(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / BASE_CONFIG).write_text(json.dumps({"b": 1, **CONFIG}, indent=7) + "\n\n")
    merged(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / BASE_CONFIG).read_bytes() == (base / BASE_CONFIG).read_bytes()


# --- files ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "limit"), [("1kB", 1000), ("3kB", 3000), ("2KiB", 2048), ("4000", 4000)])
def test_re_sharding_fills_files_up_to_the_size_and_indexes_them(tmp_path: Path, size: str, limit: int) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "plain")
    merged(base, adapter, tmp_path / "out", "--max-shard-size", size)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [shard_name(number, len(files)) for number in range(len(files))]
    found = [load(tmp_path / "out" / file) for file in files]
    sizes = [[len(tensor.data) for tensor in tensors.values()] for tensors in found]
    for number, inside in enumerate(sizes):
        assert sum(inside) <= limit or len(inside) == 1
        if number + 1 < len(sizes):
            assert sum(inside) + sizes[number + 1][0] > limit, f"{files[number]} had room for one tensor more"
    assert load_all(tmp_path / "out") == load_all(tmp_path / "plain")
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"] == {name: file for file, tensors in zip(files, found, strict=True) for name in tensors}
    assert index["metadata"]["total_size"] == sum(map(sum, sizes)) == 7776


def test_re_sharding_to_one_file_gives_the_plain_name_and_no_index(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out", "--max-shard-size", "5GB")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", BASE_CONFIG, "generation_config.json", MARKER, ".streammerge-inputs.json"}
    assert load(tmp_path / "out" / "model.safetensors").keys() == base_tensors().keys()


def test_a_single_file_stays_a_single_file_without_an_index(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base", shards=1), make_adapter(tmp_path / "adapter")
    merged(base, adapter, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", BASE_CONFIG, "generation_config.json", MARKER, ".streammerge-inputs.json"}


def test_a_lone_file_keeps_its_name_and_has_no_sidecars(tmp_path: Path) -> None:
    lone, adapter = tmp_path / "base" / "flux-dev.safetensors", make_adapter(tmp_path / "adapter")
    save(lone, base_tensors())
    (lone.parent / "README.md").write_text("not ours to copy")
    outcome = call("run", lone, adapter, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {lone.name, MARKER, ".streammerge-inputs.json"}
    assert load(tmp_path / "out" / lone.name)[Q0] != base_tensors()[Q0]
    assert call("verify", tmp_path / "out", "--full").code == 0


def test_sidecars_are_copied_with_their_folders_and_what_is_left_out_is_recorded(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    (base / "assets" / "deep").mkdir(parents=True)
    (base / "assets" / "deep" / "a.json").write_text("{}")
    (base / "modeling_custom.py").write_text("x = 1\n")
    (base / "empty.txt").touch()
    (base / "pytorch_model.gguf").write_bytes(b"GGUF")
    (base / "checkpoint-10").mkdir()
    (base / "checkpoint-10" / "x.txt").write_text("x")
    merged(base, adapter, tmp_path / "out")
    for name in ("assets/deep/a.json", "modeling_custom.py", "empty.txt", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    report = json.loads((tmp_path / "out" / MARKER).read_text())
    assert report["code"] == ["modeling_custom.py"]
    assert report["left_out"] == {
        "checkpoint-10/": "a training checkpoint",
        "pytorch_model.gguf": "weights in another format",
    }
    assert not (tmp_path / "out" / "checkpoint-10").exists()
    assert "modeling_custom.py is copied; loaders may run it" in call("plan", base, adapter).out


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_get_the_modes_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    base, adapter = inputs_at(tmp_path)
    before = os.umask(umask)
    try:
        merged(base, adapter, tmp_path / "out")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_nothing_of_ours_is_left_but_the_report_and_where_the_inputs_were(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "out")
    ours = sorted(path.name for path in (tmp_path / "out").iterdir() if "streammerge" in path.name)
    assert ours == [".streammerge-inputs.json", MARKER]
    recorded = json.loads((tmp_path / "out" / ".streammerge-inputs.json").read_text())
    assert recorded == sealed({"base": str(base), "adapters": [str(adapter)]})
    report = (tmp_path / "out" / MARKER).read_text()
    assert str(tmp_path) not in report


def test_the_output_does_not_depend_on_workers_budget_or_reading(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "one", "-j", "1", "--read", "pread", "--memory", "30MB")
    merged(base, adapter, tmp_path / "two", "-j", "4", "--read", "mmap", "--memory", "1GB", "--no-verify")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_base_in_torch_pickles_becomes_safetensors(tmp_path: Path) -> None:
    import torch

    from tests.refusals.making import as_torch

    base, adapter = make_base(tmp_path / "base", shards=1), make_adapter(tmp_path / "adapter")
    tensors = {name: as_torch(tensor) for name, tensor in base_tensors().items()}
    torch.save(tensors, base / "pytorch_model.bin")
    merged(base, adapter, tmp_path / "from-safetensors")
    (base / "model.safetensors").unlink()
    merged(base, adapter, tmp_path / "out")
    assert load(tmp_path / "out" / "model.safetensors") == load(tmp_path / "from-safetensors" / "model.safetensors")
    header = json.loads(header_of(tmp_path / "out" / "model.safetensors")[8:])
    assert header["__metadata__"] == {"format": "pt"}
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_an_adapter_in_a_torch_pickle_merges_to_the_same_bytes(tmp_path: Path) -> None:
    import torch

    from tests.refusals.making import as_torch

    base, adapter = inputs_at(tmp_path)
    merged(base, adapter, tmp_path / "healthy")
    torch.save({key: as_torch(value) for key, value in all_factors().items()}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    merged(base, adapter, tmp_path / "out")
    assert load_all(tmp_path / "out") == load_all(tmp_path / "healthy")
