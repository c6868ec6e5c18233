"""The memory figure: computed from shapes, kept by using fewer workers, refused with the figure that would do."""

from __future__ import annotations

import pytest

from streammerge.core.errors import BudgetError
from streammerge.core.options import Options
from streammerge.core.tensors import FactorView, Operation, OutputTensor, Place, Stored, TensorInfo
from streammerge.planning.memory import PIECE, buffer_count, figures

MB = 10**6
SHARED = buffer_count(0) * PIECE
COPYING = (buffer_count(1) + 1) * PIECE
"""What one worker needs that only copies."""


def tensor(
    name: str, shape: tuple[int, ...], *, dtype: str = "BF16", rank: int = 0, formula: str = "lora"
) -> OutputTensor:
    info = TensorInfo(name, dtype, shape, "f", 0, 0)
    if not rank:
        return OutputTensor(name, dtype, shape, Stored(name))
    left = FactorView.matrix(0, TensorInfo("B", "F32", (shape[0], rank), "", 0, 0), shape[0], rank)
    right = FactorView.matrix(0, TensorInfo("A", "F32", (rank, shape[1]), "", 0, 0), rank, shape[1])
    numbers = {"scaling": 1.0, "rank": float(rank)}
    operation = Operation(formula, Place.whole(info), 0, name, "exact", {"left": left, "right": right}, numbers)
    return OutputTensor(name, dtype, shape, Stored(name), (operation,))


def needed(*tensors: OutputTensor, **options: object) -> int:
    """The least budget these tensors are merged in."""
    with pytest.raises(BudgetError) as caught:
        figures({item.name: item for item in tensors}, [], [], Options(memory=1, **options))  # type: ignore[arg-type]
    return caught.value.needed


def test_more_budget_is_more_workers_up_to_those_that_were_asked_for() -> None:
    one = tensor("w", (4096, 4096), rank=16)
    each = needed(one) - SHARED
    for workers, more in ((1, each), (1, 2 * each - 1), (2, 2 * each), (3, 3 * each + 5), (4, 100 * each)):
        budget = SHARED + more
        found = figures({"w": one}, [], [], Options(memory=budget, workers=4))
        assert found.workers == workers
        assert found.memory == SHARED + workers * each <= budget


def test_a_budget_one_byte_short_is_refused_with_what_is_needed_and_for_what() -> None:
    tensors = {item.name: item for item in (tensor("small", (64, 64), rank=4), tensor("large", (4096, 8192), rank=64))}
    least = needed(*tensors.values())
    with pytest.raises(BudgetError) as caught:
        figures(tensors, [], [], Options(memory=least - 1))
    assert (caught.value.needed, caught.value.granted) == (least, least - 1)
    assert "`large`" in caught.value.because
    assert caught.value.exit_code == 2
    assert figures(tensors, [], [], Options(memory=least)).workers == 1


def test_the_size_of_a_tensor_does_not_raise_the_need() -> None:
    assert needed(tensor("w", (2**13, 4096), rank=16)) == needed(tensor("w", (2**20, 4096), rank=16))
    assert needed(tensor("w", (2**13, 4096))) == needed(tensor("w", (2**24, 4096))) == COPYING


def test_reading_past_the_page_cache_takes_memory_to_read_into() -> None:
    one = tensor("w", (4096, 4096), rank=16)
    assert needed(one, read="direct") == needed(one, read="mmap") + 2 * PIECE


def test_rank_and_width_do_raise_it() -> None:
    assert needed(tensor("w", (4096, 4096), rank=256)) > needed(tensor("w", (4096, 4096), rank=16))
    assert needed(tensor("w", (4096, 65536), rank=16)) > needed(tensor("w", (4096, 16384), rank=16))


def test_a_decomposition_needs_its_whole_matrix_once_whatever_the_workers() -> None:
    pissa = tensor("w", (4096, 4096), rank=16, formula="pissa")
    least = needed(pissa)
    assert least > 4096 * 4096 * 4 * 5
    with pytest.raises(BudgetError, match="`w` needs all of it in memory"):
        figures({"w": pissa}, [], [], Options(memory=least - 1))
    two = figures({"w": pissa}, [], [], Options(memory=2 * least, workers=2))
    assert two.workers == 2
    assert two.memory < 2 * least


def test_a_wide_tensor_that_is_only_converted_is_counted() -> None:
    wide = tensor("w", (64, 2**20))
    assert needed(wide) == COPYING
    assert needed(wide, dtype="float32") >= COPYING + 8 * 2**20 * (8 + 2)
    assert needed(tensor("w", (64, 2**20), dtype="I8"), dtype="float32") == COPYING


def test_the_hint_names_a_budget_that_is_enough() -> None:
    error = BudgetError(needed=12_600_001, granted=MB, because="for `w`")
    assert "`--memory 13MB`" in error.hint()
    assert "`--memory 13MB`" in BudgetError(needed=13_000_000, granted=MB).hint()
