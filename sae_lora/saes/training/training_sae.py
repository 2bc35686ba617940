"""SAEs in training, in sae-lens's classes: new SAEs, trainable copies of loaded SAEs, and saving.

Units: an SAE in training may read residuals times a factor, its scale. A saved SAE reads them unscaled.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import sae_lens
import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata, TrainCoefficientConfig, TrainStepInput
from torch import Tensor
from torch.nn.utils import parametrize

from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.config.enums import Architecture
from sae_lora.config.schema import SAEChoice, SAEConfig
from sae_lora.models.hookpoints import Place
from sae_lora.saes.loading import quiet
from sae_lora.saes.places import TRANSCODERS, hooks_of
from sae_lora.saes.sparse import SparseSAE
from sae_lora.saes.training.training_transcoder import CLASSES
from sae_lora.saes.transcoders import SkipTranscoder
from sae_lora.splice.hooks import Coder

_TRAINABLE = ("topk", "jumprelu", "standard", "gated", *TRANSCODERS)
"""Architectures of saved SAEs that can be trained further."""
_PENALTIES = {"jumprelu": "l0", "standard": "l1", "gated": "l1"} | {
    name: "l0" if "jumprelu" in name else "l1" for name in TRANSCODERS
}
"""sae-lens's name of the sparsity penalty, by architecture."""
_LEVELS = (8, 4, 2, 1)
"""The groups of a Matryoshka SAE: the first eighth, quarter and half of its latents, and all latents."""


def new(
    config: SAEConfig, choice: SAEChoice, d_in: int, device: torch.device, metadata: Mapping[str, Any]
) -> TrainingSAE[Any]:
    """An SAE before its first step, with sae-lens's defaults.

    Its values come from torch's global random state on the CPU, so that they are the same for any
    device.

    Args:
        config: Architecture of the SAE and weight of its sparsity penalty.
        choice: Place, width and L0 of the SAE; the L0 is called k here. topk has k active latents per
            token, batchtopk and matryoshka have k on average over a batch. For jumprelu, k is the target
            of its penalty, which is then quadratic, as in Gemma Scope 2; if it is `None`, the penalty is
            proportional to the number of active latents.
        d_in: Width of its input and its output.
        device: Its device.
        metadata: JSON-able values about model and data, for the SAE's config; `exclude_special_tokens`
            is true if the SAE is not trained on special tokens.

    Raises:
        ConfigError: If the SAE cannot have this k.
    """
    name, width = config.architecture.name, choice.width
    assert width is not None
    values = _penalty(name, config.sparsity_coefficient)
    match config.architecture:
        case Architecture.topk:
            values["k"] = int(_active(config, choice))
        case Architecture.batchtopk | Architecture.batchtopk_transcoder:
            values["k"] = _active(config, choice)
        case Architecture.matryoshka:
            name = "matryoshka_batchtopk"  # sae-lens's name
            widths = [width // part for part in _LEVELS if part <= width]
            values |= {"k": _active(config, choice), "matryoshka_widths": widths}
        case Architecture.jumprelu if choice.l0 is not None:
            values |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": _active(config, choice)}
    if choice.reads is None:
        kind, config_kind = get_sae_training_class(name)
        hooks = {"hook_name": str(Place.of(choice))}
    else:
        latents = "standard" if config.architecture is Architecture.transcoder else "batchtopk"
        kind, config_kind = CLASSES[latents]
        values |= {"d_out": d_in, "skip": config.skip, "apply_b_dec_to_input": False}
        hooks = hooks_of(choice.block, choice.reads)
    group = {"group_blocks": choice.group} if choice.group else {}
    about = SAEMetadata(**hooks, **metadata, **group)
    with quiet():
        return kind(config_kind(d_in=d_in, d_sae=width, metadata=about, **values)).to(device)


def _active(config: SAEConfig, choice: SAEChoice) -> float:
    k, whole = choice.l0, config.architecture is Architecture.topk
    assert choice.width is not None
    if k is None or not 0 < k <= choice.width or (whole and k != int(k)):
        kind = "a whole number from 1" if whole else "a number above 0"
        allowed = f"{kind} to {choice.width}, for the {config.architecture.name} SAE"
        raise ConfigError("sae.l0", k, allowed)
    return k


def _penalty(architecture: str, coefficient: float | None) -> dict[str, Any]:
    """The config's values for the sparsity penalty; empty if the architecture has none."""
    name = _PENALTIES.get(architecture)
    return {} if name is None or coefficient is None else {f"{name}_coefficient": coefficient}


def trainable(loaded: Coder, sparsity_coefficient: float | None = None) -> TrainingSAE[Any]:
    """A trainable float32 copy of a trained SAE, with sae-lens's defaults.

    The copy and its inference form compute the same as the original. They may differ by rounding if the
    original is not float32, or if it is a TopK SAE with `rescale_acts_by_decoder_norm` (one more
    division by the norms). An SAE that was BatchTopK or Matryoshka was saved as JumpReLU and stays
    JumpReLU.

    Args:
        loaded: The trained SAE of sae-lens, or a `SparseSAE` of it.
        sparsity_coefficient: Weight of its sparsity penalty, which a saved SAE does not state; `None`
            takes sae-lens's default.

    Raises:
        ConfigError: If the SAE cannot be trained further.
    """
    sae: Any = loaded
    while isinstance(sae, SparseSAE | SkipTranscoder):
        sae = sae.sae
    architecture = sae.cfg.architecture()
    if architecture not in _TRAINABLE:
        allowed = f"an SAE of architecture {listed(_TRAINABLE)}, to train it further"
        raise ConfigError("sae", architecture, allowed)
    if _normalises(sae) and architecture in ("topk", "gated"):
        raise ConfigError(
            "sae",
            architecture,
            "an SAE that does not normalise its input, to train it further",
            because="it normalises its input, and sae-lens's auxiliary loss does not",
        )
    values = {field.name: copy.deepcopy(getattr(sae.cfg, field.name)) for field in fields(sae.cfg)}
    values |= {"dtype": "float32", "device": "meta"} | _penalty(architecture, sparsity_coefficient)
    weights = {
        name: weight.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
        for name, weight in sae.state_dict().items()
    }
    if "threshold" in weights:
        # A negative threshold acts like zero in inference, but sae-lens's training sets it to zero.
        weights["threshold"].clamp_(min=0)
    if architecture in TRANSCODERS:
        kind, config_kind = CLASSES["jumprelu" if "jumprelu" in architecture else "standard"]
        values["skip"] = "W_skip" in weights
        weights["target_scale"] = torch.ones((), dtype=torch.float64, device=sae.device)
    else:
        kind, config_kind = get_sae_training_class(architecture)
    return _holding(kind, config_kind(**values), weights, sae.device)


class Forward(NamedTuple):
    """The forward pass of an SAE in training on one batch, with gradients.

    Args:
        latents: `[token, d_sae]`.
        recon: The reconstruction, `[token, d_in]`.
        mse: Its squared error, summed over d_in, mean over tokens.
        aux: The other terms of sae-lens's loss, summed: sparsity penalties, the error of dead latents
            that reconstruct the residual error, a gated SAE's reconstruction from its gates only, the
            squared errors of a Matryoshka SAE's inner groups.
    """

    latents: Tensor
    recon: Tensor
    mse: Tensor
    aux: Tensor


def forward(sae: TrainingSAE[Any], resid: Tensor, dead: Tensor, step: int) -> Forward:
    """One forward pass as in sae-lens's training, for methods that combine the losses differently.

    As in sae-lens, it also changes thresholds: that of a BatchTopK SAE follows the batch, that of a
    JumpReLU SAE is raised to zero if it is negative.

    Args:
        sae: The SAE.
        resid: Its input, `[token, d_in]`, or a transcoder's input and target, `[token, d_in + d_out]`.
            For BatchTopK, all tokens that share the k.
        dead: True for the latents that count as dead, `[d_sae]`.
        step: Number of steps taken before.
    """
    output = sae.training_forward_pass(
        TrainStepInput(
            sae_in=resid.to(sae.dtype),
            coefficients=coefficients(sae),
            dead_neuron_mask=dead,
            n_training_steps=step,
            is_logging_step=False,
        )
    )
    losses = dict(output.losses)
    mse = losses.pop("mse_loss")
    return Forward(output.feature_acts, output.sae_out, mse, torch.stack([*losses.values()]).sum())


def coefficients(sae: TrainingSAE[Any]) -> dict[str, float]:
    """The weights of the sparsity penalties, by sae-lens's name."""
    return {
        name: value.value if isinstance(value, TrainCoefficientConfig) else value
        for name, value in sae.get_coefficients().items()
    }


@torch.no_grad()
def inference(sae: TrainingSAE[Any], scale: float = 1.0) -> SAE[Any]:
    """A frozen copy of the SAE, as sae-lens would load it after saving.

    Draws nothing from torch's random state. In training, the SAE's inputs are multiplied by the scale;
    the copy reads them unscaled.

    Raises:
        UserError: If the scale is not 1 and the SAE normalises its input.
    """
    if scale != 1:
        if _normalises(sae):
            raise UserError(f"an SAE that normalises its input cannot be scaled as well (by {scale:g})")
        sae = copy.deepcopy(sae)
        sae.fold_activation_norm_scaling_factor(scale)
    weights = dict(sae.state_dict())
    sae.process_state_dict_for_saving_inference(weights)
    config = sae_lens.SAEConfig.from_dict(copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict()))
    config.device = "meta"
    kind, _ = get_sae_class(config.architecture())
    copies = {name: weight.clone() for name, weight in weights.items()}
    return _holding(kind, config, copies, sae.device).requires_grad_(False).eval()


def save(sae: TrainingSAE[Any], folder: Path, scale: float = 1.0) -> None:
    """Write the result of `inference` in sae-lens's format into a folder that need not exist."""
    inference(sae, scale).to("cpu", torch.float32).save_model(folder)


def rebuilt(sae: TrainingSAE[Any], weights: Mapping[str, Tensor]) -> TrainingSAE[Any]:
    """Another SAE in training with the same config, copies of `weights`, and no parametrisation."""
    config = copy.deepcopy(sae.cfg)
    config.device = "meta"
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    return _holding(parametrize.type_before_parametrizations(sae), config, copies, sae.device)


def _holding(kind: Any, config: Any, weights: dict[str, Tensor], device: torch.device) -> Any:
    """An SAE with these weights. As when sae-lens loads an SAE, no random weights are drawn."""
    with quiet():
        sae = kind(config)
    sae.load_state_dict(weights, assign=True)
    return sae.to(device)


def _normalises(sae: SAE[Any]) -> bool:
    return sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")
