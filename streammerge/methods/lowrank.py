"""The product of two factors: `W + scaling * B @ A` (LoRA, Hu et al. 2021, arXiv:2106.09685), and a vector delta.

Arithmetic version 1: `S = left @ right` in float64, then `D = S * scaling` in float64, never folded into a factor
first: a scaling that is no power of two would make exact sums inexact. In stored orientation `left` is B and `right`
is A, or `left` is A transposed and `right` B transposed where the module's weight is stored (in, out).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods.base import AdditiveFormula, CutOperation, Factors, Region, refuse_part
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor

FLOAT64 = 8


def product(operation: Operation, region: Region, factors: Factors) -> Tensor:
    """`left[rows] @ right[:, cols]` in float64, (T, C), never as a product of one row or one column: BLAS takes
    another path there, with other bits."""
    import torch

    rank = operation.factors["left"].shape[1]
    left_TK = factors.part(operation.factors["left"], region.rows, (0, rank))
    right_KC = factors.kept(operation.factors["right"], (0, rank), region.cols)
    rows, cols = region.shape
    if rows > 1 and cols > 1:
        return left_TK @ right_KC
    left_TK = torch.nn.functional.pad(left_TK, (0, 0, 0, int(rows == 1)))
    right_KC = torch.nn.functional.pad(right_KC, (0, int(cols == 1)))
    return (left_TK @ right_KC)[:rows, :cols]


def factor_memory(operation: Operation, tile: tuple[int, int]) -> int:
    """Bytes of both factors of one tile in float64, the kept one with the copy made while it is read."""
    rank = operation.factors["left"].shape[1]
    return FLOAT64 * rank * (2 * tile[0] + 2 * tile[1])


def cut_product(operation: Operation, cut: Cut) -> CutOperation:
    """The product's part on a cut: rows of `left` and columns of `right`, which change places where the cut is swapped:
    `(left @ right).T = right.T @ left.T`."""
    left, right = operation.factors["left"].cut(0, cut.rows), operation.factors["right"].cut(1, cut.cols)
    factors = {"left": right.t, "right": left.t} if cut.swapped else {"left": left, "right": right}
    return cut.turned(operation.place.transposed), factors


class LowRank(AdditiveFormula):
    """`W + scaling * left @ right`. Factors: `left` (R, K), `right` (K, C); numbers: `scaling`."""

    title = "W + scaling * B @ A"

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Any part will do."""
        return cut_product(operation, cut)

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """Both factors of the tile."""
        return factor_memory(operation, tile)

    def delta(self, operation: Operation, region: Region, factors: Factors) -> Tensor:
        """`S * scaling`, float64 (T, C)."""
        return product(operation, region, factors).mul_(operation.numbers["scaling"])


class VectorDelta(AdditiveFormula):
    """`b + scaling * d` for a bias (PEFT's `lora_bias`). Factors: `delta` (R); numbers: `scaling`."""

    title = "b + scaling * lora_B.bias"

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """The values of the rows that are there."""
        if cut.swapped:
            raise refuse_part(operation, "a vector")
        return cut.place, {"delta": operation.factors["delta"].cut(0, cut.rows)}

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The vector, converted."""
        return 2 * FLOAT64 * operation.factors["delta"].shape[0]

    def delta(self, operation: Operation, region: Region, factors: Factors) -> Tensor:
        """`d * scaling`, float64 (T, 1)."""
        start, stop = region.rows
        return factors.vector(operation.factors["delta"])[start:stop, None] * operation.numbers["scaling"]
