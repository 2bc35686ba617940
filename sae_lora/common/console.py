"""Messages for people: plain lines, tables, and a live bar in a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    """Print a table. If the output is not a terminal, the table takes the width that it needs."""
    width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    wide = Console(width=max(console.width, width), highlight=False)
    (console if console.is_terminal else wide).print(table)


def complain(what: str, text: str) -> None:
    """Print a problem to the error stream, as `what: text`."""
    errors.print(f"[red]{what}[/red]: {escape(redacted(text))}", soft_wrap=True)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rate = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text("" if rate is None else f"{rate:,.0f} {unit}/s", style="cyan")


@contextmanager
def progress_bar(description: str, unit: str) -> Iterator[Callable[..., None]]:
    """A live progress bar in a terminal. The first call of `count(done, total, note)` shows it."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}", style="green"),
        _Rate(),
        TimeElapsedColumn(),
        TextColumn("ETA", style="dim"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    task = progress.add_task(description, start=False, visible=False, unit=unit, note="")

    def count(done: int, total: int, note: str = "") -> None:
        progress.start_task(task)
        progress.update(task, completed=done, total=total, note=note, visible=True)

    with progress:
        yield count


def count(number: int, noun: str) -> str:
    """A number with its noun: `1 run`, `2 runs`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def percent(share: float | None) -> str:
    """A share in per cent; `undefined` for `None`."""
    return "undefined" if share is None else f"{share:.1%}"


def duration(seconds: float) -> str:
    """A duration in seconds as text: `3.2 s`, `4 min 05 s`, `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, whole_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole_seconds:02d} s"
