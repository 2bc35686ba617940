"""Splicing: SAEs and transcoders replace activations of a model inside a `with` block, and nowhere else.

A transcoder reads the input of an MLP and replaces its output. Where the text says SAE, it means both.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from sae_lora.config.enums import Hook, Reads
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.mlp_input import reading
from sae_lora.splice.positions import NOT_SPECIAL, OUTLIER, Special, exceeds_median


class Coder(Protocol):
    """The methods of an SAE that splicing uses; every sae-lens SAE has them."""

    def encode(self, x: Tensor) -> Tensor:
        """Latents `[..., d_sae]` of activations `[..., d_model]`."""
        ...

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction `[..., d_model]` of latents `[..., d_sae]`."""
        ...


@runtime_checkable
class SkipCoder(Protocol):
    """A coder whose output also depends on its input directly, as that of a skip transcoder."""

    def decode_with(self, feature_acts: Tensor, x: Tensor) -> Tensor:
        """Reconstruction `[..., d_model]` of latents `[..., d_sae]`, with what `x` adds."""
        ...


def decoded(coder: Coder, latents: Tensor, x: Tensor) -> Tensor:
    """The reconstruction `[..., d_model]` of latents `[..., d_sae]` of activations `[..., d_model]`."""
    if isinstance(coder, SkipCoder):
        return coder.decode_with(latents, x)
    return coder.decode(latents)


class Reading(NamedTuple):
    """Input, latents and output of an SAE in a forward pass, only at positions that it replaced."""

    hookpoint: str
    resid: Tensor
    """The activation that it replaces and should reconstruct, `[token, d_model]`: an SAE's input."""
    latents: Tensor
    """The latents, `[token, d_sae]`."""
    recon: Tensor
    """The SAE's output, `[token, d_model]`."""
    outlier: Tensor
    """True at tokens where what the SAE reads has a norm of more than `OUTLIER` times the median norm in
    their sequence, `[token]`."""


Observer = Callable[[Reading], None]
"""Called after each application of a spliced SAE."""


class Splice(NamedTuple):
    """An SAE at a place. Two splices are equal if all fields are, and the SAE is the same object."""

    block: int
    sae: Coder
    hook: Hook = Hook.resid_post
    """The activation of the block that the SAE replaces."""
    special: Special = NOT_SPECIAL
    """The positions that keep their activation."""
    tf32: bool = True
    """True if a GPU may encode a bfloat16 residual stream in TF32, as `sae.tf32`."""
    reads: Reads | None = None
    """The activation that a transcoder reads; `None`: an SAE reads what it replaces."""

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
    splices: Iterable[Splice],
    tokens: Tensor | None = None,
    observe: Observer | None = None,
    begins: Tensor | None = None,
) -> Iterator[None]:
    """Inside the `with` block, replace activations of the model with the SAEs' reconstructions.

    Gradients flow through the SAEs. All hooks are removed at the end of the block, also after an
    exception.

    Args:
        model: The language model.
        splices: The SAEs at their places. Each reads activations that earlier SAEs have changed.
        tokens: The tokens `[batch, pos]` of the forward pass, for the special positions; `None` if no
            SAE has special positions.
        observe: Called after each SAE.
        begins: As in `Special.positions`.

    Raises:
        ConfigError: For a place that the model does not have.
        UserError: If no module of the architecture outputs what attention or MLP adds.
    """
    with ExitStack() as hooks:
        for splice in splices:
            replace = partial(reconstructed, splice, tokens=tokens, observe=observe, begins=begins)
            if splice.reads is not None:
                read = hooks.enter_context(reading(model, splice.block, splice.reads))
                replace = partial(_transcoded, replace, read)
            module = model.module_at(splice.hookpoint)
            hooks.callback(module.register_forward_hook(partial(_replaced, replace)).remove)
        yield


def _transcoded(replace: Callable[..., Tensor], read: Callable[[], Tensor], resid: Tensor) -> Tensor:
    return replace(resid, x=read())


def _replaced(
    replace: Callable[[Tensor], Tensor], module: object, arguments: object, output: Any
) -> Any:
    """A module's output with its activation (the output, or the first of a tuple) replaced."""
    is_several = isinstance(output, tuple | list)
    return (replace(output[0]), *output[1:]) if is_several else replace(output)


def reconstructed(
    splice: Splice,
    resid: Tensor,
    tokens: Tensor | None = None,
    observe: Observer | None = None,
    begins: Tensor | None = None,
    x: Tensor | None = None,
) -> Tensor:
    """The activations `[batch, pos, d_model]` after the SAE. Other arguments are as in `spliced`.

    An SAE in training does not read kept positions: it must not learn from them, and BatchTopK
    distributes its active latents over all positions that it reads. A transcoder in training reads its
    target beside its input.

    Args:
        splice: The SAE at its place.
        resid: The activations that it replaces, `[batch, pos, d_model]`.
        x: The activations that it reads, in the same shape; `None`: those that it replaces.
    """
    x = resid if x is None else x
    keep = None
    if splice.special.exists:
        assert tokens is not None  # the rule is about tokens
        keep = splice.special.positions(tokens, x, begins)
    sae, is_training = splice.sae, getattr(splice.sae, "training", False)
    picked = ~keep if keep is not None and is_training else None
    inputs, targets = (x, resid) if picked is None else (x[picked], resid[picked])
    if splice.reads is not None and is_training:  # it learns from what it should write
        inputs = torch.cat([inputs, targets], -1)
    with _precision(inputs, splice.tf32 and not is_training):
        latents = sae.encode(inputs)
    recon = decoded(sae, latents, inputs).to(resid.dtype)
    if observe is not None:
        outlier = exceeds_median(x, OUTLIER)
        replaced = torch.ones_like(outlier) if keep is None else ~keep
        parts = [targets, latents, recon]
        if picked is None:
            parts = [part[replaced] for part in parts]
        observe(Reading(splice.hookpoint, *parts, outlier=outlier[replaced]))
    if keep is None:
        return recon
    if picked is not None:
        return resid.masked_scatter(picked[..., None], recon)
    return torch.where(keep[..., None], resid, recon)


@contextmanager
def _precision(inputs: Tensor, tf32: bool) -> Iterator[None]:
    """Inside the block, multiply float32 matrices on a GPU in TF32, if `tf32` allows it and the inputs
    are exact in it: a bfloat16 number has the exponents of float32 and 8 bits, a TF32 number 11 bits.
    """
    before = torch.get_float32_matmul_precision()
    is_exact = inputs.dtype is torch.bfloat16 and inputs.device.type == "cuda"
    if not (tf32 and is_exact and before == "highest"):
        yield
        return
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
