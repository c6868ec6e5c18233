"""The grammar of adapter keys: which module a tensor belongs to, and what it is there.

A key is read by whole segments, never by substrings: a module may be called `default`, `lora` or `lora_A_proj`.
Wrappers of training frameworks, PEFT's own prefix and adapter names are dropped; what is left of the path is the module
as the training process knew it. Every key parses; whether the module exists, and whether its method can be merged, is
for the caller to say. The invariant: `module` and `slot` do not depend on wrappers, prefix or adapter name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
"""torch.compile, FSDP, activation checkpointing, DeepSpeed: they may stand anywhere in a path."""
_LEADS = frozenset({"module", "pretrained_model"})
"""DDP and TRL's value-head model, which wrap from outside only."""
_PEFT_PREFIX = ["base_model", "model"]
_NESTING = frozenset({"base_layer", "token_adapter"})

_METHODS = {
    "adalora": "lora_E ranknum lora_ranknum",
    "adamss": "adamss_A adamss_B adamss_newB",
    "adaption_prompt": "adaption_prompt adaption_gate",
    "beft": "beft_bias",
    "boft": "boft_R boft_s",
    "bone": "bone_block",
    "c3a": "c3a_kernel",
    "deft": "deft_P deft_R",
    "delora": "delora_A delora_B delora_lambda delora_w_norm",
    "fourierft": "fourierft_spectrum",
    "frod": "frod_lambda_l frod_lambda_s_values frod_U frod_V frod_s_indices frod_s_size",
    "glora": "glora_A glora_B glora_C glora_D glora_E",
    "gralora": "gralora_A gralora_B gralora_A_general gralora_B_general",
    "hira": "hira_A hira_B hira_embedding_A hira_embedding_B",
    "hra": "hra_u",
    "ia3": "ia3_l",
    "lily": "lily_A lily_B lily_router",
    "ln_tuning": "ln_tuning_layers",
    "loha": "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2",
    "lokr": "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2",
    "lora": "lora_A lora_B lora_embedding_A lora_embedding_B lora_magnitude_vector lora_diag lora_velora_embed"
    " lora_monteclora_sampler lora_arrow",
    "miss": "miss_block",
    "oft": "oft_R oft_embedding_R oft_r oft_s",
    "osf": "osf_svd_params",
    "peanut": "peanut_A peanut_B peanut_encoders peanut_decoders",
    "poly": "poly_lora_A poly_lora_B poly_router",
    "prompt_learning": "prompt_embeddings prefix_task_cols prefix_task_rows",
    "psoft": "psoft_R",
    "pvera": "pvera_A pvera_B pvera_lambda_b pvera_lambda_d",
    "randlora": "randlora_A randlora_B randlora_lambda randlora_gamma",
    "road": "road_theta road_alpha",
    "shadow": "shadow_down shadow_up shadow_update_transform shadow_update_gate shadow_backbone shadow_projection"
    " shadow_head",
    "shira": "shira_weight shira_indices",
    "supertuning": "supertuning_values supertuning_indices supertuning_lora_A supertuning_lora_B",
    "tinylora": "tinylora_A tinylora_B tinylora_P tinylora_v",
    "trainable_tokens": "trainable_tokens_delta trainable_tokens_original",
    "unilora": "unilora_theta_d unilora_indices_A unilora_indices_B unilora_scales_A unilora_scales_B",
    "vblora": "vblora_logits_A vblora_logits_B vblora_vector_bank vblora_logits_A_topk_indices"
    " vblora_logits_A_topk_weights vblora_logits_B_topk_indices vblora_logits_B_topk_weights",
    "vera": "vera_A vera_B vera_lambda_b vera_lambda_d",
    "waveft": "waveft_spectrum",
    "xlora": "internal_xlora_classifier",
}
SLOTS: Mapping[str, str] = MappingProxyType(
    {slot: method for method, slots in _METHODS.items() for slot in slots.split()}
)
"""Every slot that a PEFT tuner saves (0.2 to 0.21), and the family of methods it belongs to. AdaLoRA shares `lora_A`
and `lora_B` with LoRA; the config tells them apart."""

_PARTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "psoft_R": frozenset({"vector_a", "vector_b"}),
        "osf_svd_params": frozenset({"U_low", "S_low", "V_low"}),
        "poly_router": frozenset({"module_logits"}),
        **dict.fromkeys(_METHODS["glora"].split(), frozenset({"X", "Xd", "Xu", "zeros"})),
    }
)
"""Slots that hold several named tensors; the part's name stays in the slot."""
_NUMBERED = frozenset({"adamss_A", "adamss_B", "peanut_encoders", "peanut_decoders"})
"""Slots that hold a list; the index stays in the slot."""
_OPEN = frozenset(
    {"frod_U", "frod_V", "frod_s_indices", "frod_s_size", "tinylora_v", "lora_monteclora_sampler", "lora_arrow"}
    | {"internal_xlora_classifier", "shadow_update_transform", "shadow_update_gate", "shadow_backbone"}
    | {"shadow_projection", "shadow_head"}
)
"""Slots that hold a module or a dictionary of their own: all that follows stays in the slot."""
_BARE = frozenset(_METHODS["prompt_learning"].split())
"""Slots that belong to no module: deeper in a path, such a segment is a module of that name."""


class KeyKind(Enum):
    """What the tensor under a key is."""

    FACTOR = "factor"
    """A tuner's tensor: part of a method's formula."""
    REPLACEMENT = "replacement"
    """A full tensor that takes the place of the base's: modules_to_save, a trained bias, a saved embedding."""
    BASE_COPY = "base copy"
    """A copy of what the base holds, saved beside the trained tensor: has no effect."""
    TOKENS = "tokens"
    """Rows that take the place of an embedding's rows."""


_TOKEN_KINDS = MappingProxyType(
    {"trainable_tokens_delta": KeyKind.TOKENS, "trainable_tokens_original": KeyKind.BASE_COPY}
)


@dataclass(frozen=True, slots=True)
class AdapterKey:
    """One adapter key, taken apart. `depth` counts the `base_layer` segments directly before the slot (how far inside
    nested tuner layers it sits); `adapter_name` is what stood between slot and end; `inside` is the wrapped module that
    `module` is a part of, for keys such as `attn.base_layer.out_proj.lora_A.weight`."""

    key: str
    module: str
    slot: str
    kind: KeyKind
    depth: int = 0
    adapter_name: str | None = None
    inside: str | None = None

    @property
    def method(self) -> str | None:
        """The family of PEFT methods the slot belongs to; None for full tensors."""
        return SLOTS.get(self.slot.split(".", 1)[0]) if self.kind in (KeyKind.FACTOR, KeyKind.TOKENS) else None


def parse_key(key: str) -> AdapterKey:
    """`key` taken apart; never raises."""
    segments = key.split(".")
    path = _without_prefix([segment for segment in segments if segment not in _WRAPPERS] or segments[-1:])
    for end, segment in enumerate(path):
        if segment == "original_module" and end < len(path) - 1:
            return _full_tensor(key, path[:end] + path[end + 1 :], KeyKind.BASE_COPY, None)
        if segment == "modules_to_save" and end < len(path) - 1:
            rest = path[end + 1 :]
            name = rest.pop(0) if len(rest) > 1 else None
            return _full_tensor(key, path[:end] + rest, KeyKind.REPLACEMENT, name)
        tail = _slot_tail(segment, path[end + 1 :]) if segment in SLOTS else None
        if tail and not (end and segment in _BARE):
            return _factor(key, path[:end], *tail)
    return _full_tensor(key, path, KeyKind.REPLACEMENT, None)


def _without_prefix(path: list[str]) -> list[str]:
    """`path` without the wrappers that stand only in front of it."""
    start = 0
    while path[start : start + 1] and path[start] in _LEADS and start < len(path) - 1:
        start += 1
    # Tensors shared by all modules hang on the tuner itself, one level above the wrapped model.
    if path[start : start + 1] == ["base_model"] and path[start + 1 : start + 2] and path[start + 1] in SLOTS:
        return path[start + 1 :]
    while path[start : start + 2] == _PEFT_PREFIX and start + 2 < len(path):
        start += 2
    return path[start:]


def _slot_tail(slot: str, tail: list[str]) -> tuple[str, str | None] | None:
    """The full slot and the adapter name in what follows `slot`; None where no tuner writes such a tail. The last slot
    of a path counts: before it, the segment is the name of a module."""
    if SLOTS.keys() & set(tail):
        return None
    if slot in _OPEN:
        end = -1 if tail[-1:] == ["weight"] else len(tail)
        return ".".join([slot, *tail[:end]]), None
    names = list(tail)
    full = slot
    if names[-1:] == ["weight"]:
        names.pop()
    elif names[-1:] == ["bias"] or (names and names[-1] in _PARTS.get(slot, ())):
        full = f"{slot}.{names.pop()}"
    if slot in _NUMBERED and names and names[-1].isdecimal():
        full = f"{slot}.{names.pop()}"
    distinct = list(dict.fromkeys(names))
    # Inserted once per load, a name may stand there several times; longer tails are the path of some other module.
    if len(distinct) > 2 or (len(distinct) == 2 and len(names) > 2):
        return None
    return full, ".".join(distinct) or None


def _factor(key: str, path: list[str], slot: str, name: str | None) -> AdapterKey:
    """The parsed key of a tuner's tensor below `path`."""
    end = len(path)
    while end and path[end - 1] in _NESTING:
        end -= 1
    module, inside = _module(path[:end])
    kind = _TOKEN_KINDS.get(slot, KeyKind.FACTOR)
    return AdapterKey(key, module, slot, kind, path[end:].count("base_layer"), name, inside)


def _full_tensor(key: str, path: list[str], kind: KeyKind, name: str | None) -> AdapterKey:
    """The parsed key of a tensor that is not a tuner's."""
    end = len(path) - 1
    while end and path[end - 1] in _NESTING:
        end -= 1
    module, inside = _module(path[:end])
    return AdapterKey(key, module, path[-1], kind, 0, name, inside)


def _module(path: list[str]) -> tuple[str, str | None]:
    """The module path in `path`, and the wrapped module that it lies inside of, if any."""
    last = max((index for index, segment in enumerate(path) if segment in _NESTING), default=None)
    inside = None if last is None else ".".join(segment for segment in path[:last] if segment not in _NESTING)
    return ".".join(segment for segment in path if segment not in _NESTING), inside
