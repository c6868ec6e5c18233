"""Linear and Conv1D layers: scaling, patterns, directions, biases, DoRA, replaced modules, initialisations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.factories import load_as
from tests.oracle.case import Case
from tests.oracle.editing import set_config

if TYPE_CHECKING:
    from torch import nn

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
RANKS = {
    "rank_pattern": {"layers.0.*q_proj": 6, "q_proj": 2},
    "alpha_pattern": {"v_proj": 5, "layers.1.self_attn.v_proj": 9},
}
"""The first pattern that matches wins: q_proj of layer 0 has rank 6, v_proj of layer 1 alpha 5."""


def three_labels(auto: str) -> dict[str, Callable[..., nn.Module]]:
    """A head that is not in the base; the output must say by itself that it has three labels."""
    return {"trained_on": load_as(auto, num_labels=3), "loads_as": load_as(auto)}


CASES = [
    Case("linear", "llama", {"target_modules": LINEAR}),
    Case("linear-many-tiles", "llama-wide", {"target_modules": [*LINEAR, "lm_head"]}),
    Case("high-rank", "llama-wide", {"target_modules": LINEAR, "r": 40}),
    Case("one-rank", "llama", {"target_modules": LINEAR, "r": 1}),
    Case("rslora", "llama", {"target_modules": LINEAR, "use_rslora": True}),
    Case("rank-and-alpha-patterns", "llama", {"target_modules": LINEAR, **RANKS}),
    Case("rslora-patterns", "llama", {"target_modules": LINEAR, "use_rslora": True, **RANKS}),
    Case("alpha-zero-on-one-module", "llama", {"target_modules": LINEAR, "alpha_pattern": {"down_proj": 0}}),
    Case("conv1d", "gpt2", {"target_modules": CONV1D, "fan_in_fan_out": True}),
    Case(
        "conv1d-saved-as-not-transposed",
        "gpt2",
        {"target_modules": CONV1D, "fan_in_fan_out": True},
        edit=set_config(fan_in_fan_out=False),
        peft_reads_edit=True,
    ),
    Case("conv1d-and-linear-head", "gpt2", {"target_modules": [*CONV1D, "lm_head"], "fan_in_fan_out": True}),
    Case("lora-bias", "llama", {"target_modules": ATTENTION, "lora_bias": True}),
    Case("lora-bias-conv1d", "gpt2", {"target_modules": CONV1D, "lora_bias": True, "fan_in_fan_out": True}),
    Case("bias-all", "llama", {"target_modules": ["q_proj", "up_proj"], "bias": "all"}),
    Case("bias-lora-only", "llama", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    Case("bias-all-conv1d", "gpt2", {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True}),
    Case("dora", "llama", {"target_modules": LINEAR, "use_dora": True}),
    Case("dora-many-tiles", "llama-wide", {"target_modules": LINEAR, "use_dora": True}),
    Case("dora-rslora", "llama", {"target_modules": LINEAR, "use_dora": True, "use_rslora": True}),
    Case("dora-patterns", "llama", {"target_modules": LINEAR, "use_dora": True, **RANKS}),
    Case("dora-conv1d", "gpt2", {"target_modules": CONV1D, "use_dora": True, "fan_in_fan_out": True}),
    Case("dora-alpha-zero", "llama", {"target_modules": ["q_proj"], "use_dora": True, "lora_alpha": 0}),
    Case("modules-to-save-head", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    Case("modules-to-save-embedding", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    Case("modules-to-save-norm", "llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
    Case(
        "sequence-classifier",
        "llama",
        {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"},
        **three_labels("AutoModelForSequenceClassification"),
        beside_base=True,
        config={"architectures": ["LlamaForSequenceClassification"], "label2id": {f"LABEL_{n}": n for n in range(3)}},
    ),
    Case(
        "token-classifier",
        "bert",
        {"target_modules": ["query", "value"], "task_type": "TOKEN_CLS"},
        **three_labels("AutoModelForTokenClassification"),
        beside_base=True,
        config={"architectures": ["BertForTokenClassification"]},
    ),
    *(
        Case(f"init-{init}".lower(), "llama", {"target_modules": LINEAR, "init_lora_weights": init})
        for init in ("gaussian", "orthogonal", False)
    ),
    *(
        Case(f"init-{init}", "llama", {"target_modules": LINEAR}, edit=set_config(init_lora_weights=init))
        for init in ("eva", "mica")
    ),
    *(
        Case(f"{init}{label}", base, {"target_modules": targets, "init_lora_weights": init, **more}, rounds_base=True)
        for init in ("pissa", "olora")
        for label, base, targets, more in (
            ("", "llama", LINEAR, {}),
            ("-patterns", "llama", LINEAR, RANKS),
            ("-rslora", "llama", LINEAR, {"use_rslora": True}),
            # Only the square c_proj: PEFT decomposes the stored matrix for OLoRA and fails where it is not square.
            ("-conv1d", "gpt2", r".*attn\.c_proj" if init == "olora" else CONV1D, {"fan_in_fan_out": True}),
        )
    ),
]
