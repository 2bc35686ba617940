"""How soon one sweep reaches the gap that another ends at: what a better recipe saves."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sae_lora.common.console import percent
from sae_lora.common.errors import UserError
from sae_lora.comparisons.interpolate import first_reached
from sae_lora.records.factors import FACTORS, SEED, FinishedRun, finished_runs, label, text
from sae_lora.records.folder import RunFolder
from sae_lora.report.tables import spread

_ALIKE = [name for name in FACTORS if name not in ("alpha", "tokens", SEED)]
"""Factors in which runs that are compared do not differ; the others are recipe and seed."""


@dataclass(frozen=True)
class Saving:
    """What a sweep saves against another, for runs that are alike but for recipe and seed."""

    factors: dict[str, str]
    """What they have in common."""
    gap_closed: float
    """Where the other ends; mean over seeds."""
    gap_closed_here: float
    """Where this one ends."""
    tokens: list[float]
    """How many times fewer tokens until the other's end, for each seed that got there."""
    seconds: list[float]
    """Likewise, seconds of training."""
    seeds: int
    """How many there are."""


def savings(others: Sequence[RunFolder], folders: Sequence[RunFolder]) -> list[Saving]:
    """Compares the runs of two sweeps, seed by seed.

    Args:
        others: Runs that set the gap to reach.
        folders: Runs that reach it, or do not.

    Raises:
        UserError: Where no run here is like one there.
    """
    theirs = {_point(run): run.summary for run in finished_runs(others)}
    groups: dict[tuple[str, ...], list[tuple[FinishedRun, dict[str, Any]]]] = defaultdict(list)
    for run in finished_runs(folders):
        key, seed = _point(run)
        other = theirs.get((key, seed))
        if other is not None and other["gap_closed"] is not None:
            groups[key].append((run, other))
    if not groups:
        raise UserError("no finished run of one sweep has its like in the other, with the same seed")
    found = []
    for key, pairs in groups.items():
        tokens, seconds = [], []
        for run, other in pairs:
            at = first_reached(run.folder.read_curve(), "gap_closed", other["gap_closed"])
            if at is not None:
                tokens.append(other["train_tokens"] / at.read("tokens"))
                seconds.append(other["train_seconds"] / at.read("train_seconds"))
        found.append(
            Saving(
                factors=dict(zip(_ALIKE, key, strict=True)),
                gap_closed=statistics.mean(other["gap_closed"] for _, other in pairs),
                gap_closed_here=statistics.mean(run.summary["gap_closed"] for run, _ in pairs),
                tokens=tokens,
                seconds=seconds,
                seeds=len(pairs),
            )
        )
    return found


def savings_table(found: Sequence[Saving]) -> Table:
    """A row for each; medians, and in brackets the least and the most over seeds."""
    differ = [name for name in found[0].factors if len({one.factors[name] for one in found}) > 1]
    table = Table(title="until the gap that the other sweep ends at", title_justify="left")
    columns = "gap closed there", "gap closed here", "times fewer tokens", "times fewer seconds", "seeds"
    for name in (*map(label, differ), *columns):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            *(one.factors[name] for name in differ),
            percent(one.gap_closed),
            percent(one.gap_closed_here),
            spread(one.tokens),
            spread(one.seconds),
            f"{len(one.tokens)} of {one.seeds} got there",
        )
    return table


def _point(run: FinishedRun) -> tuple[tuple[str, ...], str]:
    """What a run has in common with those it is compared with, and its seed."""
    return tuple(text(run.factors[name]) for name in _ALIKE), text(run.factors[SEED])
