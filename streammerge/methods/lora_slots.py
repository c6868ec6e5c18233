"""Which tensors a LoRA's module has, and which of them say nothing about the merged weight.

VeLoRA and MonteCLoRA change only how a LoRA is trained (PEFT `tuners/lora/variants.py`, 0.21); their state lies in the
file beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from streammerge.core.errors import ConfigContradictionError, IncompleteFactorsError, NotMergeableError
from streammerge.methods import fields
from streammerge.methods.lora_config import LoraConfig
from streammerge.methods.parts import ModuleFactors

PAIRS = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
MAGNITUDE, BIAS, DIAGONAL = "lora_magnitude_vector", "lora_B.bias", "lora_diag"
TRAINING_STATE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "lora_velora_embed": ("velora_config", "VeLoRA's projection of activations, which only training uses"),
        "lora_monteclora_sampler": ("monteclora_config", "MonteCLoRA's sampler, which only training uses"),
    }
)
"""Slots that say nothing about the merged weight, each with the field that a config has set with them, and the rule."""


def without_training_state(module: ModuleFactors, raw: Mapping[str, Any], ignored: dict[str, str]) -> ModuleFactors:
    """The module without the state of the training that its config names; that goes to `ignored`."""
    rules = {slot: rule for slot, (field, rule) in TRAINING_STATE.items() if fields.is_set(raw.get(field))}
    gone = {slot: rules[first] for slot in module.slots if (first := slot.split(".", 1)[0]) in rules}
    ignored |= {module.slots[slot].name: rule for slot, rule in gone.items()}
    return replace(module, slots={slot: info for slot, info in module.slots.items() if slot not in gone})


def check_slots(module: ModuleFactors, config: LoraConfig) -> None:
    """Refuse a module that has not the tensors that its config asks for, or others. Raises AdapterError subclasses."""
    slots = set(module.slots)
    keys = tuple(info.name for info in module.slots.values())
    pair = next((pair for pair in PAIRS if pair & slots), None)
    known = {MAGNITUDE, BIAS, DIAGONAL} if config.kasa else {MAGNITUDE, BIAS}
    if pair is None or slots - pair - known:
        foreign = sorted(slots - {"lora_A", "lora_B"} - known)
        raise NotMergeableError(
            keys, f"the config says LORA, but module `{module.module}` has the factors {', '.join(foreign)}"
        )
    if not pair <= slots:
        raise IncompleteFactorsError(
            keys, f"module `{module.module}` has {' and '.join(sorted(pair & slots))} but not its other half"
        )
    if config.kasa and DIAGONAL not in slots:
        reason = f"`{module.module}` has no `{DIAGONAL}`, which KaSA's modules have, and the config sets `kasa_config`"
        raise IncompleteFactorsError(keys, reason)
    if config.dora != (MAGNITUDE in slots):
        if config.dora:
            raise IncompleteFactorsError(
                keys, f"the config says `use_dora`, but module `{module.module}` has no magnitude vector"
            )
        raise ConfigContradictionError(
            keys, f"module `{module.module}` has a DoRA magnitude, but the config does not say `use_dora`"
        )
