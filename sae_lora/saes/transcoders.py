"""Transcoders as a splice uses them, and a check of the activation that they read."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Reads
from sae_lora.models.language_model import LanguageModel, observed
from sae_lora.splice.hooks import Splice, decoded
from sae_lora.splice.mlp_input import check_inputs, mlp_of, reading


class SkipTranscoder(nn.Module):
    """A frozen transcoder of sae-lens with its skip connection, which `decode` of sae-lens leaves out.

    Args:
        sae: The transcoder, or a `SparseSAE` of it.
        skip: The linear map from its input to its output, `[d_out, d_in]`.
    """

    def __init__(self, sae: nn.Module, skip: Tensor) -> None:
        super().__init__()
        self.sae: Any = sae
        self._skip = skip

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The part of the output that comes from latents, `[..., d_model]`."""
        return self.sae.decode(feature_acts)

    def decode_with(self, feature_acts: Tensor, x: Tensor) -> Tensor:
        return self.sae.decode(feature_acts) + x.to(self._skip.dtype) @ self._skip.T


def with_skip(sae: nn.Module, original: Any) -> nn.Module:
    """The module, with the skip connection of the sae-lens module that it was made of, if it has one."""
    skip = getattr(original, "W_skip", None)
    return sae if skip is None else SkipTranscoder(sae, skip).eval()


_CLEARLY = 1.25
"""Another activation is the right one if the FVU at the stated one is this multiple of its FVU."""
_RAW = "the output of the MLP before the norm after it"


@torch.no_grad()
def check_readings(model: LanguageModel, splices: Iterable[Splice], tokens: Tensor) -> None:
    """Refuse transcoders that reconstruct real activations better from another activation than stated.

    Libraries differ in what they call the input of an MLP: before or after its norm, with the norm's
    weight or without.

    Args:
        model: The plain model.
        splices: SAEs and transcoders; SAEs are not checked.
        tokens: A few sequences of text, `[batch, pos]`.

    Raises:
        ConfigError: For such a transcoder; names the activation that fits.
    """
    transcoders = [splice for splice in splices if splice.reads is not None]
    check_inputs(model, [splice.block for splice in transcoders])
    for splice in transcoders:
        assert splice.reads is not None
        fvu = _fvus(model, splice, tokens.to(model.device))
        stated = fvu[splice.reads.name, splice.hook.name]
        (reads, writes), least = min(fvu.items(), key=lambda item: item[1])
        if stated <= _CLEARLY * least:
            continue
        measured = f"its FVU on this model's text is {stated:.3g} from {splice.reads.name}"
        if writes == _RAW:
            because = f"{measured}, and {least:.3g} from {reads} if it reconstructs {_RAW}"
            allowed = "a transcoder of what the MLP adds to the residual stream"
            raise ConfigError("sae", f"the transcoder at block {splice.block}", allowed, None, because)
        because = f"{measured}, and {least:.3g} from {reads}"
        allowed = "the activation that it was trained on"
        raise ConfigError("layer.reads", splice.reads.name, allowed, reads, because)


def _fvus(model: LanguageModel, splice: Splice, tokens: Tensor) -> dict[tuple[str, str], float]:
    """FVU of a transcoder for each activation that it may read, and each output that it may write."""
    outputs: dict[str, Tensor] = {}
    modules = {splice.hook.name: model.module_at(splice.hookpoint)}
    if (raw := mlp_of(model, splice.block)) is not modules[splice.hook.name]:
        modules[_RAW] = raw
    with ExitStack() as hooks:
        inputs = {each: hooks.enter_context(reading(model, splice.block, each)) for each in Reads}
        hooks.enter_context(observed(modules, outputs.__setitem__))
        model.resid_entering(splice.block + 1, tokens)
    errors = {}
    for reads, read in inputs.items():
        x = read()
        counted = ~splice.special.positions(tokens, x)
        recon = decoded(splice.sae, splice.sae.encode(x), x)[counted].double()
        for name, output in outputs.items():
            target = output[counted].double()
            variance = (target - target.mean(0)).square().sum()
            errors[reads.name, name] = float((target - recon).square().sum() / variance)
    return errors
