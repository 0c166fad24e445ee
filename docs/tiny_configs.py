"""A tiny config of each causal type of transformers: the sizes of its own default config, made small."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

WIDTH, HEADS, LAYERS = 64, 4, 2
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "hidden_dim", "embedding_size",
                     "word_embed_proj_dim", "d_embed", "width", "output_dim", "out_hidden_size", "embed_dim",
                     "lru_width", "dim_model", "hidden_size_global",
                     "projection_dim", "vision_output_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner", "dff",
                     "dim_ff", "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp", "d_ff",
                     "feed_forward_proj_dim", "block_ff_dim"), 2 * WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
                     "num_decoder_layers", "num_encoder_layers", "depth", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
                     "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
                     "attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), HEADS // 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length",
                     "max_sequence_length", "seq_length", "max_target_positions"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_top_k", "num_experts_per_token", "top_k_experts"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size",
                     "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("head_dim", "global_head_dim", "v_head_dim", "kv_channels", "attention_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "sliding_window": 256, "initializer_range": 0.1, "init_std": 0.1,
}  # fmt: skip
"""By the names that configs give to sizes."""
HYBRID = ["linear_attention", "full_attention"]
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logits_scaling": 8.0,
}
"""Of Granite 3.3 2B; the defaults of its config are 1."""
INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
           "indexer_compress_ratio": 4}  # fmt: skip
GEMMA3N = {
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "vocab_size_per_layer_input": 512,
    "hidden_size_per_layer_input": 16,
}
MORE: dict[str, dict[str, Any]] = {
    **{
        kind: {"is_decoder": True}
        for kind in (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
            "xmod",
        )
    },
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "blt": {"encoder_hash_byte_group_vocab": 100, "global_config": {"encoder_cross_output_size": 2 * WIDTH}},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots3_note": {
        "text_config": {"num_key_value_heads": HEADS, "per_layer_config": {}},
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": WIDTH, "adapter_out_dim": WIDTH},
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "falcon_h1": {"mamba_d_ssm": 128, **MAMBA},
    "falcon_mamba": {"time_step_rank": 4},
    "gemma3n": {"text_config": GEMMA3N},
    "gemma3n_text": GEMMA3N,
    "gemma4": {"text_config": {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16}},
    "gemma4_text": {"vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"), GRANITE),
    "granitemoehybrid": {"layer_types": HYBRID, **MAMBA, **GRANITE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": HYBRID},
    "lfm2": {"full_attn_idxs": [1]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "minicpm3": {"scale_emb": 1, "dim_model_base": WIDTH},
    "qwen3_next": {"layer_types": HYBRID},
    "qwen3_5": {"text_config": {"layer_types": HYBRID}},
    "qwen3_5_moe": {"text_config": {"layer_types": HYBRID}},
    "qwen3_5_text": {"layer_types": HYBRID},
    "qwen3_5_moe_text": {"layer_types": HYBRID},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "qwen4_exp": {"text_config": {"layer_types": ["linear_attention", "indexed_attention"], **INDEXER}},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"], **INDEXER},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 2 * WIDTH, "embedding_dim": 2 * WIDTH},
    "zamba": {"layer_types": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2],
        "num_hidden_layers": 3,
        "mamba_headdim": 16,
        "mamba_d_state": 16,
        "chunk_size": 16,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
        "num_key_value_heads": HEADS,
        "num_query_groups": HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""Options of a type that are added or replaced."""
NEEDED: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
}
"""Options without which a type's config cannot be made."""


def tiny_config(kind: str, tokens: dict[str, int | None]) -> PreTrainedConfig:
    """A small config of a type; `tokens` has `vocab_size` and the ids of special tokens."""
    sizes = {**tokens, "unpadded_vocab_size": tokens["vocab_size"]}
    return _shrunk(AutoConfig.for_model(kind, **NEEDED.get(kind, {})), {**sizes, **MORE.get(kind, {})})


def _shrunk(config: PreTrainedConfig, more: dict[str, Any]) -> PreTrainedConfig:
    """The same with small sizes, its parts likewise; made anew, so that what follows from sizes does."""
    names = config.attribute_map
    given = {name: value for name, value in {**SIZES, **more}.items() if name in config.to_dict() or name in names}
    if hasattr(config, "qk_rope_head_dim"):  # which is what they call head_dim then
        given |= {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": HEADS}
    given |= {name: value for name, value in more.items() if name not in config.sub_configs}
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            tokens = {key: value for key, value in more.items() if key in TOKENS}
            given[name] = _shrunk(part, {**tokens, **more.get(name, {})}).to_dict()
    return type(config)(**given)


TOKENS = ("vocab_size", "unpadded_vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")
