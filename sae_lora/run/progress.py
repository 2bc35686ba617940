"""What is said of a pack while it trains: to who watches it, and in the folders to who does not."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from sae_lora.common.console import Display, percent, say
from sae_lora.records.schema import CurvePoint, Progress
from sae_lora.run.active_run import Member
from sae_lora.train.train_state import Training

_SHOW_EVERY_S = 1.0


def say_point(point: CurvePoint, name: str | None = None) -> None:
    """Prints one evaluation as a line that stays.

    Args:
        point: What was measured.
        name: Of the run, where there are several.
    """
    rate = f"  {point.tokens_per_second:,.0f} tokens/s" if point.tokens_per_second else ""
    which = "" if name is None else f"  {name}"
    say(
        f"{which}  {point.tokens:>10,} tokens  student CE {point.student_ce:.4f}  "
        f"gap {point.ce_gap:+.4f}  closed {percent(point.gap_closed)}  KL {point.kl:.4f}{rate}"
    )


class Reporter:
    """Shows how training goes on, about once a second: reading a loss from a GPU is not free.

    Args:
        show: Shows it to who watches this process.
        members: The runs by their trainings.
        steps: Number of steps in all.
        own: Entered around what is written into one run's folder.
    """

    def __init__(
        self,
        show: Display,
        members: Mapping[Training, Member],
        steps: int,
        own: Callable[[Member], AbstractContextManager[None]],
    ) -> None:
        self._show = show
        self._members = members
        self._steps = steps
        self._own = own
        self._train_tokens = next(iter(members.values())).config.train.train_tokens
        self._count = show.counter("training", "tokens")
        self._last_time = time.monotonic()
        self._last_tokens: dict[Training, int] = {}

    def begin(self) -> None:
        """Says what is trained, and from where on."""
        members = list(self._members.values())
        for training, member in self._members.items():
            if step := training.step:
                which = f"{member.name}: " if len(members) > 1 else ""
                self._show.stage(f"{which}going on from step {step:,} of {self._steps:,}")
            self._write(training, training.loss, rate=None)
        weights = ", ".join(f"{member.trainable:,}" for member in members)
        runs = f" in {len(members)} runs" if len(members) > 1 else ""
        self._show.stage(f"training {weights} weights{runs} on {self._train_tokens:,} tokens")

    def step(self, trained: Sequence[Training]) -> None:
        """These have taken a step."""
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

    def _write(self, training: Training, loss: float, rate: float | None) -> None:
        member = self._members[training]
        progress = Progress(
            stage="training",
            step=training.step,
            steps=self._steps,
            tokens=training.tokens,
            train_tokens=self._train_tokens,
            loss=loss if math.isfinite(loss) else None,
            tokens_per_second=rate,
            checkpoint_step=member.checkpoint_step,
        )
        with self._own(member):
            member.folder.write_progress(progress)
