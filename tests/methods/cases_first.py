"""AdaLoRA, LoKr, IA3 and HRA on every kind of layer that they know."""

from __future__ import annotations

from tests.oracle.case import Case

LINEAR = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_proj"]}
KERNELS = {"target_modules": ["flat", "image"]}


def method(name: str, base: str, peft: str, **arguments: object) -> Case:
    """A case of a method: compared with PEFT's merge in the base's own dtype."""
    return Case(name, base, arguments, peft=peft, exact=False)


CASES = [
    method("adalora", "llama", "AdaLoraConfig", init_r=4, target_r=4, total_step=10, lora_alpha=6, **LINEAR),
    method("adalora-conv1d", "gpt2", "AdaLoraConfig", init_r=4, target_r=4, total_step=10, **CONV1D),
    method("lokr", "llama", "LoKrConfig", r=4, alpha=6, **LINEAR),
    method("lokr-both", "llama", "LoKrConfig", r=2, alpha=6, decompose_both=True, **LINEAR),
    method("lokr-factor", "llama", "LoKrConfig", r=2, decompose_factor=4, **LINEAR),
    method("lokr-kernels", "convolutions", "LoKrConfig", r=2, alpha=3, **KERNELS),
    method("lokr-kernels-core", "convolutions", "LoKrConfig", r=2, use_effective_conv2d=True, **KERNELS),
    method("ia3", "llama", "IA3Config", feedforward_modules=["down_proj"], **LINEAR),
    method(
        "ia3-conv1d",
        "gpt2",
        "IA3Config",
        target_modules=["c_attn", "mlp.c_proj"],
        feedforward_modules=["mlp.c_proj"],
    ),
    method(
        "ia3-kernels",
        "convolutions",
        "IA3Config",
        target_modules=["image", "volume"],
        feedforward_modules=["image"],
    ),
    method("ia3-square", "layers", "IA3Config", target_modules=["wide", "square"], feedforward_modules=["square"]),
    method(
        "ia3-grouped",
        "layers",
        "IA3Config",
        target_modules=["grouped", "kernel"],
        feedforward_modules=["grouped"],
    ),
    method("hra", "llama", "HRAConfig", r=4, **LINEAR),
    method("hra-orthogonal", "llama", "HRAConfig", r=4, apply_GS=True, **LINEAR),
    method("hra-layers", "layers", "HRAConfig", r=4, target_modules=["wide", "square", "kernel"]),
]
