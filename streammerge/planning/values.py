"""What the adapter's values say before anything is merged: finite or not, zero or not, how large each delta is.

numpy only, in bounded pieces: a plan must not load torch, and an adapter may be larger than the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.core.dtypes import FLOATS, as_numpy, itemsize
from streammerge.core.errors import NonFiniteError, NotMergeableError
from streammerge.core.tensors import FactorView, Operation, TensorInfo
from streammerge.methods.parts import Parts, sort_parts
from streammerge.planning.model import OperationFacts
from streammerge.sources.adapter import Adapter

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE = 2**20
"""Elements of a factor that are converted at a time."""


def parts_of(adapter: Adapter) -> Parts:
    """The adapter's tensors, sorted by what they are. Raises what `sort_parts` raises."""
    return sort_parts(adapter.facts.tensors, lambda a, b: same_tensor((adapter, a), (adapter, b)))


def check_finite(adapter: Adapter) -> None:
    """Refuse NaN and infinity anywhere in the adapter, and factors of a dtype no arithmetic is done on."""
    import numpy as np

    for name, info in adapter.facts.tensors.items():
        if info.dtype not in FLOATS:
            raise NotMergeableError(
                (name,), f"the adapter tensor `{name}` has dtype {info.dtype}, which is not a float that is merged"
            )
        width = itemsize(info.dtype)
        for start in range(0, info.nbytes, PIECE * width):
            end = min(start + PIECE * width, info.nbytes)
            finite = np.isfinite(as_numpy(adapter.files.read(info, start, end), info.dtype))
            if not finite.all():
                index = start // width + int(finite.argmin())
                raise NonFiniteError(
                    (name,),
                    f"the adapter tensor `{name}` is not finite at element {index:,}",
                    "the training run diverged, or the file is damaged",
                )
        adapter.files.give_back(info, 0, info.nbytes)


def factor_array(view: FactorView, adapters: Sequence[Adapter], rows: tuple[int, int] | None = None) -> NDArray[Any]:
    """Rows of a factor as a numpy array (all of it by default), in the precision of the file or float32 for BF16."""
    import numpy as np

    adapter = adapters[view.adapter]
    info = adapter.facts.tensors[view.key]
    first, last = rows or (0, view.shape[0])
    shape = (last - first, *view.shape[1:])
    low = view.offset + first * view.strides[0]
    high = low + sum((n - 1) * step for n, step in zip(shape, view.strides, strict=True)) + 1
    width = itemsize(info.dtype)
    words = np.frombuffer(adapter.files.read(info, low * width, high * width), f"u{width}")
    steps = tuple(step * width for step in view.strides)
    gathered = np.ascontiguousarray(np.lib.stride_tricks.as_strided(words, shape, steps, writeable=False))
    return as_numpy(gathered.reshape(-1).view(np.uint8).data, info.dtype).reshape(shape)


def operation_facts(operation: Operation, adapters: Sequence[Adapter]) -> OperationFacts:
    """The norm of an operation's delta, from its factors alone."""
    import numpy as np

    if operation.formula == "bias":
        delta = (
            np.asarray(factor_array(operation.factors["delta"], adapters), np.float64) * operation.numbers["scaling"]
        )
        return _facts(float(np.sqrt((delta * delta).sum())))
    if operation.formula != "lora":
        return OperationFacts(None, zero=False)
    left = _gram(operation.factors["left"].t, adapters)
    right = _gram(operation.factors["right"], adapters)
    squared = float((left * right).sum())
    return _facts(abs(operation.numbers["scaling"]) * math.sqrt(max(squared, 0.0)))


def _facts(norm: float) -> OperationFacts:
    return OperationFacts(norm, zero=norm == 0)


def _gram(wide: FactorView, adapters: Sequence[Adapter]) -> NDArray[Any]:
    """`F @ F.T` in float64 of a factor F (rank, long), piece by piece along the long axis: ||B A||^2 is the sum of the
    elementwise product of the two factors' Gram matrices."""
    import numpy as np

    rank, length = wide.shape
    total: NDArray[Any] = np.zeros((rank, rank))
    step = max(1, PIECE // rank)
    for start in range(0, length, step):
        size, offset = min(step, length - start), wide.offset + start * wide.strides[1]
        piece = replace(wide, shape=(rank, size), offset=offset)
        if wide.strides[1] == 1:
            values = np.asarray(factor_array(piece, adapters), np.float64)
        else:  # gathered as it lies in the file: transposing it there would take longer than the product
            values = np.asarray(factor_array(piece.t, adapters), np.float64).T
        total += values @ values.T
    adapter = adapters[wide.adapter]
    info = adapter.facts.tensors[wide.key]
    adapter.files.give_back(info, 0, info.nbytes)
    return total


def same_values(a: FactorView, b: FactorView, adapters: Sequence[Adapter]) -> bool:
    """Whether two factors hold the same numbers."""
    import numpy as np

    if a.shape != b.shape:
        return False
    step = max(1, PIECE // max(1, math.prod(a.shape[1:])))
    return all(
        np.array_equal(factor_array(a, adapters, (start, end)), factor_array(b, adapters, (start, end)))
        for start in range(0, a.shape[0], step)
        for end in [min(start + step, a.shape[0])]
    )


def same_tensor(a: tuple[Adapter, TensorInfo], b: tuple[Adapter, TensorInfo]) -> bool:
    """Whether two adapter tensors are the same bytes under the same dtype and shape."""
    (source_a, info_a), (source_b, info_b) = a, b
    if (info_a.dtype, info_a.shape) != (info_b.dtype, info_b.shape):
        return False
    return all(
        source_a.files.read(info_a, start, end) == source_b.files.read(info_b, start, end)
        for start in range(0, info_a.nbytes, 4 * PIECE)
        for end in [min(start + 4 * PIECE, info_a.nbytes)]
    )
