"""Methods that look at the weight: layouts that hold it in other ways, what is refused, and two decompositions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Phi3Config

import streammerge
from streammerge.core.errors import (
    AdapterError,
    BudgetError,
    CompositionError,
    ConfigContradictionError,
    IncompleteFactorsError,
    NotMergeableError,
    ShapeMismatchError,
    UnknownFieldError,
)
from streammerge.methods.types.psoft import random_svd
from tests.factories import DECODER, load_tensors, make_adapter
from tests.methods import cases_variants, cases_weights
from tests.oracle.comparing import assert_parity
from tests.oracle.workbench import Workbench

CASES = {case.name: case for case in (*cases_weights.CASES, *cases_variants.CASES)}
FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
Tensors = dict[str, torch.Tensor]


# --- layouts ----------------------------------------------------------------------------------------------------------
def fuse(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """A Llama's tensors under the names, and in the forms, of a Phi-3."""
    fused = dict(tensors)
    for layer in range(DECODER["num_hidden_layers"]):
        for whole, parts in FUSED.items():
            for kind in ("weight", "bias"):
                names = [f"model.layers.{layer}.{part}.{kind}" for part in parts]
                if names[0] in fused:
                    fused[f"model.layers.{layer}.{whole}.{kind}"] = torch.cat([fused.pop(name) for name in names])
    return fused


def write_phi(root: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint of a Phi-3."""
    root.mkdir(parents=True)
    config = {**Phi3Config(**DECODER).to_dict(), "architectures": ["Phi3ForCausalLM"]}
    (root / "config.json").write_text(json.dumps(config, default=str))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / "model.safetensors")
    return root


FROM_LLAMA = ("hira", "delora", "glora", "glora-vectors", "glora-constants", "deft", "deft-qr", "deft-para", "peanut")


@pytest.mark.parametrize("name", [*FROM_LLAMA, "osf", "psoft", "kasa", "bdlora"])
def test_a_part_of_a_fused_weight_is_changed_like_a_whole_one(bench: Workbench, name: str, tmp_path: Path) -> None:
    base = write_phi(tmp_path / "base", fuse(load_tensors(bench.base("llama", "float32"))))
    case, out = CASES[name], tmp_path / "out"
    streammerge.merge(base, bench.adapter(case, "float32"), out)
    assert_parity(load_tensors(out), fuse(bench.reference(case, "float32")), (), case.error)


SPLIT = {
    "hira": ("HiraConfig", {"r": 4}),
    "delora": ("DeloraConfig", {"r": 4}),
    "glora": ("GloraConfig", {"r": 4}),
    "bdlora": ("LoraConfig", {"use_bdlora": BdLoraConfig(None, ["qkv", "gate_up"], nblocks=2)}),
}


def split_inputs(bench: Workbench, kind: str, arguments: Mapping[str, Any], root: Path) -> tuple[Path, Path, Tensors]:
    """A Phi-3 stored in parts, an adapter trained on its fused form, and what the merge must come to in that form."""
    parts = {n: t for n, t in load_tensors(bench.base("llama", "float32")).items() if ".bias" not in n}
    split, fused = write_phi(root / "split", parts), write_phi(root / "fused", fuse(parts))
    targets = ["qkv_proj", "gate_up_proj", "down_proj"][: 2 if "use_bdlora" in arguments else 3]
    model = AutoModelForCausalLM.from_pretrained(fused, dtype=torch.float32)
    make_adapter(model, kind, target_modules=targets, **arguments).save_pretrained(root / "adapter")
    model = AutoModelForCausalLM.from_pretrained(fused, dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, root / "adapter").merge_and_unload()
    return split, root / "adapter", dict(merged.state_dict())


@pytest.mark.parametrize("name", SPLIT)
def test_a_weight_that_is_stored_in_parts_is_changed_part_by_part(bench: Workbench, name: str, tmp_path: Path) -> None:
    base, adapter, wanted = split_inputs(bench, *SPLIT[name], tmp_path)
    streammerge.merge(base, adapter, tmp_path / "out")
    ours = fuse(load_tensors(tmp_path / "out"))
    assert_parity(ours, {name: tensor for name, tensor in wanted.items() if name.endswith(".weight")}, ())


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("DeftConfig", {"r": 4}, "all outputs of an input at once"),
        ("OSFConfig", {}, "the whole matrix"),
    ],
)
def test_a_weight_that_is_needed_whole_is_not_merged_in_parts(
    bench: Workbench, kind: str, arguments: dict[str, Any], words: str, tmp_path: Path
) -> None:
    base, adapter, _ = split_inputs(bench, kind, arguments, tmp_path)
    with pytest.raises(NotMergeableError, match=words):
        streammerge.merge(base, adapter, tmp_path / "out")


# --- refusals ---------------------------------------------------------------------------------------------------------
Change = tuple[dict[str, Any], dict[str, torch.Tensor | None]]
"""Fields of the config, and tensors by the ends of their names: another one, or None for none."""
ONE = torch.ones
REFUSED: dict[str, tuple[str, Change, type[Exception], str]] = {
    "hira ranks": ("hira", ({}, {"q_proj.hira_A": ONE(3, 32)}), ShapeMismatchError, "ranks of `hira_A` and `hira_B`"),
    "hira sizes": ("hira", ({}, {"q_proj.hira_B": ONE(31, 4)}), ShapeMismatchError, "31 outputs and 32 inputs"),
    "hira half": ("hira", ({}, {"q_proj.hira_B": None}), IncompleteFactorsError, "HIRA needs hira_A and hira_B"),
    "hira field": ("hira", ({"hira_alpha": 3}, {}), UnknownFieldError, "hira_alpha"),
    "hira table": ("hira-table", ({}, {"tokens.hira_embedding_B": ONE(31, 4)}), ShapeMismatchError, "64 rows of 31"),
    "hira kernel": ("hira-kernels", ({}, {"flat.hira_A": ONE(4, 2, 6)}), ShapeMismatchError, r"kernel of shape"),
    "delora norms": ("delora", ({}, {"q_proj.delora_w_norm": ONE(31)}), ShapeMismatchError, "not for 32 inputs"),
    "delora strength": ("delora", ({}, {"q_proj.delora_lambda": ONE(2)}), ShapeMismatchError, "`delora_lambda`"),
    "delora no norms": ("delora", ({}, {"q_proj.delora_w_norm": None}), IncompleteFactorsError, "delora_w_norm"),
    "glora path": ("glora", ({}, {"q_proj.glora_C.Xd": None}), IncompleteFactorsError, "glora_C.Xu"),
    "glora sizes": ("glora", ({}, {"q_proj.glora_C.Xd": ONE(31, 4)}), ShapeMismatchError, "`glora_C` is a product"),
    "glora column": ("glora-vectors", ({}, {"q_proj.glora_C.X": ONE(1)}), ShapeMismatchError, "`glora_C` has shape"),
    "glora scalar": ("glora-vectors", ({}, {"q_proj.glora_D.X": ONE(31)}), ShapeMismatchError, "`glora_D` has shape"),
    "deft method": ("deft", ({"decomposition_method": "svd"}, {}), ConfigContradictionError, "relu or qr"),
    "deft para": ("deft", ({"para": True}, {}), ConfigContradictionError, "has a `deft_R`"),
    "deft no R": ("deft-para", ({"para": False}, {}), ConfigContradictionError, "has no `deft_R`"),
    "deft ranks": ("deft", ({}, {"q_proj.deft_R": ONE(3, 32)}), ShapeMismatchError, "`deft_P` and `deft_R` differ"),
    "deft alpha": ("deft", ({"alpha": "3"}, {}), ConfigContradictionError, "`alpha` that is not a number"),
    "peanut activation": ("peanut", ({"act_fn": "prelu"}, {}), NotMergeableError, "the activation is none of relu"),
    "peanut depth": ("peanut-deep", ({"depth": 1}, {}), ShapeMismatchError, "the config says 1"),
    "peanut level": ("peanut-deep", ({}, {"q_proj.peanut_decoders.1.weight": None}), ShapeMismatchError, "levels"),
    "peanut shape": ("peanut", ({}, {"q_proj.peanut_B.weight": ONE(32, 3)}), ShapeMismatchError, "`peanut_A`"),
    "osf ranks": ("osf", ({}, {"q_proj.osf_svd_params.S_low": ONE(3)}), ShapeMismatchError, "one rank of 3"),
    "osf half": ("osf", ({}, {"q_proj.osf_svd_params.V_low": None}), IncompleteFactorsError, "V_low"),
    "psoft rank": ("psoft", ({"r": 5}, {}), ShapeMismatchError, "rank 5"),
    "psoft diagonal": ("psoft", ({"psoft_mag_a": False}, {}), ConfigContradictionError, "`psoft_R.vector_a`"),
    "psoft no diagonal": ("psoft-pissa", ({"psoft_mag_a": True}, {}), ConfigContradictionError, "has no `psoft_R.v"),
    "psoft alpha": ("psoft", ({"psoft_alpha": 0}, {}), ConfigContradictionError, "not a positive number"),
    "psoft init": ("psoft", ({"ab_svd_init": "random"}, {}), ConfigContradictionError, "psoft_init or pissa_init"),
    "psoft svd": ("psoft", ({"psoft_svd": "exact"}, {}), ConfigContradictionError, "full or lowrank"),
    "bdlora both": ("bdlora", ({"use_bdlora": {"target_modules_bd_a": ["o_"], "target_modules_bd_b": ["proj"]}}, {}),
                    ConfigContradictionError, "named by both"),
    "bdlora neither": ("bdlora", ({"use_bdlora": {"nblocks": 2}}, {}), ConfigContradictionError, "named by neither"),
    "bdlora blocks": ("bdlora", ({}, {"q_proj.lora_B.weight": ONE(32, 3)}), ShapeMismatchError, r"B \[32, 3\]"),
    "bdlora option": ("bdlora", ({"use_bdlora": {"shape": 2}}, {}), ConfigContradictionError, "`use_bdlora`"),
    "bdlora dora": ("bdlora", ({"use_dora": True}, {}), NotMergeableError, "use_dora"),
    "kasa diagonal": ("kasa", ({}, {"q_proj.lora_diag": None}), IncompleteFactorsError, "KaSA"),
    "kasa not said": ("kasa", ({"kasa_config": None}, {}), NotMergeableError, "lora_diag"),
    "kasa pissa": ("kasa", ({"init_lora_weights": "pissa"}, {}), NotMergeableError, "init_lora_weights = pissa"),
    "velora not said": ("velora", ({"velora_config": None}, {}), NotMergeableError, "lora_velora_embed"),
    "monteclora not said": ("monteclora", ({"monteclora_config": None}, {}), NotMergeableError, "monteclora_sampler"),
}  # fmt: skip


def changed(adapter: Path, root: Path, change: Change) -> Path:
    """A copy of an adapter with some of its fields and tensors changed."""
    config = json.loads((adapter / "adapter_config.json").read_text()) | change[0]
    tensors = load_file(adapter / "adapter_model.safetensors")
    for end, new in change[1].items():
        (found,) = [name for name in tensors if name.endswith(end) and ("layers.0" in name or "layers" not in name)]
        tensors.pop(found)
        if new is not None:
            tensors[found] = new
    root.mkdir(parents=True)
    (root / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, root / "adapter_model.safetensors")
    return root


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_by_name(bench: Workbench, name: str, tmp_path: Path) -> None:
    case, change, error, words = REFUSED[name]
    adapter = changed(bench.adapter(CASES[case], "float32"), tmp_path / "adapter", change)
    with pytest.raises(error, match=words) as raised:
        streammerge.plan(bench.base(CASES[case].base, "float32"), adapter)
    assert isinstance(raised.value, AdapterError)


def test_a_bias_that_the_base_does_not_have_is_missed(bench: Workbench, tmp_path: Path) -> None:
    base = load_tensors(bench.base("llama", "float32"))
    bare = write_phi(tmp_path / "bare", {name: tensor for name, tensor in base.items() if ".bias" not in name})
    with pytest.raises(ShapeMismatchError, match="it was trained with a bias"):
        streammerge.plan(bare, bench.adapter(CASES["glora"], "float32"))


@pytest.mark.parametrize("name", ["hira", "glora", "deft", "peanut", "osf", "psoft", "kasa"])
def test_what_looks_at_the_weight_has_no_weighted_form_and_no_sum(bench: Workbench, name: str) -> None:
    base, adapter = bench.base("llama", "float32"), bench.adapter(CASES[name], "float32")
    with pytest.raises(CompositionError, match="no weighted form"):
        streammerge.plan(base, adapter, weights=[0.5])
    with pytest.raises(CompositionError, match="no agreed sum"):
        streammerge.plan(base, [adapter, bench.adapter(CASES["delora"], "float32")])


def test_a_weight_that_another_adapter_replaces_cannot_be_mixed_into_a_bias(bench: Workbench, tmp_path: Path) -> None:
    base, adapter = bench.base("llama", "float32"), bench.adapter(CASES["glora"], "float32")
    name = "model.layers.0.self_attn.q_proj.weight"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({f"base_model.model.{name}": ONE(32, 32)}, tmp_path / "other" / "adapter_model.safetensors")
    with pytest.raises(CompositionError, match="which another replaces"):
        streammerge.plan(base, [adapter, tmp_path / "other"])


def test_an_adapter_whose_clusters_are_not_in_its_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "ADAMSS"}))
    save_file({"base_model.model.layer.adamss_newB": ONE(2, 4)}, tmp_path / "adapter_model.safetensors")
    save_file({"layer.weight": ONE(4, 4)}, tmp_path / "base.safetensors")
    with pytest.raises(NotMergeableError, match="scikit-learn"):
        streammerge.plan(tmp_path / "base.safetensors", tmp_path)


def test_a_plan_says_that_signs_are_not_in_the_file(bench: Workbench) -> None:
    plan = streammerge.plan(bench.base("llama", "float32"), bench.adapter(CASES["psoft"], "float32"))
    assert any("signs of singular vectors" in note for note in plan.notes)


def test_the_keys_of_a_module_are_the_adapters(bench: Workbench) -> None:
    status = streammerge.inspect(bench.adapter(CASES["glora"], "float32"), bench.base("llama", "float32"))
    found = {key for module in status.modules for key in module.keys}
    assert found
    assert all(".glora_" in key for key in found)


@pytest.mark.parametrize("name", ["osf", "psoft", "kasa"])
def test_a_decomposition_says_the_memory_that_it_needs(bench: Workbench, name: str) -> None:
    with pytest.raises(BudgetError):
        streammerge.plan(bench.base("llama", "float32"), bench.adapter(CASES[name], "float32"), memory="1MB")


# --- decompositions ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9)])
def test_the_random_decomposition_is_that_of_torch(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    u, s, vh = random_svd(matrix, 4, 10, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(5)
    wanted_u, wanted_s, wanted_v = torch.svd_lowrank(matrix, 4, niter=10)
    assert torch.equal(u, wanted_u)
    assert torch.equal(s, wanted_s)
    assert torch.equal(vh, wanted_v.T)


def test_the_base_of_kasa_is_rounded_before_the_delta_is_added(bench: Workbench) -> None:
    case = CASES["kasa"]
    base, ours = (load_tensors(path) for path in (bench.base("llama", "bfloat16"), bench.output(case, "bfloat16")))
    factors = load_tensors(bench.adapter(case, "bfloat16"))
    name = "model.layers.1.mlp.down_proj"
    a, b, diagonal = (factors[f"base_model.model.{name}.lora_{x}"].double() for x in ("A.weight", "B.weight", "diag"))
    u, s, vh = torch.linalg.svd(base[f"{name}.weight"].float(), full_matrices=False)
    truncated = ((u[:, :-4] * s[:-4]) @ vh[:-4]).bfloat16()
    wanted = (truncated.double() + 6 / 4 * (b * diagonal) @ a).bfloat16()
    apart = (ours[f"{name}.weight"] != wanted).sum()
    assert apart <= 2e-3 * wanted.numel(), f"{apart} elements differ"
