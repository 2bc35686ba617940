"""Small random models of the supported families, each with the peculiarities of the real models."""

import math
from collections.abc import Callable

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sae_lora.models.language_model import LanguageModel

D_MODEL, D_VOCAB, N_BLOCKS = 32, 96, 4

LLAMA_LIKE = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
# Soft-caps are so small that leaving them out changes results.
_gemma = {"query_pre_attn_scalar": 8, "sliding_window": 8}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**LLAMA_LIKE, **_gemma, final_logit_softcapping=3.0, attn_logit_softcapping=5.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**LLAMA_LIKE, **_gemma)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA_LIKE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**LLAMA_LIKE, sliding_window=8)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=D_VOCAB,
            hidden_size=D_MODEL,
            intermediate_size=48,
            num_hidden_layers=N_BLOCKS,
            num_attention_heads=4,
            max_position_embeddings=64,
            initializer_range=0.3,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=D_VOCAB,
            n_embd=D_MODEL,
            n_layer=N_BLOCKS,
            n_head=4,
            n_positions=64,
            initializer_range=0.3,
            resid_pdrop=0.1,
        )
    ),
}


def small_model(family: str, seed: int = 0) -> LanguageModel:
    """A random model of the family, frozen, with the same weights for the same seed."""
    torch.manual_seed(seed)
    return LanguageModel(FAMILIES[family]())


def random_tokens(batch: int = 3, length: int = 16, seed: int = 1) -> torch.Tensor:
    """Tokens `[batch, length]`."""
    return torch.randint(0, D_VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_distances(n: int, seed: int) -> torch.Tensor:
    """Angles between the states of a random walk: neighbours are near, and all angles differ."""
    walk = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(
        0
    )
    walk /= walk.norm(dim=1, keepdim=True)
    angles = (walk @ walk.T).clamp(-1, 1).acos() / math.pi
    return ((angles + angles.T) / 2).fill_diagonal_(0)
