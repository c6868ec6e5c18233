"""Several adapters in one run, each with its weight: the sum in float64, rounded once, and not PEFT's one after
another, which rounds after each."""

from __future__ import annotations

import pytest

import streammerge
from tests.factories import load_tensors
from tests.oracle.comparing import assert_correctly_rounded
from tests.oracle.test_cases import BY_NAME
from tests.oracle.workbench import Workbench

SUMS = {
    "two-plain": (("linear", "rslora"), (1.0, 1.0)),
    "three-weighted": (("linear", "rslora", "rank-and-alpha-patterns"), (0.7, -0.4, 1.3)),
    "one-of-them-zero": (("linear", "rslora"), (0.0, 0.5)),
    "one-halved": (("linear",), (0.5,)),
    "biases": (("lora-bias", "linear"), (0.25, 2.0)),
    "conv1d": (("conv1d", "conv1d-saved-as-not-transposed"), (0.6, 0.7)),
    "embedding-and-linear": (("embedding-not-saved", "linear"), (-1.0, 0.3)),
    "experts": (("experts-gpt-oss", "experts-gpt-oss-rslora"), (0.3, 0.9)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("label", [pytest.param(label, id=f"sum-{label}@") for label in SUMS])
def test_a_sum_of_adapters_is_rounded_once(bench: Workbench, label: str, dtype: str):
    names, weights = SUMS[label]
    cases = [BY_NAME[name] for name in names]
    base = bench.base(cases[0].base, dtype)
    output = bench.directory("sums", f"{label}-{dtype}")
    adapters = [bench.adapter(case, dtype) for case in cases]
    streammerge.merge(base, adapters, output, weights=weights, verify=False)
    streammerge.verify(output, full=True)
    stored = {name: tensor.double() for name, tensor in load_tensors(base).items()}
    exact = dict(stored)
    for case, weight in zip(cases, weights, strict=True):
        for name, merged in bench.reference(case, dtype, "float64").items():
            exact[name] = exact[name] + weight * (merged - stored[name])
    assert any((exact[name] != stored[name]).any() for name in exact)
    assert_correctly_rounded(load_tensors(output), exact)
