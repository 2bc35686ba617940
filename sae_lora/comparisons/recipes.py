"""Tokens and seconds that a recipe needs to close as much of the gap as another sweep at its end."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sae_lora.common.console import percent
from sae_lora.common.errors import UserError
from sae_lora.comparisons.interpolate import first_reached, speedup
from sae_lora.records.factors import FACTORS, SEEDS, FinishedRun, finished_runs, label, text
from sae_lora.records.folder import RunFolder
from sae_lora.report.repeats import check_repeats
from sae_lora.report.tables import right_aligned, spread

_SHARED = [name for name in FACTORS if name not in ("alpha", "tokens", *SEEDS)]
"""Factors that two compared runs have in common. Recipe and seed are the others."""


@dataclass(frozen=True)
class Saving:
    """Savings of a sweep over another, for runs that differ only in recipe and seed."""

    factors: dict[str, str]
    """The factors that the runs have in common."""
    gap_closed: float
    """Gap closed at the end of the other sweep's runs; mean over seeds."""
    gap_closed_here: float
    """Gap closed at the end of this sweep's runs; mean over seeds."""
    tokens: list[float]
    """Training tokens of the other run, divided by the tokens that this run needs to close as much of
    the gap; for each seed that does."""
    seconds: list[float]
    """The same ratio for seconds of training."""
    seeds: int
    """Number of seeds."""


def savings(others: Sequence[RunFolder], folders: Sequence[RunFolder]) -> list[Saving]:
    """Compare the runs of two sweeps, seed by seed.

    Args:
        others: Runs whose final gap closed is the goal.
        folders: Runs that may reach the goal.

    Raises:
        UserError: If no run of one sweep has a counterpart in the other, or runs of a sweep differ in
            more than these factors and their seeds.
    """
    by_key: dict[tuple[tuple[str, ...], str], list[FinishedRun]] = defaultdict(list)
    for run in finished_runs(others):
        by_key[_key(run)].append(run)
    for runs in by_key.values():
        check_repeats(runs, "runs of the first sweep")
    summaries = {key: runs[0].summary for key, runs in by_key.items()}
    groups: dict[tuple[str, ...], list[tuple[FinishedRun, dict[str, Any]]]] = defaultdict(list)
    for run in finished_runs(folders):
        shared, seed = _key(run)
        reference = summaries.get((shared, seed))
        if reference is not None and None not in (reference["gap_closed"], run.summary["gap_closed"]):
            groups[shared].append((run, reference))
    if not groups:
        raise UserError(
            "no finished run of one sweep has a counterpart in the other, with the same factors and "
            "seed, or their gap closed is undefined"
        )
    rows = []
    for shared, pairs in groups.items():
        check_repeats([run for run, _ in pairs], "runs of the second sweep")
        tokens, seconds = [], []
        for run, reference in pairs:
            curve, goal = run.folder.read_curve(), reference["gap_closed"]
            at_tokens = first_reached(curve, "gap_closed", goal, "tokens")
            at_seconds = first_reached(curve, "gap_closed", goal, "train_seconds")
            if at_tokens is not None and at_seconds is not None:
                tokens.append(speedup(reference["train_tokens"], at_tokens))
                seconds.append(speedup(reference["train_seconds"], at_seconds))
        rows.append(
            Saving(
                factors=dict(zip(_SHARED, shared, strict=True)),
                gap_closed=statistics.mean(reference["gap_closed"] for _, reference in pairs),
                gap_closed_here=statistics.mean(run.summary["gap_closed"] for run, _ in pairs),
                tokens=tokens,
                seconds=seconds,
                seeds=len(pairs),
            )
        )
    return rows


def savings_table(rows: Sequence[Saving]) -> Table:
    """A row for each group of runs: medians over seeds, with smallest and largest value in brackets."""
    varying = [name for name in rows[0].factors if len({row.factors[name] for row in rows}) > 1]
    gaps = "gap closed, other sweep", "gap closed, this sweep"
    columns = *map(label, varying), *gaps, "times fewer tokens", "times fewer seconds", "seeds"
    table = right_aligned("tokens and seconds to the other sweep's gap closed", columns)
    for row in rows:
        table.add_row(
            *(row.factors[name] for name in varying),
            percent(row.gap_closed),
            percent(row.gap_closed_here),
            spread(row.tokens),
            spread(row.seconds),
            f"{len(row.tokens)} of {row.seeds} reach it",
        )
    return table


def _key(run: FinishedRun) -> tuple[tuple[str, ...], str]:
    """The factors that a run has in common with its counterpart, and its seed."""
    return tuple(text(run.factors[name]) for name in _SHARED), text(run.factors[SEEDS[0]])
