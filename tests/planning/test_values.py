"""Norms of deltas, which are taken in single precision, for factors that single precision cannot square."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import streammerge
from tests.refusals.making import PREFIX, make_adapter, save, stored

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
