"""LoRA's variants: BD-LoRA, KaSA, VeLoRA, MonteCLoRA and MiCA.

BD-LoRA, KaSA and MiCA round their delta before they add it. KaSA rounds its base before that, here as in PEFT, so that
in bfloat16 neither of PEFT's merges is the expected value (`test_variants.py` has one).
"""

from __future__ import annotations

from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from tests.oracle.case import Case

LINEAR = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
LAYERS = {"target_modules": ["wide", "narrow", "square"]}
EVERY = (".weight", ".bias")


def variant(
    name: str, base: str, *, twice: bool = True, dtypes: tuple[str, ...] = ("float32", "bfloat16"), **arguments: object
) -> Case:
    """A case of a variant; `twice` for one whose delta PEFT rounds before it adds it."""
    return Case(name, base, arguments, exact=False, rounds_twice=EVERY if twice else (), dtypes=dtypes)


CASES = [
    variant(
        "bdlora",
        "llama",
        use_bdlora=BdLoraConfig(["o_proj", "down"], ["q_proj"], nblocks=2),
        use_rslora=True,
        **LINEAR,
    ),
    variant("bdlora-some", "layers", use_bdlora=BdLoraConfig(["wide"], None, nblocks=4, match_strict=False), **LAYERS),
    variant("kasa", "llama", dtypes=("float32",), kasa_config=KasaConfig(), **LINEAR),
    variant(
        "kasa-layers",
        "layers",
        dtypes=("float32",),
        kasa_config=KasaConfig(),
        rank_pattern={"wide": 6},
        use_rslora=True,
        **LAYERS,
    ),
    variant("velora", "llama", twice=False, velora_config=VeloraConfig(num_groups=2), **LINEAR),
    variant("monteclora", "llama", twice=False, monteclora_config=MontecloraConfig(), **LINEAR),
    variant("mica", "llama", init_lora_weights="mica", **LINEAR),
    variant("mica-table", "llama", init_lora_weights="mica", target_modules=["embed_tokens", "v_proj"]),
    variant("mica-conv1d", "gpt2", init_lora_weights="mica", target_modules=["c_attn", "c_proj"]),
]
