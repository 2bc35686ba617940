"""The loop that trains several students together: steps, evaluations, and training time."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from sae_lora.common.isolation import Isolation
from sae_lora.records.schema import CurvePoint
from sae_lora.train.evaluator import Contribution, Evaluator
from sae_lora.train.pace import Pace
from sae_lora.train.train_state import State

TRAINING = "training"
"""The stage of steps."""


class Task(NamedTuple):
    """A task for all processes, which the leader broadcasts."""

    numbers: list[int]
    """Indices of the trainings."""
    tokens: Tensor | None = None
    """Tokens of a step for all processes, `[batch, pos]`; `None` for an evaluation."""
    contributions: bool = False
    """True for an evaluation of the contribution of each SAE."""


class Trainer(ABC, Generic[State]):
    """Students that are trained together on the same batches, each as if it were trained alone.

    The frozen parts are computed once for all students. After a resume, students may be at different
    steps: those that are ahead wait.

    Args:
        device: Device of the model.
        trainings: The training of each student: the same model, the same total number of steps.
        evaluate: Evaluates students on held-out tokens. Its processes also share the training batches;
            each process has a trainer. Its `report` also hears of the steps.
        steps_per_fill: Steps that one filling of the activation buffer serves; 0 without a buffer.
    """

    def __init__(
        self,
        device: torch.device,
        trainings: Isolation[State],
        evaluate: Evaluator,
        steps_per_fill: int = 0,
    ) -> None:
        self.pace = Pace(steps_per_fill)
        """The measured durations of steps, fillings and evaluations."""
        self._trainings = trainings
        self._processes = evaluate.processes
        self._device = device
        self._evaluate = evaluate
        self._clock_start: float | None = None
        """Start of the training time that is not yet divided; `None` if the clock is stopped."""
        self._last_trained: list[State] = []
        self._filling = 0.0
        """Seconds of the time that is not yet divided in which the buffer was filled."""

    @property
    def active(self) -> list[State]:
        """The trainings that have neither failed nor ended early."""
        return self._trainings.active

    def _prepare(self, step: int, batches: Iterator[Tensor]) -> bool:
        """Do the work of a step that may be interrupted; return True if it filled a buffer.

        The arguments are those of `_step`.
        """
        return False

    @abstractmethod
    def _step(self, step: int, batches: Iterator[Tensor], trained: Sequence[State]) -> None:
        """Take one step of several trainings.

        Args:
            step: Number of the step.
            batches: Training tokens `[batch, pos]`; the next item is that of this step.
            trained: The trainings to move by this step. Empty if they have failed and all others are
                further on: the batch is then read and not used.
        """

    def follow(self, task: Task) -> None:
        """Do the share of this process in a task of the leader."""
        raise NotImplementedError(f"{type(self).__name__} runs in one process")

    @property
    def first_batch(self) -> int:
        """Index of the batch of tokens that is read next."""
        return self.step

    @property
    def step(self) -> int:
        """Index of the next step: that of the training that is furthest behind."""
        return min((training.step for training in self.active), default=0)

    def points(
        self,
        batches: Iterable[Tensor],
        after_step: Callable[[Sequence[State]], None] = lambda trained: None,
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
        after_points: Callable[[Sequence[State]], None] = lambda evaluated: None,
    ) -> Iterator[tuple[State, CurvePoint]]:
        """Train to the end, and yield points of the curves before, between and after the steps.

        Args:
            batches: Training tokens `[batch, pos]`, one item per step, beginning with `first_batch`.
            after_step: Called after every step with the trainings that took it; their `state()` is then
                complete.
            held: Entered around each step, to delay signals that would interrupt it. A buffer is filled
                outside, because this may take minutes and changes no weights.
            after_points: Called after every evaluation with the trainings whose points were yielded; it
                may end some of them.

        Raises:
            UserError: If a loss is no longer finite, unless the isolation handles the error.
        """
        source = iter(batches)
        step = self.step
        yield from self._points_due(after_points)
        while not all(training.has_ended for training in self.active):
            self._start_clock()
            began = time.perf_counter()
            if self._prepare(step, source):
                self._filling = time.perf_counter() - began
                self.pace.note_fill(step, self._filling)
            self._evaluate.report(TRAINING, 0, 0)
            with held():
                trained = [training for training in self.active if training.step == step]
                self._step(step, source, trained)
                step += 1
                if trained:
                    self._last_trained = trained
                    self._share_seconds(of_step=True)
            after_step(self._still_active(trained))
            yield from self._points_due(after_points)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent in the block as training time."""
        self._stop_clock()
        yield
        self._start_clock()

    def contributions(self, training: State) -> dict[str, Contribution]:
        """The present contribution of each SAE of a student, by hookpoint."""
        self._stop_clock()
        self._broadcast([training], contributions=True)
        return self._evaluate.contributions(training.student)

    def _still_active(self, trained: Sequence[State]) -> list[State]:
        """The active trainings among these."""
        return [training for training in trained if training in self.active]

    def _broadcast(
        self, trainings: Sequence[State], tokens: Tensor | None = None, *, contributions: bool = False
    ) -> None:
        numbers = [self._trainings.runs.index(training) for training in trainings]
        self._processes.broadcast(Task(numbers, tokens, contributions))

    def _points_due(
        self, after_points: Callable[[Sequence[State]], None]
    ) -> Iterator[tuple[State, CurvePoint]]:
        due = [training for training in self.active if training.evaluation_is_due]
        if not due:
            return
        self._stop_clock()
        self._broadcast(due)
        began = time.perf_counter()
        evaluations = self._evaluate([training.student for training in due])
        self.pace.evaluation_seconds = time.perf_counter() - began
        for training, evaluation in zip(due, evaluations, strict=True):
            if training not in self.active:
                continue
            point = None
            with self._trainings.only(training):
                point = training.point(evaluation)
            if point is not None:
                yield training, point
                # After the caller has recorded the point: if it stops earlier, the point is measured
                # again.
                training.note_evaluation()
        after_points(self._still_active(due))

    def _start_clock(self) -> None:
        if self._clock_start is None:
            self._clock_start = time.perf_counter()

    def _stop_clock(self) -> None:
        if self._device.type == "cuda":  # a step returns before the GPU has finished
            torch.cuda.synchronize(self._device)
        self._share_seconds()
        self._clock_start = None

    def _share_seconds(self, *, of_step: bool = False) -> None:
        """Divide the time since the last call among the trainings that took the last step.

        Args:
            of_step: True right after a step, false for work after it.
        """
        if self._clock_start is None:
            return
        start, self._clock_start = self._clock_start, time.perf_counter()
        seconds = wall_seconds = self._clock_start - start
        if of_step:
            wall_seconds = self.pace.note_step(seconds - self._filling)
            self._filling = 0.0
        for training in self._last_trained:
            training.add_seconds(seconds / len(self._last_trained), wall_seconds)
