"""What the adapter's values say before anything is merged: finite or not, zero or not, how large each delta is.

numpy only, in bounded pieces: a plan must not load torch, and an adapter may be larger than the budget.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from streammerge.core.dtypes import FLOATS, INTEGERS, as_numpy, itemsize, surely_finite
from streammerge.core.errors import NonFiniteError, NotMergeableError
from streammerge.core.tensors import BASE, FactorBlock, FactorView, Operation, OutputTensor, TensorInfo
from streammerge.methods import FORMULAS
from streammerge.methods.parts import Parts, sort_parts
from streammerge.planning.model import OperationFacts
from streammerge.sources.adapter import Adapter
from streammerge.sources.files import same_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LEAST_TRACE = 1e-20
"""Below this sum of squares, float32 may have lost the small ones among them."""
GRAM_RANK, SIDE = 2048, 1024
"""The highest rank whose Gram matrices are made, of 32 MiB each; and rows and columns of the tiles of the product that
is made beyond it, as the merge will do, too."""
PIECE = 2**19
"""Elements of a factor that are converted at a time: they stay in the cache for the product."""


def parts_of(adapter: Adapter) -> Parts:
    """The adapter's tensors, sorted by what they are. Raises what `sort_parts` raises."""
    return sort_parts(adapter.facts.tensors, lambda a, b: same_bytes((adapter.files, a), (adapter.files, b)))


def check_finite(adapter: Adapter, positions: Collection[str] = ()) -> None:
    """Refuse NaN and infinity anywhere in the adapter, and factors of a dtype no arithmetic is done on; the tensors
    named `positions` may hold integers."""
    for info in adapter.facts.tensors.values():
        if not (info.name in positions and info.dtype in INTEGERS):
            _check_finite(adapter, info)


def _check_finite(adapter: Adapter, info: TensorInfo) -> None:
    import numpy as np

    if info.dtype not in FLOATS:
        reason = f"the adapter tensor `{info.name}` has dtype {info.dtype}, which is not a float that is merged"
        raise NotMergeableError((info.name,), reason)
    width = itemsize(info.dtype)
    for start in range(0, info.nbytes, PIECE * width):
        end = min(start + PIECE * width, info.nbytes)
        data = adapter.files.read(info, start, end)
        if surely_finite(data, info.dtype):
            continue
        finite = np.isfinite(as_numpy(data, info.dtype))
        if not finite.all():
            index = start // width + int(finite.argmin())
            reason = f"the adapter tensor `{info.name}` is not finite at element {index:,}"
            raise NonFiniteError((info.name,), reason, "the training run diverged, or the file is damaged")
    adapter.files.give_back(info, 0, info.nbytes)


def factor_array(
    view: FactorView, adapters: Sequence[Adapter], ranges: Sequence[tuple[int, int]] | None = None
) -> NDArray[Any]:
    """A factor as a numpy array, or a range of each axis, in the precision of the file or float32 for BF16."""
    import numpy as np

    adapter = adapters[view.adapter]
    info = adapter.facts.tensors[view.key]
    width = itemsize(info.dtype)
    wanted = ranges or [(0, n) for n in view.shape]
    shape = tuple(last - first for first, last in wanted)
    parts: list[tuple[FactorBlock, NDArray[Any]]] = []
    for block in view.blocks(wanted):
        data = adapter.files.read(info, block.low * width, block.high * width)
        steps = tuple(step * width for step in block.strides)
        parts.append((block, np.ndarray(block.shape, f"u{width}", data, strides=steps)))
    if len(parts) == 1:
        gathered = np.ascontiguousarray(parts[0][1])  # no copy of what lies in the file as it is wanted
    else:
        gathered = np.empty(shape, f"u{width}")
        for block, words in parts:
            gathered[block.where] = words
    return as_numpy(gathered.reshape(-1).view(np.uint8).data, info.dtype).reshape(shape)


def facts_of(outputs: Iterable[OutputTensor], adapters: Sequence[Adapter]) -> dict[str, tuple[OperationFacts, ...]]:
    """The facts of every operation by output name. A factor's pages are given back with its output's last operation."""
    found: dict[str, tuple[OperationFacts, ...]] = {}
    # The parts of a parameter that is stored in several tensors share a factor, and come one after the other.
    gram = functools.lru_cache(maxsize=8)(functools.partial(_gram, adapters=adapters))
    for output in outputs:
        found[output.name] = tuple(operation_facts(operation, adapters, gram) for operation in output.operations)
        views = (view for operation in output.operations for view in operation.factors.values())
        for number, key in {(view.adapter, view.key) for view in views if view.adapter != BASE}:
            info = adapters[number].facts.tensors[key]
            adapters[number].files.give_back(info, 0, info.nbytes)
    return found


def operation_facts(
    operation: Operation, adapters: Sequence[Adapter], gram: Callable[[FactorView], NDArray[Any]] | None = None
) -> OperationFacts:
    """The norm of an operation's delta, from its factors alone; `gram` makes or remembers a factor's Gram matrix."""
    import numpy as np

    if operation.formula == "bias":
        delta = (
            np.asarray(factor_array(operation.factors["delta"], adapters), np.float64) * operation.numbers["scaling"]
        )
        return _facts(float(np.sqrt((delta * delta).sum())))
    if operation.formula != "lora":
        decisive = [operation.factors[n] for n in FORMULAS[operation.formula].zero_if if n in operation.factors]
        return OperationFacts(None, zero=any(_is_zero(factor, adapters) for factor in decisive))
    gram = gram or functools.partial(_gram, adapters=adapters)
    left, right = operation.factors["left"].t, operation.factors["right"]
    if right.shape[0] > GRAM_RANK:
        squared = _squared_product(left, right, adapters)
    else:
        squared = float((gram(left) * gram(right)).sum())
    return _facts(abs(operation.numbers["scaling"]) * math.sqrt(max(squared, 0.0)))


def _is_zero(view: FactorView, adapters: Sequence[Adapter]) -> bool:
    """Whether every value of the tensor that a factor is of is zero."""
    adapter = adapters[view.adapter]
    info = adapter.facts.tensors[view.key]
    step = PIECE * itemsize(info.dtype)
    pieces = (adapter.files.read(info, at, min(at + step, info.nbytes)) for at in range(0, info.nbytes, step))
    return not any(as_numpy(piece, info.dtype).any() for piece in pieces)


def _facts(norm: float) -> OperationFacts:
    return OperationFacts(norm, zero=norm == 0)


def _gram(wide: FactorView, adapters: Sequence[Adapter]) -> NDArray[Any]:
    """`F @ F.T` of a factor F (rank, long): ||B A||^2 is the sum of the elementwise product of the two factors' Gram
    matrices. In float32, whose six digits are enough for a norm, unless that under- or overflows."""
    import numpy as np

    with np.errstate(over="ignore", invalid="ignore"):
        single = _gram_in(np.dtype(np.float32), wide, adapters)
    # No element of a Gram matrix is larger than the largest of its diagonal.
    if LEAST_TRACE < float(single.trace()) < math.inf:
        return single.astype(np.float64)
    return _gram_in(np.dtype(np.float64), wide, adapters)


def _squared_product(left: FactorView, right: FactorView, adapters: Sequence[Adapter]) -> float:
    """The sum of the squares of `left.T @ right`, both (rank, long), tile by tile."""
    import numpy as np

    def pieces(length: int) -> list[tuple[int, int]]:
        return [(start, min(start + SIDE, length)) for start in range(0, length, SIDE)]

    total = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, columns in itertools.product(pieces(left.shape[1]), pieces(right.shape[1])):
            tile = np.zeros((rows[1] - rows[0], columns[1] - columns[0]))
            for part in pieces(left.shape[0]):
                a = np.asarray(factor_array(left, adapters, (part, rows)), np.float64)
                tile += a.T @ np.asarray(factor_array(right, adapters, (part, columns)), np.float64)
            total += float((tile * tile).sum())
    return total


def _gram_in(dtype: np.dtype[Any], wide: FactorView, adapters: Sequence[Adapter]) -> NDArray[Any]:
    """The Gram matrix in one precision, piece by piece along the long axis."""
    import numpy as np

    rank, length = wide.shape
    total: NDArray[Any] = np.zeros((rank, rank), dtype)
    step = max(1, PIECE // rank)
    for start in range(0, length, step):
        every, piece = (0, rank), (start, min(start + step, length))
        if wide.axes[1].step == 1:
            values = np.asarray(factor_array(wide, adapters, (every, piece)), dtype)
        else:  # gathered as it lies in the file: transposing it there would take longer than the product
            values = np.asarray(factor_array(wide.t, adapters, (piece, every)), dtype).T
        total += values @ values.T
    return total


def same_values(a: FactorView, b: FactorView, adapters: Sequence[Adapter]) -> bool:
    """Whether two factors hold the same numbers."""
    import numpy as np

    if a.shape != b.shape:
        return False
    step = max(1, PIECE // max(1, math.prod(a.shape[1:])))
    pieces = [[(n, min(n + step, a.shape[0])), *((0, m) for m in a.shape[1:])] for n in range(0, a.shape[0], step)]
    return all(np.array_equal(factor_array(a, adapters, at), factor_array(b, adapters, at)) for at in pieces)
