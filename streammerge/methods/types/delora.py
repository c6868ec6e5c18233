"""DeLoRA: directions and strength of a LoRA apart (Bini et al. 2025, arXiv:2503.18225; PEFT `tuners/delora/layer.py`).

`W + (B @ diag(lambda / r / (|A_k| |B_k|)) @ A) * w`, with the norms of the rows of A and the columns of B, which are at
least 1e-4. The norms w of the base's columns are those that the adapter was made with and that its file holds: to take
them of this base would be wrong wherever the two differ by a bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import Blockwise, whole
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors

if TYPE_CHECKING:
    from torch import Tensor

SHORTEST = 1e-4
"""The least norm that a row of A or a column of B is taken to have."""


class Bounded(Blockwise):
    """Factors: `B` (O, K), `A` (K, I), `lambda` (1), `norms` (I)."""

    title = "W + (B @ diag(lambda / r / (|A_k| |B_k|)) @ A) * |W_i|"
    zero_if = ("A", "B", "lambda", "norms")

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """Rows of B and columns of A that are there; the norms are those of whole factors."""
        b_OK, a_KI = (whole(operation, name, factors) for name in "BA")
        made: Tensor = (b_OK[outs] * self._strengths(operation, factors)) @ a_KI[:, ins]
        return made.mul_(factors.vector(operation.factors["norms"])[ins])

    def _strengths(self, operation: Operation, factors: Factors) -> Tensor:
        """(K)."""
        views = operation.factors

        def make() -> Tensor:
            b_OK, a_KI = (whole(operation, name, factors) for name in "BA")
            lengths_K = a_KI.norm(dim=1).clamp(min=SHORTEST) * b_OK.norm(dim=0).clamp(min=SHORTEST)
            strengths_K: Tensor = factors.vector(views["lambda"]) / len(a_KI) / lengths_K
            return strengths_K

        return factors.made("delora", [views["A"], views["B"], views["lambda"]], make)


class DeLora(Method):
    """Factors: `delora_A` (r, in), `delora_B` (out, r), `delora_lambda` (1), `delora_w_norm` (in)."""

    title = "DeLoRA"
    paper = "arXiv:2503.18225"
    only = "delora"
    known = Known(
        # The strength and the ranks that are said here are in the file as well, the strength as it was trained.
        no_consequence=frozenset(
            {"r", "delora_lambda", "module_dropout", "init_weights", "rank_pattern", "lambda_pattern"}
        )
    )
    modules = (slots("delora_A delora_B delora_lambda delora_w_norm"),)
    formulas = MappingProxyType({"delora": Bounded()})
    layers = "Linear"
    local = "the same elements"

    def shape(self, module: ModuleFactors) -> tuple[int, int]:
        """(out, in)."""
        return module.slots["delora_B"].shape[0], module.slots["delora_A"].shape[-1]

    def effects(self, module: Module) -> Iterator[Effect]:
        """One product, its directions made unit vectors."""
        left, right = module.matrix("delora_B"), module.matrix("delora_A")
        strength, norms = module.vector("delora_lambda"), module.vector("delora_w_norm")
        if left.shape[1] != right.shape[0]:
            raise module.mismatch("the ranks of `delora_A` and `delora_B` differ")
        if strength.shape != (1,) or norms.shape[0] != right.shape[1]:
            raise module.mismatch(f"`delora_lambda` or `delora_w_norm` is not for {right.shape[1]:,} inputs")
        factors = {"B": left, "A": right, "lambda": strength, "norms": norms}
        transposed = module.transposed(left.shape[0], right.shape[1])
        yield module.change("delora", factors, {"scaling": 1.0}, transposed=transposed)
