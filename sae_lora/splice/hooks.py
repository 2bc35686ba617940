"""An SAE in a model, exactly inside a `with` block."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sae_lora.config.enums import Hook
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel


class Coder(Protocol):
    """What splicing asks of an SAE; every sae-lens SAE has it."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[..., d_sae]` of residuals `[..., d_model]`."""
        ...

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_model]` of latents `[..., d_sae]`."""
        ...


class Reading(NamedTuple):
    """What one SAE saw and did in one forward pass, at the positions where it applied.

    Args:
        hookpoint: Where it sits.
        resid: What it read, `[token, d_model]`.
        latents: Its code, `[token, d_sae]`.
        recon: What it put back, `[token, d_model]`.
    """

    hookpoint: str
    resid: Tensor
    latents: Tensor
    recon: Tensor


class Observer(Protocol):
    """Called with a `Reading` each time a spliced SAE has been applied."""

    def __call__(self, reading: Reading, /) -> None: ...


class Splice(NamedTuple):
    """An SAE at its place. Two are the same where the SAE is the same object.

    Args:
        block: The block of which it replaces something.
        sae: The SAE.
        keeps: Whether positions that hold special tokens keep their activation.
        hook: What it replaces: by default the block's output.
    """

    block: int
    sae: Coder
    keeps: bool
    hook: Hook = Hook.resid_post

    @property
    def place(self) -> Place:
        """Where it sits."""
        return Place(self.block, self.hook)

    @property
    def hookpoint(self) -> str:
        """The same in the field's words."""
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
        observe: Called after each SAE, for measuring what it does.

    Raises:
        ConfigError: For a hookpoint that the model does not have.
        UserError: For one inside of blocks in which what they add cannot be told apart.
    """
    with ExitStack() as hooks:
        for hookpoint, sae in saes.items():
            hook = _replacing(hookpoint, sae, keep, observe)
            handle = model.module_at(hookpoint).register_forward_hook(hook)
            hooks.callback(handle.remove)
        yield


def _replacing(hookpoint: str, sae: Coder, keep: Tensor | None, observe: Observer | None) -> Any:
    def hook(module: object, arguments: object, output: Any) -> Any:
        # Blocks and attentions return what is meant alone, or as the first of a tuple.
        resid: Tensor = output[0] if isinstance(output, tuple) else output
        recon = reconstructed(hookpoint, sae, resid, keep, observe)
        return (recon, *output[1:]) if isinstance(output, tuple) else recon

    return hook


def reconstructed(
    hookpoint: str, sae: Coder, resid: Tensor, keep: Tensor | None, observe: Observer | None = None
) -> Tensor:
    """What the SAE puts in the place of the residuals `[batch, pos, d_model]`.

    Args:
        hookpoint: Where it sits, for the observer.
        sae: The SAE.
        resid: What it reads.
        keep: Positions `[batch, pos]` (true) that keep their activation; `None` keeps none.
        observe: Called with what the SAE read and did.
    """
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
    """The same for an SAE in training, which is not to learn from positions where it does not apply.

    BatchTopK's active latents are also shared out among all that it is given.
    """
    applied = ~keep
    read = resid[applied]
    latents = sae.encode(read)
    recon = sae.decode(latents).to(resid.dtype)
    if observe is not None:
        observe(Reading(hookpoint, read, latents, recon))
    return resid.masked_scatter(applied[..., None], recon)


@contextmanager
def residual_streams(model: LanguageModel) -> Iterator[list[Tensor]]:
    """A list to which a forward pass adds the residual stream after each block, `[batch, pos, d_model]`.

    Inside of `spliced` that is what the next block reads: after the SAE, where one replaces it.
    """
    found: list[Tensor] = []

    def take(module: object, arguments: object, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for block in model.blocks:
            hooks.callback(block.register_forward_hook(take).remove)
        yield found


def kept_positions(tokens: Tensor, special_ids: Tensor, splices: Sequence[Splice]) -> Tensor | None:
    """Positions that keep their activation, `[batch, pos]` (true); `None` where all are replaced.

    Args:
        tokens: `[batch, pos]`.
        special_ids: Ids `[n]` whose positions some splices keep.
        splices: The SAEs in place.
    """
    keeps = any(splice.keeps for splice in splices)
    return special_positions(tokens, special_ids) if keeps else None


def special_positions(tokens: Tensor, special_ids: Tensor) -> Tensor:
    """Positions `[batch, pos]` (true) whose token is one of the special ids `[n]`."""
    return torch.isin(tokens, special_ids)
