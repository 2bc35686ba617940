"""The loop that trains several students together: steps, curves, and whose the time is."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Generic, NamedTuple

import torch
from torch import Tensor

from sae_lora.common.isolation import Isolation
from sae_lora.records.schema import CurvePoint
from sae_lora.train.distributed import ProcessGroup, SingleProcess
from sae_lora.train.evaluator import Contribution, Evaluator
from sae_lora.train.train_state import State


class Task(NamedTuple):
    """What the process that leads tells the others to do with it.

    Args:
        numbers: Which trainings, as they were given.
        tokens: `[batch, pos]` for a step, of which each takes its part; `None` for an evaluation.
        of_each: Whether the evaluation is of what each SAE contributes.
    """

    numbers: list[int]
    tokens: Tensor | None = None
    of_each: bool = False


class Trainer(ABC, Generic[State]):
    """Students that go through the same batches together, each as if it were alone.

    What is frozen is computed once for all. Where some are further than others, those wait.

    Args:
        device: Where they are.
        trainings: Of students of the same model, with equal numbers of steps.
        evaluate: Measures them on held-out tokens.
        processes: The processes that share the batches, each with a trainer like this one.
    """

    def __init__(
        self,
        device: torch.device,
        trainings: Isolation[State],
        evaluate: Evaluator,
        processes: ProcessGroup | None = None,
    ) -> None:
        self._trainings = trainings
        self._processes = processes or SingleProcess()
        self._device = device
        self._evaluate = evaluate
        self._clock = _Clock()
        self._at_work: list[State] = []

    @property
    def left(self) -> list[State]:
        """Those that have not failed."""
        return self._trainings.left

    @abstractmethod
    def _step(self, step: int, batches: Iterator[Tensor], trained: Sequence[State]) -> None:
        """Takes one step of each of these.

        Args:
            step: Its number.
            batches: Training tokens `[batch, pos]`, from where the step before has left them.
            trained: Those that are just so far; none where all that are left are further.
        """

    def follow(self, task: Task) -> None:
        """Does this process's share of what the leader's trainer does."""
        raise NotImplementedError(f"{type(self).__name__} runs in one process")

    @property
    def first_batch(self) -> int:
        """Number of the batch of tokens that is read next."""
        return self.step

    @property
    def step(self) -> int:
        """The step that comes next: that of the training that is least far."""
        return min((training.step for training in self.left), default=0)

    def points(
        self,
        batches: Iterable[Tensor],
        after_step: Callable[[Sequence[State]], None] = lambda trained: None,
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[tuple[State, CurvePoint]]:
        """Trains to the end; yields each training's points before the first step, on the way, and
        after the last.

        Args:
            batches: Training tokens `[batch, pos]`, one item a step, beginning with `first_batch`.
            after_step: Called after every step with those that took it, when `state()` may be taken.
            held: Entered around each step: what it keeps out cannot leave one half done.

        Raises:
            UserError: When a loss stops being a number, unless the isolation takes the error.
        """
        source = iter(batches)
        step = self.step
        yield from self._points_due()
        while not all(training.has_ended for training in self.left):
            self._clock.run()
            with held():
                trained = [training for training in self.left if training.step == step]
                self._step(step, source, trained)
                step += 1
                if trained:
                    self._at_work = list(trained)
                    self._share_seconds()
            after_step(self._still_left(trained))
            yield from self._points_due()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in the block is no training time."""
        self._stop_clock()
        yield
        self._clock.run()

    def contributions(self, training: State) -> dict[str, Contribution]:
        """What each SAE of a student contributes, by hookpoint, with everything as it is now."""
        self._stop_clock()
        self._broadcast([training], of_each=True)
        return self._evaluate.contributions(training.student)

    def _still_left(self, trained: Sequence[State]) -> list[State]:
        """Those of them that have not failed."""
        return [training for training in trained if training in self.left]

    def _broadcast(
        self, trainings: Sequence[State], tokens: Tensor | None = None, *, of_each: bool = False
    ) -> None:
        numbers = [self._trainings.runs.index(training) for training in trainings]
        self._processes.broadcast(Task(numbers, tokens, of_each))

    def _points_due(self) -> Iterator[tuple[State, CurvePoint]]:
        due = [training for training in self.left if training.evaluation_is_due]
        if not due:
            return
        self._stop_clock()
        self._broadcast(due)
        measured = self._evaluate([training.student for training in due])
        for training, found in zip(due, measured, strict=True):
            points: list[CurvePoint] = []
            with self._trainings.only(training):
                points.append(training.point(found))
            for point in points:
                yield training, point
                # Only once the point has been taken over: stopped before, it is measured again.
                training.note_evaluation()

    def _stop_clock(self) -> None:
        if self._device.type == "cuda":  # a GPU works on after a step has returned
            torch.cuda.synchronize(self._device)
        self._share_seconds()
        self._clock.stop()

    def _share_seconds(self) -> None:
        """The time since it was last asked for belongs in equal parts to those that trained."""
        seconds = self._clock.lap()
        for training in self._at_work:
            training.add_seconds(seconds / len(self._at_work))


class _Clock:
    """Tells how long it has run since it was last asked."""

    def __init__(self) -> None:
        self._asked: float | None = None

    def run(self) -> None:
        """Starts it, where it stands."""
        if self._asked is None:
            self._asked = time.perf_counter()

    def lap(self) -> float:
        """Seconds that it has run since."""
        if self._asked is None:
            return 0.0
        before, self._asked = self._asked, time.perf_counter()
        return self._asked - before

    def stop(self) -> None:
        """Stops it; what it has run since is lost."""
        self._asked = None
