"""The table of runs of a report: its columns, and its cells as text."""

import re
from dataclasses import dataclass
from typing import Any

from sae_lora.records.factors import label, text
from sae_lora.records.folder import hash_of
from sae_lora.records.metrics import METRICS
from sae_lora.report.fits import Frame
from sae_lora.report.frames import factors
from sae_lora.report.results import LEAST

_WITHOUT_OUTLIERS = "fvu_without_outliers"
_SHOWN = (
    *("initial_gap", "ce_gap", "gap_closed", "kl", "top1_agreement"),
    *("trainable_parameters", "train_seconds"),
)
"""Metrics in the page's table."""
_EXTRA = (
    *("base_ce", "student_ce", "fvu", _WITHOUT_OUTLIERS, "measured_l0", "train_flops"),
    *("closed_per_million_parameters", "closed_per_petaflop", "closed_per_minute"),
)
"""Metrics in the table that the page shows on request."""
ROOM = 135
"""Characters of a row on a screen of 1280 px; the margins of a cell count as three."""


@dataclass(frozen=True)
class TableColumn:
    """A column of the table of runs."""

    name: str
    """The column of the data frame."""
    heading: str
    is_extra: bool
    """True if it is shown only on request."""


def columns(frame: Frame) -> list[TableColumn]:
    """Columns of the page's table: what varies comes first, the run last."""
    names = ["sweep"] if frame["sweep"].nunique() > 1 else []
    extra = [key for key in _EXTRA if key != _WITHOUT_OUTLIERS or _has_outliers(frame)]
    headings = {"measured_l0": "L0 measured"} | {key: metric.column for key, metric in METRICS.items()}
    runs = frame.assign(run=frame["run"].map(hash_of))
    always = [*names, *factors(frame), "state", "run"]
    shown = list(_SHOWN)
    widths = {name: _width(runs, name) for name in [*always, *shown]}
    for key in LEAST:
        if key in shown and sum(widths[name] for name in [*always, *shown]) > ROOM:
            shown.remove(key)
            extra = [key, *extra]
    return [
        *(TableColumn(name, label(name), is_extra=False) for name in always[:-1]),
        *(TableColumn(key, headings[key], is_extra=False) for key in shown),
        *(TableColumn(key, headings[key], is_extra=True) for key in extra),
        *(TableColumn(key, key.partition("/")[2], is_extra=True) for key in frame if "/" in key),
        TableColumn("run", "run", is_extra=False),
    ]


def _width(frame: Frame, column: str) -> int:
    """Characters of a column of the page's table, with its margins."""
    heading = METRICS[column].column if column in METRICS else label(column)
    cells = [cell(None if value != value else value, column) for value in frame[column]]
    return 3 + max(map(len, [*re.split(r"[ ._]", heading), *cells]))


def _has_outliers(frame: Frame) -> bool:
    """True if outliers change the FVU of a run."""
    return bool((frame[_WITHOUT_OUTLIERS].notna() & (frame[_WITHOUT_OUTLIERS] != frame["fvu"])).any())


def cell(value: Any, column: str) -> str:
    """A value as the table shows it."""
    if value is not None and column in METRICS:
        return METRICS[column].written(value)
    if isinstance(value, float):
        return f"{value:.3f}" if "/" in column else f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else text(value)
