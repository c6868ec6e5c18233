"""The configs with which model classes of transformers are built on the meta device.

Nearly all take their defaults. FIELDS names, by class or else by model type of the outermost config, what has no usable
default; sizes there need not be those of a published checkpoint, since only names and nesting are read from the
models. UNBUILT are parts that only their surrounding model can build.
"""

from __future__ import annotations

from typing import Any

_SERIES = {"prediction_length": 4}
_ROPE = {
    kind: {"rope_type": "default", "rope_theta": 10_000.0}
    for kind in ("full_attention", "sliding_attention", "chunked_attention")
}
_SMALL_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8]}
_DIFFUSION_GEMMA = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
_TOWERS: dict[str, dict[str, Any]] = {"vision_config": {}, "audio_config": {}}
_QWEN4_EXP = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "output_gate_type": "silu",
}
_QWEN3_OMNI_TALKER = {"shared_expert_intermediate_size": 8}
_DEEPSEEK_OCR2 = {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2}
_OCR_CONVOLUTIONS = (
    "reduce_channel",
    "return_channel",
    *(f"vertical_long_to_small_conv_{ratio}ratio" for ratio in ("long", "mid", "short")),
    *(f"horizontal_small_to_long_conv_{ratio}ratio" for ratio in ("long", "mid", "short")),
    *(f"symmetric_conv_long_{ratio}ratio" for ratio in ("long", "mid", "short")),
)
_OCR_DETECTOR = {
    "intraclass_block_config": {name: [1, 1, 0] for name in _OCR_CONVOLUTIONS},
    "scale_factor_list": [1, 2, 4, 8],
    "kernel_list": [3, 2, 2],
}
_SAPIENS2_HEAD = {
    "upsample_out_channels": [8],
    "upsample_kernel_sizes": [4],
    "conv_out_channels": [8],
    "conv_kernel_sizes": [1],
    "scale_conv_out_channels": [8],
    "scale_conv_kernel_sizes": [1],
    "scale_final_input_size": 8,
    "scale_final_hidden_sizes": [8, 8],
}

FIELDS: dict[str, dict[str, Any]] = {
    "autoformer": _SERIES,
    "aya_vision": {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 16}},
    "BeitForSemanticSegmentation": {"out_indices": [3, 5, 7, 11]},
    "bridgetower": {"contrastive_hidden_size": 8, "logit_scale_init_value": 1.0},
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "cohere_compass": {"text_config": {"model_type": "cohere_compass_text", "rope_parameters": _ROPE}},
    "cohere_compass_text": {"rope_parameters": _ROPE},
    "convnext": _SMALL_STAGES,
    "convnextv2": _SMALL_STAGES,
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 8}},
    "deepseek_ocr2": {"text_config": {"model_type": "deepseek_ocr2_text", **_DEEPSEEK_OCR2}},
    "deepseek_ocr2_text": _DEEPSEEK_OCR2,
    "diffusion_gemma": {"text_config": {"model_type": "diffusion_gemma_text", **_DIFFUSION_GEMMA}},
    "diffusion_gemma_text": _DIFFUSION_GEMMA,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "emu3": {"vocabulary_map": {"<image>": 1, "<|extra_200|>": 2}},
    "embedding_gemma2": _TOWERS,
    "esm": {"vocab_size": 33, "pad_token_id": 1},
    "EsmForProteinFolding": {"vocab_size": 33, "pad_token_id": 1, "is_folding_model": True, "esmfold_config": {}},
    "focalnet": {"hidden_sizes": [8, 8, 8, 8]},
    "gemma4": _TOWERS,
    "gemma4_unified": _TOWERS,
    "gemma4_unified_assistant": {"text_config": {"num_hidden_layers": 12, "num_kv_shared_layers": 6}},
    "granite4_vision": {"downsample_rate": "4/8", "deepstack_layer_map": [[1, 0]]},
    "hiera": {"decoder_hidden_size": 8, "decoder_depth": 1, "decoder_num_heads": 1},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_hidden_layers": 2, "num_experts": 4, "moe_topk": 2},
    "hunyuan_vl": {"text_config": {"model_type": "hunyuan_vl_text", "head_dim": 128}},
    "hunyuan_vl_text": {"head_dim": 128},
    "informer": _SERIES,
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "ministral": {"head_dim": 128},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "moshi": {"audio_vocab_size": 8},
    "nemotron_h_omni": {"audio_config": {"projection_hidden_size": 8, "projection_bias": False}},
    "nemotron": {"num_key_value_heads": 8},
    "perceiver": {"qk_channels": 8, "v_channels": 8},
    "perception_lm": {"vision_config": {"model_type": "timm_wrapper", "model_args": {"embed_dim": 8}}},
    "pp_ocrv5_server_det": _OCR_DETECTOR,
    "pp_ocrv6_medium_det": _OCR_DETECTOR,
    "qwen3_omni_moe": {"talker_config": {"text_config": _QWEN3_OMNI_TALKER, "spatial_merge_size": 2}},
    "qwen3_omni_moe_talker_text": _QWEN3_OMNI_TALKER,
    "qwen4_exp": {"text_config": {"model_type": "qwen4_exp_text", **_QWEN4_EXP}},
    "qwen4_exp_text": _QWEN4_EXP,
    "ReformerModelWithLMHead": {"is_decoder": True},
    "sapiens2": {"head_config": _SAPIENS2_HEAD},
    "T5GemmaEncoderModel": {"is_encoder_decoder": False},
    "time_series_transformer": _SERIES,
    "TimmBackbone": {"backbone": "resnet50"},
    "ViltForImagesAndTextClassification": {"num_images": 2},
    "vitmatte": {"fusion_hidden_sizes": [8, 8, 8, 8]},
    "wav2vec2-bert": {"vocab_size": 8},
    "wav2vec2-conformer": {"vocab_size": 8},
}

UNBUILT = frozenset(
    {
        "LayoutLMv2ForQuestionAnswering",
        "LayoutLMv2ForSequenceClassification",
        "LayoutLMv2ForTokenClassification",
        "LayoutLMv2Model",
        "Gemma4AssistantForCausalLM",
        "Deimv2DINOv3ConvEncoder",
        "PatchTSTEncoder",
        "SeamlessM4Tv2TextToUnitDecoder",
        "SeamlessM4Tv2TextToUnitModel",
        "SwinEncoder",
        "T5Gemma2Decoder",
        "T5Gemma2Encoder",
        "T5Gemma2TextEncoder",
        "T5GemmaDecoder",
        "T5GemmaEncoder",
        "UVDocBridge",
    }
)
