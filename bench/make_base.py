"""Builds a base and a LoRA adapter for the benchmarks: the same bytes every time, written as a stream.

    python bench/make_base.py DIR --kind llama --size 2GB
    python bench/make_base.py DIR --kind big-tensors --size 2GB
    python bench/make_base.py DIR --kind sparse-70b

writes DIR/base and DIR/adapter. `llama` has the proportions of Llama 3 8B in shards of about 1 GB; `big-tensors` is
mostly two tables, 1 GiB each at 2GB; `sparse-70b` has every tensor of Llama 3 70B in files without content, which take
no space on a file system that keeps holes. No more than a few pieces of 8 MB are held in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streammerge.core.text import parse_size, size_text
from streammerge.formats.safetensors import encode_header

PIECE = 4 * 2**20
"""Elements that are made at a time."""
WIDTHS = {"BF16": 2, "F32": 4}
ALPHA = 32
Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """The sizes of a Llama. `attention` and `kv` are the widths of q and of k and v."""

    hidden: int
    attention: int
    kv: int
    ffn: int
    vocabulary: int
    layers: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """Linear modules of a layer, with the shapes of their weights (out, in)."""
        return {
            "self_attn.q_proj": (self.attention, self.hidden),
            "self_attn.k_proj": (self.kv, self.hidden),
            "self_attn.v_proj": (self.kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.attention),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    def tensors(self) -> list[Tensor]:
        """Every tensor, in the order of the files."""
        found: list[Tensor] = [("model.embed_tokens.weight", (self.vocabulary, self.hidden))]
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found += [(f"{prefix}.{name}.weight", shape) for name, shape in self.linears().items()]
            found += [(f"{prefix}.{name}_layernorm.weight", (self.hidden,)) for name in ("input", "post_attention")]
        return [*found, ("model.norm.weight", (self.hidden,)), ("lm_head.weight", (self.vocabulary, self.hidden))]

    def factors(self, rank: int, *, tables: bool) -> list[Tensor]:
        """The factors of an adapter on all linear layers of the stack, and on both tables."""
        found: list[Tensor] = []
        for layer in range(self.layers):
            for name, (rows, cols) in self.linears().items():
                module = f"base_model.model.model.layers.{layer}.{name}"
                found += [(f"{module}.lora_A.weight", (rank, cols)), (f"{module}.lora_B.weight", (rows, rank))]
        if tables:
            embedding, head = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
            found += [
                (f"{embedding}.lora_embedding_A", (rank, self.vocabulary)),
                (f"{embedding}.lora_embedding_B", (self.hidden, rank)),
                (f"{head}.lora_A.weight", (rank, self.hidden)),
                (f"{head}.lora_B.weight", (self.vocabulary, rank)),
            ]
        return found

    def config(self) -> dict[str, object]:
        """The config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "head_dim": min(128, self.kv),
            "num_attention_heads": self.attention // min(128, self.kv),
            "num_key_value_heads": self.kv // min(128, self.kv),
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


def model_of(kind: str, size: int) -> Model:
    """The sizes of the base of one kind that takes about `size` bytes (2 to an element)."""
    if kind == "sparse-70b":
        return Model(hidden=8192, attention=8192, kv=1024, ffn=28672, vocabulary=128256, layers=80)
    if kind == "big-tensors":
        hidden, rows = 8192, max(64, 65536 * size // (2 * 10**9))
        return Model(hidden=hidden, attention=256, kv=128, ffn=512, vocabulary=rows, layers=2)
    large = Model(hidden=4096, attention=4096, kv=1024, ffn=14336, vocabulary=32000, layers=1)
    small = Model(hidden=256, attention=256, kv=128, ffn=896, vocabulary=1024, layers=1)
    one = large if size >= 10**9 else small
    layer = 2 * sum(math.prod(shape) for shape in one.linears().values())
    tables = 2 * 2 * one.vocabulary * one.hidden
    layers = max(1, round((size - tables) / layer))
    return Model(one.hidden, one.attention, one.kv, one.ffn, one.vocabulary, layers)


def values(name: str, count: int, dtype: str) -> Iterator[bytes]:
    """The bytes of a tensor, which depend on nothing but its name, size and dtype.

    BF16: random sign and mantissa, magnitudes from 2^-9 to 2^-5, as trained weights have them. F32: normal, 0.02.
    """
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    for start in range(0, count, PIECE):
        length = min(PIECE, count - start)
        if dtype == "F32":
            normal = generator.standard_normal(length, dtype=np.float32)
            normal *= np.float32(0.02)
            yield normal.tobytes()
        else:
            bits = generator.integers(0, 2**16, length, dtype=np.uint16)
            bits &= 0x81FF
            bits += 118 << 7
            yield bits.tobytes()


def write_file(path: Path, tensors: Sequence[Tensor], dtype: str, *, sparse: bool = False) -> None:
    """One safetensors file; a sparse one has a header, its full size, and zeros that nobody wrote."""
    width = WIDTHS[dtype]
    entries = [(name, dtype, shape, math.prod(shape) * width) for name, shape in tensors]
    header = encode_header(entries, {"format": "pt"})
    with path.open("wb") as stream:
        stream.write(header)
        if sparse:
            stream.truncate(len(header) + sum(entry[3] for entry in entries))
            return
        for name, shape in tensors:
            for piece in values(name, math.prod(shape), dtype):
                stream.write(piece)


def shards_of(tensors: Sequence[Tensor], limit: int) -> list[list[Tensor]]:
    """Tensors in files of at most `limit` bytes, or of one tensor."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for name, shape in tensors:
        nbytes = math.prod(shape) * WIDTHS["BF16"]
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    return shards


def write_base(root: Path, model: Model, limit: int, *, sparse: bool) -> int:
    """The base below `root`; its bytes of tensors."""
    root.mkdir(parents=True)
    shards = shards_of(model.tensors(), limit)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(root / file, tensors, "BF16", sparse=sparse)
        weight_map |= {name: file for name, _ in tensors}
    total = sum(math.prod(shape) * WIDTHS["BF16"] for _, shape in model.tensors())
    write_json(root / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(root / "config.json", model.config())
    return total


def write_adapter(root: Path, model: Model, rank: int, dtype: str, *, tables: bool) -> int:
    """The adapter below `root`; its bytes of tensors."""
    root.mkdir(parents=True)
    factors = model.factors(rank, tables=tables)
    write_file(root / "adapter_model.safetensors", factors, dtype)
    targets = [name.rpartition(".")[2] for name in model.linears()] + (["embed_tokens", "lm_head"] if tables else [])
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": ALPHA, "target_modules": targets}
    write_json(root / "adapter_config.json", config)
    return sum(math.prod(shape) * WIDTHS[dtype] for _, shape in factors)


def write_json(path: Path, value: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Build what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR", help="gets `base` and `adapter`; must not hold them")
    parser.add_argument("--kind", choices=("llama", "big-tensors", "sparse-70b"), default="llama")
    parser.add_argument("--size", type=parse_size, default="2GB", help="bytes of the base (default 2GB)")
    parser.add_argument("--shard-size", type=parse_size, help="default 1.1GB, 5GB for sparse-70b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapter-dtype", choices=tuple(WIDTHS), default="F32")
    arguments = parser.parse_args()
    model = model_of(arguments.kind, arguments.size)
    sparse = arguments.kind == "sparse-70b"
    limit = arguments.shard_size or (5 * 10**9 if sparse else 11 * 10**8)
    base = write_base(arguments.directory / "base", model, limit, sparse=sparse)
    tables = arguments.kind == "big-tensors"
    adapter = write_adapter(
        arguments.directory / "adapter", model, arguments.rank, arguments.adapter_dtype, tables=tables
    )
    facts = f"{len(model.tensors())} tensors, {size_text(base)}; adapter r={arguments.rank}, {size_text(adapter)}"
    print(f"{arguments.directory}: base of {facts}")


if __name__ == "__main__":
    main()
