"""Pieces and cuts taken at their word: arrays put together from stored arrays, element by element."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streammerge.names.operators import Part
from streammerge.names.pieces import Cut, Piece

Array = NDArray[Any]
ABSENT = -1


def stored_part(name: str, array: Array) -> Part:
    """A stored tensor as it is."""
    return Part(array.shape, (Piece.whole(name, array.shape),))


def rebuilt(shape: tuple[int, ...], pieces: Iterable[Piece], stored: Mapping[str, Array]) -> Array:
    """The tensor of `shape` that the pieces say lies in `stored`; ABSENT where none does, an error where two do."""
    result = np.full(shape, ABSENT, np.int64)
    for piece in pieces:
        source = stored[piece.tensor]
        assert source.shape == piece.shape
        picks = {number: np.array([line]) for number, line in piece.fixed}
        picks |= {axis.of: axis.there.array() for axis in piece.axes if axis.of is not None}
        block = source[np.ix_(*(picks[number] for number in range(source.ndim)))]
        order = [axis.of for axis in piece.axes if axis.of is not None] + [number for number, _ in piece.fixed]
        region = np.ix_(*(axis.here.array() for axis in piece.axes))
        assert (result[region] == ABSENT).all(), "two pieces hold the same element"
        result[region] = block.transpose(order).reshape([axis.here.total for axis in piece.axes])
    return result


def matrix_of(cuts: Iterable[Cut], stored: Mapping[str, Array]) -> Array:
    """The matrix that cuts say lies in `stored`."""
    listed = list(cuts)
    result = np.full(listed[0].shape, ABSENT, np.int64)
    for cut in listed:
        view = cut.place.view
        matrix = stored[cut.place.tensor].reshape(view.stack, view.rows, view.cols)[cut.place.matrix]
        block = matrix[np.ix_(cut.place.rows.array(), cut.place.cols.array())]
        region = np.ix_(cut.rows.array(), cut.cols.array())
        assert (result[region] == ABSENT).all(), "two cuts hold the same element"
        result[region] = block.T if cut.swapped else block
    return result
