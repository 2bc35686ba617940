"""The progress of runs, read from their folders: a live view in a terminal or notebook, or lines."""

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sae_lora.common.console import PROGRESS_MARK, Spacing, console, say
from sae_lora.launcher.status_tables import StatusRow, live_table, status_rows
from sae_lora.records.factors import differences_of, labels
from sae_lora.records.folder import RunFolder
from sae_lora.records.status import State, counts

_CELL_COLUMNS = 120
"""Width of the view in a notebook, in columns."""
_ROWS = 20
"""Largest number of runs in the live table; the others are counted."""
_MOST_VALUES = 4
_ENDS = (State.done, State.failed, State.outranked)
"""Largest number of values of a factor that a line about a pack lists."""


class Watch:
    """A live view of runs, inside a `with` block; `update()` reads their folders again."""

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        self._folders = folders
        self._varying = differences_of(folders)
        self._labels = labels(self._varying, len(folders))
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._cell: Any = None
        """Handle of the view in a notebook."""
        self._states: dict[RunFolder, State] = {}
        self._lines: dict[str, set[tuple[str, int]]] = {}
        """For each pack, the stages and numbers of evaluations that lines were printed for."""
        self._spacing = Spacing()
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
            self._print_ends(statuses)
            if not self._has_view:
                self._print_stages(statuses)
        if self._has_view:
            view = _bar(statuses[0]) if len(statuses) == 1 else self._summary(statuses)
            if console.is_terminal:
                self._live.update(view)
            else:
                self._show_in_cell(view)

    @property
    def _has_view(self) -> bool:
        """True in a terminal or a notebook."""
        return console.is_terminal or console.is_jupyter

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

    def _print_ends(self, statuses: Sequence[StatusRow]) -> None:
        """Print a line for each run that has ended since the last call."""
        for folder, status, label in zip(self._folders, statuses, self._labels, strict=True):
            previous, self._states[folder] = self._states.get(folder), status.state
            if status.state is not previous and status.state in _ENDS:
                closed = status.gap_closed and f"gap closed {status.gap_closed}"
                end = closed if status.state is State.done else status.note
                words = filter(None, (f"{status.state.value:>9}", status.name, label, end))
                say("  ".join(words))

    def _print_stages(self, statuses: Sequence[StatusRow]) -> None:
        """Print a line for each pack that is in a new stage or has a new evaluation; then rarely."""
        packs: dict[str, list[int]] = {}
        for number, status in enumerate(statuses):
            if status.is_at_work and status.progress is not None:
                is_training = status.state is State.running
                packs.setdefault(status.process if is_training else status.name, []).append(number)
        is_due = bool(packs) and self._spacing.is_due(len(packs))
        for pack, numbers in packs.items():
            first = statuses[numbers[0]]
            assert first.progress is not None
            printed = self._lines.setdefault(pack, set())
            points = min(statuses[number].points for number in numbers)
            news = {("", points), (first.progress.stage, 0)} - printed - {("", 0)}
            if news or is_due:
                printed |= news
                self._spacing.restart()
                say(_pack_line([statuses[number] for number in numbers], self._names_of(numbers)))

    def _names_of(self, numbers: Sequence[int]) -> str:
        """The runs of a pack, as text: `4 runs  rank=8  lr=0.001,0.002  seed=0,1`."""
        parts = []
        for name, values in self._varying.items():
            different = list(dict.fromkeys(values[number] for number in numbers))
            if len(different) > _MOST_VALUES:
                different[1:-1] = ["…"]
            parts.append(f"{name}={','.join(different)}")
        parts = parts or [self._folders[numbers[0]].path.name]
        return "  ".join([f"{len(numbers)} runs", *parts] if len(numbers) > 1 else parts)

    def _summary(self, statuses: Sequence[StatusRow]) -> Group:
        """A table of runs at work, then failed or stopped runs, at most `_ROWS`; and their states."""
        at_work = [number for number, status in enumerate(statuses) if status.is_at_work]
        stopped = [
            number
            for number, status in enumerate(statuses)
            if status.state in (State.failed, State.resumable, State.stopped, State.outranked)
        ]
        shown = [*at_work, *stopped][:_ROWS]
        states = Text(counts(status.state for status in statuses), style="bold")
        if not shown:
            return Group(states)
        varying = {name: [values[number] for number in shown] for name, values in self._varying.items()}
        return Group(live_table([statuses[number] for number in shown], varying), states)

    def _print_log(self, folder: RunFolder) -> None:
        """Print the new lines of the only run's log. A live view replaces the lines of progress."""
        if not folder.log.exists():
            return
        with folder.log.open("rb") as file:
            file.seek(self._printed)
            whole, end, _ = file.read().rpartition(b"\n")
        self._printed += len(whole) + len(end)
        for line in whole.decode(errors="replace").splitlines():
            if not (self._has_view and line.startswith(PROGRESS_MARK)):
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


def _pack_line(statuses: Sequence[StatusRow], names: str) -> str:
    """One line for the runs of a pack: names, stage, gaps, speed and ETA of the slowest."""
    gaps = [status.gap for status in statuses if status.gap is not None]
    gap = ""
    if gaps:
        gap = f"gap {min(gaps):+.3f}"
        gap += f" to {max(gaps):+.3f}" if len(gaps) > 1 else ""
    first = statuses[0]
    rate, eta = first.rate and f"{first.rate} tokens/s", first.eta and f"ETA {first.eta}"
    return PROGRESS_MARK + "  ".join(filter(None, (names, first.stage, gap, rate, eta)))


def _bar(status: StatusRow) -> Table | Text:
    """One run's progress as a bar, with stage, loss, tokens/s and ETA."""
    progress = status.progress
    if progress is None or not progress.train_tokens:
        waiting = "starting" if status.state is State.new else status.state.value
        return Text(progress.text if progress is not None else waiting, style="dim")
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        progress.stage if progress.stage == "training" else progress.text,
        ProgressBar(total=progress.train_tokens, completed=progress.tokens, width=32),
        f"{progress.tokens / progress.train_tokens:4.0%}",
        Text(f"loss {progress.loss:.3f}" if progress.loss is not None else "", style="green"),
        Text(status.rate and f"{status.rate} tokens/s", style="cyan"),
        status.eta and f"ETA {status.eta}",
    )
    return grid
