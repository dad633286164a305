"""A tiny random model of any causal type that transformers knows.

One table of small sizes serves nearly all: a size is set where the config class has a field of that
name, or maps it to another. What single types need besides stands in `SINGLE`.
"""

from dataclasses import fields
from typing import Any

import torch

VOCABULARY = 99
CONTEXT = 128
LARGEST = 2_000_000  # parameters that count as tiny

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    "tie_word_embeddings": False,
    # attention that sees a part of the text
    "sliding_window": 8,
    "attention_window_size": 8,
    "attention_chunk_size": 8,
    "window_size": 8,
    "local_attention": 8,
    "index_topk": 8,
    "index_head_dim": 8,
    "index_n_heads": 16,  # fewer, and many keys have the same score: none
    "index_block_size": 4,
    "index_topk_blocks": 2,
    # other names of the same sizes
    "decoder_layers": 4,
    "encoder_layers": 4,  # the name that some caches count by
    "num_decoder_layers": 4,
    "num_encoder_layers": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
    "dff": 48,
    "dim_ff": 48,
    "dim_head": 8,
    "d_inner": 48,
    "embedding_size": 32,
    "input_embedding_size": 32,
    "output_embedding_size": 32,
    "n_ctx": CONTEXT,
    "max_target_positions": CONTEXT,
    "max_seq_len": CONTEXT,
    "rotary_dim": 4,
    "ffn_hidden_size": 48,
    "intermediate_size_mlp": 48,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "kv_channels": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "global_head_dim": 8,
    # low-rank attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "gated_norm_rank": 4,
    "laurel_rank": 4,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "router_hidden_size": 16,
    # recurrent layers
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "state_size": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "adapter_rank": 4,
    "lru_width": 32,
    # between head and logits
    "logit_scale": 0.5,
    "logits_scaling": 2.0,
    "lm_head_multiplier": 2.0,
    "logits_mup_width_multiplier": 0.5,
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "output_logit_soft_cap": 3.0,
}
WRAPPED = {  # sizes of the parts of wrappers that do not read text
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
}
IMAGES = {"vision_config": {"image_size": 16, "patch_size": 8}}
HYBRID = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
QWEN_4_EXP: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_count": 2,
    "hc_lowrank": 8,
}
GEMMA_3N: dict[str, Any] = {
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
SINGLE: dict[str, dict[str, Any]] = {  # what a type needs besides
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "patcher_config": {"vocab_size": VOCABULARY},
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
        "encoder_hash_byte_group_vocab": 500,
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "dots1": {"n_shared_experts": 1},
    "emu3": {"vq_config": {"base_channels": 32, "num_res_blocks": 1, "codebook_size": 16}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3": IMAGES | {"text_config": {"final_logit_softcapping": None}},  # it is not applied
    "gemma3n_text": GEMMA_3N,
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 16, "mm_posemb_size": 16}},
    "git": IMAGES,
    "got_ocr2": {
        "vision_config": {"image_size": 16, "patch_size": 8, "output_channels": 8, "mlp_dim": 16},
        "text_config": {
            "model_type": "qwen2",
            **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size")},
            **{name: SIZES[name] for name in ("num_hidden_layers", "num_attention_heads")},
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
        },
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": HYBRID},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": HYBRID},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": IMAGES,
    "longcat_flash": {"num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama": IMAGES,
    "phi4_multimodal": IMAGES
    | {
        "audio_config": {
            "num_blocks": 1,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
        }
    },
    "qwen4_exp": {"text_config": QWEN_4_EXP},
    "qwen4_exp_text": QWEN_4_EXP,
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "attention_head_size": 8,
        "num_buckets": 4,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCABULARY,
        "pronunciation_vocab_size": VOCABULARY,
    },
    "xlstm": {"num_heads": 4, "hidden_size": 128},  # it rounds widths up to 64
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def build(model_type: str) -> Any:
    """A causal language model in float32 whose logits tell positions and tokens apart.

    Raises:
        ValueError: it is not tiny with these sizes.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = CONFIG_MAPPING[model_type]
    config = kind(**_sizes(kind, SIZES | SINGLE.get(model_type, {})))
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters with these sizes")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
        else:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def _sizes(kind: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Of these, what the config class has, by its own names; parts in turn."""
    own = {field.name for field in fields(kind)}
    found = {kind.attribute_map.get(name, name): value for name, value in sizes.items()}
    chosen = {name: value for name, value in found.items() if name in own}
    chosen |= {name: value for name, value in sizes.items() if name in own}
    if "kv_lora_rank" in own:
        chosen["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name, part in kind.sub_configs.items():
        if not hasattr(part, "__dataclass_fields__"):
            continue  # any config may stand there
        usual = WRAPPED if name.startswith(("vision", "audio", "vq")) else SIZES
        chosen[name] = _sizes(part, usual) | chosen.get(name, {})
    return chosen
