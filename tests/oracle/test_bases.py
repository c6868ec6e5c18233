"""Bases that are torch pickles: what is merged into them is what is merged into the same weights in safetensors."""

from __future__ import annotations

import pytest
import torch

from tests.factories import load, load_tensors
from tests.oracle.comparing import assert_same_bytes
from tests.oracle.test_cases import BY_NAME
from tests.oracle.workbench import Workbench

NAMES = ("linear", "conv1d", "embedding", "tied-linear", "tied-embedding", "tied-both-ensured", "experts-gpt-oss")


@pytest.mark.parametrize("layout", ["bin", "bin-sharded"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name}@bin") for name in NAMES])
def test_a_pickled_base_gives_the_same_values(bench: Workbench, name: str, dtype: str, layout: str):
    case = BY_NAME[name]
    stored = load_tensors(bench.base(case.base, dtype, layout))
    output = bench.output(case, dtype, layout)
    ours = load_tensors(output)
    assert sorted(path.name for path in output.glob("*.bin*")) == []
    assert ours.keys() == stored.keys(), "a pickle holds every name of a tied tensor, and so does the output"
    reference = load_tensors(bench.output(case, dtype, "single"))
    assert_same_bytes(ours, reference, set(reference))
    model = load(case.base, output, torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, ours[name].float()), f"{name} is not loaded as it is stored"
