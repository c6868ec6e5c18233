"""What is taken out of the base before a delta is added: by PEFT, when it loads PiSSA, OLoRA, KaSA and OSF adapters.

`W_r = round(W - P)` with P the top singular part (PiSSA, Meng et al. 2024, arXiv:2404.02948), `scaling * Q_r @ R_r` of
the QR decomposition (OLoRA, arXiv:2406.01775), or the lowest singular part (KaSA, arXiv:2412.06071, and OSF, which does
not round), decomposed in float32; the delta is then added to W_r.
P does not depend on the signs a LAPACK chooses, but its last bits do depend on the library: best effort to one ulp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.core.dtypes import torch_dtype
from streammerge.core.tensors import Operation
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region, refuse_part
from streammerge.methods.lowrank import FLOAT64
from streammerge.names.pieces import Cut

if TYPE_CHECKING:
    from torch import Tensor

FLOAT32 = 4
SVD_COPIES = 6
"""float32 matrices alive in the thin SVD: W, its float64 original (two), U, V and LAPACK's workspace."""


class Principal(AbsoluteFormula):
    """Numbers: `rank`, of P, and `scaling`; `rounding` is the base's dtype, which W_r is stored in while training, or
    empty where W_r is not rounded. `decomposition` is `svd`, `qr`, or `tail` for the lowest singular part."""

    def __init__(self, decomposition: str) -> None:
        titles = {"svd": "W - top singular part", "qr": "W - scaling * Q_r @ R_r", "tail": "W - lowest singular part"}
        self.decomposition, self.title = decomposition, titles[decomposition]

    def locality(self, operation: Operation) -> Locality:
        """The decomposition needs all of W."""
        return Locality.MATRIX

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """The whole matrix, and for the QR decomposition the same way round."""
        if not (cut.whole_rows and cut.whole_cols) or (cut.swapped and self.decomposition == "qr"):
            raise refuse_part(operation, "the whole matrix as the model has it")
        return cut.turned(operation.place.transposed), {}

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """The product of the two parts on one tile, and the parts."""
        rank = int(operation.numbers["rank"])
        return FLOAT64 * (rank * sum(operation.place.shape) + 2 * tile[0] * tile[1])

    def state_memory(self, operation: Operation) -> int:
        """W and its decomposition."""
        rows, cols = operation.place.shape
        return SVD_COPIES * FLOAT32 * rows * cols

    def prepare(self, operation: Operation, weight: Tensor, factors: Factors) -> Any:
        """P as float32 factors in stored orientation, (R, K) and (K, C), `scaling` already in them."""
        import torch

        rank = int(operation.numbers["rank"])
        stored_RC = weight.to(torch.float32)
        if self.decomposition == "qr":
            # PEFT decomposes the stored matrix for OLoRA, (in, out) for a Conv1D, which it can load only if square.
            q, r = torch.linalg.qr(stored_RC)
            parts = q[:, :rank] * operation.numbers["scaling"], r[:rank]
        else:
            weight_OI = stored_RC.T if operation.place.transposed else stored_RC
            u, s, vh = torch.linalg.svd(weight_OI, full_matrices=False)
            part = slice(len(s) - rank, None) if self.decomposition == "tail" else slice(rank)
            root = s[part].sqrt()
            left, right = u[:, part] * root, root[:, None] * vh[part]
            parts = (right.T, left.T) if operation.place.transposed else (left, right)
        return tuple(factor.to(torch.float64).contiguous() for factor in parts)

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """`round(W - P)` in the base's dtype, as float64; `W - P` where nothing is rounded."""
        import torch

        left, right = state
        taken: Tensor = weight - left[slice(*region.rows)] @ right[:, slice(*region.cols)]
        if not operation.rounding:
            return taken
        return taken.to(torch.float32).to(torch_dtype(operation.rounding)).to(torch.float64)
