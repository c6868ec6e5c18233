"""A small base with the shapes that make stretches, tiles, pieces and blocks cut each other, and what a merge of it
must come to.

Factors are whole numbers of 64ths, so that every sum of products is exact in float64 in any order: the expected bytes
are those of one addition and the roundings that the arithmetic promises, whatever library multiplies.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge import integrity, stream
from streammerge.compute import worker
from streammerge.core import digests
from streammerge.planning import memory, tiles
from streammerge.sinks import buffers, hashes, shards
from tests.refusals.making import CONFIG, PREFIX, Stored, make_adapter, normal, stored, values_of, write_json

if TYPE_CHECKING:
    import pytest

HIDDEN, INNER = 134, 257
LAYER = "model.layers.0"
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens": (301, HIDDEN),
    f"{LAYER}.self_attn.qkv_proj": (3 * HIDDEN, HIDDEN),
    f"{LAYER}.mlp.gate_up_proj": (2 * INNER, HIDDEN),
    f"{LAYER}.input_layernorm": (HIDDEN,),
    f"{LAYER}.self_attn.o_proj": (HIDDEN, HIDDEN),
    "one_row": (1, 513),
    f"{LAYER}.mlp.down_proj": (HIDDEN, INNER),
    "one_column": (401, 1),
    "lm_head": (301, HIDDEN),
}
"""Modules in the order of the file; no size is a multiple of a page."""
ODD = Stored("U8", (3,), b"\x01\x02\x03")
"""Lies before all others: whatever follows lies at odd offsets, which the format allows."""
FIRST: Mapping[str, tuple[str, int, int]] = {
    f"{LAYER}.self_attn.q_proj": (f"{LAYER}.self_attn.qkv_proj", 0, HIDDEN),
    f"{LAYER}.self_attn.v_proj": (f"{LAYER}.self_attn.qkv_proj", 2 * HIDDEN, HIDDEN),
    f"{LAYER}.mlp.up_proj": (f"{LAYER}.mlp.gate_up_proj", INNER, INNER),
    "one_row": ("one_row", 0, 1),
    "one_column": ("one_column", 0, 401),
}
"""Targets of the first adapter: the stored module, and which of its rows they are."""
SECOND: Mapping[str, tuple[str, int, int]] = {
    f"{LAYER}.self_attn.q_proj": (f"{LAYER}.self_attn.qkv_proj", 0, HIDDEN),
    f"{LAYER}.mlp.down_proj": (f"{LAYER}.mlp.down_proj", 0, HIDDEN),
}
DIRECTED = f"{LAYER}.self_attn.o_proj"
"""The target of the third, which is DoRA."""
REAL_PIECE = memory.PIECE
RANKS, ALPHAS = (3, 5, 2), (2, 20, 2)


def exact(name: str, *shape: int) -> Stored:
    """Factors whose products, and sums of them, are exact."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return stored(generator.integers(-64, 65, shape) / 64)


def pair(number: int, module: str, out: int, inputs: int) -> dict[str, Stored]:
    """A LoRA pair of adapter `number`."""
    return {
        f"{PREFIX}{module}.lora_A.weight": exact(f"{number} {module} A", RANKS[number], inputs),
        f"{PREFIX}{module}.lora_B.weight": exact(f"{number} {module} B", out, RANKS[number]),
    }


def base_tensors(dtype: str) -> dict[str, Stored]:
    """The stored tensors."""
    return {"odd": ODD} | {f"{name}.weight": normal(name, *shape, dtype=dtype) for name, shape in SHAPES.items()}


def save_as_laid(path: Path, tensors: Mapping[str, Stored], padding: int = 0) -> None:
    """A safetensors file with its tensors in the order they are given, and so many spaces behind its header."""
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + len(tensor.data)],
        }  # fmt: skip
        at += len(tensor.data)
    text = json.dumps(header).encode() + b" " * padding
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensor.data for tensor in tensors.values()))


def make_subject(root: Path, dtype: str) -> tuple[Path, list[Path]]:
    """The base in two files, and three adapters."""
    base, tensors = root / "base", base_tensors(dtype)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 1, "vocab_size": 301}
    write_json(base / "config.json", {**CONFIG, **sizes, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"]})
    names = list(tensors)
    files = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    for number, (file, held) in enumerate(files.items()):
        save_as_laid(base / file, {name: tensors[name] for name in held}, padding=8 * number + 1)
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    write_json(base / "model.safetensors.index.json", index)
    adapters = []
    for number, targets in enumerate((FIRST, SECOND)):
        factors: dict[str, Stored] = {}
        for module, (where, _, rows) in targets.items():
            factors |= pair(number, module, rows, SHAPES[where][1])
        config = {"r": RANKS[number], "lora_alpha": ALPHAS[number]}
        adapters.append(make_adapter(root / f"adapter-{number}", factors, **config))
    magnitude = {f"{PREFIX}{DIRECTED}.lora_magnitude_vector": stored(np.arange(1, HIDDEN + 1))}
    config = {"r": RANKS[2], "lora_alpha": ALPHAS[2], "use_dora": True}
    factors = pair(2, DIRECTED, HIDDEN, HIDDEN) | magnitude
    return base, [*adapters, make_adapter(root / "adapter-2", factors, **config)]


def expected_values(dtype: str) -> dict[str, np.ndarray]:
    """What every weight becomes, in float64 before any rounding; DoRA's up to the last bits of float64."""
    tensors = base_tensors(dtype)
    deltas = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for number, targets in enumerate((FIRST, SECOND)):
        for module, (where, first, rows) in targets.items():
            b, a = product_of(number, module, rows, SHAPES[where][1])
            deltas[where][first : first + rows] += (b @ a) * (ALPHAS[number] / RANKS[number])
    values = {f"{name}.weight": values_of(tensors[f"{name}.weight"]) + delta for name, delta in deltas.items()}
    b, a = product_of(2, DIRECTED, HIDDEN, HIDDEN)
    directed = values[f"{DIRECTED}.weight"] + b @ a
    magnitude = np.arange(1, HIDDEN + 1) / np.linalg.norm(directed, axis=1)
    return values | {f"{DIRECTED}.weight": directed * magnitude[:, None]}


def product_of(number: int, module: str, out: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """B and A of an adapter's module."""
    a, b = pair(number, module, out, inputs).values()
    return values_of(b), values_of(a)


def rounded(values: np.ndarray, dtype: str) -> bytes:
    """Float64 to what is written: by way of float32, but for float64; to the nearest, ties to even."""
    if dtype == "F64":
        return values.tobytes()
    single = values.astype(np.float32)
    if dtype == "BF16":
        bits = single.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return single.astype(np.float16 if dtype == "F16" else np.float32).tobytes()


def make_small(patch: pytest.MonkeyPatch, *, piece: int = 2**14, block: int = 5 * 2**14, tile: int = 2**10) -> None:
    """Small pieces, blocks and tiles, whose sizes stand to each other as the real ones do."""
    assert block % piece == 0
    for module in (memory, stream, worker, buffers, hashes, shards, integrity):
        assert module.PIECE == REAL_PIECE
        patch.setattr(module, "PIECE", piece)
    patch.setattr(digests, "BLOCK", block)
    patch.setattr(tiles, "TILE_ELEMENTS", tile)
