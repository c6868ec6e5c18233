"""VB-LoRA: `W + B @ A`, each stretch of A and B a mixture of a few vectors of one bank (Li et al. 2024,
arXiv:2405.15179; PEFT `tuners/vblora/layer.py`, 0.13 to 0.21.2). There is no scaling.

A stretch has as many logits as the bank has vectors; the softmax of the `topk` largest are its weights. With
`save_only_topk_weights` the file holds their positions and all but the last of the weights, which is what is left of
one.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.tensors import FactorView, Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import whole
from streammerge.methods.composed import Composed, checked
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor

LOGITS = ("vblora_logits_A", "vblora_logits_B")
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


class Mixtures(Composed):
    """Factors: `bank` (N, V); for X = A and B, whose stretches are in the order of the file, (r, in / V) and
    (out / V, r): `X` (stretches, N) logits, or `X_topk_indices` (stretches, k) and `X_topk_weights` (stretches,
    k - 1). Numbers: `topk`, `rank`."""

    title = "W + B @ A, of vectors of a bank"
    zero_if = ("bank",)

    def rank(self, operation: Operation) -> int:
        """r."""
        return int(operation.numbers["rank"])

    def left(self, operation: Operation, outs: Tensor, factors: Factors) -> Tensor:
        """Output o is value `o % V` of the vectors of its stretch."""
        vectors = self._vectors("B", operation, factors)
        length = vectors.shape[1]
        wide = vectors.reshape(-1, self.rank(operation), length)
        outs = outs.to(wide.device)
        return wide[outs // length, :, outs % length]

    def right(self, operation: Operation, ins: Tensor, factors: Factors) -> Tensor:
        """A row is the vectors of its stretches, one after the other."""
        vectors = self._vectors("A", operation, factors)
        return vectors.reshape(self.rank(operation), -1)[:, ins.to(vectors.device)]

    def _vectors(self, name: str, operation: Operation, factors: Factors) -> Tensor:
        """The vector of every stretch, (stretches, V)."""
        views = [view for key, view in operation.factors.items() if key == "bank" or key.startswith(name)]

        def make() -> Tensor:
            bank_NV = whole(operation, "bank", factors)
            indices, weights_SK = self._chosen(name, operation, factors)
            return (weights_SK[:, :, None] * bank_NV[indices]).sum(1)

        return factors.made(f"vblora {operation.numbers['topk']}", views, make)

    def _chosen(self, name: str, operation: Operation, factors: Factors) -> tuple[Tensor, Tensor]:
        """Positions in the bank and weights, (stretches, k) each."""
        import torch

        if name in operation.factors:
            logits, indices = whole(operation, name, factors).topk(int(operation.numbers["topk"]), dim=1)
            return indices, torch.softmax(logits, dim=1)
        first = whole(operation, name + WEIGHTS, factors)
        weights = torch.cat([first, 1 - first.sum(1, keepdim=True)], dim=1)
        indices = whole(operation, name + INDICES, factors)
        return checked(indices, operation.factors["bank"].shape[0], operation), weights


class VbLora(Method):
    """Factors: `vblora_logits_A` (r, in / V, N), `vblora_logits_B` (out / V, r, N), or of each `_topk_indices` (.., k)
    and `_topk_weights` (.., k - 1); of all modules `vblora_vector_bank` (N, V)."""

    title = "VB-LoRA"
    paper = "arXiv:2405.15179"
    only = "vblora"
    known = Known(
        read=frozenset({"topk"}),
        # Sizes and form, the tensors say.
        no_consequence=frozenset(
            {
                "r", "num_vectors", "vector_length", "save_only_topk_weights", "vblora_dropout",
                "init_vector_bank_bound", "init_logits_std",
            }
        ),
    )  # fmt: skip
    modules = (
        slots(" ".join(LOGITS)),
        slots(" ".join(name + what for name in LOGITS for what in (INDICES, WEIGHTS))),
    )
    shared = frozenset({"vblora_vector_bank"})
    positions = frozenset(name + INDICES for name in LOGITS)
    formulas = MappingProxyType({"vblora": Mixtures()})
    layers = "Linear, Conv1D"
    local = "the same elements"

    def shape(self, module: ModuleFactors) -> Sizes:
        """A matrix's: how long vectors are, only the bank says."""
        return None, None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one product."""
        bank = module.matrix("vblora_vector_bank")
        factors, stretches = {"bank": bank}, []
        for name in LOGITS:
            views, shape = self._mixture(module, name, bank.shape[0])
            factors |= views
            stretches.append(shape)
        (rank, ins), (outs, also_rank) = stretches
        if rank != also_rank:
            raise module.mismatch(f"the ranks of its factors, {rank:,} and {also_rank:,}, differ")
        transposed = module.transposed(outs * bank.shape[1], ins * bank.shape[1])
        topk = fields.number(module.config, "topk", 2, whole=True)
        if topk > bank.shape[0]:
            raise module.mismatch(f"`topk` is {topk:,}, and the bank has {bank.shape[0]:,} vectors")
        numbers = {"scaling": 1.0, "topk": float(topk), "rank": float(rank)}
        yield module.change("vblora", factors, numbers, transposed=transposed)

    def _mixture(self, module: Module, name: str, size: int) -> tuple[dict[str, FactorView], tuple[int, int]]:
        """The factors of A or of B, and the first two axes that they have in the file."""
        letter = name[-1]
        if module.has(name):
            shape = module.info(name).shape
            if len(shape) != 3 or shape[2] != size:
                raise module.mismatch(f"`{name}` has shape {list(shape)}, the bank {size:,} vectors")
            return {letter: module.matrix(name, shape[0] * shape[1])}, (shape[0], shape[1])
        indices, weights = module.info(name + INDICES).shape, module.info(name + WEIGHTS).shape
        if len(indices) != 3 or weights != (*indices[:2], indices[2] - 1):
            raise module.mismatch(f"`{name}` has positions {list(indices)} and weights {list(weights)}")
        count = indices[0] * indices[1]
        views = {letter + what: module.matrix(name + what, count) for what in (INDICES, WEIGHTS)}
        return views, (indices[0], indices[1])
