"""LoHa, shared and drawn projections and the spectral methods on parts of what is stored fused, and on fused modules
that are stored in parts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import streammerge
from streammerge.core.errors import NotMergeableError
from tests.fused.adapters import compare
from tests.fused.subjects import named
from tests.methods.test_turning_layouts import merged_by_peft, parts_of

UNSAVED = {"save_projection": False}
METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "adalora": ("AdaLoraConfig", {"init_r": 3, "target_r": 3, "total_step": 9}),
    "ia3": ("IA3Config", {"feedforward_modules": ".*"}),  # of inputs: that of outputs changes biases too
    "loha": ("LoHaConfig", {"r": 3, "alpha": 5}),
    "lokr": ("LoKrConfig", {"r": 3, "alpha": 5}),
    "pvera": ("PveraConfig", {"r": 4}),
    "vera": ("VeraConfig", {"r": 4}),
    "vera-drawn": ("VeraConfig", {"r": 4, **UNSAVED}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 9, "vector_length": 4}),
    "randlora": ("RandLoraConfig", {"r": 4, "randlora_alpha": 6}),
    "randlora-drawn": ("RandLoraConfig", {"r": 4, "randlora_alpha": 6, **UNSAVED}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 40}),
    "waveft": ("WaveFTConfig", {"n_frequency": 40, "scaling": 2.0, "wavelet_family": "db2"}),
    "tinylora": ("TinyLoraConfig", {"r": 3, "u": 5, "weight_tying": 1.0}),
    "unilora": ("UniLoraConfig", {"r": 2, "theta_d_length": 40, "save_indices": True}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["phi3-self_attn", "bloom", "gpt2"])
def test_parts_of_what_is_stored_fused(name: str, method: str, tmp_path: Path) -> None:
    subject = named(name)()
    module = subject.fused[0]
    base = subject.save(tmp_path / "base")
    merged = merged_by_peft(parts_of(module), *METHODS[method], tmp_path / "adapter")
    for number, rows in enumerate(module.parts):
        module.matrices[0][rows] = merged[f"{module.name(number)}.weight"]
    streammerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert compare(tmp_path / "out", subject.save(tmp_path / "wanted"), base) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["phi3-self_attn", "bloom"])
def test_a_fused_module_that_is_stored_in_parts(name: str, method: str, tmp_path: Path) -> None:
    subject = named(name)()
    module = subject.fused[0]
    base = subject.save_split(tmp_path / "base")
    whole = {module.path: (module.matrices[0].clone(), module.bias)}
    merged = merged_by_peft(whole, *METHODS[method], tmp_path / "adapter")
    module.matrices[0][:] = merged[f"{module.path}.weight"]
    streammerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert compare(tmp_path / "out", subject.save_split(tmp_path / "wanted"), base) == len(module.parts)


def test_a_part_is_reassembled_where_it_lies(tmp_path: Path) -> None:
    subject = named("phi3-self_attn")()
    module = subject.fused[0]
    base = subject.save(tmp_path / "base")
    merged = merged_by_peft(parts_of(module), "FrodConfig", {"progressbar": False}, tmp_path / "adapter")
    for number, rows in enumerate(module.parts):
        module.matrices[0][rows] = merged[f"{module.name(number)}.weight"]
    streammerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert compare(tmp_path / "out", subject.save(tmp_path / "wanted"), base) == 1


def test_what_needs_the_whole_matrix_is_refused_where_that_lies_in_parts(tmp_path: Path) -> None:
    subject = named("phi3-self_attn")()
    module = subject.fused[0]
    base = subject.save_split(tmp_path / "base")
    whole = {module.path: (module.matrices[0].clone(), module.bias)}
    merged_by_peft(whole, "FrodConfig", {"progressbar": False}, tmp_path / "adapter")
    with pytest.raises(NotMergeableError, match="stored in parts, and its formula needs the whole matrix"):
        streammerge.plan(base, tmp_path / "adapter")
