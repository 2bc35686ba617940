"""How the weights of a student move: down a gradient, or by forward passes alone."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sae_lora.config.schema import TrainConfig
from sae_lora.splice.kl import SummedKL
from sae_lora.splice.student import Student
from sae_lora.splice.trunk import Trunk
from sae_lora.train.checkpoint import Snapshot
from sae_lora.train.train_state import DistillState, StepInfo


class GradientState(DistillState):
    """A student that AdamW moves down the gradient of the KL.

    Args:
        student: What is trained. Its dropout goes on from torch's global random state as it is now.
        config: The optimisation.
        steps: Number of steps in all.
    """

    needs_gradient = True

    def __init__(self, student: Student, config: TrainConfig, steps: int) -> None:
        super().__init__(student, config, steps)
        if config.activation_checkpointing:
            student.model.recompute(student.first)
        # In one kernel on a GPU. On a CPU as in the published loop, to the last bit.
        self._optimizer = torch.optim.AdamW(
            _groups(student.weights, config.loraplus_ratio),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=self._device.type == "cuda",
        )
        self._randomness = _Randomness(self._device)
        self._total = _nothing(self._device)

    @property
    def total(self) -> Tensor:
        return self._total

    @property
    def sums(self) -> list[Tensor]:
        return [self._total, *self._gradients()]

    def hidden(self, trunk: Trunk) -> list[Tensor]:
        with self._randomness.own():
            return [self.student.hidden(trunk)]

    def backward(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        (states,), (found,) = hidden, kl
        states.backward(found.gradient)
        self._total += found.total

    def _update(self, lr: float, weight: float) -> StepInfo:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["times"]
        weights = self.student.weights.values()
        norm = torch.nn.utils.clip_grad_norm_(weights, self._config.grad_clip or math.inf)
        self._optimizer.step()
        self._randomness.advance()
        return StepInfo(lr, norm)

    def reset(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._randomness.rewind()
        self._total = _nothing(self._device)

    def seed_rank(self, step: int, rank: int) -> None:
        self._randomness.begin_at(f"{self._config.seed} {step} {rank}")

    def _own_state(self) -> Snapshot:
        found = {f"adapter/{name}": weight.detach() for name, weight in self.student.weights.items()}
        for name, weight in self.student.weights.items():
            for key, value in self._optimizer.state[weight].items():
                found[f"optimizer/{key}/{name}"] = value
        found |= {f"rng/{place}": kept for place, kept in self._randomness.kept.items()}
        return Snapshot(found, {})

    def _restore_own(self, kept: Snapshot) -> None:
        tensors = kept.tensors
        for name, weight in self.student.weights.items():
            weight.data.copy_(tensors[f"adapter/{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := tensors.get(f"optimizer/{key}/{name}")) is not None:
                    self._optimizer.state[weight][key] = value.to(weight.device)
        self._randomness.kept |= {
            place: tensors[f"rng/{place}"].cpu()
            for place in self._randomness.kept
            if f"rng/{place}" in tensors
        }
        self._randomness.rewind()

    def _gradients(self) -> list[Tensor]:
        """That of each weight, there to be added to."""
        found = []
        for weight in self.student.weights.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            found.append(weight.grad)
        return found


class MeZOState(DistillState):
    """A student that is trained by two forward passes a step.

    In one the weights are moved a little along a random direction, in the other against it.

    What the loss differs by is the slope along that direction, and the weights move down it. There is no
    backward pass and no gradient: the memory is that of inference, and the trained weights once more.
    The direction follows from the seed and the step, so that it is drawn anew rather than kept.

    Source: arXiv 2305.17333, algorithm 1. Weights are put back as they were rather than moved back, so
    that a rate of zero leaves every bit.

    Args:
        student: What is trained; nothing in it may be random.
        config: The optimisation.
        steps: Number of steps in all.
        epsilon: How far the weights are moved along the direction.
    """

    needs_gradient = False

    def __init__(self, student: Student, config: TrainConfig, steps: int, epsilon: float) -> None:
        super().__init__(student, config, steps)
        self._epsilon = epsilon
        self._above = _nothing(self._device)
        self._below = _nothing(self._device)

    @property
    def total(self) -> Tensor:
        return (self._above + self._below) / 2

    @property
    def sums(self) -> list[Tensor]:
        return [self._above, self._below]

    @torch.no_grad()
    def hidden(self, trunk: Trunk) -> list[Tensor]:
        found = []
        for distance in (self._epsilon, -self._epsilon):
            with self._moved(distance):
                found.append(self.student.hidden(trunk))
        return found

    def backward(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        above, below = kl
        self._above += above.total
        self._below += below.total

    @torch.no_grad()
    def _update(self, lr: float, weight: float) -> StepInfo:
        slope = float(self._above - self._below) * weight / (2 * self._epsilon)
        clip = self._config.grad_clip or math.inf
        kept = min(1.0, clip / abs(slope)) if slope else 1.0
        for one, direction in zip(self.student.weights.values(), self._direction(), strict=True):
            one.mul_(1 - lr * self._config.weight_decay)
            one.sub_(direction, alpha=lr * kept * slope)
        return StepInfo(lr, abs(slope))

    def reset(self) -> None:
        self._above = _nothing(self._device)
        self._below = _nothing(self._device)

    def seed_rank(self, step: int, rank: int) -> None:
        """Nothing in it is random but the direction, which is the same for all processes."""

    def _own_state(self) -> Snapshot:
        weights = self.student.weights.items()
        return Snapshot({f"adapter/{name}": weight.detach() for name, weight in weights}, {})

    def _restore_own(self, kept: Snapshot) -> None:
        for name, weight in self.student.weights.items():
            weight.data.copy_(kept.tensors[f"adapter/{name}"])

    @contextmanager
    def _moved(self, distance: float) -> Iterator[None]:
        """Inside the block, the weights lie this far along the direction of the step."""
        weights = list(self.student.weights.values())
        before = [weight.data for weight in weights]
        for weight, direction in zip(weights, self._direction(), strict=True):
            weight.data = torch.add(weight.data, direction, alpha=distance)
        try:
            yield
        finally:
            for weight, data in zip(weights, before, strict=True):
                weight.data = data

    def _direction(self) -> Iterator[Tensor]:
        """That of the step, weight by weight, normally distributed."""
        generator = torch.Generator(self._device)
        generator.manual_seed(_seed_of(f"{self._config.seed} {self.step} direction"))
        for weight in self.student.weights.values():
            yield torch.randn(weight.shape, generator=generator, device=self._device, dtype=weight.dtype)


def _nothing(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device)


def _groups(weights: Mapping[str, nn.Parameter], loraplus_ratio: float) -> list[dict[str, Any]]:
    """The weights, and what their rate is in terms of that of all but LoRA's B."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, weight in weights.items():
        times = loraplus_ratio if "lora_B" in name else 1.0
        groups.setdefault(times, []).append(weight)
    return [{"params": weights, "times": times} for times, weights in groups.items()]


def _seed_of(words: str) -> int:
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7])


class _Randomness:
    """torch's random states as one training has them, whoever else draws meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kept = self._now()
        """By kind of device: what the next step draws from."""
        self._after = self.kept

    @contextmanager
    def own(self) -> Iterator[None]:
        """What is drawn inside the block is drawn from where this step has come to."""
        torch.set_rng_state(self._after["cpu"])
        if "cuda" in self._after:
            torch.cuda.set_rng_state(self._after["cuda"], self._device)
        yield
        self._after = self._now()

    def advance(self) -> None:
        """What was drawn in this step is gone; until then it would be drawn once more."""
        self.kept = self._after

    def rewind(self) -> None:
        """The step begins anew."""
        self._after = self.kept

    def begin_at(self, words: str) -> None:
        """The next step draws from where these words say."""
        with self.own():
            torch.manual_seed(_seed_of(words))
        self.kept = self._after

    def _now(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states
