"""New values for a region: a parameter of the adapter that takes the place of one that is stored in parts.

A parameter that is one stored tensor is replaced as a whole, source and all; this is for those that are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.core.tensors import Operation
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region
from streammerge.methods.lowrank import FLOAT64
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor


class NewValues(AbsoluteFormula):
    """Factors: `values` (R, C)."""

    title = "the adapter's own values, in a part of a tensor"

    def locality(self, operation: Operation) -> Locality:
        """Element by element: what was there does not matter."""
        return Locality.ELEMENT

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Any part will do."""
        values = operation.factors["values"].cut(0, cut.rows).cut(1, cut.cols)
        return cut.place, {"values": values.t if cut.swapped else values}

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The values of the tile, converted."""
        return 2 * FLOAT64 * tile[0] * tile[1]

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """The adapter's values of the region."""
        return factors.part(operation.factors["values"], region.rows, region.cols)
