"""Norms of deltas, which are taken in single precision, for factors that single precision cannot square."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import streammerge
from streammerge.planning import values
from tests.refusals.making import PREFIX, make_adapter, normal, save, stored, values_of

SIZE, RANK = 8, 2


@pytest.mark.parametrize(("a", "b"), [(1e-30, 1e-5), (1e-5, 1e-30), (1e25, 1e-30), (1.0, 1.0)])
def test_the_norm_of_a_delta_is_right_where_squares_of_its_factors_leave_single_precision(
    tmp_path: Path, a: float, b: float
) -> None:
    base = save(tmp_path / "base" / "only.safetensors", {"x.weight": stored(np.ones((SIZE, SIZE)))})
    factors = {
        f"{PREFIX}x.lora_A.weight": stored(np.full((RANK, SIZE), a)),
        f"{PREFIX}x.lora_B.weight": stored(np.full((SIZE, RANK), b)),
    }
    adapter = make_adapter(tmp_path / "adapter", factors, lora_alpha=RANK)
    (facts,) = streammerge.plan(base, adapter).facts["x.weight"]
    # The delta is RANK * a * b everywhere, on SIZE x SIZE elements.
    assert facts.norm == pytest.approx(RANK * a * b * SIZE, rel=1e-5, abs=0)
    assert not facts.zero


def test_the_norm_of_a_very_high_rank_is_that_of_the_product(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values, "GRAM_RANK", 10)
    monkeypatch.setattr(values, "SIDE", 7)
    base = save(tmp_path / "base" / "only.safetensors", {"x.weight": stored(np.ones((24, 16)))})
    a, b = normal("a", 11, 16), normal("b", 24, 11)
    pair = {f"{PREFIX}x.lora_A.weight": a, f"{PREFIX}x.lora_B.weight": b}
    adapter = make_adapter(tmp_path / "adapter", pair, r=11, lora_alpha=22)
    (facts,) = streammerge.plan(base, adapter).facts["x.weight"]
    assert facts.norm == pytest.approx(2 * np.linalg.norm(values_of(b) @ values_of(a)), rel=1e-9)
