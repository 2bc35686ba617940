"""The gradient step of methods that train SAEs through the model: KL and sae-lens's own losses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lora.config.schema import TrainConfig
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.hooks import Reading
from sae_lora.splice.kl import SummedKL
from sae_lora.splice.student import Student
from sae_lora.splice.trunk import Trunk
from sae_lora.train.checkpoint import Snapshot
from sae_lora.train.optim import GradientState
from sae_lora.train.train_state import StepInfo


class SAEGradientState(GradientState):
    """A student whose SAEs are trained: AdamW on the KL together with the SAEs' own losses.

    With MSE the SAEs' squared error, P what sae-lens adds to it (sparsity penalties, dead latents), and
    a = MSE / KL without a gradient, which brings KL to the scale of MSE, so that P need not be tuned
    anew, the loss is 0.5 · (a · KL + MSE) + P with MSE, and KL + P / a without.

    Source: arXiv 2503.17272, section on the balance of KL and MSE.

    Args:
        student, config, steps: As in `TrainState`.
        mse: Whether MSE is part of the loss.
    """

    def __init__(self, student: Student, config: TrainConfig, steps: int, *, mse: bool) -> None:
        super().__init__(student, config, steps)
        self._trained = [sae for sae in student.modules.values() if isinstance(sae, SplicedSAE)]
        self._by_hookpoint = {splice.hookpoint: splice.sae for splice in student.splices}
        self._with_mse = mse
        self._loss: Tensor | None = None
        self._mse, self._tokens = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._active = {id(sae): torch.zeros_like(sae.since_active) for sae in self._trained}
        self._others = [torch.zeros_like(weight) for weight in student.weights.values()]
        """For each weight, the gradient of all but the KL, summed over tokens."""

    @property
    def _own_sums(self) -> list[Tensor]:
        return [self._mse, self._tokens, *self._active.values(), *self._others]

    @property
    def sums(self) -> list[Tensor]:
        return [*super().sums, *self._own_sums]

    def hidden(self, trunk: Trunk) -> list[Tensor]:
        losses: list[Tensor] = []
        tokens, is_over = 0, False

        def observe(reading: Reading) -> None:
            nonlocal tokens
            sae = self._by_hookpoint[reading.hookpoint]
            assert isinstance(sae, SplicedSAE) and sae.made is not None
            made, sae.made = sae.made, None
            if is_over:  # in a block that is computed once more
                return
            number = len(reading.latents)
            losses.append(number * (made.aux + (0.5 * made.mse if self._with_mse else 0)))
            self._mse += number * made.mse.detach()
            self._active[id(sae)] += (reading.latents != 0).sum(0)
            tokens += number

        with self._randomness.in_use():
            states = self.student.hidden(trunk, observe)
        is_over = True
        self._tokens += tokens / len(losses)
        self._loss = torch.stack(losses).sum()
        return [states]

    def backward(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        assert self._loss is not None
        # An SAE in a block that is computed once more reads the batch once more.
        reads_again = self._config.activation_checkpointing
        before = {name: buffer.clone() for name, buffer in self.student.buffers.items() if reads_again}
        if self._loss.requires_grad:
            weights = list(self.student.weights.values())
            gradients = torch.autograd.grad(self._loss, weights, retain_graph=True, allow_unused=True)
            for other, gradient in zip(self._others, gradients, strict=True):
                if gradient is not None:
                    other += gradient
        self._loss = None
        super().backward(hidden, kl)
        for name, buffer in before.items():
            self.student.buffers[name].copy_(buffer)  # sae-lens puts other tensors in their place

    @torch.no_grad()
    def _update(self, lr: float, batch: torch.Size) -> StepInfo:
        balance = (self._mse / self._tokens) / (self.total * self.weight(batch)).clamp(min=1e-12)
        of_kl, of_others = (balance / 2, 1.0) if self._with_mse else (1.0, 1 / balance)
        for gradient, other in zip(self._gradients(), self._others, strict=True):
            gradient.mul_(of_kl).add_(other * (of_others / self._tokens))
        info = super()._update(lr, batch)
        for sae in self._trained:
            sae.moved(self._active[id(sae)] > 0)
        return info

    def reset(self) -> None:
        super().reset()
        for total in self._own_sums:
            total.zero_()

    def _own_state(self) -> Snapshot:
        tensors, values = super()._own_state()
        buffers = {f"buffer/{name}": buffer for name, buffer in self.student.buffers.items()}
        steps = [sae.step for sae in self._trained]
        return Snapshot(tensors | buffers, values | {"steps": steps})

    def _restore_own(self, kept: Snapshot) -> None:
        super()._restore_own(kept)
        for name, buffer in self.student.buffers.items():
            buffer.copy_(kept.tensors[f"buffer/{name}"])
        for sae, steps in zip(self._trained, kept.values["steps"], strict=True):
            sae.step = steps
            sae.has_moved()
