"""The references of tests/data/eras hold what their adapters say, shown without any knowledge of names.

Every delta that an adapter's factors give, and no other, is found by its values as the difference between reference
and base: a matrix, one expert of a stack, or the two halves of a delta that spans two stored matrices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from tests.eras.layout import ADAPTERS, identity, own_base, weights_of

if TYPE_CHECKING:
    import torch

CLOSE = 2e-6
"""How far a difference of two weights of about 1 in float32 may be from the delta."""
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def expert_count(adapter: Path) -> int:
    """The number of experts of the model, from its config."""
    config = json.loads(next(adapter.parent.glob("base-*/config.json")).read_text())
    config |= config.get("text_config", {})
    return next((config[name] for name in EXPERT_COUNTS if name in config), 0)


def deltas(adapter: Path) -> Iterator[torch.Tensor]:
    """Every scaling * B @ A of the adapter as a matrix, one for each expert where the factors hold them all."""
    config = json.loads((adapter / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter" / "adapter_model.safetensors")
    for key in (key for key in tensors if ".lora_A." in key):
        a, b = tensors[key].flatten(1), tensors[key.replace(".lora_A.", ".lora_B.")].flatten(1)
        path = key.removeprefix("base_model.model.").partition(".lora_A.")[0]
        if re.search(r"\.experts(\.fc\d)?(\.base_layer)?$", path):
            count = expert_count(adapter)
            stack_a, stack_b = a.view(count, -1, a.shape[1]), b.view(b.shape[0], -1, count)
            for index in range(count):
                yield stack_b[:, :, index] @ stack_a[index] * (config["lora_alpha"] / config["r"])
            continue
        patterns, usual = config["alpha_pattern"].items(), config["lora_alpha"]
        alpha = next((value for name, value in patterns if re.fullmatch(rf"(.*\.)?({name})", path)), usual)
        yield b @ a * (alpha / a.shape[0])


def changes(adapter: Path) -> list[torch.Tensor]:
    """The difference between reference and base as matrices, one for each expert of a stack."""
    base = load_file(weights_of(own_base(adapter)))
    found: list[torch.Tensor] = []
    for name, merged in load_file(adapter / "merged.safetensors").items():
        difference = merged - base[name]
        found += list(difference) if difference.ndim == 3 else [difference.flatten(1)]
    return found


def take(delta: torch.Tensor, left: list[torch.Tensor]) -> bool:
    """Remove from `left` the one matrix that is `delta`, either way round; False if there is none."""
    for index, candidate in enumerate(left):
        for turned in (delta, delta.T):
            if candidate.shape == turned.shape and bool((candidate - turned).abs().max() < CLOSE):
                del left[index]
                return True
    return False


@pytest.mark.parametrize("adapter", ADAPTERS, ids=identity)
def test_every_delta_of_an_adapter_is_in_its_reference_once_and_nothing_else_is(adapter):
    left = changes(adapter)
    for delta in deltas(adapter):
        assert float(delta.abs().max()) > 0.01, "a delta that would not be missed"
        if not take(delta, left):
            halves = [half for part in (delta, delta.T) for half in part.chunk(2)]
            assert sum(take(half, left) for half in halves) == 2, "a delta is not in the reference"
    assert not left, "the reference has changes that are not the adapter's"
