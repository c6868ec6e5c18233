"""Fixtures of the methods' cases: the oracle's workbench, and what PEFT warns of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest

from tests.oracle.conftest import bench as bench

THIRD_PARTY = [
    # SHiRA's delta is a sparse tensor.
    ("Sparse invariant checks are implicitly disabled", UserWarning),
    # LN tuning is for layers that PEFT knows no sizes of.
    ("Unsupported layer type '.*' encountered, proceed at your own risk", UserWarning),
    ("save_precomputed_indices=False", UserWarning),
    # BOFT looks for a compiler.
    ("Failed to load the CUDA extension", UserWarning),
    ("Setting boft_n_butterfly_factor to 1", UserWarning),
    # PEFT says what it decides about directions; the cases are about just that.
    ("Setting `save_embedding_layers` to `True`", UserWarning),
    ("fan_in_fan_out is set to (True|False) but", UserWarning),
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),
    # It says that projections will be drawn again, which is what the cases without saved ones are about.
    ("Specified to not (save|load) ", UserWarning),
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Warnings that PEFT gives in the cases, each known; any other is still an error."""
    with warnings.catch_warnings():
        for message, category in THIRD_PARTY:
            warnings.filterwarnings("ignore", message, category)
        yield
