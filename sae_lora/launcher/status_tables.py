"""The states of runs as rows and tables, read from their folders."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from sae_lora.common.console import console, duration, percent
from sae_lora.common.errors import listed
from sae_lora.evaluation.suite_records import pending
from sae_lora.records.folder import RunFolder, hash_of, is_run, runs_of
from sae_lora.records.schema import Progress
from sae_lora.records.status import (
    ENDED_BADLY,
    RunStatus,
    State,
    counts,
    progress_of,
    read_statuses,
)

COLOURS = {
    State.new: "dim",
    State.queued: "blue",
    State.running: "cyan",
    State.resumable: "yellow",
    State.stopped: "yellow",
    State.outranked: "magenta",
    State.failed: "red",
    State.done: "green",
    State.damaged: "red",
}
_OLD_S = 60.0
"""Age in seconds from which a report is said to be old."""
_WIDEST_VALUE = 24
"""Largest width of a factor's column in the live table."""
_WIDE = 110
"""Width of a terminal in columns from which a table of runs has all columns."""


@dataclass(frozen=True)
class StatusRow:
    """The present status of one run, from its folder."""

    name: str
    state: State
    note: str
    """One line: the process that runs it, the cause of its failure, the end of its job, the suite that
    measures it, or the suites that it lacks."""
    progress: Progress | None
    """Its newest report; `None` without one."""
    process: str
    """The process that trains it, equal for the runs of a pack; for other runs, a note on the state."""
    gap: float | None
    """CE gap at its last evaluation, in nats per token."""
    gap_closed: str
    """Gap closed at its last evaluation, in per cent; empty without an evaluation."""
    points: int
    """Number of its evaluations."""

    @property
    def has_ended_badly(self) -> bool:
        """True if the run has failed or is damaged."""
        return self.state in ENDED_BADLY

    @property
    def is_at_work(self) -> bool:
        """True if a process trains the run, or measures it with suites."""
        return self.state is State.running or (self.state is State.done and self.progress is not None)

    @property
    def stage(self) -> str:
        """The present stage with its share done; without a process, the state."""
        return self.progress.text if self.progress and self.is_at_work else self.state.value

    @property
    def hash(self) -> str:
        """The hash, which stands for the folder in commands; without one, the name."""
        return hash_of(self.name)

    @property
    def steps(self) -> str:
        """Steps taken, of all steps; empty before training."""
        progress = self.progress
        return f"{progress.step:,}/{progress.steps:,}" if progress and progress.steps else ""

    @property
    def rate(self) -> str:
        """Training tokens per second; empty if unknown."""
        rate = self.progress.tokens_per_second if self.progress else None
        return f"{rate:,.0f}" if rate and self.state is State.running else ""

    @property
    def eta(self) -> str:
        """Time until the end of its last evaluation; empty if unknown."""
        seconds = self.progress.seconds_left if self.progress else None
        return duration(seconds) if seconds is not None and self.state is State.running else ""


def status_rows(folders: Sequence[RunFolder], *, lacking: bool = False) -> list[StatusRow]:
    """The present status of each run; with `lacking`, notes on suites that were asked for, too.

    These notes need the config of each finished run, which takes milliseconds.
    """
    rows = []
    for folder, status in zip(folders, read_statuses(folders), strict=True):
        is_damaged = status.state is State.damaged
        curve = [] if is_damaged else folder.read_curve()
        has_ended_badly = status.state in ENDED_BADLY
        progress = None if has_ended_badly else progress_of(folder, status.state)
        age = folder.seconds_since_progress
        process = note = (status.note or "").partition("\n")[0]
        if status.state is State.running and age >= _OLD_S:
            note += f", last report {duration(age)} ago"
        elif status.state is State.done and progress is not None:
            note = progress.text
            if age >= _OLD_S:  # a process that was killed leaves its last report
                note, progress = f"{note} {duration(age)} ago", None
        elif lacking and not is_damaged and (suites := pending(folder)):
            note = f"lacks suites: {listed(suite.name for suite in suites)}"
        rows.append(
            StatusRow(
                name=folder.path.name,
                state=status.state,
                note=note,
                progress=progress,
                process=process,
                gap=curve[-1].ce_gap if curve else None,
                gap_closed=percent(curve[-1].gap_closed) if curve else "",
                points=len(curve),
            )
        )
    return rows


def status_table(statuses: Sequence[StatusRow], varying: Mapping[str, Sequence[str]]) -> Table:
    """A table of runs, one in each row: what varies, state, progress, gap, hash or name, note.

    A terminal of less than 110 columns shows no tokens/s and no loss.

    Args:
        statuses: The runs.
        varying: What varies among them: by heading, the value of each run.
    """
    is_wide = not console.is_terminal or console.width >= _WIDE
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in varying:
        table.add_column(Text(name, no_wrap=True), justify="right", max_width=_WIDEST_VALUE)
    table.add_column("state")
    for name in ("step", *(("tokens/s", "loss") if is_wide else ()), "gap", "closed", "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("run", no_wrap=True)
    table.add_column("note", overflow="ellipsis", no_wrap=True)
    for number, status in enumerate(statuses):
        loss = status.progress.loss if status.progress is not None else None
        table.add_row(
            *(Text(values[number], no_wrap=True, overflow="ellipsis") for values in varying.values()),
            _stage_cell(status),
            status.steps,
            *((status.rate, "" if loss is None else f"{loss:.3f}") if is_wide else ()),
            *(_signed(status.gap), status.gap_closed, status.eta),
            Text(status.hash if varying else status.name),
            Text(status.note, style=COLOURS[status.state] if status.has_ended_badly else "dim"),
        )
    return table


Sweeps = Mapping[Path, Mapping[RunFolder, RunStatus]]
"""The runs of sweeps with their status, by the folders of the sweeps."""


def sweeps_in(folder: Path) -> Sweeps:
    """The sweeps in a folder such as `outputs`; empty for other folders: of a sweep, or of a run."""
    if not folder.is_dir() or is_run(folder) or _holds_runs(folder):
        return {}
    inside = [path for path in folder.iterdir() if path.is_dir() and _holds_runs(path)]
    runs = {sweep: runs_of(sweep) for sweep in inside}
    every = [run for of_sweep in runs.values() for run in of_sweep]
    statuses = dict(zip(every, read_statuses(every), strict=True))
    return {sweep: {run: statuses[run] for run in of_sweep} for sweep, of_sweep in runs.items()}


def _holds_runs(folder: Path) -> bool:
    return any(map(is_run, folder.iterdir()))


def sweeps_table(sweeps: Sweeps) -> Table:
    """A table of sweeps, the newest last: states of their runs, and the best run."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("sweep", no_wrap=True)
    for name in ("runs", "best closed", "changed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("states")
    changed = {sweep: max(run.path.lstat().st_mtime for run in sweeps[sweep]) for sweep in sweeps}
    for sweep in sorted(changed, key=lambda sweep: changed[sweep]):
        states = {run: status.state for run, status in sweeps[sweep].items()}
        done = [run.read_summary() for run, state in states.items() if state is State.done]
        closed = [summary["gap_closed"] for summary in done]
        table.add_row(
            Text(sweep.name),
            str(len(states)),
            percent(max((value for value in closed if value is not None), default=None)),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(changed[sweep])),
            counts(states.values()),
        )
    return table


def live_table(statuses: Sequence[StatusRow], varying: Mapping[str, Sequence[str]]) -> Table:
    """A table of runs for 80 columns: what varies, stage, step, gap and ETA.

    The arguments are those of `status_table`.
    """
    columns = varying or {"run": [status.name for status in statuses]}
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(Text(name, no_wrap=True), justify="right", max_width=_WIDEST_VALUE)
    table.add_column("state")
    for name in ("step", "gap", "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, status in enumerate(statuses):
        table.add_row(
            *(Text(values[number], no_wrap=True, overflow="ellipsis") for values in columns.values()),
            _stage_cell(status),
            *(status.steps, _signed(status.gap), status.eta),
        )
    return table


def _stage_cell(status: StatusRow) -> Text:
    return Text(status.stage, style=COLOURS[status.state], overflow="ellipsis", no_wrap=True)


def _signed(gap: float | None) -> str:
    return "" if gap is None else f"{gap:+.3f}"
