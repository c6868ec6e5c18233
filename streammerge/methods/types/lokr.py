"""LoKr: `W + scaling * kron(w1, w2)` (Yeh et al. 2023, arXiv:2309.14859; PEFT `tuners/lokr/layer.py`, 0.13 to 0.21.2).

Either factor may itself be a product of two, and that of a convolution a product with a core `t2`. An element of a
Kronecker product is one element of each factor, so any part of it is made without the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import Blockwise
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors

if TYPE_CHECKING:
    from torch import Tensor

SCALED_SINCE = (0, 14, 0)
"""The PEFT version from which on `alpha / r` is applied; configs name their version since 0.18 only."""


class Kronecker(Blockwise):
    """Factors: `w1` (P, Q) or `w1_a` (P, K) and `w1_b` (K, Q); `w2` (U, V) or `w2_a` (U, K) and `w2_b` (K, V), or, with
    a core `t2` (K, K, *kernel), `w2_a` (K, U) and `w2_b` (K, V). Numbers: `kernel`, the elements of a kernel,
    and `unaligned`, 1 for a w2 (U, V, kernel) of a kernel of one dimension."""

    title = "W + scaling * kron(w1, w2)"
    zero_if = ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """`w1[o // U, i // V] * w2[o % U, i % V, k]` for output o and column i * kernel + k."""
        w1_PQ, w2_UX = self._whole("w1", operation, factors), self._second(operation, factors)
        kernel = int(operation.numbers["kernel"])
        height, width = w2_UX.shape[0], w2_UX.shape[1] // kernel
        if operation.numbers["unaligned"]:
            return self._unaligned(w1_PQ, w2_UX.reshape(height, width, kernel), outs, ins)
        channels, taps = ins // kernel, ins % kernel
        small = w1_PQ[outs // height][:, channels // width]
        return small * w2_UX[outs % height][:, channels % width * kernel + taps]

    def _unaligned(self, w1_PQ: Tensor, w2_UVK: Tensor, outs: Tensor, ins: Tensor) -> Tensor:
        """The product as torch makes it of a matrix and a kernel of one dimension: the matrix meets the last two axes
        of the kernel, (U, P * V, Q * K), and that is read as the weight. PEFT's forward pass does the same."""
        (p, q), (width, kernel) = w1_PQ.shape, w2_UVK.shape[1:]
        flat = outs[:, None] * (q * width * kernel) + ins[None, :]
        columns, lines = flat % (q * kernel), flat // (q * kernel)
        first = w1_PQ[lines // width % p, columns // kernel]
        return first * w2_UVK[lines // (p * width), lines % width, columns % kernel]

    def _second(self, operation: Operation, factors: Factors) -> Tensor:
        """w2 as (U, V * kernel)."""
        import torch

        if "t2" not in operation.factors:
            return self._whole("w2", operation, factors)
        core, left, right = (_all(operation, name, factors) for name in ("t2", "w2_a", "w2_b"))
        rank = left.shape[0]
        wide = torch.einsum("ijk,ip,jq->pqk", core.reshape(rank, rank, -1), left, right)
        return wide.reshape(left.shape[1], -1)

    def _whole(self, name: str, operation: Operation, factors: Factors) -> Tensor:
        if name in operation.factors:
            return _all(operation, name, factors)
        return _all(operation, f"{name}_a", factors) @ _all(operation, f"{name}_b", factors)


def _all(operation: Operation, name: str, factors: Factors) -> Tensor:
    view = operation.factors[name]
    return factors.kept(view, (0, view.shape[0]), (0, view.shape[1]))


class LoKr(Method):
    """Factors: those of `Kronecker`, `lokr_` in front of their names."""

    title = "LoKr"
    paper = "arXiv:2309.14859"
    only = "lokr"
    known = Known(
        read=frozenset({"r", "alpha", "rank_pattern", "alpha_pattern"}),
        no_consequence=frozenset(
            {
                "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "decompose_both",
                "decompose_factor", "init_weights",
            }
        ),
    )  # fmt: skip
    modules = tuple(
        slots(f"{first} {second}")
        for first in ("lokr_w1", "lokr_w1_a lokr_w1_b")
        for second in ("lokr_w2", "lokr_w2_a lokr_w2_b", "lokr_t2 lokr_w2_a lokr_w2_b")
    )
    formulas = MappingProxyType({"lokr": Kronecker()})
    layers = "Linear, Conv1d, Conv2d"
    local = "the same elements"
    eras = "before PEFT 0.14 nothing was scaled by alpha / r"

    def shape(self, module: ModuleFactors) -> tuple[int, int] | None:
        """(out, in) of a linear layer."""
        first, second, kernel = _shapes(module)
        return None if len(kernel) else (first[0] * second[0], first[1] * second[1])

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one product."""
        first, second, kernel = _shapes(module.factors)
        taps = math.prod(kernel)
        rows, cols = module.sizes
        if (first[0] * second[0], first[1] * second[1] * taps) != (rows, cols):
            product = [first[0] * second[0], first[1] * second[1], *kernel]
            raise module.mismatch(f"its factors make {product}")
        # A kernel whose taps lie among the columns of w2 is read as it is: they follow each other there as well.
        factors = {
            slot.removeprefix("lokr_"): module.matrix(slot) for slot in module.factors.slots if slot != "lokr_t2"
        }
        if module.has("lokr_t2"):
            core = module.info("lokr_t2")
            factors["t2"] = module.matrix("lokr_t2", core.shape[0] * core.shape[1])
        unaligned = len(kernel) == 1 and not module.has("lokr_t2")
        numbers = {"scaling": _scaling(module), "kernel": float(taps), "unaligned": float(unaligned)}
        yield module.change("lokr", factors, numbers)


def _shapes(module: ModuleFactors) -> tuple[tuple[int, int], tuple[int, int], tuple[int, ...]]:
    """Rows and columns of w1 and of w2, and the kernel that w2 says of itself."""
    sizes = {slot.removeprefix("lokr_"): info.shape for slot, info in module.slots.items()}
    first = sizes["w1"] if "w1" in sizes else (sizes["w1_a"][0], sizes["w1_b"][1])
    if "t2" in sizes:
        return (first[0], first[1]), (sizes["w2_a"][1], sizes["w2_b"][1]), tuple(sizes["t2"][2:])
    if "w2" in sizes:
        return (first[0], first[1]), (sizes["w2"][0], sizes["w2"][1]), tuple(sizes["w2"][2:])
    return (first[0], first[1]), (sizes["w2_a"][0], sizes["w2_b"][1]), ()


def _scaling(module: Module) -> float:
    """alpha over the rank that the config gives: the factors do not tell it where both are whole."""
    rank = fields.pattern(module.config, "rank_pattern", whole=True).value_for(
        module.name, fields.number(module.config, "r", 8, whole=True)
    )
    alpha = fields.pattern(module.config, "alpha_pattern").value_for(
        module.name, fields.number(module.config, "alpha", 8)
    )
    if alpha == rank:
        return 1.0
    matters = "PEFT scales LoKr by alpha / r since 0.14, and did not before"
    return float(alpha / rank) if fields.version_of(module.config, module.name, matters) >= SCALED_SINCE else 1.0
