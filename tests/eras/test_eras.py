"""Adapters of several years of transformers and PEFT land on the same tensors, whichever release saved the base.

The reference is the merge that the adapter's own era made of it. Tensors the adapter does not change are the base's,
byte for byte; the others are within 1e-6 of the reference, as a share of its largest weight.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import streammerge
from streammerge.core.errors import NotMergeableError
from tests.eras.layout import ADAPTERS, PAIRS, WEIGHTS, assemble, identity, own_base, weights_of
from tests.oracle.comparing import assert_same_bytes

ERROR = 1e-6
TRANSPOSABLE = {"stacked-qwen3-vl-moe"}
"""Cases whose experts transformers 4 stores the other way round than transformers 5."""
NEWEST = "5.23"
ORIENTATION = {
    "stacked-gpt-oss-down@4.57-0.19.1": "straight",
    "stacked-gpt-oss-down@5.23-0.19.0": "straight",
    "stacked-gpt-oss-down@5.23-0.19.1": "transposed",
    "stacked-gpt-oss-down@5.23-0.21.2": "transposed",
}
"""Adapters of nothing but square experts that PEFT treats as transformers does, which the adapter does not say."""

Tensors = dict[str, torch.Tensor]


def assert_is_reference(got: Tensors, base: Tensors, adapter: Path) -> None:
    """`got` is the base with the adapter's reference in it, which may hold the experts the other way round."""
    reference = load_file(adapter / "merged.safetensors")
    assert got.keys() == base.keys()
    for name, expected in reference.items():
        if expected.shape != base[name].shape and adapter.parent.name in TRANSPOSABLE:
            expected = expected.transpose(1, 2)
        assert (got[name].shape, got[name].dtype) == (expected.shape, expected.dtype), name
        assert not torch.equal(base[name], expected), f"{name} would be right if the adapter were lost"
        error = (got[name] - expected).abs().max()
        assert error <= ERROR * expected.abs().max(), f"{name}: off by {error:.3g}"
    assert_same_bytes(got, base, base.keys() - reference.keys())


def options_for(adapter: Path) -> dict[str, str]:
    """The options an adapter cannot be merged without."""
    orientation = ORIENTATION.get(identity(adapter))
    return {"expert_orientation": orientation} if orientation else {}


@pytest.mark.parametrize(("adapter", "base"), PAIRS, ids=[f"{identity(a)}-on-{b.name}" for a, b in PAIRS])
def test_an_adapter_of_any_era_on_the_base_of_any_era_is_merged_as_in_its_own(adapter, base, tmp_path):
    checkpoint = assemble(base, tmp_path / "base")
    streammerge.merge(checkpoint, adapter / "adapter", tmp_path / "out", verify=False, **options_for(adapter))
    assert_is_reference(load_file(tmp_path / "out" / WEIGHTS), load_file(weights_of(base)), adapter)


SAME_NAMES = ("stacked-gpt-oss", "stacked-llama4", "stacked-qwen3-vl-moe")
"""What the cases begin with whose tensors have the same names in transformers' memory as in files."""
RENAMED = [
    path
    for path in ADAPTERS
    if (path.parent / f"base-{NEWEST}").exists() and not path.parent.name.startswith(SAME_NAMES)
]


def loaded(checkpoint: Path) -> transformers.PreTrainedModel:
    """The model of a checkpoint, whose every tensor has a place in it and the other way round."""
    head = transformers.AutoConfig.from_pretrained(checkpoint).architectures[0]
    model, info = getattr(transformers, head).from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("adapter", RENAMED, ids=identity)
def test_an_adapter_of_any_era_on_a_base_with_the_names_of_memory_is_merged_as_in_its_own(adapter, tmp_path):
    stored = assemble(adapter.parent / f"base-{NEWEST}", tmp_path / "stored")
    model = loaded(stored)
    model.save_pretrained(tmp_path / "base", save_original_format=False)
    in_files = load_file(stored / WEIGHTS)
    assert load_file(tmp_path / "base" / WEIGHTS).keys() != in_files.keys(), "there is nothing to see here"
    streammerge.merge(tmp_path / "base", adapter / "adapter", tmp_path / "out", verify=False, **options_for(adapter))
    # Only a model that was loaded under the names of files is saved under them.
    model.load_state_dict(loaded(tmp_path / "out").state_dict())
    model.save_pretrained(tmp_path / "again")
    assert_is_reference(load_file(tmp_path / "again" / WEIGHTS), in_files, adapter)


@pytest.mark.parametrize("name", sorted(ORIENTATION))
def test_square_experts_that_do_not_say_which_way_they_lie_are_refused_with_the_option_that_says_it(name, tmp_path):
    adapter = next(path for path in ADAPTERS if identity(path) == name)
    base = assemble(own_base(adapter), tmp_path / "base")
    with pytest.raises(NotMergeableError) as refusal:
        streammerge.merge(base, adapter / "adapter", tmp_path / "out")
    assert "--expert-orientation" in str(refusal.value)
    assert not (tmp_path / "out").exists()
