"""One tile: the stored values in, the rounded values out, and what happened to the delta on the way.

Arithmetic version 1: deltas of additive operations are summed in float64 in the order of the plan, added to W in
float64, rounded to float32 and then to the output's dtype (to float64 in one step where that is the output's).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.core.dtypes import torch_dtype
from streammerge.core.lines import Lines
from streammerge.core.tensors import Operation
from streammerge.methods import FORMULAS, Region
from streammerge.methods.base import Factors
from streammerge.planning.tiles import Tile

if TYPE_CHECKING:
    from torch import Tensor


Window = tuple["slice | Tensor", "slice | Tensor"]
"""Rows and columns of a tile: slices, or indices that broadcast against each other."""


@dataclass(frozen=True, slots=True)
class TileStats:
    """Squares of a tile's delta D, and, where measured, of D against what was written: sums over the tile."""

    delta: float
    sampled: float = 0.0
    survived: float = 0.0


def overlap(operation: Operation, tile: Tile) -> Region | None:
    """The part of the operation's place that lies in the tile, as positions in the place; None if they do not meet."""
    place = operation.place
    if place.matrix != tile.matrix:
        return None
    rows, cols = place.rows.within(*tile.rows), place.cols.within(*tile.cols)
    if rows[0] == rows[1] or cols[0] == cols[1]:
        return None
    if operation.indices and not any(rows[0] <= index < rows[1] for index in operation.indices):
        return None
    return Region(rows, cols)


class TileMerger:
    """Applies operations to one tile of stored values W (T, C). `state` hands out what a formula needs to know of more
    than the tile."""

    def __init__(self, factors: Factors, state: Any) -> None:
        self._factors, self._state = factors, state

    def merge(
        self, weight: Tensor, tile: Tile, operations: Sequence[tuple[int, Operation, Region]]
    ) -> tuple[Tensor, Tensor | None]:
        """The new values in float64, and the summed delta where all operations were additive."""
        value: Tensor | None = None
        delta: Tensor | None = None
        additive = all(FORMULAS[operation.formula].additive for _, operation, _ in operations)
        for number, operation, region in operations:
            formula = FORMULAS[operation.formula]
            at = window(operation, tile, region)
            if formula.additive:
                delta = _accumulate(delta, formula.delta(operation, region, self._factors), at, weight)
                continue
            value, delta = _added(weight if value is None else value, delta), None
            state = self._state(number, operation, tile)
            value[at] = formula.apply(operation, region, value[at], state, self._factors)
        return _added(weight if value is None else value, delta), delta if additive else None


def window(operation: Operation, tile: Tile, region: Region) -> Window:
    """Where a region of the operation's place lies in the tile, as an index of its tensor."""
    rows = _lines(operation.place.rows, region.rows, tile.rows[0])
    cols = _lines(operation.place.cols, region.cols, tile.cols[0])
    return rows if isinstance(rows, slice) or isinstance(cols, slice) else rows[:, None], cols


def _lines(lines: Lines, positions: tuple[int, int], origin: int) -> slice | Tensor:
    """Lines at some positions, counted from `origin`: a slice where they are one run, else every one of them."""
    import torch

    runs = list(lines.runs(*positions))
    if len(runs) == 1:
        line, length = runs[0]
        return slice(line - origin, line - origin + (length - 1) * lines.step + 1, lines.step)
    return torch.cat([torch.arange(length) * lines.step + (line - origin) for line, length in runs])


def _accumulate(total: Tensor | None, delta: Tensor, at: Window, weight: Tensor) -> Tensor:
    """The sum of deltas so far, over the whole tile."""
    import torch

    if total is None:
        if delta.shape == weight.shape:
            return delta
        total = torch.zeros(weight.shape, dtype=torch.float64)
    total[at] += delta
    return total


def _added(weight: Tensor, delta: Tensor | None) -> Tensor:
    """W + D in float64, in memory of its own."""
    import torch

    value = weight.to(torch.float64, copy=True)  # widened first: torch adds mixed dtypes at a third of the speed
    return value if delta is None else value.add_(delta)


def rounded(value: Tensor, dtype: str) -> Tensor:
    """`value` in the output's dtype, by way of float32."""
    import torch

    target = torch_dtype(dtype)
    if target == torch.float64:
        return value.to(torch.float64)
    return value.to(torch.float32).to(target)


def measure(weight: Tensor, value: Tensor, delta: Tensor | None, written: Tensor, *, sample: bool) -> TileStats:
    """The tile's share of the norm of the delta, and of how much of it survived rounding, where that is sampled."""
    import torch

    if delta is None:
        delta = value - weight
    squared = _dot(delta, delta)
    survived = _dot(delta, written.to(torch.float64).sub_(weight)) if sample else 0.0
    known = torch.isfinite(weight) if not math.isfinite(squared + survived) else None
    if known is not None and not bool(known.all()):
        # W itself is not finite somewhere: such an element says nothing of the delta.
        weight, delta, written = (torch.where(known, part, 0.0) for part in (weight, delta, written))
        return measure(weight, value, delta, written, sample=sample)
    return TileStats(squared, squared, survived) if sample else TileStats(squared)


def _dot(a: Tensor, b: Tensor) -> float:
    import torch

    return float(torch.dot(a.reshape(-1), b.reshape(-1)))
