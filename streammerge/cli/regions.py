"""Places as words: which rows and columns of which tensors in which files, in as few lines as say it.

A module may change hundreds of stored tensors that differ in one number; they are one line here. The invariant: what
is shortened is counted, and every name is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

from streammerge.core.lines import Lines
from streammerge.core.tensors import Place
from streammerge.core.text import printable
from streammerge.planning.adapted import Target

ALTERNATIVES = 6
"""How many differing segments are spelled out in braces."""
NAMED = 4
"""How many tensors are listed that no pattern holds together."""


def lines_text(lines: Lines, total: int, noun: str) -> str:
    """`lines` of a matrix that has `total` of them: `rows 0..63 of every 192`; empty for all of them."""
    if lines.total == total:
        return ""
    last = lines.start + (lines.size - 1) * lines.step
    single = lines.size == 1
    text = f"{noun} {lines.start:,}" if single else f"{noun}s {lines.start:,}..{last:,}"
    if lines.step > 1:
        text += f" in steps of {lines.step:,}"
    if lines.count == 1:
        return text
    text += f" of every {lines.pitch:,}"
    to_the_end = last < lines.pitch and last + lines.count * lines.pitch >= total
    return text if to_the_end else f"{text}, {lines.count:,} times"


def region_text(place: Place, indices: Sequence[int] = ()) -> str:
    """Which part of its matrix a place is: `rows 0..63, transposed`; empty for all of it as it is."""
    rows = lines_text(place.rows, place.view.rows, "row")
    if indices:
        more = len(indices) - ALTERNATIVES
        rows = f"row{'s' if len(indices) > 1 else ''} {', '.join(f'{n:,}' for n in indices[:ALTERNATIVES])}"
        rows += f" and {more:,} more" if more > 0 else ""
    cols = lines_text(place.cols, place.view.cols, "column")
    return ", ".join(filter(None, (rows, cols, "transposed" if place.transposed else "")))


def targets_text(targets: Iterable[Target], *, every: bool = False) -> list[str]:
    """The targets of a module: one line for all tensors with the same region whose names make a pattern; `every` lists
    the names that make none, however many."""
    matrices: dict[tuple[str, str | None, str], list[int]] = {}
    stacks: dict[str, int] = {}
    for target in targets:
        place = target.place
        stacks[place.tensor] = place.view.stack
        origin = f"made of {printable(target.origin)}" if target.origin else ""
        where = place.tensor, target.file, ", ".join(filter(None, (region_text(place, target.indices), origin)))
        matrices.setdefault(where, []).append(place.matrix)
    same: dict[str, dict[str, str | None]] = {}
    for (tensor, file, inside), numbers in matrices.items():
        experts = _experts(sorted(set(numbers))) if stacks[tensor] > 1 else ""
        same.setdefault(", ".join(filter(None, (experts, inside))), {})[tensor] = file
    return [line for region, files in same.items() for line in _region_lines(region, files, every=every)]


def _region_lines(region: str, files: dict[str, str | None], *, every: bool) -> list[str]:
    names = list(files)
    pattern = pattern_of(names)
    if pattern is None:
        shown = names if every else names[:NAMED]
        lines = [_line(printable(name), region, [files[name]]) for name in shown]
        more = len(names) - len(shown)
        return [*lines, f"... {more:,} more tensors, all of them with -v"] if more else lines
    head = pattern if len(names) == 1 else f"{len(names):,} tensors: {pattern}"
    return [_line(head, region, list(files.values()))]


def _line(head: str, region: str, files: Sequence[str | None]) -> str:
    found = list(dict.fromkeys(printable(file) for file in files if file is not None))
    where = f"{len(found):,} files" if len(found) > 2 else " and ".join(found)
    text = f"{head}, {region}," if region else head
    return f"{text} in {where}" if found else f"{text} (new)"


def pattern_of(names: Sequence[str]) -> str | None:
    """Names as one, with braces where their segments differ: `layers.{0..3}.{w1,w3}.weight`. None where the pattern
    would stand for other names too."""
    split = [name.split(".") for name in names]
    if len({len(segments) for segments in split}) != 1:
        return None
    choices = [list(dict.fromkeys(column)) for column in zip(*split, strict=True)]
    if prod(map(len, choices)) != len(set(names)):
        return None
    return ".".join(_alternatives(choice) for choice in choices)


def _alternatives(choices: Sequence[str]) -> str:
    if len(choices) == 1:
        return printable(choices[0])
    if all(choice.isdecimal() for choice in choices):
        numbers = sorted(map(int, choices))
        if numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2:
            return f"{{{numbers[0]}..{numbers[-1]}}}"
        choices = [str(number) for number in numbers]
    safe = [printable(choice) for choice in choices]
    if len(safe) > ALTERNATIVES:
        safe = [*safe[: ALTERNATIVES - 2], "..", safe[-1]]
    return f"{{{','.join(safe)}}}"


def _experts(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"expert {numbers[0]:,}"
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"experts {numbers[0]:,}..{numbers[-1]:,}"
    return f"{len(numbers):,} experts from {numbers[0]:,} to {numbers[-1]:,}"
