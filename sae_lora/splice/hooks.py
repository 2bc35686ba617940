"""An SAE in a model, exactly inside a `with` block."""

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
    """The part of an SAE that splicing needs; every sae-lens SAE has it."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[..., d_sae]` of residuals `[..., d_model]`."""
        ...

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_model]` of latents `[..., d_sae]`."""
        ...


class Reading(NamedTuple):
    """Input, latents and output of one SAE in one forward pass, at the positions where it applied."""

    hookpoint: str
    resid: Tensor
    """Its input, `[token, d_model]`."""
    latents: Tensor
    """Its code, `[token, d_sae]`."""
    recon: Tensor
    """Its output, `[token, d_model]`."""


Observer = Callable[[Reading], None]
"""Called each time a spliced SAE has been applied."""


class Splice(NamedTuple):
    """An SAE at its place. Two are the same where the SAE is the same object."""

    block: int
    sae: Coder
    keeps: bool
    """True where positions that hold special tokens keep their activation."""
    hook: Hook = Hook.resid_post
    """The activation of the block that it replaces."""

    @property
    def place(self) -> Place:
        return Place(self.block, self.hook)

    @property
    def hookpoint(self) -> str:
        """Its place in the field's words."""
        return str(self.place)


@contextmanager
def spliced(
    model: LanguageModel,
    saes: Mapping[str, Coder],
    keep: Tensor | None = None,
    observe: Observer | None = None,
) -> Iterator[None]:
    """The model with the SAEs' reconstructions in place of its activations, inside the block only.

    Gradients flow through the SAEs. When the block is left, also by an exception, no hook remains.

    Args:
        model: The language model.
        saes: SAE by hookpoint. Each reads what the ones before it have changed.
        keep: Positions `[batch, pos]` (true) that keep their activation; `None` keeps none.
        observe: Called after each SAE.

    Raises:
        ConfigError: For a hookpoint that the model does not have.
        UserError: For a hookpoint inside a block in which no module gives the block's addition.
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
    """A module's output with its activation replaced, which comes alone or as the first of a tuple."""
    return (replace(output[0]), *output[1:]) if isinstance(output, tuple) else replace(output)


def reconstructed(
    hookpoint: str, sae: Coder, resid: Tensor, keep: Tensor | None, observe: Observer | None = None
) -> Tensor:
    """The residuals `[batch, pos, d_model]` after the SAE; the arguments are as in `spliced`.

    An SAE in training does not read positions that are kept: it must not learn from them, and BatchTopK
    divides its active latents among all positions that it reads.
    """
    if keep is not None and getattr(sae, "training", False):
        read = resid[~keep]
        latents = sae.encode(read)
        recon = sae.decode(latents).to(resid.dtype)
        if observe is not None:
            observe(Reading(hookpoint, read, latents, recon))
        return resid.masked_scatter(~keep[..., None], recon)
    latents = sae.encode(resid)
    recon = sae.decode(latents).to(resid.dtype)
    if observe is not None:
        applied = torch.ones_like(resid[..., 0], dtype=torch.bool) if keep is None else ~keep
        observe(Reading(hookpoint, resid[applied], latents[applied], recon[applied]))
    return recon if keep is None else torch.where(keep[..., None], resid, recon)


def kept_positions(tokens: Tensor, special_ids: Tensor, splices: Sequence[Splice]) -> Tensor | None:
    """Special positions `[batch, pos]` (true) where one of the splices keeps them; else `None`."""
    keeps = any(splice.keeps for splice in splices)
    return special_positions(tokens, special_ids) if keeps else None


def special_positions(tokens: Tensor, special_ids: Tensor) -> Tensor:
    """Positions of tokens `[batch, pos]` (true) that hold one of the special ids `[n]`."""
    return torch.isin(tokens, special_ids)
