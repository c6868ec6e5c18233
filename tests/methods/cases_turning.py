"""OFT, BOFT, RoAd and other methods that turn or shift what is there, norms, biases and rows of tables among it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.methods import old_oft
from tests.oracle.case import Case, Oracle, Tensors
from tests.oracle.editing import Edit, rename_keys, set_config

LINEAR = {"target_modules": ["q_proj", "o_proj", "down_proj"]}
OUTPUTS = {"q_proj": 32, "o_proj": 32, "down_proj": 32, "wide": 24, "narrow": 16, "kernel": 16, "gate_proj": 2500}


def oft(name: str, base: str, **arguments: object) -> Case:
    """A case of OFT, by today's PEFT."""
    return Case(name, base, {"oft_block_size": 8, **arguments}, peft="OFTConfig", exact=False)


def older(
    name: str, edit: Edit, formula: Callable[[Tensors, Path], Tensors], base: str = "llama", **arguments: object
) -> Case:
    """A case of OFT as an older PEFT wrote and merged it."""
    given = {"oft_block_size": 8, **LINEAR, **arguments}
    told = {"edit": edit, "formula": formula, "peft_reads_edit": True}
    return Case(name, base, given, Oracle.FORMULA, peft="OFTConfig", exact=False, **told)  # type: ignore[arg-type]


def method(name: str, base: str, peft: str, **arguments: object) -> Case:
    """A case that PEFT rounds once in bfloat16."""
    return Case(name, base, arguments, peft=peft, exact=False)


def rounded(name: str, base: str, peft: str, **arguments: object) -> Case:
    """A case that PEFT rounds on the way in bfloat16: there its float32 merge counts, rounded once."""
    return Case(name, base, arguments, peft=peft, exact=False, rounds_twice=(".weight", ".bias"))


def bone(name: str, base: str, **arguments: object) -> Case:
    """A case of MiSS under the name that it had, in a file as Bone wrote it."""

    def edit(adapter: Path) -> None:
        rename_keys(lambda key: key.replace("miss_block", "bone_block"))(adapter)
        set_config(peft_type="BONE", peft_version=None, mini_r=None, miss_dropout=None)(adapter)

    return Case(name, base, arguments, edit=edit, peft="MissConfig", exact=False)


LAYERS = {"target_modules": ["wide", "narrow", "kernel"]}
SQUARE = {"target_modules": ["wide", "square"]}
TILES = {"target_modules": ["gate_proj", "down_proj"]}
GATE = {"target_modules": ["gate_proj"]}
BOTH = ["embed_tokens", "lm_head"]
CASES = [
    oft("oft", "llama", **LINEAR),
    oft("oft-exact", "llama", use_cayley_neumann=False, **LINEAR),
    oft("oft-two-terms", "llama", num_cayley_neumann_terms=2, **LINEAR),
    oft("oft-three-terms", "llama", num_cayley_neumann_terms=3, **LINEAR),
    oft("oft-seven-terms", "llama", num_cayley_neumann_terms=7, **LINEAR),
    oft("oft-shared", "llama", block_share=True, **LINEAR),
    oft("oft-constrained", "llama", coft=True, eps=0.5, **LINEAR),
    oft("oft-constrained-exact", "llama", coft=True, eps=0.5, block_share=True, use_cayley_neumann=False, **LINEAR),
    oft("oft-one-block", "llama", oft_block_size=0, r=1, use_cayley_neumann=False, **LINEAR),
    oft("oft-bert", "bert", bias="all", target_modules=["query", "output.dense"]),
    oft("oft-table", "llama", target_modules=["embed_tokens", "lm_head"]),
    # A kernel is taken as one row. PEFT's forward pass differs there; its merge is the oracle.
    oft("oft-layers", "layers", target_modules=["table", "wide", "narrow", "square", "kernel"]),
    older("oft-0.17", old_oft.written_by_0_17, old_oft.merged_by_0_17),
    older("oft-0.17-three-terms", old_oft.written_by_0_17, old_oft.merged_by_0_17, num_cayley_neumann_terms=3),
    older("oft-0.15", old_oft.written_by_0_15(OUTPUTS), old_oft.merged_by_0_15),
    older("oft-0.15-shared", old_oft.written_by_0_15(OUTPUTS, block_share=True), old_oft.merged_by_0_15),
    older("oft-0.15-constrained", old_oft.written_by_0_15(OUTPUTS, coft=True, eps=0.02), old_oft.merged_by_0_15),
    older("oft-0.15-layers", old_oft.written_by_0_15(OUTPUTS), old_oft.merged_by_0_15, "layers", **LAYERS),
    # Five blocks of seven outputs, for 32 of them: the last one is cut off.
    older("oft-0.13", old_oft.written_by_0_13(OUTPUTS, 5), old_oft.merged_by_0_15),
    older("oft-0.13-shared", old_oft.written_by_0_13(OUTPUTS, 4, block_share=True), old_oft.merged_by_0_15),
    older("oft-0.13-layers", old_oft.written_by_0_13(OUTPUTS, 4), old_oft.merged_by_0_15, "layers", **LAYERS),
    method("boft", "llama", "BOFTConfig", boft_block_size=8, **LINEAR),
    method("boft-blocks", "llama", "BOFTConfig", boft_block_size=0, boft_block_num=2, **LINEAR),
    method("boft-bert", "bert", "BOFTConfig", boft_block_size=4, bias="boft_only", target_modules=["query", "value"]),
    method("boft-layers", "layers", "BOFTConfig", boft_block_size=4, target_modules=["wide", "square", "kernel"]),
    # PEFT turns in the base's dtype, by a matrix rounded to it.
    rounded("road-1", "llama", "RoadConfig", variant="road_1", group_size=8, **LINEAR),
    rounded("road-2", "llama", "RoadConfig", variant="road_2", group_size=16, **LINEAR),
    rounded("road-4", "llama", "RoadConfig", variant="road_4", group_size=8, **LINEAR),
    rounded("road-bert", "bert", "RoadConfig", variant="road_4", group_size=2, target_modules=["query", "dense"]),
    rounded("road-layers", "layers", "RoadConfig", variant="road_1", group_size=8, target_modules=["wide", "square"]),
    method("miss", "llama", "MissConfig", r=8, **LINEAR),
    method("miss-uneven", "llama", "MissConfig", r=5, **LINEAR),
    method("miss-mini", "llama", "MissConfig", r=8, mini_r=4, init_weights="mini", **LINEAR),
    method("miss-bat", "llama", "MissConfig", r=8, init_weights="bat", **LINEAR),
    method("miss-bert", "bert", "MissConfig", r=8, bias="MiSS_only", target_modules=["query", "dense"]),
    method("miss-layers", "layers", "MissConfig", r=4, init_weights="bat", target_modules=["wide", "square"]),
    bone("bone", "llama", r=8, **LINEAR),
    bone("bone-uneven", "llama", r=5, **LINEAR),
    bone("bone-bat", "llama", r=8, init_weights="bat", **LINEAR),
    method("norms", "llama", "LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    method("norms-with-bias", "bert", "LNTuningConfig", target_modules=["LayerNorm"]),
    method("norms-gpt2", "gpt2", "LNTuningConfig", target_modules=["ln_1", "ln_f"]),
    method("norms-layers", "layers", "LNTuningConfig", target_modules=["norm", "wide", "kernel", "table"]),
    method("beft", "llama", "BeftConfig", target_modules=["q_proj", "v_proj"]),
    method("beft-bert", "bert", "BeftConfig", target_modules=["value"]),
    method("beft-layers", "layers", "BeftConfig", target_modules=["wide"]),
    method("tokens-alone", "llama", "TrainableTokensConfig", token_indices=[60, 0, 7]),
    method("tokens-alone-both", "llama", "TrainableTokensConfig", token_indices=[3], target_modules=BOTH),
    method("tokens-alone-tied", "llama-tied", "TrainableTokensConfig", token_indices=[5, 63]),
    method("tokens-alone-gpt2-tied", "gpt2-tied", "TrainableTokensConfig", token_indices=[5, 9]),
    method("tokens-alone-layers", "layers", "TrainableTokensConfig", token_indices=[29], target_modules=["table"]),
    method("shira", "llama", "ShiraConfig", r=2, random_seed=3, **LINEAR),
    method("shira-bert", "bert", "ShiraConfig", r=3, target_modules=["query", "intermediate.dense"]),
    method("shira-layers", "layers", "ShiraConfig", r=2, target_modules=["wide", "square"]),
    # Values are rounded before they are added, and the product after them.
    rounded("supertuning", "llama", "SupertuningConfig", sparsity=0.8, **LINEAR),
    rounded("supertuning-lora", "llama", "SupertuningConfig", sparsity=0.8, r=4, lora_alpha=6, **LINEAR),
    rounded("supertuning-bottom", "layers", "SupertuningConfig", sparsity=0.9, select_top=False, **SQUARE),
    rounded("supertuning-found", "llama", "SupertuningConfig", sparsity=0.8, save_precomputed_indices=False, **LINEAR),
    rounded(
        "supertuning-found-bottom",
        "layers",
        "SupertuningConfig",
        sparsity=0.7,
        r=2,
        select_top=False,
        save_precomputed_indices=False,
        **SQUARE,
    ),
    rounded("c3a", "llama", "C3AConfig", block_size=8, **LINEAR),
    rounded("c3a-pattern", "llama", "C3AConfig", block_size=16, block_size_pattern={"q_proj": 4}, **LINEAR),
    rounded("c3a-layers", "layers", "C3AConfig", block_size=8, target_modules=["wide", "narrow", "square"]),
    method("gralora", "llama", "GraloraConfig", r=4, alpha=6, **LINEAR),
    method("gralora-four", "llama", "GraloraConfig", r=8, alpha=6, gralora_k=4, **LINEAR),
    method("gralora-hybrid", "llama", "GraloraConfig", r=4, alpha=6, hybrid_r=2, **LINEAR),
    method("gralora-conv1d", "gpt2", "GraloraConfig", r=4, hybrid_r=2, target_modules=["c_attn", "c_proj"]),
    method("gralora-layers", "layers", "GraloraConfig", r=4, target_modules=["wide", "narrow", "square"]),
    # Matrices of several tiles.
    oft("oft-tiles", "llama-wide", oft_block_size=4, **TILES),
    older("oft-0.13-tiles", old_oft.written_by_0_13(OUTPUTS, 70), old_oft.merged_by_0_15, "llama-wide", **GATE),
    method("boft-tiles", "llama-wide", "BOFTConfig", boft_block_size=4, **TILES),
    rounded("road-tiles", "llama-wide", "RoadConfig", variant="road_2", group_size=20, **GATE),
    method("miss-tiles", "llama-wide", "MissConfig", r=7, **TILES),
    method("miss-bat-tiles", "llama-wide", "MissConfig", r=4, init_weights="bat", **TILES),
    method("shira-tiles", "llama-wide", "ShiraConfig", r=2, random_seed=3, **TILES),
    rounded("supertuning-tiles", "llama-wide", "SupertuningConfig", sparsity=0.9, r=2, **TILES),
    rounded(
        "supertuning-found-tiles",
        "llama-wide",
        "SupertuningConfig",
        sparsity=0.9,
        r=2,
        save_precomputed_indices=False,
        **TILES,
    ),
    rounded("c3a-tiles", "llama-wide", "C3AConfig", block_size=4, **TILES),
    method("gralora-tiles", "llama-wide", "GraloraConfig", r=8, gralora_k=4, **TILES),
    method("tokens-alone-tiles", "llama-wide", "TrainableTokensConfig", token_indices=[4999, 0, 2100]),
]
