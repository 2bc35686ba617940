"""The training loop: students learn the teacher's distribution; only adapters move."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from sae_lora.kl import KL
from sae_lora.metrics import Evaluator
from sae_lora.models import LanguageModel
from sae_lora.records import CurvePoint
from sae_lora.student import cuts
from sae_lora.training import Training
from sae_lora.trunk import Trunk
from sae_lora.workers import Alone, Workers

Run = TypeVar("Run")
AT_ONCE = 8
"""Students of a pack whose activations are held at once. For others the teacher's logits are made once
more: a third of what those of one student and their gradient take."""


class Task(NamedTuple):
    """What the process that leads tells the others to do with it.

    Args:
        numbers: Which trainings, as they were given.
        tokens: `[batch, pos]` for a step, of which each takes its part; `None` for an evaluation.
    """

    numbers: list[int]
    tokens: Tensor | None = None


class Pack:
    """Trainings that go through the same batches together, each as if it were alone.

    What is frozen is computed once for all. Where some are further than others, those wait.

    Args:
        model: The plain model of them all.
        trainings: Of students of this model, with equal numbers of steps.
        evaluate: Measures them on held-out tokens.
        special_ids: Ids `[n]` whose positions some SAEs leave as they are.
        kl: Finds the KL of several students.
        micro_batch: Sequences per forward and backward pass; all of a step if `None`.
        own: Entered around what concerns one training alone; it may keep an exception to itself,
            and then has called `drop`.
        workers: The processes that share the batches, each with a pack like this one.
    """

    def __init__(
        self,
        model: LanguageModel,
        trainings: Iterable[Training],
        evaluate: Evaluator,
        special_ids: Tensor,
        kl: KL,
        micro_batch: int | None = None,
        own: Callable[[Training], AbstractContextManager[None]] = lambda training: nullcontext(),
        workers: Workers | None = None,
    ) -> None:
        self._trainings = list(trainings)
        self.left = self._trainings.copy()
        """Those that have not been dropped."""
        self._workers = workers or Alone()
        self._model = model
        self._evaluate = evaluate
        self._special_ids = special_ids
        self._kl = kl
        self._micro_batch = micro_batch
        self._own = own
        self._clock = _Clock()
        self._at_work: list[Training] = []

    def drop(self, training: Training) -> None:
        """Goes on without it."""
        training.forget_step()
        self.left.remove(training)

    @property
    def step(self) -> int:
        """The step that comes next: that of the training that is least far."""
        return min((training.step for training in self.left), default=0)

    def points(
        self,
        batches: Iterable[Tensor],
        after_step: Callable[[Sequence[Training]], None] = lambda trained: None,
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[tuple[Training, CurvePoint]]:
        """Trains to the end; yields each training's points before the first step, on the way, and
        after the last.

        Args:
            batches: Training tokens `[batch, pos]`, one item a step, beginning with that of `step`.
            after_step: Called after every step with those that took it, when `state()` may be taken.
            held: Entered around each step: what it keeps out cannot leave one half done.

        Raises:
            UserError: When a loss stops being a number, unless `own` keeps that to itself.
        """
        source = iter(batches)
        step = self.step
        yield from self._points_due()
        while not all(training.has_ended for training in self.left):
            self._clock.run()
            with held():
                tokens = next(source)
                trained = [training for training in self.left if training.step == step]
                step += 1
                if trained:  # or all that are left are further
                    self._tell(trained, tokens)
                    self._take_step(trained, self._on_device(tokens))
            after_step(self._of(trained))
            yield from self._points_due()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent in the block is no training time."""
        self._stop_clock()
        yield
        self._clock.run()

    def follow(self, task: Task) -> None:
        """Does this process's share of what the leader's pack does."""
        trainings = [self._trainings[number] for number in task.numbers]
        if task.tokens is None:
            self._evaluate([training.student for training in trainings])
            return
        for training in trainings:
            training.draw_apart(self._workers.rank)
        self._take_step(trainings, self._on_device(task.tokens))

    def _tell(self, trainings: Sequence[Training], tokens: Tensor | None = None) -> None:
        self._workers.tell(Task([self._trainings.index(training) for training in trainings], tokens))

    def _on_device(self, tokens: Tensor) -> Tensor:
        """The tokens where the model is; a GPU fetches them from pinned memory while it computes."""
        device = self._model.device
        return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens

    def _take_step(self, trained: Sequence[Training], tokens: Tensor) -> None:
        """One step of each on the tokens `[batch, pos]`."""
        own = self._workers.part(tokens)

        # ---- the step -------------------------------------------------------------------------
        for part in own.split(self._micro_batch or len(own)):
            trunk = Trunk(self._model, part, self._special_ids, cuts(one.student for one in trained))
            teacher = trunk.hidden()
            for turn in turns(self._of(trained)):
                hidden: dict[Training, list[Tensor]] = {}
                for training in turn:
                    with self._own(training):
                        hidden[training] = training.hidden(trunk)
                passes = [states for several in hidden.values() for states in several]
                weights = [
                    one.gradient_weight(tokens) for one, several in hidden.items() for _ in several
                ]
                found = iter(self._kl(teacher, passes, weights))
                del passes
                for training in list(hidden):
                    states = hidden.pop(training)
                    with self._own(training):
                        training.absorb(states, [next(found) for _ in states])
        self._workers.add_up([part for training in trained for part in training.sums])
        for training in self._of(trained):
            with self._own(training):
                training.learn(tokens)
        # ---------------------------------------------------------------------------------------

        self._at_work = list(trained)
        self._share_seconds()

    def _of(self, trained: Sequence[Training]) -> list[Training]:
        """Those of them that have not been dropped."""
        return [training for training in trained if training in self.left]

    def _points_due(self) -> Iterator[tuple[Training, CurvePoint]]:
        due = [training for training in self.left if training.evaluation_is_due]
        if not due:
            return
        self._stop_clock()
        self._tell(due)
        measured = self._evaluate([training.student for training in due])
        for training, found in zip(due, measured, strict=True):
            points: list[CurvePoint] = []
            with self._own(training):
                points.append(training.point(found))
            for point in points:
                yield training, point
                # Only once the point has been taken over: stopped before, it is measured again.
                training.note_evaluation()

    def _stop_clock(self) -> None:
        if self._model.device.type == "cuda":  # a GPU works on after a step has returned
            torch.cuda.synchronize(self._model.device)
        self._share_seconds()
        self._clock.stop()

    def _share_seconds(self) -> None:
        """The time since it was last asked for belongs in equal parts to those that trained."""
        seconds = self._clock.lap()
        for training in self._at_work:
            training.add_seconds(seconds / len(self._at_work))


def turns(runs: Sequence[Run]) -> list[Sequence[Run]]:
    """Those of a pack that go through a batch at the same time."""
    return [runs[start : start + AT_ONCE] for start in range(0, len(runs), AT_ONCE)]


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
