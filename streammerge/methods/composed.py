"""Additive formulas whose delta is a product of two matrices that are made of the factors, or drawn from a seed.

Such a formula is two functions: rows of the left matrix for some outputs, columns of the right one for some inputs,
both in the module's own orientation. The matrix along the stored columns is made once for all tiles of a matrix, the
other one for the rows at hand; that the weight be transposed, or a part of a fused tensor, is dealt with here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from streammerge.core.errors import NotMergeableError
from streammerge.core.tensors import Operation
from streammerge.methods.base import Deltas, Factors, Region
from streammerge.methods.blockwise import Blockwise, positions
from streammerge.methods.lowrank import FLOAT64, PIECE_ELEMENTS, ScaledProducts

if TYPE_CHECKING:
    from torch import Tensor


Side = Callable[[Operation, "Tensor", Factors], "Tensor"]
"""Makes one of the two matrices, for some positions."""


class Composed(Blockwise, ABC):
    """Defaults for formulas `W + scaling * left @ right`. What is left to say is `rank`, `left` and `right`."""

    @abstractmethod
    def rank(self, operation: Operation) -> int:
        """Columns of the left matrix, rows of the right one."""

    @abstractmethod
    def left(self, operation: Operation, outs: Tensor, factors: Factors) -> Tensor:
        """Rows (O, K) of the left matrix at outputs `outs` (O), int64, in the arithmetic's dtype."""

    @abstractmethod
    def right(self, operation: Operation, ins: Tensor, factors: Factors) -> Tensor:
        """Columns (K, I) of the right matrix at inputs `ins` (I), int64, in the arithmetic's dtype."""

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """The product."""
        return self.left(operation, outs, factors) @ self.right(operation, ins, factors)

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """All factors, converted, and the two matrices of a piece, each with what it is made from."""
        rows = max(tile[0], PIECE_ELEMENTS // max(1, tile[1]))
        rows = min(rows, operation.place.shape[0])
        whole = sum(view.count for view in operation.factors.values())
        return 2 * FLOAT64 * (whole + self.rank(operation) * (rows + tile[1]))

    def deltas(self, operation: Operation, region: Region, factors: Factors) -> Deltas:
        """Products of the region's rows."""
        return ComposedProducts(self, operation, region, factors)


class ComposedProducts(ScaledProducts):
    """Hands out the products of a region."""

    def __init__(self, formula: Composed, operation: Operation, region: Region, factors: Factors) -> None:
        transposed = operation.place.transposed
        sides: tuple[Side, Side] = (formula.left, formula.right)
        rows, cols = reversed(sides) if transposed else sides
        ours = positions(operation, region.rows, rows=True)
        left_TK = rows(operation, ours, factors)

        def kept() -> Tensor:
            made = cols(operation, positions(operation, region.cols, rows=False), factors)
            return (made.T if transposed else made).contiguous()

        self._scaling = operation.numbers["scaling"]
        self._origin = region.rows[0]
        self._left_TK = (left_TK.T if transposed else left_TK).contiguous()
        name = f"{operation.formula} {operation.module} {region.cols}"
        self._right_KC = factors.made(name, tuple(operation.factors.values()), kept)
        self._right_gram_KK = partial(_gram, self._right_KC)


def _gram(right_KC: Tensor) -> Tensor:
    return right_KC @ right_KC.T


def checked(indices: Tensor, count: int, operation: Operation) -> Tensor:
    """Positions as int64. Raises NotMergeableError where they are not all those of one of `count` things."""
    if not bool(((indices >= 0) & (indices < count) & (indices == indices.floor())).all()):
        reason = f"`{operation.module}`: its indices are not all positions among {count:,}"
        raise NotMergeableError((operation.module,), reason)
    return indices.long()


def lines_of(view_name: str, operation: Operation, lines: Tensor, factors: Factors, *, axis: int) -> Tensor:
    """Rows (`axis` 0) or columns (1) of a matrix factor at positions `lines`, reading no more than from the first to
    the last of them."""
    import torch

    view = operation.factors[view_name]
    first, last = int(lines.min()), int(lines.max()) + 1
    wanted = [(0, n) for n in view.shape]
    wanted[axis] = (first, last)
    read = factors.part(view, *wanted)
    if last - first == len(lines):
        return read
    return torch.index_select(read, axis, (lines - first).to(read.device))
