"""What a method is: where its formula looks, and the two steps in which it works on tiles.

A formula never sees a file or a name. It declares its locality and its memory without torch, so that planning can use
them, and computes with torch, imported inside. All arithmetic is float64 in stored orientation; the rounding is the
caller's. Shape letters: `R` rows and `C` columns of the stored region, `K` rank, `T` rows of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from streammerge.core.errors import NotMergeableError
from streammerge.core.tensors import FactorView, Operation, Place
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Locality(Enum):
    """What of the stored region one tile of the result depends on."""

    ELEMENT = "the same elements"
    LINE = "whole rows, as every tile holds them"
    ROW = "whole rows"
    COLUMN = "whole columns: two passes"
    MATRIX = "the whole matrix in memory"


@dataclass(frozen=True, slots=True)
class Region:
    """Rows and columns of a place, half-open, relative to the place."""

    rows: tuple[int, int]
    cols: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and columns."""
        return self.rows[1] - self.rows[0], self.cols[1] - self.cols[0]


class Factors(Protocol):
    """Hands out factors as tensors of the arithmetic's dtype, float64 unless asked otherwise; integers as float64."""

    @property
    def dtype(self) -> torch.dtype:
        """That dtype."""

    def part(self, view: FactorView, rows: tuple[int, int], cols: tuple[int, int]) -> Tensor:
        """Rows and columns of a matrix factor."""

    def kept(self, view: FactorView, rows: tuple[int, int], cols: tuple[int, int], times: float = 1.0) -> Tensor:
        """The same `times` a number, remembered for the next tile; for factors that neighbouring tiles share."""

    def gram(self, view: FactorView, rows: tuple[int, int], cols: tuple[int, int], times: float = 1.0) -> Tensor:
        """What `kept` gives times its own transpose, (rows, rows), remembered likewise."""

    def vector(self, view: FactorView) -> Tensor:
        """All of a vector factor."""

    def made(self, name: str, views: Sequence[FactorView], make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of these factors and nothing else, remembered under its name for the next tile."""

    def drawn(self, key: Hashable, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` makes of nothing but its key, on the CPU: made once for all workers, and the last one kept."""


CutOperation = tuple[Place, Mapping[str, FactorView]]


class Deltas(Protocol):
    """Makes the deltas of rows of one region, its factors read once for all of them."""

    def into(self, out: Tensor, rows: tuple[int, int]) -> Tensor:
        """The delta of rows [first, last) of the place, written into `out` (T, C) and returned."""

    def squared_norm(self) -> Tensor | None:
        """The squared Frobenius norm of the whole region's delta, on the device; None where that is best measured on
        the tiles."""


class Formula(Protocol):
    """One way in which an operation changes its place."""

    title: str
    """What the formula is, as documents and reports say it."""
    additive: bool
    """Whether the effect is `W + delta` with a delta that does not depend on W; only such effects are summed over
    adapters and scaled by a weight, as a factor of their number `scaling`."""
    windowed: bool
    """Whether operations keep all of their factors when their place is cut, and are told its `window`."""
    commutes: bool
    """Whether effects of several adapters, all by this formula, may be applied one after the other in any order."""

    @property
    def zero_if(self) -> tuple[str, ...]:
        """Factors any of which makes the operation change nothing if all of it is zero."""

    def rows_together(self, operation: Operation) -> int:
        """How many stored rows, counted from the first of the place, must lie in one tile."""

    def locality(self, operation: Operation) -> Locality:
        """What one tile of the result depends on."""

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """The place and the factors of an operation, which is said of the whole of a parameter's matrix, for the part
        of that in `cut`.

        Raises NotMergeableError where the formula cannot be computed from that part alone.
        """

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """Bytes of factors and temporaries beside the tile's own buffers, for one worker and a tile of that shape."""

    def state_memory(self, operation: Operation) -> int:
        """Bytes needed once while `prepare` works on the place, over what tiles need."""

    def deltas(self, operation: Operation, region: Region, factors: Factors) -> Deltas:
        """Additive formulas: what makes the deltas of some rows of a region, a few tiles of which lie below each other.
        Factors are read here, once for all of them."""

    def reduce(self, operation: Operation, region: Region, weight: Tensor, factors: Factors) -> Tensor:
        """Formulas of locality ROW or COLUMN: this tile's share of the statistic over the rows or columns, its last
        axis along the region's rows or columns; shares are summed in the order of the tiles."""

    def prepare(self, operation: Operation, weight: Tensor, factors: Factors) -> Any:
        """Formulas of locality MATRIX: the state that `apply` needs, from the whole stored region (R, C)."""

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """Formulas that are not additive: the new values of a region, float64 (T, C)."""


def refuse_part(operation: Operation, needs: str) -> NotMergeableError:
    """The refusal of a part that does not hold what the formula `needs`."""
    reason = f"`{operation.module}` is stored in parts, and its formula needs {needs}"
    return NotMergeableError(
        (operation.module,), reason, "merge into a checkpoint that stores this module as one tensor"
    )


class CommonDefaults:
    """What most formulas answer."""

    windowed = False
    commutes = False
    zero_if: tuple[str, ...] = ()

    def rows_together(self, operation: Operation) -> int:
        """Each row by itself."""
        return 1


class AdditiveFormula(CommonDefaults):
    """Defaults for formulas of the form W + delta."""

    additive = True

    def locality(self, operation: Operation) -> Locality:
        """Element by element: the delta does not look at W."""
        return Locality.ELEMENT

    def state_memory(self, operation: Operation) -> int:
        """None: nothing is computed ahead."""
        return 0

    def reduce(self, operation: Operation, region: Region, weight: Tensor, factors: Factors) -> Tensor:
        """Never called: no statistic is needed."""
        raise TypeError(f"{type(self).__name__} has no statistic")

    def prepare(self, operation: Operation, weight: Tensor, factors: Factors) -> Any:
        """Never called: no state is needed."""
        raise TypeError(f"{type(self).__name__} has no state")

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """Never called: the caller adds the delta."""
        raise TypeError(f"{type(self).__name__} is added, not applied")


class AbsoluteFormula(CommonDefaults):
    """Defaults for formulas that make new values out of W."""

    additive = False

    def state_memory(self, operation: Operation) -> int:
        """None, unless a formula says otherwise."""
        return 0

    def deltas(self, operation: Operation, region: Region, factors: Factors) -> Deltas:
        """Never called: the effect is not a sum."""
        raise TypeError(f"{type(self).__name__} has no delta")

    def reduce(self, operation: Operation, region: Region, weight: Tensor, factors: Factors) -> Tensor:
        """Never called, unless a formula says otherwise."""
        raise TypeError(f"{type(self).__name__} has no statistic")

    def prepare(self, operation: Operation, weight: Tensor, factors: Factors) -> Any:
        """Never called, unless a formula says otherwise."""
        raise TypeError(f"{type(self).__name__} has no state")
