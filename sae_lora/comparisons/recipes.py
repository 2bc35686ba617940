"""Tokens and seconds that a better recipe saves until the gap that another sweep ends at."""

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
from sae_lora.report.tables import right_aligned, spread

_ALIKE = [name for name in FACTORS if name not in ("alpha", "tokens", SEED)]
"""Factors that two compared runs have in common; the others are recipe and seed."""


@dataclass(frozen=True)
class Saving:
    """Savings of a sweep against another, for runs that are alike but for recipe and seed."""

    factors: dict[str, str]
    """The factors that the runs have in common."""
    gap_closed: float
    """Gap closed at the end of the other sweep's runs; mean over seeds."""
    gap_closed_here: float
    """The same of this sweep's runs."""
    tokens: list[float]
    """Tokens of the other run over tokens until its end is reached, for each seed that reaches it."""
    seconds: list[float]
    """The same ratio of seconds of training."""
    seeds: int
    """Number of seeds."""


def savings(others: Sequence[RunFolder], folders: Sequence[RunFolder]) -> list[Saving]:
    """Compares the runs of two sweeps, seed by seed.

    Args:
        others: Runs that set the gap to reach.
        folders: Runs that may reach it.

    Raises:
        UserError: Where no run of one sweep has a counterpart in the other.
    """
    summaries = {_key(run): run.summary for run in finished_runs(others)}
    groups: dict[tuple[str, ...], list[tuple[FinishedRun, dict[str, Any]]]] = defaultdict(list)
    for run in finished_runs(folders):
        alike, seed = _key(run)
        other = summaries.get((alike, seed))
        if other is not None and other["gap_closed"] is not None:
            groups[alike].append((run, other))
    if not groups:
        raise UserError("no finished run of one sweep has its like in the other, with the same seed")
    rows = []
    for alike, pairs in groups.items():
        tokens, seconds = [], []
        for run, other in pairs:
            curve, goal = run.folder.read_curve(), other["gap_closed"]
            at_tokens = first_reached(curve, "gap_closed", goal, "tokens")
            at_seconds = first_reached(curve, "gap_closed", goal, "train_seconds")
            if at_tokens is not None and at_seconds is not None:
                tokens.append(other["train_tokens"] / at_tokens)
                seconds.append(other["train_seconds"] / at_seconds)
        rows.append(
            Saving(
                factors=dict(zip(_ALIKE, alike, strict=True)),
                gap_closed=statistics.mean(other["gap_closed"] for _, other in pairs),
                gap_closed_here=statistics.mean(run.summary["gap_closed"] for run, _ in pairs),
                tokens=tokens,
                seconds=seconds,
                seeds=len(pairs),
            )
        )
    return rows


def savings_table(rows: Sequence[Saving]) -> Table:
    """A row for each group of runs; medians, and in brackets the least and the largest over seeds."""
    varying = [name for name in rows[0].factors if len({row.factors[name] for row in rows}) > 1]
    numbers = "gap closed there", "gap closed here", "times fewer tokens", "times fewer seconds"
    columns = *map(label, varying), *numbers, "seeds"
    table = right_aligned("until the gap that the other sweep ends at", columns)
    for row in rows:
        table.add_row(
            *(row.factors[name] for name in varying),
            percent(row.gap_closed),
            percent(row.gap_closed_here),
            spread(row.tokens),
            spread(row.seconds),
            f"{len(row.tokens)} of {row.seeds} got there",
        )
    return table


def _key(run: FinishedRun) -> tuple[tuple[str, ...], str]:
    """The factors that a run has in common with its counterpart, and its seed."""
    return tuple(text(run.factors[name]) for name in _ALIKE), text(run.factors[SEED])
