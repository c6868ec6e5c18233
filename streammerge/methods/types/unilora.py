"""Uni-LoRA: `W + B @ A`, every element of A and B one of a few trained numbers, times its share (arXiv:2506.00799; PEFT
`tuners/unilora/layer.py` and `model.py`, as of 0.21.2). There is no scaling.

`A = theta[indices_A] * scales_A`, and B alike. An adapter saved without its indices holds nothing but theta: not even
which modules are adapted, whose order of definition the indices would have to be drawn in. Such a file is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.errors import NotMergeableError
from streammerge.core.tensors import Operation
from streammerge.methods.base import Factors
from streammerge.methods.composed import Composed, checked, lines_of
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.reading import AdapterInput

if TYPE_CHECKING:
    from torch import Tensor

SLOTS = ("indices_A", "indices_B", "scales_A", "scales_B")


class Looked(Composed):
    """Factors: `theta` (L), `indices_A` and `scales_A` (K, I), `indices_B` and `scales_B` (O, K)."""

    title = "W + (theta[indices_B] * scales_B) @ (theta[indices_A] * scales_A)"
    zero_if = ("theta", "scales_A", "scales_B")

    def rank(self, operation: Operation) -> int:
        """r, twice: indices are read beside values."""
        return 2 * operation.factors["indices_A"].shape[0]

    def left(self, operation: Operation, outs: Tensor, factors: Factors) -> Tensor:
        """B."""
        return _looked("B", operation, outs, factors, axis=0)

    def right(self, operation: Operation, ins: Tensor, factors: Factors) -> Tensor:
        """A."""
        return _looked("A", operation, ins, factors, axis=1)


def _looked(name: str, operation: Operation, lines: Tensor, factors: Factors, *, axis: int) -> Tensor:
    """Rows or columns of A or B."""
    theta_L = factors.vector(operation.factors["theta"])
    indices = lines_of(f"indices_{name}", operation, lines, factors, axis=axis)
    scales: Tensor = lines_of(f"scales_{name}", operation, lines, factors, axis=axis)
    return theta_L[checked(indices, len(theta_L), operation)] * scales


class UniLora(Method):
    """Factors: `unilora_indices_A` and `unilora_scales_A` (r, in), `unilora_indices_B` and `unilora_scales_B` (out, r);
    of all modules `unilora_theta_d` (L)."""

    title = "Uni-LoRA"
    paper = "arXiv:2506.00799"
    only = "unilora"
    known = Known(
        read=frozenset({"save_indices"}),
        # What the indices were drawn from; they are saved.
        no_consequence=frozenset(
            {"r", "proj_seed", "theta_d_length", "unilora_dropout", "init_theta_d_bound", "init_weights"}
        ),
    )
    modules = (slots(" ".join(f"unilora_{name}" for name in SLOTS)),)
    shared = frozenset({"unilora_theta_d"})
    positions = frozenset({"unilora_indices_A", "unilora_indices_B"})
    formulas = MappingProxyType({"unilora": Looked()})
    layers = "Linear, Conv1D"
    local = "the same elements"
    refuses = "adapters saved without their indices: they do not say which modules they adapt"

    def check(self, adapter: AdapterInput) -> None:
        """Refuse an adapter without indices."""
        if not any("unilora_indices_A" in module.slots for module in adapter.parts.modules):
            reason = "the adapter was saved without its indices: it does not say which modules it adapts, and in which "
            reason += "order the indices are to be drawn"
            raise NotMergeableError(("save_indices",), reason, "save the adapter with `save_indices=True`")

    def shape(self, module: ModuleFactors) -> tuple[int, int]:
        """(out, in)."""
        return module.slots["unilora_indices_B"].shape[0], module.slots["unilora_indices_A"].shape[1]

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one product."""
        factors = {name: module.matrix(f"unilora_{name}") for name in SLOTS}
        shapes = {name: view.shape for name, view in factors.items()}
        same = all(shapes[f"indices_{name}"] == shapes[f"scales_{name}"] for name in "AB")
        if not same or shapes["indices_A"][0] != shapes["indices_B"][1]:
            raise module.mismatch(f"its factors do not go together: {shapes}")
        factors["theta"] = module.vector("unilora_theta_d")
        transposed = module.transposed(shapes["indices_B"][0], shapes["indices_A"][1])
        yield module.change("unilora", factors, {"scaling": 1.0}, transposed=transposed)
