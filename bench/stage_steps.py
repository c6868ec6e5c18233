"""The steps of one canonical tile, each by itself, and a whole stretch of tiles, in nanoseconds per element.

The tiles are the first of the largest tensor that an adapter changes, with the adapter's own factors; every step is the
package's call, or the one that it makes, on memory that stays in a core's cache as it does there. One thread.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from measure import median
from stage_runs import planned

from streammerge.compute.factors import FactorReader
from streammerge.compute.lanes import CpuLane
from streammerge.compute.tile import SAMPLE_EVERY, TileMerger, measured, overlap
from streammerge.core.dtypes import torch_dtype
from streammerge.core.options import Options
from streammerge.methods import FORMULAS
from streammerge.planning.memory import PIECE
from streammerge.planning.tiles import Tile, TileGrid, grid_of

DTYPES = {"float64": torch.float64, "float32": torch.float32}
LEAST = 3
"""Measurements of a step at least, however long one takes."""
Step = Callable[[], object]


def nanoseconds(step: Step, elements: int, seconds: float) -> float:
    """The median of one call, per element, over calls that take `seconds` together; the first is not counted."""
    step()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < LEAST or time.perf_counter() < end:
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    return median(found) / elements * 1e9


def steps_of(base: Path, adapter: Path, accumulate: str) -> tuple[Mapping[str, tuple[Step, int]], str]:
    """The steps by name, with the elements that each is done to, and the tile's shape and dtype as text."""
    plan, inputs = planned(base, adapter, Options(accumulate=accumulate))
    output = max(plan.changed, key=lambda tensor: math.prod(tensor.shape))
    info = inputs.checkpoint.facts.tensors[output.name]
    width = torch_dtype(info.dtype).itemsize
    grid, operation = grid_of(output.shape, output.operations), output.operations[0]
    tile, tiles = grid.tile(0), stretch(grid, width)
    region = overlap(operation, tile)
    assert region
    lane = CpuLane(DTYPES[accumulate])
    work, many = lane.work, tiles[-1].end
    factors = FactorReader(inputs.adapters, work)
    shape, whole = region.shape, (tiles[-1].rows[1], region.shape[1])
    weights = lane.upload(inputs.checkpoint.files.read(info, 0, many * width), info.dtype, whole)
    weight, into = weights[: shape[0]].clone(), memoryview(bytearray(weights.nbytes))
    news = lane.target(output.dtype, whole, into)
    written, part = news[: shape[0]], into[: weight.nbytes]
    formula = FORMULAS[operation.formula]
    every = replace(region, rows=(0, whole[0]))
    deltas, all_deltas = (formula.deltas(operation, rows, factors) for rows in (region, every))
    delta, value = work.take("delta", shape), work.take("value", shape)
    merger = TileMerger(factors, lambda number, one, at: None, work)
    steps: dict[str, tuple[Step, int]] = {
        "product": (lambda: deltas.into(delta, region.rows), tile.end),
        "widening": (lambda: value.copy_(weight), tile.end),
        "adding": (lambda: value.add_(delta), tile.end),
        "rounding": (lambda: written.copy_(value), tile.end),
        "finiteness": (written.sum, tile.end),
        "digest": (lambda: xxhash.xxh3_128(part).digest(), tile.end),
        "reading factors, once a stretch": (lambda: formula.deltas(operation, every, factors), many),
        "norm of the delta, once a stretch": (all_deltas.squared_norm, many),
        f"what survived, one tile in {SAMPLE_EVERY}": (
            lambda: measured(0, (weight, delta, value), norm=False, sample=True),
            SAMPLE_EVERY * tile.end,
        ),
        "a whole stretch, from memory, but its digest": (
            lambda: merger.merge(weights, news, tiles, [(0, operation)], stats=True),
            many,
        ),
    }
    return steps, f"{shape[0]} x {shape[1]} {info.dtype}"


def stretch(grid: TileGrid, width: int) -> list[Tile]:
    """The first tiles of a matrix that are read at a time, elements being `width` bytes."""
    tiles = [grid.tile(0)]
    while tiles[-1].index + 1 < grid.count:
        following = grid.tile(tiles[-1].index + 1)
        if following.end * width > PIECE or following.matrix or following.cols != tiles[0].cols:
            break
        tiles.append(following)
    return tiles


def step_columns(base: Path, adapters: Mapping[int, Path], seconds: float) -> list[dict[str, object]]:
    """A column for each rank and precision: the tile, and nanoseconds per element by step. Leaves torch with as many
    threads as it had."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        columns: list[dict[str, object]] = []
        for rank, adapter in adapters.items():
            for accumulate in DTYPES:
                steps, tile = steps_of(base, adapter, accumulate)
                found = {name: nanoseconds(*step, seconds) for name, step in steps.items()}
                columns.append({"r": rank, "accumulate": accumulate, "tile": tile, "ns": found})
        return columns
    finally:
        torch.set_num_threads(before)
