"""Progress of a pack in training, printed and written into the run folders."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

from sae_lora.common.console import percent, say
from sae_lora.common.isolation import Isolation
from sae_lora.config.identity import train_steps
from sae_lora.records.schema import CurvePoint, Progress
from sae_lora.run.active_run import ActiveRun
from sae_lora.train.train_state import TrainState

_SHOW_EVERY_S = 1.0


class Reporter:
    """Reports of progress, about once a second, because reading a loss makes the CPU wait for the GPU.

    If a run folder cannot be written, only this run fails.
    """

    def __init__(
        self,
        count: Callable[..., None],
        runs: Mapping[TrainState, ActiveRun],
        isolation: Isolation[TrainState],
    ) -> None:
        self._count = count
        self._runs = runs
        self._isolation = isolation
        config = next(iter(runs.values())).config  # batches and tokens are the same for all
        self._steps = train_steps(config)
        self._train_tokens = config.train.train_tokens
        self._last_time = time.monotonic()
        self._last_tokens: dict[TrainState, int] = {}

    def begin(self) -> None:
        """Announce the training, and the step from which each run resumes."""
        runs = list(self._runs.values())
        for training, run in self._runs.items():
            if step := training.step:
                prefix = f"{run.name}: " if len(runs) > 1 else ""
                say(f"{prefix}resuming from step {step:,} of {self._steps:,}")
            self._write(training, training.loss, rate=None)
        weights = ", ".join(f"{run.trainable:,}" for run in runs)
        together = f" in {len(runs)} runs" if len(runs) > 1 else ""
        say(f"training {weights} weights{together} on {self._train_tokens:,} tokens")

    def point(self, training: TrainState, point: CurvePoint) -> None:
        """Print an evaluation, with the name of the run if there are several runs."""
        prefix = f"  {self._runs[training].name}" if len(self._runs) > 1 else ""
        rate = f"  {point.tokens_per_second:,.0f} tokens/s" if point.tokens_per_second else ""
        say(
            f"{prefix}  {point.tokens:>10,} tokens  student CE {point.student_ce:.4f}  "
            f"gap {point.ce_gap:+.4f}  closed {percent(point.gap_closed)}  KL {point.kl:.4f}{rate}"
        )

    def step(self, trained: Sequence[TrainState]) -> None:
        """Report a step of the runs `trained`."""
        now = time.monotonic()
        seconds = now - self._last_time
        if not trained or (seconds < _SHOW_EVERY_S and not trained[0].has_ended):
            return
        losses = [training.loss for training in trained]  # each read waits for the device
        for training, loss in zip(trained, losses, strict=True):
            last = self._last_tokens.get(training)
            self._write(training, loss, None if last is None else (training.tokens - last) / seconds)
        spread = f"loss {min(losses):.3f}" + (f"–{max(losses):.3f}" if len(losses) > 1 else "")
        self._count(trained[0].tokens, self._train_tokens, spread)
        self._last_time = now
        self._last_tokens = {training: training.tokens for training in trained}

    def _write(self, training: TrainState, loss: float, rate: float | None) -> None:
        run = self._runs[training]
        progress = Progress(
            stage="training",
            step=training.step,
            steps=self._steps,
            tokens=training.tokens,
            train_tokens=self._train_tokens,
            loss=loss if math.isfinite(loss) else None,
            tokens_per_second=rate,
            checkpoint_step=run.checkpoint_step,
        )
        with self._isolation.only(training):
            run.folder.write_progress(progress)
