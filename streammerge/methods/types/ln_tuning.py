"""LN tuning: trained norms that take the place of the base's (Zhao et al. 2023, arXiv:2312.11420).

The file holds the norm's parameters as they are after training (PEFT `tuners/ln_tuning/layer.py`, 0.10 to 0.21.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from streammerge.methods.fields import Known
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.names.pieces import Parameter


class LnTuning(Method):
    """Factors: `ln_tuning_layers`, the weight, and `ln_tuning_layers.bias` of modules that have one."""

    title = "LN tuning"
    paper = "arXiv:2312.11420"
    only = "ln_tuning"
    known = Known()
    modules = (slots("ln_tuning_layers", "ln_tuning_layers.bias"),)
    formulas = MappingProxyType({})
    layers = "norms, and any other module without modules of its own"
    local = "the same elements"

    def effects(self, module: Module) -> Iterator[Effect]:
        """New values for the weight, and for the bias."""
        yield self._replaced(module, "ln_tuning_layers", module.target)
        if module.has("ln_tuning_layers.bias"):
            bias = module.bias(module.info("ln_tuning_layers.bias").count)
            if bias is None:
                raise module.refused("the adapter has a bias for it, the base has none")
            yield self._replaced(module, "ln_tuning_layers.bias", bias)

    def _replaced(self, module: Module, slot: str, parameter: Parameter) -> Effect:
        shape = module.info(slot).shape
        if shape != parameter.shape:
            raise module.mismatch(f"`{slot}` has shape {list(shape)}, `{parameter.name}` {list(parameter.shape)}")
        return module.change("values", {"values": module.matrix(slot)}, on=parameter)
