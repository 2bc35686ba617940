"""The gradient step of methods that train SAEs through the model: KL, beside sae-lens's own losses."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sae_lora.checkpoint import State
from sae_lora.config import TrainConfig
from sae_lora.kl import SummedKL
from sae_lora.learning import Descent
from sae_lora.saes.trained import TrainedSAE
from sae_lora.splice import Reading
from sae_lora.student import Student
from sae_lora.trunk import Trunk


class SAEDescent(Descent):
    """AdamW on the KL together with the losses of SAEs in training.

    With MSE the SAEs' squared error, P what sae-lens adds to it (sparsity penalties, dead latents), and
    a = MSE / KL without a gradient, which brings KL to the scale of MSE, so that P need not be tuned
    anew, the loss is 0.5 · (a · KL + MSE) + P with MSE, and KL + P / a without.

    Source: arXiv 2503.17272, section on the balance of KL and MSE.

    Args:
        student: What is trained.
        config: The optimisation.
        saes: The SAEs in training, by hookpoint.
        mse: Whether MSE is part of the loss.
    """

    def __init__(
        self, student: Student, config: TrainConfig, saes: Mapping[str, TrainedSAE], *, mse: bool
    ) -> None:
        super().__init__(student, config)
        self._saes = saes
        self._with_mse = mse
        self._loss: Tensor | None = None
        self._mse, self._tokens = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._active = {name: torch.zeros_like(sae.since_active) for name, sae in saes.items()}
        self._others = [torch.zeros_like(weight) for weight in student.weights.values()]
        """Of each weight, the gradient of all but the KL, summed over tokens."""

    @property
    def sums(self) -> list[Tensor]:
        return [*super().sums, self._mse, self._tokens, *self._active.values(), *self._others]

    def hidden(self, trunk: Trunk) -> list[Tensor]:
        read: dict[str, int] = {}

        def observe(reading: Reading) -> None:
            read[reading.hookpoint] = len(reading.latents)
            self._active[reading.hookpoint] += (reading.latents != 0).sum(0)

        with self._randomness.own():
            states = self.student.hidden(trunk, observe)
        loss = torch.zeros((), device=self._device)
        for hookpoint, tokens in read.items():
            made = self._saes[hookpoint].made
            assert made is not None
            loss = loss + tokens * (made.aux + (0.5 * made.mse if self._with_mse else 0))
            self._mse += tokens * made.mse.detach()
            self._saes[hookpoint].made = None
        self._tokens += sum(read.values()) / len(read)
        self._loss = loss
        return [states]

    def absorb(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        (states,), (found,) = hidden, kl
        assert self._loss is not None
        if self._loss.requires_grad:
            weights = list(self.student.weights.values())
            gradients = torch.autograd.grad(self._loss, weights, retain_graph=True, allow_unused=True)
            for other, gradient in zip(self._others, gradients, strict=True):
                if gradient is not None:
                    other += gradient
        self._loss = None
        super().absorb([states], [found])

    @torch.no_grad()
    def learn(self, lr: float, weight: float) -> Tensor | float | None:
        balance = (self._mse / self._tokens) / (self.total * weight).clamp(min=1e-12)
        of_kl, of_others = (balance / 2, 1.0) if self._with_mse else (1.0, 1 / balance)
        for gradient, other in zip(self._gradients(), self._others, strict=True):
            gradient.mul_(of_kl).add_(other * (of_others / self._tokens))
        norm = super().learn(lr, weight)
        for hookpoint, sae in self._saes.items():
            sae.moved(self._active[hookpoint] > 0)
        return norm

    def forget_step(self) -> None:
        super().forget_step()
        for total in (self._mse, self._tokens, *self._active.values(), *self._others):
            total.zero_()

    def state(self) -> State:
        tensors, values = super().state()
        buffers = {f"buffer/{name}": buffer for name, buffer in self.student.buffers.items()}
        return State(
            tensors | buffers, values | {"steps": {n: sae.step for n, sae in self._saes.items()}}
        )

    def restore(self, state: State) -> None:
        super().restore(state)
        for name, buffer in self.student.buffers.items():
            buffer.copy_(state.tensors[f"buffer/{name}"])
        for name, sae in self._saes.items():
            sae.step = state.values["steps"][name]
            sae.has_moved()
