"""The table of PEFT types: how each is read, or why it cannot be merged."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from streammerge.core.errors import ConfigContradictionError, NotMergeableError
from streammerge.core.text import printable
from streammerge.methods.lora import read_lora
from streammerge.methods.reading import AdapterInput, BaseView, Contribution, Reader

READERS: Mapping[str, Reader] = MappingProxyType({"LORA": read_lora})
"""PEFT types that can be merged. A new method adds its file and one row here."""

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
        "SHADOW": "it runs beside the model, so there is no merged weight",
    }
)
"""PEFT types that have no merged weight at all, and why."""


def read_adapter(adapter: AdapterInput, base: BaseView) -> Contribution:
    """The contribution of an adapter of any type. Raises what `refuse_type` and the type's reader raise."""
    return READERS[refuse_type(adapter.config)](adapter, base)


def refuse_type(config: Mapping[str, Any]) -> str:
    """The PEFT type of a config, in upper case. Raises NotMergeableError for a type that is not merged,
    ConfigContradictionError where there is none."""
    kind = config.get("peft_type")
    if not isinstance(kind, str):
        raise ConfigContradictionError(("peft_type",), "the adapter's config does not say its `peft_type`")
    kind = kind.upper()
    if kind in NOT_MERGEABLE:
        raise NotMergeableError((f"peft_type = {kind}",), f"{kind} cannot be merged: {NOT_MERGEABLE[kind]}")
    if kind not in READERS:
        reason = f"{printable(kind)} is not supported yet; supported: {', '.join(READERS)}"
        raise NotMergeableError((f"peft_type = {kind}",), reason)
    return kind
