"""What the bases of the benchmarks consist of: names, shapes and config of every tensor, as data without a value.

`llama` has the proportions of Llama 3 8B; `big-tensors` is mostly two tables, 1 GiB each at 2GB; `sparse-70b` is every
tensor of Llama 3 70B; `moe` is Qwen3-30B-A3B at half its widths, 128 experts to a layer, one tensor for each expert and
projection, as it is stored; `one-tensor` is a single table and the norm behind it. Names and configs are such that
transformers opens every one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

Shape = tuple[int, ...]
WIDTHS = {"BF16": 2, "F32": 4}
"""Bytes of an element of every dtype that a base or an adapter may have."""
ELEMENT = WIDTHS["BF16"]
"""Bytes of an element that sizes are meant in: the shapes of a base are the same in every dtype."""
CONFIG_DTYPES = {"BF16": "bfloat16", "F32": "float32"}
NARROW = 5 * 10**8
"""Bytes below which `llama` and `moe` have narrow layers, so that a small base has several of them."""
LLAMAS = (
    (3 * 10**9, (4096, 4096, 1024, 14336), 32000),
    (NARROW, (2048, 2048, 512, 8192), 16000),
    (0, (256, 256, 128, 896), 1024),
)
"""Widths and vocabulary of `llama` from a size on, in layers of 0.4 and 0.1 GB, the tables an eighth at 4GB and 1GB."""


@dataclass(frozen=True)
class Model:
    """A base, and what an adapter changes of it: `linears` (module to (out, in)) and `embeddings` (module to (rows,
    width)). `tensors` are in the order of the files."""

    tensors: Mapping[str, Shape]
    linears: Mapping[str, Shape]
    config: Mapping[str, object]
    embeddings: Mapping[str, Shape] = field(default_factory=dict)

    def nbytes(self, width: int = ELEMENT) -> int:
        """Bytes of all tensors whose elements have `width` bytes."""
        return sum(width * math.prod(shape) for shape in self.tensors.values())

    def factors(self, rank: int) -> dict[str, Shape]:
        """The tensors of a LoRA adapter, named as PEFT saves them."""
        found: dict[str, Shape] = {}
        for module, (rows, cols) in self.linears.items():
            prefix = f"base_model.model.{module}"
            found |= {f"{prefix}.lora_A.weight": (rank, cols), f"{prefix}.lora_B.weight": (rows, rank)}
        for module, (rows, width) in self.embeddings.items():
            prefix = f"base_model.model.{module}"
            found |= {f"{prefix}.lora_embedding_A": (rank, rows), f"{prefix}.lora_embedding_B": (width, rank)}
        return found

    def targets(self) -> list[str]:
        """`target_modules` of the adapter's config."""
        return sorted({module.rpartition(".")[2] for module in (*self.linears, *self.embeddings)})


def weights(modules: Mapping[str, Shape]) -> dict[str, Shape]:
    """The weight of every module."""
    return {f"{module}.weight": shape for module, shape in modules.items()}


def attention(prefix: str, hidden: int, width: int, kv: int) -> dict[str, Shape]:
    """The linear modules of an attention whose queries are `width` and whose keys and values are `kv` wide."""
    found = {"q": (width, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, width)}
    return {f"{prefix}.self_attn.{name}_proj": shape for name, shape in found.items()}


def gated(prefix: str, hidden: int, inner: int) -> dict[str, Shape]:
    """The linear modules of a gated MLP."""
    found = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    return {f"{prefix}.{name}_proj": shape for name, shape in found.items()}


def norms(prefix: str, hidden: int) -> dict[str, Shape]:
    """The two norms of a layer."""
    return {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}


def config(kind: tuple[str, str], hidden: int, vocabulary: int, **rest: object) -> dict[str, object]:
    """A config.json; `kind` is class and model type."""
    return {
        "architectures": [kind[0]],
        "model_type": kind[1],
        "hidden_size": hidden,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | rest


def heads(width: int, kv: int) -> dict[str, object]:
    """What a config says of an attention."""
    size = min(128, kv)
    return {"head_dim": size, "num_attention_heads": width // size, "num_key_value_heads": kv // size}


def llama(widths: tuple[int, int, int, int], vocabulary: int, layers: int, *, tables: bool = False) -> Model:
    """A Llama; `widths` are those of the model, of q, of k and v, and of the MLP. `tables` are adapted if asked for."""
    hidden, width, kv, inner = widths
    table = {"lm_head": (vocabulary, hidden)}
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    linears: dict[str, Shape] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        modules = attention(prefix, hidden, width, kv) | gated(f"{prefix}.mlp", hidden, inner)
        tensors |= weights(modules) | norms(prefix, hidden)
        linears |= modules
    tensors |= {"model.norm.weight": (hidden,)} | weights(table)
    shape = heads(width, kv) | {"intermediate_size": inner, "num_hidden_layers": layers}
    about = config(("LlamaForCausalLM", "llama"), hidden, vocabulary, **shape)
    embeddings = {"model.embed_tokens": (vocabulary, hidden)} if tables else {}
    return Model(tensors, linears | (table if tables else {}), about, embeddings)


def moe(widths: tuple[int, int, int, int], experts: int, vocabulary: int, layers: int) -> Model:
    """A mixture of experts as Qwen3 stores it; `widths` as for `llama`, the last one an expert's."""
    hidden, width, kv, inner = widths
    tensors: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    linears: dict[str, Shape] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        modules = attention(prefix, hidden, width, kv)
        for expert in range(experts):
            modules |= gated(f"{prefix}.mlp.experts.{expert}", hidden, inner)
        tensors |= weights(modules) | norms(prefix, hidden) | {f"{prefix}.mlp.gate.weight": (experts, hidden)}
        tensors |= {f"{prefix}.self_attn.{name}_norm.weight": (min(128, kv),) for name in ("q", "k")}
        linears |= modules
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    shape = heads(width, kv) | {"moe_intermediate_size": inner, "num_hidden_layers": layers}
    shape |= {"num_experts": experts, "num_experts_per_tok": min(8, experts), "decoder_sparse_step": 1}
    return Model(tensors, linears, config(("Qwen3MoeForCausalLM", "qwen3_moe"), hidden, vocabulary, **shape))


def one_tensor(hidden: int, vocabulary: int) -> Model:
    """The embedding of a Llama, without layers and without a head, which would be a second table or tied to this."""
    shape = heads(hidden, hidden) | {"intermediate_size": hidden, "num_hidden_layers": 0}
    return Model(
        {"embed_tokens.weight": (vocabulary, hidden), "norm.weight": (hidden,)},
        {},
        config(("LlamaModel", "llama"), hidden, vocabulary, **shape),
        {"embed_tokens": (vocabulary, hidden)},
    )


def layers_of(size: int, none: Model, one: Model) -> int:
    """How many layers make a base of about `size` bytes, by one of no layers and one of a single layer."""
    return max(1, round((size - none.nbytes()) / (one.nbytes() - none.nbytes())))


def llama_of(size: int) -> Model:
    """`llama` of about `size` bytes."""
    widths, vocabulary = next((widths, vocabulary) for least, widths, vocabulary in LLAMAS if size >= least)
    return llama(widths, vocabulary, layers_of(size, llama(widths, vocabulary, 0), llama(widths, vocabulary, 1)))


def moe_of(size: int) -> Model:
    """`moe` of about `size` bytes."""
    widths, experts, vocabulary = (1024, 2048, 256, 384), 128, 32000
    if size < NARROW:
        widths, experts, vocabulary = (128, 256, 32, 48), 16, 1024
    layers = layers_of(size, moe(widths, experts, vocabulary, 0), moe(widths, experts, vocabulary, 1))
    return moe(widths, experts, vocabulary, layers)


def model_of(kind: str, size: int) -> Model:
    """The base of one kind that takes about `size` bytes; `sparse-70b` has a size of its own."""
    if kind == "sparse-70b":
        return llama((8192, 8192, 1024, 28672), 128256, 80)
    if kind == "big-tensors":
        return llama((8192, 256, 128, 512), max(64, 65536 * size // (2 * 10**9)), 2, tables=True)
    if kind == "one-tensor":
        return one_tensor(8192, max(64, size // (ELEMENT * 8192)))
    return moe_of(size) if kind == "moe" else llama_of(size)


KINDS = ("llama", "moe", "one-tensor", "big-tensors", "sparse-70b")
