"""Makes the files README's walk-through plans with: a base with the shapes of Llama 3 70B and a LoRA adapter for it.

The base has 30 sparse shards: 141 GB by name and header, 188 kB on disk, all weights zero. The adapter is real: rank 16
on all seven linears of each layer, its values a fixed pattern, so that plans of it are the same on every machine.
Run: python scripts/example_70b.py DIR
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from streammerge.formats.index import encode_index
from streammerge.formats.safetensors import encode_header

HIDDEN, INTERMEDIATE, KEYS, LAYERS, VOCABULARY, SHARDS, RANK = 8192, 28672, 1024, 80, 128256, 30, 16
BF16 = 2
METADATA = {"format": "pt"}
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 2 * RANK,
    "target_modules": sorted({name.rpartition(".")[2] for name in LINEARS}),
}

Shape = tuple[int, ...]


def base_shapes() -> Iterator[tuple[str, Shape]]:
    """Every tensor of the base, in the order of the forward pass."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in LINEARS.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def adapter_shapes() -> Iterator[tuple[str, Shape]]:
    """Both factors of every linear, named as PEFT names them."""
    for layer in range(LAYERS):
        for name, (rows, cols) in LINEARS.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            yield f"{module}.lora_A.weight", (RANK, cols)
            yield f"{module}.lora_B.weight", (rows, RANK)


def size_of(shape: Shape) -> int:
    """Bytes of a BF16 tensor."""
    return int(np.prod(shape)) * BF16


def header_of(tensors: Mapping[str, Shape]) -> bytes:
    """The header of a file that holds `tensors`."""
    return encode_header([(name, "BF16", shape, size_of(shape)) for name, shape in tensors.items()], METADATA)


def pattern(start: int, count: int) -> bytes:
    """`count` BF16 values between -0.02 and 0.02, from integer arithmetic alone: the same bytes everywhere."""
    mixed = (np.arange(start, start + count, dtype=np.uint64) * np.uint64(2654435761)) >> np.uint64(8)
    values = ((mixed & np.uint64(0xFFFF)).astype(np.float32) - np.float32(32768)) * np.float32(0.02 / 32768)
    return (values.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()


def make_base(folder: Path) -> None:
    """Shards of about equal size, as holes behind their headers; an index and a config."""
    folder.mkdir(parents=True)
    shapes = dict(base_shapes())
    total = sum(map(size_of, shapes.values()))
    groups: list[dict[str, Shape]] = [{} for _ in range(SHARDS)]
    done = 0
    for name, shape in shapes.items():
        groups[done * SHARDS // total][name] = shape
        done += size_of(shape)
    weight_map = {}
    for number, tensors in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{SHARDS:05d}.safetensors"
        header = header_of(tensors)
        with (folder / file).open("xb") as shard:
            shard.write(header)
            shard.truncate(len(header) + sum(map(size_of, tensors.values())))
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_bytes(encode_index(weight_map, total, {}))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def make_adapter(folder: Path) -> None:
    """A PEFT directory with values in it."""
    folder.mkdir(parents=True)
    shapes = dict(adapter_shapes())
    with (folder / "adapter_model.safetensors").open("xb") as file:
        file.write(header_of(shapes))
        start = 0
        for shape in shapes.values():
            count = size_of(shape) // BF16
            file.write(pattern(start, count))
            start += count
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG, indent=2) + "\n")


def main() -> int:
    """Make DIR/base and DIR/adapter."""
    if len(sys.argv) != 2:
        print("usage: python scripts/example_70b.py DIR", file=sys.stderr)
        return 2
    root = Path(sys.argv[1])
    make_base(root / "base")
    make_adapter(root / "adapter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
