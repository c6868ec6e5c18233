"""One thread's part of the arithmetic: stretches of output tensors, tile by tile on the canonical grid.

Tiles are rounded straight into the memory they are wanted in. One that is cut by the end of a stretch is made aside,
and what is left of it is kept for the stretch that follows: no tile is made twice by the same worker.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.compute.factors import Drawn, FactorReader, Source
from streammerge.compute.lanes import Lane, Receipt
from streammerge.compute.tile import Measured, Outcome, TileMerger, TileStats, measured, measured_rows
from streammerge.core.dtypes import itemsize, torch_dtype
from streammerge.core.errors import NonFiniteError
from streammerge.core.tensors import Operation, OutputTensor, TensorInfo
from streammerge.planning.memory import PIECE
from streammerge.planning.tiles import Tile, TileGrid, grid_of
from streammerge.sources.files import Scratch, TensorFiles

if TYPE_CHECKING:
    from torch import Tensor

StatsSink = Callable[[str, int, TileStats], None]
StateOf = Callable[["Recipe", int, Operation, Tile], Any]


class Recipe:
    """An output tensor with what a worker looks up of it again and again."""

    def __init__(self, output: OutputTensor, files: TensorFiles, info: TensorInfo) -> None:
        self.output, self.files, self.info = output, files, info
        self.grid: TileGrid = grid_of(output.shape, output.operations)
        self.stored, self.written = itemsize(info.dtype), itemsize(output.dtype)
        self.elements = math.prod(output.shape)
        self.by_matrix: dict[int, list[tuple[int, Operation]]] = {}
        for number, operation in enumerate(output.operations):
            self.by_matrix.setdefault(operation.place.matrix, []).append((number, operation))

    @property
    def converts(self) -> bool:
        """Whether even what no operation touches is written in another dtype than it is stored in."""
        return self.info.dtype != self.output.dtype

    def read(self, tile: Tile, scratch: Scratch) -> memoryview:
        """The stored bytes of a tile."""
        return self.files.read(self.info, tile.start * self.stored, tile.end * self.stored, scratch)

    def give_back(self, tile: Tile) -> None:
        """Let the pages of a tile go."""
        self.files.give_back(self.info, tile.start * self.stored, tile.end * self.stored)


@dataclass(frozen=True, slots=True)
class _Made:
    """Tiles under way: their bytes are there once `receipt` returned."""

    recipe: Recipe
    tiles: list[Tile]
    into: memoryview
    receipt: Receipt
    outcome: Outcome


class TileWorker:
    """Makes stretches of output tensors. Not for more than one thread."""

    def __init__(
        self,
        adapters: Sequence[Source],
        lane: Lane,
        state_of: StateOf,
        on_stats: StatsSink | None = None,
        drawn: Drawn | None = None,
    ) -> None:
        self.lane, self._state_of, self._on_stats = lane, state_of, on_stats
        self.factors = FactorReader(adapters, lane.work, drawn)
        self.aside = Scratch()
        """For whatever is read while a stretch is worked on."""
        self._scratch = Scratch()
        self._at: tuple[str, int] | None = None
        self._seam: tuple[str, int] | None = None
        self._seam_bytes = bytearray()
        self._under_way: deque[_Made] = deque()

    def fill(self, recipe: Recipe, start: int, end: int, into: memoryview) -> None:
        """Bytes [start, end) of the output tensor, into as many bytes of memory."""
        width, base = recipe.written, start
        try:
            while start < end:
                tile = recipe.grid.tile(recipe.grid.index_of(start // width))
                low, high = tile.start * width, tile.end * width
                if low < start or high > end:
                    stop = min(end, high)
                    whole = self._cut(recipe, tile, first=low == start)
                    into[start - base : stop - base] = whole[start - low : stop - low]
                else:
                    tiles = self._following(recipe, tile, end // width)
                    stop = tiles[-1].end * width
                    self._make(recipe, tiles, into[start - base : stop - base], report=True)
                start = stop
            self._finish(0)
        finally:
            self._under_way.clear()

    def _cut(self, recipe: Recipe, tile: Tile, *, first: bool) -> memoryview:
        """The bytes of a tile of which only a part is wanted, kept for whoever wants the rest; `first` says that its
        first byte is among those that are wanted now."""
        size = (tile.end - tile.start) * recipe.written
        if self._seam != (recipe.output.name, tile.index):
            self._seam = None
            if len(self._seam_bytes) < size:
                self._seam_bytes = bytearray(size)
            self._make(recipe, [tile], memoryview(self._seam_bytes)[:size], report=first)
            self._finish(0)
            self._seam = (recipe.output.name, tile.index)
        return memoryview(self._seam_bytes)[:size]

    def _following(self, recipe: Recipe, tile: Tile, last: int) -> list[Tile]:
        """A tile and those below it that end before element `last`, as many as are read at a time."""
        tiles, most = [tile], min(last, tile.start + PIECE // recipe.stored)
        while tiles[-1].end < most and tiles[-1].end < recipe.elements:
            following = recipe.grid.tile(tiles[-1].index + 1)
            if following.end > most or following.matrix != tile.matrix or following.cols != tile.cols:
                break
            tiles.append(following)
        return tiles

    def _make(self, recipe: Recipe, tiles: list[Tile], into: memoryview, *, report: bool) -> None:
        """Whole tiles below each other."""
        low, high = tiles[0].start, tiles[-1].end
        operations = recipe.by_matrix.get(tiles[0].matrix, [])
        if not operations and not recipe.converts:
            recipe.files.copy(recipe.info, low * recipe.stored, high * recipe.stored, into, self.aside)
            return
        if self._at != (recipe.output.name, tiles[0].matrix):
            self.factors.forget()
            self._at = (recipe.output.name, tiles[0].matrix)
        shape = (tiles[-1].rows[1] - tiles[0].rows[0], tiles[0].cols[1] - tiles[0].cols[0])
        data = recipe.files.read(recipe.info, low * recipe.stored, high * recipe.stored, self._scratch)
        with self.lane.active():
            weight = self.lane.upload(data, recipe.info.dtype, shape)
            written = self.lane.target(recipe.output.dtype, shape, into)
            wanted = report and self._on_stats is not None
            outcome = self._merger(recipe).merge(weight, written, tiles, operations, stats=wanted)
            receipt = self.lane.send(written, into)
        del weight, data
        recipe.files.give_back(recipe.info, low * recipe.stored, high * recipe.stored)
        self._under_way.append(_Made(recipe, tiles, into, receipt, outcome))
        self._finish(self.lane.depth)

    def _merger(self, recipe: Recipe) -> TileMerger:
        return TileMerger(self.factors, lambda n, op, tile: self._state_of(recipe, n, op, tile), self.lane.work)

    def _finish(self, left: int) -> None:
        """Wait for the oldest tiles until so many are `left` under way."""
        while len(self._under_way) > left:
            made = self._under_way.popleft()
            made.receipt()
            if not all(map(math.isfinite, made.outcome.sums)):
                self._check_finite(made)
            for found in made.outcome.measured:
                self._report(made, found)

    def _report(self, made: _Made, found: Measured) -> None:
        stats = found.stats()
        if not all(map(math.isfinite, (stats.delta, stats.sampled, stats.survived))):
            stats = self._without_unknown(made, found)
        if self._on_stats:
            self._on_stats(made.recipe.output.name, found.tile, stats)

    def _without_unknown(self, made: _Made, found: Measured) -> TileStats:
        """The measurements of a tile whose stored values are not all finite, from those that are."""
        import torch

        recipe = made.recipe
        tile = recipe.grid.tile(found.tile)
        shape = (tile.rows[1] - tile.rows[0], tile.cols[1] - tile.cols[0])
        with self.lane.active():
            weight = self.lane.upload(recipe.read(tile, Scratch()), recipe.info.dtype, shape)
            value = torch.empty(shape, dtype=torch.float64, device=weight.device)
            self._merger(recipe).merge(weight, value, [tile], recipe.by_matrix[tile.matrix], stats=False)
            at = (tile.start - made.tiles[0].start) * recipe.written
            there = made.into[at : at + value.numel() * recipe.written]
            written = _values(there, recipe.output.dtype).view(shape).to(value)
            known = torch.isfinite(weight)
            norm, sample = (not isinstance(part, float) for part in (found.delta, found.sampled))
            few = measured_rows(shape[1], norm=norm)
            parts = [torch.where(known, part, 0.0)[few] for part in (weight, value - weight, written)]
            return measured(tile.index, (parts[0], parts[1], parts[2]), norm=norm, sample=sample).stats()

    def _check_finite(self, made: _Made) -> None:
        """Refuse a value that is not finite where the stored one was."""
        recipe, first, last = made.recipe, made.tiles[0], made.tiles[-1]
        stored = recipe.files.read(recipe.info, first.start * recipe.stored, last.end * recipe.stored, Scratch())
        written = _values(made.into, recipe.output.dtype)
        bad = ~written.isfinite() & _values(stored, recipe.info.dtype).isfinite()
        if not bool(bad.any()):
            return
        row, col = divmod(int(bad.nonzero()[0]), first.cols[1] - first.cols[0])
        where = f"`{recipe.output.name}` at row {row + first.rows[0]:,}, column {col + first.cols[0]:,}"
        overflow = ", which may be out of range for F16" if recipe.output.dtype == "F16" else ""
        raise NonFiniteError(
            (recipe.output.name,),
            f"the result is not finite in {where}{overflow}",
            "`--dtype bfloat16` or `float32` holds larger values; an alpha may be far too large",
        )


def _values(data: memoryview, dtype: str) -> Tensor:
    import torch

    return torch.frombuffer(data, dtype=torch_dtype(dtype))
