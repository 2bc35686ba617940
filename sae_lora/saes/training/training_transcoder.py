"""Transcoders in training: sae-lens's training classes, from one activation to another.

sae-lens has transcoders, but trains none. These classes take its activations, its penalties and its loss
of dead latents, and another target than their input. What they read is a pair: the input of the MLP and
its output, side by side.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from sae_lens.registry import get_sae_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import SAEConfig, TrainingSAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from torch import Tensor, nn


@dataclass(kw_only=True)
class Outputs:
    """The part of a config that an SAE does not have."""

    trained_as: ClassVar[str]
    saved_as: ClassVar[str]
    """sae-lens's architecture without a skip connection."""
    d_out: int
    """Width of its output."""
    skip: bool = False
    """True with a linear map from its input to its output."""

    @classmethod
    def architecture(cls) -> str:
        return cls.trained_as

    def get_inference_config_class(self) -> type[SAEConfig]:
        kind = "skip_transcoder" if self.skip else "transcoder"
        return get_sae_class(self.saved_as.replace("transcoder", kind))[1]


class TrainingTranscoder(TrainingSAE[Any]):
    """The part of a training class that differs for a transcoder.

    Where the text says pairs, it means `[token, d_in + d_out]`.
    """

    W_skip: nn.Parameter
    target_scale: Tensor
    """Pairs have one scale; the output is multiplied by this, too, so that its size does not matter."""

    def __init__(self, cfg: Any, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        size = {"dtype": self.dtype, "device": self.device}
        if cfg.skip:
            self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in, **size))
        unscaled = torch.ones((), dtype=torch.float64, device=self.device)
        self.register_buffer("target_scale", unscaled)

    def initialize_weights(self) -> None:
        super().initialize_weights()
        decoder = torch.empty(self.cfg.d_sae, self.cfg.d_out, dtype=self.dtype, device=self.device)
        nn.init.kaiming_uniform_(decoder)
        decoder *= (self.cfg.decoder_init_norm or 1) / decoder.norm(dim=-1, keepdim=True)
        self.W_dec = nn.Parameter(decoder)
        self.b_dec = nn.Parameter(self.b_dec.new_zeros(self.cfg.d_out))

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        return self.hook_sae_input(sae_in.to(self.dtype))

    def fit_targets(self, pairs: Tensor) -> None:
        """Set `target_scale`, so that inputs and outputs in the pairs have the same mean norm."""
        inputs, outputs = pairs.double().split([self.cfg.d_in, self.cfg.d_out], -1)
        self.target_scale.fill_(inputs.norm(dim=-1).mean() / outputs.norm(dim=-1).mean())

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The latents, the reconstruction of the outputs in pairs, and the losses.

        The MSE is in the units of the pairs; the loss is in those of `target_scale`.
        """
        inputs, outputs = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], -1)
        scale = self.target_scale.to(outputs.dtype)
        step_input = replace(step_input, sae_in=outputs * scale)
        latents, before = self.encode_with_hidden_pre(inputs)
        recon = self.decode(latents)
        if self.cfg.skip:
            recon = recon + inputs @ self.W_skip.T
        mse = self.mse_loss_fn(recon, step_input.sae_in).sum(-1).mean()
        aux = self.calculate_aux_loss(step_input, latents, before, recon)
        assert isinstance(aux, dict)
        return TrainStepOutput(
            sae_in=outputs,
            sae_out=recon / scale,
            feature_acts=latents,
            hidden_pre=before,
            loss=mse + sum(aux.values()),
            losses={"mse_loss": mse / scale**2, **aux},
        )

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        scale = float(state_dict.pop("target_scale"))
        for name in ("W_dec", "b_dec", "W_skip"):
            if name in state_dict:
                state_dict[name] = state_dict[name] / scale


@dataclass(kw_only=True)
class BatchTopKTranscoderConfig(Outputs, BatchTopKTrainingSAEConfig):
    """Config of a `BatchTopKTranscoder`."""

    trained_as, saved_as = "batchtopk_transcoder", "jumprelu_transcoder"


class BatchTopKTranscoder(BatchTopKTrainingSAE, TrainingTranscoder):
    """A transcoder with k active latents on average over a batch; saved as JumpReLU."""


@dataclass(kw_only=True)
class StandardTranscoderConfig(Outputs, StandardTrainingSAEConfig):
    """Config of a `StandardTranscoder`."""

    trained_as, saved_as = "standard_transcoder", "transcoder"


class StandardTranscoder(StandardTrainingSAE, TrainingTranscoder):
    """A transcoder with ReLU and an L1 penalty."""


@dataclass(kw_only=True)
class JumpReLUTranscoderConfig(Outputs, JumpReLUTrainingSAEConfig):
    """Config of a `JumpReLUTranscoder`."""

    trained_as = saved_as = "jumprelu_transcoder"


class JumpReLUTranscoder(JumpReLUTrainingSAE, TrainingTranscoder):
    """A transcoder with a trained threshold for each latent and an L0 penalty."""


CLASSES: dict[str, tuple[Any, Any]] = {
    "batchtopk": (BatchTopKTranscoder, BatchTopKTranscoderConfig),
    "standard": (StandardTranscoder, StandardTranscoderConfig),
    "jumprelu": (JumpReLUTranscoder, JumpReLUTranscoderConfig),
}
"""The classes, by the kind of latents."""
