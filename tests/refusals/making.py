"""Tiny checkpoints and adapters, and the command line called in this process.

Files are written with the safetensors library, as anybody's would be. Values follow from names, so that two calls
make the same bytes. `refused` holds every refusal to the same three claims: the exit code, the words of the message,
and that neither an output nor a change of an input is left behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from streammerge.cli import main
from streammerge.sinks.directory import OutputDirectory
from streammerge.sinks.records import RUN

if TYPE_CHECKING:
    import pytest

HIDDEN, INNER, VOCABULARY, LAYERS, RANK, ALPHA = 16, 32, 24, 2, 2, 4
TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
ADAPTER_CONFIG: Mapping[str, Any] = {
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": ["q_proj", "v_proj"],
}
SHAPES: Mapping[str, tuple[int, ...]] = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
    "input_layernorm": (HIDDEN,),
}
TARGETS = tuple(f"model.layers.{layer}.self_attn.{name}" for layer in range(LAYERS) for name in ("q_proj", "v_proj"))
PREFIX = "base_model.model."
BASE_CONFIG, INDEX, MARKER, STAGING = "config.json", "model.safetensors.index.json", "streammerge.json", ".streammerge"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def stored(values: Any, dtype: str = "F32") -> Stored:
    """Values in a float dtype; BF16 is cut off, not rounded."""
    array = np.ascontiguousarray(values, np.float32)
    if dtype == "BF16":
        return Stored(dtype, array.shape, (array.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I8": np.int8, "U8": np.uint8}[dtype]
    return Stored(dtype, array.shape, array.astype(kind).tobytes())


def values_of(tensor: Stored) -> np.ndarray:
    """The values of a float tensor as float64."""
    if tensor.dtype == "BF16":
        wide = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return wide.view(np.float32).astype(np.float64).reshape(tensor.shape)
    kind = {"F64": np.float64, "F32": np.float32, "F16": np.float16}[tensor.dtype]
    return np.frombuffer(tensor.data, kind).astype(np.float64).reshape(tensor.shape)


def normal(name: str, *shape: int, scale: float = 0.5, dtype: str = "F32") -> Stored:
    """Random values that depend on nothing but the name."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    return stored(generator.standard_normal(shape) * scale, dtype)


def save(path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file, written by the safetensors library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: as_torch(item) for name, item in tensors.items()}, path, dict(metadata or {"format": "pt"}))
    return path


def as_torch(tensor: Stored) -> torch.Tensor:
    """The tensor as torch has it."""
    dtype = TORCH_DTYPES[tensor.dtype]
    return (
        torch.frombuffer(bytearray(tensor.data), dtype=dtype).view(tensor.shape)
        if tensor.data
        else torch.empty(tensor.shape, dtype=dtype)
    )


def load(path: Path) -> dict[str, Stored]:
    """All tensors of a safetensors file, by its plain description: eight bytes of length, JSON, data."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, item in header.items():
        first, last = item["data_offsets"]
        found[name] = Stored(item["dtype"], tuple(item["shape"]), raw[start + first : start + last])
    return found


def load_all(root: Path) -> dict[str, Stored]:
    """All tensors of all weight files of a directory."""
    return {name: tensor for path in sorted(root.glob("*.safetensors")) for name, tensor in load(path).items()}


def base_tensors(*, dtype: str = "BF16", head: bool = True) -> dict[str, Stored]:
    """The tensors of a small Llama."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in SHAPES.items()}
    if head:
        shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    return {name: normal(f"base {name}", *shape, dtype=dtype) for name, shape in shapes.items()}


def make_base(
    root: Path,
    tensors: Mapping[str, Stored] | None = None,
    *,
    shards: int = 2,
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """A base checkpoint: config.json with `changes`, the weights in one file or in several with an index."""
    tensors = base_tensors() if tensors is None else tensors
    write_json(root / BASE_CONFIG, {**CONFIG, **(changes or {})})
    write_json(root / "generation_config.json", {"do_sample": True})
    if shards == 1:
        save(root / "model.safetensors", tensors)
        return root
    names = sorted(tensors)
    weight_map = {name: shard_name(number * shards // len(names), shards) for number, name in enumerate(names)}
    for file in sorted(set(weight_map.values())):
        save(root / file, {name: tensors[name] for name in names if weight_map[name] == file})
    total = sum(len(tensor.data) for tensor in tensors.values())
    write_json(root / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return root


def shard_name(number: int, count: int) -> str:
    """The name of shard `number`, counted from zero."""
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def factors(module: str, out: int = HIDDEN, inputs: int = HIDDEN, *, rank: int = RANK) -> dict[str, Stored]:
    """A LoRA pair under PEFT's keys."""
    return {
        f"{PREFIX}{module}.lora_A.weight": normal(f"{module} A", rank, inputs),
        f"{PREFIX}{module}.lora_B.weight": normal(f"{module} B", out, rank),
    }


def all_factors(modules: Iterable[str] = TARGETS, *, rank: int = RANK) -> dict[str, Stored]:
    """A LoRA pair for each of `modules`, whose shapes are those of the base."""
    found: dict[str, Stored] = {}
    for module in modules:
        out, inputs = SHAPES[".".join(module.split(".")[-2:])]
        found |= factors(module, out, inputs, rank=rank)
    return found


def make_adapter(root: Path, tensors: Mapping[str, Stored] | None = None, **changes: Any) -> Path:
    """A LoRA adapter; `changes` go into its config, None takes a field out."""
    config = {key: value for key, value in {**ADAPTER_CONFIG, **changes}.items() if value is not None}
    write_json(root / "adapter_config.json", config)
    save(root / "adapter_model.safetensors", all_factors() if tensors is None else tensors)
    return root


def write_json(path: Path, value: object) -> Path:
    """A JSON file; NaN and Infinity as Python writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
    return path


def inputs_at(root: Path, **adapter: Any) -> tuple[Path, Path]:
    """A healthy base and a healthy adapter, but for the adapter's config fields."""
    return make_base(root / "base"), make_adapter(root / "adapter", **adapter)


# --- the command line -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left behind: its exit code and its two streams."""

    code: int
    out: str
    err: str


def call(*arguments: object) -> Outcome:
    """`streammerge ARGUMENTS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def merged(base: Path, adapters: Path | Sequence[Path], out: Path, *options: object) -> Outcome:
    """A run that must succeed."""
    listed = [adapters] if isinstance(adapters, Path) else list(adapters)
    outcome = call("run", base, *listed, "-o", out, *options)
    assert outcome.code == 0, outcome.err
    assert (out / MARKER).exists()
    return outcome


def staged(base: Path, adapter: Path, out: Path, patch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that ended when all was staged and nothing published."""

    def stop(*_: object) -> None:
        raise OSError("stopped")

    with patch.context() as inner:
        inner.setattr(OutputDirectory, "publish", stop)
        assert call("run", base, adapter, "-o", out).code == 1
    (record,) = (out / STAGING).rglob(RUN)
    return record.parent


def refused(
    code: int, *words: str, base: Path, adapters: Path | Sequence[Path], options: Sequence[object] = ()
) -> Outcome:
    """A run that must be refused before anything is written: with this code, with all these words on stderr, nothing
    on stdout, no output directory, and inputs as they were."""
    listed = [adapters] if isinstance(adapters, Path) else list(adapters)
    folders = [path for path in (base, *listed) if path.is_dir()]
    out = base.parent / "out"
    before = [tree_digest(path) for path in folders]
    outcome = call("run", base, *listed, "-o", out, *options)
    assert outcome.code == code, f"exit {outcome.code}\n{outcome.err}"
    for word in words:
        assert word in outcome.err, f"`{word}` is not in\n{outcome.err}"
    assert outcome.err.startswith("error: ")
    assert outcome.out == ""
    assert not out.exists()
    assert [tree_digest(path) for path in folders] == before
    return outcome


def tree_digest(root: Path) -> str:
    """Names and bytes of all regular files below a directory."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def assert_nothing_loadable(out: Path) -> None:
    """Neither a loader nor we ourselves would take what is in `out` for a checkpoint."""
    for name in (BASE_CONFIG, INDEX, MARKER):
        assert not (out / name).exists(), f"{name} is there"


def expected(base: Stored, a: Stored, b: Stored, scaling: float) -> np.ndarray:
    """`W + scaling * B @ A` in float64."""
    return values_of(base) + values_of(b) @ values_of(a) * scaling
