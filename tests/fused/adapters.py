"""Adapters in PEFT's form, written by hand, and what a merge of them must come to.

`Adapter.add` makes the factors of one module and says its delta; the tests add that where the model's own code has the
module. `compare` holds an output to three claims: the same tensors, the changed values to within a millionth of the
largest one, every other element bit for bit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import streammerge

RANK, ALPHA = 2, 3
SCALING = ALPHA / RANK
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-8}
"""Of the largest value of a tensor."""


class Adapter:
    """Factors, module by module; `config` are further fields of adapter_config.json."""

    def __init__(self, **config: Any) -> None:
        self.config = config
        self.tensors: dict[str, torch.Tensor] = {}
        self.generator = torch.Generator().manual_seed(7)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * 0.5

    def add(self, path: str, out: int, inputs: int, *, embedding: bool = False, copies: int = 1) -> torch.Tensor:
        """Factors of the module at `path`, whose weight is (out, in), or, for an embedding, the (out, in) table;
        `copies` times the rank for stacked experts. `scaling * B @ A`, float64."""
        key = f"base_model.model.{path}"
        if embedding:
            a, b = self._random(RANK, out), self._random(inputs, RANK)
            self.tensors |= {f"{key}.lora_embedding_A": a, f"{key}.lora_embedding_B": b}
            return SCALING * (b.double() @ a.double()).T
        a, b = self._random(copies * RANK, inputs), self._random(out, copies * RANK)
        self.tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        return SCALING * b.double() @ a.double()

    def add_bias(self, path: str, out: int) -> torch.Tensor:
        """What `lora_bias` trains for the module at `path`, and its delta."""
        bias = self._random(out)
        self.tensors[f"base_model.model.{path}.lora_B.bias"] = bias
        return SCALING * bias.double()

    def add_magnitude(self, path: str, out: int) -> torch.Tensor:
        """The magnitude of DoRA for the module at `path`, float64."""
        magnitude = self._random(out).abs() + 0.5
        self.tensors[f"base_model.model.{path}.lora_magnitude_vector"] = magnitude
        return magnitude.double()

    def save(self, root: Path) -> Path:
        """The adapter's directory."""
        root.mkdir(parents=True)
        modules = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in self.tensors}
        targets = sorted({module.rpartition(".")[2] for module in modules})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, **self.config}
        (root / "adapter_config.json").write_text(json.dumps(config))
        save_file(self.tensors, root / "adapter_model.safetensors")
        return root


def load(root: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(root.glob("*.safetensors")):
        found |= load_file(path)
    return found


def compare(merged: Path, wanted: Path, base: Path) -> int:
    """Check `merged`, made from `base`, against the checkpoint it must be: how many tensors changed."""
    found, expected, before = load(merged), load(wanted), load(base)
    assert found.keys() == expected.keys() == before.keys()
    changed = 0
    for name, want in expected.items():
        got, old = found[name], before[name]
        assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        same = bits(want) == bits(old)
        assert torch.equal(bits(got)[same], bits(old)[same]), f"{name}: an element that no adapter reaches"
        if not bool(same.all()):
            changed += 1
            error = (got.double() - want.double()).abs().max() / want.double().abs().max()
            assert error <= TOLERANCE[want.dtype], f"{name}: off by {error:.2e} of the largest value"
            assert not torch.equal(got[~same], old[~same]), f"{name}: not merged"
    return changed


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's elements as integers, so that zeros have a sign and NaN is itself."""
    return tensor.contiguous().view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    )


def merge(base: Path, adapter: Adapter, **options: Any) -> streammerge.Report:
    """Merge into `base`; adapter and output lie beside it."""
    saved = adapter.save(base.parent / "adapter")
    return streammerge.merge(base, saved, base.parent / "out", verify=False, **options)


def merge_and_compare(base: Path, adapter: Adapter, wanted: Path) -> int:
    """Merge into `base` and hold the output against `wanted`: how many stored tensors changed."""
    merge(base, adapter)
    return compare(base.parent / "out", wanted, base)
