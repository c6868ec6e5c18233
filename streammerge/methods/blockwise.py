"""Additive formulas that can say any element of their delta: a rectangle of outputs and inputs, wherever it is stored.

Such a formula is one function, from positions of outputs and inputs to the delta there, in the module's own orientation
(out, in). That it be transposed, a part of a fused tensor, or one of several that hold it, is dealt with here once: the
place remembers which outputs and inputs it holds, and the factors stay whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from streammerge.core.lines import Lines
from streammerge.core.tensors import Operation
from streammerge.methods.base import AdditiveFormula, CutOperation, Deltas, Factors, Region
from streammerge.methods.lowrank import FLOAT64
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor


class Blockwise(AdditiveFormula, ABC):
    """Defaults for formulas whose delta is known element by element. What is left to say is `block`, and `memory`."""

    windowed = True

    @abstractmethod
    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """The delta (O, I) in the arithmetic's dtype at outputs `outs` (O) and inputs `ins` (I), int64; what is
        returned may be written to. The operation's `scaling` is the caller's."""

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Any part will do: the window says which it is."""
        return cut.turned(operation.place.transposed), operation.factors

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """All factors as they are read and as they are kept, and a block with two temporaries."""
        whole = sum(view.count for view in operation.factors.values())
        return FLOAT64 * (2 * whole + 3 * tile[0] * tile[1])

    def deltas(self, operation: Operation, region: Region, factors: Factors) -> Deltas:
        """Blocks of the region, made one tile at a time."""
        return Blocks(self, operation, region, factors)


class Blocks:
    """Hands out the blocks of a region."""

    def __init__(self, formula: Blockwise, operation: Operation, region: Region, factors: Factors) -> None:
        self._formula, self._operation, self._factors = formula, operation, factors
        self._cols = positions(operation, region.cols, rows=False)

    def into(self, out: Tensor, rows: tuple[int, int]) -> Tensor:
        """The delta of rows [first, last) of the place."""
        ours = positions(self._operation, rows, rows=True)
        transposed = self._operation.place.transposed
        outs, ins = (self._cols, ours) if transposed else (ours, self._cols)
        block = self._formula.block(self._operation, outs.to(out.device), ins.to(out.device), self._factors)
        return out.copy_(block.T if transposed else block).mul_(self._operation.numbers["scaling"])

    def squared_norm(self) -> None:
        """Measured on the tiles: to know it here, every block would have to be made twice."""
        return


def positions(operation: Operation, which: tuple[int, int], *, rows: bool) -> Tensor:
    """The outputs or inputs, int64, at stored rows or columns [first, last) of the place."""
    assert operation.window
    lines = operation.window[0 if rows != operation.place.transposed else 1]
    return lines_at(lines, which)


def lines_at(lines: Lines, which: tuple[int, int]) -> Tensor:
    """The lines at positions [first, last), int64."""
    import torch

    runs = [torch.arange(length) * lines.step + line for line, length in lines.runs(*which)]
    return runs[0] if len(runs) == 1 else torch.cat(runs)


def whole(operation: Operation, name: str, factors: Factors) -> Tensor:
    """All of a matrix factor, float64, remembered for the next tile."""
    view = operation.factors[name]
    return factors.kept(view, (0, view.shape[0]), (0, view.shape[1]))
