"""How the weights of a student move: down a gradient, or by forward passes alone."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sae_lora.config.schema import TrainConfig
from sae_lora.splice.kl import SummedKL
from sae_lora.splice.student import Student
from sae_lora.splice.trunk import Trunk
from sae_lora.train.checkpoint import State


class Moved(NamedTuple):
    """How a step has moved weights.

    Args:
        lr: At this rate.
        norm: Of the gradient before clipping; `None` where that is not known.
    """

    lr: float
    norm: Tensor | float | None


class Learner(Protocol):
    """What a step does to one student. In each step, all that it learns from comes before `learn`."""

    student: Student
    """What learns."""

    @property
    def total(self) -> Tensor:
        """What this step is to make less, before it does so, summed over its tokens.

        KL(teacher ‖ student) in nats; of SAEs that learn to reconstruct, the squared error.
        """
        ...

    def learn(self, lr: float, weight: float) -> Moved:
        """Moves the weights.

        Args:
            lr: The rate of this step.
            weight: What the KL is multiplied by to be the loss; its gradient comes multiplied.
        """
        ...

    def forget_step(self) -> None:
        """Leaves no trace of a step that has ended, or that came to nothing."""
        ...

    def state(self) -> State:
        """All that the rest of the training depends on."""
        ...

    def restore(self, state: State) -> None:
        """Puts back what `state` gave, in this process or another."""
        ...


class Distiller(Learner, Protocol):
    """A learner of the teacher's distribution.

    In each step `hidden` and `absorb` are called for every part of the batch, then `learn` once.
    """

    needs_gradient: bool
    """Whether `absorb` wants the gradient of the KL."""

    @property
    def sums(self) -> list[Tensor]:
        """What has been absorbed in this step, to be added up over processes. They may be changed."""
        ...

    def hidden(self, trunk: Trunk) -> list[Tensor]:
        """What the head reads of the student in each of its passes, `[batch, pos, d_model]`."""
        ...

    def absorb(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        """Takes in what a part of the batch says.

        Args:
            hidden: What `hidden` gave.
            kl: The KL of each, with its gradient where that is needed.
        """
        ...

    def draw_apart(self, step: int, rank: int) -> None:
        """Drops other inputs in this step than the same training does in another process.

        Args:
            step: Its number.
            rank: Which process this is. What is drawn depends on the two and the seed alone.
        """
        ...


class Descent:
    """AdamW on the gradient of the KL.

    Args:
        student: What is trained. Its dropout goes on from torch's global random state as it is now.
        config: The optimisation.
    """

    needs_gradient = True

    def __init__(self, student: Student, config: TrainConfig) -> None:
        if config.activation_checkpointing:
            student.model.recompute(student.first)
        self.student = student
        self._config = config
        self._device = student.model.device
        # In one kernel on a GPU. On a CPU as in the published loop, to the last bit.
        self._optimizer = torch.optim.AdamW(
            _groups(student.weights, config.loraplus_ratio),
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=self._device.type == "cuda",
        )
        self._randomness = _Randomness(self._device)
        self.total = _nothing(self._device)

    @property
    def sums(self) -> list[Tensor]:
        return [self.total, *self._gradients()]

    def hidden(self, trunk: Trunk) -> list[Tensor]:
        with self._randomness.own():
            return [self.student.hidden(trunk)]

    def absorb(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        (states,), (found,) = hidden, kl
        states.backward(found.gradient)
        self.total += found.total

    def learn(self, lr: float, weight: float) -> Moved:
        for group in self._optimizer.param_groups:
            group["lr"] = lr * group["times"]
        weights = self.student.weights.values()
        norm = torch.nn.utils.clip_grad_norm_(weights, self._config.grad_clip or math.inf)
        self._optimizer.step()
        self._randomness.advance()
        return Moved(lr, norm)

    def forget_step(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._randomness.rewind()
        self.total = _nothing(self._device)

    def draw_apart(self, step: int, rank: int) -> None:
        self._randomness.begin_at(f"{self._config.seed} {step} {rank}")

    def state(self) -> State:
        found = {f"adapter/{name}": weight.detach() for name, weight in self.student.weights.items()}
        for name, weight in self.student.weights.items():
            for key, value in self._optimizer.state[weight].items():
                found[f"optimizer/{key}/{name}"] = value
        found |= {f"rng/{place}": kept for place, kept in self._randomness.kept.items()}
        return State(found, {})

    def restore(self, state: State) -> None:
        tensors = state.tensors
        for name, weight in self.student.weights.items():
            weight.data.copy_(tensors[f"adapter/{name}"])
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (kept := tensors.get(f"optimizer/{key}/{name}")) is not None:
                    self._optimizer.state[weight][key] = kept.to(weight.device)
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


class MeZO:
    """Two forward passes a step, the weights moved a little along a random direction and against it.

    What the loss differs by is the slope along that direction, and the weights move down it. There is no
    backward pass and no gradient: the memory is that of inference, and the trained weights once more.
    The direction follows from the seed and the step, so that it is drawn anew rather than kept.

    Source: arXiv 2305.17333, algorithm 1. Weights are put back as they were rather than moved back, so
    that a rate of zero leaves every bit.

    Args:
        student: What is trained; nothing in it may be random.
        config: The optimisation.
        epsilon: How far the weights are moved along the direction.
    """

    needs_gradient = False

    def __init__(self, student: Student, config: TrainConfig, epsilon: float) -> None:
        self.student = student
        self._config = config
        self._epsilon = epsilon
        self._device = student.model.device
        self._step = 0
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

    def absorb(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        above, below = kl
        self._above += above.total
        self._below += below.total

    @torch.no_grad()
    def learn(self, lr: float, weight: float) -> Moved:
        slope = float(self._above - self._below) * weight / (2 * self._epsilon)
        clip = self._config.grad_clip or math.inf
        kept = min(1.0, clip / abs(slope)) if slope else 1.0
        for one, direction in zip(self.student.weights.values(), self._direction(), strict=True):
            one.mul_(1 - lr * self._config.weight_decay)
            one.sub_(direction, alpha=lr * kept * slope)
        self._step += 1
        return Moved(lr, abs(slope))

    def forget_step(self) -> None:
        self._above = _nothing(self._device)
        self._below = _nothing(self._device)

    def draw_apart(self, step: int, rank: int) -> None:
        """Nothing in it is random but the direction, which is the same for all processes."""

    def state(self) -> State:
        weights = self.student.weights.items()
        return State({f"adapter/{name}": one.detach() for name, one in weights}, {"steps": self._step})

    def restore(self, state: State) -> None:
        for name, weight in self.student.weights.items():
            weight.data.copy_(state.tensors[f"adapter/{name}"])
        self._step = state.values["steps"]

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
        generator.manual_seed(_seed_of(f"{self._config.seed} {self._step} direction"))
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
