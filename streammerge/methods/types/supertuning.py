"""Super-tuning: the largest elements of the weight, trained (arXiv:2607.09287), and with them a LoRA (Supra).

`W'.flat[indices] = W.flat[indices] + values`, and `+ lora_alpha / r * B @ A` where the file has those. Indices that are
not saved are those of the elements of largest magnitude, or, not `select_top`, of smallest, in their order: that of
`torch.topk` on the stored weight, as PEFT finds them when it loads the file. Of elements of one magnitude, of which a
bfloat16 base has many, neither file tells which is which (PEFT `tuners/supertuning/layer.py`, 0.21).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from streammerge.core.tensors import FactorView, Operation
from streammerge.methods import fields
from streammerge.methods.base import AbsoluteFormula, CutOperation, Factors, Locality, Region, refuse_part
from streammerge.methods.fields import Known
from streammerge.methods.lowrank import FLOAT64, LowRank
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.sparse import Sparse, pack, scattered, sparse_memory
from streammerge.names.pieces import Cut, Sizes

if TYPE_CHECKING:
    from torch import Tensor

COPIES = 5
"""Times the matrix in float64 while its elements are ranked: magnitudes, and torch's pairs of these and positions."""


class Largest(AbsoluteFormula):
    """Factors: `values` (N), or none, and of a LoRA `left` (O, K) and `right` (K, I), or none; numbers: `largest`, 1
    or 0, and `scaling` of the LoRA."""

    title = "W[largest elements] + values"

    def locality(self, operation: Operation) -> Locality:
        """To know the largest elements all must be seen."""
        return Locality.MATRIX

    def cut(self, operation: Operation, cut: Cut) -> CutOperation:
        """All of it."""
        if not (cut.whole_rows and cut.whole_cols):
            raise refuse_part(operation, "all elements, to know the largest")
        return cut.turned(operation.place.transposed), operation.factors

    def memory(self, operation: Operation, tile: tuple[int, int]) -> int:
        """Positions, values, both factors, and three copies of the tile."""
        factors = sum(view.shape[0] * view.shape[-1] for name, view in operation.factors.items() if name != "values")
        return sparse_memory(operation) + FLOAT64 * (2 * factors + 3 * tile[0] * tile[1])

    def state_memory(self, operation: Operation) -> int:
        """The magnitudes, ranked."""
        rows, cols = operation.place.shape
        return COPIES * FLOAT64 * rows * cols

    def prepare(self, operation: Operation, weight: Tensor, factors: Factors) -> Any:
        """Positions in the flat weight (out, in), and values, as `pack` has them."""
        import torch

        values = factors.vector(operation.factors["values"])
        scores = (weight.T if operation.place.transposed else weight).abs().flatten()
        largest = bool(operation.numbers["largest"])
        _, flat = torch.topk(scores, k=len(values), largest=largest)
        return pack(flat, values)

    def apply(self, operation: Operation, region: Region, weight: Tensor, state: Any, factors: Factors) -> Tensor:
        """The values of a region, and what the LoRA adds."""
        import torch

        rows, cols = (torch.arange(*ends, device=weight.device) for ends in (region.rows, region.cols))
        transposed = operation.place.transposed
        outs, ins = (cols, rows) if transposed else (rows, cols)
        delta = scattered(state, outs, ins, operation.place.shape[0 if transposed else 1]).to(factors.dtype)
        if "left" in operation.factors:
            left, right = operation.factors["left"], operation.factors["right"]
            rank = left.shape[1]
            product = (
                factors.kept(left, (0, left.shape[0]), (0, rank))[outs]
                @ (factors.kept(right, (0, rank), (0, right.shape[1]))[:, ins])
            )
            delta += operation.numbers["scaling"] * product
        return weight + (delta.T if transposed else delta)


class Supertuning(Method):
    """Factors: `supertuning_values` (N), `supertuning_indices` (N) or none, `supertuning_lora_A` (r, in) and
    `supertuning_lora_B` (out, r) or neither."""

    title = "Super-tuning"
    paper = "arXiv:2607.09287"
    only = "supertuning"
    known = Known(
        read=frozenset({"sparsity", "select_top", "lora_alpha"}),
        no_consequence=frozenset({"r", "lora_dropout", "init_weights", "save_precomputed_indices"}),
    )
    modules = (
        slots("supertuning_values", "supertuning_indices"),
        slots("supertuning_values supertuning_lora_A supertuning_lora_B", "supertuning_indices"),
    )
    positions = frozenset({"supertuning_indices"})
    formulas = MappingProxyType(
        {
            "supertuning": Sparse(),
            "supertuning_largest": Largest(),
            "supertuning_lora": LowRank("W + lora_alpha / r * B @ A", ("left", "right")),
        }
    )
    layers = "Linear"
    local = "the same elements; the whole matrix where indices are not saved"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out, in), known where there is a LoRA."""
        have = module.slots
        if "supertuning_lora_A" not in have:
            return None, None
        return have["supertuning_lora_B"].shape[0], have["supertuning_lora_A"].shape[1]

    def effects(self, module: Module) -> Iterator[Effect]:
        """The few elements, then the product; both at once where the elements have to be found."""
        values = module.vector("supertuning_values")
        transposed = module.transposed(*self.shape(module.factors))
        outs, ins = module.sizes[::-1] if transposed else module.sizes
        lora, scaling = self._lora(module)
        sparsity = fields.number(module.config, "sparsity", 0.99)
        if int(outs * ins * (1 - sparsity)) != values.count:
            raise module.mismatch(f"it has {values.count:,} values, its `sparsity` is {sparsity}")
        if not module.has("supertuning_indices"):
            numbers = {"largest": float(fields.flag(module.config, "select_top", True)), "scaling": scaling}
            factors = {"values": values, **lora}
            yield module.change("supertuning_largest", factors, numbers, transposed=transposed)
            return
        flat = module.vector("supertuning_indices")
        if flat.count != values.count:
            raise module.mismatch(f"it has {values.count:,} values, and {flat.count:,} indices")
        numbers = {"scaling": 1.0, "outs": float(outs), "ins": float(ins)}
        yield module.change("supertuning", {"values": values, "flat": flat}, numbers, transposed=transposed)
        if lora:
            yield module.product("supertuning_lora", lora["left"], lora["right"], scaling)

    def _lora(self, module: Module) -> tuple[dict[str, FactorView], float]:
        """The factors of the product and its scaling, where there is one."""
        if not module.has("supertuning_lora_A"):
            return {}, 0.0
        left, right = module.matrix("supertuning_lora_B"), module.matrix("supertuning_lora_A")
        rank = right.shape[0]
        if left.shape[1] != rank:
            raise module.mismatch("the ranks of its factors differ")
        return {"left": left, "right": right}, fields.number(module.config, "lora_alpha", 2 * rank) / rank
