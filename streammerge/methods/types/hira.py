"""HiRA: `W + W * (B @ A)`, element by element (PEFT `tuners/hira/layer.py`, 0.19 to 0.21).

There is no scaling. The product has the weight's own shape, so that of a convolution is one of flattened factors, and
that of an embedding lies transposed. PEFT computes in the base's dtype, with a rounding after every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from streammerge.core.tensors import Operation
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64, ScaledProducts, cut_product, factor_memory
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.names.pieces import Cut, Sizes

if TYPE_CHECKING:
    from torch import Tensor


class HadamardUpdate(AbsoluteFormula):
    """Factors: `left` (R, K), `right` (K, C); numbers: `scaling`, 1."""

    title = "W + W * (B @ A)"
    zero_if = ("left", "right")

    def locality(self, operation: Operation) -> Locality:
        """Element by element."""
        return Locality.ELEMENT

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Any part will do."""
        return cut_product(operation, cut)

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """Both factors, and their product on one tile."""
        return factor_memory(operation, tile) + FLOAT64 * tile[0] * tile[1]

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """`W * (1 + B @ A)`."""
        product_TC = weight.new_empty(region.shape, dtype=factors.dtype)
        product_TC = ScaledProducts(operation, region, factors).into(product_TC, region.rows)
        return product_TC.add_(1.0).mul_(weight)


class Hira(Method):
    """Factors: `hira_A` (r, in, *kernel) and `hira_B` (out, r, 1, ...), or, for an embedding of V rows of d values,
    `hira_embedding_A` (r, V) and `hira_embedding_B` (d, r)."""

    title = "HiRA"
    paper = "openreview.net/forum?id=TwJrTz9cRS"
    only = "hira"
    known = Known(no_consequence=frozenset({"r", "rank_pattern", "hira_dropout", "init_weights"}))
    modules = (slots("hira_A hira_B"), slots("hira_embedding_A hira_embedding_B"))
    formulas = MappingProxyType({"hira": HadamardUpdate()})
    layers = "Linear, Conv1D, Embedding, Conv1d, Conv2d, Conv3d"
    local = "the same elements"
    refuses = "grouped convolutions, which PEFT does not adapt"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out, in), those of a kernel counting its elements; (V, d) of an embedding."""
        if "hira_embedding_A" in module.slots:
            return module.slots["hira_embedding_A"].shape[1], module.slots["hira_embedding_B"].shape[0]
        return module.slots["hira_B"].shape[0], math.prod(module.slots["hira_A"].shape[1:])

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one product."""
        kind = "hira_embedding" if module.has("hira_embedding_A") else "hira"
        left, right = module.matrix(f"{kind}_B"), module.matrix(f"{kind}_A")
        shape = module.info(f"{kind}_A").shape
        if left.shape[1] != right.shape[0]:
            raise module.mismatch(f"the ranks of `{kind}_A` and `{kind}_B` differ")
        if kind == "hira_embedding":
            if module.target.shape != (right.shape[1], left.shape[0]):
                raise module.mismatch(f"its factors are for a table of {right.shape[1]:,} rows of {left.shape[0]:,}")
            factors = {"left": right.t, "right": left.t}
            yield module.change("hira", factors, {"scaling": 1.0}, transposed=True)
            return
        if len(shape) > 2 and module.target.shape != (left.shape[0], *shape[1:]):
            raise module.mismatch(f"its factors are for a kernel of shape {[left.shape[0], *shape[1:]]}")
        yield module.product("hira", left, right, 1.0)
