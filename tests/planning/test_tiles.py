"""The canonical grid: tiles cut a tensor into contiguous ranges without gap or overlap, whatever its shape."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.core.tensors import MatrixView
from streammerge.planning.tiles import (
    LEAST_ROWS,
    LONGEST_ROW,
    SMALL_RANK,
    TILE_ELEMENTS,
    TILE_ELEMENTS_HIGH_RANK,
    TileGrid,
    grid_of,
)

VIEWS = st.builds(
    MatrixView,
    stack=st.integers(1, 4),
    rows=st.integers(1, 3000),
    cols=st.one_of(st.integers(1, 5000), st.integers(LONGEST_ROW - 2, 3 * LONGEST_ROW)),
)
GRIDS = st.builds(TileGrid, view=VIEWS, rank=st.integers(0, 600))


@settings(deadline=None)
@given(GRIDS)
def test_tiles_follow_each_other_without_gap_or_overlap_and_cover_everything(grid: TileGrid) -> None:
    numbers = range(grid.count) if grid.count <= 200 else [*range(100), *range(grid.count - 100, grid.count)]
    tiles = [grid.tile(number) for number in numbers]
    assert tiles[0].start == 0
    assert tiles[-1].end == grid.view.stack * grid.view.rows * grid.view.cols
    for before, after in pairwise(tiles):
        if after.index == before.index + 1:
            assert after.start == before.end
    for tile in tiles:
        height, width = tile.rows[1] - tile.rows[0], tile.cols[1] - tile.cols[0]
        assert tile.end - tile.start == height * width > 0
        assert tile.start == (tile.matrix * grid.view.rows + tile.rows[0]) * grid.view.cols + tile.cols[0]
        assert width == grid.view.cols or height == 1, "a tile that is neither whole rows nor part of one row has holes"


@settings(deadline=None)
@given(GRIDS, st.data())
def test_every_element_lies_in_the_tile_that_is_said_to_hold_it(grid: TileGrid, data: st.DataObject) -> None:
    element = data.draw(st.integers(0, grid.view.stack * grid.view.rows * grid.view.cols - 1))
    tile = grid.tile(grid.index_of(element))
    assert tile.start <= element < tile.end


@settings(deadline=None)
@given(GRIDS, st.data())
def test_a_band_is_all_tiles_of_the_same_rows_and_a_matrix_all_of_one_matrix(
    grid: TileGrid, data: st.DataObject
) -> None:
    tile = grid.tile(data.draw(st.integers(0, grid.count - 1)))
    band = [grid.tile(number) for number in grid.band_of(tile)]
    assert {(other.matrix, other.rows) for other in band} == {(tile.matrix, tile.rows)}
    assert (band[0].cols[0], band[-1].cols[1]) == (0, grid.view.cols)
    numbers = grid.matrix_of(tile.matrix)
    assert tile.index in numbers
    assert {grid.tile(number).matrix for number in (numbers[0], numbers[-1])} == {tile.matrix}
    assert len(numbers) * grid.view.stack == grid.count


@pytest.mark.parametrize(
    ("shape", "rank", "tile"),
    [
        ((4096, 4096), 16, (TILE_ELEMENTS // 4096, 4096)),
        ((4096, 4096), SMALL_RANK, (32, 4096)),
        ((4096, 4096), SMALL_RANK + 1, (TILE_ELEMENTS_HIGH_RANK // 4096, 4096)),
        ((4096, 100_000), 16, (LEAST_ROWS, 100_000)),
        ((3, 100_000), 16, (3, 100_000)),
        ((64, LONGEST_ROW), 0, (LEAST_ROWS, LONGEST_ROW)),
        ((64, LONGEST_ROW + 1), 0, (1, LONGEST_ROW)),
        ((7,), 0, (7, 1)),
        ((), 0, (1, 1)),
    ],
)
def test_the_size_of_a_tile_follows_from_shape_and_rank_alone(
    shape: tuple[int, ...], rank: int, tile: tuple[int, int]
) -> None:
    assert TileGrid(MatrixView.of(shape), rank).tile_shape == tile


def test_a_tensor_without_operations_is_cut_as_one_matrix() -> None:
    assert grid_of((8, 16, 4), ()).view == MatrixView(1, 8, 64)
