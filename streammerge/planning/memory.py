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
"""Bytes of an untouched tensor that a worker handles at a time."""
FLOAT64, FLOAT32 = 8, 4
TILE_COPIES = 4
"""float64 copies of a tile alive at once: the product, the delta kept for the report, W widened, the change made."""


def figures(
    outputs: Mapping[str, OutputTensor], shards: Iterable[OutputShard], stored: Iterable[TensorInfo], options: Options
) -> Figures:
    """The figures of a plan, with as many of the wanted workers as the budget holds.

    Raises BudgetError where it does not hold one.
    """
    converts = options.dtype != "auto"
    tile, tile_of = max((_tile_memory(output, converts), name) for name, output in outputs.items())
    state, state_of = max((_state_memory(output), name) for name, output in outputs.items())
    each = PIECE + tile
    whole = each + state
    if whole > options.memory:
        reason = f"for `{tile_of}`" if not state else f"the decomposition of `{state_of}` needs all of it in memory"
        raise BudgetError(needed=whole, granted=options.memory, because=reason)
    workers = min(options.worker_count(), max(1, (options.memory - state) // each))
    return Figures(
        workers, workers * each + state, sum(info.nbytes for info in stored), sum(shard.size for shard in shards)
    )


def _tile_memory(output: OutputTensor, converts: bool) -> int:
    """Bytes one worker needs for a tile of this tensor; `converts` says that untouched floats get another dtype."""
    grid = grid_of(output.shape, output.operations)
    rows, cols = grid.tile_shape
    if not output.operations:
        converted = rows * cols * (FLOAT64 + FLOAT32 + BITS[output.dtype] // 8)
        return max(2 * PIECE, converted if converts and output.dtype in FLOATS else 0)
    own = rows * cols * (TILE_COPIES * FLOAT64 + FLOAT32 + BITS[output.dtype] // 8)
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
