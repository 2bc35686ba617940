"""Models and SAEs with random weights. The head's share of the work is as in real models."""

import enum
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import TopKSAE, TopKSAEConfig
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Splice


class Style(enum.Enum):
    """Architecture of the layers."""

    gemma2 = "gemma2"
    llama = "llama"


@dataclass(frozen=True)
class Shape:
    """Sizes of model and SAE."""

    d_model: int = 512
    d_mlp: int = 2048
    n_blocks: int = 12
    n_heads: int = 8
    n_kv_heads: int = 4
    d_head: int = 64
    d_vocab: int = 32_768
    sae_block: int = 5
    d_sae: int = 4096
    k: int = 64


SMALL = Shape()
"""The shape of the tables."""


def random_model(style: Style, shape: Shape, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A frozen model with random weights from a fixed seed."""
    sizes: dict[str, Any] = {
        "vocab_size": shape.d_vocab,
        "hidden_size": shape.d_model,
        "intermediate_size": shape.d_mlp,
        "num_hidden_layers": shape.n_blocks,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.d_head,
        "max_position_embeddings": 8192,
    }
    torch.manual_seed(0)
    with device:  # billions of random numbers take minutes on a CPU
        match style:
            case Style.gemma2:
                model = Gemma2ForCausalLM(Gemma2Config(**sizes, query_pre_attn_scalar=shape.d_head))
            case Style.llama:
                model = LlamaForCausalLM(LlamaConfig(**sizes))
            case _:
                raise NotImplementedError(style)
    for weight in model.parameters():  # not buffers: rotary frequencies stay float32
        weight.data = weight.data.to(dtype)
    return LanguageModel(model)


def random_splice(shape: Shape, seed: int, device: torch.device, dtype: torch.dtype) -> Splice:
    """A TopK SAE with random weights, after block `shape.sae_block`."""
    torch.manual_seed(seed)
    sae = TopKSAE(TopKSAEConfig(d_in=shape.d_model, d_sae=shape.d_sae, k=shape.k))
    frozen = sae.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return Splice(shape.sae_block, frozen)
