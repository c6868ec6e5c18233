"""DoRA: `W' = m / ||V|| * V` with `V = W + scaling * B @ A` (Liu et al. 2024, arXiv:2402.09353; PEFT `use_dora`).

The norm is taken over all inputs of an output feature, without an epsilon. Outputs are the stored rows of a Linear or
a convolution, and the stored columns of a Conv1D or an Embedding: there the norm needs every row, so the statistic is
summed in a first pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.core.tensors import Operation
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region, refuse_part
from streammerge.methods.lowrank import FLOAT64, ScaledProducts, cut_product, factor_memory
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor


class Dora(AbsoluteFormula):
    """Factors: `left` (R, K), `right` (K, C), `magnitude` (R) or, transposed, (C); numbers: `scaling`."""

    title = "m / ||W + scaling * B @ A|| * (W + scaling * B @ A)"

    def locality(self, operation: Operation) -> Locality:
        """Rows, or columns where the weight is stored (in, out)."""
        return Locality.COLUMN if operation.place.transposed else Locality.ROW

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """Whole outputs: some of them will do, but each with all of its inputs."""
        outputs, whole = (cut.cols, cut.whole_cols) if operation.place.transposed else (cut.rows, cut.whole_rows)
        if not whole:
            raise refuse_part(operation, "all inputs of an output at once")
        place, factors = cut_product(operation, cut)
        return place, {**factors, "magnitude": operation.factors["magnitude"].cut(0, outputs)}

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """Both factors, V and the squares of one tile, and the magnitude with its norms."""
        channels = operation.factors["magnitude"].shape[0]
        return factor_memory(operation, tile) + 2 * FLOAT64 * tile[0] * tile[1] + 4 * FLOAT64 * channels

    def reduce(self, operation: Operation, region: Region, weight: Tensor, factors: Factors) -> Tensor:
        """The sum of V squared over the tile's inputs: (T) for rows, (C) for columns."""
        return self._directed(operation, region, weight, factors).square_().sum(0 if operation.place.transposed else 1)

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """`V * (m / ||V||)`; `state` is the summed statistic of the tile's rows, or of all columns."""
        directed_TC = self._directed(operation, region, weight, factors)
        magnitude = factors.vector(operation.factors["magnitude"])
        if operation.place.transposed:
            cols = slice(*region.cols)
            return directed_TC.mul_((magnitude[cols] / state[cols].sqrt())[None, :])
        return directed_TC.mul_((magnitude[slice(*region.rows)] / state.sqrt())[:, None])

    def _directed(self, operation: Operation, region: Region, weight: Tensor, factors: Factors) -> Tensor:
        directed_TC = weight.new_empty(region.shape, dtype=factors.dtype)
        return ScaledProducts(operation, region, factors).into(directed_TC, region.rows).add_(weight)
