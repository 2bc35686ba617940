"""What people look at: tables made from the run folders alone. Imports no torch."""

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.table import Table

from sae_lora.config.enums import Suite
from sae_lora.evaluation.headlines import headlines
from sae_lora.records.factors import FinishedRun, finished_runs, label, text, varying
from sae_lora.records.folder import RunFolder
from sae_lora.records.metrics import METRICS

_RUN = "run"
"""Heads the column of runs that nothing but their names sets apart."""
_OF_ONE_RUN = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "initial_kl", "kl"),
    *("top1_agreement", "fvu", "l0", "trainable_parameters", "train_tokens"),
    *("train_seconds", "total_seconds"),
)
_OF_SEVERAL = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "kl"),
    *("trainable_parameters", "train_seconds"),
)
_IN_TITLE = ("model", "block", "width", "l0", "rank"), ("base_ce", "spliced_ce", "initial_gap")
"""Factors and metrics that stand in the title of a table where they are the same in all its rows."""


def run_table(summary: dict[str, Any]) -> Table:
    """One finished run in full.

    Args:
        summary: What `summary.json` holds.
    """
    table = Table(title=summary["name"], title_justify="left", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value", justify="right")
    table.add_column("unit", style="dim")
    for key in _OF_ONE_RUN:
        metric = METRICS[key]
        unit = _why_undefined(summary) if key == "gap_closed" else metric.suffix
        table.add_row(metric.name, metric.written(summary[key], digits=4), unit)
    return table


def _why_undefined(summary: dict[str, Any]) -> str:
    if summary["gap_closed"] is not None:
        return ""
    return "there is no gap" if summary["initial_gap"] <= 0 else "the SAE is new"


def spread(ratios: Sequence[float]) -> str:
    """The median of ratios, and in brackets the least and the most."""
    if not ratios:
        return "never"
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"


def mean_and_range(values: Sequence[float]) -> str:
    """The mean of values over seeds, and in brackets the least and the most."""
    mean = f"{statistics.mean(values):+.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):+.3f} to {max(values):+.3f})"


def in_whole_words(table: Table, but: str | None = None) -> Table:
    """The table, made so that a narrow terminal breaks its cells between words alone.

    Args:
        table: Complete.
        but: Heading of a column that may be broken anywhere.
    """
    for column in table.columns:
        if column.header != but:
            words = " ".join([str(column.header), *map(str, column.cells)]).split()
            column.min_width = max(map(len, words))
    return table


def comparison_table(folders: Sequence[RunFolder]) -> Table:
    """Finished runs side by side, a row each; what is the same in all of them stands in the title.

    Args:
        folders: Runs; those that are not finished are left out.
    """
    runs = finished_runs(folders)
    columns = _told_apart(runs)
    columns |= {
        METRICS[key].column: [METRICS[key].written(run.summary[key]) for run in runs]
        for key in _OF_SEVERAL
    }
    same = {label(name): [text(run.factors[name]) for run in runs] for name in _IN_TITLE[0]}
    same |= {name: columns[name] for key in _IN_TITLE[1] if (name := METRICS[key].column) in columns}
    title = {name: values[0] for name, values in same.items() if len(set(values)) == 1}
    table = Table(
        title=", ".join(f"{name} {value}" for name, value in title.items()), title_justify="left"
    )
    _fill(table, {name: values for name, values in columns.items() if name not in title})
    return table


def evaluation_tables(folders: Sequence[RunFolder], suites: Iterable[Suite]) -> Iterator[Table]:
    """What suites have found of finished runs, a row each: the few numbers that stand for a suite.

    Args:
        folders: Runs; those that are not finished are left out.
        suites: The suites, each for a table; where one has found nothing there is none. Of a run that it
            has not measured there are dashes.
    """
    runs = finished_runs(folders)
    apart = _told_apart(runs)
    found = [headlines(run.folder) for run in runs]
    names = dict.fromkeys(chain(*found))
    for suite in suites:
        values = {
            name.partition("/")[2].replace(", ", "\n"): [
                f"{one[name]:.3g}" if name in one else "–" for one in found
            ]
            for name in names
            if name.startswith(f"{suite.name}/")
        }
        if values:
            table = Table(title=suite.name, title_justify="left")
            _fill(table, apart | values)
            yield in_whole_words(table)


def _told_apart(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """By column, what sets finished runs apart; their names where nothing does."""
    names = varying([run.factors for run in runs], with_followers=True)
    if not names:
        return {_RUN: [run.summary["name"] for run in runs]}
    return {label(name): [text(run.factors.get(name)) for run in runs] for name in names}


def _fill(table: Table, columns: Mapping[str, Sequence[str]]) -> None:
    for name in columns:
        table.add_column(name, justify="left" if name == _RUN else "right", no_wrap=name != _RUN)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
