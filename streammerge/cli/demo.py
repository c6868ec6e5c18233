"""`streammerge demo`: a small sharded base and a LoRA adapter, made on the spot, then planned, merged and verified.

No network, no transformers: the files are written with the safetensors library, as anybody's would be.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge import api
from streammerge.cli.output import Output
from streammerge.cli.show import plan_text, status_text
from streammerge.core import io
from streammerge.core.errors import OutputExistsError
from streammerge.progress import Bar
from streammerge.sources.checkpoint import LOCAL, read_facts

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN, LAYERS, VOCABULARY, RANK, ALPHA = 256, 4, 2048, 8, 16
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
TARGETS = ("q_proj", "v_proj")


def run(arguments: argparse.Namespace, output: Output) -> None:
    """Build, inspect, plan, merge, verify, and show each step as the command one would type."""
    root = Path(arguments.directory) if arguments.directory else Path(io.temporary_dir("streammerge-demo-"))
    if io.exists(root) and io.list_tree(root):
        raise OutputExistsError(f"`{root}` is not empty", "give the demo a directory of its own")
    base, adapter, merged = (root / name for name in ("base", "adapter", "merged"))
    output.say(f"building a small sharded base and a LoRA adapter in {root}")
    build(root)
    output.result(f"$ streammerge inspect {adapter}")
    output.result(status_text(api.inspect(adapter), verbose=False))
    output.result(f"\n$ streammerge plan {base} {adapter}")
    output.result(plan_text(api.plan(base, [adapter]), str(merged), verbose=False))
    output.result(f"\n$ streammerge run {base} {adapter} -o {merged}")
    bar = Bar()
    report = api.merge(base, [adapter], merged, progress=None if output.quiet else bar)
    bar.close()
    output.result(str(report.output))
    output.result(f"\n$ streammerge verify {merged} --full")
    checked = api.verify(merged, full=True)
    output.result(f"{merged}: verified, {checked.checked} blocks checked, {checked.rederived} derived again")
    output.result(
        "\nwhat happened to the first changed tensors (norm of the delta, share that survived rounding to bf16):"
    )
    for name, entry in list(report.document["tensors"].items())[:4]:
        output.result(f"  {name}  {entry['delta_norm']:.4f}  {entry['survived']:.1%}")
    output.result(
        f"\n{report.changed} of {_count(base)} tensors changed, the others are the base's bytes; "
        f"the report is in {merged / 'streammerge.json'}"
    )


def build(root: Path) -> None:
    """Write `root/base` (two shards and an index) and `root/adapter`."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    base, adapter = root / "base", root / "adapter"
    io.make_dirs(base)
    io.make_dirs(adapter)
    shards = {
        "model-00001-of-00002.safetensors": range(LAYERS // 2),
        "model-00002-of-00002.safetensors": range(LAYERS // 2, LAYERS),
    }
    weight_map: dict[str, str] = {}
    total = 0
    factors: dict[str, Tensor] = {}
    for file, layers in shards.items():
        tensors = {} if 0 not in layers else {"model.embed_tokens.weight": normal(VOCABULARY, HIDDEN)}
        for layer in layers:
            for name, shape in _shapes().items():
                tensors[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
            for target in TARGETS:
                module = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                factors[f"{module}.lora_A.weight"] = normal(RANK, HIDDEN, dtype=torch.float32)
                factors[f"{module}.lora_B.weight"] = normal(HIDDEN, RANK, dtype=torch.float32)
        if LAYERS - 1 in layers:
            tensors |= {"model.norm.weight": normal(HIDDEN), "lm_head.weight": normal(VOCABULARY, HIDDEN)}
        save_file(tensors, base / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    _write(base / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write(base / "config.json", CONFIG)
    _write(
        adapter / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": list(TARGETS),
        },
    )


def _shapes() -> dict[str, tuple[int, ...]]:
    attention = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
    mlp = {
        "mlp.gate_proj": (2 * HIDDEN, HIDDEN),
        "mlp.up_proj": (2 * HIDDEN, HIDDEN),
        "mlp.down_proj": (HIDDEN, 2 * HIDDEN),
    }
    return {**attention, **mlp, "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}


def _write(path: Path, value: object) -> None:
    io.write_new(path, (json.dumps(value, indent=2) + "\n").encode())


def _count(base: Path) -> int:
    return len(read_facts(base, LOCAL).tensors)
