"""Tables for a terminal, made only from run folders. Imports no torch."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.table import Column, Table

from sae_lora.config.enums import SAEFamily, Suite
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.headlines import COVERAGE, MEANINGS, OF_SUITE, Headline, measured
from sae_lora.records.factors import FinishedRun, finished_runs, label, text, varying
from sae_lora.records.folder import RunFolder
from sae_lora.records.metrics import METRICS, NO_GAP
from sae_lora.report.fits import CONFIDENCE

_RUN = "run"
"""Heading of the column with the runs' names, which is there if the runs differ in no factor."""
_OF_ONE_RUN = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "initial_kl", "kl"),
    *("top1_agreement", "fvu", "fvu_without_outliers", "l0", "trainable_parameters", "train_tokens"),
    *("train_seconds", "total_seconds"),
)


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


def explained(table: Table, gaps_closed: Iterable[float | None]) -> Table:
    """The table, with a note if the gap closed of one of its runs is undefined."""
    if None in gaps_closed:
        table.caption, table.caption_justify = f"– gap closed: {NO_GAP}, or is new", "left"
    return table


def evaluation_tables(folders: Sequence[RunFolder], suites: Iterable[Suite]) -> Iterator[Table]:
    """A table for each suite with results: a row for each finished run, with its headline numbers.

    A dash stands for a run that the suite has not measured. If it failed for a run, a column says why.
    The caption says what each column is.
    """
    runs = finished_runs(folders)
    differences = _differences(runs)
    of_runs = [measured(run.folder) for run in runs]
    every = dict.fromkeys(chain(*of_runs))
    for suite in suites:
        names = [name for name in every if name.startswith(f"{suite.name}/")]
        values = {
            _with_unit(name): [numbers[name].text if name in numbers else "–" for numbers in of_runs]
            for name in names
        }
        failures = [suite_records.failure(run.folder, suite) for run in runs]
        if any(failures):
            values[""] = [f"failed: {failure}" if failure else "" for failure in failures]
        if values:
            table = in_whole_words(_table(suite.name, differences | values))
            shown = [numbers[name] for numbers in of_runs for name in names if name in numbers]
            table.caption, table.caption_justify = "\n".join(_explained(suite, names, shown)), "left"
            yield table


def _explained(suite: Suite, names: Sequence[str], shown: Sequence[Headline]) -> Iterator[str]:
    """Lines that say what the numbers of a suite are."""
    if suite in OF_SUITE:
        yield OF_SUITE[suite]
    for name in names:
        if name in MEANINGS:
            yield f"{name.partition('/')[2]}: {MEANINGS[name][1]}"
    if any(headline.low is not None for headline in shown):
        yield f"in brackets: {COVERAGE.get(suite, CONFIDENCE):.0%} intervals"


def _with_unit(name: str) -> str:
    """The heading of a headline number, with its unit below it."""
    heading = name.partition("/")[2].replace(", ", "\n")
    unit = MEANINGS[name][0] if name in MEANINGS else ""
    return f"{heading}\n{unit}" if unit else heading


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
