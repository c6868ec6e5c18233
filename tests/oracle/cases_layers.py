"""Layers of torch itself, in models that are no transformers models: convolutions and MultiheadAttention."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from tests.oracle.case import Case, Oracle, Tensors
from tests.oracle.editing import PREFIX, WEIGHTS, read_config

ATTENTION = ("attn.in_proj_weight", "attn.out_proj.weight")
CONVOLUTIONS = ["flat", "image", "volume"]


def point_convolution(base: Tensors, adapter: Path) -> Tensors:
    """A kernel of size one is a matrix: `W + scaling * B @ A`."""
    factors, config = load_file(adapter / WEIGHTS), read_config(adapter)
    a, b = (factors[f"{PREFIX}point.lora_{x}.weight"].double().flatten(1) for x in "AB")
    weight = base["point.weight"]
    delta = config["lora_alpha"] / config["r"] * (b @ a)
    return base | {"point.weight": weight + delta.view(weight.shape)}


CASES = [
    Case("convolutions", "convolutions", {"target_modules": CONVOLUTIONS}),
    Case("convolutions-rslora", "convolutions", {"target_modules": CONVOLUTIONS, "use_rslora": True}),
    Case("convolutions-dora", "convolutions", {"target_modules": CONVOLUTIONS, "use_dora": True}),
    Case("convolutions-bias", "convolutions", {"target_modules": CONVOLUTIONS, "bias": "all"}),
    # PEFT's merge looks at the kernel's size in the wrong dimensions; its forward pass is right.
    Case("conv3d-1x1x1", "convolutions", {"target_modules": ["point"]}, Oracle.FORMULA, formula=point_convolution),
    # PEFT adds out_proj's delta twice, in the forward pass as in the merge.
    Case("attention", "attention", {"target_modules": ["attn"]}, rounds_twice=ATTENTION),
    Case(
        "attention-and-linear",
        "attention",
        {"target_modules": ["attn", "head"], "use_rslora": True},
        rounds_twice=ATTENTION,
    ),
    Case("attention-bias", "attention", {"target_modules": ["attn"], "bias": "all"}, rounds_twice=ATTENTION),
]
