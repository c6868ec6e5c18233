"""Adapters on the parts of what is stored fused: every row of the table of layouts, merged and compared."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch

import streammerge
from streammerge.core.errors import NotMergeableError, UnmatchedKeysError
from tests.fused.adapters import Adapter, compare, load, merge, merge_and_compare
from tests.fused.subjects import MAKERS, ROWS, FusedModule, named, stacked, write

EMBEDDINGS = ("tok_embeddings", "wte", "word_embeddings")
EVERY = [pytest.param(made, id=name) for name, made in MAKERS.items()]


def adapt(adapter: Adapter, module: FusedModule, part: int, expert: int = 0, spelling: int = 0) -> None:
    """Train one part: its factors go into the adapter, its delta onto the rows of the fused tensor that it is."""
    rows, matrix = module.parts[part], module.matrices[expert]
    embedding = module.path.endswith(EMBEDDINGS)
    delta = adapter.add(module.name(part, expert, spelling), len(rows), matrix.shape[1], embedding=embedding)
    matrix[rows] = (matrix[rows].double() + delta).to(matrix.dtype)


@pytest.mark.parametrize("made", EVERY)
def test_parts_of_a_fused_module_reach_their_rows(made, tmp_path):
    subject, adapter = made(), Adapter()
    base = subject.save(tmp_path / "base", published="experts" not in subject.fused[0].row)
    for module in subject.fused:
        for expert in sorted({0, len(module.matrices) - 1}):
            for part in range(len(module.parts)):
                adapt(adapter, module, part, expert)
    wanted = subject.save(tmp_path / "wanted", published="experts" not in subject.fused[0].row)
    assert merge_and_compare(base, adapter, wanted) == len(subject.fused)


@pytest.mark.parametrize("made", EVERY)
def test_one_part_leaves_the_others_bit_for_bit(made, tmp_path):
    subject, adapter = made(), Adapter()
    base = subject.save(tmp_path / "base")
    module = subject.fused[-1]
    adapt(adapter, module, len(module.parts) - 1, len(module.matrices) // 2, spelling=-1)
    assert merge_and_compare(base, adapter, subject.save(tmp_path / "wanted")) == 1


@pytest.mark.parametrize("name", ["phi3-self_attn", "bloom", "gpt2", "gpt_oss-experts-0", "internlm2-attention.wqkv"])
def test_parts_in_bfloat16(name, tmp_path):
    subject, adapter = named(name)(dtype=torch.bfloat16), Adapter()
    base = subject.save(tmp_path / "base")
    for part in range(len(subject.fused[0].parts)):
        adapt(adapter, subject.fused[0], part)
    assert merge_and_compare(base, adapter, subject.save(tmp_path / "wanted")) == 1


# --- biases and magnitudes --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bloom", "gpt2", "gpt_neox-", "persimmon", "qwen2_vl", "baichuan", "qwen-"])
def test_the_bias_of_a_part_reaches_its_rows(name, tmp_path):
    subject, adapter = named(name)(), Adapter(lora_bias=True)
    base = subject.save(tmp_path / "base")
    module = subject.fused[-1]
    assert module.bias is not None
    for part, rows in list(enumerate(module.parts))[1:]:
        adapt(adapter, module, part)
        delta = adapter.add_bias(module.name(part), len(rows))
        module.bias[rows] = (module.bias[rows].double() + delta).float()
    assert merge_and_compare(base, adapter, subject.save(tmp_path / "wanted")) == 2


@pytest.mark.parametrize(
    "name",
    [
        "phi3-self_attn",
        "bloom",
        "gpt2",
        "falcon-",
        "qwen3_next-linear",
        "mixtral",
        "gpt_oss-experts-0",
        "llama4",
        "dbrx-experts",
    ],
)
def test_the_magnitudes_of_a_part_scale_its_outputs(name, tmp_path):
    subject, adapter = named(name)(), Adapter(use_dora=True)
    base = subject.save(tmp_path / "base", published=False)
    for module in subject.fused:
        expert = len(module.matrices) - 1
        rows, matrix = module.parts[0], module.matrices[expert]
        path = module.name(0, expert)
        direction = matrix[rows].double() + adapter.add(path, len(rows), matrix.shape[1])
        norms = direction.norm(dim=1, keepdim=True)
        matrix[rows] = (adapter.add_magnitude(path, len(rows))[:, None] / norms * direction).float()
    wanted = subject.save(tmp_path / "wanted", published=False)
    assert merge_and_compare(base, adapter, wanted) == len(subject.fused)


# --- squares, other names ---------------------------------------------------------------------------------------------
def square(model_type: str, size: int) -> dict[str, object]:
    """The field that says how wide an expert is."""
    if model_type == "qwen3_vl_moe_text":
        return {"text_config": {"moe_intermediate_size": size}}
    if model_type == "dbrx":
        return {"ffn_config": {"ffn_hidden_size": size}}
    return {"moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size": size}


SQUARES = ("qwen3_vl_moe_text", "llama4_text", "aria_text", "openai_privacy_filter", "granitemoe", "qwen3_moe")


@pytest.mark.parametrize(
    ("model_type", "size"), [*product(SQUARES, (16, 32)), *product(["gpt_oss"], (16, 32)), ("dbrx", 32)]
)
def test_square_experts_are_not_turned_round(model_type, size, tmp_path):
    rows = [row for row in ROWS if model_type in row["types"] and row.get("experts")][:2]
    subject, adapter = stacked(model_type, rows, **square(model_type, size)), Adapter()
    sizes = {matrix.shape for module in subject.fused for matrix in module.matrices}
    assert (32, 32) in sizes
    base = subject.save(tmp_path / "base", published=False)
    for module in subject.fused:
        for part in range(len(module.parts)):
            adapt(adapter, module, part, 1)
    wanted = subject.save(tmp_path / "wanted", published=False)
    assert merge_and_compare(base, adapter, wanted) == len(subject.fused)


def test_parts_go_by_the_names_of_an_older_transformers_too(tmp_path):
    """4.51 called the tower of Qwen2-VL `visual`, 5 calls it `model.visual`, and a file may say either."""
    for published in (True, False):
        root = tmp_path / str(published)
        subject, adapter = named("qwen2_vl-")(), Adapter()
        base = subject.save(root / "base", published=published)
        module = subject.fused[0]
        path = module.name(1).removeprefix("model.")
        assert path.startswith("visual.")
        rows, matrix = module.parts[1], module.matrices[0]
        matrix[rows] += adapter.add(path, len(rows), matrix.shape[1]).float()
        assert merge_and_compare(base, adapter, subject.save(root / "wanted", published=published)) == 1


# --- refusals ---------------------------------------------------------------------------------------------------------
def edit(base, **fields):
    """Say other things in config.json."""
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("phi3-self_attn", {"num_key_value_heads": 4}),
        ("phi3-self_attn", {"num_key_value_heads": None, "num_attention_heads": None}),
        ("falcon-", {"num_kv_heads": 3}),
        ("internlm2-attention.wqkv", {"num_attention_heads": 3}),
        ("chatglm-transformer.encoder.layers.{i}.self_attention.query_key_value", {"multi_query_group_num": 3}),
    ],
)
def test_sizes_that_do_not_add_up_are_refused(name, fields, tmp_path):
    subject, adapter = named(name)(), Adapter()
    base = subject.save(tmp_path / "base")
    edit(base, **fields)
    module = subject.fused[0]
    adapt(adapter, module, 0)
    with pytest.raises(UnmatchedKeysError) as caught:
        merge(base, adapter)
    assert caught.value.exit_code == 4
    assert {entry.key for entry in caught.value.unmatched} == adapter.tensors.keys()
    assert all(f"{module.path} (fused)" in entry.tried for entry in caught.value.unmatched)
    assert not (tmp_path / "out").exists()


def test_a_part_of_another_size_is_refused(tmp_path):
    subject, adapter = named("phi3-self_attn")(), Adapter()
    base = subject.save(tmp_path / "base")
    module = subject.fused[0]
    adapter.add(module.name(0), len(module.parts[0]) + 1, 32)
    with pytest.raises(UnmatchedKeysError, match=module.name(0)) as caught:
        merge(base, adapter)
    assert f"{module.path} (fused)" in caught.value.unmatched[0].tried


@pytest.mark.parametrize("expert", [3, 7])
@pytest.mark.parametrize("name", ["gpt_oss-experts-0", "gpt_oss-experts-1", "dbrx-experts", "qwen3_moe"])
def test_an_expert_that_is_not_there_is_refused(name, expert, tmp_path):
    subject, adapter = named(name)(), Adapter()
    base = subject.save(tmp_path / "base", published=False)
    module = subject.fused[0]
    assert len(module.matrices) == 3
    path = module.name(0, expert)
    adapter.add(path, len(module.parts[0]), module.matrices[0].shape[1])
    with pytest.raises(UnmatchedKeysError, match=path):
        merge(base, adapter)


def test_a_model_type_that_is_in_no_row_is_refused(tmp_path):
    subject, adapter = named("phi3-self_attn")(), Adapter()
    base = subject.save(tmp_path / "base")
    edit(base, model_type="llama", architectures=["LlamaForCausalLM"])
    adapt(adapter, subject.fused[0], 0)
    with pytest.raises(UnmatchedKeysError) as caught:
        merge(base, adapter)
    assert caught.value.exit_code == 4
    assert not any("qkv_proj" in tried for entry in caught.value.unmatched for tried in entry.tried)


def test_a_replaced_part_takes_the_place_of_its_rows_alone(tmp_path):
    subject, adapter = named("bloom")(), Adapter(bias="lora_only")
    base = subject.save(tmp_path / "base")
    module = subject.fused[0]
    adapt(adapter, module, 0)
    new = torch.linspace(1, 2, len(module.parts[0]))
    adapter.tensors[f"base_model.model.{module.name(0)}.base_layer.bias"] = new
    merge(base, adapter)
    name = f"{module.path}.bias"
    ours, theirs = load(tmp_path / "out"), load(base)
    rows = torch.as_tensor(module.parts[0])
    assert torch.equal(ours[name][rows], new)
    rest = torch.ones(len(ours[name]), dtype=torch.bool)
    rest[rows] = False
    assert torch.equal(ours[name][rest], theirs[name][rest])
    assert not torch.equal(ours[name], theirs[name])


# --- columns ----------------------------------------------------------------------------------------------------------
RULE = {
    "from": ["self_attn.left.weight", "self_attn.right.weight"],
    "kind": "convert",
    "ops": [["Concatenate", {"dim": 1}]],
    "re": r"(?P<g0>self_attn.left.weight(?!\w))|(?P<g1>self_attn.right.weight(?!\w))",
    "to": ["self_attn.o_proj.weight"],
}
"""Joins the inputs of one module."""


@pytest.mark.parametrize("dora", [False, True])
def test_a_module_whose_inputs_are_stored_apart(dora, tmp_path):
    """A sum reaches both halves; a norm over all inputs of an output cannot be taken in either, and is refused."""
    meta = {"format": 1, "transformers": "none"}
    table = {"meta": meta, "transforms": [RULE], "rules": {"llama": [0]}, "classes": {}, "auto": {}}
    (tmp_path / "rules.json").write_text(json.dumps(table))
    weight = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    start = "model.layers.0.self_attn"

    def halves() -> dict[str, torch.Tensor]:
        return {f"{start}.left.weight": weight[:, :5], f"{start}.right.weight": weight[:, 5:]}

    base = write(tmp_path / "base", halves(), config)
    adapter = Adapter(use_dora=dora)
    delta = adapter.add(f"{start}.o_proj", 8, 12)
    if dora:
        adapter.add_magnitude(f"{start}.o_proj", 8)
        with pytest.raises(NotMergeableError, match="all inputs of an output at once"):
            merge(base, adapter, rules=str(tmp_path / "rules.json"))
        assert not (tmp_path / "out").exists()
        return
    weight = (weight.double() + delta).float()
    wanted = write(tmp_path / "wanted", halves(), config)
    merge(base, adapter, rules=str(tmp_path / "rules.json"))
    assert compare(tmp_path / "out", wanted, base) == 2


# --- the plan ---------------------------------------------------------------------------------------------------------
def test_the_rule_is_in_the_plan(tmp_path):
    subject, adapter = named("bloom")(), Adapter()
    base = subject.save(tmp_path / "base")
    adapt(adapter, subject.fused[0], 2)
    plan = streammerge.plan(base, adapter.save(tmp_path / "adapter"))
    (operation,) = plan.operations
    assert operation.rule == "fused: part 3 of 3 of `self_attention.query_key_value`"
    assert operation.place.rows.array().tolist() == subject.fused[0].parts[2]
    assert operation.part
