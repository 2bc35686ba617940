"""Tiny random models of every causal family of transformers, from its config class with small sizes."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

D_VOCAB, N_BLOCKS = 96, 4

_SMALL = {
    key: size
    for keys, size in {
        ("vocab_size", "vocab_size_per_layer_input"): D_VOCAB,
        ("n_group", "topk_group"): 1,
        (
            *("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers"),
            *("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"),
        ): N_BLOCKS,
        ("hidden_size", "n_embd", "d_model", "emb_dim", "word_embed_proj_dim", "embedding_size"): 32,
        (
            *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
            *("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"),
            *("attention_heads", "num_experts", "num_local_experts", "n_routed_experts"),
            *("moe_num_experts", "mamba_n_heads", "linear_num_value_heads", "linear_num_key_heads"),
        ): 4,
        (
            *("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "moe_topk", "moe_k"),
            *("num_experts_per_token", "moe_top_k", "num_selected_experts"),
        ): 2,
        (
            *("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"),
            *("linear_key_head_dim", "linear_value_head_dim", "global_head_dim", "sliding_window"),
        ): 8,
        (
            *("q_lora_rank", "kv_lora_rank", "moe_intermediate_size", "state_size", "mamba_d_state"),
            *("mamba_d_head", "hidden_size_per_layer_input", "shared_expert_intermediate_size"),
        ): 16,
        (
            *("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"),
            *("ffn_hidden_size", "n_inner", "dff", "dim_ff", "d_inner"),
        ): 48,
        (
            *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"),
            *("context_length",),
        ): 64,
    }.items()
    for key in keys
}
"""Small sizes by the keys of configs."""
_ONE_KEY_PER_QUERY = {"num_key_value_heads": 4}
_PARTICULAR: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text"),
            *("glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "minicpm3", "sarvam_mla", "youtu"),
        ),
        _ONE_KEY_PER_QUERY,
    ),
    "bert": {"is_decoder": True},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["full_attention"] * N_BLOCKS,
        "intermediate_size": 48,
        "activation_sparsity_pattern": [0.0] * N_BLOCKS,
    },
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": ["full_attention"] * N_BLOCKS},
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], N_BLOCKS // 2]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (N_BLOCKS // 2)},
    "mamba2": {"num_heads": 8},
    "opt": {"word_embed_proj_dim": 16},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * (N_BLOCKS // 2)},
    "zamba2": {"layer_types": ["mamba", "hybrid"] * (N_BLOCKS // 2), "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}
"""Further values that a family needs."""
_MAX_WEIGHTS = 3_000_000


def causal_families() -> list[str]:
    """The model types that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str) -> PreTrainedConfig:
    """The config of a family with small sizes."""
    kind = CONFIG_MAPPING[model_type]
    return kind(**_small(kind().to_dict()) | _PARTICULAR.get(model_type, {}))


def small_causal_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the family, with weights so large that every part matters."""
    config = small_config(model_type)
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    weights = sum(weight.numel() for weight in shapes.parameters())
    if weights > _MAX_WEIGHTS:
        raise ValueError(f"{weights:,} weights: the config has sizes that are not shrunk")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0, 0.2)
    return model.eval()


def _small(defaults: dict[str, Any]) -> dict[str, Any]:
    """The values of a config, or of a config inside it, that must differ from the defaults."""
    values: dict[str, Any] = {}
    for key, default in defaults.items():
        if isinstance(default, dict) and "model_type" in default:
            values[key] = _small(default)
        elif key in _SMALL and isinstance(default, int | None):
            values[key] = _SMALL[key]
        elif key.endswith("_token_id") and isinstance(default, int) and default >= D_VOCAB:
            values[key] = 1
    return values
