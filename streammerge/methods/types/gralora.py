"""GraLoRA: a LoRA for each of k x k blocks, whose factors are shared along rows and columns of blocks (Jung et al.
2025, arXiv:2505.20355).

With q = r / k, the block of outputs p and inputs n gets `(A[n][:, pq:pq+q] @ B[p][nq:nq+q])^T`; a hybrid has a plain
product beside it. The scaling is alpha over the sum of both ranks (PEFT `tuners/gralora/layer.py`, 0.18 to 0.21.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import Blockwise, whole
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors

if TYPE_CHECKING:
    from torch import Tensor


class Granular(Blockwise):
    """Factors: `right` (N, I * K), the A of N blocks of I inputs, and `left` (N, K * O), the B of N blocks of O
    outputs; perhaps `general_left` (out, H) and `general_right` (H, in); numbers: `rank`, which is K."""

    title = "W + scaling * blocks of products"

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """Every part of the tile that lies in one block, by the product of that block."""
        rank = int(operation.numbers["rank"])
        right, left = (whole(operation, name, factors) for name in ("right", "left"))
        count = len(right)
        right_NIK, left_NKO = right.reshape(count, -1, rank), left.reshape(count, rank, -1)
        width, height, share = right_NIK.shape[1], left_NKO.shape[2], rank // count
        delta = right.new_zeros(len(outs), len(ins))
        for p in range(int(outs[0]) // height, int(outs[-1]) // height + 1):
            rows = (outs // height == p).nonzero()[:, 0]
            for n in range(int(ins[0]) // width, int(ins[-1]) // width + 1):
                cols = (ins // width == n).nonzero()[:, 0]
                a = right_NIK[n][ins[cols] % width, p * share : (p + 1) * share]
                b = left_NKO[p][n * share : (n + 1) * share, outs[rows] % height]
                delta[rows[:, None], cols[None, :]] = (a @ b).T
        if "general_left" in operation.factors:
            delta += (
                whole(operation, "general_left", factors)[outs] @ whole(operation, "general_right", factors)[:, ins]
            )
        return delta


class GraLora(Method):
    """Factors: `gralora_A` (k, in / k, r), `gralora_B` (k, r, out / k), and of a hybrid `gralora_A_general` (h, in) and
    `gralora_B_general` (out, h)."""

    title = "GraLoRA"
    paper = "arXiv:2505.20355"
    only = "gralora"
    known = Known(
        read=frozenset({"alpha"}),
        no_consequence=frozenset({"r", "hybrid_r", "gralora_k", "gralora_dropout", "init_weights"}),
    )
    modules = (
        slots("gralora_A gralora_B"),
        slots("gralora_A gralora_B gralora_A_general gralora_B_general"),
    )
    formulas = MappingProxyType({"gralora": Granular()})
    layers = "Linear, Conv1D"
    local = "the same elements"

    def shape(self, module: ModuleFactors) -> tuple[int, int] | None:
        """(out, in)."""
        right, left = module.slots["gralora_A"].shape, module.slots["gralora_B"].shape
        return (left[0] * left[2], right[0] * right[1]) if len(right) == len(left) == 3 else None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one sum."""
        right, left = module.info("gralora_A").shape, module.info("gralora_B").shape
        sizes = self.shape(module.factors)
        if sizes is None or right[0] != left[0] or right[2] != left[1] or right[2] % right[0]:
            raise module.mismatch(f"`gralora_A` has shape {list(right)}, `gralora_B` has shape {list(left)}")
        factors = {"right": module.matrix("gralora_A"), "left": module.matrix("gralora_B")}
        hybrid = 0
        if module.has("gralora_A_general"):
            general = module.matrix("gralora_B_general"), module.matrix("gralora_A_general")
            hybrid = general[1].shape[0]
            if (general[0].shape, general[1].shape) != ((sizes[0], hybrid), (hybrid, sizes[1])):
                raise module.mismatch("the factors of its general product have other sizes")
            factors |= {"general_left": general[0], "general_right": general[1]}
        scaling = fields.number(module.config, "alpha", 64) / (right[2] + hybrid)
        numbers = {"scaling": scaling, "rank": float(right[2])}
        yield module.change("gralora", factors, numbers, transposed=module.transposed(*sizes))
