"""Rows or columns of a matrix as a value: equal runs at equal distances, which is what every fused layout cuts out.

A part of a fused projection, every second row of an interleaved one, the rows of one kind of all heads: each is one
`Lines`. The invariant: lines ascend, so that those inside a stretch of the matrix are neighbours in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Lines:
    """`count` runs of `size` lines each: run g starts at `start + g * pitch`, its lines are `step` apart. Of two ways
    to say the same lines the one with fewer runs is taken, so that equal lines are equal values.

    Raises ValueError where lines would not ascend, so that an illegal value cannot exist.
    """

    start: int
    size: int
    step: int = 1
    count: int = 1
    pitch: int = 0

    def __post_init__(self) -> None:
        reach = (self.size - 1) * self.step
        ascends = self.count == 1 or (self.count > 1 and self.pitch > reach)
        if self.start < 0 or self.size < 1 or self.step < 1 or not ascends:
            raise ValueError(f"{self} does not ascend")
        if self.count == 1:
            if self.pitch or (self.size == 1 and self.step > 1):
                self._say(self.size, self.step if self.size > 1 else 1)
        elif self.size == 1:
            self._say(self.count, self.pitch)
        elif self.pitch == self.size * self.step:
            self._say(self.total, self.step)

    def _say(self, size: int, step: int) -> None:
        for name, value in (("size", size), ("step", step), ("count", 1), ("pitch", 0)):
            object.__setattr__(self, name, value)

    @property
    def total(self) -> int:
        """How many lines."""
        return self.size * self.count

    @property
    def end(self) -> int:
        """One more than the last line."""
        return self.start + (self.count - 1) * self.pitch + (self.size - 1) * self.step + 1

    @property
    def adjacent(self) -> bool:
        """Whether there is nothing between the lines."""
        return self.count == self.step == 1

    def line(self, position: int) -> int:
        """The line at a position, 0 <= position < total."""
        run, rest = divmod(position, self.size)
        return self.start + run * self.pitch + rest * self.step

    def before(self, line: int) -> int:
        """How many of these lines come before `line` of the matrix."""
        run = 0 if self.count == 1 else min(max((line - self.start) // self.pitch, 0), self.count - 1)
        into = line - self.start - run * self.pitch
        return run * self.size + min(max(-(-into // self.step), 0), self.size)

    def within(self, first: int, last: int) -> tuple[int, int]:
        """The positions, half-open, of the lines in [first, last) of the matrix; an empty range if there are none."""
        return self.before(first), self.before(last)

    def runs(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(line, how many) of the runs, `step` apart inside, that positions [first, last) consist of."""
        while first < last:
            run, rest = divmod(first, self.size)
            length = min(self.size - rest, last - first)
            yield self.start + run * self.pitch + rest * self.step, length
            first += length

    def shifted(self, offset: int) -> Lines:
        """The same lines of a matrix that has `offset` more in front."""
        return Lines(self.start + offset, self.size, self.step, self.count, self.pitch)

    def array(self) -> NDArray[Any]:
        """All lines, int64, in order."""
        import numpy as np

        runs = self.start + self.pitch * np.arange(self.count, dtype=np.int64)
        return (runs[:, None] + self.step * np.arange(self.size, dtype=np.int64)).reshape(-1)


Pairing = tuple[Lines, Lines]
"""Lines here and, in the same order, the lines there that hold the same values."""


def all_lines(total: int) -> Lines:
    """Every line of a matrix that has `total` of them."""
    return Lines(0, total)


def pairings(here: NDArray[Any], there: NDArray[Any]) -> list[Pairing]:
    """The few pairings that a correspondence of lines consists of: `here[i]` holds what `there[i]` does.

    Runs of constant step are found first, along one side or the other, whichever has fewer; then runs of one shape at
    equal distances become one value.
    """
    return _grouped(min((_runs(here, there, by) for by in (there, here)), key=len))


Run = tuple[int, int, int, int, int]
"""Size, step here, step there, start here, start there."""


def _runs(here: NDArray[Any], there: NDArray[Any], by: NDArray[Any]) -> list[Run]:
    """Maximal runs with one positive step on both sides, in the order of `by`."""
    import numpy as np

    order = np.argsort(by, kind="stable")
    ours, theirs = here[order].tolist(), there[order].tolist()
    found: list[Run] = []
    first, total = 0, len(ours)
    while first < total:
        last = first + 1
        steps = (1, 1)
        if last < total and ours[last] > ours[first] and theirs[last] > theirs[first]:
            steps = ours[last] - ours[first], theirs[last] - theirs[first]
            while last < total and (ours[last] - ours[last - 1], theirs[last] - theirs[last - 1]) == steps:
                last += 1
        found.append((last - first, *steps, ours[first], theirs[first]))
        first = last
    return found


def _grouped(runs: list[Run]) -> list[Pairing]:
    """Runs of one shape at equal distances, both sides ascending, as one pairing each."""
    left = dict.fromkeys(sorted(runs, key=lambda run: run[4]))
    result: list[Pairing] = []
    while left:
        first = next(iter(left))
        size, step, other_step, start, other = first
        shape = first[:3]
        near = (run for run in left if run[:3] == shape and _apart(first, run))
        members = [first]
        if (second := next(near, None)) is not None:
            pitches = second[3] - start, second[4] - other
            following = second
            while following in left:
                members.append(following)
                following = (*shape, following[3] + pitches[0], following[4] + pitches[1])
        for member in members:
            del left[member]
        count = len(members)
        pitch, other_pitch = (members[1][3] - start, members[1][4] - other) if count > 1 else (0, 0)
        result.append((Lines(start, size, step, count, pitch), Lines(other, size, other_step, count, other_pitch)))
    return result


def _apart(first: Run, second: Run) -> bool:
    """Whether a run starts behind the end of another, on both sides."""
    size, step, other_step, start, other = first
    return second[3] - start > (size - 1) * step and second[4] - other > (size - 1) * other_step
