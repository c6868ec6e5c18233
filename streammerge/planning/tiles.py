"""The canonical grid: how a stored tensor is cut into tiles.

A function of the tensor's shape, the rank and the arithmetic version, never of budget, workers or caller: that makes
the output's bytes independent of all three. A tile is always one contiguous range of the tensor's elements: some whole
rows, or a stretch of one very long row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from streammerge.core.tensors import MatrixView, Operation
from streammerge.methods import FORMULAS

ARITHMETIC_VERSION = 1
"""Raised by whatever changes a bit of any output."""
SMALL_RANK = 32
TILE_ELEMENTS, TILE_ELEMENTS_HIGH_RANK = 2**17, 2**18
"""1 or 2 MiB of float64: the tile stays in a core's second-level cache; a high rank gains from more rows."""
LEAST_ROWS = 8
LONGEST_ROW = 2**20
"""Elements of a row above which it is cut into stretches."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and columns (half-open) of one matrix of the stack; `start` and `end` are its elements in the tensor."""

    index: int
    matrix: int
    rows: tuple[int, int]
    cols: tuple[int, int]
    start: int
    end: int


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one stored tensor. `rank` is the highest of its operations, 0 if there are none; `together` is how
    many rows, from a multiple of it on, lie in one tile."""

    view: MatrixView
    rank: int
    together: int = 1

    @cached_property
    def tile_shape(self) -> tuple[int, int]:
        """Rows and columns of a full tile."""
        rows, cols = self.view.rows, self.view.cols
        if cols > LONGEST_ROW:
            return 1, LONGEST_ROW
        elements = TILE_ELEMENTS if self.rank <= SMALL_RANK else TILE_ELEMENTS_HIGH_RANK
        height = max(LEAST_ROWS, elements // max(cols, 1))
        return min(rows, -(-height // self.together) * self.together), cols

    @property
    def count(self) -> int:
        """Number of tiles."""
        bands, strips = self._per_matrix
        return self.view.stack * bands * strips

    @cached_property
    def _per_matrix(self) -> tuple[int, int]:
        height, width = self.tile_shape
        return -(-self.view.rows // height), -(-self.view.cols // width)

    def tile(self, index: int) -> Tile:
        """The tile with this number; tiles are numbered in the order of their elements."""
        bands, strips = self._per_matrix
        matrix, rest = divmod(index, bands * strips)
        band, strip = divmod(rest, strips)
        height, width = self.tile_shape
        rows = band * height, min((band + 1) * height, self.view.rows)
        cols = strip * width, min((strip + 1) * width, self.view.cols)
        origin = matrix * self.view.rows * self.view.cols
        start = origin + rows[0] * self.view.cols + cols[0]
        return Tile(index, matrix, rows, cols, start, start + (rows[1] - rows[0]) * (cols[1] - cols[0]))

    def index_of(self, element: int) -> int:
        """The number of the tile that holds an element of the tensor."""
        bands, strips = self._per_matrix
        height, width = self.tile_shape
        matrix, rest = divmod(element, self.view.rows * self.view.cols)
        row, col = divmod(rest, self.view.cols)
        return (matrix * bands + row // height) * strips + col // width

    def band_of(self, tile: Tile) -> range:
        """The numbers of all tiles that share this tile's rows."""
        strips = self._per_matrix[1]
        first = tile.index // strips * strips
        return range(first, first + strips)

    def matrix_of(self, matrix: int) -> range:
        """The numbers of all tiles of one matrix of the stack."""
        bands, strips = self._per_matrix
        return range(matrix * bands * strips, (matrix + 1) * bands * strips)


def grid_of(shape: tuple[int, ...], operations: Sequence[Operation]) -> TileGrid:
    """The grid of a tensor of `shape` under its operations."""
    views = {operation.place.view for operation in operations}
    ranks = [operation.factors["left"].shape[1] for operation in operations if "left" in operation.factors]
    together = math.lcm(*(FORMULAS[operation.formula].rows_together(operation) for operation in operations))
    return TileGrid(views.pop() if views else MatrixView.of(shape), max(ranks, default=0), together)
