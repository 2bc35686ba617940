"""A probe of a loaded SAE: does it reconstruct each token alone, as the splice uses it?"""

from typing import Any

import torch
from torch import Tensor, nn

from sae_lora.common.errors import ConfigError, is_out_of_memory

_SEQUENCES, _POSITIONS = 2, 12
_ALONE = ((0, 1), (0, 6), (1, 11))
"""Sequence and position of the tokens that are also reconstructed alone."""
_SCALES = (-1.0, 1.5)
"""Decimal logarithms of the smallest and the largest norm of the probe's activations, per √d_in."""
_TOLERANCE = 1e-2
"""Relative error that is rounding, also where a GPU multiplies in TF32."""


def check_weights(sae: nn.Module, field: str, name: str) -> None:
    """Refuse an SAE with a weight that is no number.

    Args:
        sae: The SAE.
        field, name: The key that names the SAE, and its value, for the message.

    Raises:
        ConfigError: For NaN or infinity; names the weight.
    """
    for weight_name, weight in sae.state_dict().items():
        wrong = int((~weight.isfinite()).sum())
        if wrong:
            because = f"{wrong} of the {weight.numel()} values of {weight_name} are NaN or infinite"
            raise ConfigError(field, name, "an SAE whose weights are all numbers", because=because)


@torch.no_grad()
def check_coder(sae: Any, d_in: int, field: str, name: str) -> None:
    """Refuse an SAE that is not used as it was trained if a splice encodes and decodes with it.

    On random activations `[batch, pos, d_in]`, `decode(encode(x))` must be equal, apart from rounding,
    to the SAE's own forward pass, to a second decoding of the same latents, and to each token alone.

    Args:
        sae: The SAE, a module of SAELens.
        d_in: Width of its input.
        field, name: The key that names the SAE, and its value, for the message.

    Raises:
        ConfigError: Names what differs.
    """
    allowed = "an SAE that reconstructs each token by decode(encode(x)), from this token alone"

    def refuse(because: str) -> ConfigError:
        return ConfigError(field, name, allowed, because=because)

    weight = next(sae.parameters())
    # A generator of its own: runs must not depend on whether an SAE was probed.
    noise = torch.randn(_SEQUENCES, _POSITIONS, d_in, generator=torch.Generator().manual_seed(0))
    scales = torch.logspace(*_SCALES, _SEQUENCES * _POSITIONS).reshape(_SEQUENCES, _POSITIONS, 1)
    x = (noise * scales).to(weight)
    tolerance = max(_TOLERANCE, 30 * torch.finfo(weight.dtype).eps)

    def differ(first: Tensor, second: Tensor) -> bool:
        """True if most tokens differ. A single one may: rounding decides between equal latents."""
        size = first.float().norm(dim=-1) + second.float().norm(dim=-1)
        error = (first.float() - second.float()).norm(dim=-1)
        return bool((error <= tolerance * size).float().mean() < 0.5)  # NaN differs

    try:
        latents = sae.encode(x)
        recon, again = sae.decode(latents), sae.decode(latents)
        if recon.shape != x.shape:
            raise refuse(f"for activations {list(x.shape)} it returns {list(recon.shape)}")
        if not recon.isfinite().all():
            raise refuse("it returns NaN or infinity for ordinary activations")
        if differ(recon, again):
            raise refuse("decode gives another result for the same latents when it is called again")
        if differ(recon, sae(x)):
            raise refuse("decode(encode(x)) differs from the SAE's own forward pass")
        alone = [
            sae.decode(sae.encode(x[row : row + 1, place : place + 1]))[0, 0] for row, place in _ALONE
        ]
    except (RuntimeError, ValueError, AttributeError, IndexError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise refuse(f"it fails on activations {list(x.shape)}: {error}") from error
    together = [recon[row, place] for row, place in _ALONE]
    if differ(torch.stack(together), torch.stack(alone)):
        raise refuse("its reconstruction of a token depends on the other tokens of the batch")
