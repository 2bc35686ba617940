"""Blockwise attention gives the results of ordinary attention."""

import math

import pytest
import torch

from sae_lora.models.attention import blockwise as attention
from sae_lora.models.language_model import LanguageModel
from tests.support.families import random_tokens


def whole_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Attention with the whole matrix of scores, as the reference."""
    shared_by = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(shared_by, 1).transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores.masked_fill(~mask, -math.inf).softmax(-1) @ value.repeat_interleave(shared_by, 1)


@pytest.mark.parametrize("softcap", [None, 2.0, 100.0])
@pytest.mark.parametrize(("queries", "positions"), [(300, 300), (128, 128), (16, 16), (5, 40), (1, 40)])
@pytest.mark.parametrize("window", [None, 20])
def test_it_equals_ordinary_attention(
    softcap: float | None, queries: int, positions: int, window: int | None
) -> None:
    """Outputs and gradients in float64, also with fewer queries than positions and with a window."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, queries, 8, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, 3, positions, 8, generator=generator, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    visible = torch.ones(positions, positions, dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    mask = visible[positions - queries :].expand(2, 1, queries, positions)
    whole = whole_attention(*inputs, mask, 0.3, softcap)
    passed_mask = None if window is None else mask
    blocks = attention.attend(None, *inputs, passed_mask, scaling=0.3, softcap=softcap)[0].transpose(
        1, 2
    )
    torch.testing.assert_close(blocks, whole, rtol=0, atol=1e-12)
    weight = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    for gradient, expected in zip(
        torch.autograd.grad(blocks, inputs, weight),
        torch.autograd.grad(whole, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_every_family_gives_the_results_of_eager_attention(model: LanguageModel) -> None:
    """Including windows shorter than the text, soft-capped scores and shared keys."""
    tokens = random_tokens(length=48)
    first = model.blocks[0]
    weight = next(weight for weight in first.parameters() if weight.ndim == 2).requires_grad_()

    def computed(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        model.model.set_attn_implementation(name)
        hidden = model.hidden(tokens)
        return hidden, torch.autograd.grad(hidden.square().mean(), weight)[0]

    attention.register()
    for result, expected in zip(computed(attention.NAME), computed("eager"), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def check_padding(model: LanguageModel) -> None:
    """The logits of a padded text are those of the text without padding."""
    tokens = random_tokens(batch=2, length=16)
    padded = torch.cat([torch.zeros_like(tokens[:, :5]), tokens], dim=1)
    mask = torch.cat([torch.zeros_like(tokens[:, :5]), torch.ones_like(tokens)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = model.model(tokens, use_cache=False).logits
        logits = model.model(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits[:, 5:], whole, rtol=1e-4, atol=1e-4)


def test_padding_changes_nothing(model: LanguageModel) -> None:
    attention.register()
    model.model.set_attn_implementation(attention.NAME)
    check_padding(model)
