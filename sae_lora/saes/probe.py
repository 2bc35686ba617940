"""Checks of an SAE's weights, and a probe: does it reconstruct each token alone, as it is spliced?"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sae_lora.common.errors import ConfigError, is_out_of_memory
from sae_lora.saes.formats.configs import DICTIONARY_LEARNING
from sae_lora.saes.formats.folder import read
from sae_lora.saes.formats.tensors import weights_of
from sae_lora.saes.transcoders import with_skip
from sae_lora.splice.hooks import decoded

_SMALL = 64 * 2**20
"""Size of a file of weights up to which a dry run reads its values, in bytes."""
_SEQUENCES, _POSITIONS = 2, 12
_ALONE = ((0, 1), (0, 6), (1, 11))
"""Sequence and position of the tokens that are also reconstructed alone."""
_SCALES = (-1.0, 1.5)
"""Decimal logarithms of the smallest and the largest norm of the probe's activations, per √d_in."""
_TOLERANCE = 1e-2
"""Relative error that is rounding, also where a GPU multiplies in TF32."""


def check_file(path: str) -> None:
    """Refuse a folder whose weights cannot be used, as far as this is quick, without SAELens.

    The header of a safetensors file must have been checked. A large file is not read for NaN.

    Raises:
        ConfigError: If a weight does not fit the config, or is no number.
        UserError: If the file is damaged.
    """
    folder = read(path)
    is_small = folder.weights.stat().st_size <= _SMALL
    if is_small or folder.format is DICTIONARY_LEARNING:  # others have a header, which the plan read
        weights = weights_of(folder)
        if is_small:
            check_weights(weights, folder.values, "sae.path", path)


def check_weights(
    weights: Mapping[str, Tensor], values: Mapping[str, Any], field: str, name: str
) -> None:
    """Refuse an SAE with a weight that is no number, and one that divides by zero.

    Args:
        weights: The weights of the SAE, by SAELens's names.
        values: Its config.
        field, name: The key that names the SAE, and its value, for the message.

    Raises:
        ConfigError: For such weights; names them.
    """
    for weight_name, weight in weights.items():
        wrong = int((~weight.isfinite()).sum())
        if wrong:
            because = f"{wrong} of the {weight.numel()} values of {weight_name} are NaN or infinite"
            raise ConfigError(field, name, "an SAE whose weights are all numbers", because=because)
    if values.get("rescale_acts_by_decoder_norm"):
        zero = int((weights["W_dec"] == 0).all(dim=-1).sum())
        if zero:
            because = f"{zero} rows of W_dec are zero, and rescale_acts_by_decoder_norm divides by norms"
            allowed = "an SAE whose latents all have a direction in W_dec"
            raise ConfigError(field, name, allowed, because=because)


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

    coder: Any = with_skip(sae, sae)

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
        latents = coder.encode(x)
        recon, again = decoded(coder, latents, x), decoded(coder, latents, x)
        if recon.shape != x.shape:
            raise refuse(f"for activations {list(x.shape)} it returns {list(recon.shape)}")
        if not recon.isfinite().all():
            raise refuse("it returns NaN or infinity for ordinary activations")
        if differ(recon, again):
            raise refuse("decode gives another result for the same latents when it is called again")
        if differ(recon, sae(x)):
            raise refuse("decode(encode(x)) differs from the SAE's own forward pass")
        tokens = [x[row : row + 1, place : place + 1] for row, place in _ALONE]
        alone = [decoded(coder, coder.encode(token), token)[0, 0] for token in tokens]
    except (RuntimeError, ValueError, AttributeError, IndexError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise refuse(f"it fails on activations {list(x.shape)}: {error}") from error
    together = [recon[row, place] for row, place in _ALONE]
    if differ(torch.stack(together), torch.stack(alone)):
        raise refuse("its reconstruction of a token depends on the other tokens of the batch")
