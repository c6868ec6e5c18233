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
from streammerge.core.tensors import Operation
from streammerge.methods import FORMULAS, Region
from streammerge.methods.base import Factors
from streammerge.planning.tiles import Tile

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TileStats:
    """Squares of a tile's delta D, and, where measured, of D against what was written: sums over the tile."""

    delta: float
    sampled: float = 0.0
    survived: float = 0.0


def overlap(operation: Operation, tile: Tile) -> Region | None:
    """The part of the operation's place that lies in the tile, relative to the place; None if they do not meet."""
    place = operation.place
    rows = max(place.rows[0], tile.rows[0]), min(place.rows[1], tile.rows[1])
    cols = max(place.cols[0], tile.cols[0]), min(place.cols[1], tile.cols[1])
    if place.matrix != tile.matrix or rows[0] >= rows[1] or cols[0] >= cols[1]:
        return None
    if operation.indices and not any(rows[0] <= place.rows[0] + index < rows[1] for index in operation.indices):
        return None
    return Region(
        (rows[0] - place.rows[0], rows[1] - place.rows[0]), (cols[0] - place.cols[0], cols[1] - place.cols[0])
    )


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
            window = _window(operation, tile, region)
            if formula.additive:
                delta = _accumulate(delta, formula.delta(operation, region, self._factors), window, weight)
                continue
            value, delta = _added(weight if value is None else value, delta), None
            state = self._state(number, operation, tile)
            value[window] = formula.apply(operation, region, value[window], state, self._factors)
        return _added(weight if value is None else value, delta), delta if additive else None


def _window(operation: Operation, tile: Tile, region: Region) -> tuple[slice, slice]:
    rows, cols = operation.place.rows[0] - tile.rows[0], operation.place.cols[0] - tile.cols[0]
    return slice(region.rows[0] + rows, region.rows[1] + rows), slice(region.cols[0] + cols, region.cols[1] + cols)


def _accumulate(total: Tensor | None, delta: Tensor, window: tuple[slice, slice], weight: Tensor) -> Tensor:
    """The sum of deltas so far, over the whole tile."""
    import torch

    if total is None:
        if delta.shape == weight.shape:
            return delta
        total = torch.zeros(weight.shape, dtype=torch.float64)
    total[window] += delta
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
