"""The nouns of a merge: stored tensors, places in them, factors, and what becomes of each output tensor.

Everything here is a frozen value without data: it can be printed, compared, serialised and checked before a weight is
read. Matrices are described in *stored orientation*: `rows` and `cols` are those of the tensor on disk, whichever way
the module's weight lies in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


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

    @classmethod
    def of(cls, shape: tuple[int, ...], *, stacked: bool = False) -> MatrixView:
        """The view of a tensor of `shape`; `stacked` for experts, whose first axis counts matrices."""
        if stacked:
            stack, rows, *rest = shape
            return cls(stack, rows, math.prod(rest))
        return cls(1, shape[0] if shape else 1, math.prod(shape[1:]))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's weight lies: matrix `matrix` of the stored tensor's `view`, rows and columns half-open, and
    whether the module's (out, in) weight is stored there as (in, out).

    Raises ValueError where the region is not inside the view, so that an illegal place cannot exist.
    """

    tensor: str
    view: MatrixView
    matrix: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    transposed: bool = False

    def __post_init__(self) -> None:
        inside = (
            0 <= self.matrix < self.view.stack
            and 0 <= self.rows[0] < self.rows[1] <= self.view.rows
            and 0 <= self.cols[0] < self.cols[1] <= self.view.cols
        )
        if not inside:
            raise ValueError(f"{self} lies outside its tensor")

    @classmethod
    def whole(cls, info: TensorInfo, *, transposed: bool = False) -> Place:
        """All of `info` as one matrix."""
        view = MatrixView.of(info.shape)
        return cls(info.name, view, 0, (0, view.rows), (0, view.cols), transposed)

    @classmethod
    def expert(cls, info: TensorInfo, matrix: int, *, transposed: bool = False) -> Place:
        """One matrix of a stack of experts."""
        view = MatrixView.of(info.shape, stacked=True)
        return cls(info.name, view, matrix, (0, view.rows), (0, view.cols), transposed)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the region."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]


@dataclass(frozen=True, slots=True)
class FactorView:
    """A vector or matrix inside one adapter tensor, as a strided view of its elements: shape, strides and offset in
    elements. Transposing, slicing out an expert and flattening a kernel are all this one thing.

    Raises ValueError where the view reaches beyond the tensor of `count` elements.
    """

    adapter: int
    key: str
    dtype: str
    count: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        reach = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        if min(self.shape, default=1) < 1 or self.offset < 0 or min(self.strides, default=1) < 0 or reach >= self.count:
            raise ValueError(f"{self} reaches beyond its tensor")

    @classmethod
    def matrix(cls, adapter: int, info: TensorInfo, rows: int, cols: int) -> FactorView:
        """All of `info`, which must have rows x cols elements, as a row-major matrix."""
        return cls(adapter, info.name, info.dtype, info.count, (rows, cols), (cols, 1))

    @classmethod
    def vector(cls, adapter: int, info: TensorInfo) -> FactorView:
        """All of `info` as a vector."""
        return cls(adapter, info.name, info.dtype, info.count, (info.count,), (1,))

    @property
    def t(self) -> FactorView:
        """The transposed matrix."""
        return FactorView(
            self.adapter, self.key, self.dtype, self.count, self.shape[::-1], self.strides[::-1], self.offset
        )


@dataclass(frozen=True, slots=True)
class Operation:
    """One formula applied to one place. `formula` names a row of `methods.FORMULAS`; `factors` and `numbers` are what
    that formula reads, `indices` the rows of the place it is about, where it is not about all, `rounding` the dtype of
    a rounding of its own. `module` and `rule` say which adapter module this is and how its name was resolved."""

    formula: str
    place: Place
    adapter: int
    module: str
    rule: str
    factors: Mapping[str, FactorView]
    numbers: Mapping[str, float] = field(default_factory=dict)
    indices: tuple[int, ...] = ()
    rounding: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """The source of an output tensor: a tensor of the base."""

    name: str


@dataclass(frozen=True, slots=True)
class Replacement:
    """The source of an output tensor: a full tensor of an adapter."""

    adapter: int
    key: str


Source = Stored | Replacement


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """The recipe of one tensor of the output: its source, then its operations in order, then one rounding."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: Source
    operations: tuple[Operation, ...] = ()
