"""Tiny checkpoints and adapters, made by transformers and PEFT themselves, for tests that compare with them.

Every parameter of a model is random, biases and norms too, so that no mix-up of tensors or directions goes unseen.
The invariant: no adapter leaves here with a B of zeros, as PEFT initialises it, unless the caller asks for that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 32,
}  # fmt: skip
DECODER = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False}
EXPERTS = {**DECODER, "head_dim": 8, "num_local_experts": 3}
GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 64,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION = {key: value for key, value in SMALL.items() if not key.startswith(("vocab", "max"))}
SHARD = "12KB"
"""Of a sharded base: three shards and more."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One tiny model: its config's class, what the config is given, and the auto class that builds and loads it."""

    config: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"


class Convolutions(nn.Module):
    """One convolution of each dimension, and the 1x1x1 kernel that PEFT's merge of a Conv3d trips over."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Conv1d(4, 8, 3)
        self.image = nn.Conv2d(8, 6, (3, 2))
        self.volume = nn.Conv3d(6, 8, 2)
        self.point = nn.Conv3d(8, 4, 1)

    def forward(self) -> torch.Tensor:
        """The output for one fixed input."""
        x = torch.linspace(-1, 1, 4 * 18, dtype=self.flat.weight.dtype).view(1, 4, 18)
        x = self.image(self.flat(x).view(1, 8, 4, 4))
        return self.point(self.volume(x.unsqueeze(2).repeat(1, 1, 2, 2, 1)))


class Attention(nn.Module):
    """torch's own attention, whose in_proj is a parameter and no module."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 16)

    def forward(self) -> torch.Tensor:
        """The output for one fixed input."""
        x = torch.linspace(-1, 1, 5 * 16, dtype=self.head.weight.dtype).view(1, 5, 16).sin()
        return self.head(self.attn(x, x, x)[0])


class Layers(nn.Module):
    """Layers of torch in the shapes that methods differ on: a table, wide, narrow and square matrices with and without
    a bias, a norm, square kernels, one of them of a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.wide = nn.Linear(16, 24)
        self.narrow = nn.Linear(24, 16)
        self.square = nn.Linear(16, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.line = nn.Conv1d(4, 8, 3, padding=1)
        self.kernel = nn.Conv2d(8, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 8, 3, padding=1, groups=2)

    def forward(self) -> torch.Tensor:
        """The output for one fixed input."""
        x = self.norm(self.square(self.narrow(self.wide(self.table(torch.arange(30)[:16])))))
        x = self.line(x.reshape(4, 4, 16)).reshape(4, 8, 4, 4)
        return self.grouped(self.kernel(x))


MODULES: Mapping[str, Callable[[], nn.Module]] = {
    "convolutions": Convolutions,
    "attention": Attention,
    "layers": Layers,
}
KINDS: Mapping[str, Kind] = {
    "llama": Kind("LlamaConfig", {**DECODER, "attention_bias": True}),
    "llama-tied": Kind("LlamaConfig", {**DECODER, "tie_word_embeddings": True}),
    "llama-headless": Kind("LlamaConfig", DECODER, "AutoModel"),
    # Several tiles of 2**17 elements in the table, and more than one in each of the MLP's matrices.
    "llama-wide": Kind(
        "LlamaConfig",
        {**DECODER, "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 5000, "intermediate_size": 2500},
    ),
    "qwen3": Kind(
        "Qwen3Config",
        {**DECODER, "head_dim": 8, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    ),
    "gpt2": Kind("GPT2Config", {**GPT2, "tie_word_embeddings": False}),
    "gpt2-tied": Kind("GPT2Config", {**GPT2, "tie_word_embeddings": True}),
    "bert": Kind("BertConfig", SMALL, "AutoModelForMaskedLM"),
    "t5": Kind(
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64},
        "AutoModelForSeq2SeqLM",
    ),
    "gpt-oss": Kind("GptOssConfig", {**EXPERTS, "num_experts_per_tok": 2, "sliding_window": 8}),
    "gpt-oss-square": Kind("GptOssConfig", {**EXPERTS, "intermediate_size": 32, "num_experts_per_tok": 2}),
    "llama4": Kind("Llama4TextConfig", {**EXPERTS, "intermediate_size_mlp": 48, "num_experts_per_tok": 1}),
    "llama4-square": Kind(
        "Llama4TextConfig",
        {**EXPERTS, "intermediate_size": 32, "intermediate_size_mlp": 32, "num_experts_per_tok": 1},
    ),
    "qwen3-moe": Kind(
        "Qwen3MoeConfig",
        {**DECODER, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "llava": Kind(
        "LlavaConfig",
        {
            "text_config": {**DECODER, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
            "image_token_id": 63,
        },
        "AutoModelForImageTextToText",
    ),
}  # fmt: skip


def build(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model of one of the KINDS or MODULES with random parameters, the same ones for every call and dtype."""
    torch.manual_seed(0)
    if kind in MODULES:
        model = MODULES[kind]()
    else:
        config = getattr(transformers, KINDS[kind].config)(**KINDS[kind].arguments)
        model = getattr(transformers, KINDS[kind].auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    if not isinstance(model, transformers.PreTrainedModel):
        return model.to(dtype)
    model.config.dtype = dtype
    return model.to(dtype).eval()


def write_base(model: nn.Module, root: Path, layout: str) -> Path:
    """Save a model as a checkpoint and return what to give as BASE. Layouts: `single`, `sharded`, and the same as
    torch pickles, `bin` and `bin-sharded`, which hold every name of a tied tensor."""
    if not isinstance(model, transformers.PreTrainedModel):
        return _write_plain(model, root, layout)
    if not layout.startswith("bin"):
        model.save_pretrained(root, max_shard_size=SHARD if layout == "sharded" else "1GB")
        return root
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(root)
    _write_bin(model.state_dict(), root, shards=2 if layout == "bin-sharded" else 1)
    return root


def _write_plain(model: nn.Module, root: Path, layout: str) -> Path:
    root.mkdir(parents=True)
    state = dict(model.state_dict())
    if layout == "single":
        save_file(state, root / "net.safetensors", {"format": "pt"})
        return root / "net.safetensors"
    names = list(state)
    parts = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save_file({name: state[name] for name in part}, root / file, {"format": "pt"})
    write_index(root, "model.safetensors", dict(zip(files, parts, strict=True)), state)
    return root


def _write_bin(state: Mapping[str, torch.Tensor], root: Path, shards: int) -> None:
    if shards == 1:
        torch.save(dict(state), root / "pytorch_model.bin")
        return
    names = list(state)
    parts = {f"pytorch_model-{n + 1:05}-of-{shards:05}.bin": names[n::shards] for n in range(shards)}
    for file, part in parts.items():
        torch.save({name: state[name].clone() for name in part}, root / file)
    write_index(root, "pytorch_model.bin", parts, state)


def write_index(root: Path, stem: str, parts: Mapping[str, list[str]], state: Mapping[str, torch.Tensor]) -> None:
    """The index of a sharded checkpoint, from the names in each file."""
    import json

    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    weight_map = {name: file for file, names in parts.items() for name in names}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (root / f"{stem}.index.json").write_text(text)


def load(kind: str, path: Path, dtype: torch.dtype) -> nn.Module:
    """The model of a checkpoint, by transformers' own loader, in `dtype`."""
    if kind in MODULES:
        model = MODULES[kind]()
        model.load_state_dict(load_tensors(path))
        return model.to(dtype)
    return load_as(KINDS[kind].auto)(path, dtype)


def load_as(auto: str, **arguments: Any) -> Callable[[Path, torch.dtype], nn.Module]:
    """A loader through another class of transformers than the kind's own."""

    def loader(path: Path, dtype: torch.dtype) -> nn.Module:
        torch.manual_seed(1)  # a head that is not in the checkpoint is initialised
        return getattr(transformers, auto).from_pretrained(path, dtype=dtype, **arguments).eval()

    return loader


def load_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory or file, by name; from pickles too."""
    if path.is_file():
        return load_file(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    for file in sorted(path.glob("pytorch_model*.bin")):
        tensors |= torch.load(file, weights_only=True)
    return tensors


def make_adapter(
    model: nn.Module, config: str = "LoraConfig", *, seed: int = 7, zero_b: bool = False, **arguments: Any
) -> PeftModel:
    """An adapter on `model` with random factors whose deltas are about as large as the weights. `arguments` are those
    of PEFT's class `config`; the B of a LoRA is zero, as PEFT leaves it, only if `zero_b`."""
    usual = {"r": 4, "lora_alpha": 6} if config == "LoraConfig" else {}
    torch.manual_seed(seed)
    adapted = get_peft_model(model, getattr(peft, config)(**{**usual, **arguments}))
    randomise(adapted, seed, zero_b=zero_b)
    return adapted


def randomise(model: PeftModel, seed: int, *, zero_b: bool = False) -> None:
    """Random values for everything that the adapter trains; a DoRA magnitude stays positive and of its size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad or (zero_b and "lora_B" in name):
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            value = parameter * (1 + 0.2 * noise.tanh()) if "magnitude" in name else 0.2 * noise
            parameter.copy_(value)
            if "lora_B" in name or "lora_embedding_B" in name:
                assert zero_b or bool(parameter.any()), f"{name} is zero: the adapter would change nothing"
