"""Progress of a pack: printed, and written into the run folders."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from sae_lora.common.console import percent, say
from sae_lora.common.isolation import Isolation
from sae_lora.config.identity import step_tokens, train_steps
from sae_lora.records.schema import CurvePoint, Progress
from sae_lora.run.active_run import ActiveRun
from sae_lora.saes.training.activation_buffer import FILLING
from sae_lora.train.evaluator import EVALUATING
from sae_lora.train.pace import Pace
from sae_lora.train.train_state import TrainState
from sae_lora.train.trainer import TRAINING

_EVERY_S = 1.0
"""Time between two reports of a stage. Reading a loss makes the CPU wait for the GPU."""


class Reporter:
    """Reports of the stages of a pack, about once a second.

    If a run folder cannot be written, only this run fails.

    Args:
        runs: The runs of the pack.
        show: Shows a stage to people, as `stage_display` does. One line stands for all runs.
        clock: The time in seconds.
    """

    def __init__(
        self,
        runs: Isolation[ActiveRun],
        show: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._show = show
        self._clock = clock
        self._each = runs.each
        self._training: _Training | None = None
        """`None` before training."""
        self._progress = {run: Progress("") for run in runs.runs}
        """The last step of each run."""
        self._losses = ""
        self._stage = ""
        self._stage_began = self._reported_at = -math.inf
        self._lasted: dict[str, float] = {}
        """Seconds that each stage took the last time."""

    def announce(self, text: str) -> None:
        """Print a stage whose share done is unknown, and write it into the folders."""
        say(text)
        self._enter(text)
        self._write(0, 0)

    def stage(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Report a stage and its share done. This is a `Report`; `step` reports steps."""
        is_new = stage != self._stage
        if is_new:
            self._enter(stage)
        elif stage == TRAINING:
            return
        # A stage that took less than a second the last time need not be shown at once.
        at_once = is_new and self._lasted.get(stage, math.inf) >= _EVERY_S
        if at_once or self._is_due:
            self._report(done, total)

    def begin(
        self, runs: Mapping[TrainState, ActiveRun], trainings: Isolation[TrainState], pace: Pace
    ) -> None:
        """Announce the training, and the step from which each run resumes."""
        self._training = _Training(runs, trainings, pace)
        self._each = self._training.each
        for training, run in runs.items():
            if step := training.step:
                prefix = f"{run.name}: " if len(runs) > 1 else ""
                say(f"{prefix}resuming from step {step:,} of {self._training.steps:,}")
            self._progress[run] = self._training.progress(training, training.loss)
        weights = ", ".join(f"{run.trainable:,}" for run in runs.values())
        together = f" in {len(runs)} runs" if len(runs) > 1 else ""
        say(f"training {weights} weights{together} on {self._training.train_tokens:,} tokens")
        self._enter(TRAINING)
        self._write(self._training.step, self._training.steps)

    def point(self, training: TrainState, point: CurvePoint) -> None:
        """Print an evaluation, with the name of the run if there are several runs."""
        assert self._training is not None
        runs = self._training.runs
        prefix = f"  {runs[training].name}" if len(runs) > 1 else ""
        rate = f"  {point.tokens_per_second:,.0f} tokens/s" if point.tokens_per_second else ""
        say(
            f"{prefix}  {point.tokens:>10,} tokens  student CE {point.student_ce:.4f}  "
            f"gap {point.ce_gap:+.4f}  closed {percent(point.gap_closed)}  KL {point.kl:.4f}{rate}"
        )

    def step(self, trained: Sequence[TrainState]) -> None:
        """Report a step of the runs `trained`."""
        assert self._training is not None
        if not trained or not (self._is_due or trained[0].has_ended):
            return
        losses = [training.loss for training in trained]  # each read waits for the device
        for training, loss in zip(trained, losses, strict=True):
            run = self._training.runs[training]
            self._progress[run] = self._training.progress(training, loss)
        self._losses = f"loss {min(losses):.3f}" + (f"–{max(losses):.3f}" if len(losses) > 1 else "")
        self._report(trained[0].step, self._training.steps)

    def _enter(self, stage: str) -> None:
        now = self._clock()
        self._lasted[self._stage] = now - self._stage_began
        self._stage, self._stage_began = stage, now

    @property
    def _is_due(self) -> bool:
        return self._clock() - self._reported_at >= _EVERY_S

    def _report(self, done: int, total: int) -> None:
        if self._training is None:
            self._write(done, total)
            self._show(self._stage, done, total)
            return
        if self._stage == TRAINING and not total:
            done, total = self._training.step, self._training.steps
        seconds_left = self._training.seconds_left(self._stage, done / total if total else 0.0)
        self._write(done, total, seconds_left)
        rate = self._training.tokens_per_second
        notes = [self._losses, f"{rate:,.0f} tokens/s" if rate else ""]
        self._show(self._stage, done, total, "  ".join(filter(None, notes)), seconds_left)

    def _write(self, done: int, total: int, seconds_left: float | None = None) -> None:
        """Write the stage, with the last step of each run, into the folders of the active runs."""
        self._reported_at = self._clock()
        stage = {"stage": self._stage, "done": done, "total": total, "seconds_left": seconds_left}
        self._each(lambda run: run.folder.write_progress(replace(self._progress[run], **stage)))


class _Training:
    """The training of a pack, as reports need it.

    Args:
        runs: The run of each training.
        trainings: The active trainings.
        pace: The measured durations.
    """

    def __init__(
        self, runs: Mapping[TrainState, ActiveRun], trainings: Isolation[TrainState], pace: Pace
    ) -> None:
        self.runs = runs
        self._trainings = trainings
        self._pace = pace
        config = next(iter(runs.values())).config  # batches and tokens are the same for all
        self.steps = train_steps(config)
        self.train_tokens = config.train.train_tokens
        self._step_tokens = step_tokens(config)
        self._eval_every = math.ceil(config.train.eval_every_tokens / self._step_tokens)

    def each(self, action: Callable[[ActiveRun], object]) -> None:
        """Apply the action to each active run."""
        self._trainings.each(lambda training: action(self.runs[training]))

    def progress(self, training: TrainState, loss: float) -> Progress:
        """The progress of one run after its last step."""
        return Progress(
            stage=TRAINING,
            step=training.step,
            steps=self.steps,
            tokens=training.tokens,
            train_tokens=self.train_tokens,
            loss=loss if math.isfinite(loss) else None,
            tokens_per_second=self.tokens_per_second,
            checkpoint_step=self.runs[training].checkpoint_step,
        )

    @property
    def step(self) -> int:
        """Steps of the run that is furthest behind."""
        return min((training.step for training in self._trainings.active), default=self.steps)

    @property
    def tokens_per_second(self) -> float | None:
        """The rate of `records/metrics.py`, over the last steps."""
        seconds = self._pace.step_seconds
        return self._step_tokens / seconds if seconds else None

    def seconds_left(self, stage: str, share: float) -> float | None:
        """Expected time until the end of the last evaluation, in a stage with this share done."""
        if not self._trainings.active or stage not in (TRAINING, FILLING, EVALUATING):
            return None
        last = min(self._trainings.active, key=lambda training: (training.step, training.points))
        evaluations = math.ceil((self.steps - (last.evaluated_at or 0)) / self._eval_every)
        evaluations += last.evaluated_at is None
        done = share if stage == EVALUATING else 0.0
        filled = share if stage == FILLING else 0.0
        return self._pace.seconds_left(last.step, self.steps, max(0.0, evaluations - done), filled)
