"""Lines are what a loop over their lines would say, and every correspondence of lines comes back from its pairings."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.core.lines import Lines, all_lines, pairings


@st.composite
def lines(draw: st.DrawFn) -> Lines:
    """Any lines with a few runs."""
    size, step, count = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    pitch = (size - 1) * step + draw(st.integers(1, 7))
    return Lines(draw(st.integers(0, 9)), size, step, count, pitch if count > 1 else 0)


def listed(value: Lines) -> list[int]:
    """Every line, by the definition."""
    runs = (value.start + run * value.pitch for run in range(value.count))
    return [first + value.step * number for first in runs for number in range(value.size)]


@given(lines())
def test_lines_ascend_and_are_those_of_the_definition(value: Lines) -> None:
    found = listed(value)
    assert found == sorted(set(found))
    assert value.array().tolist() == found
    assert [value.line(position) for position in range(value.total)] == found
    assert (value.total, value.end) == (len(found), found[-1] + 1)
    assert value.adjacent is (value.count == 1 and found == list(range(found[0], found[-1] + 1)))


@given(st.integers(0, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 4))
def test_equal_lines_are_equal_values(start: int, size: int, step: int, count: int, gap: int) -> None:
    value = Lines(start, size, step, count, (size - 1) * step + 1 + gap)
    found = listed(value)
    steps = {b - a for a, b in pairwise(found)}
    if len(steps) <= 1:
        assert value == Lines(start, len(found), min(steps, default=1))
    assert hash(value) == hash(Lines(value.start, value.size, value.step, value.count, value.pitch))


@pytest.mark.parametrize(
    ("start", "size", "step", "count", "pitch"),
    [(-1, 1, 1, 1, 0), (0, 0, 1, 1, 0), (0, 1, 0, 1, 0), (0, 1, 1, 0, 0), (0, 3, 2, 2, 4), (0, 2, 1, 2, 0)],
)
def test_lines_that_do_not_ascend_cannot_be_made(start: int, size: int, step: int, count: int, pitch: int) -> None:
    with pytest.raises(ValueError, match="does not ascend"):
        Lines(start, size, step, count, pitch)


@given(lines(), st.integers(0, 60), st.integers(0, 60))
def test_within_gives_the_positions_of_the_lines_of_a_stretch(value: Lines, first: int, last: int) -> None:
    found = listed(value)
    begin, end = value.within(first, max(first, last))
    assert found[begin:end] == [line for line in found if first <= line < last]
    assert value.before(first) == sum(line < first for line in found)


@given(lines(), st.data())
def test_runs_are_the_lines_between_two_positions(value: Lines, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, value.total))
    last = data.draw(st.integers(first, value.total))
    runs = list(value.runs(first, last))
    assert [line + value.step * n for line, count in runs for n in range(count)] == listed(value)[first:last]
    assert len(runs) <= value.count


@given(lines(), st.integers(0, 9))
def test_shifted_lines_lie_further_down(value: Lines, offset: int) -> None:
    assert listed(value.shifted(offset)) == [line + offset for line in listed(value)]


def test_all_lines_are_one_run() -> None:
    assert all_lines(7) == Lines(0, 7)
    assert all_lines(7).adjacent


def as_pairs(found: list[tuple[Lines, Lines]]) -> list[tuple[int, int]]:
    for ours, theirs in found:
        assert ours.total == theirs.total
    return sorted(pair for ours, theirs in found for pair in zip(listed(ours), listed(theirs), strict=True))


@given(st.permutations(range(12)), st.permutations(range(20)), st.integers(0, 12))
def test_pairings_are_the_correspondence_they_were_made_of(here: list[int], there: list[int], count: int) -> None:
    ours, theirs = np.array(here[:count], np.int64), np.array(there[:count], np.int64)
    assert as_pairs(pairings(ours, theirs)) == sorted(zip(ours.tolist(), theirs.tolist(), strict=True))


@given(lines(), lines())
def test_pairings_of_two_regular_lines_are_complete(first: Lines, second: Lines) -> None:
    count = min(first.total, second.total)
    ours, theirs = listed(first)[:count], listed(second)[:count]
    found = as_pairs(pairings(np.array(ours), np.array(theirs)))
    assert found == sorted(zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("heads", "size"), [(1, 8), (2, 8), (4, 16), (32, 128)])
def test_the_permutation_of_a_rotary_embedding_is_two_pairings(heads: int, size: int) -> None:
    total = heads * size
    sources = np.arange(total).reshape(heads, size // 2, 2).swapaxes(1, 2).reshape(-1)
    assert len(pairings(np.arange(total), sources)) == 2


def test_lines_that_run_backwards_are_pairings_of_one_line() -> None:
    found = pairings(np.arange(5), np.arange(5)[::-1])
    assert as_pairs(found) == [(n, 4 - n) for n in range(5)]
    assert len(found) == 5
