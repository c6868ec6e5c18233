"""The size that each field of a config gets, by the field's name: the generic part of making a model tiny.

Sizes differ from each other where they may, so that a transposed or exchanged axis shows in a shape: the hidden size is
32, of experts 20, an MLP 40, a head 16, a vocabulary 96, experts 3. A name that is not here keeps its default.
"""

from __future__ import annotations

_BY_SIZE: dict[int, str] = {
    1: """
        mamba_n_groups mamba_ngroups n_groups n_group topk_group num_expert_group num_global_layers
        num_layers_per_stack num_self_attends_per_block num_sparse_decoder_layers num_sparse_encoder_layers
        num_dense_layers first_k_dense_replace resampler_depth num_residual_layers num_random_blocks
        aligner_num_add_layers num_lstm_layers
    """,
    2: """
        num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth layers
        num_encoder_layers num_decoder_layers num_blocks speech_encoder_layers t2u_encoder_layers
        t2u_decoder_layers conf_num_hidden_layers num_key_value_heads num_kv_heads kv_n_heads
        num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k swa_num_key_value_heads
        linear_num_key_heads prompt_length max_window_layers num_quantizers num_query_groups
        index_topk_blocks hc_mult hc_count num_conv_pos_embedding_groups top_k_experts
    """,
    3: """
        num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num num_hash
        num_query_tokens resampler_n_latents resampler_num_latents latent_query_num num_latents num_speakers
    """,
    4: """
        num_attention_heads num_attention_heads_per_layer encoder_attention_heads decoder_attention_heads n_head
        num_heads n_heads         attention_heads swa_num_attention_heads linear_num_value_heads linear_num_heads
        speech_encoder_attention_heads t2u_encoder_attention_heads t2u_decoder_attention_heads
        conf_num_attention_heads num_encoder_attention_heads num_decoder_attention_heads
        num_sliding_attention_heads resampler_n_heads resampler_heads num_cross_attention_heads
        num_self_attention_heads index_n_heads patch_size mamba_n_heads mamba_num_heads num_landmarks
        index_topk vocoder_num_langs vocoder_num_spkrs laurel_rank d_rel index_block_size num_centroids
        centroid_intermediate_top_k
    """,
    8: """
        image_size image_seq_length window_size num_mel_bins n_mel_bins chunk_size mamba_chunk_size
        block_size qk_rope_head_dim time_step_rank mamba_dt_rank mamba_d_state state_size ssm_state_size
        rel_extent sliding_window sliding_window_size attention_window local_attention local_radius
        global_block_size adapter_rank gated_norm_rank dim_model_base base_channels latent_channels
        num_position_embeddings pos_emb_height pos_emb_width num_filters max_action_dim max_state_dim
        lang_embed_dim spkr_embed_dim num_mel mm_tokens_per_image num_image_tokens nemo_conv_channels
        block_multiple_of feature_size max_temporal_embeddings
    """,
    12: """
        kv_lora_rank o_lora_rank hc_lowrank embedding_rank hidden_size_per_layer_input
    """,
    16: """
        head_dim qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim
        linear_head_dim swa_head_dim mamba_d_head mamba_head_dim mamba_headdim d_kv dim_head d_head
        kv_channels resampler_head_dim resampler_dim_head embedding_size input_embedding_size codebook_dim
        entity_emb_size intra_bottleneck_size pronunciation_embed_dim shape_embed_dim global_attn_size
        router_hidden_size downsample_hidden_size mm_posemb_size
    """,
    20: """
        moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size q_lora_rank
        moe_shared_expert_intermediate_size shared_experts_intermediate_size share_expert_dim
    """,
    24: """
        true_hidden_size prompt_mid_dim output_channels global_head_dim post_conv_in_channels
        post_conv_mid_channels post_conv_out_channels
    """,
    32: """
        hidden_size d_model n_embd embed_dim dim emb_dim embedding_dim word_embed_proj_dim projection_dim
        out_hidden_size text_hidden_size vision_hidden_size encoder_hidden_size decoder_hidden_size
        hidden_size_global output_embedding_size projector_hidden_size pooler_hidden_size
        cross_attention_hidden_size backbone_hidden_size image_text_hidden_size patch_embed_hidden_size
        projection_hidden_size audio_hidden_size image_token_embed_dim prediction_head_size
        projector_input_dim projector_output_dim d_latents lru_width mamba_d_ssm output_dim adapter_out_dim
        adapter_in_dim adapter_input_size output_proj_dims mm_embed_dim audio_embed_dim ext_pw_out_channel
        depthwise_separable_out_channel merged_hidden_size moe_hidden_size vision_output_dim
    """,
    40: """
        intermediate_size encoder_ffn_dim decoder_ffn_dim ffn_dim d_ff d_inner dff dim_ff ffn_hidden_size
        mlp_dim speech_encoder_intermediate_size t2u_encoder_ffn_dim t2u_decoder_ffn_dim
        dense_intermediate_size feed_forward_size shared_intermediate_size alignment_intermediate_size
        projection_intermediate_size projection_hidden_dim intermediate_size_mlp
    """,
    64: """
        max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions
        context_length max_decoder_position_embeddings max_encoder_position_embeddings
        t2u_max_position_embeddings num_embeddings max_2d_position_embeddings position_embedding_size
        codebook_size max_num_patches max_temporal_embeddings max_img_size seq_len max_image_size
        encoder_hash_byte_group_vocab ngram_vocab_size_base entity_vocab_size mel_vocab_size char_vocab_size
        t2u_vocab_size unit_hifi_gan_vocab_size shape_vocab_size pronunciation_vocab_size
    """,
    96: """
        vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input
        unpadded_vocab_size
    """,
}
SIZES: dict[str, int] = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
LISTS: dict[str, list[int]] = {
    "deepstack_visual_indexes": [1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "intermediate_layers_indices": [0, 1],
    "mlp_only_layers": [0],
}
"""Fields that name layers, which must be among the few that are left."""
EQUAL = (
    ("head_dim", "qk_rope_head_dim", "qk_rope_head_dim"),
    ("num_key_value_heads", "num_attention_heads", "kv_lora_rank"),
)
"""Fields that get the size of a second field if both have the same by default and the config has the third."""
