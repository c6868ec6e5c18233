"""The reference of one architecture: a tiny base, a LoRA on all of it that PEFT can adapt, and what PEFT makes of both.

Invariant: the three directories come from the same weights; the base is saved before PEFT sees the model, and nothing
in it changes until PEFT merges.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from scripts.tiny_models import build

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANK, ALPHA = 3, 5
SHARDS = 4
"""The size of a shard is that of the whole over this number, which makes at least three shards."""
MAMBA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
"""Model types in which PEFT refuses a LoRA on modules called `out_proj`."""
UNABLE = {
    "DeepseekV4GroupedLinear": "multiplies group by group, and PEFT adds a product of the whole",
    "Llama4Router": "returns a tuple, which PEFT adds to",
    "PhimoeTopKRouter": "returns a tuple, which PEFT adds to",
}
"""Classes of linear layers with which PEFT's own forward pass fails, so that no such adapter is ever trained."""
CONVERSION = "peft.utils.transformers_weight_conversion.get_checkpoint_conversion_mapping"
"""What PEFT asks whether a model type has had its experts stacked. If it has, PEFT takes every target that is called as
a projection of an expert once was for one, the dense layers' and the shared experts' too, and moves it to the stacked
parameters; the modules then get no LoRA."""


@dataclass(frozen=True)
class Targets:
    """What an adapter reaches, by names of the model in memory."""

    modules: tuple[str, ...]
    """Linear layers, of either orientation."""
    attentions: tuple[str, ...]
    """Modules of `nn.MultiheadAttention`, whose fused and output projections are adapted together."""
    parameters: tuple[str, ...]
    """Stacked experts."""
    left_out: dict[str, str]
    """Linear layers and stacked experts without a LoRA, and why."""


@dataclass(frozen=True)
class Made:
    """The files of a case."""

    base: Path
    adapter: Path
    merged: Path
    targets: Targets


def make_case(model_type: str, mapping: str, directory: Path) -> Made:
    """Build the model of a pair of `scripts.tiny_models.cases`, and write `base`, `adapter` and `merged` below
    `directory`."""
    model = build(model_type, mapping)
    targets = targets_of(model)
    made = Made(directory / "base", directory / "adapter", directory / "merged", targets)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) // SHARDS
    model.save_pretrained(made.base, max_shard_size=size)
    adapted = adapt(model, targets)
    adapted.save_pretrained(made.adapter, save_embedding_layers="auto" if _has_embeddings(model) else False)
    adapted.merge_and_unload().save_pretrained(made.merged, max_shard_size=size)
    return made


def targets_of(model: PreTrainedModel) -> Targets:
    """All that PEFT can put a LoRA on, except a weight that several modules share: a merge cannot give one tensor the
    delta of one of its uses."""
    uses: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), []).append(name)
    modules, parameters, left_out = [], [], {}
    attentions = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name.rpartition(".")[0] not in attentions:
            reason = UNABLE.get(type(module).__name__) or _reason(model, f"{name}.weight", uses[id(module.weight)])
            left_out |= {name: reason} if reason else {}
            modules += [] if reason else [name]
        elif "xpert" in type(module).__name__:
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    reason = _reason(model, f"{name}.{own}", uses[id(parameter)])
                    left_out |= {f"{name}.{own}": reason} if reason else {}
                    parameters += [] if reason else [f"{name}.{own}"]
    return Targets(tuple(modules), tuple(attentions), tuple(parameters), left_out)


def _reason(model: PreTrainedModel, name: str, uses: list[str]) -> str:
    """Why a parameter gets no LoRA, or nothing; `uses` are all its names."""
    if len(uses) > 1:
        return f"shares its weight with {next(use for use in uses if use != name)}"
    if name.endswith("out_proj.weight") and model.config.model_type in MAMBA:
        return f"PEFT refuses out_proj in {model.config.model_type}"
    return ""


def adapt(model: PreTrainedModel, targets: Targets) -> PeftModel:
    """The model with a LoRA whose factors are all random."""
    names = [*targets.modules, *targets.attentions]
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="|".join(names).replace(".", r"\.") if _ambiguous(model, set(names)) else names,
        target_parameters=list(targets.parameters) or None,
        init_lora_weights=False,
    )
    with mock.patch(CONVERSION, return_value=None), _input_embeddings(model):
        adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.3, generator=generator)
    return adapted.eval()


def _ambiguous(model: PreTrainedModel, names: Collection[str]) -> bool:
    """Whether a list of `names` would mean more modules than these: PEFT compares with the ends of paths."""
    return any(
        ".".join(parts[start:]) in names
        for name, _ in model.named_modules()
        if name not in names
        for parts in [name.split(".")]
        for start in range(1, len(parts))
    )


def _input_embeddings(model: PreTrainedModel) -> AbstractContextManager[object]:
    """A model that cannot tell its input embeddings gets some of its own while PEFT looks for what is tied to them."""
    if _has_embeddings(model):
        return nullcontext()
    return mock.patch.object(type(model), "get_input_embeddings", return_value=nn.Embedding(1, 1))


def _has_embeddings(model: PreTrainedModel) -> bool:
    """Whether the model can tell its input embeddings, which PEFT asks for when it saves an adapted head."""
    try:
        return model.get_input_embeddings() is not None
    except NotImplementedError:
        return False
