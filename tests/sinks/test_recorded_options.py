"""What was asked for beyond the default is in the report: the precision of the arithmetic, and SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import streammerge
from streammerge.compute.worker import TileWorker
from streammerge.core.errors import InputReadError
from streammerge.sinks.hashes import FileHashes
from tests.refusals.making import MARKER, assert_nothing_loadable, call, inputs_at, load_all, values_of
from tests.sinks.subjects import DIRECTED, make_small, make_subject

INPUTS = ".streammerge-inputs.json"


def document_at(out: Path) -> dict[str, Any]:
    return json.loads((out / MARKER).read_text())


# --- the precision of the arithmetic ----------------------------------------------------------------------------------
def test_float32_is_another_plan_and_stands_in_the_report(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    documents = []
    for precision in ("float64", "float32"):
        streammerge.merge(base, adapter, tmp_path / precision, accumulate=precision)
        documents.append(document_at(tmp_path / precision))
        assert documents[-1]["options"]["accumulate"] == precision
    assert documents[0]["plan"] != documents[1]["plan"]
    assert documents[0]["fingerprint"] != documents[1]["fingerprint"]
    streammerge.merge(base, adapter, tmp_path / "default")
    assert document_at(tmp_path / "default") == documents[0]


def test_a_finished_output_of_one_precision_is_not_taken_for_the_other(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    out = tmp_path / "out"
    assert call("run", base, adapter, "-o", out).code == 0
    assert call("run", base, adapter, "-o", out, "--accumulate", "float32").code != 0
    assert document_at(out)["options"]["accumulate"] == "float64"
    assert call("run", base, adapter, "-o", out, "--accumulate", "float32", "--overwrite").code == 0
    assert document_at(out)["options"]["accumulate"] == "float32"
    assert call("verify", out, "--full").code == 0


@pytest.mark.parametrize(("precision", "dtype"), [("float64", torch.float64), ("float32", torch.float32)])
def test_everything_is_worked_on_in_that_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, dtype: torch.dtype
) -> None:
    base, adapters = make_subject(tmp_path, "BF16")
    found: set[torch.dtype] = set()
    made: list[TileWorker] = []
    real = TileWorker.__init__

    def noting(worker: TileWorker, *arguments: Any) -> None:
        real(worker, *arguments)
        made.append(worker)

    monkeypatch.setattr(TileWorker, "__init__", noting)
    streammerge.merge(base, adapters, tmp_path / "out", accumulate=precision, workers=1, verify=False)
    assert len(made) == 1
    for worker in made:
        found |= {worker.lane.work.dtype, worker.factors.dtype}
        found |= {tensor.dtype for tensor in worker.lane.work._kept.values()}
        found |= {tensor.dtype for _, _, tensor in worker.factors._kept.values()}
        assert {"delta", "value", "written"} <= worker.lane.work._kept.keys()
        assert worker.factors._kept
    assert found == {dtype}


def test_float32_is_within_a_rounding_of_float64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    base, adapters = make_subject(tmp_path, "BF16")
    merged = {}
    for precision in ("float64", "float32"):
        streammerge.merge(base, adapters, tmp_path / precision, accumulate=precision)
        merged[precision] = load_all(tmp_path / precision)
    for name, exact in merged["float64"].items():
        if exact.dtype == "U8":
            assert merged["float32"][name] == exact
            continue
        steps = np.frombuffer(merged["float32"][name].data, np.int16) - np.frombuffer(exact.data, np.int16)
        values, close = values_of(exact), values_of(merged["float32"][name])
        # A step of bf16, but where a sum all but cancels: there float32's own error is what is left.
        assert np.all((np.abs(steps.reshape(values.shape)) <= 1) | (np.abs(values - close) < 1e-5)), name
    stats = [document_at(tmp_path / precision)["tensors"] for precision in merged]
    for name, entry in stats[0].items():
        assert stats[1][name]["delta_norm"] == pytest.approx(entry["delta_norm"], rel=1e-4), name
        if name != f"{DIRECTED}.weight":
            assert stats[1][name]["delta_norm"] > 0


def test_float32_tells_where_float64_would_be_needed(tmp_path: Path) -> None:
    """The two do differ: a base of float32 shows the last bits."""
    base, adapters = make_subject(tmp_path, "F32")
    for precision in ("float64", "float32"):
        streammerge.merge(base, adapters[1], tmp_path / precision, accumulate=precision)
    name = "model.layers.0.mlp.down_proj.weight"
    ours, exact = (values_of(load_all(tmp_path / precision)[name]) for precision in ("float32", "float64"))
    assert np.abs(ours - exact).max() < 1e-5 * np.abs(exact).max()
    streammerge.merge(base, adapters[0], tmp_path / "a", accumulate="float32")
    streammerge.merge(base, adapters[0], tmp_path / "b", accumulate="float64")
    name = "model.layers.0.mlp.gate_up_proj.weight"
    assert load_all(tmp_path / "a")[name] != load_all(tmp_path / "b")[name]


# --- SHA-256 ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("write", ["auto", "buffered"])
def test_every_file_has_the_sha256_of_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str) -> None:
    make_small(monkeypatch)
    base, adapters = make_subject(tmp_path, "BF16")
    (base / "sub").mkdir()
    (base / "sub" / "notes.txt").write_text("notes " * 5000)
    (base / "empty.json").write_text("{}")
    out = tmp_path / "out"
    streammerge.merge(base, adapters, out, sha256=True, io=write, workers=2)
    document = document_at(out)
    recorded = {name: item["sha256"] for name, item in (document["files"] | document["sidecars"]).items()}
    there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert recorded.keys() == there - {MARKER, INPUTS}
    assert {"sub/notes.txt", "config.json", "model.safetensors.index.json"} <= recorded.keys()
    for name, digest in recorded.items():
        assert digest == hashlib.sha256((out / name).read_bytes()).hexdigest(), name
    assert streammerge.verify(out, full=True).status == "verified"


def test_without_the_flag_there_is_none(tmp_path: Path) -> None:
    base, adapter = inputs_at(tmp_path)
    streammerge.merge(base, adapter, tmp_path / "out")
    document = document_at(tmp_path / "out")
    assert document["options"]["sha256"] is False
    assert not [item for item in (document["files"] | document["sidecars"]).values() if "sha256" in item]


def test_a_file_that_cannot_be_read_back_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = inputs_at(tmp_path)

    def fail(hashes: FileHashes, path: str) -> str:
        raise InputReadError(path, "read", "Input/output error")

    monkeypatch.setattr(FileHashes, "_hash", fail)
    with pytest.raises(InputReadError, match="Input/output error"):
        streammerge.merge(base, adapter, tmp_path / "out", sha256=True)
    assert_nothing_loadable(tmp_path / "out")


def test_closing_ends_a_hash_at_its_next_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    (tmp_path / "file").write_bytes(bytes(10 * 2**14))
    hashes = FileHashes()
    hashes._stop.set()
    assert hashes._hash(str(tmp_path / "file")) == hashlib.sha256().hexdigest()
    hashes.close()
    with pytest.raises(RuntimeError):
        hashes.add("file", tmp_path / "file")
