"""HiRA, DeLoRA, GLoRA, DEFT, PEANuT, OSF and PSOFT: methods that look at the weight, or at norms of it.

PEFT rounds all of them more than once in bfloat16, each in its own way: before the sum, after every step, or the
singular vectors that it keeps. There the expected value is PEFT's merge in float32, rounded once.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file

from tests.oracle.case import Case, Oracle, Tensors

LINEAR = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_proj"]}
EVERY = (".weight", ".bias")


def method(name: str, base: str, peft: str, **arguments: object) -> Case:
    """A case whose bfloat16 merge PEFT rounds more than once."""
    return Case(name, base, arguments, peft=peft, exact=False, rounds_twice=EVERY)


def point(base: Tensors, adapter: Path) -> Tensors:
    """The convolutions with a HiRA on the kernel of one element, which PEFT's merge trips over, float32."""
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.point.hira_{side}"].double().flatten(1) for side in "AB")
    weight = base["point.weight"]
    merged = base | {"point.weight": weight + weight * (b @ a).view(weight.shape)}
    return {name: tensor.float() for name, tensor in merged.items()}


CASES = [
    method("hira", "llama", "HiraConfig", r=4, **LINEAR),
    method("hira-patterns", "llama", "HiraConfig", r=4, rank_pattern={"down_proj": 2}, **LINEAR),
    method("hira-conv1d", "gpt2", "HiraConfig", r=4, **CONV1D),
    method("hira-bert", "bert", "HiraConfig", r=4, target_modules=["query", "output.dense"]),
    method("hira-table", "llama", "HiraConfig", r=4, target_modules=["embed_tokens", "lm_head"]),
    method("hira-layers", "layers", "HiraConfig", r=4, target_modules=["table", "wide", "square", "line", "kernel"]),
    method("hira-kernels", "convolutions", "HiraConfig", r=4, target_modules=["flat", "image", "volume"]),
    Case(
        "hira-point",
        "convolutions",
        {"r": 3, "target_modules": ["point"]},
        Oracle.FORMULA,
        formula=point,
        peft="HiraConfig",
        dtypes=("float32",),
    ),
    method("delora", "llama", "DeloraConfig", r=4, **LINEAR),
    method("delora-patterns", "llama", "DeloraConfig", r=4, rank_pattern={"q_proj": 2}, **LINEAR),
    method("delora-layers", "layers", "DeloraConfig", r=4, target_modules=["wide", "square"]),
    method("glora", "llama", "GloraConfig", r=4, **LINEAR),
    method(
        "glora-vectors", "llama", "GloraConfig", config_A_B="vector", config_C="vector", config_D_E="vector", **LINEAR
    ),
    method("glora-constants", "llama", "GloraConfig", config_A_B="constant", config_C="none", **LINEAR),
    method("glora-bias-only", "bert", "GloraConfig", config_A_B="none", target_modules=["query", "output.dense"]),
    method(
        "glora-weight-only",
        "layers",
        "GloraConfig",
        config_C="none",
        config_D_E="none",
        target_modules=["wide", "square"],
    ),
    method("deft", "llama", "DeftConfig", r=4, init_weights=False, alpha=6, **LINEAR),
    method("deft-qr", "llama", "DeftConfig", r=4, init_weights=False, decomposition_method="qr", **LINEAR),
    method("deft-para", "llama", "DeftConfig", r=4, para=True, **LINEAR),
    method("deft-qr-conv1d", "gpt2", "DeftConfig", r=4, decomposition_method="qr", alpha=3, **CONV1D),
    method("deft-conv1d", "gpt2", "DeftConfig", r=4, **CONV1D),
    method("deft-layers", "layers", "DeftConfig", r=20, decomposition_method="qr", target_modules=["wide", "square"]),
    method("peanut", "llama", "PeanutConfig", r=4, scaling=0.75, **LINEAR),
    method("peanut-deep", "llama", "PeanutConfig", r=4, depth=2, act_fn="silu", **LINEAR),
    method(
        "peanut-layers", "layers", "PeanutConfig", r=6, depth=1, act_fn="gelu_new", target_modules=["wide", "square"]
    ),
    method("osf", "llama", "OSFConfig", **LINEAR),
    method("osf-ranks", "bert", "OSFConfig", effective_rank=5, target_modules=["query", "output.dense"]),
    method("osf-layers", "layers", "OSFConfig", effective_rank=0.75, target_modules=["wide", "narrow", "square"]),
    method("psoft", "llama", "PsoftConfig", r=4, psoft_alpha=6, **LINEAR),
    method("psoft-pissa", "llama", "PsoftConfig", r=4, ab_svd_init="pissa_init", psoft_mag_a=False, **LINEAR),
    method("psoft-free", "llama", "PsoftConfig", r=4, psoft_orth=False, psoft_mag_b=False, **LINEAR),
    method("psoft-lowrank", "llama", "PsoftConfig", r=4, psoft_svd="lowrank", random_seed=3, **LINEAR),
    *(
        method(
            f"psoft-series-{terms}",
            "layers",
            "PsoftConfig",
            r=6,
            use_cayley_neumann=True,
            num_cayley_neumann_terms=terms,
            cayley_neumann_eps=radius,
            target_modules=["wide", "narrow", "square"],
        )
        for terms, radius in ((2, None), (3, None), (5, 0.9), (6, 0.3))
    ),
    # Several tiles of rows, whose sums make one statistic of the columns.
    *(
        method(f"{name}-wide", "llama-wide", config, target_modules=["up_proj", "down_proj"], **arguments)
        for name, config, arguments in (
            ("hira", "HiraConfig", {"r": 4}),
            ("delora", "DeloraConfig", {"r": 4}),
            ("glora", "GloraConfig", {"r": 4}),
            ("deft", "DeftConfig", {"r": 4, "decomposition_method": "qr"}),
            ("peanut", "PeanutConfig", {"r": 4, "depth": 1}),
            ("osf", "OSFConfig", {"effective_rank": 60}),
            ("psoft", "PsoftConfig", {"r": 4}),
        )
    ),
]
