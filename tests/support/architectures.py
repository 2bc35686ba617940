"""Tiny random models of architectures whose blocks differ: experts, latent attention, linear attention,
state spaces, convolutions, and other names of matrices.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from sae_lora.models.language_model import LanguageModel
from tests.support.families import D_MODEL, D_VOCAB, LLAMA_LIKE, N_BLOCKS

_experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_linear_attention = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": LLAMA_LIKE | _experts | {"decoder_sparse_step": 2},
    "olmoe": LLAMA_LIKE | _experts | {"intermediate_size": 24},
    "mixtral": LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "granitemoe": LLAMA_LIKE | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {key: value for key, value in LLAMA_LIKE.items() if key != "head_dim"}
    | {
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 2,
        "q_lora_rank": 12,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "qwen2_moe": LLAMA_LIKE | _experts | {"shared_expert_intermediate_size": 24},
    "qwen3_next": LLAMA_LIKE | _experts | _linear_attention | {"shared_expert_intermediate_size": 24},
    "qwen3_5_text": LLAMA_LIKE | _linear_attention,
    "phi": LLAMA_LIKE | {"num_key_value_heads": 4},
    "gptj": {
        "vocab_size": D_VOCAB,
        "n_embd": D_MODEL,
        "n_layer": N_BLOCKS,
        "n_head": 4,
        "n_positions": 64,
        "rotary_dim": 4,
        "initializer_range": 0.3,
    },
    "falcon": {
        "vocab_size": D_VOCAB,
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_BLOCKS,
        "num_attention_heads": 4,
        "initializer_range": 0.3,
    },
    "lfm2": LLAMA_LIKE | {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "jamba": LLAMA_LIKE
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "nemotron_h": LLAMA_LIKE
    | {
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 24,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 4,
        "n_groups": 1,
        "use_mamba_kernels": False,
    },
}


def tiny_model(architecture: str, seed: int = 0, **changes: Any) -> LanguageModel:
    """A random model of the architecture, frozen, with the same weights for the same seed.

    `changes` are further values of its config.
    """
    torch.manual_seed(seed)
    return LanguageModel(_model(architecture, changes))


def tiny_shapes(architecture: str) -> LanguageModel:
    """The same model without weights."""
    with torch.device("meta"):
        return LanguageModel(_model(architecture, {}))


def _model(architecture: str, changes: dict[str, Any]) -> PreTrainedModel:
    config = CONFIG_MAPPING[architecture](**ARCHITECTURES[architecture] | changes)
    return AutoModelForCausalLM.from_config(config)
