"""HRA: a chain of Householder reflections of the inputs (Yuan et al. 2024, arXiv:2405.17484).

`W' = W (I - 2 u_1 u_1^T / |u_1|^2) (I - 2 u_2 u_2^T / |u_2|^2) ...`, or, with `apply_GS`, `W (I - 2 Q Q^T)` with the
u orthonormalised by Gram and Schmidt (PEFT `tuners/hra/layer.py`, 0.13 to 0.21.2). A kernel is taken as one row.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.rotation import Rotation
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor


class Householder(Rotation):
    """Factors: `u` (I, K); numbers: `orthogonal`, 1 for Gram-Schmidt."""

    title = "W (I - 2 u u^T / |u|^2) ..."

    def turned(self, operation: Operation, weight_TI: Tensor, outs: Tensor, factors: Factors) -> Tensor:
        """One reflection after the other; orthonormal ones all at once."""
        view = operation.factors["u"]
        u_IK = factors.kept(view, (0, view.shape[0]), (0, view.shape[1]))
        if operation.numbers["orthogonal"]:
            import torch

            q_IK, _ = torch.linalg.qr(u_IK)
            reflected: Tensor = weight_TI - 2 * (weight_TI @ q_IK) @ q_IK.T
            return reflected
        for u_I in (u_IK / u_IK.norm(dim=0)).T:
            weight_TI = weight_TI - 2 * (weight_TI @ u_I)[:, None] * u_I[None, :]
        return weight_TI


class Hra(Method):
    """Factors: `hra_u` (in, r)."""

    title = "HRA"
    paper = "arXiv:2405.17484"
    only = "hra"
    known = Known(
        read=frozenset({"apply_GS"}), no_consequence=frozenset({"r", "init_weights", "rank_pattern", "alpha_pattern"})
    )
    modules = (slots("hra_u"),)
    formulas = MappingProxyType({"hra": Householder()})
    layers = "Linear, Conv2d"
    local = "whole rows"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out, in), of which the second is known."""
        return None, module.slots["hra_u"].shape[0]

    def effects(self, module: Module) -> Iterator[Effect]:
        """All inputs of every output, those of a kernel's taps among them."""
        reflections = module.matrix("hra_u")
        transposed = module.transposed(into=reflections.shape[0])
        numbers = {"orthogonal": float(fields.flag(module.config, "apply_GS"))}
        yield module.change("hra", {"u": reflections}, numbers, transposed=transposed)
