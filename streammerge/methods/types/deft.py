"""DEFT: a subspace of the outputs taken out and filled anew (PEFT `tuners/deft/layer.py`, 0.21).

`W' = W + Q @ (c * R - F.T @ W)`. With `relu` Q is P and F its positive part; with `qr` both are the orthonormal Q of
P's decomposition, whose signs are those that LAPACK's reflections give, here as in PEFT. c is `alpha / r`, or 1 where
there is no alpha. With `para` nothing is filled in and there is no R.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.errors import ConfigContradictionError
from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import whole
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.probing import Probing
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor

DECOMPOSITIONS = ("relu", "qr")


class Refilled(Probing):
    """Factors: `P` (O, K) and, but for PaRa, `R` (K, I); numbers: `injection`, what R is multiplied with."""

    def __init__(self, decomposition: str) -> None:
        self.orthogonal = decomposition == "qr"
        self.title = "W + Q @ (c * R - Q.T @ W)" if self.orthogonal else "W + P @ (c * R - relu(P).T @ W)"
        self.zero_if = () if self.orthogonal else ("P",)

    def rank(self, operation: Operation) -> int:
        """That of P."""
        return operation.factors["P"].shape[1]

    def probe(self, operation: Operation, factors: Factors) -> Tensor:
        """F."""
        basis = self.spread(operation, factors)
        return basis if self.orthogonal else basis.clamp(min=0)

    def spread(self, operation: Operation, factors: Factors) -> Tensor:
        """Q."""
        import torch

        p_OK = whole(operation, "P", factors)
        if not self.orthogonal:
            return p_OK
        return factors.made("deft", [operation.factors["P"]], lambda: torch.linalg.qr(p_OK)[0])

    def answer(self, operation: Operation, probed_KI: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """`c * R - F.T @ W`."""
        if "R" not in operation.factors:
            return -probed_KI
        return whole(operation, "R", factors)[:, ins] * operation.numbers["injection"] - probed_KI


class Deft(Method):
    """Factors: `deft_P` (out, r) and, without `para`, `deft_R` (r, in)."""

    title = "DEFT"
    paper = "Decompositional Efficient Fine-Tuning for Text-to-Image Models, NeurIPS 2025"
    only = "deft"
    known = Known(
        read=frozenset({"decomposition_method", "alpha", "para"}),
        no_consequence=frozenset({"r", "init_scale", "deft_dropout", "init_weights"}),
    )
    modules = (slots("deft_P", "deft_R"),)
    formulas = MappingProxyType({f"deft_{name}": Refilled(name) for name in DECOMPOSITIONS})
    layers = "Linear, Conv1D"
    local = "whole columns, two passes; whole rows of a Conv1D"
    refuses = "weights whose outputs are stored in several tensors"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out, in), the latter where there is an R."""
        into = module.slots["deft_R"].shape[-1] if "deft_R" in module.slots else None
        return module.slots["deft_P"].shape[0], into

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one update."""
        decomposition = module.config.get("decomposition_method", DECOMPOSITIONS[0])
        if decomposition not in DECOMPOSITIONS:
            raise fields.wrong("decomposition_method", decomposition, " or ".join(DECOMPOSITIONS))
        removes = fields.flag(module.config, "para")
        if removes == module.has("deft_R"):
            says = "has a" if removes else "has no"
            reason = f"`{module.name}` {says} `deft_R`, but the config says `para = {str(removes).lower()}`"
            raise ConfigContradictionError(module.keys, reason)
        factors = {"P": module.matrix("deft_P")}
        out, rank = factors["P"].shape
        if not removes:
            factors["R"] = module.matrix("deft_R")
            if factors["R"].shape[0] != rank:
                raise module.mismatch("the ranks of `deft_P` and `deft_R` differ")
        if rank > out:
            raise module.mismatch(f"`deft_P` has {rank:,} directions for {out:,} outputs")
        transposed = module.transposed(out, None if removes else factors["R"].shape[1])
        alpha = fields.number(module.config, "alpha", None)
        numbers = {"injection": alpha / rank if alpha else 1.0}
        yield module.change(f"deft_{decomposition}", factors, numbers, transposed=transposed)
