"""Configs and old spellings that show rules which no class with the config of meta_configs.py shows.

CONFIGS are (class, fields of its config): what is built only where a config asks for it. SWAPPED are of the same form:
models inside which stands another one than by default. OLD_SPELLINGS are (class, fields, names): what published
checkpoints have and saving no longer writes, or what only a quantised checkpoint has. Sizes need not be those of a
published checkpoint.
"""

from __future__ import annotations

from typing import Any

_STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"], "reshape_hidden_states": False}
_SIGLIP = {"model_type": "siglip_vision_model"}
_SAPIENS2_HEAD = {
    "upsample_out_channels": [8, 8, 8, 8],
    "upsample_kernel_sizes": [4, 4, 4, 4],
    "conv_out_channels": [8, 8, 8],
    "conv_kernel_sizes": [1, 1, 1],
    "scale_conv_out_channels": [8, 8, 8],
    "scale_conv_kernel_sizes": [1, 1, 1],
    "scale_final_input_size": 8,
    "scale_final_hidden_sizes": [8, 8],
}
_NGRAMS = {
    "num_hidden_layers": 4,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "ple_layer_ids": [1],
    "ngram_vocab_size_base": 64,
    "split_ngram_parts": 2,
    "eos_token_id": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "output_gate_type": "silu",
}


def _text(model_type: str, **more: Any) -> dict[str, Any]:
    """A small language model; of the names for the number of experts, a model type reads its own."""
    experts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    return {"model_type": model_type, "num_hidden_layers": 2, **experts, **more}


CONFIGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("BeitModel", {"use_shared_relative_position_bias": True}),
    ("Dinov2Model", {"use_swiglu_ffn": True}),
    ("Tipsv2VisionModel", {"use_swiglu_ffn": True}),
    ("Sapiens2ForSemanticSegmentation", {"head_config": _SAPIENS2_HEAD}),
    ("Sapiens2ForNormalEstimation", {"head_config": {**_SAPIENS2_HEAD, "use_pixel_shuffle": True}}),
    ("Sapiens2ForPointmapEstimation", {"head_config": _SAPIENS2_HEAD}),
    (
        "InklingForConditionalGeneration",
        {"text_config": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]}},
    ),
    (
        "MiniMaxM3SparseForConditionalGeneration",
        {"text_config": {"num_hidden_layers": 2, "layer_types": ["full_attention", "minimax_m3_sparse"]}},
    ),
    ("Qwen4ExpForCausalLM", _NGRAMS),
)

SWAPPED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("LlavaForConditionalGeneration", {"text_config": _text("mixtral"), "vision_config": _SIGLIP}),
    ("LlavaNextForConditionalGeneration", {"text_config": _text("qwen2_moe")}),
    ("LlavaOnevisionForConditionalGeneration", {"text_config": _text("granitemoe")}),
    ("Mistral3ForConditionalGeneration", {"text_config": _text("deepseek_v3", first_k_dense_replace=1)}),
    ("VipLlavaForConditionalGeneration", {"text_config": _text("jamba", num_hidden_layers=8)}),
    ("Blip2ForConditionalGeneration", {"text_config": _text("mixtral")}),
    ("Qwen2AudioForConditionalGeneration", {"text_config": _text("qwen3_moe")}),
    ("DepthAnythingForDepthEstimation", {"backbone_config": {"model_type": "swin", **_STAGES}}),
    ("DepthAnythingForDepthEstimation", {"backbone_config": {"model_type": "dinov2_with_registers", **_STAGES}}),
)

OLD_SPELLINGS: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
    ("Qwen3VLForConditionalGeneration", {}, ("language_model.model.model.layers.0.self_attn.q_proj.weight",)),
    ("Qwen2VLModel", {}, ("model.layers.0.self_attn.q_proj.weight",)),
    ("Qwen2_5_VLModel", {}, ("model.layers.0.self_attn.q_proj.weight",)),
    (
        "EsmModel",
        {"vocab_size": 33, "pad_token_id": 1, "position_embedding_type": "rotary"},
        ("encoder.layer.0.attention.self.rotary_embeddings.inv_freq",),
    ),
    (
        "HunYuanVLForConditionalGeneration",
        {"text_config": {"model_type": "hunyuan_vl_text", "head_dim": 128}},
        ("model.vit.layers.0.self_attn.q_proj.weight",),
    ),
    (
        "Nemotron3_5TranscribeForConditionalGeneration",
        {},
        ("llm.model.layers.1.mixer.experts.gate_and_up_projs", "llm.model.layers.1.mixer.experts.down_projs"),
    ),
    ("PI0ForConditionalGeneration", {}, ("paligemma_with_expert.paligemma.lm_head.weight",)),
    (
        "Inkling2ForCausalLM",
        {},
        (
            "model.llm.layers.1.mlp.experts.w13_weight_scale",
            "model.llm.layers.1.mlp.experts.w2_weight_scale",
        ),
    ),
    ("Step3p7ForConditionalGeneration", {}, ("model.layers.4.moe.down_proj.weight_scale_inv",)),
)
