"""Formulas that mix neighbouring outputs of a module: `W' = f(W)`, by groups of rows of its weight (out, in).

Where outputs are stored rows, a tile holds whole groups of them; where they are stored columns, it holds them all.
Where a place begins in the middle of a group of the stored tensor, the whole matrix is turned at once, and the plan
says what memory that takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from streammerge.core.lines import Lines
from streammerge.core.tensors import Operation
from streammerge.methods.base import CutOperation, Factors, Locality, Region, refuse_part
from streammerge.methods.blockwise import positions
from streammerge.methods.rotation import LONGEST_ROW, Rotation
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor


class OutputGroups(Rotation, ABC):
    """Defaults for formulas that act on groups of outputs of each input alike. What is left to say is `group` and
    `turned`, which gets whole groups (O, T), the last of which may be cut off by the end of the outputs."""

    @abstractmethod
    def group(self, operation: Operation) -> int:
        """How many outputs belong together, counted from the first one of the module."""

    def rows_together(self, operation: Operation) -> int:
        """A group, where outputs are stored rows that a tile is to hold whole groups of."""
        by_rows = self.locality(operation) is Locality.LINE and not operation.place.transposed
        return self.group(operation) if by_rows else 1

    def locality(self, operation: Operation) -> Locality:
        """Whole rows, several of them together, where groups begin where tiles can; else the whole matrix."""
        place = operation.place
        lines = place.transposed or _whole_groups(place.rows, self.group(operation), place.rows.end)
        return Locality.LINE if lines and place.view.cols <= LONGEST_ROW else Locality.MATRIX

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Some groups will do."""
        outs, count = (cut.cols, cut.shape[1]) if operation.place.transposed else (cut.rows, cut.shape[0])
        group = self.group(operation)
        if not _whole_groups(outs, group, count):
            raise refuse_part(operation, f"{group:,} outputs at once")
        return cut.turned(operation.place.transposed), operation.factors

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """The new values of a region."""
        if state is not None:
            return super().apply(operation, region, weight, state, factors)
        transposed = operation.place.transposed
        outs = positions(operation, region.cols if transposed else region.rows, rows=not transposed)
        given = weight.T if transposed else weight
        new = self.turned(operation, given, outs.to(weight.device), factors)
        return new.T if transposed else new


def _whole_groups(lines: Lines, group: int, end: int) -> bool:
    """Whether lines are nothing but whole groups, or those and the last one, which is cut off at `end`."""
    if lines.step > 1 or lines.start % group or lines.pitch % group:
        return False
    return lines.size % group == 0 or (lines.count == 1 and lines.end == end)
