"""Producing the bytes of an output tensor: any range of them, the same bytes whoever asks for whichever range.

Untouched stretches are handed out as they lie in the base, without a copy; touched ones tile by tile on the canonical
grid. Execution, verification and views all pull from here.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from streammerge.compute.factors import FactorReader
from streammerge.compute.tile import TileMerger, TileStats, measure, overlap, rounded, window
from streammerge.core.dtypes import itemsize, torch_dtype
from streammerge.core.errors import NonFiniteError
from streammerge.core.tensors import Operation, OutputTensor, Stored, TensorInfo
from streammerge.methods import FORMULAS, Locality
from streammerge.methods.base import Region
from streammerge.planning.layout import size_of
from streammerge.planning.memory import PIECE
from streammerge.planning.model import MergePlan
from streammerge.planning.tiles import Tile, TileGrid, grid_of
from streammerge.sources.adapter import Adapter
from streammerge.sources.checkpoint import Checkpoint
from streammerge.sources.files import TensorFiles

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE_EVERY = 8
"""One tile in so many is measured for how much of its delta survived rounding."""
KEPT_STATES = 4

StatsSink = Callable[[str, int, TileStats], None]


class Producer:
    """Hands out bytes of a plan's tensors, from any number of threads. `on_stats` receives tensor, tile number and
    measurements of every tile whose first byte was asked for."""

    def __init__(
        self, plan: MergePlan, checkpoint: Checkpoint, adapters: Sequence[Adapter], on_stats: StatsSink | None = None
    ) -> None:
        self.plan, self.checkpoint, self.adapters = plan, checkpoint, adapters
        self._stored = checkpoint.facts.tensors
        self._on_stats = on_stats
        self._local = threading.local()
        self._states: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._states_lock = threading.Lock()

    def read(self, output: OutputTensor, start: int, end: int) -> Iterator[memoryview]:
        """Bytes [start, end) of an output tensor, in pieces; each is good until the next is asked for."""
        files, info = self._source(output)
        if not output.operations and info.dtype == output.dtype:
            yield from _raw(files, info, start, end)
            return
        width = itemsize(output.dtype)
        grid = grid_of(output.shape, output.operations)
        element = start // width
        while element * width < end:
            tile = grid.tile(grid.index_of(element))
            first, last = max(start, tile.start * width), min(end, tile.end * width)
            data = self._tile(output, tile, grid, files, info, report=first == tile.start * width)
            yield data[first - tile.start * width : last - tile.start * width]
            element = tile.end

    def _source(self, output: OutputTensor) -> tuple[TensorFiles, TensorInfo]:
        if isinstance(output.source, Stored):
            return self.checkpoint.files, self._stored[output.source.name]
        adapter = self.adapters[output.source.adapter]
        return adapter.files, adapter.facts.tensors[output.source.key]

    def _tile(
        self, output: OutputTensor, tile: Tile, grid: TileGrid, files: TensorFiles, info: TensorInfo, *, report: bool
    ) -> memoryview:
        operations = [(n, op, region) for n, op in enumerate(output.operations) if (region := overlap(op, tile))]
        width = itemsize(info.dtype)
        data = files.read(info, tile.start * width, tile.end * width)
        if not operations and info.dtype == output.dtype:
            return data
        weight = _as_tile(data, info.dtype, tile)
        factors = self._factors(output.name, tile.matrix)
        merger = TileMerger(factors, lambda n, op, at: self._state(output, n, op, at, grid))
        value, delta = merger.merge(weight, tile, operations)
        written = rounded(value, output.dtype)
        _check_finite(written, weight, output, tile)
        if report and operations and self._on_stats:
            sample = tile.index % SAMPLE_EVERY == 0
            self._on_stats(output.name, tile.index, measure(weight, value, delta, written, sample=sample))
        files.give_back(info, tile.start * width, tile.end * width)
        return _bytes_of(written)

    def _factors(self, name: str, matrix: int) -> FactorReader:
        """This thread's factor reader; it forgets when the thread turns to another matrix."""
        local = self._local
        if not hasattr(local, "factors"):
            local.factors, local.at = FactorReader(self.adapters), None
        if local.at != (name, matrix):
            local.factors.forget()
            local.at = (name, matrix)
        factors: FactorReader = local.factors
        return factors

    def _state(self, output: OutputTensor, number: int, operation: Operation, tile: Tile, grid: TileGrid) -> Any:
        """What a formula needs of more than its tile. Statistics of columns and matrices are computed once for all
        threads, in the order of the tiles; those of rows belong to the tile's own band."""
        locality = FORMULAS[operation.formula].locality(operation)
        if locality is Locality.ELEMENT:
            return None
        if locality is Locality.ROW:
            return self._reduced(output, operation, [grid.tile(index) for index in grid.band_of(tile)])
        with self._states_lock:
            key = (output.name, number)
            if key not in self._states:
                if locality is Locality.COLUMN:
                    tiles = [grid.tile(index) for index in grid.matrix_of(tile.matrix)]
                    self._states[key] = self._reduced(output, operation, tiles)
                else:
                    self._states[key] = self._prepared(output, operation)
                if len(self._states) > KEPT_STATES:
                    self._states.popitem(last=False)
            return self._states[key]

    def _reduced(self, output: OutputTensor, operation: Operation, tiles: Sequence[Tile]) -> Tensor:
        """The statistic over some tiles: one value for each of their rows, or for each column of the place."""
        import torch

        formula = FORMULAS[operation.formula]
        by_column = formula.locality(operation) is Locality.COLUMN
        files, info = self._source(output)
        width = itemsize(info.dtype)
        regions = [(tile, region) for tile in tiles if (region := overlap(operation, tile))]
        total = torch.zeros(operation.place.shape[1] if by_column else regions[0][1].shape[0], dtype=torch.float64)
        factors = self._factors(output.name, operation.place.matrix)
        for tile, region in regions:
            weight = _as_tile(files.read(info, tile.start * width, tile.end * width), info.dtype, tile)
            share = formula.reduce(operation, region, weight[window(operation, tile, region)], factors)
            total[slice(*region.cols) if by_column else slice(None)] += share
            files.give_back(info, tile.start * width, tile.end * width)
        return total

    def _prepared(self, output: OutputTensor, operation: Operation) -> Any:
        import torch

        files, info = self._source(output)
        view = operation.place.view
        data = files.read(info, 0, info.nbytes)
        weight = torch.frombuffer(data, dtype=torch_dtype(info.dtype)).view(view.stack, view.rows, view.cols)
        matrix = operation.place.matrix
        start = matrix * view.rows * view.cols
        tile = Tile(0, matrix, (0, view.rows), (0, view.cols), start, start + view.rows * view.cols)
        whole = Region(*((0, n) for n in operation.place.shape))
        region = weight[matrix][window(operation, tile, whole)]
        return FORMULAS[operation.formula].prepare(operation, region, self._factors(output.name, matrix))


def shard_bytes(producer: Producer, number: int, start: int, end: int) -> Iterator[memoryview]:
    """Bytes [start, end) of one output file: its header, then its tensors."""
    shard = producer.plan.shards[number]
    if start < len(shard.header):
        yield memoryview(shard.header)[start:end]
    for name, offset in shard.offsets.items():
        output = producer.plan.tensors[name]
        first, last = max(start, offset), min(end, offset + size_of(output))
        if first < last:
            yield from producer.read(output, first - offset, last - offset)


def _raw(files: TensorFiles, info: TensorInfo, start: int, end: int) -> Iterator[memoryview]:
    for first in range(start, end, PIECE):
        last = min(first + PIECE, end)
        yield files.read(info, first, last)
        files.give_back(info, first, last)


def _as_tile(data: memoryview, dtype: str, tile: Tile) -> Tensor:
    import torch

    rows, cols = tile.rows[1] - tile.rows[0], tile.cols[1] - tile.cols[0]
    return torch.frombuffer(data, dtype=torch_dtype(dtype)).view(rows, cols)


def _bytes_of(values: Tensor) -> memoryview:
    import torch

    return values.reshape(-1).view(torch.uint8).numpy().data


def _check_finite(written: Tensor, weight: Tensor, output: OutputTensor, tile: Tile) -> None:
    """Refuse a value that is not finite where the stored one was."""
    import torch

    if all(math.isfinite(float(end)) for end in torch.aminmax(written)):
        return
    bad = ~torch.isfinite(written) & torch.isfinite(weight)
    if bool(bad.any()):
        row, col = (int(n) for n in bad.nonzero()[0])
        where = [row + tile.rows[0], col + tile.cols[0]]
        overflow = f", which may be out of range for {output.dtype}" if output.dtype == "F16" else ""
        reason = f"the result is not finite in `{output.name}` at row {where[0]:,}, column {where[1]:,}{overflow}"
        raise NonFiniteError(
            (output.name,), reason, "`--dtype bfloat16` or `float32` holds larger values; an alpha may be far too large"
        )
