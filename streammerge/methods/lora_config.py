"""`adapter_config.json` of a LoRA adapter: PEFT's known fields, and what each may hold for a merge to be right."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streammerge.core.errors import NotMergeableError, UnknownFieldError
from streammerge.methods import fields
from streammerge.methods.lora_variants import Blocks
from streammerge.methods.patterns import Patterns

KNOWN = fields.Known(
    read=frozenset(
        {
            "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "init_lora_weights", "rank_pattern",
            "alpha_pattern", "target_parameters", "layer_replication", "trainable_token_indices", "ensure_weight_tying",
            "use_bdlora", "kasa_config",
        }
    ),
    # The configs of initialisations belong here because `init_lora_weights` decides, those of VeLoRA and MonteCLoRA
    # because both are a plain LoRA once they are trained.
    no_consequence=frozenset(
        {
            "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core",
            "qalora_group_size", "save_embedding_layers", "velora_config", "monteclora_config",
        }
    ),
    neutral=MappingProxyType(
        {
            "alora_invocation_tokens": "aLoRA acts only after its invocation tokens: there is no merged weight",
            "arrow_config": "Arrow chooses among adapters for every token: there is no merged weight",
            "use_qalora": "QA-LoRA lives in the zero points of a GPTQ base, which is not merged",
            "megatron_config": "a Megatron adapter holds the shards of one tensor-parallel rank",
        }
    ),
)  # fmt: skip
PLAIN_INITS = frozenset({"true", "false", "gaussian", "orthogonal", "eva", "mica"})
REFUSED_INITS: Mapping[str, str] = MappingProxyType(
    {
        "loftq": "the base was replaced by a quantized one, which the adapter does not hold",
        "corda": "the base was changed with covariances that the adapter does not hold",
        "lora_ga": "the base was changed with gradients that the adapter does not hold",
    }
)
VARIANTS = ("use_dora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")
"""Fields of which PEFT knows how to obey one at a time."""
CONVERT = "save the adapter with `path_initial_model_for_weight_conversion`, which makes it a plain LoRA"


@dataclass(frozen=True, slots=True)
class LoraConfig(fields.Common):
    """The fields a merge reads. `rank` is None where the config does not give it."""

    rank: int | None
    alpha: float
    rslora: bool
    dora: bool
    init: str
    rank_pattern: Patterns
    alpha_pattern: Patterns
    target_parameters: tuple[str, ...]
    layer_replication: tuple[tuple[int, int], ...]
    blocks: Blocks | None
    kasa: bool

    @property
    def taken(self) -> str | None:
        """The formula of what PEFT takes out of the base when it loads the adapter; None for nothing."""
        return "kasa_rest" if self.kasa else self.init if self.init in ("pissa", "olora") else None

    def rank_of(self, name: str) -> int | None:
        """The rank the config claims for a module; None where it claims none."""
        claimed: int | None = self.rank_pattern.value_for(name, self.rank)
        return claimed

    def scaling(self, name: str, rank: int) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = self.alpha_pattern.value_for(name, self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)


def parse_config(raw: Mapping[str, Any], ignored: Collection[str] = ()) -> LoraConfig:
    """The config, checked field by field.

    Raises UnknownFieldError, NotMergeableError, NonFiniteError or ConfigContradictionError.
    """
    KNOWN.check(raw, ignored)
    init = _init(raw.get("init_lora_weights", True))
    _refuse_several(raw, init)
    return LoraConfig(
        **fields.common(raw, "lora_only", "trainable_token_indices"),
        rank=fields.number(raw, "r", None, whole=True),
        alpha=fields.number(raw, "lora_alpha", 8),
        rslora=fields.flag(raw, "use_rslora"),
        dora=fields.flag(raw, "use_dora"),
        init=init,
        rank_pattern=fields.pattern(raw, "rank_pattern", whole=True),
        alpha_pattern=fields.pattern(raw, "alpha_pattern"),
        target_parameters=fields.names(raw, "target_parameters"),
        layer_replication=_ranges(raw.get("layer_replication")),
        blocks=Blocks.of(raw),
        kasa=fields.is_set(raw.get("kasa_config")),
    )


def _refuse_several(raw: Mapping[str, Any], init: str) -> None:
    """Refuse several variants in one; KaSA takes out of the base what PiSSA and OLoRA take theirs of."""
    chosen = [name for name in VARIANTS if fields.is_set(raw.get(name))]
    if init == "mica" or (init in ("pissa", "olora") and "kasa_config" in chosen):
        chosen.append(f"init_lora_weights = {init}")
    if len(chosen) > 1:
        raise NotMergeableError(tuple(chosen), "no adapter can be all of these variants of LoRA at once")


def _init(value: object) -> str:
    name = str(value).lower() if isinstance(value, bool) else str(value)
    if name in PLAIN_INITS | {"pissa", "olora", "None"}:
        return name
    if name.startswith("pissa_niter_"):
        reason = "its randomised decomposition of the base cannot be repeated, not even by PEFT"
        raise NotMergeableError((f"init_lora_weights = {name}",), f"`{name}`: {reason}", CONVERT)
    if name in REFUSED_INITS:
        raise NotMergeableError((f"init_lora_weights = {name}",), f"`{name}`: {REFUSED_INITS[name]}", CONVERT)
    raise UnknownFieldError((f"init_lora_weights = {name}",), "an initialisation that streammerge does not know")


def _ranges(value: object) -> tuple[tuple[int, int], ...]:
    if not value:
        return ()
    if isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and all(type(n) is int for n in item) and 0 <= item[0] < item[1]
        for item in value
    ):
        return tuple((first, last) for first, last in value)
    raise fields.wrong("layer_replication", value, "a list of [first, last) ranges")
