"""SAEs in training, in sae-lens's own classes: anew or from a trained one, and what becomes of them.

Units: an SAE in training may read residuals times a factor, its scale. What is saved reads them as the
model has them.
"""

import copy
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata, TrainCoefficientConfig, TrainStepInput
from sae_lens.training.optim import CoefficientScheduler
from torch import Tensor
from torch.nn.utils import parametrize

from sae_lora.common.errors import ConfigError, UserError, listed
from sae_lora.config.enums import Architecture
from sae_lora.saes.loading import quiet

_TRAINABLE: dict[str, type[TrainingSAEConfig]] = {
    "topk": TopKTrainingSAEConfig,
    "jumprelu": JumpReLUTrainingSAEConfig,
    "standard": StandardTrainingSAEConfig,
    "gated": GatedTrainingSAEConfig,
}
"""By the architecture that a trained SAE is saved as: what it is trained on as."""
_PENALTIES = {"jumprelu": "l0", "standard": "l1", "gated": "l1"}
"""By architecture: sae-lens's name of the sparsity penalty."""
_LEVELS = (8, 4, 2, 1)
"""The groups of a Matryoshka SAE are its first eighth, fourth, half, and all of it."""


class SAERequest(NamedTuple):
    """One SAE to train.

    Args:
        hookpoint: What it reconstructs, as its own config will say.
        architecture: What kind of SAE.
        d_in: Width of what it reads.
        width: Number of latents.
        k: Latents active per token: a whole number for topk, the mean over a batch for batchtopk and
            matryoshka. What the penalty of jumprelu pulls towards, quadratically, as in Gemma Scope 2;
            `None` has it count active latents. The others do not read it.
        sparsity_coefficient: Weight of the sparsity penalty of jumprelu (L0), standard and gated (L1);
            `None` takes sae-lens's own. The others do not read it.
        warm_up_steps: Steps over which that weight rises from zero.
    """

    hookpoint: str
    architecture: Architecture
    d_in: int
    width: int
    k: float | None = None
    sparsity_coefficient: float | None = None
    warm_up_steps: int = 0


def new(request: SAERequest, device: torch.device, metadata: Mapping[str, Any]) -> TrainingSAE[Any]:
    """An SAE before its first step, otherwise as sae-lens has it by default.

    Its values come from torch's global random state on the CPU, and so are the same for any device.

    Args:
        request: What to make.
        device: Where.
        metadata: What its own config says of model and data, besides the hookpoint. JSON-able;
            `exclude_special_tokens` says whether it will never see them.

    Raises:
        ConfigError: For a k that it cannot have.
    """
    about = SAEMetadata(hook_name=request.hookpoint, **metadata)
    shape: dict[str, Any] = {"d_in": request.d_in, "d_sae": request.width, "metadata": about}
    match request.architecture:
        case Architecture.topk:
            config = TopKTrainingSAEConfig(**shape, k=int(_active(request)))
        case Architecture.batchtopk:
            config = BatchTopKTrainingSAEConfig(**shape, k=_active(request))
        case Architecture.matryoshka:
            widths = [request.width // part for part in _LEVELS if part <= request.width]
            config = MatryoshkaBatchTopKTrainingSAEConfig(
                **shape, k=_active(request), matryoshka_widths=widths
            )
        case Architecture.jumprelu | Architecture.standard | Architecture.gated as kind:
            penalty = _penalty(kind.name, request.sparsity_coefficient, request.warm_up_steps)
            if kind is Architecture.jumprelu and request.k is not None:
                penalty |= {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": _active(request)}
            config = _TRAINABLE[kind.name](**shape, **penalty)
        case _:
            raise NotImplementedError(request.architecture)
    made_by: Any = TrainingSAE.get_sae_class_for_architecture(config.architecture())
    with quiet():
        return made_by(config).to(device)


def _active(request: SAERequest) -> float:
    k, whole = request.k, request.architecture is Architecture.topk
    if k is None or not 0 < k <= request.width or (whole and k != int(k)):
        kind = "a whole number from 1" if whole else "a number above 0"
        raise ConfigError(
            "sae.l0", k, f"{kind} to {request.width}, for the {request.architecture.name} SAE"
        )
    return k


def _penalty(architecture: str, coefficient: float | None, warm_up_steps: int) -> dict[str, Any]:
    """The config's values for the sparsity penalty, where the architecture has one."""
    if (name := _PENALTIES.get(architecture)) is None:
        return {}
    chosen: dict[str, Any] = {} if coefficient is None else {f"{name}_coefficient": coefficient}
    return chosen | {f"{name}_warm_up_steps": warm_up_steps}


def trainable(sae: SAE[Any], sparsity_coefficient: float | None = None) -> TrainingSAE[Any]:
    """A private float32 copy of a trained SAE that can be trained on, otherwise as sae-lens has it.

    It gives what the original gives, and so does its inference form; but for rounding where the original
    is not float32, or a TopK SAE in units of its decoder's norms, which are divided by once more. An SAE
    that was BatchTopK or Matryoshka is a JumpReLU one since it was saved, and stays that.

    Args:
        sae: The trained SAE.
        sparsity_coefficient: As in `SAERequest`: what it was trained with is not kept with it.

    Raises:
        ConfigError: For an SAE that cannot be trained on.
    """
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
    values |= {"dtype": "float32", "device": "meta"} | _penalty(architecture, sparsity_coefficient, 0)
    weights = {
        name: weight.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
        for name, weight in sae.state_dict().items()
    }
    if "threshold" in weights:
        # Below zero it is as at zero, but not in training, where sae-lens raises it at the first step.
        weights["threshold"].clamp_(min=0)
    kind = TrainingSAE.get_sae_class_for_architecture(architecture)
    return _holding(kind, _TRAINABLE[architecture](**values), weights, sae.device)


class Forward(NamedTuple):
    """What an SAE in training made of one batch, with gradients.

    Args:
        latents: Its code, `[token, d_sae]`.
        recon: What it puts back, `[token, d_in]`.
        mse: Squared error of that, summed over d_in, mean over tokens.
        aux: All else that sae-lens adds to that to be the loss: sparsity penalties, dead latents that
            reconstruct what is left, a gated SAE's reconstruction by its gates alone, the squared errors
            of a Matryoshka SAE's inner groups.
    """

    latents: Tensor
    recon: Tensor
    mse: Tensor
    aux: Tensor


def forward(sae: TrainingSAE[Any], resid: Tensor, dead: Tensor, step: int) -> Forward:
    """One forward pass as in sae-lens's training, for methods with other losses than it has.

    It moves what sae-lens moves outside of the optimiser: the threshold of a BatchTopK SAE follows the
    batch, that of a JumpReLU SAE is raised to zero.

    Args:
        sae: The SAE.
        resid: What it reads, `[token, d_in]`; with a BatchTopK SAE, all tokens that share the k.
        dead: Latents `[d_sae]` (true) that count as dead.
        step: Steps taken before, which settle the weights of the sparsity penalties.
    """
    output = sae.training_forward_pass(
        TrainStepInput(
            sae_in=resid.to(sae.dtype),
            coefficients=coefficients(sae, step),
            dead_neuron_mask=dead,
            n_training_steps=step,
            is_logging_step=False,
        )
    )
    losses = dict(output.losses)
    mse = losses.pop("mse_loss")
    return Forward(output.feature_acts, output.sae_out, mse, torch.stack([*losses.values()]).sum())


def coefficients(sae: TrainingSAE[Any], step: int) -> dict[str, float]:
    """The weights of the sparsity penalties, by sae-lens's name, after so many steps."""
    found = {}
    for name, value in sae.get_coefficients().items():
        warm_up_steps, final = 0, value
        if isinstance(value, TrainCoefficientConfig):
            warm_up_steps, final = value.warm_up_steps, value.value
        scheduler = CoefficientScheduler(warm_up_steps, final)  # pyright: ignore[reportArgumentType]
        scheduler.load_state_dict({"current_step": step})
        found[name] = scheduler.value
    return found


@torch.no_grad()
def inference(sae: TrainingSAE[Any], scale: float = 1.0) -> SAE[Any]:
    """What the SAE would be once saved and loaded by sae-lens alone; frozen, and a copy of its own.

    Draws nothing from torch's random state.

    Args:
        sae: The SAE in training.
        scale: What its inputs were multiplied by. The copy reads them as they are.

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
    config = SAEConfig.from_dict(copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict()))
    config.device = "meta"
    kind = SAE.get_sae_class_for_architecture(config.architecture())
    own = {name: weight.clone() for name, weight in weights.items()}
    return _holding(kind, config, own, sae.device).requires_grad_(False).eval()


def save(
    sae: TrainingSAE[Any], folder: Path, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> None:
    """Writes what `inference` gives, in sae-lens's format.

    Args:
        sae: The SAE in training, which stays as it is.
        folder: Where; made where there is none.
        scale: As for `inference`.
        dtype: Of the weights in the file.
    """
    inference(sae, scale).to("cpu", dtype).save_model(folder)


def rebuilt(sae: TrainingSAE[Any], weights: Mapping[str, Tensor]) -> TrainingSAE[Any]:
    """The same SAE in training once more, with copies of these weights and no parametrisation."""
    config = copy.deepcopy(sae.cfg)
    config.device = "meta"
    own = {name: weight.detach().clone() for name, weight in weights.items()}
    return _holding(parametrize.type_before_parametrizations(sae), config, own, sae.device)


def _holding(kind: Any, config: Any, weights: dict[str, Tensor], device: torch.device) -> Any:
    """An SAE that has these weights, made as sae-lens makes those it loads: none are drawn before."""
    with quiet():
        sae = kind(config)
    sae.load_state_dict(weights, assign=True)
    return sae.to(device)


def _normalises(sae: SAE[Any]) -> bool:
    return sae.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale")
