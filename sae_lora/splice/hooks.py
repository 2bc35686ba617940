"""Splicing: SAEs replace activations of a model inside a `with` block, and nowhere else."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae_lora.config.enums import Hook
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel


class Coder(Protocol):
    """The methods of an SAE that splicing uses; every sae-lens SAE has them."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[..., d_sae]` of activations `[..., d_model]`."""
        ...

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_model]` of latents `[..., d_sae]`."""
        ...


class Reading(NamedTuple):
    """Input, latents and output of an SAE in a forward pass, only at positions that it replaced."""

    hookpoint: str
    resid: Tensor
    """The SAE's input, `[token, d_model]`."""
    latents: Tensor
    """The latents, `[token, d_sae]`."""
    recon: Tensor
    """The SAE's output, `[token, d_model]`."""


Observer = Callable[[Reading], None]
"""Called after each application of a spliced SAE."""


class Splice(NamedTuple):
    """An SAE at a place. Two splices are equal if all fields are, and the SAE is the same object."""

    block: int
    sae: Coder
    keeps: bool
    """True if positions of special tokens keep their activation."""
    hook: Hook = Hook.resid_post
    """The activation of the block that the SAE replaces."""

    @property
    def place(self) -> Place:
        return Place(self.block, self.hook)

    @property
    def hookpoint(self) -> str:
        """The place as a name: `blocks.3.hook_resid_post`."""
        return str(self.place)


@contextmanager
def spliced(
    model: LanguageModel,
    saes: Mapping[str, Coder],
    keep: Tensor | None = None,
    observe: Observer | None = None,
) -> Iterator[None]:
    """Inside the `with` block, replace activations of the model with the SAEs' reconstructions.

    Gradients flow through the SAEs. All hooks are removed at the end of the block, also after an
    exception.

    Args:
        model: The language model.
        saes: SAEs by hookpoint. Each reads activations that earlier SAEs have changed.
        keep: Positions `[batch, pos]` (true) that keep their activation; `None` keeps none.
        observe: Called after each SAE.

    Raises:
        ConfigError: For a hookpoint that the model does not have.
        UserError: If no module of the architecture outputs what attention or MLP adds.
    """
    with ExitStack() as hooks:
        for hookpoint, sae in saes.items():
            replace = partial(reconstructed, hookpoint, sae, keep=keep, observe=observe)
            handle = model.module_at(hookpoint).register_forward_hook(partial(_replaced, replace))
            hooks.callback(handle.remove)
        yield


def _replaced(
    replace: Callable[[Tensor], Tensor], module: object, arguments: object, output: Any
) -> Any:
    """A module's output with its activation (the output, or the first of a tuple) replaced."""
    return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)


def reconstructed(
    hookpoint: str, sae: Coder, resid: Tensor, keep: Tensor | None, observe: Observer | None = None
) -> Tensor:
    """The activations `[batch, pos, d_model]` after the SAE. Arguments are as in `spliced`.

    An SAE in training does not read kept positions: it must not learn from them, and BatchTopK
    distributes its active latents over all positions that it reads.
    """
    if keep is not None and getattr(sae, "training", False):
        inputs = resid[~keep]
        latents = sae.encode(inputs)
        recon = sae.decode(latents).to(resid.dtype)
        if observe is not None:
            observe(Reading(hookpoint, inputs, latents, recon))
        return resid.masked_scatter(~keep[..., None], recon)
    latents = sae.encode(resid)
    recon = sae.decode(latents).to(resid.dtype)
    if observe is not None:
        applied = torch.ones_like(resid[..., 0], dtype=torch.bool) if keep is None else ~keep
        observe(Reading(hookpoint, resid[applied], latents[applied], recon[applied]))
    return recon if keep is None else torch.where(keep[..., None], resid, recon)


def kept_positions(tokens: Tensor, special_ids: Tensor, splices: Sequence[Splice]) -> Tensor | None:
    """Positions of special tokens `[batch, pos]` (true) if a splice keeps them; else `None`."""
    keeps = any(splice.keeps for splice in splices)
    return special_positions(tokens, special_ids) if keeps else None


def special_positions(tokens: Tensor, special_ids: Tensor) -> Tensor:
    """Positions `[batch, pos]` (true) of tokens `[batch, pos]` that are one of the special ids `[n]`."""
    return torch.isin(tokens, special_ids)
