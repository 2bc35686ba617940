"""Effects of latents: their decoder directions, carried to the head by a derivative on real text."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.hooks import Coder, Splice, spliced

_AT_ONCE = 256
"""Latents whose directions or logits are computed at once."""


def derivative(
    model: LanguageModel, splices: Sequence[Splice], hookpoint: str, tokens: Tensor, counted: Tensor
) -> Tensor:
    """The change of what the head reads by a direction that is added at all counted positions.

    It is a mean over these positions, and linear in the direction: a matrix for each sequence. One
    backward pass gives a row, so that its cost does not depend on the number of latents.

    Args:
        model: The plain or the adapted model.
        splices: Its SAEs.
        hookpoint: The place at which the direction is added, after the SAE there.
        tokens: `[batch, pos]`.
        counted: True at positions that an SAE replaces, `[batch, pos]`.

    Returns:
        `[batch, d_model, d_model]`: `[…, k, i]` is the change of component k by direction i.
    """
    d_model = model.config.hidden_size
    added = torch.zeros(*tokens.shape, d_model, device=model.device, requires_grad=True)

    def add(module: object, arguments: object, output: Any) -> Any:
        changed = (output[0] if isinstance(output, tuple) else output) + added
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with spliced(model, splices, tokens), torch.enable_grad():
        handle = model.module_at(hookpoint).register_forward_hook(add)
        try:
            head_reads = model.hidden(tokens)
        finally:
            handle.remove()
    sums = head_reads.float().where(counted[..., None], 0.0).sum((0, 1))
    rows = []
    for component in range(d_model):
        (gradient,) = torch.autograd.grad(sums[component], added, retain_graph=component < d_model - 1)
        rows.append(gradient.where(counted[..., None], 0.0).sum(1))
    return torch.stack(rows, 1) / counted.sum(1)[:, None, None]


def directions(sae: Coder, d_sae: int, device: torch.device) -> Tensor:
    """The part of the reconstruction that an activation of 1 of each latent adds, `[d_sae, d_model]`."""
    with torch.no_grad():
        nothing = sae.decode(torch.zeros(1, d_sae, device=device)).float()
        parts = []
        for first in range(0, d_sae, _AT_ONCE):
            count = min(_AT_ONCE, d_sae - first)
            latents = torch.zeros(count, d_sae, device=device)
            latents[:, first : first + count].fill_diagonal_(1)
            parts.append(sae.decode(latents).float() - nothing)
    return torch.cat(parts)


def gram(matrix: Tensor) -> Tensor:
    """The scalar products of changes of logits, as a matrix for changes of what the head reads.

    A change that is equal for all tokens of the vocabulary changes no prediction, and is left out.

    Args:
        matrix: The head's matrix, `[d_vocab, d_model]`.

    Returns:
        `[d_model, d_model]`.
    """
    centred = matrix.double() - matrix.double().mean(0)
    return centred.T @ centred


def cosines(before: Tensor, after: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and ratios of norms of effects, after / before, from `[latent, d_model]` and `gram`."""
    before, after = before.double(), after.double()
    of = partial(_products, products)
    norms = of(before, before).clamp(min=0).sqrt(), of(after, after).clamp(min=0).sqrt()
    return of(before, after) / (norms[0] * norms[1]), norms[1] / norms[0]


def _products(products: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return ((first @ products) * second).sum(-1)


def promoted(effects: Tensor, matrix: Tensor, count: int = 10) -> tuple[Tensor, Tensor]:
    """The tokens whose logits a latent raises and lowers most.

    Args:
        effects: `[latent, d_model]`.
        matrix: The head's matrix, `[d_vocab, d_model]`.
        count: Number of tokens.

    Returns:
        Ids `[2, latent, count]`, first of those that it raises, and the changes of their logits.
    """
    ids, values = [], []
    centred = matrix.float() - matrix.float().mean(0)
    for part in effects.float().split(_AT_ONCE):
        logits = part @ centred.T
        tops = [logits.topk(count, dim=-1, largest=largest) for largest in (True, False)]
        ids.append(torch.stack([top.indices for top in tops]))
        values.append(torch.stack([top.values for top in tops]))
    return torch.cat(ids, 1), torch.cat(values, 1)
