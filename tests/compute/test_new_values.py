"""Parameters that an adapter replaces and the base stores in parts: every part gets its own values, and no other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammerge
from streammerge.core.errors import CompositionError

EXPERTS, HIDDEN, INNER = 3, 8, 6
LAYER = "model.layers.0"
CONFIG = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "tie_word_embeddings": False}


def make_base(root: Path) -> Path:
    """A mixture of experts as it is published: w1 is the gate, w3 the up projection."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
    tensors = {
        f"{LAYER}.block_sparse_moe.experts.{e}.{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for e in range(EXPERTS)
        for name, shape in shapes.items()
    }
    root.mkdir()
    save_file(tensors, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps(CONFIG))
    return root


def make_adapter(root: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    root.mkdir()
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}, root / "adapter_model.safetensors"
    )
    given = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["experts"], **config}
    (root / "adapter_config.json").write_text(json.dumps(given))
    return root


def test_stacked_experts_that_were_trained_in_full_replace_those_stored_one_by_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    joined, down = torch.randn(EXPERTS, 2 * INNER, HIDDEN), torch.randn(EXPERTS, HIDDEN, INNER)
    tensors = {f"{LAYER}.mlp.experts.gate_up_proj": joined, f"{LAYER}.mlp.experts.down_proj": down}
    streammerge.merge(base, make_adapter(tmp_path / "adapter", tensors), tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    for e in range(EXPERTS):
        path = f"{LAYER}.block_sparse_moe.experts.{e}"
        assert torch.equal(ours[f"{path}.w1.weight"], joined[e, :INNER].bfloat16())
        assert torch.equal(ours[f"{path}.w3.weight"], joined[e, INNER:].bfloat16())
        assert torch.equal(ours[f"{path}.w2.weight"], down[e].bfloat16())


def test_deltas_of_another_adapter_come_after_the_new_values(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    down = torch.randn(EXPERTS, HIDDEN, INNER)
    full = make_adapter(tmp_path / "full", {f"{LAYER}.mlp.experts.down_proj": down})
    a, b = torch.randn(2, INNER), torch.randn(HIDDEN, 2)
    module = f"{LAYER}.block_sparse_moe.experts.1.w2"
    delta = make_adapter(tmp_path / "delta", {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b})
    streammerge.merge(base, [delta, full], tmp_path / "out")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    expected = (down[1].double() + 2 * b.double() @ a.double()).float().bfloat16()
    assert torch.equal(ours[f"{module}.weight"], expected)


def test_two_adapters_that_replace_parts_of_one_tensor_are_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = {f"{LAYER}.mlp.experts.down_proj": torch.randn(EXPERTS, HIDDEN, INNER)}
    adapters = [make_adapter(tmp_path / name, tensors) for name in ("one", "two")]
    with pytest.raises(CompositionError, match="two adapters replace parts of"):
        streammerge.merge(base, adapters, tmp_path / "out")
    assert not (tmp_path / "out").exists()
