"""Pieces say where every element of a parameter lies: numpy does the same to arrays, and both agree.

Tensors are made from stored arrays by random steps, each done to pieces by an operator and to arrays by numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.core.lines import Lines, all_lines
from streammerge.core.tensors import MatrixView, Place
from streammerge.names.operators import OPERATORS, Part, Setting
from streammerge.names.pieces import ONE, Axis, Cut, Parameter, Piece, meeting, through
from tests.names.rebuilding import ABSENT, Array, matrix_of, rebuilt, stored_part


@dataclass(slots=True)
class Making:
    """Stored arrays, and tensors made of them, as pieces and as arrays."""

    stored: dict[str, Array] = field(default_factory=dict)
    count: int = 0

    def store(self, shape: tuple[int, ...]) -> tuple[Part, Array]:
        """A new stored array, whose values are in no other."""
        name = f"t{len(self.stored)}"
        size = int(np.prod(shape))
        self.stored[name] = np.arange(self.count, self.count + size).reshape(shape)
        self.count += size
        return stored_part(name, self.stored[name]), self.stored[name]


def applied(name: str, parts: dict[str, list[Part]], targets: list[str], **arguments: Any) -> dict[str, list[Part]]:
    config = {"num_attention_heads": arguments.pop("heads", 1)}
    return OPERATORS[name](parts, Setting(tuple(parts), tuple(targets), config), arguments)


def turned(draw: st.DrawFn, part: Part, array: Array) -> tuple[Part, Array]:
    """One step that takes one tensor."""
    axis = draw(st.integers(0, array.ndim - 1))
    size = array.shape[axis]
    kind = draw(st.sampled_from(["Transpose", "Interleave", "Chunk", "PermuteForRope"]))
    if kind == "Transpose":
        found = applied(kind, {"x": [part]}, ["y"], dim0=0, dim1=axis)["y"]
        return found[0], np.swapaxes(array, 0, axis)
    if kind == "Chunk" and size > 1:
        number = draw(st.integers(0, 1))
        found = applied(kind, {"x": [part]}, ["0", "1"], dim=axis)[str(number)]
        return found[0], np.array_split(array, [-(-size // 2)], axis)[number]
    if kind == "Interleave" and size % 2 == 0:
        folded = array.reshape(*array.shape[:axis], size // 2, 2, *array.shape[axis + 1 :])
        found = applied(kind, {"x": [part]}, ["y"], dim=axis)["y"]
        return found[0], np.swapaxes(folded, axis, axis + 1).reshape(array.shape)
    if kind == "PermuteForRope" and array.shape[0] % 4 == 0:
        found = applied(kind, {"x": [part]}, ["y"], heads=2)["y"]
        folded = array.reshape(2, array.shape[0] // 4, 2, -1)
        return found[0], folded.swapaxes(1, 2).reshape(array.shape)
    return part, array


@st.composite
def tensors(draw: st.DrawFn, making: Making | None = None) -> tuple[Making, Part, Array]:
    """A tensor: stored as it is, turned, joined of two or three, or a stack of them."""
    own = making or Making()
    shape = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=2)))
    made = [own.store(shape) for _ in range(draw(st.integers(1, 3)))]
    for number in range(len(made) if draw(st.booleans()) else 0):
        made[number] = turned(draw, *made[number])
    alike = [pair for pair in made if pair[1].shape == made[0][1].shape]
    kind = draw(st.sampled_from(["stacked", "joined", "alone"]))
    part, array = made[0]
    if kind == "stacked":
        (part,) = applied("MergeModulelist", {"x": [pair[0] for pair in alike]}, ["y"])["y"]
        array = np.stack([pair[1] for pair in alike])
    elif kind == "joined":
        axis = draw(st.integers(0, array.ndim - 1))
        (part,) = applied("Concatenate", {"x": [pair[0] for pair in alike]}, ["y"], dim=axis)["y"]
        array = np.concatenate([pair[1] for pair in alike], axis)
    for _ in range(draw(st.integers(0, 3))):
        part, array = turned(draw, part, array)
    return own, part, array


@settings(max_examples=200)
@given(tensors())
def test_pieces_hold_every_element_of_what_numpy_makes(made: tuple[Making, Part, Array]) -> None:
    making, part, array = made
    np.testing.assert_array_equal(rebuilt(part.shape, part.pieces, making.stored), array)
    assert sum(piece.count for piece in part.pieces) == array.size
    assert Parameter("p", "F32", part.shape, part.pieces).complete


@settings(max_examples=100)
@given(tensors())
def test_inverted_pieces_say_where_a_stored_tensor_lies_in_the_parameter(made: tuple[Making, Part, Array]) -> None:
    making, part, array = made
    found: dict[str, list[Piece]] = {}
    for piece in part.pieces:
        found.setdefault(piece.tensor, []).append(piece.inverted(part.shape, "p"))
        assert piece.inverted(part.shape, "p").inverted(piece.shape, piece.tensor) == piece
    for name, pieces in found.items():
        again = rebuilt(making.stored[name].shape, pieces, {"p": array})
        held = np.isin(making.stored[name], array)
        np.testing.assert_array_equal(again, np.where(held, making.stored[name], ABSENT))


@settings(max_examples=100)
@given(tensors(), st.data())
def test_pieces_of_pieces_are_pieces_of_what_is_stored(made: tuple[Making, Part, Array], data: st.DataObject) -> None:
    """What is made of a parameter, which is made of stored tensors, is made of these."""
    making, part, array = made
    inner = Parameter("inner", "F32", part.shape, part.pieces, ("a[0]",))
    outer, expected = stored_part("inner", array), array
    for _ in range(data.draw(st.integers(0, 3))):
        outer, expected = turned(data.draw, outer, expected)
    found = through("outer", "F32", list(outer.pieces), {"inner": inner})
    assert (found.name, found.dtype, found.shape, found.rules) == ("outer", "F32", expected.shape, ("a[0]",))
    np.testing.assert_array_equal(rebuilt(found.shape, found.pieces, making.stored), expected)


def check_cuts(making: Making, part: Part, array: Array) -> None:
    """Cuts of every matrix are that matrix."""
    stacked = array.ndim == 3
    matrices = Parameter("p", "F32", part.shape, part.pieces).cuts(stacked=stacked)
    expected = array if stacked else [array.reshape(len(array), -1)]
    assert len(matrices) == len(expected)
    for cuts, matrix in zip(matrices, expected, strict=True):
        np.testing.assert_array_equal(matrix_of(cuts, making.stored), matrix)


@settings(max_examples=100)
@given(tensors())
def test_cuts_are_the_matrices_or_refused(made: tuple[Making, Part, Array]) -> None:
    try:
        check_cuts(*made)
    except ValueError as error:  # vectors that are stacked, a stack whose first axis is not that of the experts
        assert "no region of a matrix" in str(error) or "outside its tensor" in str(error)  # noqa: PT017


@pytest.mark.parametrize("step", ["none", "Transpose", "Interleave", "PermuteForRope"])
@pytest.mark.parametrize("whole", ["alone", "joined", "joined across", "stacked", "stacked at once"])
def test_every_way_of_storing_matrices_has_cuts(step: str, whole: str) -> None:
    making = Making()
    shape = (3, 8, 8) if whole == "stacked at once" else (8, 8)
    pairs = [making.store(shape) for _ in range(2)]
    arguments: dict[str, Any] = {"Transpose": {"dim0": 0, "dim1": 1}, "PermuteForRope": {"heads": 2}}.get(step, {})
    if whole == "stacked at once":
        ((part, array), _) = pairs
        if step == "Transpose":
            part, array = applied(step, {"x": [part]}, ["y"], dim0=1, dim1=2)["y"][0], array.swapaxes(1, 2)
    else:
        arrays = [pair[1] for pair in pairs]
        if step != "none":
            pairs = [(applied(step, {"x": [own]}, ["y"], **arguments)["y"][0], array) for own, array in pairs]
            arrays = [rebuilt((8, 8), own.pieces, making.stored) for own, _ in pairs]
        parts = {"x": [own for own, _ in pairs]}
        part, array = pairs[0][0], arrays[0]
        if whole == "stacked":
            part, array = applied("MergeModulelist", parts, ["y"])["y"][0], np.stack(arrays)
        elif whole.startswith("joined"):
            axis = int(whole == "joined across")
            part, array = applied("Concatenate", parts, ["y"], dim=axis)["y"][0], np.concatenate(arrays, axis)
    check_cuts(making, part, array)


def test_a_kernel_is_a_matrix_with_all_of_its_columns() -> None:
    array = np.arange(48).reshape(4, 3, 2, 2)
    part = stored_part("k", array)
    chunks = applied("Chunk", {"x": [part]}, ["a", "b"])
    (cuts,) = Parameter("p", "F32", (2, 3, 2, 2), chunks["b"][0].pieces).cuts(stacked=False)
    assert cuts == [
        Cut(Place("k", MatrixView(1, 4, 12), 0, Lines(2, 2), all_lines(12)), all_lines(2), all_lines(12), (2, 12))
    ]
    assert cuts[0].whole_rows
    assert cuts[0].whole_cols


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("half", ["a", "b"])
def test_a_part_of_a_kernel_is_refused(axis: int, half: str) -> None:
    part = stored_part("k", np.arange(64).reshape(4, 4, 4))
    chunk = applied("Chunk", {"x": [part]}, ["a", "b"], dim=axis)[half][0]
    with pytest.raises(ValueError, match="a part of a kernel"):
        Parameter("p", "F32", chunk.shape, chunk.pieces).cuts(stacked=False)


def test_a_matrix_whose_columns_are_the_first_axis_is_swapped() -> None:
    array = np.arange(6).reshape(2, 3)
    part = applied("Transpose", {"x": [stored_part("t", array)]}, ["y"])["y"][0]
    ((cut,),) = Parameter("p", "F32", (3, 2), part.pieces).cuts(stacked=False)
    assert (cut.swapped, cut.place.rows, cut.place.cols) == (True, all_lines(2), all_lines(3))
    assert (cut.rows, cut.cols, cut.shape) == (all_lines(3), all_lines(2), (3, 2))


def test_a_parameter_is_a_tensor_only_where_it_is_all_of_it_as_it_is() -> None:
    whole = Piece.whole("t", (4, 2))
    half = Piece("t", (4, 2), (Axis(0, all_lines(2), Lines(2, 2)), Axis(1, all_lines(2), all_lines(2))))
    assert Parameter("p", "F32", (4, 2), (whole,)).tensor == "t"
    assert Parameter("p", "F32", (2, 2), (half,)).tensor is None
    assert Parameter("p", "F32", (4, 2), (whole,)).moved("u").pieces == (Piece.whole("u", (4, 2)),)
    assert not Parameter("p", "F32", (4, 2), (half,)).complete


def test_one_expert_of_a_stack_has_no_axis_for_it() -> None:
    stack = Piece.whole("t", (3, 4, 2))
    one = Piece(
        "p", (3, 4, 2), tuple(Axis(n + 1, all_lines(size), all_lines(size)) for n, size in enumerate((4, 2))), ((0, 1),)
    )
    (found,) = one.then(stack)
    assert found.fixed == ((0, 1),)
    beyond = Piece("t", (3, 4, 2), (ONE, *stack.axes[1:]), ((0, 2),))
    assert list(one.then(beyond)) == []


def test_what_meets_in_the_middle_is_paired_in_the_order_of_ours() -> None:
    ours, theirs = (all_lines(4), Lines(0, 4, 2)), (Lines(2, 6), Lines(10, 6))
    assert meeting(ours, theirs) == ((Lines(1, 3), Lines(10, 3, 2)),)
    assert meeting((all_lines(2), all_lines(2)), (Lines(5, 2), all_lines(2))) == ()
