"""Notes about positions of sequences that hold most of the variance of an SAE's input."""

from collections.abc import Iterable

import torch
from torch import Tensor

from sae_lora.models.language_model import LanguageModel, observed
from sae_lora.splice.hooks import Splice
from sae_lora.splice.positions import variance_by_position

_MOST = 0.5
"""A position is noted if it holds more than this share of the variance."""
_SEQUENCES = 4
"""Largest number of sequences to measure: attention sinks are at the same positions in all of them."""


@torch.no_grad()
def dominant_positions(
    model: LanguageModel, splices: Iterable[Splice], tokens: Tensor
) -> dict[Splice, str]:
    """A note for each SAE whose input has more than half of its variance at one position.

    FVU, and the loss of an SAE in training, would measure little else than this position. One forward
    pass of the plain model measures all SAEs.

    Args:
        model: The plain model.
        splices: The SAEs. Their special positions are not measured.
        tokens: A batch of text, `[batch, pos]`.
    """
    tokens = tokens[:_SEQUENCES].to(model.device)
    distinct = set(splices)
    modules = {splice.hookpoint: model.module_at(splice.hookpoint) for splice in distinct}
    resids: dict[str, Tensor] = {}
    with observed(modules, resids.__setitem__):
        model.hidden(tokens)
    notes = {}
    for splice in distinct:
        resid = resids[splice.hookpoint]
        shares = variance_by_position(resid, ~splice.special.positions(tokens, resid))
        position = int(shares.argmax())
        if (share := float(shares[position])) > _MOST:
            advice = "sae.keep_first=true" if position == 0 else "sae.outlier_norm=10"
            notes[splice] = (
                f"{splice.hookpoint}: position {position} of the sequences holds {share:.1%} of the "
                f"variance of the SAE's input, and FVU measures little else; {advice} leaves it out"
            )
    return notes
