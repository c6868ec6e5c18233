"""Stacked experts and other bare parameters (`target_parameters`), in each of the forms PEFT has saved them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file

from tests.factories import EXPERTS as CONFIG
from tests.oracle.case import Case
from tests.oracle.editing import WEIGHTS, Edit, set_config

if TYPE_CHECKING:
    import torch

GPT_OSS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LLAMA4 = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
EXPERTS = {"gpt-oss": GPT_OSS, "llama4": LLAMA4}
STACKED = ("experts.gate_up_proj", "experts.down_proj")
"""PEFT rounds the delta of a bare parameter before it adds it."""
PATTERNS = {"rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"experts.gate_up_proj": 9}}


def turned(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the transposed delta: A holds rows expert by expert, B columns rank by rank."""
    experts = CONFIG["num_local_experts"]
    rank = a.shape[0] // experts
    stacked_a, stacked_b = a.view(experts, rank, -1), b.view(-1, rank, experts)
    return stacked_b.permute(2, 1, 0).reshape(experts * rank, -1), stacked_a.permute(2, 1, 0).reshape(
        -1, rank * experts
    )


def turn(adapter: Path) -> None:
    """The same adapter in the other of the two forms."""
    tensors = load_file(adapter / WEIGHTS)
    for name in [name for name in tensors if ".experts." in name and name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = (factor.contiguous() for factor in turned(tensors[name], tensors[other]))
    save_file(tensors, adapter / WEIGHTS, {"format": "pt"})


def of_version(version: str | None, *edits: Edit) -> Edit:
    """The adapter as that version of PEFT would have saved it."""
    steps: list[Callable[[Path], None]] = [set_config(peft_version=version), *edits]

    def edit(adapter: Path) -> None:
        for step in steps:
            step(adapter)

    return edit


# Up to 0.18 the delta was always saved transposed, in 0.19.0 for modules that are not `is_transposed`, since 0.19.1 for
# those that are. gpt_oss has that attribute, llama4 has not.
ERAS = {
    "gpt-oss": {None: False, "0.18.1": False, "0.19.0": True, "0.19.1": False, "0.20.0.dev0@abc": False},
    "llama4": {None: True, "0.18.1": True, "0.19.0": True, "0.19.1": False, "0.20.0.dev0@abc": False},
}
CASES = [
    *(
        Case(
            f"experts-{model}{label}",
            base,
            {"target_modules": [], "target_parameters": EXPERTS[model], **more},
            rounds_twice=STACKED,
        )
        for model in EXPERTS
        for label, base, more in (
            ("", model, {}),
            ("-square", f"{model}-square", {}),
            ("-rslora", model, {"use_rslora": True}),
            ("-patterns", model, PATTERNS),
            ("-with-attention", model, {"target_modules": ["q_proj", "v_proj"]}),
        )
    ),
    *(
        Case(
            f"experts-{model}-{target.rpartition('.')[2]}-only",
            base,
            {"target_modules": [], "target_parameters": [target]},
            rounds_twice=STACKED,
            # Alone and square, the experts of gpt-oss do not say which transformers they were trained with.
            options={"expert_orientation": "transposed"} if model == "gpt-oss" else {},
        )
        for model, base in (("gpt-oss", "gpt-oss-square"), ("llama4", "llama4"))
        for target in EXPERTS[model]
    ),
    Case(
        "router-as-parameter",
        "gpt-oss",
        {"target_modules": [], "target_parameters": [*GPT_OSS, "router.weight"]},
        rounds_twice=(*STACKED, "router.weight"),
    ),
    Case(
        "gate-as-parameter",
        "qwen3-moe",
        {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"]},
        rounds_twice=("mlp.gate.weight",),
    ),
    Case(
        "linear-as-parameter",
        "llama",
        {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]},
        rounds_twice=("q_proj.weight", "down_proj.weight"),
    ),
    *(
        Case(
            f"experts-{model}{shape}-of-{version}",
            f"{model}{shape}",
            {"target_modules": [], "target_parameters": EXPERTS[model]},
            edit=of_version(version, *([turn] if other_form else [])),
            rounds_twice=STACKED,
            forward=False,
        )
        for model, versions in ERAS.items()
        for version, other_form in versions.items()
        for shape in ("", "-square")
    ),
]
