"""What a plan takes: working memory for its workers, bytes read and written.

The bound is computed from the same shapes the arithmetic uses, so that a budget is either kept or refused before the
first byte is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from streammerge.core.dtypes import BITS, FLOATS
from streammerge.core.errors import BudgetError
from streammerge.core.options import Options
from streammerge.core.tensors import OutputTensor, TensorInfo
from streammerge.methods import FORMULAS, Locality
from streammerge.planning.model import Figures, OutputShard
from streammerge.planning.tiles import grid_of

PIECE = 4 * 2**20
"""Bytes of output that are made, digested and written at a time, and bytes of the base that are read at a time."""
READ_BUFFERS = {"direct": 3}
"""Pieces of the base that a worker holds, by the way of reading: elsewhere one, which it works on; past the page cache
also those that it copies from, untouched parts of tensors and whole ones."""
WRITERS = 2
"""Threads that write."""
FLOAT64 = 8
TILE_COPIES = 4
"""Copies of a tile alive at once, in the arithmetic's dtype: the delta, one of several deltas, W widened, the change
that is measured."""


def buffer_count(workers: int) -> int:
    """Pieces of output that are under way at a time: one that each worker fills, and twice as many as are written at
    once, so that the disk always has another."""
    return workers + 2 * WRITERS


def figures(
    outputs: Mapping[str, OutputTensor], shards: Iterable[OutputShard], stored: Iterable[TensorInfo], options: Options
) -> Figures:
    """The figures of a plan, with as many of the wanted workers as the budget holds.

    Raises BudgetError where it does not hold one.
    """
    converts = options.dtype != "auto"
    tile, tile_of = max((_tile_memory(output, converts), name) for name, output in outputs.items())
    state, state_of = max((_state_memory(output), name) for name, output in outputs.items())
    shared = buffer_count(0) * PIECE + state
    each = tile + (buffer_count(1) - buffer_count(0) + READ_BUFFERS.get(options.read, 1)) * PIECE
    whole = each + shared
    if whole > options.memory:
        reason = f"for `{tile_of}`" if not state else f"`{state_of}` needs all of it in memory, or what it is made from"
        raise BudgetError(needed=whole, granted=options.memory, because=reason)
    workers = min(options.worker_count(), max(1, (options.memory - shared) // each))
    return Figures(
        workers, workers * each + shared, sum(info.nbytes for info in stored), sum(shard.size for shard in shards)
    )


def _tile_memory(output: OutputTensor, converts: bool) -> int:
    """Bytes one worker needs for a tile of this tensor, and one that is cut; `converts` says that untouched floats get
    another dtype."""
    grid = grid_of(output.shape, output.operations)
    rows, cols = grid.tile_shape
    width = BITS[output.dtype] // 8
    if not output.operations:
        return rows * cols * (FLOAT64 + width) if converts and output.dtype in FLOATS else 0
    own = rows * cols * (TILE_COPIES * FLOAT64 + width)
    per_matrix: dict[int, int] = {}
    for operation in output.operations:
        formula = FORMULAS[operation.formula]
        needed = formula.memory(operation, (rows, cols))
        if formula.locality(operation) is Locality.COLUMN:
            needed += 2 * FLOAT64 * grid.view.cols
        per_matrix[operation.place.matrix] = per_matrix.get(operation.place.matrix, 0) + needed
    return own + max(per_matrix.values())


def _state_memory(output: OutputTensor) -> int:
    return max((FORMULAS[operation.formula].state_memory(operation) for operation in output.operations), default=0)
