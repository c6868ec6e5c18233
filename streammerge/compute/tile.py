"""Tiles: stored values in, rounded values out, and what happened to the delta on the way.

Arithmetic version 1: deltas of additive operations are summed in float64 in the order of the plan, added to W in
float64, rounded to float32 and then to the output's dtype (to float64 in one step where that is the output's).
`--accumulate float32` does the same in float32. Every step is one pass over a tile that stays in a core's cache, into
memory that is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.compute.lanes import Workspace
from streammerge.core.lines import Lines
from streammerge.core.tensors import Operation
from streammerge.methods import FORMULAS, Region
from streammerge.methods.base import Deltas, Factors
from streammerge.planning.tiles import Tile

if TYPE_CHECKING:
    from torch import Tensor

Window = tuple["slice | Tensor", "slice | Tensor"]
"""Rows and columns of a tile: slices, or indices that broadcast against each other."""
SAMPLE_EVERY = 32
"""One tile in so many is measured for how much of its delta survived rounding."""
SAMPLE_ELEMENTS = 2**14
"""Elements of such a tile, its first rows, that are enough for that."""


@dataclass(frozen=True, slots=True)
class TileStats:
    """Squares of a tile's delta D, and, where measured, of D against what was written: sums over the tile."""

    delta: float
    sampled: float = 0.0
    survived: float = 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """The same of tile number `tile`, or from that one on, still on the device."""

    tile: int
    delta: Tensor | float = 0.0
    sampled: Tensor | float = 0.0
    survived: Tensor | float = 0.0

    def stats(self) -> TileStats:
        """As plain numbers."""
        return TileStats(float(self.delta), float(self.sampled), float(self.survived))


StateOf = Callable[[int, Operation, Tile], Any]
Numbered = tuple[int, Operation]


def overlap(operation: Operation, tile: Tile) -> Region | None:
    """The part of the operation's place that lies in the tile, as positions in the place; None if they do not meet."""
    place = operation.place
    if place.matrix != tile.matrix:
        return None
    if place.shape == place.view.shape and not operation.indices:
        return Region(tile.rows, tile.cols)
    rows, cols = place.rows.within(*tile.rows), place.cols.within(*tile.cols)
    if rows[0] == rows[1] or cols[0] == cols[1]:
        return None
    if operation.indices and not any(rows[0] <= index < rows[1] for index in operation.indices):
        return None
    return Region(rows, cols)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known of tiles that were made, still on the device, so that nobody waits: measurements, and the sum of
    the values of each one that was changed, which is finite only if all of them are."""

    measured: list[Measured] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Bound:
    """An operation with its number and, if it is additive, what makes its deltas."""

    number: int
    operation: Operation
    deltas: Deltas | None


Touch = tuple[Bound, Region]
"""An operation and the part of its place that lies in a tile."""


class TileMerger:
    """Applies operations to tiles that lie below each other in one matrix. `state` hands out what a formula needs to
    know of more than a tile."""

    def __init__(self, factors: Factors, state: StateOf, work: Workspace) -> None:
        self._factors, self._state, self._work = factors, state, work

    def merge(
        self, weight: Tensor, written: Tensor, tiles: Sequence[Tile], operations: Sequence[Numbered], *, stats: bool
    ) -> Outcome:
        """Round new values of stored W (R, C), the rows of all tiles, into `written` (R, C); with `stats`, measure."""
        bound = self._bound(tiles, operations)
        outcome = Outcome()
        only = bound[0].deltas if len(bound) == 1 else None
        norm = only.squared_norm() if stats and only else None
        if norm is not None:
            outcome.measured.append(Measured(tiles[0].index, delta=norm))
        origin = tiles[0].rows[0]
        for tile in tiles:
            rows = slice(tile.rows[0] - origin, tile.rows[1] - origin)
            old, new = weight[rows], written[rows]
            touching = [(op, region) for op in bound if (region := overlap(op.operation, tile))]
            if not touching and old.dtype == new.dtype:
                new.copy_(old)
                continue
            sample = tile.index % SAMPLE_EVERY == 0
            value, delta = self._values(old, tile, touching)
            _put(value, old, new, tile, touching)
            outcome.sums.append(new.sum())
            if stats and touching and (sample or norm is None):
                delta = value.sub_(old) if delta is None else delta
                few = measured_rows(old.shape[1], norm=norm is None)
                written_few = self._work.take("written", old[few].shape).copy_(new[few])
                parts = (old[few], delta[few], written_few)
                outcome.measured.append(measured(tile.index, parts, norm=norm is None, sample=sample))
        return outcome

    def _bound(self, tiles: Sequence[Tile], operations: Sequence[Numbered]) -> list[Bound]:
        """The operations that meet the tiles, their factors read for all of them."""
        first, last = tiles[0], tiles[-1]
        every = Tile(first.index, first.matrix, (first.rows[0], last.rows[1]), first.cols, first.start, last.end)
        bound = []
        for number, operation in operations:
            if region := overlap(operation, every):
                formula = FORMULAS[operation.formula]
                deltas = formula.deltas(operation, region, self._factors) if formula.additive else None
                bound.append(Bound(number, operation, deltas))
        return bound

    def _values(self, weight: Tensor, tile: Tile, touching: Sequence[Touch]) -> tuple[Tensor, Tensor | None]:
        """The new values of one tile, and the summed delta where all operations were additive; good until the next."""
        value: Tensor | None = None
        delta: Tensor | None = None
        for bound, region in touching:
            if bound.deltas:
                delta = self._accumulated(delta, bound, region, tile, weight.shape)
                continue
            value, delta = self._added(weight if value is None else value, delta), None
            at = window(bound.operation, tile, region)
            state = self._state(bound.number, bound.operation, tile)
            formula = FORMULAS[bound.operation.formula]
            value[at] = formula.apply(bound.operation, region, value[at], state, self._factors)
        return self._added(weight if value is None else value, delta), delta if value is None else None

    def _accumulated(
        self, total: Tensor | None, bound: Bound, region: Region, tile: Tile, shape: Sequence[int]
    ) -> Tensor:
        """The sum of deltas so far, over the whole tile."""
        assert bound.deltas
        if total is None and region.shape == shape:
            return bound.deltas.into(self._work.take("delta", shape), region.rows)
        if total is None:
            total = self._work.take("delta", shape).zero_()
        delta = bound.deltas.into(self._work.take("one of several deltas", region.shape), region.rows)
        total[window(bound.operation, tile, region)] += delta
        return total

    def _added(self, value: Tensor, delta: Tensor | None) -> Tensor:
        """W + D in the arithmetic's dtype; widened first, since torch adds mixed dtypes at half the speed."""
        kept = self._work.take("value", value.shape)
        if value is not kept:
            kept.copy_(self._halfway(value))
        return kept if delta is None else kept.add_(delta)

    def _halfway(self, value: Tensor) -> Tensor:
        """float16 on its way to float64, as float32: torch has fast code for both steps, and none for the whole way."""
        import torch

        if value.dtype is not torch.float16 or self._work.dtype is not torch.float64:
            return value
        memory = self._work.take("one of several deltas", value.shape).view(-1).view(torch.float32)
        return memory[: value.numel()].view(value.shape).copy_(value)


def _put(value: Tensor, old: Tensor, new: Tensor, tile: Tile, touching: Sequence[Touch]) -> None:
    """Round a tile's values into `new`. Where operations touch a part of it only, the rest is what it was: adding zero
    would make zero of minus zero."""
    if any(region.shape == old.shape for _, region in touching):
        new.copy_(value)
        return
    new.copy_(old)
    for bound, region in touching:
        at = window(bound.operation, tile, region)
        new[at] = value[at].to(new.dtype)


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


def measured_rows(cols: int, *, norm: bool) -> slice:
    """The rows of a tile of so many columns that are measured: all for the norm, a few for a sample alone."""
    return slice(None) if norm else slice(max(1, SAMPLE_ELEMENTS // cols))


def measured(tile: int, parts: tuple[Tensor, Tensor, Tensor], *, norm: bool, sample: bool) -> Measured:
    """What a tile's W, delta and written values say, the last two in the arithmetic's dtype: with `norm` how large the
    delta is, with `sample` how much of it was kept. An element where W itself is not finite says nothing of the delta;
    who finds a NaN here leaves it out. The written values are used up."""
    weight, delta, written = parts
    squared = _dot(delta, delta)
    survived = _dot(delta, written.sub_(weight)) if sample else 0.0
    return Measured(tile, squared if norm else 0.0, squared if sample else 0.0, survived)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    import torch

    return torch.dot(a.view(-1), b.view(-1))
