"""Formulas that probe the outputs of a weight and answer each input: `W' = W + spread @ answer(probe.T @ W)`.

W is the module's weight (out, in), so what is probed takes every output of an input into account. It is summed in a
first pass: over all stored rows where outputs are rows, and where they are columns over the row of each input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from streammerge.core.tensors import Operation
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region, refuse_part
from streammerge.methods.blockwise import positions
from streammerge.methods.lowrank import FLOAT64
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 4
"""Sums of whole matrices that are kept for the workers at a time (`compute/produce.py`)."""


class Probing(AbsoluteFormula, ABC):
    """Defaults for such formulas. What is left to say is `rank`, `probe`, `spread` and `answer`."""

    windowed = True

    @abstractmethod
    def rank(self, operation: Operation) -> int:
        """K, the number of probes."""

    @abstractmethod
    def probe(self, operation: Operation, factors: Factors) -> Tensor:
        """(O, K), for all outputs."""

    @abstractmethod
    def spread(self, operation: Operation, factors: Factors) -> Tensor:
        """(O, K), for all outputs."""

    @abstractmethod
    def answer(self, operation: Operation, probed_KI: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """(K, I) for inputs `ins` (I, int64) with those sums."""

    def locality(self, operation: Operation) -> Locality:
        """Columns, or rows where the weight is stored (in, out)."""
        return Locality.ROW if operation.place.transposed else Locality.COLUMN

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Whole inputs: some of them will do, but each with all of its outputs."""
        whole = cut.whole_rows if operation.place.transposed else cut.whole_cols
        if not whole:
            raise refuse_part(operation, "all outputs of an input at once")
        return cut.turned(operation.place.transposed), operation.factors

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """All factors as they are read, as they are kept and as they are used, the sums, and three copies of a tile."""
        whole = sum(view.count for view in operation.factors.values())
        sums = self.rank(operation) * max(operation.place.shape[1], tile[0])
        return FLOAT64 * (4 * whole + (KEPT + 2) * sums + 3 * tile[0] * tile[1])

    def reduce(self, operation: Operation, region: Region, weight: Tensor, factors: Factors) -> Tensor:
        """`probe.T @ W` over the tile's outputs: (K, C) for its columns, (K, T) for its rows."""
        outs, _ = self._lines(operation, region, weight)
        wide = weight.to(factors.dtype)
        given_OI = wide.T if operation.place.transposed else wide
        sums: Tensor = self.probe(operation, factors)[outs].T @ given_OI
        return sums

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """`W + spread @ answer`; `state` are the sums of the tile's rows, or of all columns of the place."""
        outs, ins = self._lines(operation, region, weight)
        transposed = operation.place.transposed
        probed_KI = (state if transposed else state[:, slice(*region.cols)]).to(factors.dtype)
        answer_KI = self.answer(operation, probed_KI, ins, factors)
        delta_OI = self.spread(operation, factors)[outs] @ answer_KI
        return weight + (delta_OI.T if transposed else delta_OI)

    def _lines(self, operation: Operation, region: Region, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The outputs and the inputs of a region."""
        rows = positions(operation, region.rows, rows=True).to(weight.device)
        cols = positions(operation, region.cols, rows=False).to(weight.device)
        return (cols, rows) if operation.place.transposed else (rows, cols)
