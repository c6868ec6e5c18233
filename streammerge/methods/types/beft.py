"""BEFT: a vector on the bias, `b' = b + d` (arXiv:2509.15974; PEFT `tuners/beft/layer.py`, 0.21)."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType

from streammerge.methods.fields import Known
from streammerge.methods.lowrank import VectorDelta
from streammerge.methods.method import Method, slots
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors
from streammerge.names.pieces import Sizes


class Shift(VectorDelta):
    """Factors: `delta` (R); numbers: `scaling`."""

    title = "b + d"
    zero_if = ("delta",)


class Beft(Method):
    """Factors: `beft_bias` (1, out)."""

    title = "BEFT"
    paper = "arXiv:2509.15974"
    only = "beft"
    known = Known(no_consequence=frozenset({"init_weights"}))
    modules = (slots("beft_bias"),)
    formulas = MappingProxyType({"beft": Shift()})
    layers = "Linear with a bias"
    local = "the same elements"
    refuses = "modules without a bias"

    def parameters(self, module: ModuleFactors) -> tuple[str, ...]:
        """The bias; the weight only to say that there is none."""
        return "bias", "weight"

    def shape(self, module: ModuleFactors) -> Sizes:
        """(out,)."""
        return (module.slots["beft_bias"].count,)

    def effects(self, module: Module) -> Iterator[Effect]:
        """The one sum."""
        delta = module.vector("beft_bias")
        if not module.target.name.endswith("bias"):
            raise module.refused("the adapter shifts its bias, and the base has none, so PEFT does not merge it either")
        if module.target.shape != delta.shape:
            raise module.mismatch(f"`beft_bias` has {delta.count:,} values")
        yield module.change("beft", {"delta": delta}, {"scaling": 1.0})
