"""Tables for a terminal, made only from run folders. Imports no torch."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.table import Column, Table

from sae_lora.config.enums import SAEFamily, Suite
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.headlines import headlines
from sae_lora.records.factors import FinishedRun, finished_runs, label, text, varying
from sae_lora.records.folder import RunFolder
from sae_lora.records.metrics import METRICS, NO_GAP

_RUN = "run"
"""Heading of the column with the runs' names, which is there if the runs differ in no factor."""
_OF_ONE_RUN = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "initial_kl", "kl"),
    *("top1_agreement", "fvu", "fvu_without_outliers", "l0", "trainable_parameters", "train_tokens"),
    *("train_seconds", "total_seconds"),
)
_OF_SEVERAL = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "kl"),
    *("trainable_parameters", "train_seconds"),
)
_IN_TITLE = ("model", "block", "width", "l0", "rank"), ("base_ce", "spliced_ce", "initial_gap")
"""Factors and metrics that move into a table's title if all rows have the same value."""


def run_table(summary: dict[str, Any]) -> Table:
    """All results of one finished run, from its `summary.json`."""
    columns = Column(style="bold"), Column(justify="right"), Column(style="dim")
    table = Table(*columns, title=summary["name"], title_justify="left", show_header=False)
    for key in _OF_ONE_RUN:
        if key not in summary:  # of an older version
            continue
        metric = METRICS[key]
        unit = metric.suffix
        if key == "gap_closed" and summary[key] is None:
            is_new = any(sae.get("family") == SAEFamily.new.name for sae in summary["sae"])
            unit = "the SAE is new" if is_new else NO_GAP
        table.add_row(metric.name, metric.written(summary[key], digits=4), unit)
    return table


def right_aligned(title: str, columns: Iterable[str | Column]) -> Table:
    """An empty table. Columns that are given as strings, their headings, are aligned to the right."""
    aligned = [
        Column(column, justify="right") if isinstance(column, str) else column for column in columns
    ]
    return Table(*aligned, title=title, title_justify="left")


def spread(ratios: Sequence[float]) -> str:
    """The median of ratios, with the smallest and the largest in brackets."""
    if not ratios:
        return "never"
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"


def mean_and_range(values: Sequence[float]) -> str:
    """The mean of values over seeds, with the smallest and the largest in brackets."""
    mean = f"{statistics.mean(values):+.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):+.3f} to {max(values):+.3f})"


def in_whole_words(table: Table, breakable: str | None = None) -> Table:
    """The table, with columns that are wide enough for their longest word.

    In a narrow terminal, cells then break only between words.

    Args:
        table: The complete table, changed in place.
        breakable: Heading of a column whose cells may break anywhere.
    """
    for column in table.columns:
        if column.header != breakable:
            words = " ".join([str(column.header), *map(str, column.cells)]).split()
            column.min_width = max(map(len, words))
    return table


def comparison_table(folders: Sequence[RunFolder]) -> Table:
    """A row for each finished run. The title has the values that all runs have in common."""
    runs = finished_runs(folders)
    columns = _differences(runs)
    columns |= {
        METRICS[key].column: [METRICS[key].written(run.summary[key]) for run in runs]
        for key in _OF_SEVERAL
    }
    same = {label(name): [text(run.factors[name]) for run in runs] for name in _IN_TITLE[0]}
    same |= {name: columns[name] for key in _IN_TITLE[1] if (name := METRICS[key].column) in columns}
    title = {name: values[0] for name, values in same.items() if len(set(values)) == 1}
    heading = ", ".join(f"{name} {value}" for name, value in title.items())
    table = _table(heading, {name: values for name, values in columns.items() if name not in title})
    return explained(table, [run.summary["gap_closed"] for run in runs])


def explained(table: Table, gaps_closed: Iterable[float | None]) -> Table:
    """The table, with a note if the gap closed of one of its runs is undefined."""
    if None in gaps_closed:
        table.caption, table.caption_justify = f"– gap closed: {NO_GAP}, or is new", "left"
    return table


def evaluation_tables(folders: Sequence[RunFolder], suites: Iterable[Suite]) -> Iterator[Table]:
    """A table for each suite with results: a row for each finished run, with its headline numbers.

    A dash stands for a run that the suite has not measured. If it failed for a run, a column says why.
    """
    runs = finished_runs(folders)
    differences = _differences(runs)
    measured = [headlines(run.folder) for run in runs]
    names = dict.fromkeys(chain(*measured))
    for suite in suites:
        values = {
            name.partition("/")[2].replace(", ", "\n"): [
                f"{numbers[name]:.3g}" if name in numbers else "–" for numbers in measured
            ]
            for name in names
            if name.startswith(f"{suite.name}/")
        }
        failures = [suite_records.failure(run.folder, suite) for run in runs]
        if any(failures):
            values[""] = [f"failed: {failure}" if failure else "" for failure in failures]
        if values:
            yield in_whole_words(_table(suite.name, differences | values))


def _differences(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """Columns of the factors in which finished runs differ, or of the runs' names if none differs."""
    names = varying([run.factors for run in runs], with_followers=True)
    if not names:
        return {_RUN: [run.summary["name"] for run in runs]}
    return {label(name): [text(run.factors.get(name)) for run in runs] for name in names}


def _table(title: str, columns: Mapping[str, Sequence[str]]) -> Table:
    """A table of columns, by heading."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name == _RUN else "right", no_wrap=name != _RUN)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table
