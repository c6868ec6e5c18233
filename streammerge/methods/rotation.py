"""Formulas that turn the inputs of every output: `W' = f(W)`, row by row of the module's weight (out, in).

Where outputs are stored rows, every tile holds them whole and is turned by itself. Where the weight is stored (in,
out), or its rows are longer than a tile, the whole matrix is turned at once, and the plan says what memory that takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from streammerge.core.tensors import Operation
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region, refuse_part
from streammerge.methods.blockwise import lines_at, positions
from streammerge.methods.lowrank import FLOAT64
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor

LONGEST_ROW = 2**20
"""Elements of a stored row above which a tile does not hold all of it (`planning/tiles.py`)."""
COPIES = 4
"""Matrices alive while a whole one is turned."""


class Rotation(AbsoluteFormula, ABC):
    """Defaults for formulas that act on the inputs of each output alike. What is left to say is `turned`."""

    windowed = True

    @abstractmethod
    def turned(self, operation: Operation, weight_TI: Tensor, outs: Tensor, factors: Factors) -> Tensor:
        """New values (T, I) of outputs `outs` (T, int64) of the module, all inputs of each."""

    def locality(self, operation: Operation) -> Locality:
        """Whole rows where those are outputs, else the whole matrix."""
        lines = not operation.place.transposed and operation.place.view.cols <= LONGEST_ROW
        return Locality.LINE if lines else Locality.MATRIX

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Whole outputs: some of them will do, but each with all of its inputs."""
        whole = cut.whole_cols if operation.place.transposed else cut.whole_rows
        if not whole:
            raise refuse_part(operation, "all inputs of an output at once")
        return cut.turned(operation.place.transposed), operation.factors

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """All factors as they are read and as they are kept, and three copies of the tile."""
        whole = sum(view.count for view in operation.factors.values())
        return FLOAT64 * (2 * whole + 3 * tile[0] * tile[1])

    def state_memory(self, operation: Operation) -> int:
        """The whole matrix, where it is turned at once."""
        rows, cols = operation.place.shape
        return COPIES * FLOAT64 * rows * cols if self.locality(operation) is Locality.MATRIX else 0

    def prepare(self, operation: Operation, weight: Tensor, factors: Factors) -> Any:
        """The new values of the place (R, C), in stored orientation."""
        assert operation.window
        wide = weight.to(factors.dtype)
        outs = lines_at(operation.window[0], (0, operation.window[0].total)).to(weight.device)
        given = wide.T.contiguous() if operation.place.transposed else wide
        new = self.turned(operation, given, outs, factors)
        return (new.T if operation.place.transposed else new).contiguous()

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """The new values of a region."""
        if state is not None:
            made: Tensor = state[slice(*region.rows), slice(*region.cols)]
            return made
        outs = positions(operation, region.rows, rows=True).to(weight.device)
        return self.turned(operation, weight, outs, factors)
