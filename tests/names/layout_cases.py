"""Where each row of layouts.json must cut: one case for every fused module of every model type.

Those of models that transformers has run its modules (`model_splits`). For the others the split is written here as
their published code does it, and the source is named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import silu

from streammerge.names.layouts import DATA
from tests.names import model_splits as own

ROWS: list[dict[str, Any]] = json.loads(DATA.read_bytes())["rows"]
HEADS = {"hidden_size": 32, "num_attention_heads": 4}
GROUPED = {**HEADS, "num_key_value_heads": 2}
NAMED_N = {"n_embd": 32, "n_head": 4}
LINEAR = {
    "hidden_size": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 8,
}

Split = Callable[[], tuple[dict[str, Any], int, dict[str, list[int]]]]


# --- transformers' own modules ----------------------------------------------------------------------------------------
def heads(fields: dict[str, Any], split: Callable[[Any, torch.Tensor], Any], cls: str, model_type: str) -> Any:
    """The parts a method of an attention class makes."""
    config = own.config_of(model_type, **fields)
    module = own.built(model_type, cls, config)
    total = module.query_key_value.out_features
    parts = split(module, own.numbers(total))
    return config.to_dict(), total, dict(zip("qkv", map(own.rows, parts), strict=True))


def delta_net(method: str) -> Any:
    """qwen3_next's own reordering of both fused projections of a linear attention."""
    config = own.config_of("qwen3_next", **LINEAR)
    module = own.built("qwen3_next", "Qwen3NextGatedDeltaNet", config)
    totals = module.in_proj_qkvz.out_features, module.in_proj_ba.out_features
    parts = module.fix_query_key_value_ordering(*map(own.numbers, totals))
    found = dict(zip("qkvzba", map(own.rows, parts), strict=True))
    return config.to_dict(), totals[method == "ba"], {letter: found[letter] for letter in method}


def convolved(model_type: str, cls: str) -> Any:
    """The linear attention of qwen3_5, its convolution left out."""
    module = own.modeling(model_type)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "causal_conv1d_fn", lambda hidden, *_, **__: hidden)
        return own.attention(model_type, cls, "in_proj_qkv", LINEAR, split="qkv")


def gated(model_type: str, cls: str, fused: str, down: str) -> Any:
    """An MLP of transformers."""
    return {"model_type": model_type}, *own.mlp(getattr(own.modeling(model_type), cls)(own.Fields()), fused, down)


def zamba() -> Any:
    """Zamba2's MLP, one for several layers, each with an adapter of its own."""
    return {}, *own.mlp(own.modeling("zamba2").Zamba2MLP(own.Fields(), 1, 0), "gate_up_proj", "down_proj", 0)


DELTA_NETS = (
    ("qwen3_5", "Qwen3_5GatedDeltaNet"),
    ("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet"),
    ("qwen4_exp", "Qwen4ExpTextGatedDeltaNet"),
)
FALCON = {**HEADS, "alibi": False}
MLPS = {
    ("phi3", "Phi3MLP"), ("phi4_multimodal", "Phi4MultimodalMLP"), ("glm", "GlmMLP"), ("glm4", "Glm4MLP"),
    ("glm4v_text", "Glm4vTextMLP"), ("glm_ocr_text", "GlmOcrTextMLP"), ("glm_image_text", "GlmImageTextMLP"),
    ("dia_encoder", "DiaMLP"), ("dia_decoder", "DiaMLP"),
}  # fmt: skip
SHARED = {
    ("granitemoeshared", "GraniteMoeSharedMLP"),
    ("granitemoehybrid", "GraniteMoeHybridMLP"),
    ("granitemoe_swa", "GraniteMoeSWAMLP"),
}
ATTENTION: list[tuple[str, str, str, dict[str, Any], dict[str, Any]]] = [
    ("phi3", "Phi3Attention", "self_attn.qkv_proj", GROUPED, {}),
    ("phi4_multimodal", "Phi4MultimodalAttention", "self_attn.qkv_proj", GROUPED, {}),
    ("minimax", "MiniMaxLightningAttention", "self_attn.qkv_proj", {**GROUPED, "head_dim": 16},
     {"split": "qkv", "act_fn": nn.Identity()}),
    ("mpt", "MptAttention", "attn.Wqkv", {"d_model": 32, "n_heads": 4}, {"split": "qkv"}),
    ("dbrx", "DbrxAttention", "attn.Wqkv",
     {"d_model": 32, "n_heads": 4, "attn_config": {"kv_n_heads": 2, "clip_qkv": 1e9, "rope_theta": 1e4}}, {}),
    ("modernbert", "ModernBertAttention", "attn.Wqkv", HEADS, {}),
    ("gpt2", "GPT2Attention", "attn.c_attn", NAMED_N, {}),
    ("decision_transformer", "DecisionTransformerGPT2Attention", "attn.c_attn",
     {"hidden_size": 32, "n_head": 4, "bos_token_id": None, "eos_token_id": None}, {}),
    ("imagegpt", "ImageGPTAttention", "attn.c_attn", NAMED_N, {"method": "_attn"}),
    ("openai-gpt", "Attention", "attn.c_attn", NAMED_N, {"method": "_attn"}),
    ("gpt_bigcode", "GPTBigCodeAttention", "attn.c_attn", {**NAMED_N, "multi_query": True}, {}),
    ("gpt_bigcode", "GPTBigCodeAttention", "attn.c_attn", {**NAMED_N, "multi_query": False}, {}),
    ("codegen", "CodeGenAttention", "attn.qkv_proj", {"n_embd": 64, "n_head": 8, "rotary_dim": 4},
     {"method": "_attn"}),
    ("gpt_neox", "GPTNeoXAttention", "attention.query_key_value", HEADS, {"dim": 2}),
    ("gpt_neox_japanese", "GPTNeoXJapaneseAttention", "attention.query_key_value", HEADS, {"method": "_attn"}),
    ("persimmon", "PersimmonAttention", "self_attn.query_key_value", {**HEADS, "qk_layernorm": False}, {"dim": 4}),
    ("jetmoe", "JetMoeAttention", "self_attention.kv_proj",
     {"hidden_size": 32, "num_key_value_heads": 2, "kv_channels": 8}, {"split": "kv"}),
]  # fmt: skip


# --- published code of models that transformers does not have ---------------------------------------------------------
def as_parts(config: dict[str, Any], total: int, split: Callable[[torch.Tensor], Any]) -> Any:
    """What a split makes of the row numbers."""
    return config, total, dict(zip("qkv", map(own.rows, split(own.numbers(total))), strict=True))


def baichuan(numbers: torch.Tensor) -> Any:
    """baichuan-inc/Baichuan2-7B-Base, modeling_baichuan.py, Attention.forward."""
    return numbers.unflatten(-1, (3, 32)).unsqueeze(0).transpose(0, -2).squeeze(-2)


def internlm2(numbers: torch.Tensor) -> Any:
    """internlm/internlm2-7b, modeling_internlm2.py, InternLM2Attention.forward: `b q (h gs d) -> b q h gs d`."""
    grouped = numbers.unflatten(-1, (2, 2 + 2, 8))
    return grouped[..., :2, :].flatten(2, 3), grouped[..., -2, :], grouped[..., -1, :]


def chatglm_6b(numbers: torch.Tensor) -> Any:
    """THUDM/chatglm-6b, modeling_chatglm.py, SelfAttention.forward."""
    return numbers.view(1, 1, 4, 24).split(8, dim=-1)


def megatron(numbers: torch.Tensor) -> Any:
    """NVIDIA NeMo and megatron-bridge, export of `linear_qkv`: (heads + 2 * groups, head size, hidden)."""
    per_head, each = numbers.view(8, 8), 4
    query = torch.cat([torch.arange(each * group, each * group + 2) for group in range(2)])
    return per_head[query], per_head[torch.arange(2, 8, each)], per_head[torch.arange(3, 8, each)]


def chunks(config: dict[str, Any]) -> Any:
    """`silu(x[0]) * x[1]` of two chunks: Megatron-core's gated linear unit, THUDM/glm-4-9b's MLP.swiglu, and
    microsoft/Phi-3-vision-128k-instruct's and Phi-4-multimodal-instruct's MLP."""
    return config, 6, own.gate_and_up(lambda numbers: silu(numbers[:3]) * numbers[3:], 6)


CHATGLM = {**HEADS, "kv_channels": 8, "multi_query_attention": True, "multi_query_group_num": 2}
RESTATED: dict[tuple[str, str], list[Split]] = {
    **{
        (name, "self_attn.qkv_proj"): [lambda: as_parts(GROUPED, 64, lambda x: x.split((32, 16, 16), dim=-1))]
        for name in ("phi3_v", "phi4mm")
    },  # microsoft/Phi-3-vision-128k-instruct, modeling_phi3_v.py; microsoft/Phi-4-multimodal-instruct
    ("phi3_v", "mlp.gate_up_proj"): [partial(chunks, {})],
    ("phi4mm", "mlp.gate_up_proj"): [partial(chunks, {})],
    ("baichuan", "self_attn.W_pack"): [partial(as_parts, HEADS, 96, baichuan)],
    ("internlm2", "attention.wqkv"): [partial(as_parts, GROUPED, 64, internlm2)],
    # Qwen/Qwen-7B, modeling_qwen.py, QWenAttention.forward: split_size is kv_channels * num_attention_heads
    ("qwen", "transformer.h.{i}.attn.c_attn"): [
        lambda: as_parts({**HEADS, "kv_channels": 16}, 192, lambda x: x.split(64, dim=2))
    ],
    # THUDM/chatglm2-6b and glm-4-9b, modeling_chatglm.py, SelfAttention.forward
    ("chatglm", "transformer.encoder.layers.{i}.self_attention.query_key_value"): [
        lambda: as_parts(CHATGLM, 64, lambda x: x.split((32, 16, 16), dim=-1)),
        lambda: as_parts({**HEADS, "kv_channels": 8}, 96, lambda x: x.split(32, dim=-1)),
    ],
    ("chatglm", "transformer.encoder.layers.{i}.mlp.dense_h_to_4h"): [partial(chunks, CHATGLM)],
    ("chatglm", "attention.query_key_value"): [partial(as_parts, HEADS, 96, chatglm_6b)],
    ("*", "decoder.layers.{i}.self_attention.linear_qkv"): [partial(as_parts, GROUPED, 64, megatron)],
    ("*", "decoder.layers.{i}.mlp.linear_fc1"): [partial(chunks, {"intermediate_size": 3})],
}
RENAMED = {
    # names as in LLaMA-Factory's llamafied InternLM2; gate and up: InternLM2MLP, `w2(act_fn(w1(x)) * w3(x))`
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "model.tok_embeddings": "model.embed_tokens", "output": "lm_head",
    # Qwen/Qwen-7B, QWenMLP: `c_proj(w1(x) * silu(w2(x)))`
    "transformer.h.{i}.attn.c_proj": "model.layers.{i}.self_attn.o_proj",
    "transformer.h.{i}.mlp.w2": "model.layers.{i}.mlp.gate_proj",
    "transformer.h.{i}.mlp.w1": "model.layers.{i}.mlp.up_proj",
    "transformer.h.{i}.mlp.c_proj": "model.layers.{i}.mlp.down_proj", "transformer.wte": "model.embed_tokens",
    # transformers' script that converts glm-4-9b
    "transformer.encoder.layers.{i}.self_attention.dense": "model.layers.{i}.self_attn.o_proj",
    "transformer.encoder.layers.{i}.mlp.dense_h_to_4h": "model.layers.{i}.mlp.gate_up_proj",
    "transformer.encoder.layers.{i}.mlp.dense_4h_to_h": "model.layers.{i}.mlp.down_proj",
    "transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.output_layer": "lm_head",
    # NeMo's export to Llama
    "decoder.layers.{i}.self_attention.linear_proj": "model.layers.{i}.self_attn.o_proj",
    "decoder.layers.{i}.mlp.linear_fc2": "model.layers.{i}.mlp.down_proj",
}  # fmt: skip
"""What else of a layer goes by two names, by its name in the fused layout."""


def splits() -> Iterator[tuple[tuple[str, str], Split]]:
    """Every case by model type and fused module."""
    for model_type, cls, fused, fields, how in ATTENTION:
        leaf = fused.rpartition(".")[2]
        yield (model_type, fused), partial(own.attention, model_type, cls, leaf, fields, **how)
    for fields in (
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        {**FALCON, "new_decoder_architecture": False, "multi_query": True},
        {**FALCON, "new_decoder_architecture": False, "multi_query": False},
    ):
        made = partial(heads, fields, lambda module, x: module._split_heads(x), "FalconAttention", "falcon")
        yield ("falcon", "self_attention.query_key_value"), made
    made = partial(heads, NAMED_N | HEADS, lambda module, x: module._reshape(x), "BloomAttention", "bloom")
    yield ("bloom", "self_attention.query_key_value"), made
    for letters in ("qkvz", "ba"):
        yield ("qwen3_next", f"linear_attn.in_proj_{letters}"), partial(delta_net, letters)
    for model_type, cls in DELTA_NETS:
        made = partial(convolved, f"{model_type}_text", cls)
        yield (f"{model_type}_text", "linear_attn.in_proj_qkv"), made
    for model_type, cls in MLPS:
        yield (model_type, "mlp.gate_up_proj"), partial(gated, model_type, cls, "gate_up_proj", "down_proj")
    for model_type, cls in SHARED:
        made = partial(gated, model_type, cls, "input_linear", "output_linear")
        yield (model_type, "shared_mlp.input_linear"), made
    for model_type, cls in (("modernbert", "ModernBertMLP"), ("modernbert-decoder", "ModernBertDecoderMLP")):
        yield (model_type, "mlp.Wi"), partial(gated, model_type, cls, "Wi", "Wo")
    yield ("zamba2", "feed_forward.gate_up_proj"), zamba
    for row in ROWS:
        if row["fused"] == "attn.qkv":
            yield from (((name, "attn.qkv"), partial(own.vision, name)) for name in row["types"])
    for key, cases in RESTATED.items():
        yield from ((key, case) for case in cases)
