"""Builds a base and a LoRA adapter for the benchmarks: the same bytes every time, written as a stream.

    python bench/make_base.py DIR --kind llama --size 2GB
    python bench/make_base.py DIR --kind llama --size 2GB --rank 64 --adapter adapter-r64
    python bench/make_base.py DIR --kind llama --size 2GB --dtype F32
    python bench/make_base.py DIR --kind sparse-70b

writes DIR/base and DIR/adapter, and leaves what is there: the second command adds an adapter to the base of the first.
In float32 a base of the same size has half as many elements. What the kinds are is in shapes.py; `sparse-70b` has files
without content, which take no space on a file system that keeps holes. config.json and adapter_config.json come last,
so that what was cut short is made again. No more than a few pieces of 16 MB are held in memory.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from shapes import CONFIG_DTYPES, ELEMENT, KINDS, WIDTHS, Model, Shape, model_of

from streammerge.core.text import parse_size, size_text
from streammerge.formats.safetensors import encode_header

PIECE = 4 * 2**20
"""Elements that are made at a time."""
ALPHA = 32
Tensor = tuple[str, Shape]


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


def shards_of(tensors: Mapping[str, Shape], width: int, limit: int) -> list[list[Tensor]]:
    """Tensors, `width` bytes an element, in files of at most `limit` bytes, or of one tensor."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for name, shape in tensors.items():
        nbytes = math.prod(shape) * width
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += nbytes
    return shards


def write_base(root: Path, model: Model, dtype: str, limit: int, *, sparse: bool) -> None:
    """The base below `root`."""
    width = WIDTHS[dtype]
    shards = shards_of(model.tensors, width, limit)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(root / file, tensors, dtype, sparse=sparse)
        weight_map |= {name: file for name, _ in tensors}
    index = {"metadata": {"total_size": model.nbytes(width)}, "weight_map": weight_map}
    write_json(root / "model.safetensors.index.json", index)
    write_json(root / "config.json", {**model.config, "torch_dtype": CONFIG_DTYPES[dtype]})


def write_adapter(root: Path, model: Model, rank: int, dtype: str) -> None:
    """The adapter below `root`."""
    write_file(root / "adapter_model.safetensors", list(model.factors(rank).items()), dtype)
    targets = model.targets()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": ALPHA, "target_modules": targets}
    write_json(root / "adapter_config.json", config)


def write_json(path: Path, value: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def begun(root: Path, last: str) -> bool:
    """True if `root` is still to be filled: it is empty now. False where its last file is there."""
    if (root / last).exists():
        return False
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    return True


def main() -> None:
    """Build what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="DIR", help="gets the base and the adapter it lacks")
    parser.add_argument("--kind", choices=KINDS, default="llama")
    parser.add_argument("--size", type=parse_size, default="2GB", help="bytes of the base (default 2GB)")
    parser.add_argument("--dtype", choices=tuple(WIDTHS), default="BF16", help="of the base (default BF16)")
    parser.add_argument("--shard-size", type=parse_size, help="default 1.1GB, 5GB for sparse-70b")
    parser.add_argument("--adapter", default="adapter", help="the adapter's directory in DIR (default adapter)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapter-dtype", choices=tuple(WIDTHS), default="F32")
    arguments = parser.parse_args()
    width = WIDTHS[arguments.dtype]
    model = model_of(arguments.kind, arguments.size * ELEMENT // width)
    sparse = arguments.kind == "sparse-70b"
    limit = arguments.shard_size or (5 * 10**9 if sparse else 11 * 10**8)
    base, adapter = arguments.directory / "base", arguments.directory / arguments.adapter
    if begun(base, "config.json"):
        write_base(base, model, arguments.dtype, limit, sparse=sparse)
    if begun(adapter, "adapter_config.json"):
        write_adapter(adapter, model, arguments.rank, arguments.adapter_dtype)
    read = (adapter / "adapter_model.safetensors").stat().st_size
    facts = f"{len(model.tensors)} tensors, {size_text(model.nbytes(width))}"
    print(f"{arguments.directory}: base of {facts}; adapter r={arguments.rank}, {size_text(read)}")


if __name__ == "__main__":
    main()
