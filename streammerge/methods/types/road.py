"""RoAd: pairs of outputs turned and scaled, the bias with them (Liao and Monz 2024, arXiv:2409.00119).

In groups of g outputs, the k-th is paired with the k-th of the group's second half: `y1 = c1 x1 - s1 x2` and
`y2 = c2 x2 + s2 x1`, where c is alpha cos theta and s is alpha sin theta of the output that is made. `road_1` has one
theta and alpha for a pair, `road_2` one for each output, and `road_4` one for c and another for s of each output
(PEFT `tuners/road/layer.py`, 0.18 to 0.21.2). In half precision PEFT rounds c and s to the base's dtype first.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.tensors import FactorView, Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.outputs import OutputGroups
from streammerge.methods.parts import ModuleFactors
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor

SIZES = MappingProxyType({"road_1": 0.5, "road_2": 1.0, "road_4": 2.0})
"""Thetas, and alphas, for each output."""


class Pairs(OutputGroups):
    """Factors: `theta` and `alpha` (V); numbers: `group`, and `each`, the values for one output, as in `SIZES`."""

    title = "pairs of rows of W, turned and scaled"

    def group(self, operation: Operation) -> int:
        """The group in which outputs are paired."""
        return int(operation.numbers["group"])

    def turned(self, operation: Operation, weight_TI: Tensor, outs: Tensor, factors: Factors) -> Tensor:
        """`c * x + s * (the other of the pair, negative for the first half)`."""
        import torch

        half = self.group(operation) // 2
        cosines, sines = self._columns(operation, factors)
        first, second = weight_TI.reshape(-1, 2, half, weight_TI.shape[1]).unbind(1)
        other = torch.stack((-second, first), dim=1).reshape(weight_TI.shape)
        return weight_TI * cosines[outs][:, None] + other * sines[outs][:, None]

    def _columns(self, operation: Operation, factors: Factors) -> tuple[Tensor, Tensor]:
        """c and s of every output (O)."""
        group, each = self.group(operation), operation.numbers["each"]
        theta, alpha = (factors.vector(operation.factors[name]) for name in ("theta", "alpha"))
        if each < 1:  # one for a pair, which both halves of a group get
            theta, alpha = (
                values.reshape(-1, group // 2).repeat_interleave(2, 0).flatten() for values in (theta, alpha)
            )
        if each <= 1:
            return alpha * theta.cos(), alpha * theta.sin()
        theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        return (alpha[:, 0] * theta[:, 0].cos()).flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The factors, twice as many columns made of them, and three copies of the tile."""
        return super().memory(operation, tile) + 6 * FLOAT64 * operation.factors["theta"].count


class Road(Method):
    """Factors: `road_theta` and `road_alpha`, each (out / 2), (out) or (2 out) by the variant."""

    title = "RoAd"
    paper = "arXiv:2409.00119"
    only = "road"
    known = Known(read=frozenset({"variant", "group_size"}), no_consequence=frozenset({"init_weights"}))
    modules = (slots("road_theta road_alpha"),)
    formulas = MappingProxyType({"road": Pairs()})
    layers = "Linear"
    local = "groups of rows"

    def shape(self, module: ModuleFactors) -> Sizes:
        """Unknown: the variant says how many outputs there are."""
        return None, None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The weight, and the bias with it."""
        variant = module.config.get("variant") or "road_1"
        if variant not in SIZES:
            raise fields.wrong("variant", variant, f"one of {', '.join(SIZES)}")
        group = fields.number(module.config, "group_size", 64, whole=True)
        theta, alpha = module.vector("road_theta"), module.vector("road_alpha")
        outputs = int(theta.count / SIZES[variant])
        if theta.count != alpha.count or outputs * SIZES[variant] != theta.count:
            raise module.mismatch(f"it has {theta.count:,} thetas and {alpha.count:,} alphas")
        if group % 2 or outputs % group:
            raise module.mismatch(f"its {outputs:,} outputs are no groups of {group:,}, in pairs")
        factors: dict[str, FactorView] = {"theta": theta, "alpha": alpha}
        numbers = {"group": float(group), "each": SIZES[variant]}
        yield module.change("road", factors, numbers, transposed=module.transposed(out=outputs))
        if bias := module.bias(outputs):
            yield module.change("road", factors, numbers, on=bias)
