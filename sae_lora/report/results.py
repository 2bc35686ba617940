"""The results of finished runs as one table, and its formats. Imports no torch.

Runs that differ only in their seeds are one row, with means and 95% intervals.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Column as TerminalColumn
from rich.table import Table

from sae_lora.common.console import console, count
from sae_lora.common.errors import UserError, listed, nearest_name, with_nearest
from sae_lora.evaluation.headlines import headlines
from sae_lora.records.factors import (
    FACTORS,
    SEEDS,
    FinishedRun,
    by_value,
    finished_runs,
    label,
    text,
    varying,
)
from sae_lora.records.folder import RunFolder
from sae_lora.records.metrics import METRICS, NO_GAP
from sae_lora.report.repeats import Mean, Repeats, mean_of, repeats

MEASURES = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "kl"),
    *("trainable_parameters", "train_seconds"),
)
"""The measures that a table shows unless others are asked for."""
LEAST = (
    *("spliced_ce", "base_ce", "student_ce", "trainable_parameters", "train_seconds"),
    *("top1_agreement", "initial_gap", "kl", "ce_gap"),
)
"""Measures that a narrow terminal or page leaves out, the first one first."""
_IN_TITLE = (*("model", "block", "width", "l0", "rank"), *("base_ce", "spliced_ce", "initial_gap"))
"""Factors and measures that move into the title if all rows have the same value."""
_KEYS = {key: name for name, factor in FACTORS.items() for key in factor.keys}
"""The factor of a config key that is none of its own: `train.seed` is `seed`."""
_RUN = "run"
_BEST = "gap_closed"
BEST_NOTE = "* closes the largest share of the gap"


@dataclass(frozen=True)
class Column:
    """A column of results: a factor, a measure, or the runs."""

    key: str
    """The name for programs and on the command line: `rank`, `gap_closed`, `core/harm`."""
    heading: str
    cells: list[str]
    """The values as people read them."""
    values: list[Any]
    """The values for programs; of a measure, each is a `Mean`."""


@dataclass(frozen=True)
class Results:
    """A table of finished runs, a row for each group of repetitions."""

    rows: list[Repeats]
    columns: list[Column]
    """The columns to show."""
    every: list[Column]
    """Also the columns whose values the title has, and those that do not fit."""
    best: int | None
    """The row that closes the largest share of the gap; `None` unless several rows have a share."""
    title: dict[str, str] = field(default_factory=dict)
    """Values that all rows have in common, by heading."""
    left_out: tuple[str, ...] = ()
    """Headings of columns that did not fit."""

    @property
    def heading(self) -> str:
        """The title in one line."""
        return ", ".join(f"{name} {value}" for name, value in self.title.items())

    @property
    def notes(self) -> list[str]:
        """Notes that a reader needs besides the table."""
        runs = [run for row in self.rows for run in row.runs]
        shown = {column.key for column in self.columns}
        undefined = _BEST in shown and any(run.summary[_BEST] is None for run in runs)
        packed = any(run.summary.get("trained_together", 1) > 1 for run in runs)
        notes = {
            f"– gap closed: {NO_GAP}, or is new": undefined,
            "± 95% interval of the mean over seeds": len(runs) > len(self.rows),
            "training: of a run in a pack, its share of the time": packed and "train_seconds" in shown,
            f"left out for lack of room: {', '.join(self.left_out)}": bool(self.left_out),
        }
        return [note for note, holds in notes.items() if holds]

    def lines(
        self, mark: Callable[[str], str], escape: Callable[[str], str] = str
    ) -> Iterator[list[str]]:
        """The cells of each row, escaped; the largest gap closed is marked."""
        for number in range(len(self.rows)):
            cells = [(column.key, escape(column.cells[number])) for column in self.columns]
            is_best = number == self.best
            yield [mark(cell) if is_best and key == _BEST else cell for key, cell in cells]


def results(
    folders: Sequence[RunFolder],
    *,
    columns: Sequence[str] = (),
    sort: str | None = None,
    each_seed: bool = False,
) -> Results:
    """The results of the finished runs among these.

    Args:
        folders: Run folders that are not damaged.
        columns: Names of factors, config keys, measures and `suite/name`; by default the factors in
            which runs differ, and `MEASURES`.
        sort: Name of the column to sort by, the best first, otherwise ascending; by default the factors.
        each_seed: True for a row for each run.

    Raises:
        UserError: For a name that no run has.
    """
    runs = finished_runs(folders)
    rows = [Repeats([run]) for run in runs] if each_seed else repeats(runs)
    columns = list(dict.fromkeys(_KEYS.get(name, name) for name in columns))
    sort = None if sort is None else _KEYS.get(sort, sort)
    asked = columns if sort is None else [*columns, sort]
    names = _names(runs) if asked else []  # reads the results of all suites
    for name in asked:
        if name not in names:
            raise _unknown(name, names)
    if sort is not None:
        rows.sort(key=lambda row: _sort_key(row, sort))
    default = dict.fromkeys([*_differing(rows), *MEASURES, _RUN])
    every = [_column(name, rows) for name in columns or default]
    title = {}
    if len(rows) > 1:
        common = [_column(name, rows) for name in _IN_TITLE if name not in columns]
        title = {column.heading: column.cells[0] for column in common if len(set(column.cells)) == 1}
    shown = [column for column in every if column.heading not in title]
    return Results(rows, shown, every, _best(rows), title)


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """The names of all columns that can be asked for."""
    factors = {name for run in runs for name in run.factors}
    measures = {name for run in runs for name in run.summary if name in METRICS}
    suites = {name for run in runs for name in headlines(run.folder)}
    return [*sorted(factors), *sorted(measures - factors), *sorted(suites), _RUN]


def _unknown(name: str, names: Sequence[str]) -> UserError:
    short = [each for each in names if "." not in each]
    allowed = f"  allowed: {listed(short, len(short))}; and config keys such as train.lr"
    near = nearest_name(name, names)
    cause = f"there is no column {name}" if name else "a column needs a name"
    return UserError(with_nearest(cause, allowed, nearest=near))


def _differing(rows: Sequence[Repeats]) -> list[str]:
    """The factors in which rows differ; the seeds only if a row is a single run."""
    names = varying([run.factors for row in rows for run in row.runs], with_followers=True)
    if not names:
        return [_RUN]
    has_single = any(len(row.runs) == 1 for row in rows)
    return [name for name in names if has_single or name not in SEEDS]


def _is_measure(name: str) -> bool:
    return name not in FACTORS and (name in METRICS or "/" in name)


def _mean(row: Repeats, name: str) -> Mean:
    """The mean of a measure over the runs of a row."""
    if "/" in name:
        return mean_of([headlines(run.folder).get(name) for run in row.runs])
    return mean_of([run.summary.get(name) for run in row.runs])


def _column(name: str, rows: Sequence[Repeats]) -> Column:
    if name == _RUN:
        names = [[run.folder.path.name for run in row.runs] for row in rows]
        return Column(name, name, list(map(_runs_of, rows)), names)
    if not _is_measure(name):
        values = [[run.factors.get(name) for run in row.runs] for row in rows]
        if name not in SEEDS:
            values = [value[:1] for value in values]  # repetitions have the same
        cells = [", ".join(map(text, value)) for value in values]
        return Column(name, label(name), cells, [v[0] if len(v) == 1 else v for v in values])
    means = [_mean(row, name) for row in rows]
    metric = METRICS.get(name)
    heading = metric.column if metric else name.partition("/")[2]
    return Column(
        name, heading, [mean.written(metric.written if metric else text) for mean in means], means
    )


def _runs_of(row: Repeats) -> str:
    """The hash of the only run, which stands for its folder in commands; else the number of runs."""
    return row.runs[0].summary["hash"] if len(row.runs) == 1 else count(len(row.runs), "seed")


def _best(rows: Sequence[Repeats]) -> int | None:
    closed = {number: _mean(row, _BEST).value for number, row in enumerate(rows)}
    known = {number: value for number, value in closed.items() if value is not None}
    return max(known, key=lambda number: known[number]) if len(known) > 1 else None


def _sort_key(row: Repeats, name: str) -> tuple[Any, ...]:
    if not _is_measure(name):
        return by_value(row.factors.get(name))
    value = _mean(row, name).value
    if value is None:
        return 1, 0.0
    return 0, -value if name in METRICS and METRICS[name].better == "higher" else value


def fitted(table: Results, width: int) -> Results:
    """The table without the least important measures, so that it fits a width in characters."""
    columns, left_out = list(table.columns), []
    for name in LEAST:
        if _width(columns) > width and (column := _with_key(columns, name)) is not None:
            columns.remove(column)
            left_out.append(column.heading)
    return replace(table, columns=columns, left_out=tuple(left_out))


def _with_key(columns: Sequence[Column], key: str) -> Column | None:
    return next((column for column in columns if column.key == key), None)


def _width(columns: Sequence[Column]) -> int:
    """Width of the table in a terminal; the best row has a mark of two characters."""
    widths = [max(map(len, [column.heading, *column.cells])) for column in columns]
    return 1 + sum(3 + width for width in widths) + 2 * any(column.key == _BEST for column in columns)


def comparison_table(folders: Sequence[RunFolder]) -> Table:
    """The results for a terminal, without columns for which it is too narrow."""
    return as_table(results(folders))


def as_table(table: Results) -> Table:
    """The table for a terminal, without columns for which it is too narrow."""
    if console.is_terminal:
        table = fitted(table, console.width)
    columns = (TerminalColumn(column.heading, justify="right", no_wrap=True) for column in table.columns)
    drawn = Table(*columns, title=table.heading or None, title_justify="left")
    for cells in table.lines(lambda cell: f"{cell} *"):
        drawn.add_row(*cells)
    has_mark = table.best is not None and _with_key(table.columns, _BEST) is not None
    notes = [BEST_NOTE, *table.notes] if has_mark else table.notes
    drawn.caption, drawn.caption_justify = "\n".join(notes) or None, "left"
    return drawn


def as_markdown(table: Results) -> str:
    """The table in Markdown, with its title before and its notes after it. Bold: the best."""
    lines = [f"{table.heading}\n"] if table.title else []
    lines.append(f"| {' | '.join(column.heading for column in table.columns)} |")
    lines.append(f"|{'---:|' * len(table.columns)}")
    for cells in table.lines(lambda cell: f"**{cell}**", lambda cell: cell.replace("|", "\\|")):
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])


def as_latex(table: Results) -> str:
    """The table in LaTeX, for the package booktabs; its title and notes are comments. Bold: the best."""
    comments = [f"% {note}" for note in (table.heading, *table.notes) if note]
    lines = [f"\\begin{{tabular}}{{{'r' * len(table.columns)}}}", "\\toprule"]
    headings = [_for_latex(column.heading) for column in table.columns]
    lines += [f"{' & '.join(headings)} \\\\", "\\midrule"]
    for cells in table.lines(lambda cell: f"\\textbf{{{cell}}}", _for_latex):
        lines.append(f"{' & '.join(cells)} \\\\")
    return "\n".join([*comments, *lines, "\\bottomrule", "\\end{tabular}"])


def _for_latex(cell: str) -> str:
    replaced = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    replaced |= {character: f"\\{character}" for character in "&%$#_{}"}
    replaced |= {"±": "$\\pm$", "–": "--", "‖": "$\\|$", "Δ": "$\\Delta$"}
    escaped = "".join(replaced.get(character, character) for character in cell)
    return re.sub(r"(?<![\w.])[-−](?=\d)", "$-$", escaped)


def as_csv(table: Results) -> str:
    """The table as CSV with full precision: of each measure the mean, and with seeds its margin."""
    records = [{**record, _RUN: " ".join(record[_RUN])} for record in _records(table)]
    written = io.StringIO()
    writer = csv.DictWriter(written, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return written.getvalue().rstrip()


def as_json(table: Results) -> str:
    """The table as JSON with full precision, an object for each row."""
    return json.dumps(list(_records(table)), indent=1)


def _records(table: Results) -> Iterator[dict[str, Any]]:
    """The values of each row by name, and the names of its runs."""
    has_seeds = any(len(row.runs) > 1 for row in table.rows)
    for number, row in enumerate(table.rows):
        record: dict[str, Any] = {}
        for column in table.every:
            value = column.values[number]
            if isinstance(value, Mean):
                margin = {f"{column.key}_margin": value.margin} if has_seeds else {}
                record |= {column.key: value.value} | margin
            else:
                record[column.key] = value
        yield record | {_RUN: [run.folder.path.name for run in row.runs]}


FORMATS: Mapping[str, Callable[[Results], str]] = {
    "markdown": as_markdown,
    "csv": as_csv,
    "json": as_json,
    "latex": as_latex,
}
"""Formats of a table for other programs."""
