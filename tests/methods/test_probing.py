"""Formulas that probe all outputs of an input, on regions of every form: the sums do not depend on how W was cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch

import streammerge
from streammerge.compute.factors import FactorReader
from streammerge.core.lines import all_lines
from streammerge.core.tensors import MatrixView, Operation, Place
from streammerge.methods import FORMULAS, Region
from streammerge.sources.adapter import open_adapter
from tests.factories import load_tensors
from tests.methods.cases_weights import CASES
from tests.oracle.workbench import Workbench

TENSOR = "model.layers.0.mlp.down_proj.weight"


def in_parts(operation: Operation, weight: torch.Tensor, factors: FactorReader) -> torch.Tensor:
    """The new values of W, in six parts, from sums that are made of the same parts."""
    formula: Any = FORMULAS[operation.formula]
    transposed = operation.place.transposed
    rows, cols = weight.shape
    regions = [Region(*both) for both in product(pairwise((0, 7, 20, rows)), pairwise((0, 5, cols)))]
    sums = torch.zeros(formula.rank(operation), rows if transposed else cols, dtype=torch.float64)
    new = torch.empty_like(weight)
    for region in regions:
        part = weight[slice(*region.rows), slice(*region.cols)]
        inputs = slice(*(region.rows if transposed else region.cols))
        sums[:, inputs] += formula.reduce(operation, region, part, factors)
    for region in regions:
        at = slice(*region.rows), slice(*region.cols)
        state = sums[:, at[0]] if transposed else sums
        new[at] = formula.apply(operation, region, weight[at], state, factors)
    return new


@pytest.mark.parametrize("name", ["deft", "deft-qr", "peanut-deep"])
@pytest.mark.parametrize("transposed", [False, True])
def test_parts_of_a_matrix_are_what_they_are_in_the_whole(bench: Workbench, name: str, transposed: bool) -> None:
    case = next(case for case in CASES if case.name == name)
    base, adapter = bench.base("llama", "float32"), bench.adapter(case, "float32")
    (operation,) = streammerge.plan(base, adapter).tensors[TENSOR].operations
    weight, wanted = (tensors[TENSOR].double() for tensors in (load_tensors(base), bench.reference(case, "float32")))
    if transposed:
        weight, wanted = weight.T.contiguous(), wanted.T
        view = MatrixView.of(weight.shape)
        lines = all_lines(view.rows), all_lines(view.cols)
        operation = replace(operation, place=Place(TENSOR, view, 0, *lines, transposed=True))
    made = in_parts(operation, weight, FactorReader([open_adapter(str(adapter))]))
    assert torch.allclose(made, wanted, rtol=0, atol=2e-6)
