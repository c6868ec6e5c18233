"""How long it takes to find every target of an adapter by name: a 70B model's index, and one of 60,000 tensors.

    python bench/names.py

No files: the headers are made in memory, so that only names, rules and shapes are worked on. The first base is Llama 3
70B, LoRA on its 560 linear layers. The second is a mixture of experts as DeepSeek-V3 is stored, 60,000 tensors, one for
each expert and projection, LoRA on attention and shared experts and on the stacked experts of transformers 5; its
targets are the 60,000 operations of a plan. The first figure of each holds what is done once: reading the tables,
compiling patterns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from measure import machine, median, parser_of

from streammerge.core.collector import collector_paused
from streammerge.core.tensors import TensorInfo
from streammerge.methods.parts import sort_parts
from streammerge.methods.readers import read_adapter
from streammerge.methods.reading import AdapterInput, BaseView
from streammerge.names.architectures import architecture_of
from streammerge.names.catalog import Catalog
from streammerge.names.resolve import Resolver

Shapes = dict[str, tuple[int, ...]]
RANK = 8
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
DEEPSEEK = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
LORA = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16, "peft_version": "0.21.2"}


def pair(module: str, out: int, into: int, experts: int = 1) -> Shapes:
    """The factors of one module."""
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": (experts * RANK, into), f"{prefix}.lora_B.weight": (out, experts * RANK)}


def llama() -> tuple[Shapes, Shapes]:
    """Base and adapter of 80 layers."""
    base: Shapes = {"model.embed_tokens.weight": (128256, 8192), "model.norm.weight": (8192,)}
    base["lm_head.weight"] = (128256, 8192)
    adapter: Shapes = {}
    linear = {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192)}
    modules = {f"self_attn.{name}_proj": shape for name, shape in linear.items()}
    modules |= {"mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192), "mlp.down_proj": (8192, 28672)}
    for layer in range(80):
        for module, shape in modules.items():
            base[f"model.layers.{layer}.{module}.weight"] = shape
            adapter |= pair(f"model.layers.{layer}.{module}", *shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            base[f"model.layers.{layer}.{norm}.weight"] = (8192,)
    return base, adapter


def experts(layers: int, count: int) -> tuple[Shapes, Shapes]:
    """Base and adapter of layers with `count` experts each."""
    hidden, inner = 7168, 2048
    base: Shapes = {"model.embed_tokens.weight": (129280, hidden), "lm_head.weight": (129280, hidden)}
    adapter: Shapes = {}
    own = {"self_attn.o_proj": (hidden, 16384), "self_attn.q_b_proj": (24576, 1536)}
    own |= {f"mlp.shared_experts.{name}_proj": (inner, hidden) for name in ("gate", "up")}
    for layer in range(layers):
        path = f"model.layers.{layer}"
        for module, shape in own.items():
            base[f"{path}.{module}.weight"] = shape
            adapter |= pair(f"{path}.{module}", *shape)
        base[f"{path}.mlp.gate.weight"] = (count, hidden)
        for e in range(count):
            base[f"{path}.mlp.experts.{e}.gate_proj.weight"] = (inner, hidden)
            base[f"{path}.mlp.experts.{e}.up_proj.weight"] = (inner, hidden)
            base[f"{path}.mlp.experts.{e}.down_proj.weight"] = (hidden, inner)
        adapter |= pair(f"{path}.mlp.experts.base_layer", 2 * inner, hidden, count)
        adapter |= pair(f"{path}.mlp.experts", hidden, inner, count)
    return base, adapter


def infos(shapes: Shapes) -> dict[str, TensorInfo]:
    """Headers without files."""
    return {name: TensorInfo(name, "F32", shape, "f", 0, 0) for name, shape in shapes.items()}


def resolved(base: Mapping[str, TensorInfo], config: dict[str, Any], adapter: Shapes, lora: dict[str, Any]) -> int:
    """Find every target; the number of operations."""
    parts = sort_parts(infos(adapter), lambda a, b: False)
    catalog = Catalog(base, architecture_of(config), config)
    contribution = read_adapter(AdapterInput(0, parts, lora, 1.0), BaseView(Resolver(catalog)))
    if contribution.unmatched:
        raise SystemExit(f"unmatched: {contribution.unmatched[:3]}")
    return len(contribution.operations)


def main() -> None:
    """Measure and print."""
    parser = parser_of(__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=78, help="of the mixture of experts")
    parser.add_argument("--experts", type=int, default=256, help="in each of its layers")
    arguments = parser.parse_args()
    runs = arguments.runs
    print(machine())
    stacked = LORA | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    for name, (base, adapter), config, lora in (
        ("Llama 3 70B", llama(), LLAMA, LORA),
        ("mixture of experts", experts(arguments.layers, arguments.experts), DEEPSEEK, stacked),
    ):
        headers = infos(base)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            with collector_paused():  # as planning does
                operations = resolved(headers, config, adapter, lora)
            times.append(time.perf_counter() - start)
        print(
            f"{name:24} {len(base):6,} tensors {len(adapter):5,} adapter tensors {operations:6,} operations: "
            f"first {times[0]:.3f} s, median of {runs} {median(times):.3f} s"
        )


if __name__ == "__main__":
    main()
