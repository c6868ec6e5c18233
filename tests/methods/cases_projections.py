"""LoHa, the methods that share or draw their projections, and the spectral ones."""

from __future__ import annotations

from tests.oracle.case import Case

LINEAR = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_proj"]}
UNSAVED = {"save_projection": False}
EVERY = (".weight",)
KERNELS = {"target_modules": ["flat", "image"]}


def method(name: str, base: str, peft: str, **arguments: object) -> Case:
    """A case of a method: compared with PEFT's merge in the base's own dtype."""
    return Case(name, base, arguments, peft=peft, exact=False)


def randlora(name: str, base: str, **arguments: object) -> Case:
    """A case of RandLoRA, whose delta PEFT rounds to bfloat16 before it is added."""
    given = {"peft": "RandLoraConfig", "exact": False, "rounds_twice": EVERY}
    return Case(name, base, arguments, draws_by_dtype="save_projection" in arguments, **given)


def wave(name: str, base: str, **arguments: object) -> Case:
    """A case of WaveFT, which PEFT sums up in another order."""
    given = {"n_frequency": 50, "scaling": 2.0, **arguments}
    return Case(name, base, given, peft="WaveFTConfig", exact=False, error=5e-6)


def frod(name: str, base: str, **arguments: object) -> Case:
    """A case of FRoD. In bfloat16 PEFT rounds U, V and their product, and draws them anew when it loads the files, so
    that no precise merge of the same numbers is to be had."""
    given = {"progressbar": False, **arguments}
    return Case(name, base, given, peft="FrodConfig", exact=False, dtypes=("float32",))


LOHA = [
    method("loha", "llama", "LoHaConfig", r=4, alpha=6, **LINEAR),
    method(
        "loha-patterns",
        "llama",
        "LoHaConfig",
        r=4,
        alpha=6,
        rank_pattern={"q_proj": 3},
        alpha_pattern={"down_proj": 5},
        **LINEAR,
    ),
    method("loha-kernels", "convolutions", "LoHaConfig", r=2, alpha=3, **KERNELS),
    method("loha-kernels-core", "convolutions", "LoHaConfig", r=2, alpha=3, use_effective_conv2d=True, **KERNELS),
    method("loha-square", "layers", "LoHaConfig", r=3, target_modules=["wide", "narrow", "square"]),
    method("loha-grouped", "layers", "LoHaConfig", r=2, target_modules=["line", "grouped", "kernel"]),
    method(
        "loha-grouped-core",
        "layers",
        "LoHaConfig",
        r=2,
        use_effective_conv2d=True,
        target_modules=["line", "grouped", "kernel"],
    ),
    method("loha-bert", "bert", "LoHaConfig", r=4, target_modules=["query", "dense"]),
]
VERA = [
    method("vera", "llama", "VeraConfig", r=4, **LINEAR),
    method("vera-conv1d", "gpt2", "VeraConfig", r=4, **CONV1D),
    method("vera-square", "layers", "VeraConfig", r=4, target_modules=["wide", "narrow", "square"]),
    method("vera-drawn", "llama", "VeraConfig", r=4, save_projection=False, projection_prng_key=3, **LINEAR),
    method("vera-drawn-conv1d", "gpt2", "VeraConfig", r=4, save_projection=False, **CONV1D),
    method("vera-drawn-bert", "bert", "VeraConfig", r=4, save_projection=False, target_modules=["query", "dense"]),
    method("pvera", "llama", "PveraConfig", r=4, **LINEAR),
    method("pvera-conv1d", "gpt2", "PveraConfig", r=4, **CONV1D),
    method("pvera-drawn", "llama", "PveraConfig", r=4, save_projection=False, projection_prng_key=3, **LINEAR),
]
BANK = {"num_vectors": 12, "vector_length": 8}
VBLORA = [
    method("vblora", "llama", "VBLoRAConfig", r=3, topk=2, **BANK, **LINEAR),
    method("vblora-conv1d", "gpt2", "VBLoRAConfig", r=4, topk=3, **BANK, **CONV1D),
    method("vblora-compact", "llama", "VBLoRAConfig", r=3, topk=3, save_only_topk_weights=True, **BANK, **LINEAR),
    method("vblora-square", "layers", "VBLoRAConfig", r=2, topk=1, **BANK, target_modules=["wide", "square"]),
]
RANDLORA = [
    randlora("randlora", "llama", r=4, randlora_alpha=6, **LINEAR),
    randlora("randlora-conv1d", "gpt2", r=5, randlora_alpha=6, **CONV1D),
    randlora("randlora-uneven", "layers", r=5, target_modules=["wide", "narrow", "square"]),
    randlora("randlora-drawn", "llama", r=4, projection_prng_key=3, **UNSAVED, **LINEAR),
    randlora("randlora-drawn-conv1d", "gpt2", r=5, **UNSAVED, **CONV1D),
    randlora("randlora-sparse", "llama", r=4, sparse=True, **LINEAR),
    randlora("randlora-sparse-drawn", "llama", r=4, sparse=True, **UNSAVED, **LINEAR),
    randlora("randlora-very-sparse-drawn", "bert", r=4, very_sparse=True, **UNSAVED, target_modules=["query", "dense"]),
]
FOURIER = [
    method("fourierft", "llama", "FourierFTConfig", n_frequency=60, scaling=90.0, **LINEAR),
    method("fourierft-conv1d", "gpt2", "FourierFTConfig", n_frequency=60, random_loc_seed=3, **CONV1D),
    method(
        "fourierft-patterns",
        "bert",
        "FourierFTConfig",
        n_frequency=30,
        n_frequency_pattern={"query": 50},
        target_modules=["query", "dense"],
    ),
    method(
        "fourierft-layers", "layers", "FourierFTConfig", n_frequency=40, target_modules=["wide", "narrow", "square"]
    ),
]
WAVES = [
    wave("waveft", "llama", wavelet_family="db1", **LINEAR),
    wave("waveft-conv1d", "gpt2", wavelet_family="db2", random_loc_seed=3, **CONV1D),
    wave("waveft-unfiltered", "llama", use_idwt=False, **LINEAR),
    wave("waveft-unfiltered-conv1d", "gpt2", use_idwt=False, **CONV1D),
    wave("waveft-proportional", "llama", wavelet_family="sym3", proportional_parameters=True, **LINEAR),
    wave("waveft-layers", "layers", wavelet_family="db3", target_modules=["wide", "narrow", "square"]),
    *(
        wave(f"waveft-{family}", "layers", wavelet_family=family, target_modules=["wide", "square"])
        for family in [*(f"db{n}" for n in range(4, 11)), *(f"sym{n}" for n in range(4, 11)), "sym2", "coif1"]
    ),
    wave("waveft-coif2", "llama", wavelet_family="coif2", **LINEAR),
    wave("waveft-coif3", "bert", wavelet_family="coif3", target_modules=["query", "dense"]),
]
ALL = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}
TINY = [
    method("tinylora", "llama", "TinyLoraConfig", r=3, u=5, **LINEAR),
    method("tinylora-tied", "llama", "TinyLoraConfig", r=3, u=5, weight_tying=0.6, **ALL),
    method("tinylora-one-vector", "layers", "TinyLoraConfig", weight_tying=1.0, target_modules=["wide", "table"]),
    method("tinylora-conv1d", "gpt2", "TinyLoraConfig", r=3, u=5, **CONV1D),
    method("tinylora-table", "llama", "TinyLoraConfig", r=3, u=5, target_modules=["embed_tokens", "up_proj"]),
    method("tinylora-drawn", "llama", "TinyLoraConfig", r=3, u=5, projection_seed=7, **UNSAVED, **ALL),
    method("tinylora-drawn-tied", "gpt2", "TinyLoraConfig", r=3, u=5, weight_tying=0.5, **UNSAVED, **CONV1D),
    method("tinylora-drawn-bert", "bert", "TinyLoraConfig", r=3, u=5, **UNSAVED, target_modules=["query", "value"]),
]
UNI = [
    method("unilora", "llama", "UniLoraConfig", r=3, theta_d_length=40, save_indices=True, **LINEAR),
    method("unilora-conv1d", "gpt2", "UniLoraConfig", r=3, theta_d_length=40, save_indices=True, **CONV1D),
    method("unilora-square", "layers", "UniLoraConfig", r=2, save_indices=True, target_modules=["wide", "square"]),
]
FROD = [
    frod("frod", "llama", sparse_rate=0.05, **LINEAR),
    frod("frod-conv1d", "gpt2", sparse_rate=0.05, target_modules=["c_attn"]),
    frod("frod-bert", "bert", sparse_rate=0.02, target_modules=["query", "output.dense"]),
    frod("frod-layers", "layers", sparse_rate=0.02, target_modules=["wide", "square"]),
]
CASES = [*LOHA, *VERA, *VBLORA, *RANDLORA, *FOURIER, *WAVES, *TINY, *UNI, *FROD]
