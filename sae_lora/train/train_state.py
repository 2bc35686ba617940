"""The training of one student: its steps, its curve, and its state for checkpoints."""

import math
import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.config.enums import Reduction
from sae_lora.config.schema import TrainConfig
from sae_lora.records.schema import CurvePoint, gap_closed
from sae_lora.splice.kl import SummedKL
from sae_lora.splice.student import Student
from sae_lora.splice.trunk import Trunk
from sae_lora.train.checkpoint import Snapshot
from sae_lora.train.evaluator import Evaluation
from sae_lora.train.lr_schedule import lr_factor

State = TypeVar("State", bound="TrainState")


_PROGRESS = ("step", "tokens", "train_seconds", "points", "evaluated_at", "next_evaluation", "lr")
"""Attributes of a `TrainState` that a checkpoint stores under the same names."""


@dataclass
class _Interval:
    """The training since the last evaluation."""

    kl: Tensor
    """Summed over tokens, in nats. It stays on the device, because reading it waits for the device."""
    tokens: int = 0
    seconds: float = 0.0
    """The share of this training in the time of the process."""
    wall_seconds: float = 0.0
    """The time of the process, with the filling of the buffer spread evenly over its steps."""


class TrainState(ABC):
    """The training of one student: its progress, its optimiser, and all other state of its own.

    Between two steps `state()` is complete: a new object that it is restored into gives the same rest of
    the curve and the same trained weights, to the last bit.

    Args:
        student: The model with its SAEs and trained weights.
        config: The optimisation.
        steps: Total number of steps.
    """

    def __init__(self, student: Student, config: TrainConfig, steps: int) -> None:
        self.student = student
        self.step = 0
        """Optimiser steps taken."""
        self.tokens = 0
        """Tokens trained on."""
        self.is_between_steps = True
        """True if training can resume from `state()`; false after an error in the middle of a step."""
        self._config = config
        self._steps = steps
        self._device = self.student.model.device
        self.total = zero(self._device)
        """The loss of this step, summed over its tokens: KL(teacher ‖ student) in nats, or the squared
        error of SAEs that learn to reconstruct. It is complete after `_update`."""
        self._interval = _Interval(zero(self._device))
        self.train_seconds = 0.0
        """Seconds of training up to the last evaluation."""
        self.points = 0
        """Number of points of the curve that were recorded."""
        self.evaluated_at: int | None = None
        """Step of the last recorded point."""
        self.next_evaluation = 0
        """Number of tokens after which the next evaluation is due."""
        self.lr: float | None = None
        """Learning rate of the last step."""
        self._last_norm: Tensor | float | None = None
        self._last_loss: Tensor | None = None

    @abstractmethod
    def _update(self, lr: float, batch: torch.Size) -> Tensor | float | None:
        """Move the weights at the end of a step.

        Args:
            lr: The learning rate of this step.
            batch: Shape of its tokens, `[batch, pos]`, over all processes.

        Returns:
            The norm of the gradient before clipping, if it is known.
        """

    @abstractmethod
    def reset(self) -> None:
        """Clear the sums and gradients of a step, after it has ended or failed."""

    @abstractmethod
    def _method_state(self) -> Snapshot:
        """The state of the method: everything besides steps, tokens and the curve."""

    @abstractmethod
    def _restore_method(self, snapshot: Snapshot) -> None:
        """Put a result of `_method_state` back, in this process or another."""

    @property
    def has_ended(self) -> bool:
        """True if all steps are taken."""
        return self.step == self._steps

    @property
    def loss(self) -> float:
        """`total` of the last step, per token. Waits for the device."""
        return math.nan if self._last_loss is None else float(self._last_loss)

    def take_step(self, batch: torch.Size) -> None:
        """Complete a step: update the weights. The tokens of all processes have the shape `batch`."""
        tokens = batch.numel()
        self.is_between_steps = False
        self.lr = self._config.lr * lr_factor(self._config, self._steps, self.step)
        self._last_norm = self._update(self.lr, batch)
        self.step += 1
        self.tokens += tokens
        self._last_loss = self.total / tokens
        self._interval.kl += self.total
        self._interval.tokens += tokens
        self.reset()
        self.is_between_steps = True

    def weight(self, batch: torch.Size) -> float:
        """The factor between the loss and the KL summed over a batch of this shape, `[batch, pos]`."""
        per_token = self._config.kl_reduction is Reduction.token_mean
        return 1 / (batch.numel() if per_token else batch[0])

    def add_seconds(self, seconds: float, wall_seconds: float) -> None:
        """Add time spent training: the share of this training, and the time of the process."""
        self._interval.seconds += seconds
        self._interval.wall_seconds += wall_seconds

    @property
    def evaluation_is_due(self) -> bool:
        """True if the curve needs a point at this step and none was recorded yet."""
        is_time = self.tokens >= self.next_evaluation or self.has_ended
        return is_time and self.evaluated_at != self.step

    def point(self, measured: Evaluation) -> CurvePoint:
        """The point of the curve for an evaluation.

        Raises:
            UserError: If the training loss is no longer finite.
        """
        interval, kl = self._interval, self._finite_kl()
        closed = gap_closed(
            measured.base_ce, measured.spliced_ce, measured.student_ce, measured.rounding
        )

        def mean(measure: str) -> float:
            return sum(sae[measure] for sae in measured.per_sae.values()) / len(measured.per_sae)

        return CurvePoint(
            step=self.step,
            tokens=self.tokens,
            train_seconds=self.train_seconds + interval.seconds,
            base_ce=measured.base_ce,
            spliced_ce=measured.spliced_ce,
            student_ce=measured.student_ce,
            ce_gap=measured.student_ce - measured.base_ce,
            gap_closed=None if self.student.is_new else closed,
            kl=measured.kl,
            top1_agreement=measured.top1_agreement,
            fvu=mean("fvu"),
            fvu_without_outliers=mean("fvu_without_outliers"),
            l0=mean("l0"),
            dead_latents=mean("dead"),
            per_sae=measured.per_sae,
            train_loss=kl / interval.tokens if interval.tokens else None,
            lr=self.lr,
            grad_norm=self._grad_norm(),
            tokens_per_second=interval.tokens / interval.wall_seconds if interval.tokens else None,
            peak_memory_gb=_peak_memory_gb(self._device),
        )

    def note_evaluation(self) -> None:
        """Record that a point was taken, and begin the next interval."""
        self.train_seconds += self._interval.seconds
        self._interval = _Interval(zero(self._device))
        self.points += 1
        self.evaluated_at = self.step
        self.next_evaluation = self.tokens + self._config.eval_every_tokens

    def _grad_norm(self) -> float | None:
        """The norm of the last gradient. Waits for the device."""
        return None if self._last_norm is None else float(self._last_norm)

    def _finite_kl(self) -> float:
        """The summed KL of the interval. Waits for the device."""
        kl = float(self._interval.kl)
        if not math.isfinite(kl):
            raise UserError(
                f"the training loss is {kl} after {self.tokens} tokens; "
                f"train.lr={self._config.lr:g} may be too high"
            )
        return kl

    def state(self) -> Snapshot:
        """Everything that the rest of the training depends on, besides model, SAEs and text.

        Its values `step` and `points` are the number of steps taken and of points recorded.

        Raises:
            UserError: If the training loss is no longer finite: training cannot resume from there.
        """
        tensors, values = self._method_state()
        progress = {name: getattr(self, name) for name in _PROGRESS}
        interval = vars(self._interval) | {"kl": self._finite_kl()}
        progress |= {"grad_norm": self._grad_norm(), "interval": interval, "learner": values}
        return Snapshot(tensors, progress)

    def restore(self, snapshot: Snapshot) -> None:
        """Put a result of `state()` back, in this process or another."""
        values = snapshot.values
        self._restore_method(Snapshot(snapshot.tensors, values.get("learner", {})))
        for name in _PROGRESS:
            setattr(self, name, values[name])
        self._last_norm = values["grad_norm"]
        interval = values["interval"]
        kl = torch.tensor(interval["kl"], dtype=torch.float64, device=self._device)
        seconds = interval["seconds"]  # checkpoints of older versions have no other time
        wall_seconds = interval.get("wall_seconds", seconds)
        self._interval = _Interval(kl, interval["tokens"], seconds, wall_seconds)


class DistillState(TrainState):
    """The training of a student on the teacher's distribution.

    In each step, `hidden` and `backward` are called for every part of the batch, then `take_step` once.
    """

    needs_gradient: bool
    """True if `backward` needs the gradient of the KL."""

    @property
    @abstractmethod
    def sums(self) -> list[Tensor]:
        """The sums of this step so far. They are reduced over all processes in place."""

    @abstractmethod
    def hidden(self, trunk: Trunk) -> list[Tensor]:
        """The student's input to the head in each of its passes, `[batch, pos, d_model]`."""

    @abstractmethod
    def backward(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        """Add a part of the batch to the step.

        Args:
            hidden: The result of `hidden` for this part.
            kl: The KL of each pass, with its gradient if `needs_gradient`.
        """

    def seed_rank(self, rank: int) -> None:
        """Seed the dropout of this step with the run's seed, the step and the rank of the process."""

    def _method_state(self) -> Snapshot:
        weights = self.student.weights.items()
        return Snapshot({f"adapter/{name}": weight.detach() for name, weight in weights}, {})

    def _restore_method(self, snapshot: Snapshot) -> None:
        for name, weight in self.student.weights.items():
            weight.data.copy_(snapshot.tensors[f"adapter/{name}"])


def zero(device: torch.device) -> Tensor:
    """A sum that starts at zero, in float64."""
    return torch.zeros((), dtype=torch.float64, device=device)


def _peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, on the GPU or else on the machine, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
