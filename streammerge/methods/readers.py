"""Reading an adapter of any PEFT type against a base: the way from a file's tensors to operations, the same for all.

What differs is declared by the type's `Method`; LoRA, with stacked experts and decompositions of the base, has a reader
of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from streammerge.core.errors import (
    CompositionError,
    ConfigContradictionError,
    IncompleteFactorsError,
    NotMergeableError,
    UnmatchedKey,
)
from streammerge.core.tensors import MatrixView, Operation, TensorInfo
from streammerge.core.text import printable
from streammerge.methods import FORMULAS, METHODS, fields
from streammerge.methods.full_tensors import read_full_tensors, resolve_full_tensors
from streammerge.methods.lora import read_lora
from streammerge.methods.module import Effect, Module
from streammerge.methods.parts import ModuleFactors, Parts
from streammerge.methods.placing import placed
from streammerge.methods.reading import AdapterInput, BaseView, Contribution
from streammerge.names.pieces import Parameter, suits
from streammerge.names.resolve import Found, Missing, Wanted

_PROMPTS = "it trains inputs or activations, not weights: there is no delta to merge"
NOT_MERGEABLE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(
            ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE"), _PROMPTS
        ),
        "ADAPTION_PROMPT": _PROMPTS,
        "XLORA": "X-LoRA mixes its adapters anew for every token; merge one of its sub-adapters instead",
        "POLY": "it mixes its adapters by task, so there is no one merged weight",
        "LILY": "it routes every token through other factors, so there is no one merged weight",
        "ADAMSS": "its file does not say which outputs its subspaces hold: PEFT lets scikit-learn cluster them anew, "
        "and that depends on its version; merge it with the PEFT and the scikit-learn that it was trained with",
        "SHADOW": "it runs beside the model, so there is no merged weight",
    }
)
"""PEFT types that have no merged weight at all, or none that their files determine, and why."""
SUPPORTED = ("LORA", *METHODS)


def read_adapter(adapter: AdapterInput, base: BaseView) -> Contribution:
    """The contribution of an adapter of any type. Raises what `refuse_type` raises, and AdapterError subclasses for
    what can never be merged."""
    kind = refuse_type(adapter.config)
    return read_lora(adapter, base) if kind == "LORA" else _Reading(kind, adapter, base).contribution()


def refuse_type(config: Mapping[str, Any]) -> str:
    """The PEFT type of a config, in upper case. Raises NotMergeableError for a type that is not merged,
    ConfigContradictionError where there is none."""
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise ConfigContradictionError(("peft_type",), "the adapter's config does not say its `peft_type`")
    kind = kind.upper()
    if kind in NOT_MERGEABLE:
        raise NotMergeableError((f"peft_type = {kind}",), f"{kind} cannot be merged: {NOT_MERGEABLE[kind]}")
    if kind not in SUPPORTED:
        reason = f"{printable(kind)} is not supported yet; supported: {', '.join(SUPPORTED)}"
        raise NotMergeableError((f"peft_type = {kind}",), reason)
    return kind


def positions_of(parts: Parts, kind: str) -> set[str]:
    """The names of the tensors in which an adapter of a type keeps numbers of elements."""
    slots = METHODS[kind].positions if kind in METHODS else frozenset()
    found = [item for module in parts.modules for item in module.slots.items()]
    return {info.name for slot, info in found if _first(slot) in slots}


class _Reading:
    """One adapter of a type that is declared as a `Method`."""

    def __init__(self, kind: str, adapter: AdapterInput, base: BaseView) -> None:
        self.kind, self.adapter, self.base = kind, adapter, base
        method = self.method = METHODS[kind]
        method.known.check(adapter.config, adapter.ignored_fields)
        method.check(adapter)
        self.config = fields.Common(**fields.common(adapter.config, f"{method.only}_only", method.tokens_in))
        self.shared = self._shared()
        self.modules = [module for module in adapter.parts.modules if set(module.slots) - set(self.shared)]

    def contribution(self) -> Contribution:
        """Operations of all modules, and what the adapter brings as a whole."""
        contribution = Contribution(notes=[self.method.note] if self.method.note else [])
        modules = [self._own(module, contribution) for module in self.modules]
        modules = [module for module in modules if module.slots]
        for module in modules:
            self._check_slots(module)
        wishes = [self._wish(module) for module in modules]
        answers = self.base.resolve([*wishes, *resolve_full_tensors(self.adapter.parts, self.config)])
        found = list(zip(modules, answers, strict=False))
        siblings = tuple((module, answer.target) for module, answer in found if not isinstance(answer, Missing))
        for module, answer in found:
            if isinstance(answer, Missing):
                keys = sorted(info.name for info in module.slots.values())
                contribution.unmatched += [UnmatchedKey(key, answer.tried, answer.nearest) for key in keys]
            else:
                self._add(self._given(module, answer, siblings), contribution)
        read_full_tensors(self.adapter, self.config, answers[len(wishes) :], contribution)
        contribution.positions |= positions_of(self.adapter.parts, self.kind)
        return contribution

    def _shared(self) -> dict[str, TensorInfo]:
        """The tensors that belong to no module."""
        root = [module for module in self.adapter.parts.modules if not module.module]
        found = {slot: info for module in root for slot, info in module.slots.items()}
        return {slot: info for slot, info in found.items() if _first(slot) in self.method.shared}

    def _own(self, module: ModuleFactors, contribution: Contribution) -> ModuleFactors:
        """The module without what is saved again with it."""
        again = {slot: info for slot, info in module.slots.items() if _first(slot) in self.method.duplicates}
        rule = "saved again with each module; the adapter's own copy is used"
        contribution.ignored |= {info.name: rule for info in again.values()}
        return replace(module, slots={slot: info for slot, info in module.slots.items() if slot not in again})

    def _check_slots(self, module: ModuleFactors) -> None:
        keys = tuple(info.name for info in module.slots.values())
        kind = self.kind
        if module.depth or module.inside:
            raise NotMergeableError(keys, f"`{module.module}` is wrapped several times, which {kind} does not do")
        have = {_unnumbered(slot) for slot in module.slots}
        every = frozenset[str]().union(*(need | may for need, may in self.method.modules))
        if have - every:
            foreign = ", ".join(sorted(have - every))
            raise NotMergeableError(keys, f"the config says {kind}, but module `{module.module}` has {foreign}")
        if not any(need <= have <= need | may for need, may in self.method.modules):
            wanted = " or ".join(" and ".join(sorted(need)) for need, _ in self.method.modules)
            reason = f"module `{module.module}` has {' and '.join(sorted(have))}; {kind} needs {wanted}"
            raise IncompleteFactorsError(keys, reason)

    def _wish(self, module: ModuleFactors) -> Wanted:
        shape = self.method.shape(module)

        def fits(found: Parameter) -> bool:
            sizes = MatrixView.of(found.shape).shape if shape and len(shape) > 1 else found.shape
            return shape is None or suits(sizes, shape) or suits(sizes[::-1], shape)

        return Wanted(module.module, self.method.parameters(module), fits, shape)

    def _given(
        self, module: ModuleFactors, answer: Found, siblings: tuple[tuple[ModuleFactors, Parameter], ...]
    ) -> Module:
        where = (answer.target, answer.rule)
        return Module(module, *where, self.adapter, self.base, self.config, self.shared, siblings)

    def _add(self, module: Module, contribution: Contribution) -> None:
        """What one module does, and which of its tensors do nothing."""
        for effect in self.method.effects(module):
            contribution.operations += self._weighted(effect)
        idle = self.method.idle(module)
        contribution.ignored |= {module.info(slot).name: rule for slot, rule in idle.items()}

    def _weighted(self, effect: Effect) -> Sequence[Operation]:
        """The operations of an effect on the tensors it is stored in, times the adapter's weight."""
        parameter, operation = effect
        if FORMULAS[operation.formula].additive:
            numbers = {**operation.numbers, "scaling": operation.numbers["scaling"] * self.adapter.weight}
            operation = replace(operation, numbers=numbers)
        elif self.adapter.weight != 1:
            weight = self.adapter.weight
            reason = f"an adapter of type {self.kind} has no weighted form; its `--weight` is {weight:g}"
            raise CompositionError((operation.module,), reason)
        return list(placed([operation], parameter))


def _first(slot: str) -> str:
    return slot.split(".", 1)[0]


def _unnumbered(slot: str) -> str:
    """The slot without the number of one of several."""
    head, _, tail = slot.rpartition(".")
    return head if tail.isdecimal() else slot
