"""A real GPT-2: Conv1D weights, a tied head in a torch `.bin`, an adapter that was trained."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2LMHeadModel

from tests.real.reference import largest_error, merged_by_peft, stored, streammerge, streammerge_json, with_adapter

TOKENS = torch.tensor([[2, 118, 7, 4095, 9668, 33, 512, 1]])


@pytest.fixture(scope="module")
def sharded_base(mgm_base, tmp_path_factory):
    """The same weights as four safetensors files and an index, without the second name of the tied table."""
    root = tmp_path_factory.mktemp("mgm-sharded") / "base"
    root.mkdir()
    tensors = base_tensors(mgm_base)
    assert tensors["lm_head.weight"].data_ptr() == tensors.pop("lm_head.weight").data_ptr()
    names = list(tensors)
    files = {f"model-{n:05}-of-00004.safetensors": names[n - 1 :: 4] for n in range(1, 5)}
    for file, part in files.items():
        save_file({name: tensors[name].contiguous() for name in part}, root / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: file for file in files for name in files[file]}}
    (root / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "config.json").write_bytes((mgm_base / "config.json").read_bytes())
    return root


def base_tensors(base):
    """The base's tensors; they were saved on a GPU."""
    return torch.load(base / "pytorch_model.bin", map_location="cpu", weights_only=True)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def relative(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_the_output_is_what_peft_merges(mgm_base, mgm_adapter, mgm_merged):
    assert largest_error(stored(mgm_merged), merged_by_peft(GPT2LMHeadModel, mgm_base, mgm_adapter)) < 2e-6


def test_both_names_of_the_shared_table_are_written_with_the_bases_values(mgm_base, mgm_merged):
    base, merged = base_tensors(mgm_base), stored(mgm_merged)
    assert base["lm_head.weight"].data_ptr() == base["transformer.wte.weight"].data_ptr()
    for name in ("lm_head.weight", "transformer.wte.weight"):
        assert torch.equal(merged[name], base["transformer.wte.weight"])
    assert len(merged) == 101


def test_exactly_the_32_adapted_tensors_are_changed(mgm_base, mgm_merged):
    base, merged = base_tensors(mgm_base), stored(mgm_merged)
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.{layer}.{kind}.weight" for layer in range(8) for kind in kinds}


def test_the_reloaded_model_computes_what_base_and_adapter_compute(mgm_base, mgm_adapter, mgm_merged):
    plain = logits(GPT2LMHeadModel.from_pretrained(mgm_base).eval())
    adapted = logits(with_adapter(GPT2LMHeadModel, mgm_base, mgm_adapter))
    merged = logits(GPT2LMHeadModel.from_pretrained(mgm_merged).eval())
    assert relative(merged, adapted) < 1e-4
    assert relative(plain, adapted) > 0.1


def test_a_sharded_safetensors_base_gives_the_same_values(sharded_base, mgm_adapter, mgm_merged, tmp_path):
    streammerge("run", sharded_base, mgm_adapter, "-o", tmp_path / "out")
    ours, single = stored(tmp_path / "out"), stored(mgm_merged)
    assert set(single) - set(ours) == {"lm_head.weight"}
    assert all(torch.equal(tensor, single[name]) for name, tensor in ours.items())
    assert [path.name for path in sorted((tmp_path / "out").glob("*.safetensors"))] == [
        path.name for path in sorted(sharded_base.glob("*.safetensors"))
    ]
    reloaded = GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(reloaded), logits(GPT2LMHeadModel.from_pretrained(mgm_merged).eval()))


def test_the_output_verifies_in_full(mgm_merged):
    report = streammerge_json("verify", mgm_merged, "--full")
    assert (report["status"], report["blocks_rederived"], report["changed_tensors"]) == ("verified", 1, 32)


def test_weights_only_is_all_that_is_written_of_the_training_run(mgm_merged):
    names = {path.name for path in mgm_merged.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json", "streammerge.json"} <= names
    assert not {name for name in names if name.endswith(".bin")}


def test_inspect_resolves_every_module(mgm_base, mgm_adapter):
    status = streammerge_json("inspect", mgm_adapter, "--base", mgm_base)
    assert status["refusal"] is None
    assert {(module["rank"], module["alpha"], module["scaling"]) for module in status["modules"]} == {(8, 32, 4)}
    assert len({target["tensor"] for module in status["modules"] for target in module["targets"]}) == 32


def test_the_planned_norms_are_those_of_the_values_that_changed(mgm_base, mgm_adapter, mgm_merged):
    plan = streammerge_json("plan", mgm_base, mgm_adapter)
    base, merged = base_tensors(mgm_base), stored(mgm_merged)
    planned = {entry["name"]: entry["facts"][0]["norm"] for entry in plan["tensors"] if entry["operations"]}
    assert len(planned) == 32
    for name, norm in planned.items():
        assert float((merged[name].double() - base[name].double()).norm()) == pytest.approx(norm, rel=1e-5)
