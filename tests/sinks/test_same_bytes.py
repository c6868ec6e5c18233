"""The bytes of an output follow from its inputs: not from workers, budget, or the ways files are read and written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import streammerge
from streammerge.core import digests, io
from streammerge.core.errors import BudgetError
from streammerge.planning import memory
from tests.refusals.making import CONFIG, MARKER, PREFIX, Stored, load, load_all, make_adapter, tree_digest, write_json
from tests.sinks.subjects import (
    DIRECTED,
    HIDDEN,
    SHAPES,
    base_tensors,
    exact,
    expected_values,
    make_small,
    make_subject,
    rounded,
    save_as_laid,
)

WORKERS, WRITTEN, READ = (1, 2, 5), ("direct", "buffered"), ("mmap", "pread", "direct")


@pytest.fixture
def written(tmp_path: Path) -> tuple[str, ...]:
    """The ways of writing that this file system has."""
    return WRITTEN if io.takes_direct_writes(tmp_path) else ("buffered",)


def budgets(base: Path, adapters: list[Path]) -> tuple[int, int, int]:
    """One that holds one worker, however it reads, one that holds a few, one that holds any."""
    with pytest.raises(BudgetError) as caught:
        streammerge.plan(base, adapters, memory=1, read="direct")
    least = caught.value.needed
    return least, 3 * least, 20 * least


@pytest.mark.out_of_order  # nothing is synced, or it would take minutes
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_every_way_of_running_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: tuple[str, ...], dtype: str
) -> None:
    make_small(monkeypatch)
    monkeypatch.setattr(io, "sync_file", lambda fd, path: None)
    base, adapters = make_subject(tmp_path, dtype)
    found: dict[str, list[object]] = {}
    counts = set()
    ways = itertools.product(WORKERS, budgets(base, adapters), written, READ)
    for number, (workers, budget, write, read) in enumerate(ways):
        out = tmp_path / f"out-{number}"
        options = {"workers": workers, "memory": budget, "io": write, "read": read}
        report = streammerge.merge(base, adapters, out, verify=False, **options)
        assert report.io == write
        counts.add(streammerge.plan(base, adapters, workers=workers, memory=budget).figures.workers)
        found.setdefault(tree_digest(out), []).append(options)
    assert counts >= {1, 2, 5}
    assert len(found) == 1, found
    assert_expected(tmp_path / "out-0", dtype)


def assert_expected(out: Path, dtype: str) -> None:
    """Every tensor is the reference's, bit for bit; DoRA's up to one step of the dtype, of which norms may take one."""
    tensors, values = load_all(out), expected_values(dtype)
    assert tensors["odd"].data == b"\x01\x02\x03"
    assert tensors.keys() - {"odd"} == values.keys()
    for name, value in values.items():
        wanted = rounded(value, dtype)
        if name != f"{DIRECTED}.weight":
            assert tensors[name].data == wanted, name
            continue
        kind = {"BF16": np.int16, "F16": np.int16, "F32": np.int32, "F64": np.int64}[dtype]
        steps = np.frombuffer(tensors[name].data, kind) - np.frombuffer(wanted, kind)
        assert np.abs(steps).max() <= (8 if dtype == "F64" else 1)
        assert dtype == "F64" or np.count_nonzero(steps) == 0


@pytest.mark.parametrize("dtype", ["F16", "F64"])
def test_other_dtypes_are_rounded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    base, adapters = make_subject(tmp_path, dtype)
    streammerge.merge(base, adapters, tmp_path / "out", workers=2)
    assert_expected(tmp_path / "out", dtype)
    make_small(monkeypatch)
    streammerge.merge(base, adapters, tmp_path / "small", workers=2, verify=False)
    assert_expected(tmp_path / "small", dtype)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "small" / shard.name).read_bytes()


def test_no_subject_is_left_as_it_was() -> None:
    """The tests above would not see a delta that is lost if it were too small to see."""
    stored, values = base_tensors("BF16"), expected_values("BF16")
    changed = [name for name in SHAPES if rounded(values[f"{name}.weight"], "BF16") != stored[f"{name}.weight"].data]
    untouched = {"model.embed_tokens", "model.layers.0.input_layernorm", "lm_head"}
    assert set(changed) == SHAPES.keys() - untouched


def test_tensors_in_other_files_have_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    base, adapters = make_subject(tmp_path, "F64")
    tensors = []
    for size in ("keep", "300KB", "5MB"):
        streammerge.merge(base, adapters, tmp_path / size, max_shard_size=size, verify=False)
        tensors.append(load_all(tmp_path / size))
    assert len({len(list((tmp_path / size).glob("*.safetensors"))) for size in ("keep", "300KB", "5MB")}) == 3
    assert tensors[0] == tensors[1] == tensors[2]


# --- at full size -----------------------------------------------------------------------------------------------------
ROWS, COLS = 9001, 3001
"""54 MB in bf16: a tile has 43 rows and begins wherever it may in a piece; the block ends in the last tensor."""
LARGE = {"model.small.weight": (77, HIDDEN), "model.large.weight": (ROWS, COLS), "model.copied.weight": (2203, COLS)}


def test_a_file_of_more_than_a_block_is_the_same_from_any_number_of_workers(
    tmp_path: Path, written: tuple[str, ...]
) -> None:
    generator = np.random.default_rng(1)
    tensors = {
        name: Stored("BF16", shape, generator.integers(0x3C00, 0x3F80, shape, np.uint16).tobytes())
        for name, shape in LARGE.items()
    }
    base = tmp_path / "base"
    save_as_laid(base / "model.safetensors", tensors, padding=5)
    write_json(base / "config.json", dict(CONFIG))
    size = (base / "model.safetensors").stat().st_size
    assert digests.BLOCK < size < digests.BLOCK + 2 * memory.PIECE
    a, b = exact("large A", 3, COLS), exact("large B", ROWS, 3)
    factors = {f"{PREFIX}model.large.lora_A.weight": a, f"{PREFIX}model.large.lora_B.weight": b}
    adapter = make_adapter(tmp_path / "adapter", factors, r=3, lora_alpha=2)
    ways = [(1, "pread", written[0]), (2, "mmap", written[-1]), (2, "direct", written[0])]
    found = set()
    for number, (workers, read, write) in enumerate(ways):
        out = tmp_path / f"out-{number}"
        streammerge.merge(base, adapter, out, workers=workers, read=read, io=write, verify=False)
        found.add((out / MARKER).read_bytes())
        if number == 0:
            assert_large(load(out / "model.safetensors"), tensors, a, b)
            blocks = json.loads((out / MARKER).read_text())["files"]["model.safetensors"]["blocks"]
            assert len(blocks) == 2
        (out / "model.safetensors").unlink()
    assert len(found) == 1


def assert_large(ours: dict[str, Stored], tensors: dict[str, Stored], a: Stored, b: Stored) -> None:
    """The copied tensors are the base's, the large one the reference's, a thousand rows at a time."""
    factors = [np.frombuffer(item.data, np.float32).astype(np.float64).reshape(item.shape) for item in (b, a)]
    for name in ("model.small.weight", "model.copied.weight"):
        assert ours[name] == tensors[name]
    stored = np.frombuffer(tensors["model.large.weight"].data, np.uint16).reshape(ROWS, COLS)
    for first in range(0, ROWS, 1000):
        wide = (stored[first : first + 1000].astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        value = wide + (factors[0][first : first + 1000] @ factors[1]) * (2 / 3)
        start = first * COLS * 2
        assert ours["model.large.weight"].data[start : start + 2 * value.size] == rounded(value, "BF16")
