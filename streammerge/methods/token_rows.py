"""Trainable tokens: some rows of an embedding are replaced by the adapter's (PEFT `trainable_token_indices`).

The file holds final rows, not deltas; which rows they are stands only in the config.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.core.tensors import Operation
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region, refuse_part
from streammerge.methods.lowrank import FLOAT64
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor


class TokenRows(AbsoluteFormula):
    """Factors: `rows` (N, C), one for each of the N `indices`, which are rows of the place."""

    title = "W[indices] = rows"

    def locality(self, operation: Operation) -> Locality:
        """Element by element: the other rows stay."""
        return Locality.ELEMENT

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """All rows: which of them are meant is said by their number."""
        if cut.swapped or not cut.whole_cols:
            raise refuse_part(operation, "all rows")
        return cut.place, {"rows": operation.factors["rows"].cut(1, cut.cols)}

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """One row at a time, converted."""
        return 2 * FLOAT64 * tile[1]

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """`weight` with the listed rows of this region replaced."""
        for position in touched(operation, region.rows):
            row = operation.indices[position] - region.rows[0]
            weight[row] = factors.part(operation.factors["rows"], (position, position + 1), region.cols)[0]
        return weight


def touched(operation: Operation, rows: tuple[int, int]) -> list[int]:
    """The positions in `indices` of those that fall into `rows`."""
    return [position for position, row in enumerate(operation.indices) if rows[0] <= row < rows[1]]
