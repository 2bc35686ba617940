"""The progress of runs, read from their folders: a live view in a terminal or notebook, or lines."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sae_lora.common.console import console, duration, percent, say
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Progress
from sae_lora.records.status import State, counts, read_statuses

_COLOURS = {
    State.new: "dim",
    State.queued: "blue",
    State.running: "cyan",
    State.resumable: "yellow",
    State.failed: "red",
    State.done: "green",
}
_CELL_COLUMNS = 120
"""Width of the view in a notebook, in columns."""
_ROWS = 20
"""Largest number of runs in the live table; the others are counted."""


@dataclass(frozen=True)
class StatusRow:
    """The present status of one run, from its folder."""

    name: str
    state: State
    note: str
    """One line: the process that runs it, the cause of its failure, or the end of its job."""
    progress: Progress | None
    """Its newest progress; `None` after its end."""
    gap_closed: str
    """Gap closed at its last evaluation, in per cent; empty without an evaluation."""

    @property
    def eta(self) -> str:
        """Time until its last step at the latest speed, without evaluations; empty if unknown."""
        progress = self.progress
        if self.state is not State.running or progress is None or not progress.tokens_per_second:
            return ""
        return duration(max(0, progress.train_tokens - progress.tokens) / progress.tokens_per_second)


def status_rows(folders: Sequence[RunFolder]) -> list[StatusRow]:
    """The present status of each run."""
    rows = []
    for folder, status in zip(folders, read_statuses(folders), strict=True):
        has_ended = status.state in (State.done, State.failed)
        curve = folder.read_curve()
        rows.append(
            StatusRow(
                name=folder.path.name,
                state=status.state,
                note=(status.note or "").partition("\n")[0],
                progress=None if has_ended else folder.read_progress(),
                gap_closed=percent(curve[-1].gap_closed) if curve else "",
            )
        )
    return rows


def status_table(statuses: Sequence[StatusRow]) -> Table:
    """A table of runs, one in each row."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for name in ("step", "tokens/s", "loss", "gap closed", "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note", overflow="ellipsis", no_wrap=True)
    for status in statuses:
        progress = status.progress
        stage = status.state.value
        if status.state is State.running and progress is not None:
            stage = progress.stage
        steps = rate = loss = ""
        if progress is not None and progress.step > 0:
            steps = f"{progress.step:,}/{progress.steps:,}"
            rate = f"{progress.tokens_per_second:,.0f}" if progress.tokens_per_second else ""
            loss = f"{progress.loss:.3f}" if progress.loss is not None else ""
        table.add_row(
            Text(status.name),
            Text(stage, style=_COLOURS[status.state], overflow="ellipsis", no_wrap=True),
            *(steps, rate, loss, status.gap_closed, status.eta),
            Text(status.note, style="red" if status.state is State.failed else "dim"),
        )
    return table


class Watch:
    """A live view of runs, inside a `with` block; `update()` reads their folders again."""

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        self._folders = folders
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._cell: Any = None
        """Handle of the view in a notebook."""
        self._states: dict[RunFolder, State] = {}
        self._printed = 0
        """Bytes of the only run's log that are already printed, or older than this command."""
        if len(folders) == 1 and folders[0].log.exists():
            self._printed = folders[0].log.stat().st_size

    def update(self) -> None:
        """Read every folder and show the changes."""
        try:
            statuses = status_rows(self._folders)
        except OSError:  # a file server may not answer for a moment
            return
        if len(self._folders) == 1:
            self._print_log(self._folders[0])
        else:
            for folder, status in zip(self._folders, statuses, strict=True):
                self._print_change(folder, status)
        view = _bar(statuses[0]) if len(statuses) == 1 else _summary(statuses)
        if console.is_terminal:
            self._live.update(view)
        elif console.is_jupyter:
            self._show_in_cell(view)

    def _show_in_cell(self, view: RenderableType) -> None:
        """Show the view in the output of the notebook cell; it replaces the previous view."""
        from IPython.display import HTML, display

        drawing = Console(record=True, file=io.StringIO(), width=_CELL_COLUMNS, force_jupyter=False)
        drawing.print(view)
        html = HTML(drawing.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))
        if self._cell is None:
            self._cell = display(html, display_id=True)
        else:
            self._cell.update(html)

    def _print_change(self, folder: RunFolder, status: StatusRow) -> None:
        """Print a line when a run ends and, if the output is no terminal, when it starts."""
        previous, self._states[folder] = self._states.get(folder), status.state
        if status.state is previous:
            return
        closed = status.gap_closed and f"gap closed {status.gap_closed}"
        if status.state in (State.done, State.failed):
            say(f"{status.state.value:>9}  {status.name}  {status.note or closed}")
        elif status.state is State.running and not console.is_terminal:
            say(f"{status.state.value:>9}  {status.name}")

    def _print_log(self, folder: RunFolder) -> None:
        """Print the new lines of the only run's log."""
        if not folder.log.exists():
            return
        with folder.log.open("rb") as file:
            file.seek(self._printed)
            whole, end, _ = file.read().rpartition(b"\n")
        self._printed += len(whole) + len(end)
        for line in whole.decode(errors="replace").splitlines():
            say(line)

    def __enter__(self) -> "Watch":
        if len(self._folders) == 1:
            say(f"run {self._folders[0].path.name}")
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.update()
        self._live.stop()
        if self._cell is not None:
            self._show_in_cell("")


def _summary(statuses: Sequence[StatusRow]) -> Group:
    """A table of running, then failed or stopped runs, at most `_ROWS`; and the number in each state."""
    running = [status for status in statuses if status.state is State.running]
    stopped = [status for status in statuses if status.state in (State.failed, State.resumable)]
    shown = [*running, *stopped][:_ROWS]
    number = Text(counts(status.state for status in statuses), style="bold")
    return Group(status_table(shown), number) if shown else Group(number)


def _bar(status: StatusRow) -> Table | Text:
    """One run's progress as a bar, with loss, tokens/s and ETA."""
    progress = status.progress
    if progress is None or not progress.train_tokens:
        waiting = "starting" if status.state is State.new else status.state.value
        return Text(progress.stage if progress is not None else waiting, style="dim")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        "training",
        ProgressBar(total=progress.train_tokens, completed=progress.tokens, width=32),
        f"{progress.tokens / progress.train_tokens:4.0%}",
        Text(f"loss {progress.loss:.3f}" if progress.loss is not None else "", style="green"),
        Text(
            f"{progress.tokens_per_second:,.0f} tokens/s" if progress.tokens_per_second else "",
            style="cyan",
        ),
        status.eta and f"ETA {status.eta}",
    )
    return grid
