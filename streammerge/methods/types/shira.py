"""SHiRA: a few trained elements of the weight (Bhardwaj et al. 2024, arXiv:2406.13175).

`W'[rows, cols] = W[rows, cols] + values`; the positions are saved, so neither the mask nor its seed is needed (PEFT
`tuners/shira/layer.py`, 0.17 to 0.21.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from streammerge.methods import fields
from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.methods.sparse import Sparse
from streammerge.names.pieces import Sizes


class Shira(Method):
    """Factors: `shira_weight` (N), `shira_indices` (2, N), int32, or float32 in files written on Windows."""

    title = "SHiRA"
    paper = "arXiv:2406.13175"
    only = "shira"
    known = Known(read=frozenset({"r"}), no_consequence=frozenset({"mask_type", "random_seed", "init_weights"}))
    modules = (slots("shira_weight shira_indices"),)
    positions = frozenset({"shira_indices"})
    formulas = MappingProxyType({"shira": Sparse()})
    layers = "Linear"
    local = "the same elements"

    def shape(self, module: ModuleFactors) -> Sizes:
        """Unknown."""
        return None, None

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one sum."""
        values, shape = module.vector("shira_weight"), module.info("shira_indices").shape
        if shape != (2, values.count):
            raise module.mismatch(f"it has {values.count:,} values, and indices of shape {list(shape)}")
        transposed = module.transposed()
        outs, ins = module.sizes[::-1] if transposed else module.sizes
        rank = fields.number(module.config, "r", 32, whole=True)
        if values.count != rank * (outs + ins):
            raise module.mismatch(f"it has {values.count:,} values, its `r` is {rank:,}")
        factors = {"values": values, "pairs": module.matrix("shira_indices")}
        numbers = {"scaling": 1.0, "outs": float(outs), "ins": float(ins)}
        yield module.change("shira", factors, numbers, transposed=transposed)
