"""How a model's parameter lies in stored tensors: piece by piece, axis by axis.

transformers renames, stacks, joins, splits, transposes and permutes between disk and model. Whatever it did, a
parameter is in the end a set of pieces, each a region of the parameter that is a region of one stored tensor; so is a
tensor of another spelling, and the two are joined where they meet. The invariant: pieces never overlap, and an element
of a parameter is in at most one of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from streammerge.core.lines import Lines, Pairing, all_lines, pairings
from streammerge.core.tensors import MatrixView, Place, TensorInfo

Sizes = tuple[int | None, ...]
"""A shape as far as it is known."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a parameter in a piece: the parameter's lines `here`, and the same elements' lines `there` along axis
    `of` of the stored tensor; `of` is None where the stored tensor has no such axis, one expert of a stack."""

    of: int | None
    here: Lines
    there: Lines


ONE = Axis(None, Lines(0, 1), Lines(0, 1))


@dataclass(frozen=True, slots=True)
class Piece:
    """A region of a parameter inside the stored `tensor` of `shape`: one `Axis` for each of the parameter's axes, and
    the stored axes that only one line is taken of, as (axis, line)."""

    tensor: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    fixed: tuple[tuple[int, int], ...] = ()

    @classmethod
    def whole(cls, tensor: str, shape: tuple[int, ...]) -> Piece:
        """All of a tensor, as it is."""
        return cls(tensor, shape, _whole_axes(shape))

    @property
    def count(self) -> int:
        """How many elements."""
        return math.prod(axis.here.total for axis in self.axes)

    def inverted(self, shape: tuple[int, ...], name: str) -> Piece:
        """The same correspondence seen from the stored tensor: where it lies in the parameter `name` of `shape`."""
        axes: dict[int, Axis] = {
            axis.of: Axis(number, axis.there, axis.here) for number, axis in enumerate(self.axes) if axis.of is not None
        }
        axes |= {number: Axis(None, Lines(line, 1), Lines(0, 1)) for number, line in self.fixed}
        fixed = tuple((number, axis.here.start) for number, axis in enumerate(self.axes) if axis.of is None)
        return Piece(name, shape, tuple(axes[number] for number in range(len(self.shape))), fixed)

    def then(self, other: Piece) -> Iterator[Piece]:
        """Where this piece lies in the tensor that `other` is stored in, `other` being a piece of the tensor that this
        one is stored in."""
        fixed = list(other.fixed)
        for number, line in self.fixed:
            axis = other.axes[number]
            first, last = axis.here.within(line, line + 1)
            if first == last:
                return
            if axis.of is not None:
                fixed.append((axis.of, axis.there.line(first)))
        choices: list[list[Axis]] = []
        for mine in self.axes:
            if mine.of is None:
                choices.append([mine])
                continue
            theirs = other.axes[mine.of]
            met = meeting((mine.here, mine.there), (theirs.here, theirs.there))
            choices.append([Axis(theirs.of, here, there) for here, there in met])
        for axes in product(*choices):
            yield Piece(other.tensor, other.shape, axes, tuple(sorted(fixed)))


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of one matrix of a parameter: the stored `place`, which `rows` and `cols` of the parameter's matrix of
    `shape` are there, and whether they are `swapped`, the parameter's rows being stored columns."""

    place: Place
    rows: Lines
    cols: Lines
    shape: tuple[int, int]
    swapped: bool = False

    def turned(self, transposed: bool) -> Place:
        """The place of a weight that lies `transposed`, or not, in the parameter's matrix."""
        return self.place if transposed == self.swapped else replace(self.place, transposed=True)

    @property
    def whole_rows(self) -> bool:
        """Whether every row that is there is there with all of its columns."""
        return self.cols.total == self.shape[1]

    @property
    def whole_cols(self) -> bool:
        """Whether every column that is there is there with all of its rows."""
        return self.rows.total == self.shape[0]


@dataclass(frozen=True, slots=True)
class Parameter:
    """A named tensor of a model, in the model's own orientation, and its `pieces` on disk. `rules` are those of the
    table that fired, as `key[number]`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    rules: tuple[str, ...] = ()

    @classmethod
    def stored_as(cls, info: TensorInfo, name: str | None = None, rules: tuple[str, ...] = ()) -> Parameter:
        """A parameter that is one stored tensor as it is."""
        return cls(name or info.name, info.dtype, info.shape, (Piece.whole(info.name, info.shape),), rules)

    @property
    def tensor(self) -> str | None:
        """The stored tensor that is this parameter, neither more nor less; None if there is none such."""
        first = self.pieces[0]
        return first.tensor if self.pieces == (Piece.whole(first.tensor, self.shape),) else None

    @property
    def complete(self) -> bool:
        """Whether every element is stored somewhere."""
        return sum(piece.count for piece in self.pieces) == math.prod(self.shape)

    def moved(self, tensor: str) -> Parameter:
        """This parameter, stored whole, under another tensor name: the absent side of a tie."""
        return replace(self, pieces=(replace(self.pieces[0], tensor=tensor),))

    def cuts(self, *, stacked: bool) -> list[list[Cut]]:
        """Where each matrix of the parameter is stored: one list, for `stacked` experts one for each of them.

        Raises ValueError where it is stored in a way that is not a region of a matrix.
        """
        view = MatrixView.of(self.shape, stacked=stacked)
        found: list[list[Cut]] = [[] for _ in range(view.stack)]
        for piece in self.pieces:
            if not stacked:
                found[0].append(_cut(piece.axes, dict(piece.fixed), piece, view))
                continue
            stack, *axes = piece.axes
            for position in range(stack.here.total):
                fixed = dict(piece.fixed)
                if stack.of is not None:
                    fixed[stack.of] = stack.there.line(position)
                found[stack.here.line(position)].append(_cut(axes, fixed, piece, view))
        return found


def suits(shape: Sequence[int], sizes: Sizes) -> bool:
    """Whether a shape is the one that is known in part."""
    return len(shape) == len(sizes) and all(want in (None, size) for size, want in zip(shape, sizes, strict=True))


def through(name: str, dtype: str, own: list[Piece], parameters: dict[str, Parameter]) -> Parameter:
    """The tensor `name`, whose pieces lie in parameters, as pieces of what those are stored in."""
    axes = [[axis.here.end for axis in piece.axes] for piece in own]
    shape = tuple(max(ends) for ends in zip(*axes, strict=True))
    pieces = [stored for piece in own for below in parameters[piece.tensor].pieces for stored in piece.then(below)]
    rules = dict.fromkeys(rule for piece in own for rule in parameters[piece.tensor].rules)
    return Parameter(name, dtype, shape, tuple(pieces), tuple(rules))


@functools.lru_cache(maxsize=4096)
def meeting(ours: Pairing, theirs: Pairing) -> tuple[Pairing, ...]:
    """Lines of ours and of theirs that meet: `ours` pairs with a middle, which `theirs` pairs on."""
    import numpy as np

    if ours[1] == theirs[0]:
        return ((ours[0], theirs[1]),)
    middle, first, second = np.intersect1d(ours[1].array(), theirs[0].array(), return_indices=True)
    return tuple(pairings(ours[0].array()[first], theirs[1].array()[second])) if len(middle) else ()


@functools.lru_cache(maxsize=4096)
def _whole_axes(shape: tuple[int, ...]) -> tuple[Axis, ...]:
    return tuple(Axis(number, all_lines(size), all_lines(size)) for number, size in enumerate(shape))


def _cut(axes: Sequence[Axis], fixed: Mapping[int, int], piece: Piece, view: MatrixView) -> Cut:
    """The part of a matrix, whose `axes` these are, that one piece holds."""
    rows, cols = axes[0] if axes else ONE, _columns(axes[1:], view.cols, piece.shape)
    swapped = cols.of is not None and (rows.of is None or rows.of > cols.of)
    outer, inner = (cols, rows) if swapped else (rows, cols)
    if list(fixed) not in ([], [0]) or outer.of not in (None, len(fixed)):
        raise ValueError(f"{piece} is no region of a matrix")
    stored = MatrixView.of(piece.shape, stacked=bool(fixed))
    place = Place(piece.tensor, stored, fixed.get(0, 0), outer.there, inner.there)
    return Cut(place, rows.here, cols.here, (view.rows, view.cols), swapped)


def _columns(axes: Sequence[Axis], total: int, shape: tuple[int, ...]) -> Axis:
    """The axes after the first as the `total` columns of a matrix: none, one, or those of a kernel, which must all be
    there, neither less than the parameter has nor less than the stored tensor of `shape`."""
    if len(axes) < 2:
        return axes[0] if axes else ONE
    every, first = all_lines(total), axes[0].of or 0
    whole = math.prod(axis.here.total for axis in axes) == total == math.prod(shape[first:])
    if not whole or any(axis.here != axis.there or axis.of != first + number for number, axis in enumerate(axes)):
        raise ValueError("a part of a kernel is no region of a matrix")
    return Axis(first, every, every)
