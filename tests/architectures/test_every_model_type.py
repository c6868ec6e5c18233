"""Every model type of four auto mappings: a LoRA on all that PEFT can adapt, merged by PEFT and by streammerge.

What PEFT's `merge_and_unload().save_pretrained()` writes is the reference, tensor for tensor as it is on disk: names,
shapes, dtypes and values. Types that cannot be built here are named, each with its reason.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import streammerge
from scripts.tiny_models import NOT_BUILDABLE, build, cases
from tests.architectures.reference import make_case

ERROR = 1e-5
"""Of the largest weight of a tensor: PEFT's own float32 arithmetic."""
BUILDABLE = [pair for pair in cases() if pair not in NOT_BUILDABLE]


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize(("mapping", "model_type"), BUILDABLE, ids=[f"{b}@{a}" for a, b in BUILDABLE])
def test_the_output_is_what_peft_writes(mapping: str, model_type: str, tmp_path: Path) -> None:
    made = make_case(model_type, mapping, tmp_path)
    output = tmp_path / "output"
    streammerge.merge(made.base, made.adapter, output, verify=False)
    ours, theirs, base = stored(output), stored(made.merged), stored(made.base)
    assert ours.keys() == theirs.keys()
    changed = 0
    for name, expected in theirs.items():
        got = ours[name]
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
        if name in base and same_bits(expected, base[name]):
            assert same_bits(got, base[name]), f"{name} was not to be touched"
            continue
        changed += 1
        error = float((got.double() - expected.double()).abs().max())
        assert error <= ERROR * float(expected.abs().max()), f"{name}: off by {error:.3g}"
    assert changed
    assert len(list(made.base.glob("*.safetensors"))) >= 3
    shutil.rmtree(tmp_path)  # three copies of hundreds of models add up


@pytest.mark.parametrize(("mapping", "model_type"), NOT_BUILDABLE, ids=[f"{b}@{a}" for a, b in NOT_BUILDABLE])
def test_what_is_left_out_cannot_be_built(mapping: str, model_type: str, record_property) -> None:
    record_property("reason", NOT_BUILDABLE[mapping, model_type])
    with pytest.raises((ImportError, ValueError)):
        build(model_type, mapping)


def test_at_least_three_hundred_types_are_compared() -> None:
    assert len({model_type for _, model_type in cases()}) == 328
    assert len({model_type for _, model_type in BUILDABLE}) >= 300
