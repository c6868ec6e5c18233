"""Building the tiny model of every pair of an auto mapping and a model type.

Invariant: nothing is read or fetched, and the same pair gives the same weights, every parameter random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import configuration_auto, modeling_auto

from .rows import CLASS_ROWS
from .shrink import tiny

MAPPINGS: dict[str, str] = {
    "CausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "ImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "Seq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}
"""Short names of the auto mappings, and transformers' own."""
SCALE = 0.2
"""Standard deviation of every parameter."""
TIMM = "its vision tower is one of timm's, and timm is not installed"
NOT_BUILDABLE: dict[tuple[str, str], str] = {
    ("CausalLM", "gemma3n"): TIMM,
    ("ImageTextToText", "gemma3n"): TIMM,
    ("ImageTextToText", "fast_vlm"): TIMM,
    ("ImageTextToText", "perception_lm"): TIMM,
    ("CausalLM", "gemma4_assistant"): (
        "its config demands that every layer takes keys and values from elsewhere, and the text model inside refuses"
        " a config in which no layer makes them"
    ),
}
"""Why a pair has no model."""


def cases() -> list[tuple[str, str]]:
    """Every pair of a short mapping name and a model type, those that cannot be built among them."""
    return [(mapping, model_type) for mapping, names in MAPPINGS.items() for model_type in _names(names)]


def _names(mapping: str) -> Mapping[str, str]:
    names: Mapping[str, str] = getattr(modeling_auto, mapping)
    return names


def class_of(model_type: str, mapping: str) -> type[PreTrainedModel]:
    """The model class of a pair."""
    cls: type[PreTrainedModel] = getattr(transformers, _names(MAPPINGS[mapping])[model_type])
    return cls


def config_of(model_type: str, mapping: str = "") -> PreTrainedConfig:
    """The tiny config of a model type; with a mapping, the one its class takes, which may be the text config inside."""
    config_class = configuration_auto.CONFIG_MAPPING[model_type]
    if not mapping:
        return tiny(config_class)
    decoder = mapping == "CausalLM" and "is_decoder" in {field.name for field in fields(config_class)}
    config = tiny(config_class, {"is_decoder": True} if decoder else {})
    wanted = class_of(model_type, mapping).config_class
    inner = (getattr(config, name, None) for name in config.sub_configs)
    return config if isinstance(config, wanted) else next((one for one in inner if isinstance(one, wanted)), config)


def config_of_class(cls: type[PreTrainedModel]) -> PreTrainedConfig:
    """The tiny config for any model class, in a mapping or not."""
    given: dict[str, Any] = CLASS_ROWS.get(cls.__name__, {})
    return tiny(cls.config_class, given)


def build(model_type: str, mapping: str) -> PreTrainedModel:
    """The tiny model of a pair in float32, ready to be evaluated."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = class_of(model_type, mapping)._from_config(config_of(model_type, mapping), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, SCALE, generator=generator)
    return model.eval()
