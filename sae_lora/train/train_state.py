"""The training of one student: its steps, its rate, its curve, and what a checkpoint keeps of them."""

import math
import resource
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

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
from sae_lora.train.lr_schedule import rate_factor

State = TypeVar("State", bound="TrainState")


class StepInfo(NamedTuple):
    """How a step has moved weights.

    Args:
        lr: At this rate.
        norm: Of the gradient before clipping; `None` where that is not known.
    """

    lr: float
    norm: Tensor | float | None


class TrainState(ABC):
    """The training of one student: how far it is, and all that is its own.

    Between two steps `state()` is all there is to know: put back into a new object with
    `restore()`, the rest of the curve and the adapters come out the same to the last bit.

    Args:
        student: What is trained.
        config: The optimisation.
        steps: Number of steps in all.
    """

    def __init__(self, student: Student, config: TrainConfig, steps: int) -> None:
        self.student = student
        self.step = 0
        """Optimiser steps taken."""
        self.tokens = 0
        """Tokens trained on."""
        self.is_between_steps = True
        """Whether `state()` is one to go on from: no error has left a step half taken."""
        self._config = config
        self._steps = steps
        self._device = self.student.model.device
        self._rate_factor = rate_factor(config, steps)
        self._interval = _Interval(self._device, _Read())
        self._train_seconds = 0.0
        self._points = 0
        self._evaluated_at: int | None = None
        self._next_evaluation = 0
        self._lr: float | None = None
        self._last_norm: Tensor | float | None = None
        self._last_loss: Tensor | None = None

    @property
    @abstractmethod
    def total(self) -> Tensor:
        """What this step is to make less, before it does so, summed over its tokens.

        KL(teacher ‖ student) in nats; of SAEs that learn to reconstruct, the squared error.
        """

    @abstractmethod
    def _update(self, lr: float, weight: float) -> StepInfo:
        """Moves the weights, at the end of a step.

        Args:
            lr: The rate of this step.
            weight: What the KL is multiplied by to be the loss; its gradient comes multiplied.
        """

    @abstractmethod
    def reset(self) -> None:
        """Leaves no trace of a step that has ended, or that came to nothing."""

    @abstractmethod
    def _own_state(self) -> Snapshot:
        """What the rest of the training depends on besides steps, tokens and the curve."""

    @abstractmethod
    def _restore_own(self, kept: Snapshot) -> None:
        """Puts back what `_own_state` gave, in this process or another."""

    @property
    def has_ended(self) -> bool:
        """Whether all its steps are taken."""
        return self.step == self._steps

    @property
    def loss(self) -> float:
        """What the last batch had to teach, per token, as `total`. Waits for the device."""
        return math.nan if self._last_loss is None else float(self._last_loss)

    def take_step(self, batch: torch.Size) -> None:
        """Ends the step, which was on so many tokens, `[batch, pos]`, of all processes."""
        lr, tokens = self._config.lr * self._rate_factor(self.step), batch.numel()
        self.is_between_steps = False
        info = self._update(lr, self.weight(batch))
        total = self.total
        self.step += 1
        self.tokens += tokens
        self._lr, self._last_norm, self._last_loss = info.lr, info.norm, total / tokens
        self._interval.add(total, tokens)
        self.reset()
        self.is_between_steps = True

    def weight(self, batch: torch.Size) -> float:
        """What the KL summed over `[batch, pos]` is multiplied by to be the loss."""
        per_token = self._config.kl_reduction is Reduction.token_mean
        return 1 / (batch.numel() if per_token else batch[0])

    def add_seconds(self, seconds: float) -> None:
        """Takes note of time spent training."""
        self._interval.seconds += seconds

    @property
    def evaluation_is_due(self) -> bool:
        """Whether a point belongs here that has not been taken over."""
        at_its_time = self.tokens >= self._next_evaluation or self.has_ended
        return at_its_time and self._evaluated_at != self.step

    def point(self, measured: Evaluation) -> CurvePoint:
        """The point of the curve that this evaluation makes.

        Raises:
            UserError: When the loss has stopped being a number.
        """
        interval = self._interval.read()
        self._refuse_nonsense(interval.kl)
        closed = gap_closed(measured.base_ce, measured.spliced_ce, measured.student_ce)
        return CurvePoint(
            step=self.step,
            tokens=self.tokens,
            train_seconds=self._train_seconds + interval.seconds,
            base_ce=measured.base_ce,
            spliced_ce=measured.spliced_ce,
            student_ce=measured.student_ce,
            ce_gap=measured.student_ce - measured.base_ce,
            gap_closed=None if self.student.is_new else closed,
            kl=measured.kl,
            top1_agreement=measured.top1_agreement,
            fvu=sum(measured.fvu.values()) / len(measured.fvu),
            l0=sum(measured.l0.values()) / len(measured.l0),
            dead_latents=sum(measured.dead.values()) / len(measured.dead),
            per_sae={
                hookpoint: {
                    "fvu": measured.fvu[hookpoint],
                    "l0": measured.l0[hookpoint],
                    "dead": measured.dead[hookpoint],
                }
                for hookpoint in measured.l0
            },
            train_loss=interval.kl / interval.tokens if interval.tokens else None,
            lr=self._lr,
            grad_norm=None if self._last_norm is None else float(self._last_norm),
            tokens_per_second=interval.tokens / interval.seconds if interval.tokens else None,
            peak_memory_gb=_peak_memory_gb(self._device),
        )

    def note_evaluation(self) -> None:
        """The point has been taken over."""
        self._train_seconds += self._interval.seconds
        self._interval = _Interval(self._device, _Read())
        self._points += 1
        self._evaluated_at = self.step
        self._next_evaluation = self.tokens + self._config.eval_every_tokens

    def _refuse_nonsense(self, kl: float) -> None:
        if not math.isfinite(kl):
            raise UserError(
                f"the training loss is {kl} after {self.tokens} tokens; "
                f"train.lr={self._config.lr:g} may be too high"
            )

    def state(self) -> Snapshot:
        """Everything that the rest of the training depends on, besides model, SAEs and text.

        Its values `step` and `points` say how many steps were taken and points taken over.

        Raises:
            UserError: When the loss has stopped being a number: that is no state to go on from.
        """
        interval = self._interval.read()
        self._refuse_nonsense(interval.kl)
        values = {
            "step": self.step,
            "tokens": self.tokens,
            "train_seconds": self._train_seconds,
            "points": self._points,
            "evaluated_at": self._evaluated_at,
            "next_evaluation": self._next_evaluation,
            "lr": self._lr,
            "grad_norm": None if self._last_norm is None else float(self._last_norm),
            "interval": interval._asdict(),
        }
        own = self._own_state()
        return Snapshot(own.tensors, values | {"learner": own.values})

    def restore(self, kept: Snapshot) -> None:
        """Puts back what `state()` gave, in this process or another."""
        values = kept.values
        self._restore_own(Snapshot(kept.tensors, values.get("learner", {})))
        self.step = values["step"]
        self.tokens = values["tokens"]
        self._train_seconds = values["train_seconds"]
        self._points = values["points"]
        self._evaluated_at = values["evaluated_at"]
        self._next_evaluation = values["next_evaluation"]
        self._lr = values["lr"]
        self._last_norm = values["grad_norm"]
        self._interval = _Interval(self._device, _Read(**values["interval"]))


class DistillState(TrainState):
    """The training of a student on the teacher's distribution.

    In each step `hidden` and `backward` are called for every part of the batch, then `take_step` once.
    """

    needs_gradient: bool
    """Whether `backward` wants the gradient of the KL."""

    @property
    @abstractmethod
    def sums(self) -> list[Tensor]:
        """What `backward` has summed in this step, to be added up over processes. May be changed."""

    @abstractmethod
    def hidden(self, trunk: Trunk) -> list[Tensor]:
        """What the head reads of the student in each of its passes, `[batch, pos, d_model]`."""

    @abstractmethod
    def backward(self, hidden: Sequence[Tensor], kl: Sequence[SummedKL]) -> None:
        """Takes in what a part of the batch says.

        Args:
            hidden: What `hidden` gave.
            kl: The KL of each, with its gradient where that is needed.
        """

    @abstractmethod
    def seed_rank(self, step: int, rank: int) -> None:
        """Drops other inputs in this step than the same training does in another process.

        Args:
            step: Its number.
            rank: Which process this is. What is drawn depends on the two and the seed alone.
        """


def _peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held so far, of the GPU or of the machine, in 10^9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class _Read(NamedTuple):
    """What an interval has gathered: summed KL in nats, tokens, seconds of training."""

    kl: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


class _Interval:
    """Loss, tokens and seconds since the last evaluation; reads the device only when asked."""

    def __init__(self, device: torch.device, so_far: _Read) -> None:
        self._kl = torch.tensor(so_far.kl, dtype=torch.float64, device=device)
        self._tokens = so_far.tokens
        self.seconds = so_far.seconds

    def add(self, kl: Tensor, tokens: int) -> None:
        self._kl += kl
        self._tokens += tokens

    def read(self) -> _Read:
        """Everything; waits for the device."""
        return _Read(float(self._kl), self._tokens, self.seconds)
