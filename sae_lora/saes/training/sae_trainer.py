"""An SAE that learns to reconstruct: sae-lens's trainer, called once per step."""

from collections.abc import Mapping
from typing import Any

from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from torch import Tensor

_FIRING = ("act_freq_scores", "n_forward_passes_since_fired")
"""Counters of sae-lens's trainer for each latent."""
_COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")
"""Other counters of sae-lens's trainer."""


class SteppedSAETrainer:
    """An SAE in training, with its Adam and the state of sae-lens's trainer.

    The learning rate rises linearly over the warm-up, stays, and falls linearly to reach zero one step
    after the last. If `restore()` puts the `state()` of one trainer into another that was built with the
    same arguments, the two continue equally, to the last bit.

    Args:
        sae: The SAE. It stays on its device.
        steps: Total number of steps.
        batch_tokens: Approximate tokens per step: they vary if special positions are left out.
        lr: Adam's peak rate.
        scale: Residuals are multiplied by this factor before the SAE reads them.
        warm_up_steps: Number of first steps, over which the rate rises.
        decay_steps: Number of last steps, over which it falls.
        dead_window_steps: A latent that was inactive for more steps than this is dead.
        sampling_window_steps: Steps after which the activity counts of latents are reset.
    """

    def __init__(
        self,
        sae: TrainingSAE[Any],
        *,
        steps: int,
        batch_tokens: int,
        lr: float,
        scale: float,
        warm_up_steps: int,
        decay_steps: int,
        dead_window_steps: int,
        sampling_window_steps: int,
    ) -> None:
        self.sae = sae
        """The SAE, which reads residuals times `scale`."""
        self._trainer: SAETrainer[Any, Any] = SAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * batch_tokens,
                train_batch_size_samples=batch_tokens,
                lr=lr,
                lr_end=lr,
                lr_scheduler_name="constant",
                lr_warm_up_steps=warm_up_steps,
                lr_decay_steps=decay_steps,
                device=str(sae.device),
                dead_feature_window=dead_window_steps,
                feature_sampling_window=sampling_window_steps,
                logger=LoggingConfig(log_to_wandb=False),
            ),
            self.sae,
            data_provider=iter(()),
        )
        self.scale = self._trainer.activation_scaler.scaling_factor = scale

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self._trainer.optimizer.param_groups[0]["lr"])

    def step(self, activations: Tensor) -> Tensor:
        """Take one step on residuals `[token, d_in]`; return the MSE before the step.

        The MSE is that of residuals times the scale: summed over d_in, mean over tokens. It stays on the
        device, so that the call does not wait for it.
        """
        trainer = self._trainer
        trainer.maybe_reset_sparsity()
        # sae-lens counts this number of tokens for every batch.
        trainer.cfg.train_batch_size_samples = len(activations)
        # Scaled in the SAE's precision, because scaling in the model's might round twice.
        output = trainer.step(activations.to(self.sae.device, self.sae.dtype))
        trainer.n_training_steps += 1
        return output.losses["mse_loss"].detach()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the rest of the training depends on, apart from its activations.

        Returns:
            Tensors by name (not copies: write them before the next step), and JSON-able values.
        """
        trainer = self._trainer
        tensors = {f"sae/{name}": value.detach() for name, value in self.sae.state_dict().items()}
        for name, weight in self.sae.named_parameters():
            for key, value in trainer.optimizer.state.get(weight, {}).items():
                tensors[f"optimizer/{key}/{name}"] = value
        tensors |= {f"firing/{name}": getattr(trainer, name) for name in _FIRING}
        schedulers = trainer.coefficient_schedulers
        values = {name: getattr(trainer, name) for name in _COUNTERS} | {
            "scale": self.scale,
            "lr": self.lr,
            "lr_scheduler": trainer.lr_scheduler.state_dict(),
            "coefficient_schedulers": {
                name: scheduler.state_dict() for name, scheduler in schedulers.items()
            },
        }
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Put a result of `state()` back, in this process or another."""
        trainer = self._trainer
        self.sae.load_state_dict({name: tensors[f"sae/{name}"] for name in self.sae.state_dict()})
        self._restore_optimizer(tensors, values["lr"])
        trainer.lr_scheduler.load_state_dict(dict(values["lr_scheduler"]))
        for name, scheduler in trainer.coefficient_schedulers.items():
            scheduler.load_state_dict(values["coefficient_schedulers"][name])
        for name in _FIRING:
            setattr(trainer, name, tensors[f"firing/{name}"].to(self.sae.device, copy=True))
        for name in _COUNTERS:
            setattr(trainer, name, values[name])
        self.scale = trainer.activation_scaler.scaling_factor = values["scale"]

    def _restore_optimizer(self, tensors: Mapping[str, Tensor], lr: float) -> None:
        optimizer = self._trainer.optimizer
        state = {}
        for index, (name, _) in enumerate(self.sae.named_parameters()):
            names = {key: f"optimizer/{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq")}
            moments = {key: tensors[name].clone() for key, name in names.items() if name in tensors}
            if moments:  # Adam has none before the first step
                state[index] = moments
        groups = [group | {"lr": lr} for group in optimizer.state_dict()["param_groups"]]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
