"""Operations on parameters become operations on stored tensors only where all of the parameter is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streammerge.core.errors import NotMergeableError
from streammerge.core.lines import all_lines
from streammerge.core.tensors import FactorView, Operation, TensorInfo
from streammerge.methods.placing import parameter_place, placed
from streammerge.names.pieces import Axis, Parameter, Piece


def halves() -> Parameter:
    """A (6, 4) parameter whose first and last three rows are a tensor each."""
    columns = Axis(1, all_lines(4), all_lines(4))
    rows = [Axis(0, all_lines(3).shifted(start), all_lines(3)) for start in (0, 3)]
    pieces = tuple(Piece(name, (3, 4), (axis, columns)) for name, axis in zip(("upper", "lower"), rows, strict=True))
    return Parameter("whole", "F32", (6, 4), pieces)


def operation_on(parameter: Parameter) -> Operation:
    left = FactorView.matrix(0, TensorInfo("B", "F32", (6, 2), "", 0, 0), 6, 2)
    right = FactorView.matrix(0, TensorInfo("A", "F32", (2, 4), "", 0, 0), 2, 4)
    factors, numbers = {"left": left, "right": right}, {"scaling": 1.0}
    return Operation("lora", parameter_place(parameter), 0, "whole", "exact", factors, numbers)


def test_every_piece_gets_its_rows_of_the_factors() -> None:
    parameter = halves()
    upper, lower = placed([operation_on(parameter)], parameter)
    assert (upper.place.tensor, lower.place.tensor) == ("upper", "lower")
    assert [part.factors["left"].axes[0].start for part in (upper, lower)] == [0, 3 * 2]
    assert upper.factors["right"] == lower.factors["right"]
    assert upper.part
    assert lower.part


def test_a_parameter_of_which_only_a_part_is_stored_is_refused() -> None:
    parameter = replace(halves(), pieces=halves().pieces[:1])
    with pytest.raises(NotMergeableError, match="of `whole` only a part is stored"):
        list(placed([operation_on(parameter)], parameter))
