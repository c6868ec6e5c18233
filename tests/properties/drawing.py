"""Random checkpoints, adapters and options, and what their merge must come to, computed here alone.

Factors are whole numbers of 64ths, none of them zero: sums of their products are exact in float64 in any order, so that
the expected bytes follow from `W + (alpha / r) * weight * B @ A`, one product and one sum at a time, whatever library
multiplies and however the product is cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from safetensors.torch import save_file

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHERS = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32, "BOOL": torch.bool, "F8": torch.float8_e4m3fn}
OUTPUT = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
)  # fmt: skip
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Adapted:
    """One adapter: its config, its factors by module, the dtype they are stored in, and its weight in the merge."""

    config: dict[str, Any]
    factors: dict[str, tuple[np.ndarray, np.ndarray]]
    dtype: torch.dtype
    weight: float

    def scaling(self, module: str) -> float:
        """What PEFT multiplies a module's product with."""
        a, _ = self.factors[module]
        alpha = next(
            (value for end, value in self.config["alpha_pattern"].items() if module.endswith(f".{end}")),
            self.config["lora_alpha"],
        )
        return alpha / (math.sqrt(len(a)) if self.config["use_rslora"] else len(a))


@dataclass(frozen=True)
class Merge:
    """A base as tensors and the files they lie in, adapters, options."""

    tensors: dict[str, torch.Tensor]
    files: dict[str, list[str]]
    adapters: list[Adapted]
    options: dict[str, Any]

    def write(self, root: Path) -> tuple[Path, list[Path]]:
        """The base and the adapters as directories."""
        base = root / "base"
        base.mkdir(parents=True)
        (base / "config.json").write_text(json.dumps(CONFIG))
        for file, names in self.files.items():
            save_file({name: self.tensors[name] for name in names}, base / file, {"format": "pt"})
        if len(self.files) > 1:
            weight_map = {name: file for file, names in self.files.items() for name in names}
            index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
            (base / "model.safetensors.index.json").write_text(json.dumps(index))
        return base, [_write_adapter(adapter, root / f"adapter-{n}") for n, adapter in enumerate(self.adapters)]

    def expected(self) -> dict[str, torch.Tensor]:
        """Every tensor of the result."""
        found = {}
        for name, tensor in self.tensors.items():
            dtype = OUTPUT.get(self.options["dtype"], tensor.dtype) if tensor.dtype in FLOATS.values() else tensor.dtype
            module = name.removesuffix(".weight")
            products = [
                (b @ a) * (adapter.scaling(module) * adapter.weight)
                for adapter in self.adapters
                for a, b in [adapter.factors.get(module, (None, None))]
                if a is not None
            ]
            found[name] = (
                rounded(tensor.double() + torch.from_numpy(sum(products)), dtype) if products else _as(tensor, dtype)
            )
        return found


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float64 values in the output's dtype, by way of float32 where it is a smaller one."""
    return values if dtype == torch.float64 else values.float().to(dtype)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What nothing touches: as it is, or in another dtype."""
    return tensor if tensor.dtype == dtype else rounded(tensor.double(), dtype)


def _write_adapter(adapter: Adapted, root: Path) -> Path:
    root.mkdir()
    (root / "adapter_config.json").write_text(json.dumps(adapter.config))
    tensors = {}
    for module, (a, b) in adapter.factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.from_numpy(a).to(adapter.dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.from_numpy(b).to(adapter.dtype)
    save_file(tensors, root / "adapter_model.safetensors")
    return root


# --- drawing ----------------------------------------------------------------------------------------------------------
def bytes_of(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, whatever its dtype."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _numbers(seed: int, *shape: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.integers(1, 65, shape) * generator.choice((-1.0, 1.0), shape) / 64


@st.composite
def checkpoints(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], dict[str, list[str]], Shapes]:
    """Tensors, the files they lie in, and the shapes of those that can be adapted."""
    hidden, inner = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    sizes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    modules: dict[str, tuple[int, int]] = {"lm_head": (draw(st.integers(1, 60)), hidden)}
    for layer in range(draw(st.integers(1, 3))):
        for name in draw(st.lists(st.sampled_from(PROJECTIONS), min_size=1, max_size=4, unique=True)):
            modules[f"model.layers.{layer}.{name}"] = sizes.get(name, (inner, hidden))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    floats = st.sampled_from(sorted(FLOATS))
    usual = draw(floats)
    kinds = st.one_of(st.just(usual), st.just(usual), floats)
    tensors = {
        f"{module}.weight": torch.randn(shape, generator=generator, dtype=torch.float64).to(FLOATS[draw(kinds)])
        for module, shape in modules.items()
    }
    tensors["model.norm.weight"] = torch.randn(hidden, generator=generator).to(FLOATS[draw(kinds)])
    if draw(st.booleans()):
        noise = torch.randint(0, 2, (draw(st.integers(0, 9)), 3), generator=generator)
        tensors["extra.scales"] = noise.to(OTHERS[draw(st.sampled_from(sorted(OTHERS)))])
    count = min(draw(st.integers(1, 4)), len(tensors))
    names = draw(st.permutations(sorted(tensors)))
    parts = [names[number::count] for number in range(count)]
    files = (
        [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)] if count > 1 else ["model.safetensors"]
    )
    return tensors, dict(zip(files, parts, strict=True)), modules


@st.composite
def adapters(draw: st.DrawFn, shapes: Shapes) -> Adapted:
    """An adapter on some of the modules."""
    rank, seed = draw(st.integers(1, 6)), draw(st.integers(0, 2**32))
    targets = draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, max_size=5, unique=True))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": draw(st.one_of(st.integers(1, 64), st.floats(0.125, 32, width=16))),
        "use_rslora": draw(st.booleans()),
        "target_modules": sorted({target.rpartition(".")[2] for target in targets}),
        "rank_pattern": {},
        "alpha_pattern": {},
        "task_type": draw(st.sampled_from(["CAUSAL_LM", None])),
    }
    ends = sorted({target.rpartition(".")[2] for target in targets if "." in target})
    for end in draw(st.lists(st.sampled_from(ends), max_size=2, unique=True)) if ends else ():
        config["rank_pattern"][end] = draw(st.integers(1, 9))
        config["alpha_pattern"][end] = draw(st.integers(1, 9))
    factors = {}
    for number, target in enumerate(targets):
        out, inputs = shapes[target]
        own = config["rank_pattern"].get(target.rpartition(".")[2], rank)
        factors[target] = _numbers(seed + 2 * number, own, inputs), _numbers(seed + 2 * number + 1, out, own)
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    return Adapted(config, factors, dtype, draw(st.sampled_from([1.0, 1.0, 0.5, -0.25, 0.1, 1.7])))


@st.composite
def merges(draw: st.DrawFn) -> Merge:
    """A merge with everything that may change its bytes, and everything that may not."""
    tensors, files, shapes = draw(checkpoints())
    chosen = draw(st.lists(adapters(shapes), min_size=1, max_size=3))
    options = {
        "dtype": draw(st.sampled_from(["auto", "auto", "float32", "float16", "bfloat16"])),
        "max_shard_size": draw(st.sampled_from(["keep", "keep", "1GB", "3KB", "777B"])),
        "workers": draw(st.integers(1, 3)),
        "memory": draw(st.sampled_from(["128MB", "64MB", "1GB"])),
        "io": draw(st.sampled_from(["auto", "buffered", "direct"])),
        "read": draw(st.sampled_from(["auto", "mmap", "pread", "direct"])),
        "sha256": draw(st.booleans()),
    }
    return Merge(tensors, files, chosen, options)


def differing(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> Sequence[str]:
    """Names of tensors that are not the same in dtype, shape and bytes."""
    return sorted(
        name
        for name in {*found, *wanted}
        if name not in found
        or name not in wanted
        or found[name].dtype != wanted[name].dtype
        or found[name].shape != wanted[name].shape
        or bytes_of(found[name]) != bytes_of(wanted[name])
    )
