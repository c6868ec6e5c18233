"""Deltas of a few elements: values at positions in a module's weight (out, in), all others unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.core.errors import NotMergeableError
from streammerge.core.tensors import Operation
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import Blockwise, whole
from streammerge.methods.lowrank import FLOAT64

if TYPE_CHECKING:
    from torch import Tensor

COPIES = 8
"""Vectors of all positions alive at once: both as read, packed and sorted, and what a tile finds of them."""


class Sparse(Blockwise):
    """Factors: `values` (N), and as integers either `pairs` (2, N), rows and columns, or `flat` (N), positions in the
    flat weight; numbers: `outs` and `ins`. Values at one position are added."""

    title = "W[indices] + values"
    zero_if = ("values",)

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """The values that fall into the block."""
        return scattered(_packed(operation, factors), outs, ins, int(operation.numbers["ins"])).to(factors.dtype)

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The positions and values, and a block with two temporaries."""
        return sparse_memory(operation) + 3 * FLOAT64 * tile[0] * tile[1]


def sparse_memory(operation: Operation) -> int:
    """Bytes of positions and values."""
    return COPIES * FLOAT64 * operation.factors["values"].shape[0]


def scattered(packed: Tensor, outs: Tensor, ins: Tensor, width: int) -> Tensor:
    """A block (O, I) of the matrix with `width` columns that is zero but for `packed` (2, N): flat positions, which
    ascend, and values. `outs` and `ins` ascend."""
    import torch

    ends = torch.stack((outs[0] * width, (outs[-1] + 1) * width)).to(packed.dtype)
    first, last = torch.searchsorted(packed[0], ends).tolist()
    at, values = packed[0, first:last].long(), packed[1, first:last]
    rows, cols = at // width, at % width
    row = torch.searchsorted(outs, rows).clamp(max=len(outs) - 1)
    col = torch.searchsorted(ins, cols).clamp(max=len(ins) - 1)
    ours = (outs[row] == rows) & (ins[col] == cols)
    block = packed.new_zeros(len(outs), len(ins))
    return block.index_put_((row[ours], col[ours]), values[ours], accumulate=True)


def pack(flat: Tensor, values: Tensor) -> Tensor:
    """Positions (N) and values (N), sorted by position, as float64 (2, N): that holds every position exactly."""
    import torch

    order = flat.argsort(stable=True)
    return torch.stack((flat[order].double(), values[order].double()))


def _packed(operation: Operation, factors: Factors) -> Tensor:
    """The operation's positions and values.

    Raises NotMergeableError for positions outside of the weight.
    """
    outs, ins = (int(operation.numbers[name]) for name in ("outs", "ins"))
    name = "pairs" if "pairs" in operation.factors else "flat"
    views = [operation.factors[name], operation.factors["values"]]

    def make() -> Tensor:
        if name == "pairs":
            rows, cols = whole(operation, name, factors).double()
            inside = (rows >= 0) & (rows < outs) & (cols >= 0) & (cols < ins)
            at = rows * ins + cols
        else:
            at = factors.vector(operation.factors[name]).double()
            inside = (at >= 0) & (at < outs * ins)
        if not bool((inside & (at == at.trunc())).all()):
            reason = f"`{operation.module}`: its indices reach beyond a weight of {outs:,} x {ins:,}"
            raise NotMergeableError((operation.module,), reason)
        return pack(at, factors.vector(operation.factors["values"]))

    return factors.made("positions", views, make)
