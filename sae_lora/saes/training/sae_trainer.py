"""One SAE in training to reconstruct, through sae-lens's trainer, stepped from outside."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import SAE, SAETrainer, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.saes.training import training_sae

_FIRING = ("act_freq_scores", "n_forward_passes_since_fired")
"""What sae-lens's trainer counts by latent."""
_COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")
"""And what it counts of all."""


class StepLosses(NamedTuple):
    """What one step found before it moved the weights, on the device.

    Args:
        mse: Squared error summed over d_in, mean over tokens, of residuals times the scale.
        loss: What was descended: that and what sae-lens adds to it.
        l0: Active latents per token.
    """

    mse: Tensor
    loss: Tensor
    l0: Tensor


def mean_norm_scale(sum_of_norms: float, tokens: int, d_in: int) -> float:
    """The factor that brings the mean norm of residuals to √d_in, as sae-lens scales them.

    Args:
        sum_of_norms: Of their Euclidean norms.
        tokens: How many those are.
        d_in: Their width.

    Raises:
        UserError: Where there are none, or all are zero, or not finite.
    """
    if tokens == 0 or not math.isfinite(sum_of_norms) or sum_of_norms <= 0:
        raise UserError(f"no scale: {tokens} residuals have norms of {sum_of_norms:g} in all")
    return math.sqrt(d_in) * tokens / sum_of_norms


class SteppedSAETrainer:
    """An SAE, its Adam and all that sae-lens's trainer knows of its training.

    The rate rises linearly over the warm-up, stays, and falls linearly to reach zero one step after the
    last. Between two steps, what `state()` gives is all there is to know: put back with `restore()` into
    a learner built alike, the rest of the training comes out the same to the last bit.

    Args:
        sae: What is trained.
        steps: Number of steps in all.
        batch_tokens: Tokens per step, about: where special positions are left out they vary.
        lr: Adam's peak rate.
        warm_up_steps: Steps over which it rises.
        decay_steps: Steps over which it falls, the last ones.
        dead_window_steps: A latent that was active in none of more steps than these is dead.
        sampling_window_steps: Steps after which it is counted anew how often each latent is active.
        device: Where.

    Raises:
        UserError: Where warm-up and decay take more steps than there are.
    """

    def __init__(
        self,
        sae: TrainingSAE[Any],
        *,
        steps: int,
        batch_tokens: int,
        lr: float,
        warm_up_steps: int,
        decay_steps: int,
        dead_window_steps: int,
        sampling_window_steps: int,
        device: torch.device,
    ) -> None:
        if warm_up_steps + decay_steps > steps:
            raise UserError(
                f"an SAE's rate cannot rise over {warm_up_steps} steps and fall over {decay_steps}: "
                f"the training has {steps}"
            )
        self.sae = sae.to(device)
        """What is trained; it reads residuals times `scale`."""
        self._device = device
        self._trainer: SAETrainer[Any, Any] = SAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * batch_tokens,
                train_batch_size_samples=batch_tokens,
                lr=lr,
                lr_end=lr,
                lr_scheduler_name="constant",
                lr_warm_up_steps=warm_up_steps,
                lr_decay_steps=decay_steps,
                device=str(device),
                dead_feature_window=dead_window_steps,
                feature_sampling_window=sampling_window_steps,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            self.sae,
            data_provider=iter(()),
        )

    @property
    def scale(self) -> float:
        """What residuals are multiplied by before the SAE reads them."""
        return self._trainer.activation_scaler.scaling_factor or 1.0

    @property
    def dead(self) -> int:
        """Latents that count as dead. Waits for the device."""
        return int(self._trainer.dead_neurons.sum())

    @property
    def lr(self) -> float:
        """The rate of the next step."""
        return float(self._trainer.optimizer.param_groups[0]["lr"])

    def begin(self, scale: float) -> None:
        """Settles the scale, once, before the first step.

        Args:
            scale: `mean_norm_scale`, say.

        Raises:
            RuntimeError: Where it is settled.
        """
        scaler = self._trainer.activation_scaler
        if scaler.scaling_factor is not None or self._trainer.n_training_steps:
            raise RuntimeError("the scale of an SAE in training is settled once, before its first step")
        scaler.scaling_factor = scale

    def step(self, activations: Tensor) -> StepLosses:
        """Takes one step. Of what it returns, nothing has been waited for.

        Args:
            activations: Residuals as the model has them, `[token, d_in]`.
        """
        trainer = self._trainer
        trainer.maybe_reset_sparsity()
        # sae-lens counts every batch as one of this size.
        trainer.cfg.train_batch_size_samples = len(activations)
        # Scaled in the SAE's precision: the model's may round twice.
        output = trainer.step(activations.to(self._device, self.sae.dtype))
        trainer.n_training_steps += 1
        return StepLosses(
            mse=output.losses["mse_loss"].detach(),
            loss=output.loss.detach(),
            l0=output.feature_acts.detach().count_nonzero() / len(activations),
        )

    def inference(self) -> SAE[Any]:
        """What the SAE would be once saved and loaded, reading residuals as the model has them."""
        return training_sae.inference(self._described(), self.scale)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes what `inference` gives, in sae-lens's format; the training goes on as it would have.

        Args:
            folder: Where.
            dtype: Of the weights in the file.
        """
        training_sae.save(self._described(), folder, self.scale, dtype)

    def _described(self) -> TrainingSAE[Any]:
        """The SAE, whose own config says its L0 and how many of its latents are dead."""
        self._trainer.set_final_sae_metadata()
        return self.sae

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the rest of the training depends on, besides what it is trained on.

        Returns:
            Tensors by name, the ones in use: to be written before the next step. And JSON-able values.
        """
        trainer = self._trainer
        tensors = {f"sae/{name}": value.detach() for name, value in self.sae.state_dict().items()}
        for name, weight in self.sae.named_parameters():
            for key, value in trainer.optimizer.state.get(weight, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        tensors |= {f"firing/{name}": getattr(trainer, name) for name in _FIRING}
        schedulers = trainer.coefficient_schedulers
        values = {name: getattr(trainer, name) for name in _COUNTERS} | {
            "scale": trainer.activation_scaler.scaling_factor,
            "lr": self.lr,
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "coefficient_schedulers": {name: one.state_dict() for name, one in schedulers.items()},
        }
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Puts back what `state()` gave, in this process or another."""
        trainer = self._trainer
        self.sae.load_state_dict({name: tensors[f"sae/{name}"] for name in self.sae.state_dict()})
        self._restore_optimizer(tensors, values["lr"])
        trainer.lr_scheduler.load_state_dict(dict(values["lr_scheduler"]))
        for name, scheduler in trainer.coefficient_schedulers.items():
            scheduler.load_state_dict(values["coefficient_schedulers"][name])
        for name in _FIRING:
            setattr(trainer, name, tensors[f"firing/{name}"].to(self._device, copy=True))
        for name in _COUNTERS:
            setattr(trainer, name, values[name])
        trainer.activation_scaler.scaling_factor = values["scale"]

    def _restore_optimizer(self, tensors: Mapping[str, Tensor], lr: float) -> None:
        optimizer = self._trainer.optimizer
        state = {}
        for index, (name, _) in enumerate(self.sae.named_parameters()):
            names = {key: f"optimizer/{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            # There are none before the first step.
            found = {key: tensors[kept].clone() for key, kept in names.items() if kept in tensors}
            if found:
                state[index] = found
        groups = [group | {"lr": lr} for group in optimizer.state_dict()["param_groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
