"""VeRA: `W + diag(b) @ B @ diag(d) @ A`, A and B random and the same for all modules (Kopiczko et al. 2023,
arXiv:2310.11454); and PVeRA, whose A and d also make a variance, in their second halves (arXiv:2512.07703).

A and B have the sizes of the widest of all adapted modules; each takes its first columns and rows. Files hold them
unless `save_projection` is false: then they are drawn again, as PEFT does on the CPU: from `projection_prng_key`, A
(r, widest input) and then B (widest output, r), each uniform within `sqrt(6 / columns)`, and rounded to the dtype of
the base (PEFT `tuners/vera/model.py` and `tuners/pvera/model.py`, as of 0.21.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, ClassVar

from streammerge.core.lines import Lines
from streammerge.core.tensors import FactorView, Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors, Formula
from streammerge.methods.composed import Composed
from streammerge.methods.drawn import largest, rounded, seed_of, the_one_dtype
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import LowRank
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    from torch import Tensor

TITLE = "W + diag(b) @ B @ diag(d) @ A"
FLOAT32 = 4
DRAWN_COPIES = 3
"""Of the projections, while they are drawn and rounded."""


class DrawnProjections(Composed):
    """Factors: `b` (O), `d` (K). Numbers: `seed`, `drawn`, the rows of A, K of which are used, and `outs` and `ins`,
    the sizes of the widest module; `rounding` is the dtype the projections are rounded to."""

    title = f"{TITLE}, A and B drawn from a seed"
    zero_if = ("b", "d")

    def rank(self, operation: Operation) -> int:
        """As many as `d` has values."""
        return operation.factors["d"].shape[0]

    def state_memory(self, operation: Operation) -> int:
        """The projections, drawn once."""
        numbers = operation.numbers
        count = numbers["drawn"] * numbers["ins"] + numbers["outs"] * self.rank(operation)
        return DRAWN_COPIES * FLOAT32 * int(count)

    def left(self, operation: Operation, outs: Tensor, factors: Factors) -> Tensor:
        """`diag(b) @ B`."""
        b_O = factors.vector(operation.factors["b"])
        rows = self._projections(operation, factors)[1][outs].to(b_O)
        return rows * b_O[outs.to(b_O.device)][:, None]

    def right(self, operation: Operation, ins: Tensor, factors: Factors) -> Tensor:
        """`diag(d) @ A`."""
        d_K = factors.vector(operation.factors["d"])
        return self._projections(operation, factors)[0][: len(d_K), ins].to(d_K) * d_K[:, None]

    def _projections(self, operation: Operation, factors: Factors) -> tuple[Tensor, ...]:
        """A and B, float32 on the CPU."""
        numbers = {name: int(number) for name, number in operation.numbers.items() if name != "scaling"}
        rank, rounding = self.rank(operation), operation.rounding

        def draw() -> tuple[Tensor, ...]:
            import torch

            generator = torch.Generator("cpu").manual_seed(numbers["seed"])
            made = []
            for shape in ((numbers["drawn"], numbers["ins"]), (numbers["outs"], rank)):
                bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
                values = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
                made.append(rounded(values, rounding))
            return tuple(made)

        return factors.drawn(("vera", rank, rounding, *sorted(numbers.items())), draw)


class Vera(Method):
    """Factors: `vera_lambda_b` (out), `vera_lambda_d` (r); of all modules `vera_A` (r, widest input) and `vera_B`
    (widest output, r)."""

    title = "VeRA"
    paper = "arXiv:2310.11454"
    only = "vera"
    halved: ClassVar[bool] = False
    """Whether the second halves of A and d are of no consequence."""
    known = Known(
        read=frozenset({"projection_prng_key", "save_projection"}),
        no_consequence=frozenset({"r", "vera_dropout", "d_initial", "init_weights"}),
    )
    modules = (slots("vera_lambda_b vera_lambda_d"),)
    shared = frozenset({"vera_A", "vera_B"})
    formulas: ClassVar[Mapping[str, Formula]] = MappingProxyType(
        {
            "vera": LowRank(TITLE, ("left", "right", "rows", "middle", "cols")),
            "vera_drawn": DrawnProjections(),
        }
    )
    layers = "Linear, Conv1D"
    local = "the same elements"
    refuses = "projections that are not saved, where the base's modules have several dtypes"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out, in), of which the outputs are known."""
        return module.slots[f"{self.only}_lambda_b"].count, None

    def effects(self, module: Module) -> Iterator[Effect]:
        """One product with diagonals in it."""
        name = self.only
        b = module.vector(f"{name}_lambda_b")
        d = self._used(module.vector(f"{name}_lambda_d"))
        out, into = _sizes(module, b.shape[0])
        if fields.flag(module.config, "save_projection", default=True) or f"{name}_A" in module.shared:
            left, right = module.matrix(f"{name}_B"), self._used(module.matrix(f"{name}_A"))
            if left.shape[0] < out or right.shape[1] < into or not left.shape[1] == right.shape[0] == d.shape[0]:
                shapes = f"`{name}_A` {list(right.shape)} and `{name}_B` {list(left.shape)}"
                raise module.mismatch(f"{shapes} do not reach, or are not of its rank {d.shape[0]:,}")
            left, right = left.cut(0, Lines(0, out)), right.cut(1, Lines(0, into))
            yield module.product(name, left, right, 1.0, vectors={"rows": b, "middle": d})
            return
        widest = largest(module, f"{name}_lambda_b", _sizes)
        numbers = {
            "scaling": 1.0,
            "seed": seed_of(module, "projection_prng_key", 0),
            "drawn": float(d.shape[0] * (2 if self.halved else 1)),
            "outs": float(widest[0]),
            "ins": float(widest[1]),
        }
        transposed = module.transposed(out, into)
        target, operation = module.change(f"{name}_drawn", {"b": b, "d": d}, numbers, transposed=transposed)
        yield target, replace(operation, rounding=the_one_dtype(module))

    def _used(self, view: FactorView) -> FactorView:
        """The first half of a factor, where the other one makes a variance."""
        return view.cut(0, Lines(0, view.shape[0] // 2)) if self.halved else view


class PVera(Vera):
    """Factors: `pvera_lambda_b` (out), `pvera_lambda_d` (2 r); of all modules `pvera_A` (2 r, widest input) and
    `pvera_B` (widest output, r)."""

    title = "PVeRA"
    paper = "arXiv:2512.07703"
    only = "pvera"
    halved = True
    known = Known(
        read=frozenset({"projection_prng_key", "save_projection"}),
        # Merged is the mean, whatever the forward pass samples.
        no_consequence=frozenset(
            {"r", "pvera_dropout", "d_initial", "init_weights", "sample_at_inference", "generator_seed"}
        ),
    )
    modules = (slots("pvera_lambda_b pvera_lambda_d"),)
    shared = frozenset({"pvera_A", "pvera_B"})
    formulas = MappingProxyType(
        {
            "pvera": LowRank(TITLE, ("left", "right", "rows", "middle", "cols")),
            "pvera_drawn": DrawnProjections(),
        }
    )


def _sizes(module: Module, out: int) -> tuple[int, int]:
    """Outputs and inputs of a linear layer of so many outputs."""
    shape = module.target.shape
    if len(shape) != 2 or out not in shape:
        raise module.mismatch(f"its factors are for {out:,} outputs of a linear layer")
    return out, shape[1] if shape[0] == out else shape[0]
