"""Messages for people: plain lines, tables, and the progress of a stage as a bar or as lines."""

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from sae_lora.common.secrets import redacted

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """Print a line as it is: no markup, no line breaks, secrets hidden."""
    console.print(redacted(text), markup=False, soft_wrap=True)


def show(table: Table) -> None:
    """Print a table. If the output is not a terminal, the table takes the width that it needs.

    Its title and its caption may be wider than a narrow table.
    """
    bare = copy.copy(table)
    bare.title = bare.caption = None
    width = console.measure(bare, options=console.options.update(max_width=10_000)).maximum
    wide = Console(width=max(console.width, width), highlight=False)
    for part in (table.title, bare, table.caption):
        if isinstance(part, Table):
            (console if console.is_terminal else wide).print(part)
        elif part:
            console.print(part, style="italic", highlight=False, soft_wrap=not console.is_terminal)


def complain(what: str, text: str) -> None:
    """Print a problem to the error stream, as `what: text`."""
    errors.print(f"[red]{what}[/red]: {escape(redacted(text))}", soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text(f"{rate:,.0f} {unit}/s" if unit and rate is not None else "", style="cyan")


class _Remaining(TimeRemainingColumn):
    def render(self, task: Task) -> Text:
        seconds = task.fields["seconds_left"]
        return super().render(task) if seconds is None else Text(duration(seconds), style="cyan")


Report = Callable[[str, int, int], object]
"""Called with the present stage of the work, and the number of its parts that are done and in total;
both are 0 if they are unknown."""
PROGRESS_MARK = "… "
"""Beginning of a line that only shows progress. A live view shows the same and leaves such lines out."""
_MOST_COUNTED = 100
"""Largest number of parts of a stage that are counted one by one; more are shown in per cent."""


def no_report(stage: str, done: int, total: int) -> None:
    """A `Report` that does nothing."""


def stage_text(stage: str, done: int = 0, total: int = 0) -> str:
    """A stage with its share done: `loading model`, `evaluating 3/16`, `tokenising 40%`."""
    if total <= 1:
        return stage
    return f"{stage} {done}/{total}" if total <= _MOST_COUNTED else f"{stage} {done / total:.0%}"


class Spacing:
    """The times of lines that repeat: ten seconds apart, and after minutes at 2% of the time so far."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._last = clock()

    def is_due(self, lines: int = 1) -> bool:
        """True if it is time for this number of lines."""
        now = self._clock()
        return now - self._last >= lines * max(10.0, 0.02 * (now - self._start))

    def restart(self) -> None:
        """Count from now on: a line is printed."""
        self._last = self._clock()


@contextmanager
def stage_display(
    unit: str = "", announced: Iterable[str] = (), clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[..., None]]:
    """Show stages: in a terminal as a bar, else as lines, one for a new stage and then rarely.

    The function is called as `show(stage, done, total, note, seconds_left)`; all but the stage may be
    left out.

    Args:
        unit: Unit of the parts of a stage, for their rate.
        announced: Stages whose first line another message replaces.
        clock: The time in seconds.
    """
    if console.is_terminal:
        yield from _bar(unit)
        return
    printed, spacing = set(announced), Spacing(clock)

    def show(
        stage: str, done: int = 0, total: int = 0, note: str = "", seconds_left: float | None = None
    ) -> None:
        if stage in printed and not spacing.is_due():
            return
        printed.add(stage)
        spacing.restart()
        eta = "" if seconds_left is None else f"ETA {duration(seconds_left)}"
        say(PROGRESS_MARK + "  ".join(filter(None, (stage_text(stage, done, total), note, eta))))

    yield show


def _bar(unit: str) -> Iterator[Callable[..., None]]:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", style="green"),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("ETA", style="dim"),
        _Remaining(),
        console=console,
        transient=True,
    )
    task = progress.add_task("", start=False, visible=False, unit=unit, note="", seconds_left=None)
    current = ""

    def show(
        stage: str, done: int = 0, total: int = 0, note: str = "", seconds_left: float | None = None
    ) -> None:
        nonlocal current
        if stage != current:
            progress.reset(task, description=stage, visible=True)
            current = stage
        size = total or None
        progress.update(task, completed=done, total=size, note=note, seconds_left=seconds_left)

    with progress:
        yield show


@contextmanager
def progress_bar(stage: str, unit: str) -> Iterator[Callable[..., None]]:
    """Show one stage, with `count(done, total, note)`."""
    with stage_display(unit) as show:
        yield partial(show, stage)


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 run`, `2 runs`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def percent(share: float | None) -> str:
    """A share in per cent; a dash for `None`."""
    return "–" if share is None else f"{share:.1%}"


def duration(seconds: float) -> str:
    """A duration in seconds as text: `3.2 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole_seconds:02d} s"
