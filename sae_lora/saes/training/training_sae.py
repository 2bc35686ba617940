"""SAEs in training, in sae-lens's own classes: new, from a trained one, and as they are saved.

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
from sae_lora.saes.sparse import SparseSAE
from sae_lora.splice.hooks import Coder

_TRAINABLE = ("topk", "jumprelu", "standard", "gated")
"""Architectures of saved SAEs that can be trained on."""
_PENALTIES = {"jumprelu": "l0", "standard": "l1", "gated": "l1"}
"""sae-lens's name of the sparsity penalty, by architecture."""
_LEVELS = (8, 4, 2, 1)
"""The groups of a Matryoshka SAE are its first eighth, fourth, half, and all of it."""


def new(
    config: SAEConfig, choice: SAEChoice, d_in: int, device: torch.device, metadata: Mapping[str, Any]
) -> TrainingSAE[Any]:
    """An SAE before its first step, with sae-lens's own defaults.

    Its values come from torch's global random state on the CPU, and so are the same for any device.

    Args:
        config: Its architecture, and the weight of its sparsity penalty.
        choice: Its place, width and k. topk has k latents active per token, batchtopk and matryoshka as
            their mean over a batch. For jumprelu, k is the target of its penalty, which is then
            quadratic, as in Gemma Scope 2; with `None` that penalty counts active latents.
        d_in: Width of its input.
        device: Its device.
        metadata: Values about model and data for its own config. JSON-able; `exclude_special_tokens`
            says whether it will never see them.

    Raises:
        ConfigError: For a k that it cannot have.
    """
    name, width = config.architecture.name, choice.width
    assert width is not None
    values = _penalty(name, config.sparsity_coefficient)
    match config.architecture:
        case Architecture.topk:
            values["k"] = int(_active(config, choice))
        case Architecture.batchtopk:
            values["k"] = _active(config, choice)
        case Architecture.matryoshka:
            name = "matryoshka_batchtopk"  # sae-lens's name
            widths = [width // part for part in _LEVELS if part <= width]
            values |= {"k": _active(config, choice), "matryoshka_widths": widths}
        case Architecture.jumprelu if choice.l0 is not None:
            values |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": _active(config, choice)}
    kind, config_kind = get_sae_training_class(name)
    group = {"group_blocks": choice.group} if choice.group else {}
    about = SAEMetadata(hook_name=str(Place.of(choice)), **metadata, **group)
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
    """The config's values for the sparsity penalty, where the architecture has one."""
    name = _PENALTIES.get(architecture)
    return {} if name is None or coefficient is None else {f"{name}_coefficient": coefficient}


def trainable(loaded: Coder, sparsity_coefficient: float | None = None) -> TrainingSAE[Any]:
    """A float32 copy of a trained SAE that can be trained on, with sae-lens's own defaults.

    It gives what the original gives, and so does its inference form, apart from rounding where the
    original is not float32, or is a TopK SAE in units of its decoder's norms (divided by once more).
    An SAE that was BatchTopK or Matryoshka was saved as JumpReLU, and stays that.

    Args:
        loaded: The trained SAE of sae-lens, or a `SparseSAE` of it.
        sparsity_coefficient: Weight of its sparsity penalty, which a trained SAE does not state; `None`
            takes sae-lens's own.

    Raises:
        ConfigError: For an SAE that cannot be trained on.
    """
    sae: Any = loaded.sae if isinstance(loaded, SparseSAE) else loaded
    architecture = sae.cfg.architecture()
    if architecture not in _TRAINABLE:
        raise ConfigError("sae", architecture, f"to be trained on, an SAE that is {listed(_TRAINABLE)}")
    if _normalises(sae) and architecture in ("topk", "gated"):
        raise ConfigError(
            "sae",
            architecture,
            "to be trained on, an SAE that reads residuals as they are",
            because="it normalises what it reads, and its auxiliary loss in sae-lens does not",
        )
    values = {field.name: copy.deepcopy(getattr(sae.cfg, field.name)) for field in fields(sae.cfg)}
    values |= {"dtype": "float32", "device": "meta"} | _penalty(architecture, sparsity_coefficient)
    weights = {
        name: weight.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
        for name, weight in sae.state_dict().items()
    }
    if "threshold" in weights:
        # Below zero it is as at zero, but not in training, where sae-lens raises it at the first step.
        weights["threshold"].clamp_(min=0)
    kind, config_kind = get_sae_training_class(architecture)
    return _holding(kind, config_kind(**values), weights, sae.device)


class Forward(NamedTuple):
    """The forward pass of an SAE in training on one batch, with gradients.

    Args:
        latents: `[token, d_sae]`.
        recon: The reconstruction, `[token, d_in]`.
        mse: Its squared error, summed over d_in, mean over tokens.
        aux: The other terms of sae-lens's loss: sparsity penalties, dead latents that reconstruct the
            error, a gated SAE's reconstruction by its gates alone, the squared errors of a Matryoshka
            SAE's inner groups.
    """

    latents: Tensor
    recon: Tensor
    mse: Tensor
    aux: Tensor


def forward(sae: TrainingSAE[Any], resid: Tensor, dead: Tensor, step: int) -> Forward:
    """One forward pass as in sae-lens's training, for methods with other losses than it has.

    As in sae-lens, it also changes thresholds: a BatchTopK SAE's follows the batch, a JumpReLU SAE's is
    raised to zero.

    Args:
        sae: The SAE.
        resid: Its input, `[token, d_in]`; for a BatchTopK SAE, all tokens that share the k.
        dead: Latents `[d_sae]` (true) that count as dead.
        step: Steps taken before.
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
    """A frozen copy of the SAE, as sae-lens would load it once saved.

    Draws nothing from torch's random state. In training, the SAE's inputs are multiplied by the scale;
    the copy reads them as they are.

    Raises:
        UserError: For a scale other than 1 with an SAE that normalises what it reads.
    """
    if scale != 1:
        if _normalises(sae):
            raise UserError(f"an SAE that normalises what it reads cannot be scaled (by {scale:g}) too")
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
    """A second SAE in training, with copies of these weights and no parametrisation."""
    config = copy.deepcopy(sae.cfg)
    config.device = "meta"
    copies = {name: weight.detach().clone() for name, weight in weights.items()}
    return _holding(parametrize.type_before_parametrizations(sae), config, copies, sae.device)


def _holding(kind: Any, config: Any, weights: dict[str, Tensor], device: torch.device) -> Any:
    """An SAE with these weights. As when sae-lens loads an SAE, no random ones are drawn before."""
    with quiet():
        sae = kind(config)
    sae.load_state_dict(weights, assign=True)
    return sae.to(device)


def _normalises(sae: SAE[Any]) -> bool:
    return sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")
