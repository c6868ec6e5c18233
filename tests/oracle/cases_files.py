"""Other files than PEFT writes today, other names than the base's, other layers than the base has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.factories import load, load_as
from tests.oracle.case import Case, Oracle, Tensors
from tests.oracle.editing import PREFIX, WEIGHTS, as_pickle, read_config, rename_keys

if TYPE_CHECKING:
    import torch
    from torch import nn

LORA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
REPLICATION = [[0, 2], [1, 2], [0, 1]]
"""The new layers are copies of layers 0, 1, 1, 0."""
SOURCES = (0, 1, 1, 0)
NEW_TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


def text_model(path: Path, dtype: torch.dtype) -> nn.Module:
    """The language model of a vision-language checkpoint as a model of its own."""
    whole = load("llava", path, dtype)
    text = transformers.LlamaForCausalLM(whole.config.text_config).to(dtype)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.lm_head.load_state_dict(whole.lm_head.state_dict())
    text.config.name_or_path = str(path)
    return text.eval()


def in_llava(name: str) -> str:
    """A name of the text model as the vision-language checkpoint stores it."""
    return f"language_model.{name}"


def inside(name: str) -> str | None:
    """A name of the model with a head in the checkpoint of the model without."""
    return name.removeprefix("model.") if name.startswith("model.") else None


def converted(model: PeftModel, where: Path) -> Mapping[str, Any]:
    """Save with the initial adapter taken off, so that the result is a plain LoRA of twice the rank."""
    config = model.peft_config["default"]
    lora = {
        name: getattr(config, name) for name in ("r", "lora_alpha", "init_lora_weights", "target_modules", "use_rslora")
    }
    base = load("llama", Path(config.base_model_name_or_path), model.dtype)
    initial = get_peft_model(base, LoraConfig(**lora))
    initial.peft_config["default"].init_lora_weights = True
    initial.save_pretrained(where / "initial")
    return {"path_initial_model_for_weight_conversion": str(where / "initial")}


def type_new_layers(model: nn.Module) -> None:
    """What PEFT forgets: the forward pass reads the types of the new layers from the config."""
    model.config.layer_types = NEW_TYPES


def replicated(base: Tensors, adapter: Path) -> Tensors:
    """Every new layer is a copy of its source with a delta of its own."""
    factors, config = load_file(adapter / WEIGHTS), read_config(adapter)
    expected = {}
    for name, weight in base.items():
        head, found, tail = name.partition("model.layers.")
        number, _, rest = tail.partition(".")
        for new, source in enumerate(SOURCES) if found else [(None, None)]:
            if found and int(number) != source:
                continue
            target = f"{head}{found}{new}.{rest}" if found else name
            key = f"{PREFIX}{target.removesuffix('.weight')}.lora_"
            expected[target] = weight
            if f"{key}A.weight" in factors:
                a, b = (factors[f"{key}{x}.weight"].double() for x in "AB")
                expected[target] = weight + config["lora_alpha"] / config["r"] * (b @ a)
    return expected


def _with_keys(name: str, new_name: Callable[[str], str]) -> Case:
    return Case(name, "llama", {**LORA, "bias": "all"}, edit=rename_keys(new_name))


def with_adapter_name(key: str) -> str:
    """The key as it stands in the model: with the adapter's name after the slot."""
    return key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")


CASES = [
    Case("weights-as-pickle", "llama", {**LORA, "bias": "all"}, edit=as_pickle),
    _with_keys("keys-with-adapter-name", with_adapter_name),
    _with_keys("keys-without-prefix", lambda key: key.removeprefix(PREFIX)),
    _with_keys("keys-with-doubled-prefix", lambda key: PREFIX + key),
    _with_keys("keys-of-data-parallel", lambda key: f"module.{key}"),
    *(
        Case(f"converted-{init}{label}", "llama", {**LORA, "init_lora_weights": init, **more}, save=converted)
        for init in ("pissa", "olora", "pissa_niter_4")
        for label, more in (("", {}), ("-rslora", {"use_rslora": True}))
    ),
    Case(
        "layers-replicated",
        "llama",
        {**LORA, "layer_replication": REPLICATION},
        Oracle.FORMULA,
        formula=replicated,
        config={"num_hidden_layers": 4},
    ),
    Case(
        "layers-replicated-with-types",
        "qwen3",
        {**LORA, "layer_replication": REPLICATION},
        Oracle.FORMULA,
        formula=replicated,
        prepare=type_new_layers,
        config={"num_hidden_layers": 4, "layer_types": NEW_TYPES},
    ),
    Case(
        "trained-without-head",
        "llama",
        {**LORA, "bias": "all"},
        trained_on=load_as("AutoModel"),
        rename=lambda name: f"model.{name}",
        beside_base=True,
    ),
    Case(
        "base-without-head",
        "llama-headless",
        LORA,
        trained_on=load_as("AutoModelForCausalLM"),
        rename=inside,
    ),
    Case("text-model-of-llava", "llava", LORA, trained_on=text_model, rename=in_llava, beside_base=True),
    Case("llava", "llava", {"target_modules": r".*language_model.*\.(q_proj|down_proj)"}),
]
