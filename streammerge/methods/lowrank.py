"""The product of two factors: `W + scaling * B @ A` (LoRA, Hu et al. 2021, arXiv:2106.09685), and a vector delta.

Arithmetic version 1: `S = left @ right` in float64, then `D = S * scaling` in float64; only a power of two is folded
into a factor first: any other scaling would make exact sums inexact. In stored orientation `left` is B and `right`
is A, or `left` is A transposed and `right` B transposed where the module's weight is stored (in, out).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods.base import AdditiveFormula, CutOperation, Deltas, Factors, Region, refuse_part
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor

FLOAT64 = 8
PIECE_ELEMENTS = 2**21
"""Elements of the base that are worked on with one reading of the factors, at most."""
SAFE_EXPONENT = 64
"""Powers of two up to this, and down to its inverse, cannot overflow or underflow in a product of adapter values."""


VECTORS = {"rows": "cols", "middle": "middle", "cols": "rows"}
"""Diagonals that may stand around the factors of a product, and what each becomes when the product is transposed."""


class ScaledProducts:
    """Makes `(left[rows] @ right[:, cols]) * scaling` for rows of a region; where the operation has them, with the
    diagonals `rows` (R) before, `middle` (K) between and `cols` (C) behind the factors.

    A scaling that is a power of two goes into `right`, where it changes the exponents of all sums alike and no bit of
    them; alpha over rank mostly is one, and a pass over the tile is saved. The product is never one of a single row or
    column: BLAS takes another path there, with other bits.
    """

    def __init__(self, operation: Operation, region: Region, factors: Factors) -> None:
        rank = operation.factors["left"].shape[1]
        scaling = operation.numbers["scaling"]
        folded = scaling if _is_power_of_two(scaling) else 1.0
        self._scaling = scaling / folded
        self._origin = region.rows[0]
        self._left_TK = factors.part(operation.factors["left"], region.rows, (0, rank))
        self._right_KC = factors.kept(operation.factors["right"], (0, rank), region.cols, folded)
        self._right_gram_KK: Callable[[], Tensor] = partial(
            factors.gram, operation.factors["right"], (0, rank), region.cols, folded
        )
        if any(name in operation.factors for name in VECTORS):
            self._with_diagonals(operation, region, factors)

    def _with_diagonals(self, operation: Operation, region: Region, factors: Factors) -> None:
        vectors = {name: factors.vector(operation.factors[name]) for name in VECTORS if name in operation.factors}
        if "rows" in vectors:
            self._left_TK = self._left_TK * vectors["rows"][slice(*region.rows), None]
        if "middle" in vectors:
            self._right_KC = self._right_KC * vectors["middle"][:, None]
        if "cols" in vectors:
            self._right_KC = self._right_KC * vectors["cols"][None, slice(*region.cols)]
        self._right_gram_KK = lambda: self._right_KC @ self._right_KC.T

    def into(self, out: Tensor, rows: tuple[int, int]) -> Tensor:
        """The delta of rows [first, last) of the place."""
        import torch

        left_TK, right_KC = self._left_TK[rows[0] - self._origin : rows[1] - self._origin], self._right_KC
        if len(left_TK) > 1 and right_KC.shape[1] > 1:
            torch.mm(left_TK, right_KC, out=out)
        else:
            left_TK = torch.nn.functional.pad(left_TK, (0, 0, 0, int(len(left_TK) == 1)))
            right_KC = torch.nn.functional.pad(right_KC, (0, int(right_KC.shape[1] == 1)))
            out.copy_((left_TK @ right_KC)[: out.shape[0], : out.shape[1]])
        return out if self._scaling == 1.0 else out.mul_(self._scaling)

    def squared_norm(self) -> Tensor:
        """From the factors alone: `||L R||^2 = sum((L.T L) * (R R.T))`, far fewer operations than the product has."""
        grams = (self._left_TK.T @ self._left_TK).mul_(self._right_gram_KK())
        return grams.sum().clamp_(min=0).mul_(self._scaling * self._scaling)


def _is_power_of_two(number: float) -> bool:
    """Whether a number is one that a factor can be multiplied with exactly: sums of float64 have exponents to spare."""
    mantissa, exponent = math.frexp(number)
    return abs(mantissa) == 0.5 and abs(exponent) < SAFE_EXPONENT


def factor_memory(operation: Operation, tile: tuple[int, int]) -> int:
    """Bytes of both factors in float64, for as many tiles as lie in a piece of the base: rows of the one, and the kept
    other with the copy made while it is read; and of their Gram matrices."""
    rank = operation.factors["left"].shape[1]
    rows = max(tile[0], PIECE_ELEMENTS // max(1, tile[1]))
    return 2 * FLOAT64 * rank * (min(rows, operation.factors["left"].shape[0]) + tile[1] + rank)


def cut_product(operation: Operation, cut: Cut) -> CutOperation:
    """The product's part on a cut: rows of `left` and columns of `right`, which change places where the cut is swapped:
    `(left @ right).T = right.T @ left.T`."""
    left, right = operation.factors["left"].cut(0, cut.rows), operation.factors["right"].cut(1, cut.cols)
    factors = {"left": right.t, "right": left.t} if cut.swapped else {"left": left, "right": right}
    lines = {"rows": cut.rows, "cols": cut.cols}
    for name, turned in VECTORS.items():
        if name in operation.factors:
            vector = operation.factors[name]
            part = vector.cut(0, lines[name]) if name in lines else vector
            factors[turned if cut.swapped else name] = part
    return cut.turned(operation.place.transposed), factors


class LowRank(AdditiveFormula):
    """`W + scaling * left @ right`. Factors: `left` (R, K), `right` (K, C), and the diagonals of `ScaledProducts`;
    numbers: `scaling`."""

    def __init__(self, title: str = "W + scaling * B @ A", zero_if: tuple[str, ...] = ()) -> None:
        self.title, self.zero_if = title, zero_if

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Any part will do."""
        return cut_product(operation, cut)

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """Both factors of the tile, a second time where diagonals are multiplied in."""
        return factor_memory(operation, tile) * (1 + any(name in operation.factors for name in VECTORS))

    def deltas(self, operation: Operation, region: Region, factors: Factors) -> Deltas:
        """`S * scaling`, (T, C)."""
        return ScaledProducts(operation, region, factors)


class VectorRows:
    """Hands out a vector (R) as the delta of a column."""

    def __init__(self, vector: Tensor, region: Region) -> None:
        self._vector, self._region = vector, region

    def into(self, out: Tensor, rows: tuple[int, int]) -> Tensor:
        """Rows [first, last) of it, (T, 1)."""
        return out.copy_(self._vector[slice(*rows), None])

    def squared_norm(self) -> Tensor:
        """The sum of squares of the region's rows."""
        return self._vector[slice(*self._region.rows)].square().sum()


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

    def deltas(self, operation: Operation, region: Region, factors: Factors) -> Deltas:
        """`d * scaling`, (T, 1)."""
        vector = factors.vector(operation.factors["delta"]) * operation.numbers["scaling"]
        return VectorRows(vector, region)
