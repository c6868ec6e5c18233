"""`adapter_config.json` of a LoRA adapter: PEFT's known fields, and what each may hold for a merge to be right.

Every field is known as one of three kinds: it is read here, it is of no consequence to the weights, or it must be
neutral because what it switches on is not merged. A field that is none of these and is set is refused: it may change
the mathematics, and PEFT would ignore it (as of PEFT 0.21.2).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from streammerge.core.errors import ConfigContradictionError, NonFiniteError, NotMergeableError, UnknownFieldError

READ = frozenset(
    {
        "peft_type", "peft_version", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_bias", "bias",
        "fan_in_fan_out", "init_lora_weights", "rank_pattern", "alpha_pattern", "target_modules", "target_parameters",
        "modules_to_save", "layer_replication", "trainable_token_indices", "ensure_weight_tying",
    }
)  # fmt: skip
NO_CONSEQUENCE = frozenset(
    {
        "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "exclude_modules", "layers_pattern",
        "layers_to_transform", "lora_dropout", "runtime_config", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "megatron_core", "qalora_group_size", "save_embedding_layers",
    }
)  # fmt: skip
"""Training-time choices. The configs of initialisations belong here because `init_lora_weights` decides."""
MUST_BE_NEUTRAL: Mapping[str, str] = MappingProxyType(
    {
        "alora_invocation_tokens": "aLoRA acts only after its invocation tokens: there is no merged weight",
        "arrow_config": "Arrow chooses among adapters for every token: there is no merged weight",
        "use_qalora": "QA-LoRA lives in the zero points of a GPTQ base, which is not merged",
        "megatron_config": "a Megatron adapter holds the shards of one tensor-parallel rank",
        "kasa_config": "KaSA truncates the base's singular values, which is not supported yet",
        "use_bdlora": "BD-LoRA's block-diagonal factors are not supported yet",
        "velora_config": "VeLoRA is not supported yet",
        "monteclora_config": "MonteCLoRA is not supported yet",
    }
)
PLAIN_INITS = frozenset({"true", "false", "gaussian", "orthogonal", "eva", "mica"})
REFUSED_INITS: Mapping[str, str] = MappingProxyType(
    {
        "loftq": "the base was replaced by a quantized one, which the adapter does not hold",
        "corda": "the base was changed with covariances that the adapter does not hold",
        "lora_ga": "the base was changed with gradients that the adapter does not hold",
    }
)
CONVERT = "save the adapter with `path_initial_model_for_weight_conversion`, which makes it a plain LoRA"


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The fields a merge reads. `rank` is None where the config does not give it."""

    rank: int | None
    alpha: float
    rslora: bool
    dora: bool
    fan_in_fan_out: bool
    init: str
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    layer_replication: tuple[tuple[int, int], ...]
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]]
    task_type: str
    peft_version: tuple[int, ...] | None

    def rank_of(self, name: str) -> int | None:
        """The rank the config claims for a module; None where it claims none."""
        claimed: int | None = _by_pattern(self.rank_pattern, name, self.rank)
        return claimed

    def scaling(self, name: str, rank: int) -> float:
        """`alpha / r`, or `alpha / sqrt(r)` with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = _by_pattern(self.alpha_pattern, name, self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)


def parse_config(raw: Mapping[str, Any], ignored: Collection[str] = ()) -> LoraConfig:
    """The config, checked field by field.

    Raises UnknownFieldError, NotMergeableError, NonFiniteError or ConfigContradictionError.
    """
    check_fields(raw, ignored)
    init = _init(raw.get("init_lora_weights", True))
    config = LoraConfig(
        rank=_number(raw, "r", None, whole=True),
        alpha=_number(raw, "lora_alpha", 8),
        rslora=_flag(raw, "use_rslora"),
        dora=_flag(raw, "use_dora"),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out"),
        init=init,
        rank_pattern=_pattern(raw, "rank_pattern", whole=True),
        alpha_pattern=_pattern(raw, "alpha_pattern"),
        target_parameters=_names(raw, "target_parameters"),
        modules_to_save=_names(raw, "modules_to_save"),
        layer_replication=_ranges(raw.get("layer_replication")),
        token_indices=_tokens(raw.get("trainable_token_indices")),
        task_type=str(raw.get("task_type") or ""),
        peft_version=parse_version(raw.get("peft_version")),
    )
    if raw.get("bias", "none") not in ("none", "all", "lora_only", None):
        raise _wrong("bias", raw["bias"], "none, all or lora_only")
    return config


def check_fields(raw: Mapping[str, Any], ignored: Collection[str]) -> None:
    """Refuse what is switched on and not merged, and what is set and not known."""
    for name, reason in MUST_BE_NEUTRAL.items():
        if _is_set(raw.get(name)) and name not in ignored:
            raise NotMergeableError((name,), reason)
    unknown = tuple(
        name
        for name, value in raw.items()
        if _is_set(value) and name not in READ | NO_CONSEQUENCE | MUST_BE_NEUTRAL.keys() | set(ignored)
    )
    if unknown:
        raise UnknownFieldError(
            unknown,
            "the adapter's config sets fields that streammerge does not know; they may change what the adapter means",
            f"if it does not matter to the weights: `--ignore-config-field {unknown[0]}`",
        )


def parse_version(value: object) -> tuple[int, ...] | None:
    """`0.19.1` and `0.19.1.dev0@hash` as numbers; None where there is no version."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", value) if isinstance(value, str) else None
    return tuple(int(part or 0) for part in match.groups()) if match else None


def _is_set(value: object) -> bool:
    return value not in (None, False, "", 0) and value != [] and value != {}


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


def _wrong(field: str, value: object, wanted: str) -> ConfigContradictionError:
    return ConfigContradictionError(
        (f"{field} = {value!r}",), f"the adapter's config holds a `{field}` that is not {wanted}"
    )


def _checked(field: str, value: object, *, whole: bool) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(field, value, "a number")
    if not math.isfinite(value):
        raise NonFiniteError((f"{field} = {value}",), f"the adapter's config holds a `{field}` that is not finite")
    if whole and (not float(value).is_integer() or value < 1):
        raise _wrong(field, value, "a whole number of at least 1")
    return int(value) if whole else value


def _number(raw: Mapping[str, Any], field: str, default: Any, *, whole: bool = False) -> Any:
    value = raw.get(field)
    return default if value is None else _checked(field, value, whole=whole)


def _flag(raw: Mapping[str, Any], field: str) -> bool:
    value = raw.get(field)
    if value not in (None, True, False):
        raise _wrong(field, value, "true or false")
    return bool(value)


def _pattern(raw: Mapping[str, Any], field: str, *, whole: bool = False) -> Mapping[str, Any]:
    value = raw.get(field) or {}
    if not isinstance(value, Mapping):
        raise _wrong(field, value, "an object")
    for key in value:
        try:
            re.compile(key)
        except re.error as error:
            raise _wrong(field, key, f"a pattern ({error})") from None
    return MappingProxyType({key: _checked(f"{field}[{key}]", number, whole=whole) for key, number in value.items()})


def _by_pattern(pattern: Mapping[str, Any], name: str, default: Any) -> Any:
    """The first pattern that matches the module from its start decides, as in PEFT since 0.15."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _names(raw: Mapping[str, Any], field: str) -> tuple[str, ...]:
    value = raw.get(field) or []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(field, value, "a list of names")
    return tuple(value)


def _ranges(value: object) -> tuple[tuple[int, int], ...]:
    if not value:
        return ()
    if isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and all(type(n) is int for n in item) and 0 <= item[0] < item[1]
        for item in value
    ):
        return tuple((first, last) for first, last in value)
    raise _wrong("layer_replication", value, "a list of [first, last) ranges")


def _tokens(value: object) -> tuple[int, ...] | Mapping[str, tuple[int, ...]]:
    if not value:
        return ()
    if isinstance(value, Mapping):
        return MappingProxyType({str(name): _indices(indices) for name, indices in value.items()})
    return _indices(value)


def _indices(value: object) -> tuple[int, ...]:
    if isinstance(value, list) and value and all(type(item) is int and item >= 0 for item in value):
        if len(set(value)) != len(value):
            raise _wrong("trainable_token_indices", value, "a list of different rows")
        return tuple(value)
    raise _wrong("trainable_token_indices", value, "a list of rows")
