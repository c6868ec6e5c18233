"""Places as words: what is shortened stands for exactly what it is short for, and names cannot act on a terminal."""

from __future__ import annotations

import pytest

from streammerge.cli.regions import lines_text, pattern_of, region_text, targets_text
from streammerge.core.lines import Lines, all_lines
from streammerge.core.tensors import MatrixView, Place
from streammerge.planning.adapted import Target


def place(
    tensor: str = "w",
    rows: Lines | None = None,
    cols: Lines | None = None,
    *,
    stack: int = 1,
    matrix: int = 0,
    transposed: bool = False,
) -> Place:
    return Place(tensor, MatrixView(stack, 384, 8), matrix, rows or all_lines(384), cols or all_lines(8), transposed)


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        (all_lines(384), ""),
        (Lines(64, 64), "rows 64..127"),
        (Lines(7, 1), "row 7"),
        (Lines(1, 192, step=2), "rows 1..383 in steps of 2"),
        (Lines(0, 64, count=2, pitch=192), "rows 0..63 of every 192"),
        (Lines(128, 64, count=2, pitch=192), "rows 128..191 of every 192"),
        (Lines(0, 4, step=2, count=12, pitch=32), "rows 0..6 in steps of 2 of every 32"),
        # Runs that begin later or end before the matrix does are counted.
        (Lines(0, 16, count=4, pitch=32), "rows 0..15 of every 32, 4 times"),
        (Lines(256, 16, count=4, pitch=32), "rows 256..271 of every 32, 4 times"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_lines_are_named_by_their_first_run_and_its_distance(lines: Lines, text: str) -> None:
    assert lines_text(lines, 384, "row") == text


def test_large_numbers_are_grouped() -> None:
    assert lines_text(Lines(1_000, 9_000), 20_000, "column") == "columns 1,000..9,999"


def test_a_region_names_rows_columns_and_orientation_and_nothing_that_is_whole() -> None:
    assert region_text(place()) == ""
    assert region_text(place(transposed=True)) == "transposed"
    assert region_text(place(rows=Lines(0, 64, count=2, pitch=192))) == "rows 0..63 of every 192"
    found = place(rows=Lines(0, 192), cols=Lines(4, 4), stack=8, matrix=3, transposed=True)
    assert region_text(found) == "rows 0..191, columns 4..7, transposed"
    assert region_text(place(), (5,)) == "row 5"
    assert region_text(place(), tuple(range(0, 20, 2))) == "rows 0, 2, 4, 6, 8, 10 and 4 more"


def test_a_pattern_stands_for_the_names_and_no_others() -> None:
    assert pattern_of(["a.b"]) == "a.b"
    experts = [f"l.{layer}.e.{e}.{w}.weight" for layer in range(2) for e in range(128) for w in ("w1", "w3")]
    assert pattern_of(experts) == "l.{0,1}.e.{0..127}.{w1,w3}.weight"
    assert pattern_of(experts[:-1]) is None
    assert pattern_of(["a.b", "a.b.c"]) is None
    assert pattern_of(["e.10.w", "e.2.w", "e.6.w"]) == "e.{2,6,10}.w"
    assert pattern_of([f"e.{n}.w" for n in range(0, 20, 2)]) == "e.{0,2,4,6,..,18}.w"
    assert pattern_of(["a.x\u202e.w", "a.y.w"]) == "a.{x\\u202e,y}.w"


def test_tensors_with_one_region_are_one_line_and_others_another() -> None:
    targets = [
        Target(place(f"e.{e}.{w}", transposed=w == "w2"), f"model-{e // 2}.safetensors")
        for e in range(4)
        for w in ("w1", "w2", "w3")
    ]
    assert targets_text(targets) == [
        "8 tensors: e.{0..3}.{w1,w3} in model-0.safetensors and model-1.safetensors",
        "4 tensors: e.{0..3}.w2, transposed, in model-0.safetensors and model-1.safetensors",
    ]
    many = [Target(place(f"e.{e}.w"), f"model-{e}.safetensors") for e in range(4)]
    assert targets_text(many) == ["4 tensors: e.{0..3}.w in 4 files"]


def test_experts_of_one_stack_are_one_line() -> None:
    targets = [Target(place("stack", stack=8, matrix=e), "f") for e in range(8)]
    assert targets_text(targets) == ["stack, experts 0..7, in f"]
    assert targets_text(targets[3:4]) == ["stack, expert 3, in f"]
    assert targets_text(targets[::3]) == ["stack, 3 experts from 0 to 6, in f"]


def test_tensors_without_a_pattern_are_listed_and_the_rest_is_counted() -> None:
    targets = [Target(place(f"{name}.{name}"), None) for name in "abcdef"]
    assert targets_text(targets) == [
        *(f"{name}.{name} (new)" for name in "abcd"),
        "... 2 more tensors, all of them with -v",
    ]
    assert targets_text(targets, every=True) == [f"{name}.{name} (new)" for name in "abcdef"]
