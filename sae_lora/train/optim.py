"""Optimisation of a student: by the gradient of the KL, also with the SAEs' losses, or by MeZO."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sae_lora.config.schema import TrainConfig
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.hooks import Reading
from sae_lora.splice.kl import SummedKL
from sae_lora.splice.student import Student, named_weights
from sae_lora.splice.trunk import Trunk
from sae_lora.train.checkpoint import Snapshot
from sae_lora.train.train_state import DistillState, zero


class GradientState(DistillState):
    """A student that AdamW trains on the gradient of the KL.

    Its dropout starts from torch's present global random state.

    Args:
        student, config, steps: As in `TrainState`.
        lora_lr: Learning rate of LoRA's weights, if it is not `config.lr`.
    """

    needs_gradient = True

    def __init__(
        self, student: Student, config: TrainConfig, steps: int, lora_lr: float | None = None
    ) -> None:
        super().__init__(student, config, steps)
        if config.activation_checkpointing:
            student.model.recompute(student.first)
        # Fused on a GPU, for speed. On a CPU equal to the published loop, to the last bit.
        self._optimizer = torch.optim.AdamW(
            _groups(student.weights, config, lora_lr),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=self._device.type == "cuda",
        )
        self._randomness = _Randomness(self._device)

    @property
    def sums(self) -> list[Tensor]:
        return [self.total, *self._gradients()]

    def hidden(self, trunk: Trunk) -> list[Tensor]:
        with self._randomness.in_use():
            return [self.student.hidden(trunk)]

    def generator(self) -> torch.Generator:
        """A generator of the random numbers that dropout takes next."""
        return self._randomness.generator()

    def note_drawn(self, generator: torch.Generator) -> None:
        """Go on after the numbers that were taken from a result of `generator`."""
        self._randomness.follow(generator)

    def backward(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        (states,), (summed,) = hidden, kl
        states.backward(summed.gradient)
        self.total += summed.total

    def _update(self, lr: float, batch: torch.Size) -> Tensor | float | None:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["times"]
        weights = self.student.weights.values()
        norm = torch.nn.utils.clip_grad_norm_(weights, self._config.grad_clip or math.inf)
        self._optimizer.step()
        self._randomness.advance()
        return norm

    def reset(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._randomness.rewind()
        self.total = zero(self._device)

    def seed_rank(self, rank: int) -> None:
        with self._randomness.in_use():
            torch.manual_seed(_seed_of(f"{self._config.seed} {self.step} {rank}"))
        self._randomness.advance()

    def _method_state(self) -> Snapshot:
        tensors, values = super()._method_state()
        for name, weight in self.student.weights.items():
            for key, value in self._optimizer.state[weight].items():
                tensors[f"optimizer/{key}/{name}"] = value
        tensors |= {f"rng/{device}": state for device, state in self._randomness.start.items()}
        return Snapshot(tensors, values)

    def _restore_method(self, snapshot: Snapshot) -> None:
        super()._restore_method(snapshot)
        tensors = snapshot.tensors
        for name, weight in self.student.weights.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := tensors.get(f"optimizer/{key}/{name}")) is not None:
                    self._optimizer.state[weight][key] = value.to(weight.device)
        for device in self._randomness.start:
            if f"rng/{device}" in tensors:
                self._randomness.start[device] = tensors[f"rng/{device}"].cpu()
        self._randomness.rewind()

    def _gradients(self) -> list[Tensor]:
        """The gradient of each weight; zeros if it has none yet."""
        gradients = []
        for weight in self.student.weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            gradients.append(weight.grad)
        return gradients


class SAEGradientState(GradientState):
    """A student whose SAEs are trained: AdamW on the KL together with the SAEs' losses.

    MSE is the squared error of the SAEs. P is the sum of the other terms of sae-lens's loss (sparsity
    penalties, dead latents). a = MSE / KL, without a gradient, brings the KL to the scale of the MSE, so
    that P needs no new tuning. If MSE is part of the loss, the loss is 0.5 · (a · KL + MSE) + P.
    Otherwise it is KL + P / a.

    Source: arXiv 2503.17272, section on the balance of KL and MSE.

    Args:
        student, config, steps, lora_lr: As in `GradientState`.
        mse: True if MSE is part of the loss.
    """

    def __init__(
        self,
        student: Student,
        config: TrainConfig,
        steps: int,
        *,
        mse: bool,
        lora_lr: float | None = None,
    ) -> None:
        super().__init__(student, config, steps, lora_lr)
        self._trained = [sae for sae in student.modules.values() if isinstance(sae, SplicedSAE)]
        self._by_hookpoint = {splice.hookpoint: splice.sae for splice in student.splices}
        self._with_mse = mse
        self._loss: Tensor | None = None
        self._mse, self._tokens = torch.zeros(2, dtype=torch.float64, device=self._device)
        self._active = {id(sae): torch.zeros_like(sae.since_active) for sae in self._trained}
        self._sae_weights = list(named_weights(student.modules).values())
        """The weights of the SAEs. Adapters learn from the KL only: they could lower the SAEs' losses by
        a smaller input."""
        self._sae_gradients = [torch.zeros_like(weight) for weight in self._sae_weights]
        """For each of them, the gradient of the SAEs' losses, summed over tokens."""

    @property
    def _sae_sums(self) -> list[Tensor]:
        return [self._mse, self._tokens, *self._active.values(), *self._sae_gradients]

    @property
    def sums(self) -> list[Tensor]:
        return [*super().sums, *self._sae_sums]

    def hidden(self, trunk: Trunk) -> list[Tensor]:
        losses: list[Tensor] = []
        tokens, is_over = 0, False

        def observe(reading: Reading) -> None:
            nonlocal tokens
            sae = self._by_hookpoint[reading.hookpoint]
            assert isinstance(sae, SplicedSAE) and sae.last_forward is not None
            forward, sae.last_forward = sae.last_forward, None
            if is_over:  # activation checkpointing recomputes this block in the backward pass
                return
            number = len(reading.latents)
            losses.append(number * (forward.aux + (0.5 * forward.mse if self._with_mse else 0)))
            self._mse += number * forward.mse.detach()
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
        # If a block is recomputed, its SAEs read the batch a second time, which must not change them.
        recomputes = self._config.activation_checkpointing
        saved = {name: buffer.clone() for name, buffer in self.student.buffers.items() if recomputes}
        if self._loss.requires_grad:
            gradients = torch.autograd.grad(
                self._loss, self._sae_weights, retain_graph=True, allow_unused=True
            )
            for total, gradient in zip(self._sae_gradients, gradients, strict=True):
                if gradient is not None:
                    total += gradient
        self._loss = None
        super().backward(hidden, kl)
        for name, buffer in saved.items():
            self.student.buffers[name].copy_(buffer)  # by name: sae-lens replaces the tensors themselves

    @torch.no_grad()
    def _update(self, lr: float, batch: torch.Size) -> Tensor | float | None:
        balance = (self._mse / self._tokens) / (self.total * self.weight(batch)).clamp(min=1e-12)
        kl_factor, sae_factor = (balance / 2, 1.0) if self._with_mse else (1.0, 1 / balance)
        self._gradients()
        for weight, sae_gradient in zip(self._sae_weights, self._sae_gradients, strict=True):
            assert weight.grad is not None
            weight.grad.mul_(kl_factor).add_(sae_gradient * (sae_factor / self._tokens))
        norm = super()._update(lr, batch)
        for sae in self._trained:
            sae.count_step(self._active[id(sae)] > 0)
        return norm

    def reset(self) -> None:
        super().reset()
        for total in self._sae_sums:
            total.zero_()

    def _method_state(self) -> Snapshot:
        tensors, values = super()._method_state()
        buffers = {f"buffer/{name}": buffer for name, buffer in self.student.buffers.items()}
        steps = [sae.step for sae in self._trained]
        return Snapshot(tensors | buffers, values | {"steps": steps})

    def _restore_method(self, snapshot: Snapshot) -> None:
        super()._restore_method(snapshot)
        for name, buffer in self.student.buffers.items():
            buffer.copy_(snapshot.tensors[f"buffer/{name}"])
        for sae, steps in zip(self._trained, snapshot.values["steps"], strict=True):
            sae.step = steps
            sae.drop_frozen()


class MeZOState(DistillState):
    """A student that MeZO trains: two forward passes per step and no backward pass.

    In the first pass the weights are shifted along a random direction, in the second against it. The
    difference of the losses gives the slope along the direction, and the weights move down the slope.
    Memory is that of inference, plus one copy of the trained weights. The direction follows from the
    seed and the step: it is computed twice instead of stored.

    Source: arXiv 2305.17333, algorithm 1. Unlike there, the original weights are restored from a copy
    and not shifted back, so that a learning rate of zero changes no bit.

    Args:
        student, config, steps: As in `TrainState`; nothing in the student may be random.
        epsilon: Distance that the weights are shifted along the direction.
    """

    needs_gradient = False

    def __init__(self, student: Student, config: TrainConfig, steps: int, epsilon: float) -> None:
        super().__init__(student, config, steps)
        self._epsilon = epsilon
        self.reset()

    @property
    def sums(self) -> list[Tensor]:
        return [self._above, self._below]

    @torch.no_grad()
    def hidden(self, trunk: Trunk) -> list[Tensor]:
        weights = list(self.student.weights.values())
        originals = [weight.data for weight in weights]
        passes = []
        try:
            for distance in (self._epsilon, -self._epsilon):
                for weight, data, direction in zip(weights, originals, self._direction(), strict=True):
                    weight.data = torch.add(data, direction, alpha=distance)
                passes.append(self.student.hidden(trunk))
        finally:
            for weight, data in zip(weights, originals, strict=True):
                weight.data = data
        return passes

    def backward(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        above, below = kl
        self._above += above.total
        self._below += below.total

    @torch.no_grad()
    def _update(self, lr: float, batch: torch.Size) -> float:
        self.total = (self._above + self._below) / 2
        slope = float(self._above - self._below) * self.weight(batch) / (2 * self._epsilon)
        clip = self._config.grad_clip or math.inf
        clipped = min(1.0, clip / abs(slope)) if slope else 1.0
        for weight, direction in zip(self.student.weights.values(), self._direction(), strict=True):
            weight.mul_(1 - lr * self._config.weight_decay)
            weight.sub_(direction, alpha=lr * clipped * slope)
        return abs(slope)

    def reset(self) -> None:
        self._above, self._below = zero(self._device), zero(self._device)

    def _direction(self) -> Iterator[Tensor]:
        """Yield the direction of the step for each weight; its numbers are standard normal."""
        generator = torch.Generator(self._device)
        generator.manual_seed(_seed_of(f"{self._config.seed} {self.step} direction"))
        for weight in self.student.weights.values():
            yield torch.randn(weight.shape, generator=generator, device=self._device, dtype=weight.dtype)


def _groups(
    weights: Mapping[str, nn.Parameter], config: TrainConfig, lora_lr: float | None
) -> list[dict[str, Any]]:
    """AdamW's parameter groups by `times`, the factor of their learning rate.

    It is 1 but for LoRA's weights at another rate, times `loraplus_ratio` for LoRA's B.
    """
    of_lora = 1.0 if lora_lr is None else lora_lr / config.lr
    groups: dict[float, list[nn.Parameter]] = {}
    for name, weight in weights.items():
        times = of_lora if "lora_" in name else 1.0
        times *= config.loraplus_ratio if "lora_B" in name else 1.0
        groups.setdefault(times, []).append(weight)
    return [{"params": weights, "times": times} for times, weights in groups.items()]


def _seed_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


class _Randomness:
    """torch's random states of one training, independent of all other random numbers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.start = self._now()
        """The state at the start of the step, by kind of device."""
        self._current = self.start

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Use the present state of the step inside the block."""
        torch.set_rng_state(self._current["cpu"])
        if "cuda" in self._current:
            torch.cuda.set_rng_state(self._current["cuda"], self._device)
        yield
        self._current = self._now()

    def generator(self) -> torch.Generator:
        """A generator of the device at the present state of the step."""
        generator = torch.Generator(self._device)
        generator.set_state(self._current[self._device.type])
        return generator

    def follow(self, generator: torch.Generator) -> None:
        """Take the state of a result of `generator` as the present one."""
        self._current = self._current | {self._device.type: generator.get_state()}

    def advance(self) -> None:
        """Begin the next step at the present state."""
        self.start = self._current

    def rewind(self) -> None:
        """Go back to the start of the step, so that it draws the same numbers again."""
        self._current = self.start

    def _now(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states
