"""TinyLoRA: `W + B @ (sum_i v_i P_i) @ A`, A and B of the base's own decomposition, P random, and v all that is trained
(arXiv:2602.04118; PEFT `tuners/tinylora/layer.py` and `model.py`, as of 0.21.2).

Modules share vectors v in groups. A module's group, and the seed of its P where that is not saved, depend on how many
adapted modules the model defines before it; that no file tells, so it comes from a table of architectures, and an
adapter is refused where that does not have its modules. With one vector for all and P saved nothing depends on it.
P is drawn on the CPU as normal numbers of deviation 1 / sqrt(r), from `projection_seed` plus that number of modules,
and rounded to the dtype of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.errors import IncompleteFactorsError, NotMergeableError
from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import whole
from streammerge.methods.composed import Composed, lines_of
from streammerge.methods.definition_order import in_order
from streammerge.methods.drawn import rounded, seed_of
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors

if TYPE_CHECKING:
    from torch import Tensor

VECTORS = "tinylora_v."


class Tiny(Composed):
    """Factors: `A` (K, I), `B` (O, K), `v` (U), and saved `P` (U, K * K); numbers, without it: `seed`; then `rounding`
    is the dtype that P is rounded to."""

    title = "W + B @ (sum_i v_i P_i) @ A"
    zero_if = ("A", "B", "v", "P")

    def rank(self, operation: Operation) -> int:
        """r."""
        return operation.factors["A"].shape[0]

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """P as well, where it is drawn."""
        return super().memory(operation, tile) + 2 * FLOAT64 * operation.factors["v"].count * self.rank(operation) ** 2

    def left(self, operation: Operation, outs: Tensor, factors: Factors) -> Tensor:
        """B, the mixed matrix behind it."""
        mixed = factors.made("tinylora", tuple(operation.factors.values()), lambda: self._mixed(operation, factors))
        return lines_of("B", operation, outs, factors, axis=0) @ mixed

    def right(self, operation: Operation, ins: Tensor, factors: Factors) -> Tensor:
        """A."""
        return lines_of("A", operation, ins, factors, axis=1)

    def _mixed(self, operation: Operation, factors: Factors) -> Tensor:
        """`sum_i v_i P_i`, (K, K)."""
        v_U, rank = factors.vector(operation.factors["v"]), self.rank(operation)
        flat = whole(operation, "P", factors) if "P" in operation.factors else self._drawn(operation).to(v_U)
        return (v_U @ flat).view(rank, rank)

    def _drawn(self, operation: Operation) -> Tensor:
        """P, (U, K * K)."""
        import torch

        count, rank = operation.factors["v"].count, self.rank(operation)
        generator = torch.Generator("cpu").manual_seed(int(operation.numbers["seed"]))
        values = torch.normal(mean=0.0, std=1.0 / (rank**0.5), size=(count, rank, rank), generator=generator)
        return rounded(values, operation.rounding).flatten(1)


class TinyLora(Method):
    """Factors: `tinylora_A` (r, in), `tinylora_B` (out, r), for an embedding (r, dimensions) and (vocabulary, r);
    `tinylora_P` (u, r, r); of all modules `tinylora_v.<group>` (u)."""

    title = "TinyLoRA"
    paper = "arXiv:2602.04118"
    only = "tinylora"
    known = Known(
        read=frozenset({"weight_tying", "projection_seed", "save_projection"}),
        no_consequence=frozenset({"r", "u", "tinylora_dropout", "init_v_bound", "init_weights"}),
    )
    modules = (slots("tinylora_A tinylora_B", "tinylora_P"),)
    shared = frozenset({"tinylora_v"})
    formulas = MappingProxyType({"tinylora": Tiny()})
    layers = "Linear, Conv1D, Embedding"
    local = "the same elements"
    refuses = "architectures whose order of definition is not known, but for one vector and saved projections"

    def shape(self, module: ModuleFactors) -> tuple[int, int]:
        """(out, in)."""
        return module.slots["tinylora_B"].shape[0], module.slots["tinylora_A"].shape[1]

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one product."""
        factors = {name: module.matrix(f"tinylora_{name}") for name in "AB"}
        saved = module.has("tinylora_P")
        groups = _groups(module)
        order = [] if saved and groups == 1 else _order(module)
        vector = _vector(module, order, groups)
        factors["v"] = module.vector(vector)
        rank, numbers, rounding = factors["A"].shape[0], {"scaling": 1.0}, ""
        if saved:
            factors["P"] = module.matrix("tinylora_P")
        else:
            numbers["seed"] = seed_of(module, "projection_seed", 42) + order.index(module.name)
            rounding = module.target.dtype
        wanted = (factors["v"].count, rank * rank)
        if factors["B"].shape[1] != rank or (saved and factors["P"].shape != wanted):
            said = {slot: list(info.shape) for slot, info in module.factors.slots.items()}
            raise module.mismatch(f"its factors do not go together: {said}, `{vector}` of {wanted[0]:,}")
        transposed = module.transposed(factors["B"].shape[0], factors["A"].shape[1])
        target, operation = module.change("tinylora", factors, numbers, transposed=transposed)
        yield target, replace(operation, rounding=rounding)


def _adapted(module: Module) -> list[str]:
    """The paths of all adapted modules, as the file names them."""
    return [one.module for one in module.adapter.parts.modules if "tinylora_A" in one.slots]


def _order(module: Module) -> list[str]:
    """All adapted modules in the order of their definition. Raises NotMergeableError where that is not known."""
    order = in_order(_adapted(module), module.base.architecture)
    if order is None:
        architecture = module.base.architecture
        where = f"of {architecture.name}" if architecture else "of this base"
        reason = f"`{module.name}`: which vector and which seed are its own depends on the order in which the modules "
        reason += f"{where} are defined, which is not known"
        hint = "train with `weight_tying=1.0` and `save_projection=True`, or merge with PEFT"
        raise NotMergeableError(module.keys, reason, hint)
    return order


def _groups(module: Module) -> int:
    """How many vectors the modules share."""
    tying = float(fields.number(module.config, "weight_tying", 0.0))
    if not 0 <= tying <= 1:
        raise fields.wrong("weight_tying", tying, "a number from 0 to 1")
    return max(1, round(len(_adapted(module)) * (1.0 - tying)))


def _vector(module: Module, order: list[str], groups: int) -> str:
    """The slot of the module's vector."""
    each = max(1, len(order) // groups)
    group = min(order.index(module.name) // each, groups - 1) if groups > 1 else 0
    if VECTORS + str(group) not in module.shared:
        raise IncompleteFactorsError(module.keys, f"`{module.name}` is of group {group}, and there is no such vector")
    return VECTORS + str(group)
