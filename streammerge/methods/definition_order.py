"""The order in which the models of an architecture define their modules: what some methods count them by.

No checkpoint tells it, since files and indices sort names. The table holds the architectures whose modeling code was
looked at: the modules with weights that adapters are trained on, layers numbered by `{}`, without the base's prefix
(transformers 5; a test holds the table against the installed version).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from streammerge.names.architectures import Architecture

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA = (
    "embed_tokens",
    *(f"layers.{{}}.self_attn.{name}" for name in _ATTENTION),
    *(f"layers.{{}}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    "lm_head",
)
ORDERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "olmo2", "granite", "smollm3"),
            _LLAMA,
        ),
        # The projection of the output comes before those of the input.
        "phi3": (
            "embed_tokens", "layers.{}.self_attn.o_proj", "layers.{}.self_attn.qkv_proj",
            "layers.{}.mlp.gate_up_proj", "layers.{}.mlp.down_proj", "lm_head",
        ),
        "gpt2": (
            "wte", "wpe", "h.{}.attn.c_attn", "h.{}.attn.c_proj", "h.{}.mlp.c_fc", "h.{}.mlp.c_proj", "lm_head",
        ),
        "bert": (
            "embeddings.word_embeddings", "embeddings.position_embeddings", "embeddings.token_type_embeddings",
            *(f"encoder.layer.{{}}.attention.self.{name}" for name in ("query", "key", "value")),
            "encoder.layer.{}.attention.output.dense", "encoder.layer.{}.intermediate.dense",
            "encoder.layer.{}.output.dense",
        ),
    }
)  # fmt: skip
"""By `model_type`."""
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def in_order(modules: Sequence[str], architecture: Architecture | None) -> list[str] | None:
    """The modules in the order of their definition; None where the table does not have the architecture, or not all
    of them."""
    order = ORDERS.get(architecture.model_type) if architecture else None
    if architecture is None or order is None:
        return None
    numbered = [template for template in order if "{}" in template]
    keys: dict[str, tuple[int, int, int]] = {}
    for module in modules:
        path = module.removeprefix(f"{architecture.base_prefix}.")
        number = _NUMBER.search(path)
        template = path if number is None else f"{path[: number.start()]}{{}}{path[number.end() :]}"
        if template not in order:
            return None
        place = order.index(template)
        if number is None:  # before the layers, or behind them
            keys[module] = (0 if place < order.index(numbered[0]) else 2, place, 0)
        else:
            keys[module] = (1, int(number.group()), place)
    return sorted(modules, key=lambda module: keys[module])
