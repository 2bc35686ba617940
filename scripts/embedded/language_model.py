"""The embedded language model: a small Llama trained on the Python standard library's sources."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sae_lora.data.packing import shuffled_batches

BOS, EOS = "<|bos|>", "<|eos|>"


class Budget(NamedTuple):
    """Length and speed of the language model's training.

    Args:
        tokens: Training tokens. They are several passes over the text.
        batch_size: Sequences per step.
        lr: Peak learning rate, after the warm-up. It then falls linearly to zero.
        warmup: Share of the steps in which the learning rate rises.
        weight_decay: Weight decay of AdamW, only for matrices.
    """

    tokens: int = 24_000_000
    batch_size: int = 16
    lr: float = 3e-3
    warmup: float = 0.02
    weight_decay: float = 0.1


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts. It begins every encoding with BOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def new_model(vocabulary: int, bos: int | None, eos: int | None) -> LlamaForCausalLM:
    """An untrained Llama of 2M parameters: 8 blocks, d_model 128, tied embeddings."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=eos,
        )
    )


def cross_entropy(model: LlamaForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats per predicted token; `tokens` is `[batch, pos]`."""
    logits = model(tokens, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def validation_ce(model: LlamaForCausalLM, sequences: np.ndarray) -> float:
    """Mean cross-entropy in nats per token over the sequences `[sequence, pos]`."""
    losses = [
        float(cross_entropy(model, torch.from_numpy(rows.astype(np.int64)))) * len(rows)
        for rows in np.array_split(sequences, max(1, len(sequences) // 32))
    ]
    return sum(losses) / len(sequences)


def train(
    model: LlamaForCausalLM,
    sequences: np.ndarray,
    budget: Budget,
    seed: int,
    report: Callable[[int, int, float], None],
) -> None:
    """Train the model in place.

    Args:
        model: The untrained model.
        sequences: Training tokens `[sequence, pos]`. Each pass has a new order.
        budget: Length and speed of training.
        seed: Seed of the order of the sequences.
        report: Function that is called as `report(step, steps, loss)` after every step.
    """
    steps = max(1, budget.tokens // (budget.batch_size * sequences.shape[1]))
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": budget.weight_decay}, {"params": vectors}],
        lr=budget.lr,
        betas=(0.9, 0.95),
        weight_decay=0.0,
        fused=True,
    )
    warmup_steps = max(1, round(budget.warmup * steps))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup_steps, (steps - step) / max(1, steps - warmup_steps)),
    )
    batches = islice(shuffled_batches(sequences, budget.batch_size, seed), steps)
    for step, tokens in enumerate(batches):
        loss = cross_entropy(model, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        report(step + 1, steps, float(loss.detach()))
