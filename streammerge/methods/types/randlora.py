"""RandLoRA: `W + scaling * B @ A'`, of full rank, A and B random and the same for all modules (Albert et al. 2025,
arXiv:2502.00987; PEFT `tuners/randlora/layer.py` and `model.py`, as of 0.21.2).

With m the smaller of in and out and M the larger one, `A' [(i, j), x] = lambda[i, j] * A[i, 0, x] * gamma[j, x]` is
(r n, m), and B (M, (j, i)); so PEFT flattens them, in orders that differ, and multiplies; trained is what that makes.
The product is (M, m), which is the delta or its transpose. Each module takes the first m of A and the first M and n of
B, n being the columns of its lambda. The scaling is alpha over r.

Files hold A and B unless `save_projection` is false: then they are drawn again as PEFT does on the CPU, from
`projection_prng_key`, A first: uniform in bfloat16 (float16 on a trainer's machine without it, which no file tells), B
in n blocks; or, `sparse`, -1, 0 or 1 in float32 (each sign with probability 1/6, if `very_sparse` 1/(2 sqrt(m))). Both
are divided by their standard deviation and rounded to the base's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammerge.core.tensors import Operation
from streammerge.methods import fields
from streammerge.methods.base import Factors
from streammerge.methods.blockwise import whole
from streammerge.methods.composed import Composed, lines_of
from streammerge.methods.drawn import every, linear_sizes, rounded, seed_of, the_one_dtype
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.names.pieces import Sizes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOAT32 = 4
DRAWN_COPIES = 4
"""Of the projections, while they are drawn, made sparse and divided."""
DENSE, SPARSE, VERY_SPARSE = 0, 1, 2
LEAST_SPARSITY = 3


class FullRank(Composed):
    """Factors: `lambda` (r, n), `gamma` (n, all m); saved `A` (r, all m) and `B` (all M, all n * r). Numbers: `outs`
    and `ins` of the module; without `A` and `B` what they are drawn from: `seed`, `kind`, `smaller`, `larger`."""

    title = "W + scaling * B @ (lambda * A * gamma)"
    zero_if = ("lambda", "gamma", "A", "B")

    def rank(self, operation: Operation) -> int:
        """r n."""
        return operation.factors["lambda"].count

    def state_memory(self, operation: Operation) -> int:
        """The projections, where they are drawn."""
        if "A" in operation.factors:
            return 0
        rank = operation.factors["lambda"].shape[0]
        smaller, larger = operation.numbers["smaller"], operation.numbers["larger"]
        return int(DRAWN_COPIES * FLOAT32 * (rank * smaller + larger * rank * math.ceil(smaller / rank)))

    def left(self, operation: Operation, outs: Tensor, factors: Factors) -> Tensor:
        """B, or A' transposed where there are fewer outputs than inputs."""
        if self._small_ins(operation):
            return self._large(operation, outs, factors)
        return self._small(operation, outs, factors).T

    def right(self, operation: Operation, ins: Tensor, factors: Factors) -> Tensor:
        """A', or B transposed."""
        if self._small_ins(operation):
            return self._small(operation, ins, factors)
        return self._large(operation, ins, factors).T

    def _small_ins(self, operation: Operation) -> bool:
        return operation.numbers["ins"] <= operation.numbers["outs"]

    def _small(self, operation: Operation, lines: Tensor, factors: Factors) -> Tensor:
        """Columns of A', (r n, L)."""
        lambda_RN = whole(operation, "lambda", factors)
        gamma_NL = lines_of("gamma", operation, lines, factors, axis=1)[: lambda_RN.shape[1]]
        if "A" in operation.factors:
            a_RL = lines_of("A", operation, lines, factors, axis=1)
        else:
            a_RL = self._drawn(operation, factors)[0][:, lines.cpu()].to(lambda_RN)
        return (lambda_RN[:, :, None] * a_RL[:, None, :] * gamma_NL[None]).reshape(-1, len(lines))

    def _large(self, operation: Operation, lines: Tensor, factors: Factors) -> Tensor:
        """Rows of B, (L, n r)."""
        width = self.rank(operation)
        if "B" in operation.factors:
            return lines_of("B", operation, lines, factors, axis=0)[:, :width]
        rows = self._drawn(operation, factors)[1][lines.cpu()]
        return rows.flatten(1)[:, :width].to(whole(operation, "lambda", factors))

    def _drawn(self, operation: Operation, factors: Factors) -> tuple[Tensor, ...]:
        """A (r, all m) and B (all M, all n, r), float32 on the CPU."""
        rank = operation.factors["lambda"].shape[0]
        numbers = tuple(int(operation.numbers[name]) for name in ("seed", "kind", "smaller", "larger"))
        key = ("randlora", rank, operation.rounding, *numbers)
        return factors.drawn(key, lambda: _draw(rank, operation.rounding, *numbers))


def _draw(rank: int, dtype: str, seed: int, kind: int, smaller: int, larger: int) -> tuple[Tensor, ...]:
    """A and B of all modules."""
    import torch

    generator = torch.Generator("cpu").manual_seed(seed)
    blocks = math.ceil(smaller / rank)
    if kind == DENSE:
        a = _uniform((rank, 1, smaller), generator)
        b = torch.cat([_uniform((larger, 1, rank), generator) for _ in range(blocks)], dim=1)
    else:
        sparsity = math.sqrt(smaller) if kind == VERY_SPARSE else LEAST_SPARSITY
        a = _signs(torch.rand((rank, 1, smaller), generator=generator), sparsity)
        b = _signs(torch.rand((larger, blocks, rank), generator=generator), sparsity)
    return rounded((a / a.std()).float(), dtype)[:, 0], rounded((b / b.std()).float(), dtype)


def _uniform(shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """torch's `kaiming_uniform_` with `a = sqrt(5)`, in bfloat16: the bound is one over the root of all but the first
    axis."""
    import torch

    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(shape[1] * shape[2]))
    return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def _signs(uniform: Tensor, sparsity: float) -> Tensor:
    """-1 and 1 where a number in [0, 1) is near one of the ends, 0 elsewhere."""
    share = 1 / (2 * sparsity)
    return (uniform > 1 - share).float() - (uniform < share).float()


class RandLora(Method):
    """Factors: `randlora_lambda` (r, n), `randlora_gamma` (n, m); of all modules `randlora_A` (r, 1, largest m) and
    `randlora_B` (largest M, most n, r)."""

    title = "RandLoRA"
    paper = "arXiv:2502.00987"
    only = "randlora"
    known = Known(
        read=frozenset({"r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse"}),
        no_consequence=frozenset({"randlora_dropout", "init_weights"}),
    )
    modules = (slots("randlora_lambda randlora_gamma"),)
    shared = frozenset({"randlora_A", "randlora_B"})
    duplicates = shared
    formulas = MappingProxyType({"randlora": FullRank()})
    layers = "Linear, Conv1D"
    local = "the same elements"
    refuses = "projections that are not saved, where the base's modules have several dtypes"

    def shape(self, module: ModuleFactors) -> Sizes:
        """A matrix's: only the smaller of its sizes is known, and not which it is."""
        return None, None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one product."""
        factors = {"lambda": module.matrix("randlora_lambda"), "gamma": module.matrix("randlora_gamma")}
        rank, blocks = factors["lambda"].shape
        out, into, transposed = linear_sizes(module)
        smaller, larger = sorted((out, into))
        if factors["gamma"].shape[0] < blocks or factors["gamma"].shape[1] != smaller:
            shape = list(module.info("randlora_gamma").shape)
            raise module.mismatch(f"`randlora_gamma` has shape {shape}, `randlora_lambda` {[rank, blocks]}")
        scaling = fields.number(module.config, "randlora_alpha", 640) / rank
        numbers = {"scaling": scaling, "outs": float(out), "ins": float(into)}
        rounding = ""
        if fields.flag(module.config, "save_projection", default=True) or "randlora_A" in module.shared:
            factors |= {name: module.matrix(f"randlora_{name}") for name in "AB"}
            a, b = (module.info(f"randlora_{name}").shape for name in "AB")
            fits = len(a) == len(b) == 3 and a[:2] == (rank, 1) and b[2] == rank
            if not fits or a[2] < smaller or b[0] < larger or b[1] < blocks:
                raise module.mismatch(f"`randlora_A` {list(a)} and `randlora_B` {list(b)} do not reach")
        else:
            numbers |= _drawn_from(module)
            rounding = the_one_dtype(module)
        target, operation = module.change("randlora", factors, numbers, transposed=transposed)
        yield target, replace(operation, rounding=rounding)


def _drawn_from(module: Module) -> dict[str, float]:
    """What the projections are drawn from."""
    sizes = [linear_sizes(one) for one in every(module, "randlora_lambda")]
    widest = max(out for out, _, _ in sizes), max(into for _, into, _ in sizes)
    very, sparse = (fields.flag(module.config, name) for name in ("very_sparse", "sparse"))
    return {
        "seed": seed_of(module, "projection_prng_key", 0),
        "kind": float(VERY_SPARSE if very else SPARSE if sparse else DENSE),
        "smaller": float(min(widest)),
        "larger": float(max(widest)),
    }
