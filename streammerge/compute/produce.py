"""Producing the bytes of an output: any stretch of any of its files, the same bytes whoever asks for whichever stretch.

What nothing touches is copied as it lies in the base, the rest is made tile by tile on the canonical grid. Execution,
verification and views all pull from here, from as many threads as they like.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from streammerge.compute.devices import DeviceMaker
from streammerge.compute.factors import Drawn, Source
from streammerge.compute.lanes import Cpu
from streammerge.compute.loading import TorchThreads
from streammerge.compute.tile import overlap, window
from streammerge.compute.worker import Recipe, StatsSink, TileWorker
from streammerge.core.dtypes import torch_dtype
from streammerge.core.tensors import Operation, OutputTensor, Stored, TensorInfo
from streammerge.methods import FORMULAS, Locality
from streammerge.methods.base import Region
from streammerge.planning.layout import size_of
from streammerge.planning.model import MergePlan
from streammerge.planning.tiles import Tile
from streammerge.sources.adapter import Adapter
from streammerge.sources.checkpoint import Checkpoint
from streammerge.sources.files import OpenFile, Scratch, TensorFiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEPT_STATES = 4


class Unmerged:
    """The base as a source of factors: its tensors by their names in the output, as they are before any operation."""

    def __init__(self, plan: MergePlan, checkpoint: Checkpoint) -> None:
        self.files, self._plan, self._stored = checkpoint.files, plan, checkpoint.facts.tensors

    @property
    def facts(self) -> Unmerged:
        """Where `tensors` is looked for."""
        return self

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Made when the first factor of the base is read, which most plans do not have."""
        sources = ((name, output.source) for name, output in self._plan.tensors.items())
        return {name: self._stored[source.name] for name, source in sources if isinstance(source, Stored)}


class Producer:
    """Hands out bytes of a plan's files. `on_stats` receives tensor, tile number and measurements of every tile whose
    first byte was asked for. Torch is waited for where a tile is made, not before."""

    def __init__(
        self,
        plan: MergePlan,
        checkpoint: Checkpoint,
        adapters: Sequence[Adapter],
        on_stats: StatsSink | None = None,
        device: DeviceMaker = Cpu,
    ) -> None:
        self.plan, self.checkpoint, self.adapters = plan, checkpoint, adapters
        self.threads = TorchThreads()
        self._stored = checkpoint.facts.tensors
        self._sources: tuple[Source, ...] = (*adapters, Unmerged(plan, checkpoint))
        self._on_stats, self._device = on_stats, device
        self._local = threading.local()
        self._drawn = Drawn()
        self._layout = [(list(shard.offsets), list(shard.offsets.values())) for shard in plan.shards]
        self._states: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self._states_lock = threading.Lock()

    def fill(self, number: int, start: int, end: int, into: memoryview) -> None:
        """Bytes [start, end) of output file `number`: its header, then its tensors."""
        shard = self.plan.shards[number]
        names, offsets = self._layout[number]
        if start < len(shard.header):
            stop = min(end, len(shard.header))
            into[: stop - start] = shard.header[start:stop]
        for at in range(max(0, bisect_right(offsets, start) - 1), len(names)):
            if offsets[at] >= end:
                break
            output = self.plan.tensors[names[at]]
            first, last = max(start, offsets[at]), min(end, offsets[at] + size_of(output))
            if first < last:
                self.fill_tensor(output, first - offsets[at], last - offsets[at], into[first - start : last - start])

    def fill_tensor(self, output: OutputTensor, start: int, end: int, into: memoryview) -> None:
        """Bytes [start, end) of one output tensor."""
        files, info = self._source(output)
        if not output.operations and info.dtype == output.dtype:
            files.copy(info, start, end, into, self._aside())
            return
        self._worker().fill(self._recipe(output, files, info), start, end, into)

    def verbatim(self, number: int, start: int, end: int) -> tuple[OpenFile, int] | None:
        """The stored file, and the offset in it, where these very bytes of an output file lie one after the other; None
        if they do not."""
        names, offsets = self._layout[number]
        at = bisect_right(offsets, start) - 1
        found: tuple[TensorFiles, str, int] | None = None
        position = start
        while position < end:
            if not 0 <= at < len(names) or offsets[at] > position:
                return None
            output = self.plan.tensors[names[at]]
            files, info = self._source(output)
            here = (files, info.file, info.start - offsets[at])
            if output.operations or info.dtype != output.dtype or info.strides is not None or found not in (None, here):
                return None
            found, position, at = here, offsets[at] + size_of(output), at + 1
        return (found[0].opened(found[1]), start + found[2]) if found else None

    def _source(self, output: OutputTensor) -> tuple[TensorFiles, TensorInfo]:
        if isinstance(output.source, Stored):
            return self.checkpoint.files, self._stored[output.source.name]
        adapter = self.adapters[output.source.adapter]
        return adapter.files, adapter.facts.tensors[output.source.key]

    def _aside(self) -> Scratch:
        if not hasattr(self._local, "aside"):
            self._local.aside = Scratch()
        scratch: Scratch = self._local.aside
        return scratch

    def _worker(self) -> TileWorker:
        """This thread's worker; the first time, it waits for torch."""
        if not hasattr(self._local, "worker"):
            self.threads.use_one()
            lane = self._device().lane(self._accumulate())
            self._local.worker = TileWorker(self._sources, lane, self._state, self._on_stats, self._drawn)
        worker: TileWorker = self._local.worker
        return worker

    def _accumulate(self) -> torch.dtype:
        return torch_dtype("F32" if self.plan.options.get("accumulate") == "float32" else "F64")

    def _recipe(self, output: OutputTensor, files: TensorFiles, info: TensorInfo) -> Recipe:
        kept: Recipe | None = getattr(self._local, "recipe", None)
        if kept is None or kept.output is not output:
            kept = self._local.recipe = Recipe(output, files, info)
        return kept

    def _state(self, recipe: Recipe, number: int, operation: Operation, tile: Tile) -> Any:
        """What a formula needs of more than its tile. Statistics of columns and matrices are computed once for all
        threads, in the order of the tiles; those of rows belong to the tile's own band."""
        locality = FORMULAS[operation.formula].locality(operation)
        if locality in (Locality.ELEMENT, Locality.LINE):
            return None
        if locality is Locality.ROW:
            return self._reduced(recipe, operation, recipe.grid.band_of(tile))
        with self._states_lock:
            key = (recipe.output.name, number)
            if key not in self._states:
                if locality is Locality.COLUMN:
                    self._states[key] = self._reduced(recipe, operation, recipe.grid.matrix_of(tile.matrix))
                else:
                    self._states[key] = self._prepared(recipe, operation)
                self._worker().lane.settle()
                if len(self._states) > KEPT_STATES:
                    self._states.popitem(last=False)
            return self._worker().lane.borrow(self._states[key])

    def _reduced(self, recipe: Recipe, operation: Operation, tiles: range) -> Tensor:
        """The statistic over some tiles: along its last axis their rows, or the columns of the place."""
        import torch

        worker, formula = self._worker(), FORMULAS[operation.formula]
        by_column = formula.locality(operation) is Locality.COLUMN
        parts = [(tile, region) for tile in map(recipe.grid.tile, tiles) if (region := overlap(operation, tile))]
        length = operation.place.shape[1] if by_column else parts[0][1].shape[0]
        total: Tensor | None = None
        for tile, region in parts:
            data = recipe.read(tile, worker.aside)
            shape = (tile.rows[1] - tile.rows[0], tile.cols[1] - tile.cols[0])
            weight = worker.lane.upload(data, recipe.info.dtype, shape)
            share = formula.reduce(operation, region, weight[window(operation, tile, region)], worker.factors)
            if total is None:
                total = torch.zeros((*share.shape[:-1], length), dtype=torch.float64, device=share.device)
            total[..., slice(*region.cols) if by_column else slice(None)] += share
            recipe.give_back(tile)
        assert total is not None
        return total

    def _prepared(self, recipe: Recipe, operation: Operation) -> Any:
        worker, view = self._worker(), operation.place.view
        size = view.rows * view.cols
        start = operation.place.matrix * size
        tile = Tile(0, operation.place.matrix, (0, view.rows), (0, view.cols), start, start + size)
        weight = worker.lane.upload(recipe.read(tile, Scratch()), recipe.info.dtype, (view.rows, view.cols))
        whole = Region(*((0, n) for n in operation.place.shape))
        return FORMULAS[operation.formula].prepare(operation, weight[window(operation, tile, whole)], worker.factors)
