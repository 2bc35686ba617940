"""How soon one sweep reaches the gap that another ends at: what a better recipe saves."""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from sae_lora.common.console import percent
from sae_lora.common.errors import UserError
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint
from sae_lora.report.tables import FACTORS, finished_summaries, spread

_ALIKE = [name for name in FACTORS if name not in ("alpha", "tokens", "seed")]
"""Factors in which runs that are compared do not differ; the others are recipe and seed."""


@dataclass(frozen=True)
class Reached:
    """When a run reached a gap."""

    tokens: float
    seconds: float
    """Of training."""


def reached(curve: Sequence[CurvePoint], gap_closed: float) -> Reached | None:
    """When so much of the gap was first closed, on straight lines between evaluations.

    Args:
        curve: Points by tokens.
        gap_closed: Share of the gap.

    Returns:
        `None` where that never was.
    """
    for before, after in itertools.pairwise(curve):
        if before.gap_closed is None or after.gap_closed is None:
            continue
        if before.gap_closed < gap_closed <= after.gap_closed:
            share = (gap_closed - before.gap_closed) / (after.gap_closed - before.gap_closed)
            return Reached(
                before.tokens + share * (after.tokens - before.tokens),
                before.train_seconds + share * (after.train_seconds - before.train_seconds),
            )
    return None


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
    theirs = {_point(summary): summary for _, summary in finished_summaries(others)}
    groups: dict[tuple[str, ...], list[tuple[RunFolder, dict[str, Any], dict[str, Any]]]]
    groups = defaultdict(list)
    for folder, summary in finished_summaries(folders):
        key, seed = _point(summary)
        other = theirs.get((key, seed))
        if other is not None and other["gap_closed"] is not None:
            groups[key].append((folder, summary, other))
    if not groups:
        raise UserError("no finished run of one sweep has its like in the other, with the same seed")
    found = []
    for key, pairs in groups.items():
        tokens, seconds = [], []
        for folder, _, other in pairs:
            at = reached(folder.read_curve(), other["gap_closed"])
            if at is not None:
                tokens.append(other["train_tokens"] / at.tokens)
                seconds.append(other["train_seconds"] / at.seconds)
        found.append(
            Saving(
                factors=dict(zip(_ALIKE, key, strict=True)),
                gap_closed=statistics.mean(other["gap_closed"] for _, _, other in pairs),
                gap_closed_here=statistics.mean(summary["gap_closed"] for _, summary, _ in pairs),
                tokens=tokens,
                seconds=seconds,
                seeds=len(pairs),
            )
        )
    return found


def savings_table(found: Sequence[Saving]) -> Table:
    """A row for each; medians, and in brackets the least and the most over seeds."""
    varying = [name for name in found[0].factors if len({one.factors[name] for one in found}) > 1]
    table = Table(title="until the gap that the other sweep ends at", title_justify="left")
    columns = "gap closed there", "gap closed here", "times fewer tokens", "times fewer seconds", "seeds"
    for name in (*varying, *columns):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(
            *(one.factors[name] for name in varying),
            percent(one.gap_closed),
            percent(one.gap_closed_here),
            _spread(one.tokens),
            _spread(one.seconds),
            f"{len(one.tokens)} of {one.seeds} got there",
        )
    return table


def _point(summary: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    """What a run has in common with those it is compared with, and its seed."""
    return tuple(FACTORS[name](summary) for name in _ALIKE), FACTORS["seed"](summary)


def _spread(ratios: Sequence[float]) -> str:
    if not ratios:
        return "never"
    return spread(ratios)
