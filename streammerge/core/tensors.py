"""The nouns of a merge: stored tensors, places in them, factors, and what becomes of each output tensor.

Everything here is a frozen value without data: it can be printed, compared, serialised and checked before a weight is
read. Matrices are described in *stored orientation*: `rows` and `cols` are those of the tensor on disk, whichever way
the module's weight lies in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product

from streammerge.core.lines import Lines, all_lines


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor: where its bytes are. `file` is a name inside the checkpoint, `start` an absolute byte offset
    in that file. `strides` (in elements) is given only where the bytes are not in row-major order; `start` is then the
    offset of the element at index zero."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int
    strides: tuple[int, ...] | None = None

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class MatrixView:
    """A stored tensor seen as `stack` matrices of `rows` x `cols`, row-major: a Linear weight is (1, out, in), stacked
    experts are (E, rows, cols), a convolution is (1, out, in x kernel), a vector is (1, n, 1)."""

    stack: int
    rows: int
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of one matrix."""
        return self.rows, self.cols

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def of(cls, shape: tuple[int, ...], *, stacked: bool = False) -> MatrixView:
        """The view of a tensor of `shape`; `stacked` for experts, whose first axis counts matrices."""
        if stacked:
            stack, rows, *rest = shape
            return cls(stack, rows, math.prod(rest))
        return cls(1, shape[0] if shape else 1, math.prod(shape[1:]))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's weight, or a part of it, lies: rows and columns of matrix `matrix` of the stored tensor's
    `view`, and whether the module's (out, in) weight is stored there as (in, out).

    Raises ValueError where the region is not inside the view, so that an illegal place cannot exist.
    """

    tensor: str
    view: MatrixView
    matrix: int
    rows: Lines
    cols: Lines
    transposed: bool = False

    def __post_init__(self) -> None:
        inside = 0 <= self.matrix < self.view.stack
        if not (inside and self.rows.end <= self.view.rows and self.cols.end <= self.view.cols):
            raise ValueError(f"{self} lies outside its tensor")

    @classmethod
    def whole(cls, info: TensorInfo, *, transposed: bool = False) -> Place:
        """All of `info` as one matrix."""
        view = MatrixView.of(info.shape)
        return cls(info.name, view, 0, all_lines(view.rows), all_lines(view.cols), transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.rows.total, self.cols.total


@dataclass(frozen=True, slots=True)
class FactorBlock:
    """A block of a factor that one strided read yields: its first element's position in the tensor, shape and strides
    in elements, and where it goes in the array of all that was asked for."""

    low: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    where: tuple[slice, ...]

    @property
    def high(self) -> int:
        """One more than the position of the last element."""
        return self.low + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True)) + 1


BASE = -1
"""In the place of an adapter's number: the tensor is one of the base's, as it is before any operation."""


@dataclass(frozen=True, slots=True)
class FactorView:
    """A vector or matrix inside one tensor of adapter number `adapter`, or of the `BASE`. `axes` are lines in units of
    elements: an element's position in the tensor of `count` elements is the sum of its axes' lines. Transposing,
    slicing out an expert, taking the rows of one part of a fused projection and flattening a kernel are all this one
    thing.

    Raises ValueError where the view reaches beyond the tensor.
    """

    adapter: int
    key: str
    dtype: str
    count: int
    axes: tuple[Lines, ...]

    def __post_init__(self) -> None:
        last = 0
        for axis in self.axes:
            last += axis.end - 1
        if last >= self.count:
            raise ValueError(f"{self} reaches beyond its tensor")

    @classmethod
    def matrix(cls, adapter: int, info: TensorInfo, rows: int, cols: int) -> FactorView:
        """All of `info`, which must have rows x cols elements, as a row-major matrix."""
        return cls(adapter, info.name, info.dtype, info.count, (Lines(0, rows, cols), Lines(0, cols)))

    @classmethod
    def vector(cls, adapter: int, info: TensorInfo) -> FactorView:
        """All of `info` as a vector."""
        return cls(adapter, info.name, info.dtype, info.count, (all_lines(info.count),))

    @property
    def shape(self) -> tuple[int, ...]:
        """How many elements along each axis."""
        return tuple(axis.total for axis in self.axes)

    @property
    def t(self) -> FactorView:
        """The transposed matrix."""
        return FactorView(self.adapter, self.key, self.dtype, self.count, self.axes[::-1])

    def blocks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[FactorBlock]:
        """The evenly strided blocks that positions `ranges`, one half-open range for each axis, consist of."""
        for runs in product(*(_placed(axis, *wanted) for axis, wanted in zip(self.axes, ranges, strict=True))):
            low, where = sum(line for line, _ in runs), tuple(positions for _, positions in runs)
            shape = tuple(positions.stop - positions.start for positions in where)
            yield FactorBlock(low, shape, tuple(axis.step for axis in self.axes), where)

    def cut(self, axis: int, lines: Lines) -> FactorView:
        """The view of some lines of an axis, which must not have been cut into several runs before."""
        uncut = self.axes[axis]
        if lines.size == uncut.total:  # lines are different ones: these are all
            return self
        if uncut.count > 1:
            raise ValueError(f"{self} is cut along axis {axis} already")
        start, step, pitch = uncut.start + uncut.step * lines.start, uncut.step * lines.step, uncut.step * lines.pitch
        part = Lines(start, lines.size, step, lines.count, pitch)
        axes = (*self.axes[:axis], part, *self.axes[axis + 1 :])
        return FactorView(self.adapter, self.key, self.dtype, self.count, axes)


def _placed(axis: Lines, first: int, last: int) -> list[tuple[int, slice]]:
    """The runs of an axis between two positions: where each starts, and its positions among those asked for."""
    found, at = [], 0
    for line, length in axis.runs(first, last):
        found.append((line, slice(at, at + length)))
        at += length
    return found


@dataclass(frozen=True, slots=True)
class Operation:
    """One formula applied to one place. `formula` names a row of `methods.FORMULAS`; `factors` and `numbers` are what
    that formula reads, `indices` the rows of the place it is about, where it is not about all, `rounding` the dtype of
    a rounding of its own. `module` and `rule` say which adapter module this is and how its name was resolved,
    `parameter` is the adapted parameter's name in the model, `part` says that the place holds a part of it only.
    `window` is given for formulas that cannot cut their factors: the outputs and the inputs of the parameter's matrix,
    in the order in which the place holds them.
    """

    formula: str
    place: Place
    adapter: int
    module: str
    rule: str
    factors: Mapping[str, FactorView]
    numbers: Mapping[str, float] = field(default_factory=dict)
    indices: tuple[int, ...] = ()
    rounding: str = ""
    parameter: str = ""
    part: bool = False
    window: tuple[Lines, Lines] | None = None


@dataclass(frozen=True, slots=True)
class Stored:
    """The source of an output tensor: a tensor of the base."""

    name: str


@dataclass(frozen=True, slots=True)
class Replacement:
    """The source of an output tensor: a full tensor of an adapter. `module`, `rule` and `parameter` are those of
    `Operation`; here the adapter's name of the tensor stands for the module."""

    adapter: int
    key: str
    module: str = ""
    rule: str = ""
    parameter: str = ""


Source = Stored | Replacement


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """The recipe of one tensor of the output: its source, then its operations in order, then one rounding."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source
    operations: tuple[Operation, ...] = ()
