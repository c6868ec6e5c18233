"""The tiny models of scripts/make_era_fixtures.py: architectures whose module names changed between releases.

A model is a config class, its arguments and the class that builds it, so that one entry serves every transformers
release that has the class. The invariant: no two dimensions of a model that a name mix-up could swap are equal, unless
the case is about squares.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EARLY, LATE, NOW = "4.51-0.15.2", "4.57-0.17.1", "5.23-0.21.2"
ALL = (EARLY, LATE, NOW)
# PEFT 0.21 takes every `up_proj` for the experts' and leaves the dense layers of these models without an adapter.
DENSE_TOO = (EARLY, LATE, "5.23-0.18.1", NOW)
STACKED = ("5.23-0.18.1", "5.23-0.19.0", "5.23-0.19.1", NOW)
"""Eras between which the shapes of LoRA on stacked experts changed."""
STACKED_ALWAYS = (LATE, "4.57-0.19.1", *STACKED)
"""Eras of models whose experts are stacked in transformers 4 already."""
ERAS = (EARLY, *STACKED_ALWAYS)

DECODER = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 16, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
VISION = {
    "hidden_size": 8, "intermediate_size": 10, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
LLAMA = {**DECODER, "model_type": "llama"}
MIXTRAL = {**DECODER, **LOCAL_EXPERTS, "model_type": "mixtral"}
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 8}
SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
GEMMA = {**DECODER, "head_dim": 4, "tie_word_embeddings": True}


@dataclass(frozen=True, slots=True)
class Model:
    """One case. `config` and `head` are classes of transformers, `lora` arguments of LoraConfig.

    `linear`: endings of the linear layers to adapt; none: all but a tied head. Under transformers 5, stacked experts
    and routers are adapted as parameters, or given to PEFT by `old_names` of layers, which it translates itself.
    `parameters`: endings of the parameters to adapt, in every era; then no layer is.
    """

    config: str
    head: str
    arguments: Mapping[str, Any]
    eras: tuple[str, ...] = ALL
    linear: tuple[str, ...] = ()
    old_names: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    lora: Mapping[str, Any] = field(default_factory=dict)


DENSE = ("gate_proj", "up_proj", "down_proj")
BOTH = ("experts.gate_up_proj", "experts.down_proj")
GPT_OSS = {**DECODER, **LOCAL_EXPERTS, "intermediate_size": 8, "head_dim": 4, "sliding_window": 8}
LLAMA4 = {
    **DECODER, "num_local_experts": 3, "num_experts_per_tok": 1, "intermediate_size_mlp": 12, "head_dim": 4,
    "use_qk_norm": False,
}  # fmt: skip
ARIA = {**DECODER, "moe_num_experts": 3, "moe_topk": 2, "moe_num_shared_experts": 1}
DEEPSEEK = {
    **DECODER, "num_key_value_heads": 2, "intermediate_size": 20, "moe_intermediate_size": 12,
    "n_shared_experts": 1, "n_routed_experts": 4, "kv_lora_rank": 6, "q_lora_rank": 5,
    "qk_rope_head_dim": 2, "qk_nope_head_dim": 4, "v_head_dim": 3, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
# dt_proj is left out: transformers 5.23 multiplies with its weight, past the adapter.
JAMBA = {
    **DECODER, **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "mamba_d_state": 3, "mamba_d_conv": 2, "mamba_expand": 2, "mamba_dt_rank": 3,
    "use_mamba_kernels": False,
}  # fmt: skip
ERNIE = {
    **DECODER, "intermediate_size": 20, "moe_intermediate_size": 12, "moe_num_experts": 3,
    "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1,
}  # fmt: skip
QWEN3_VL = {
    "text_config": {**DECODER, **EXPERTS, "head_dim": 4, "moe_intermediate_size": 12, "rope_theta": 10000.0,
                    "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0], "mrope_interleaved": True}},
    "vision_config": {"depth": 1, "hidden_size": 8, "intermediate_size": 10, "num_heads": 2, "patch_size": 2,
                      "out_hidden_size": 8, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
    "vision_start_token_id": 28, "vision_end_token_id": 29, "image_token_id": 30, "video_token_id": 31,
}  # fmt: skip
QWEN2_VL = {
    **DECODER, "vision_config": {"depth": 1, "embed_dim": 8, "hidden_size": 8, "num_heads": 2, "mlp_ratio": 2,
                                 "patch_size": 2, "in_channels": 3, "spatial_merge_size": 2},
    "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]},
    "vision_start_token_id": 28, "vision_end_token_id": 29, "image_token_id": 30, "video_token_id": 31,
}  # fmt: skip
MLLAMA = {
    "text_config": {**DECODER, "cross_attention_layers": [1], "rope_scaling": {"rope_type": "default"},
                    "rope_theta": 10000.0},
    "vision_config": {"hidden_size": 8, "attention_heads": 2, "intermediate_size": 10, "num_hidden_layers": 1,
                      "num_global_layers": 1, "image_size": 8, "patch_size": 4, "vision_output_dim": 16,
                      "max_num_tiles": 1, "supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]},
    "image_token_index": 31,
}  # fmt: skip


def _llava(text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a LLaVA config. The vision features are the last layer's: the tower has only one."""
    return {
        "text_config": dict(text), "vision_config": dict(vision), "image_token_index": 31, "vision_feature_layer": -1,
        "tie_word_embeddings": False,
    }  # fmt: skip


def _square(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with experts as wide as the hidden state."""
    return {**arguments, "intermediate_size": 8}


# Patterns hold for the names of their own release: each era has one that matches nothing.
PATTERNED = {
    "alpha_pattern": {
        "language_model.model.layers.0.self_attn.q_proj": 7,
        "model.language_model.layers.1.self_attn.q_proj": 9,
        "fc2": 5,
    },
    "rank_pattern": {"mlp.up_proj": 3},
}
LLAVA, CAUSAL = ("LlavaConfig", "LlavaForConditionalGeneration"), ("MixtralConfig", "MixtralForCausalLM")
MODELS: Mapping[str, Model] = {
    "mixtral": Model(*CAUSAL, {**DECODER, **LOCAL_EXPERTS}, old_names=("w1", "w2", "w3", "gate")),
    "mixtral-w1-w2": Model(*CAUSAL, {**DECODER, **LOCAL_EXPERTS}, (EARLY, LATE), linear=("w1", "w2")),
    "qwen2-moe": Model(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**DECODER, **EXPERTS, "intermediate_size": 20, "moe_intermediate_size": 12,
         "shared_expert_intermediate_size": 16, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    ),
    "phimoe": Model("PhimoeConfig", "PhimoeForCausalLM", {**DECODER, **LOCAL_EXPERTS}),
    "jamba": Model("JambaConfig", "JambaForCausalLM", JAMBA, lora={"exclude_modules": ["dt_proj"]}),
    "qwen3-moe": Model(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**DECODER, **EXPERTS, "head_dim": 4, "intermediate_size": 20, "moe_intermediate_size": 12,
         "mlp_only_layers": [0]},
        DENSE_TOO,
    ),
    "deepseek-v3": Model("DeepseekV3Config", "DeepseekV3ForCausalLM", DEEPSEEK, DENSE_TOO),
    "ernie4-5-moe": Model("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", ERNIE, DENSE_TOO[1:]),
    "olmoe": Model("OlmoeConfig", "OlmoeForCausalLM", {**DECODER, **EXPERTS}, old_names=(*DENSE, "gate")),
    "llava": Model(*LLAVA, _llava(LLAMA, CLIP), lora=PATTERNED),
    "llava-mistral-siglip": Model(*LLAVA, _llava({**DECODER, "model_type": "mistral"}, SIGLIP)),
    "llava-mixtral": Model(*LLAVA, _llava(MIXTRAL, CLIP)),
    "paligemma": Model(
        "PaliGemmaConfig",
        "PaliGemmaForConditionalGeneration",
        {"text_config": {**GEMMA, "model_type": "gemma"}, "vision_config": SIGLIP, "projection_dim": 8,
         "image_token_index": 31},
    ),
    "gemma3": Model(
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {"text_config": {**GEMMA, "model_type": "gemma3_text"}, "vision_config": SIGLIP, "mm_tokens_per_image": 1,
         "image_token_index": 31, "boi_token_index": 29, "eoi_token_index": 30},
    ),
    "qwen2-vl": Model("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", QWEN2_VL),
    "mllama": Model("MllamaConfig", "MllamaForConditionalGeneration", MLLAMA),
    "stacked-mixtral": Model(*CAUSAL, {**DECODER, **LOCAL_EXPERTS}, STACKED, parameters=BOTH),
    "stacked-mixtral-square": Model(*CAUSAL, _square({**DECODER, **LOCAL_EXPERTS}), STACKED, parameters=BOTH),
    "stacked-mixtral-square-down": Model(
        *CAUSAL, _square({**DECODER, **LOCAL_EXPERTS}), STACKED, parameters=("experts.down_proj",)
    ),
    "stacked-gpt-oss": Model("GptOssConfig", "GptOssForCausalLM", GPT_OSS, STACKED_ALWAYS, parameters=BOTH),
    "stacked-gpt-oss-down": Model(
        "GptOssConfig", "GptOssForCausalLM", GPT_OSS, STACKED_ALWAYS, parameters=("experts.down_proj",)
    ),
    "stacked-llama4": Model("Llama4TextConfig", "Llama4ForCausalLM", LLAMA4, STACKED_ALWAYS, parameters=BOTH),
    "stacked-llama4-square": Model(
        "Llama4TextConfig", "Llama4ForCausalLM", _square(LLAMA4), STACKED_ALWAYS, parameters=BOTH
    ),
    # Its experts are turned round between file and model in transformers 5 only.
    "stacked-qwen3-vl-moe": Model(
        "Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration", QWEN3_VL, STACKED_ALWAYS, parameters=BOTH
    ),
    "stacked-aria": Model("AriaTextConfig", "AriaTextForCausalLM", ARIA, STACKED, parameters=BOTH),
    "stacked-aria-fc": Model(
        "AriaTextConfig", "AriaTextForCausalLM", ARIA, (LATE,), parameters=("experts.fc1.weight", "experts.fc2.weight")
    ),
}  # fmt: skip
