"""Methods on parts of what is stored fused, and on fused modules that are stored in parts: PEFT's merge of a module of
the adapter's own shape, put where the model's code has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import streammerge
from streammerge.core.errors import NotMergeableError
from tests.factories import make_adapter
from tests.fused.adapters import compare
from tests.fused.subjects import FusedModule, named
from tests.methods.old_oft import merged_by_0_15, written_by_0_13

METHODS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "oft-shared": ("OFTConfig", {"oft_block_size": 8, "block_share": True}),
    "boft": ("BOFTConfig", {"boft_block_size": 8}),
    "hra": ("HRAConfig", {"r": 4}),
    "road": ("RoadConfig", {"variant": "road_4", "group_size": 8}),
    "miss": ("MissConfig", {"r": 5}),
    "miss-mini": ("MissConfig", {"r": 8, "mini_r": 4, "init_weights": "mini"}),
    "miss-bat": ("MissConfig", {"r": 8, "init_weights": "bat"}),
    "shira": ("ShiraConfig", {"r": 2, "random_seed": 3}),
    "supertuning": ("SupertuningConfig", {"sparsity": 0.8}),
    "supertuning-lora": ("SupertuningConfig", {"sparsity": 0.8, "r": 2}),
    "c3a": ("C3AConfig", {"block_size": 8}),
    "gralora": ("GraloraConfig", {"r": 4, "hybrid_r": 2}),
}
FOUND = ("SupertuningConfig", {"sparsity": 0.8, "save_precomputed_indices": False})
Linears = Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]


def tree(linears: Linears) -> nn.Module:
    """Linear layers by their paths, as a model."""
    root = nn.Module()
    for path, (weight, bias) in linears.items():
        module = root
        *parents, name = path.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, nn.Module())
            module = getattr(module, parent)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
        state = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        layer.load_state_dict({key: value.clone() for key, value in state.items()})
        module.add_module(name, layer)
    return root


def merged_by_peft(linears: Linears, peft: str, arguments: Mapping[str, Any], root: Path) -> dict[str, torch.Tensor]:
    """An adapter for all of the layers, written to `root`, and what PEFT makes of them."""
    adapted = make_adapter(tree(linears), peft, target_modules=list(linears), **arguments)
    adapted.save_pretrained(root)
    return dict(PeftModel.from_pretrained(tree(linears), root).merge_and_unload().state_dict())


def parts_of(module: FusedModule) -> Linears:
    """Its parts as layers of their own."""
    weight, bias = module.matrices[0], module.bias
    return {
        module.name(number): (weight[rows], None if bias is None else bias[rows])
        for number, rows in enumerate(module.parts)
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["phi3-self_attn", "bloom", "gpt2"])
def test_parts_of_what_is_stored_fused(name: str, method: str, tmp_path: Path) -> None:
    subject = named(name)()
    module = subject.fused[0]
    base = subject.save(tmp_path / "base")
    merged = merged_by_peft(parts_of(module), *METHODS[method], tmp_path / "adapter")
    for number, rows in enumerate(module.parts):
        module.matrices[0][rows] = merged[f"{module.name(number)}.weight"]
        if module.bias is not None:
            module.bias[rows] = merged[f"{module.name(number)}.bias"]
    streammerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    changed = compare(tmp_path / "out", subject.save(tmp_path / "wanted"), base)
    assert changed == 1 + (method == "road" and module.bias is not None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["phi3-self_attn", "bloom"])
def test_a_fused_module_that_is_stored_in_parts(name: str, method: str, tmp_path: Path) -> None:
    subject = named(name)()
    module = subject.fused[0]
    base = subject.save_split(tmp_path / "base")
    whole = {module.path: (module.matrices[0].clone(), module.bias)}
    merged = merged_by_peft(whole, *METHODS[method], tmp_path / "adapter")
    module.matrices[0][:] = merged[f"{module.path}.weight"]
    if module.bias is not None:
        module.bias[:] = merged[f"{module.path}.bias"]
    streammerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    changed = compare(tmp_path / "out", subject.save_split(tmp_path / "wanted"), base)
    assert changed == len(module.parts) * (1 + (method == "road" and module.bias is not None))


def test_the_largest_elements_of_a_part_are_found(tmp_path: Path) -> None:
    subject = named("phi3-self_attn")()
    module = subject.fused[0]
    base = subject.save(tmp_path / "base")
    merged = merged_by_peft(parts_of(module), *FOUND, tmp_path / "adapter")
    for number, rows in enumerate(module.parts):
        module.matrices[0][rows] = merged[f"{module.name(number)}.weight"]
    streammerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert compare(tmp_path / "out", subject.save(tmp_path / "wanted"), base) == 1


def test_the_bias_of_a_part(tmp_path: Path) -> None:
    subject = named("bloom")()
    module = subject.fused[0]
    base = subject.save(tmp_path / "base")
    merged = merged_by_peft(parts_of(module), "BeftConfig", {}, tmp_path / "adapter")
    for number, rows in enumerate(module.parts):
        module.bias[rows] = merged[f"{module.name(number)}.bias"]
    streammerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert compare(tmp_path / "out", subject.save(tmp_path / "wanted"), base) == 1


def rotated_by_0_13(subject_parts: Linears, root: Path) -> dict[str, torch.Tensor]:
    """A file of PEFT 0.13, whose blocks of seven outputs do not begin where parts do."""
    merged_by_peft(subject_parts, "OFTConfig", {"oft_block_size": 8}, root)
    outputs = {path.rpartition(".")[2]: len(weight) for path, (weight, _) in subject_parts.items()}
    written_by_0_13(outputs, 5)(root)
    assert all(info.shape[1] in (4, 7, 13) for info in load_file(root / "adapter_model.safetensors").values())
    return merged_by_0_15({f"{path}.weight": weight.double() for path, (weight, _) in subject_parts.items()}, root)


def test_groups_of_outputs_that_no_tile_begins_with(tmp_path: Path) -> None:
    subject = named("phi3-self_attn")()
    module = subject.fused[0]
    base = subject.save(tmp_path / "base")
    merged = rotated_by_0_13(parts_of(module), tmp_path / "adapter")
    for number, rows in enumerate(module.parts):
        module.matrices[0][rows] = merged[f"{module.name(number)}.weight"].float()
    streammerge.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert compare(tmp_path / "out", subject.save(tmp_path / "wanted"), base) == 1


Writer = Callable[[Linears, Path], object]
STRADDLING: Mapping[str, tuple[Writer, str]] = {
    "oft": (rotated_by_0_13, "13 outputs at once"),
    "road": (
        lambda linears, root: merged_by_peft(linears, "RoadConfig", {"group_size": 64}, root),
        "64 outputs at once",
    ),
    "supertuning": (lambda linears, root: merged_by_peft(linears, *FOUND, root), "all elements, to know the largest"),
}


@pytest.mark.parametrize("method", STRADDLING)
def test_a_part_that_does_not_hold_what_the_formula_needs_is_refused(method: str, tmp_path: Path) -> None:
    subject = named("phi3-self_attn")()
    module = subject.fused[0]
    base = subject.save_split(tmp_path / "base")
    write, needs = STRADDLING[method]
    write({module.path: (module.matrices[0], None)}, tmp_path / "adapter")
    with pytest.raises(NotMergeableError, match=f"stored in parts, and its formula needs {needs}"):
        streammerge.merge(base, tmp_path / "adapter", tmp_path / "out")
