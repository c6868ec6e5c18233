"""Rows too long for one tile are worked on in stretches: the values are those of the formula, and a worker remembers
one stretch of a factor at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import streammerge
from streammerge.compute.factors import FactorReader
from streammerge.core.tensors import FactorView
from streammerge.planning.tiles import LONGEST_ROW
from streammerge.sources.adapter import open_adapter
from tests.refusals.making import PREFIX, load, make_adapter, normal, save, stored, values_of

OUT, IN, RANK = 3, LONGEST_ROW + 7, 2
FACTORS = {
    f"{PREFIX}x.lora_A.weight": normal("long A", RANK, IN),
    f"{PREFIX}x.lora_B.weight": normal("long B", OUT, RANK),
}
WEIGHT = normal("long W", OUT, IN)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tmp_path / "base" / "only.safetensors", {"x.weight": WEIGHT})


def directed() -> np.ndarray:
    a, b = (values_of(FACTORS[f"{PREFIX}x.lora_{name}.weight"]) for name in "AB")
    return values_of(WEIGHT) + b @ a


def test_a_long_row_gets_its_delta_across_all_stretches(tmp_path: Path, base: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", FACTORS, lora_alpha=RANK)
    report = streammerge.merge(base, adapter, tmp_path / "out")
    assert report.rederived == 1
    written = load(tmp_path / "out" / "only.safetensors")["x.weight"]
    assert written.data == directed().astype(np.float32).tobytes()


def test_the_norm_of_a_long_row_is_taken_over_all_stretches(tmp_path: Path, base: Path) -> None:
    magnitude = np.arange(1, OUT + 1)
    factors = FACTORS | {f"{PREFIX}x.lora_magnitude_vector": stored(magnitude)}
    adapter = make_adapter(tmp_path / "adapter", factors, lora_alpha=RANK, use_dora=True)
    streammerge.merge(base, adapter, tmp_path / "out")
    written = values_of(load(tmp_path / "out" / "only.safetensors")["x.weight"])
    assert np.linalg.norm(written, axis=1) == pytest.approx(magnitude, rel=1e-6)
    exact = directed()
    exact *= (magnitude / np.linalg.norm(exact, axis=1))[:, None]
    assert np.abs(written - exact).max() < 1e-6 * np.abs(exact).max()


def test_one_stretch_of_a_factor_is_remembered_at_a_time(tmp_path: Path) -> None:
    adapter = open_adapter(str(make_adapter(tmp_path / "adapter", FACTORS)))
    info = adapter.facts.tensors[f"{PREFIX}x.lora_A.weight"]
    view = FactorView.matrix(0, info, RANK, IN)
    reader = FactorReader([adapter])
    first = reader.kept(view, (0, RANK), (0, 1000))
    assert reader.kept(view, (0, RANK), (0, 1000)) is first
    second = reader.kept(view, (0, RANK), (1000, 2000))
    assert reader.kept(view, (0, RANK), (1000, 2000)) is second
    assert reader.kept(view, (0, RANK), (0, 1000)) is not first
