"""Adapters on fused modules of what is stored in parts; and that plans of either kind carry over."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import streammerge
from streammerge.core.errors import ShapeMismatchError, UnmatchedKeysError
from streammerge.planning.model import MergePlan
from tests.fused.adapters import RANK, SCALING, Adapter, compare, load, merge, merge_and_compare
from tests.fused.subjects import MAKERS, ROWS, FusedModule, Subject, cut, named, write
from tests.fused.test_split_adapters import EMBEDDINGS, adapt
from tests.names.layout_cases import heads

PLAIN = {name: made for name, made in MAKERS.items() if "-experts-" not in name}


def adapt_whole(adapter: Adapter, module: FusedModule, *, bias: bool = False) -> None:
    """Train a fused module: its delta goes onto the whole of it, to be taken apart when the subject is saved."""
    matrix = module.matrices[0]
    delta = adapter.add(module.path, *matrix.shape, embedding=module.path.endswith(EMBEDDINGS))
    matrix[:] = (matrix.double() + delta).to(matrix.dtype)
    if bias and module.bias is not None:
        module.bias[:] = (module.bias.double() + adapter.add_bias(module.path, len(matrix))).to(matrix.dtype)


@pytest.mark.parametrize("made", [pytest.param(made, id=name) for name, made in PLAIN.items()])
def test_a_fused_module_reaches_its_parts(made, tmp_path):
    subject = made()
    biased = all(module.bias is not None for module in subject.fused)
    adapter = Adapter(lora_bias=biased)
    base = subject.save_split(tmp_path / "base")
    for module in subject.fused:
        adapt_whole(adapter, module, bias=biased)
    changed = merge_and_compare(base, adapter, subject.save_split(tmp_path / "wanted"))
    assert changed == sum(len(module.parts) for module in subject.fused) * (1 + biased)


@pytest.mark.parametrize("name", ["phi3-self_attn", "bloom", "gpt2", "internlm2-attention.wqkv"])
def test_a_fused_module_in_bfloat16(name, tmp_path):
    subject, adapter = named(name)(dtype=torch.bfloat16), Adapter()
    base = subject.save_split(tmp_path / "base")
    adapt_whole(adapter, subject.fused[0])
    assert merge_and_compare(base, adapter, subject.save_split(tmp_path / "wanted")) == 3


@pytest.mark.parametrize("name", ["phi3-self_attn", "bloom", "gpt2", "falcon-", "qwen3_next-linear"])
def test_the_magnitude_of_a_fused_module_scales_the_outputs_of_its_parts(name, tmp_path):
    subject, adapter = named(name)(), Adapter(use_dora=True)
    base = subject.save_split(tmp_path / "base")
    module = subject.fused[0]
    matrix = module.matrices[0]
    direction = matrix.double() + adapter.add(module.path, *matrix.shape)
    magnitude = adapter.add_magnitude(module.path, len(matrix))
    matrix[:] = (magnitude[:, None] / direction.norm(dim=1, keepdim=True) * direction).float()
    assert merge_and_compare(base, adapter, subject.save_split(tmp_path / "wanted")) == len(module.parts)


# --- stacked experts on files of single ones --------------------------------------------------------------------------
def adapt_stack(adapter: Adapter, module: FusedModule) -> None:
    """Train a stack as PEFT's `target_parameters` does: the rows of A expert by expert, the columns of B by rank."""
    count, (out, inputs) = len(module.matrices), module.matrices[0].shape
    parent = module.path.rpartition(".")[0]
    adapter.config |= {"target_parameters": [".".join(module.path.split(".")[-2:])], "target_modules": []}
    adapter.add(parent, out, inputs, copies=count)
    a, b = (adapter.tensors[f"base_model.model.{parent}.lora_{letter}.weight"].double() for letter in "AB")
    for expert, matrix in enumerate(module.matrices):
        delta = SCALING * b[:, expert::count] @ a[expert * RANK : (expert + 1) * RANK]
        matrix[:] = (matrix.double() + delta).float()


@pytest.mark.parametrize("stack", [0, 1])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v4", "lfm2_moe", "granitemoe-", "jamba", "phimoe"])
def test_a_stack_reaches_every_expert(name, stack, tmp_path):
    subject, adapter = named(name)(), Adapter(peft_version="0.21.2")
    base = subject.save(tmp_path / "base")
    module = [module for module in subject.fused if module.row == subject.fused[-1 - stack].row][-1]
    adapt_stack(adapter, module)
    changed = merge_and_compare(base, adapter, subject.save(tmp_path / "wanted"))
    assert changed == (1 if name == "granitemoe-" else len(module.parts) * len(module.matrices))


# --- refusals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["phi3-self_attn", "bloom", "qwen3_next-linear", "modernbert-mlp"])
def test_a_missing_part_is_refused(name, tmp_path):
    subject, adapter = named(name)(), Adapter()
    base = subject.save_split(tmp_path / "base")
    module = subject.fused[0]
    tensors = load(base)
    del tensors[f"{module.name(1)}.weight"]
    write(base, tensors, subject.config)
    adapt_whole(adapter, module)
    with pytest.raises(UnmatchedKeysError, match=module.path) as caught:
        merge(base, adapter)
    assert caught.value.exit_code == 4
    assert {entry.key for entry in caught.value.unmatched} == adapter.tensors.keys()
    assert not (tmp_path / "out").exists()


def test_parts_of_other_sizes_than_the_config_says_are_refused(tmp_path):
    subject, adapter = named("phi3-self_attn")(), Adapter()
    base = subject.save_split(tmp_path / "base")
    write(base, load(base), subject.config | {"num_key_value_heads": 4})
    adapt_whole(adapter, subject.fused[0])
    with pytest.raises(UnmatchedKeysError, match=subject.fused[0].path) as caught:
        merge(base, adapter)
    assert caught.value.exit_code == 4


def test_a_replaced_fused_bias_takes_the_place_of_those_of_its_parts(tmp_path):
    subject, adapter = named("bloom")(), Adapter(bias="lora_only")
    base = subject.save_split(tmp_path / "base")
    module = subject.fused[0]
    adapt_whole(adapter, module)
    new = torch.linspace(1, 2, len(module.matrices[0]))
    adapter.tensors[f"base_model.model.{module.path}.base_layer.bias"] = new
    merge(base, adapter)
    ours = load(tmp_path / "out")
    for number, rows in enumerate(module.parts):
        assert torch.equal(ours[f"{module.name(number)}.bias"], new[torch.as_tensor(rows)])


def test_a_replaced_bias_of_another_length_is_refused(tmp_path):
    subject, adapter = named("bloom")(), Adapter(bias="lora_only")
    base = subject.save_split(tmp_path / "base")
    module = subject.fused[0]
    adapt_whole(adapter, module)
    adapter.tensors[f"base_model.model.{module.path}.base_layer.bias"] = torch.ones(len(module.matrices[0]) + 1)
    with pytest.raises((ShapeMismatchError, UnmatchedKeysError), match=module.path) as caught:
        merge(base, adapter)
    assert caught.value.exit_code == 4


def test_a_stack_of_experts_stored_under_names_without_a_rule_is_refused(tmp_path):
    """Unsloth's single experts of gpt-oss have no conversion to the stack: nothing is guessed."""
    subject, adapter = named("gpt_oss-experts-1")(), Adapter(peft_version="0.21.2")
    module = subject.fused[0]
    tensors = {name: tensor for name, tensor in subject.tensors.items() if name != module.path}
    for expert, matrix in enumerate(module.matrices):
        tensors[f"{module.name(0, expert)}.weight"] = matrix
    base = write(tmp_path / "base", tensors, subject.config)
    adapt_stack(adapter, module)
    with pytest.raises(UnmatchedKeysError, match=module.path.rpartition(".")[0]):
        merge(base, adapter)


# --- plans ------------------------------------------------------------------------------------------------------------
BLOOM = {"n_embd": 512, "hidden_size": 512, "n_head": 8}


def large_bloom() -> Subject:
    """One whose fused weight takes several tiles."""
    row = next(row for row in ROWS if "bloom" in row["types"])
    split = partial(heads, BLOOM, lambda module, x: module._reshape(x), "BloomAttention", "bloom")
    return cut("bloom", row, split)


def large_gpt_oss() -> Subject:
    """One whose experts take several tiles."""
    return named("gpt_oss-experts-0")(hidden_size=256, intermediate_size=1024)


@pytest.mark.parametrize("made", [large_bloom, large_gpt_oss])
def test_bytes_do_not_depend_on_workers_or_budget(made, tmp_path):
    subject, adapter = made(), Adapter()
    base = subject.save(tmp_path / "base", published=False)
    for module in subject.fused:
        for part in range(len(module.parts)):
            adapt(adapter, module, part, len(module.matrices) - 1)
    wanted = subject.save(tmp_path / "wanted", published=False)
    saved = adapter.save(tmp_path / "adapter")
    plan = streammerge.plan(base, saved, workers=1)
    assert MergePlan.from_json(plan.to_json()) == plan
    assert MergePlan.from_json(plan.to_json()).digest() == plan.digest()
    written = set()
    for workers in (1, 2):
        for memory in (plan.figures.memory * workers, plan.figures.memory * workers * 5 // 4, 2**30):
            out = tmp_path / f"{workers}-{memory}"
            streammerge.merge(base, saved, out, verify=False, workers=workers, memory=memory)
            assert compare(out, wanted, base) == len(subject.fused)
            written.add((out / "model.safetensors").read_bytes())
    assert len(written) == 1
