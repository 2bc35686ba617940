"""What a person sees while runs are under way, made from their folders alone.

A live table in a terminal, a line per event elsewhere; the same whoever runs them, and wherever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sae_lora.common.console import console, duration, percent, say
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint, Progress
from sae_lora.records.status import State, counts, standings

_COLOURS = {
    State.new: "dim",
    State.queued: "blue",
    State.running: "cyan",
    State.resumable: "yellow",
    State.failed: "red",
    State.done: "green",
}
_ROWS = 20
"""Runs shown at once in the live table; the rest is counted."""


@dataclass(frozen=True)
class Status:
    """One run as its folder shows it now."""

    name: str
    state: State
    note: str | None
    """Who has it, why it failed, what became of its job."""
    progress: Progress | None
    """Where it says it is, or was; `None` where it has ended."""
    point: CurvePoint | None
    """Its last evaluation."""

    @property
    def seconds_left(self) -> float | None:
        """Until its last step, at the speed of the last seconds; evaluations not counted."""
        now = self.progress
        if self.state is not State.running or now is None or not now.tokens_per_second:
            return None
        return max(0, now.train_tokens - now.tokens) / now.tokens_per_second


def statuses_of(folders: Sequence[RunFolder]) -> list[Status]:
    """The runs as they show themselves now."""
    found = []
    for folder, standing in zip(folders, standings(folders), strict=True):
        under_way = standing.state not in (State.done, State.failed)
        curve = folder.read_curve()
        found.append(
            Status(
                name=folder.path.name,
                state=standing.state,
                note=standing.note,
                progress=folder.read_progress() if under_way else None,
                point=curve[-1] if curve else None,
            )
        )
    return found


def status_table(statuses: Sequence[Status]) -> Table:
    """Runs, a row each, with where they stand."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("run", no_wrap=True)
    table.add_column("state")
    for name in ("step", "tokens/s", "loss", "gap closed", "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note", overflow="ellipsis", no_wrap=True)
    for status in statuses:
        table.add_row(*_cells(status))
    return table


def _cells(status: Status) -> list[Text]:
    now, eta = status.progress, status.seconds_left
    what = now.stage if status.state is State.running and now is not None else status.state.value
    steps = rate = loss = ""
    if now is not None and now.step > 0:
        steps = f"{now.step:,}/{now.steps:,}"
        rate = f"{now.tokens_per_second:,.0f}" if now.tokens_per_second else ""
        loss = f"{now.loss:.3f}" if now.loss is not None else ""
    return [
        Text(status.name),
        Text(what, style=_COLOURS[status.state], overflow="ellipsis", no_wrap=True),
        Text(steps),
        Text(rate),
        Text(loss),
        Text(percent(status.point.gap_closed) if status.point is not None else ""),
        Text(duration(eta) if eta is not None else ""),
        Text(_first_line(status.note), style="red" if status.state is State.failed else "dim"),
    ]


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]


class Watch:
    """Shows the runs until the block ends; `update()` looks at them again.

    Args:
        folders: The runs.
    """

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        self._folders = list(folders)
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._seen: dict[RunFolder, State] = {}
        self._relayed = 0
        if len(self._folders) == 1 and self._folders[0].log.exists():
            self._relayed = self._folders[0].log.stat().st_size

    def update(self) -> None:
        """Reads every folder and shows what has changed."""
        try:
            statuses = statuses_of(self._folders)
        except OSError:  # a file server that is away for a moment; the next look may succeed
            return
        if len(self._folders) == 1:
            self._relay(self._folders[0])
        else:
            for folder, status in zip(self._folders, statuses, strict=True):
                self._tell(folder, status)
        if console.is_terminal:
            self._live.update(self._picture(statuses))

    def _tell(self, folder: RunFolder, status: Status) -> None:
        """Says in a line that stays how a run has ended, and elsewhere than in a terminal its start."""
        before, self._seen[folder] = self._seen.get(folder), status.state
        if status.state is before:
            return
        closed = f"gap closed {percent(status.point.gap_closed)}" if status.point is not None else ""
        if status.state in (State.done, State.failed):
            say(f"{status.state.value:>9}  {status.name}  {_first_line(status.note) or closed}")
        elif status.state is State.running and not console.is_terminal:
            say(f"{status.state.value:>9}  {status.name}")

    def _relay(self, folder: RunFolder) -> None:
        """Passes on what the only run has printed since the last look."""
        if not folder.log.exists():
            return
        with folder.log.open("rb") as file:
            file.seek(self._relayed)
            whole, end, _ = file.read().rpartition(b"\n")
        self._relayed += len(whole) + len(end)
        for line in whole.decode(errors="replace").splitlines():
            say(line)

    def _picture(self, statuses: Sequence[Status]) -> Group:
        if len(statuses) == 1:
            return Group(_bar(statuses[0]))
        first = [status for status in statuses if status.state is State.running]
        rest = [status for status in statuses if status.state in (State.failed, State.resumable)]
        shown = [*first, *rest][:_ROWS]
        return Group(
            *([status_table(shown)] if shown else []),
            Text(counts(status.state for status in statuses), style="bold"),
        )

    def __enter__(self) -> "Watch":
        if len(self._folders) == 1:
            say(f"run {self._folders[0].path.name}")
        if console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.update()
        self._live.stop()


def _bar(status: Status) -> Table | Text:
    """One run's progress as a bar, with loss, tokens/s and ETA."""
    now = status.progress
    if now is None or not now.train_tokens:
        waiting = "starting" if status.state is State.new else status.state.value
        return Text(now.stage if now is not None else waiting, style="dim")
    grid = Table.grid(padding=(0, 2))
    eta = status.seconds_left
    grid.add_row(
        "training",
        ProgressBar(total=now.train_tokens, completed=now.tokens, width=32),
        f"{now.tokens / now.train_tokens:4.0%}",
        Text(f"loss {now.loss:.3f}" if now.loss is not None else "", style="green"),
        Text(f"{now.tokens_per_second:,.0f} tokens/s" if now.tokens_per_second else "", style="cyan"),
        f"ETA {duration(eta)}" if eta is not None else "",
    )
    return grid
