"""The loop that trains several students together: steps, curves, and the time of each."""

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
from sae_lora.train.train_state import State


class Task(NamedTuple):
    """Work of all processes, as the leader sends it to the others."""

    numbers: list[int]
    """The trainings, by their place among all."""
    tokens: Tensor | None = None
    """Tokens of a step, `[batch, pos]`, before they are shared out; `None` for an evaluation."""
    of_each: bool = False
    """True for an evaluation of what each SAE contributes."""


class Trainer(ABC, Generic[State]):
    """Students that go through the same batches together, each as if it were alone.

    Frozen parts are computed once for all. Students that are further than others wait.

    Args:
        device: Device of the model.
        trainings: Trainings of students of the same model, with equal numbers of steps.
        evaluate: Measures students on held-out tokens. The processes that share these also share the
            batches, each with a trainer like this one.
    """

    def __init__(
        self,
        device: torch.device,
        trainings: Isolation[State],
        evaluate: Evaluator,
    ) -> None:
        self._trainings = trainings
        self._processes = evaluate.processes
        self._device = device
        self._evaluate = evaluate
        self._timed_from: float | None = None
        """Start of the time that is not yet shared out; `None` while no time counts as training."""
        self._last_trained: list[State] = []

    @property
    def active(self) -> list[State]:
        """The trainings that have not failed."""
        return self._trainings.active

    @abstractmethod
    def _step(self, step: int, batches: Iterator[Tensor], trained: Sequence[State]) -> None:
        """Takes one step of several trainings.

        Args:
            step: Number of the step.
            batches: Training tokens `[batch, pos]`, continued after the last step.
            trained: The trainings that are at this step; none where all are further.
        """

    def follow(self, task: Task) -> None:
        """Does this process's share of a task of the leader."""
        raise NotImplementedError(f"{type(self).__name__} runs in one process")

    @property
    def first_batch(self) -> int:
        """Number of the batch of tokens that is read next."""
        return self.step

    @property
    def step(self) -> int:
        """Number of the next step: that of the training that is least far."""
        return min((training.step for training in self.active), default=0)

    def points(
        self,
        batches: Iterable[Tensor],
        after_step: Callable[[Sequence[State]], None] = lambda trained: None,
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[tuple[State, CurvePoint]]:
        """Trains to the end and yields points of the curves: before, between and after the steps.

        Args:
            batches: Training tokens `[batch, pos]`, one item a step, beginning with `first_batch`.
            after_step: Called after every step with the trainings that took it; `state()` is then sound.
            held: Entered around each step, to hold back what must not interrupt it.

        Raises:
            UserError: When a loss stops being a number, unless the isolation takes the error.
        """
        source = iter(batches)
        step = self.step
        yield from self._points_due()
        while not all(training.has_ended for training in self.active):
            self._start_clock()
            with held():
                trained = [training for training in self.active if training.step == step]
                self._step(step, source, trained)
                step += 1
                if trained:
                    self._last_trained = trained
                    self._share_seconds()
            after_step(self._still_left(trained))
            yield from self._points_due()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in the block is no training time."""
        self._stop_clock()
        yield
        self._start_clock()

    def contributions(self, training: State) -> dict[str, Contribution]:
        """The present contribution of each SAE of a student, by hookpoint."""
        self._stop_clock()
        self._broadcast([training], of_each=True)
        return self._evaluate.contributions(training.student)

    def _still_left(self, trained: Sequence[State]) -> list[State]:
        """The trainings among these that have not failed."""
        return [training for training in trained if training in self.active]

    def _broadcast(
        self, trainings: Sequence[State], tokens: Tensor | None = None, *, of_each: bool = False
    ) -> None:
        numbers = [self._trainings.runs.index(training) for training in trainings]
        self._processes.broadcast(Task(numbers, tokens, of_each))

    def _points_due(self) -> Iterator[tuple[State, CurvePoint]]:
        due = [training for training in self.active if training.evaluation_is_due]
        if not due:
            return
        self._stop_clock()
        self._broadcast(due)
        evaluations = self._evaluate([training.student for training in due])
        for training, evaluation in zip(due, evaluations, strict=True):
            point = None
            with self._trainings.only(training):
                point = training.point(evaluation)
            if point is not None:
                yield training, point
                # Only once the point has been taken over: stopped before, it is measured again.
                training.note_evaluation()

    def _start_clock(self) -> None:
        if self._timed_from is None:
            self._timed_from = time.perf_counter()

    def _stop_clock(self) -> None:
        if self._device.type == "cuda":  # a GPU works on after a step has returned
            torch.cuda.synchronize(self._device)
        self._share_seconds()
        self._timed_from = None

    def _share_seconds(self) -> None:
        """Shares out the time since the last call among the trainings that took the last step."""
        if self._timed_from is None:
            return
        start, self._timed_from = self._timed_from, time.perf_counter()
        for training in self._last_trained:
            training.add_seconds((self._timed_from - start) / len(self._last_trained))
