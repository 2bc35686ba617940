"""Effects of latents: their decoder directions, carried to the head by a derivative on real text."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.head import Head
from sae_lora.splice.hooks import Coder, Splice, spliced

LOGIT_BINS = 40
"""Bars of the histogram of a latent's effect on all logits."""
_AT_ONCE = 256
"""Latents whose directions or logits are computed at once."""
_LOGITS = 2**24
"""Logits that are in memory at once."""


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
    with spliced(model, splices, tokens), _added(model, [hookpoint], tokens) as places:
        head_reads = model.hidden(tokens)
    (added,) = places.values()
    sums = head_reads.float().where(counted[..., None], 0.0).sum((0, 1))
    rows = []
    for component in range(d_model):
        (gradient,) = torch.autograd.grad(sums[component], added, retain_graph=component < d_model - 1)
        rows.append(gradient.where(counted[..., None], 0.0).sum(1))
    return torch.stack(rows, 1) / counted.sum(1)[:, None, None]


@contextmanager
def _added(
    model: LanguageModel, hookpoints: Sequence[str], tokens: Tensor
) -> Iterator[dict[str, Tensor]]:
    """Zeros `[batch, pos, d_model]`, by hookpoint, that are added to activations inside the block.

    A gradient with respect to them is one with respect to the activation after its SAE.
    """
    shape = (*tokens.shape, model.config.hidden_size)
    like = {"dtype": model.model.dtype, "device": model.device, "requires_grad": True}
    zeros = {name: torch.zeros(shape, **like) for name in hookpoints}

    def add(added: Tensor, module: object, arguments: object, output: Any) -> Any:
        changed = (output[0] if isinstance(output, tuple) else output) + added
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with ExitStack() as hooks, torch.enable_grad():
        for name, added in zeros.items():
            module = model.module_at(name)
            hooks.callback(module.register_forward_hook(partial(add, added)).remove)
        yield zeros


def slopes(
    model: LanguageModel, head: Head, splices: Sequence[Splice], tokens: Tensor
) -> dict[str, Tensor]:
    """The gradient of the CE, summed over tokens, by what each SAE writes.

    Args:
        model: The plain or the adapted model.
        head: Its head.
        splices: Its SAEs.
        tokens: `[batch, pos]`.

    Returns:
        By hookpoint, `[batch, pos, d_model]` in nats per unit of the activation.
    """
    hookpoints = [splice.hookpoint for splice in splices]
    with spliced(model, splices, tokens), _added(model, hookpoints, tokens) as places:
        hidden = model.hidden(tokens)
    gradients = torch.autograd.grad(hidden, list(places.values()), _slope_of_ce(head, hidden, tokens))
    return dict(zip(places, gradients, strict=True))


def _slope_of_ce(head: Head, hidden: Tensor, tokens: Tensor) -> Tensor:
    """The gradient of the summed CE by what the head reads, `[batch, pos, d_model]`."""
    states = hidden.detach()[:, :-1].flatten(0, 1)
    at_once = max(1, _LOGITS // head.d_vocab)
    parts = []
    for part, targets in zip(states.split(at_once), tokens[:, 1:].flatten().split(at_once), strict=True):
        leaf = part.requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(head.logits(leaf).float(), targets, reduction="sum")
        parts.append(torch.autograd.grad(loss, leaf)[0])
    slope = torch.zeros_like(hidden)
    slope[:, :-1] = torch.cat(parts).view_as(slope[:, :-1])
    return slope


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


class Promoted(NamedTuple):
    """Effects of latents on the logits, less their mean over the vocabulary."""

    ids: Tensor
    """Tokens with the largest changes `[2, latent, count]`: first those that it raises."""
    values: Tensor
    """The changes of their logits, per unit of activation."""
    histogram: Tensor
    """Number of tokens of the vocabulary in each of `LOGIT_BINS` equal bins, `[latent, bin]`."""
    bounds: Tensor
    """The bounds of the bins: the smallest and the largest change, `[latent, 2]`."""


def promoted(effects: Tensor, matrix: Tensor, count: int = 10) -> Promoted:
    """The tokens whose logits latents raise and lower most.

    Args:
        effects: `[latent, d_model]`.
        matrix: The head's matrix, `[d_vocab, d_model]`.
        count: Number of tokens.
    """
    parts = []
    centred = matrix.float() - matrix.float().mean(0)
    for part in effects.float().split(_AT_ONCE):
        logits = part @ centred.T
        tops = [logits.topk(count, dim=-1, largest=largest) for largest in (True, False)]
        low, high = logits.aminmax(dim=-1, keepdim=True)
        width = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / LOGIT_BINS
        bins = ((logits - low) / width).long().clamp(0, LOGIT_BINS - 1)
        histogram = torch.zeros(len(part), LOGIT_BINS, dtype=torch.long, device=part.device)
        histogram.scatter_add_(1, bins, torch.ones_like(bins))
        ids, values = (torch.stack([top[field] for top in tops]) for field in (1, 0))
        parts.append(Promoted(ids, values, histogram, torch.cat([low, high], -1)))
    ids, values, histograms, bounds = zip(*parts, strict=True)
    return Promoted(torch.cat(ids, 1), torch.cat(values, 1), torch.cat(histograms), torch.cat(bounds))
