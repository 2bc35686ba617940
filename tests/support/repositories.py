"""Small repositories in the published layouts.

Gemma 2 with Gemma Scope, Llama with Llama Scope, GPT-2 with an SAE in sae-lens's older format, Pythia
and SmolLM2 (without SAEs), the Pile and RedPajama.
"""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import zstandard
from safetensors.torch import save_file
from tokenizers import processors
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from scripts.embedded.language_model import train_tokenizer

GEMMA_D_MODEL, GEMMA_WIDTH = 2304, 16_384
"""sae-lens assumes these sizes for Gemma Scope, so that the small model must have them."""
LLAMA_D_MODEL, LLAMA_WIDTH = 48, 128
GPT2_D_MODEL, GPT2_WIDTH = 32, 96
PYTHIA_D_MODEL = 32
SMOLLM2_D_MODEL = 32
VOCABULARY = 384


def documents(count: int) -> list[str]:
    """Different texts that are long enough for a few sequences."""
    words = "the sparse latent of a residual stream is read by no one but the next block".split()
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(words, 60)) + f" {number}." for number in range(count)]


def write_all(root: Path) -> None:
    """Write every repository below the hub's root."""
    _write_model(
        root / "models/google/gemma-2-2b",
        Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=VOCABULARY,
                hidden_size=GEMMA_D_MODEL,
                intermediate_size=32,
                num_hidden_layers=14,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=64,
                sliding_window=16,
            )
        ),
    )
    _write_model(
        root / "models/meta-llama/Llama-3.1-8B",
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=LLAMA_D_MODEL,
                intermediate_size=64,
                num_hidden_layers=18,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            )
        ),
    )
    _write_model(
        root / "models/HuggingFaceTB/SmolLM2-135M",
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=SMOLLM2_D_MODEL,
                intermediate_size=64,
                num_hidden_layers=17,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
            )
        ),
        begins_with_bos=False,
    )
    _write_model(
        root / "models/openai-community/gpt2",
        GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=GPT2_D_MODEL, n_layer=8, n_head=4, n_positions=64)
        ),
        begins_with_bos=False,
    )
    _write_model(
        root / "models/EleutherAI/pythia-70m-deduped",
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=VOCABULARY,
                hidden_size=PYTHIA_D_MODEL,
                intermediate_size=64,
                num_hidden_layers=6,
                num_attention_heads=4,
                max_position_embeddings=64,
            )
        ),
        begins_with_bos=False,
    )
    _write_older_format(root / "models/jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs/v5_32k_layer_6.pt")
    _write_gemma_scope(root / "models/google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")
    _write_gemma_scope(root / "models/google/gemma-scope-2b-pt-mlp/layer_12/width_16k/average_l0_108")
    _write_gemma_scope(
        root / "models/google/gemma-scope-2b-pt-transcoders/layer_12/width_16k/average_l0_6"
    )
    for sublayer, hook in (("R", "resid_post"), ("A", "attn_out"), ("M", "mlp_out")):
        folder = f"models/fnlp/Llama3_1-8B-Base-LX{sublayer}-8x/Llama3_1-8B-Base-L16{sublayer}-8x"
        _write_llama_scope(root / folder, f"blocks.16.hook_{hook}")
    _write_pile(root / "datasets/monology/pile-uncopyrighted")
    _write_redpajama(root / "datasets/togethercomputer")


def _gemma(width: int, inner: int, blocks: int, heads: int, of_a_head: int) -> PreTrainedConfig:
    return Gemma2Config(
        vocab_size=256_000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=of_a_head,
    )


def _llama(width: int, inner: int, blocks: int, of_a_head: int, *, tied: bool) -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=of_a_head,
        max_position_embeddings=131_072,
        tie_word_embeddings=tied,
    )


def published_configs() -> dict[str, PreTrainedConfig]:
    """The configs of the paper's models by repository, in full size, to estimate costs."""
    return {
        "google/gemma-2-2b": _gemma(2304, 9216, 26, 8, 256),
        "google/gemma-2-9b": _gemma(3584, 14_336, 42, 16, 256),
        "google/gemma-2-27b": _gemma(4608, 36_864, 46, 32, 128),
        "meta-llama/Llama-3.2-1B": _llama(2048, 8192, 16, 64, tied=True),
        "meta-llama/Llama-3.1-8B": _llama(4096, 14_336, 32, 128, tied=False),
    }


def write_configs(root: Path) -> None:
    """Write only the configs of `published_configs` below the hub's root."""
    for name, config in published_configs().items():
        config.save_pretrained(root / "models" / name)


def _write_model(folder: Path, model: PreTrainedModel, *, begins_with_bos: bool = True) -> None:
    torch.manual_seed(0)
    model.to(dtype=torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    tokenizer = train_tokenizer(documents(50), VOCABULARY)
    if not begins_with_bos:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save_pretrained(folder)


def _write_gemma_scope(folder: Path) -> None:
    """Write `params.npz` as published. Most latents are zero, so that the compressed file is small."""
    live = 64
    rng = np.random.default_rng(1)
    encoder = np.zeros((GEMMA_D_MODEL, GEMMA_WIDTH), dtype=np.float32)
    encoder[:, :live] = rng.normal(0, GEMMA_D_MODEL**-0.5, (GEMMA_D_MODEL, live))
    folder.mkdir(parents=True)
    np.savez_compressed(
        folder / "params.npz",
        w_enc=encoder,
        w_dec=np.ascontiguousarray(encoder.T),
        b_enc=np.zeros(GEMMA_WIDTH, dtype=np.float32),
        b_dec=np.zeros(GEMMA_D_MODEL, dtype=np.float32),
        threshold=np.full(GEMMA_WIDTH, 0.01, dtype=np.float32),
    )


def _write_llama_scope(folder: Path, hookpoint: str) -> None:
    """Write `hyperparams.json` and `checkpoints/final.safetensors` as published."""
    torch.manual_seed(2)
    (folder / "checkpoints").mkdir(parents=True)
    hyperparams = {
        "d_model": LLAMA_D_MODEL,
        "d_sae": LLAMA_WIDTH,
        "hook_point_in": hookpoint,
        "jump_relu_threshold": 0.05,
        "dataset_average_activation_norm": {"in": 1.0},
    }
    (folder / "hyperparams.json").write_text(json.dumps(hyperparams))
    weights = torch.randn(LLAMA_WIDTH, LLAMA_D_MODEL) / LLAMA_D_MODEL**0.5
    save_file(
        {
            "encoder.weight": weights,
            "encoder.bias": torch.zeros(LLAMA_WIDTH),
            "decoder.weight": weights.T.contiguous(),
            "decoder.bias": torch.zeros(LLAMA_D_MODEL),
        },
        folder / "checkpoints/final.safetensors",
    )


def _write_older_format(folder: Path) -> None:
    """Write `cfg.json` as in sae-lens before version 6: a TopK SAE after a layer norm."""
    torch.manual_seed(3)
    folder.mkdir(parents=True)
    config = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.6.hook_resid_post",
        "hook_point_layer": 6,
        "d_in": GPT2_D_MODEL,
        "d_sae": GPT2_WIDTH,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 8},
        "normalize_activations": "layer_norm",
        "apply_b_dec_to_input": True,
        "context_size": 64,
        "dtype": "torch.float32",
        "device": "cpu",
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    decoder = torch.nn.functional.normalize(torch.randn(GPT2_WIDTH, GPT2_D_MODEL), dim=1)
    save_file(
        {
            "W_enc": decoder.T.contiguous(),
            "W_dec": decoder,
            "b_enc": torch.zeros(GPT2_WIDTH),
            "b_dec": torch.zeros(GPT2_D_MODEL),
        },
        folder / "sae_weights.safetensors",
    )


def _write_pile(folder: Path) -> None:
    """Write zstd-compressed JSONL in `train/`, two shards."""
    (folder / "train").mkdir(parents=True)
    texts = documents(400)
    for shard in range(2):
        lines = [json.dumps({"text": text, "meta": {"set": "x"}}) for text in texts[shard::2]]
        compressed = zstandard.compress(("\n".join(lines) + "\n").encode())
        (folder / "train" / f"{shard:02d}.jsonl.zst").write_bytes(compressed)


def _write_redpajama(organisation: Path) -> None:
    """Write a loading script on `main`, which must never run, and the hub's conversion to parquet."""
    name = "RedPajama-Data-1T-Sample"
    (organisation / name).mkdir(parents=True)
    (organisation / name / f"{name}.py").write_text("raise AssertionError('remote code was run')\n")
    converted = organisation / f"{name}@refs%2Fconvert%2Fparquet" / "plain_text/train"
    converted.mkdir(parents=True)
    table = pyarrow.table({"text": documents(400), "meta": ["{}"] * 400})
    pyarrow.parquet.write_table(table, converted / "0000.parquet")
