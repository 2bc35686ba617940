"""An SAE in a model, exactly inside a `with` block."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_model]` of latents `[..., d_sae]`."""


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
    """Whether positions that hold special tokens keep their activation."""
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
            hook = _replacing(hookpoint, sae, keep, observe)
            handle = model.module_at(hookpoint).register_forward_hook(hook)
            hooks.callback(handle.remove)
        yield


def _replacing(hookpoint: str, sae: Coder, keep: Tensor | None, observe: Observer | None) -> Any:
    def hook(module: object, arguments: object, output: Any) -> Any:
        # Blocks and attentions return the activation alone, or as the first of a tuple.
        resid: Tensor = output[0] if isinstance(output, tuple) else output
        recon = reconstructed(hookpoint, sae, resid, keep, observe)
        return (recon, *output[1:]) if isinstance(output, tuple) else recon

    return hook


def reconstructed(
    hookpoint: str, sae: Coder, resid: Tensor, keep: Tensor | None, observe: Observer | None = None
) -> Tensor:
    """The residuals `[batch, pos, d_model]` after the SAE; the arguments are as in `spliced`."""
    if keep is not None and getattr(sae, "training", False):
        return _reconstructed_alone(hookpoint, sae, resid, keep, observe)
    latents = sae.encode(resid)
    recon = sae.decode(latents).to(resid.dtype)
    if observe is not None:
        applied = torch.ones_like(resid[..., 0], dtype=torch.bool) if keep is None else ~keep
        observe(Reading(hookpoint, resid[applied], latents[applied], recon[applied]))
    return recon if keep is None else torch.where(keep[..., None], resid, recon)


def _reconstructed_alone(
    hookpoint: str, sae: Coder, resid: Tensor, keep: Tensor, observe: Observer | None
) -> Tensor:
    """`reconstructed` for an SAE in training, which must not learn from positions that are kept.

    BatchTopK also divides its active latents among all positions that it reads.
    """
    applied = ~keep
    read = resid[applied]
    latents = sae.encode(read)
    recon = sae.decode(latents).to(resid.dtype)
    if observe is not None:
        observe(Reading(hookpoint, read, latents, recon))
    return resid.masked_scatter(applied[..., None], recon)


def kept_positions(tokens: Tensor, special_ids: Tensor, splices: Sequence[Splice]) -> Tensor | None:
    """Special positions `[batch, pos]` (true) where one of the splices keeps them; else `None`."""
    keeps = any(splice.keeps for splice in splices)
    return special_positions(tokens, special_ids) if keeps else None


def special_positions(tokens: Tensor, special_ids: Tensor) -> Tensor:
    """Positions of tokens `[batch, pos]` (true) that hold one of the special ids `[n]`."""
    return torch.isin(tokens, special_ids)
