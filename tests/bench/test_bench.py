"""Every benchmark runs, on sizes too small to say anything: so that none of them rots. No time is looked at."""

import json
import re
import shutil

from safetensors.torch import load_file

import streammerge as sm
from tests.bench.processes import bench, digests


def test_the_same_base_is_built_every_time(small, tmp_path):
    bench("make_base.py", tmp_path / "again", "--size", "5MB", "--shard-size", "1MB", "--rank", "4", cwd=tmp_path)
    assert digests(tmp_path / "again") == digests(small)
    assert len(list((small / "base").glob("*.safetensors"))) > 3


def test_the_llama_is_merged_in_every_linear_layer(small):
    plan = sm.plan(small / "base", small / "adapter")
    linears = [name for name in plan.tensors if name.endswith("_proj.weight")]
    assert {tensor.name for tensor in plan.changed} == set(linears)
    assert 4e6 < plan.figures.write < 6e6


def test_big_tensors_are_two_tables_which_the_adapter_changes_too(tmp_path):
    bench("make_base.py", tmp_path / "made", "--kind", "big-tensors", "--size", "16MB", cwd=tmp_path)
    plan = sm.plan(tmp_path / "made" / "base", tmp_path / "made" / "adapter")
    changed = {tensor.name: tensor.shape for tensor in plan.changed}
    assert changed["model.embed_tokens.weight"] == changed["lm_head.weight"] == (524, 8192)
    assert len(changed) == 2 + 2 * 7


def test_the_experts_are_stored_and_adapted_one_by_one(tmp_path):
    bench("make_base.py", tmp_path / "made", "--kind", "moe", "--size", "3MB", "--rank", "4", cwd=tmp_path)
    plan = sm.plan(tmp_path / "made" / "base", tmp_path / "made" / "adapter")
    changed = {tensor.name for tensor in plan.changed}
    experts = {name for name in changed if ".mlp.experts." in name}
    assert changed == {name for name in plan.tensors if name.endswith("_proj.weight")}
    assert len(experts) % (16 * 3) == 0
    assert len(changed) - len(experts) == 4 * len(experts) / (16 * 3)


def test_one_tensor_is_all_that_an_adapter_changes(tmp_path):
    bench("make_base.py", tmp_path / "made", "--kind", "one-tensor", "--size", "4MB", cwd=tmp_path)
    plan = sm.plan(tmp_path / "made" / "base", tmp_path / "made" / "adapter")
    assert [(tensor.name, tensor.shape) for tensor in plan.changed] == [("embed_tokens.weight", (244, 8192))]
    assert sorted(plan.tensors) == ["embed_tokens.weight", "norm.weight"]


def test_a_second_adapter_leaves_the_base_and_the_first_one(tmp_path):
    bench("make_base.py", tmp_path / "made", "--size", "3MB", "--rank", "4", cwd=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "made").rglob("*.safetensors")}
    bench("make_base.py", tmp_path / "made", "--size", "3MB", "--rank", "8", "--adapter", "more", cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name, rank in (("adapter", 4), ("more", 8)):
        factors = load_file(tmp_path / "made" / name / "adapter_model.safetensors")
        assert {min(factor.shape) for factor in factors.values()} == {rank}


def test_a_base_that_was_cut_short_is_made_again(small, tmp_path):
    shutil.copytree(small, tmp_path / "made")
    whole = digests(tmp_path / "made")
    (tmp_path / "made" / "base" / "config.json").unlink()
    (tmp_path / "made" / "base" / "model-00001-of-00005.safetensors").write_bytes(b"half")
    bench("make_base.py", tmp_path / "made", "--size", "5MB", "--shard-size", "1MB", "--rank", "4", cwd=tmp_path)
    assert digests(tmp_path / "made") == whole


def test_the_files_of_a_sparse_base_take_no_space(tmp_path):
    bench(
        "make_base.py",
        tmp_path / "made",
        "--kind",
        "sparse-70b",
        "--rank",
        "1",
        "--adapter-dtype",
        "BF16",
        cwd=tmp_path,
    )
    files = list((tmp_path / "made" / "base").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) > 141e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 2e6
    plan = sm.plan(tmp_path / "made" / "base", tmp_path / "made" / "adapter")
    assert (len(plan.tensors), len(plan.changed)) == (723, 560)


def test_startup_prints_a_median_for_each_command(small, tmp_path):
    said = bench("startup.py", "--dir", small, "--runs", "1", cwd=tmp_path)
    for command in ("streammerge --help", "streammerge plan"):
        assert re.search(rf"{command} +median of 1: +\d+\.\d+ s", said)


def test_the_names_of_both_bases_are_all_found(tmp_path):
    said = bench("names.py", "--runs", "1", "--layers", "2", "--experts", "4", cwd=tmp_path)
    assert "560 operations" in said
    assert "32 operations" in said


def test_a_base_in_float32_has_half_the_elements_and_says_so(tmp_path):
    for dtype in ("BF16", "F32"):
        options = ("--kind", "one-tensor", "--size", "4MB", "--dtype", dtype, "--rank", "2")
        bench("make_base.py", tmp_path / dtype, *options, cwd=tmp_path)
    short, long = (sm.plan(tmp_path / dtype / "base", tmp_path / dtype / "adapter") for dtype in ("BF16", "F32"))
    facts = [[(tensor.dtype, tensor.shape) for tensor in plan.changed] for plan in (short, long)]
    assert facts == [[("BF16", (244, 8192))], [("F32", (122, 8192))]]
    assert json.loads((tmp_path / "F32" / "base" / "config.json").read_text())["torch_dtype"] == "float32"
