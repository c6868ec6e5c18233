"""LoHa: `W + scaling * (w1_a @ w1_b) * (w2_a @ w2_b)`, the second `*` element by element (Hyeon-Woo et al. 2021,
arXiv:2108.06098; PEFT `tuners/loha/layer.py`, 0.13 to 0.21.2).

A kernel is either taken as one row for each output, or, with `use_effective_conv2d`, each of the two products has a
core: `sum_ij t[i, j, tap] * a[i, out] * b[j, channel]`; a and b are then stored the other way round, (r, out) and
(r, in). The scaling is alpha over the rank that the factors have.
"""

from __future__ import annotations

import math
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


class Hadamard(Blockwise):
    """Factors, twice, with n = 1 and 2: `wn_a` (O, K) and `wn_b` (K, I), or, with a core `tn` (K * K, taps), `wn_a`
    (K, O) and `wn_b` (K, channels). Numbers: `taps`, the elements of a kernel, 1 without cores."""

    title = "W + scaling * (w1_a @ w1_b) * (w2_a @ w2_b)"
    zero_if = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")

    def block(self, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """The two products, element by element."""
        return self._product("1", operation, outs, ins, factors) * self._product("2", operation, outs, ins, factors)

    def _product(self, n: str, operation: Operation, outs: Tensor, ins: Tensor, factors: Factors) -> Tensor:
        """(O, I)."""
        left, right = whole(operation, f"w{n}_a", factors), whole(operation, f"w{n}_b", factors)
        if f"t{n}" not in operation.factors:
            return left[outs] @ right[:, ins]
        import torch

        rank, taps = left.shape[0], int(operation.numbers["taps"])
        core_KKT = whole(operation, f"t{n}", factors).reshape(rank, rank, taps)
        wide = torch.einsum("ijt,jc->ict", core_KKT, right).reshape(rank, -1)
        return left[:, outs].T @ wide[:, ins]


class LoHa(Method):
    """Factors: `hada_w1_a` (out, r), `hada_w1_b` (r, in x kernel), `hada_w2_a` and `hada_w2_b` alike; with cores
    `hada_t1` and `hada_t2` (r, r, *kernel): (r, out) and (r, in)."""

    title = "LoHa"
    paper = "arXiv:2108.06098"
    only = "loha"
    known = Known(
        read=frozenset({"alpha", "alpha_pattern"}),
        # The ranks and whether there are cores, the shapes say.
        no_consequence=frozenset(
            {"r", "rank_pattern", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
        ),
    )
    modules = (
        slots("hada_w1_a hada_w1_b hada_w2_a hada_w2_b"),
        slots("hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
    )
    formulas = MappingProxyType({"loha": Hadamard()})
    layers = "Linear, Conv1d, Conv2d"
    local = "the same elements"

    def shape(self, module: ModuleFactors) -> tuple[int, int] | None:
        """(out, in) of a linear layer."""
        if "hada_t1" in module.slots:
            return None
        return module.slots["hada_w1_a"].shape[0], module.slots["hada_w1_b"].shape[1]

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one product."""
        names = [slot for slot in module.factors.slots if not slot.startswith("hada_t")]
        factors = {slot.removeprefix("hada_"): module.matrix(slot) for slot in names}
        cores = module.has("hada_t1")
        taps = math.prod(module.info("hada_t1").shape[2:]) if cores else 1
        rank = factors["w1_b"].shape[0]
        if cores:
            factors |= {f"t{n}": module.matrix(f"hada_t{n}", rank * rank) for n in "12"}
        _check(module, {name: view.shape for name, view in factors.items()}, taps, cores=cores)
        alpha = fields.pattern(module.config, "alpha_pattern").value_for(
            module.name, fields.number(module.config, "alpha", 8)
        )
        yield module.change("loha", factors, {"scaling": alpha / rank, "taps": float(taps)})


def _check(module: Module, shapes: dict[str, tuple[int, ...]], taps: int, *, cores: bool) -> None:
    """Refuse factors that do not make the parameter."""
    rows, cols = module.sizes
    rank = shapes["w1_b"][0]
    left, right = ((rank, rows), (rank, cols // taps)) if cores else ((rows, rank), (rank, cols))
    wanted = {"w1_a": left, "w1_b": right, "w2_a": left, "w2_b": right}
    if cores:
        wanted |= {"t1": (rank * rank, taps), "t2": (rank * rank, taps)}
    if cols % taps or shapes != wanted:
        said = ", ".join(f"`hada_{name}` {list(module.info(f'hada_{name}').shape)}" for name in shapes)
        raise module.mismatch(f"its factors do not make that: {said}")
