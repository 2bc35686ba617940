"""Successive halving: runs that compete, and the rule by which a run stops early. Imports no torch.

A run that reaches a rung goes on if it is among the best of all runs that have reached this rung so far:
asynchronous successive halving (arXiv 1810.05934) without promotion, since what has stopped is taken up
again only on request. The runs know each other by their folders alone, so it does not matter which
process, job or launch trains them.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sae_lora.common.files import as_json, write_atomically
from sae_lora.records.folder import DamagedError, RunFolder, parsed_object, runs_of
from sae_lora.records.metrics import METRICS
from sae_lora.records.schema import CurvePoint, check_types

_EXACT = 1e-9
"""Rounding of the product of a share and a number."""


@dataclass(frozen=True)
class Bracket:
    """The runs with which a run competes, and its rule: `halving.json`."""

    bracket: str
    """Equal for runs that compete."""
    candidate: str
    """Equal for runs that also agree in the keys that compete, and differ only in their seeds."""
    rungs: list[int]
    """Numbers of the evaluations at which runs are compared; that before training is 0."""
    keep: float
    """Share of the candidates at a rung that goes on."""
    measure: str
    """The measure of the curve that is compared."""


@dataclass(frozen=True)
class Standing:
    """The place of a run that was left behind."""

    rank: int
    """1 for the best."""
    of: int
    """Number of candidates that had reached the rung."""
    rung_tokens: int
    """Training tokens at the rung."""
    tokens: int
    """Training tokens at which the run stopped."""
    measure: str

    def __str__(self) -> str:
        rung = f" at {self.rung_tokens:,} tokens" if self.rung_tokens != self.tokens else ""
        name = METRICS[self.measure].name
        return f"stopped at {self.tokens:,} tokens, rank {self.rank} of {self.of}{rung} by {name}"


def write(folder: RunFolder, bracket: Bracket) -> None:
    """Write the bracket of a run into its folder."""
    write_atomically(folder.halving, as_json(dataclasses.asdict(bracket)))


def read(folder: RunFolder) -> Bracket | None:
    """The bracket of a run; `None` if it was never launched with halving.

    Raises:
        DamagedError: If its file cannot be read.
    """
    return folder.parsed(folder.halving, _bracket) if folder.halving.exists() else None


def _bracket(text: str) -> Bracket:
    values = parsed_object(text)
    check_types(Bracket, values)
    return Bracket(**values)


def outranked(folders: Sequence[RunFolder]) -> dict[RunFolder, Standing]:
    """The unfinished runs among these that are not among the best at the last rung that they passed.

    Args:
        folders: Runs that have just been evaluated.

    Raises:
        UserError: If the folder of a sweep cannot be read.
    """
    brackets: dict[Path, Bracket] = {}
    for sweep in {folder.path.parent for folder in folders}:
        brackets |= _brackets(sweep)
    curves = {path: _curve(RunFolder(path)) for path in brackets}
    behind = {}
    for folder in folders:
        bracket, curve = brackets.get(folder.path), curves.get(folder.path, [])
        passed = [rung for rung in bracket.rungs if rung < len(curve)] if bracket else []
        if bracket is None or not passed:
            continue
        rung = max(passed)
        values: dict[str, list[float]] = defaultdict(list)
        for path, other in brackets.items():
            value = value_at(curves[path], rung, bracket.measure)
            competes = path.parent == folder.path.parent and other.bracket == bracket.bracket
            if competes and value is not None:
                values[other.candidate].append(value)
        if bracket.candidate not in values:  # its measure is undefined
            continue
        rank = rank_of(values, bracket.candidate, bracket.measure)
        if rank > places(len(values), bracket.keep):
            tokens = curve[rung].tokens, curve[-1].tokens
            behind[folder] = Standing(rank, len(values), *tokens, bracket.measure)
    return behind


def _brackets(sweep: Path) -> dict[Path, Bracket]:
    """The brackets of the runs of a sweep, by their folders; without failed and damaged runs."""
    brackets = {}
    for folder in runs_of(sweep):
        with suppress(DamagedError):
            if not folder.has_failed and (bracket := read(folder)) is not None:
                brackets[folder.path] = bracket
    return brackets


def _curve(folder: RunFolder) -> list[CurvePoint]:
    with suppress(DamagedError):
        return folder.read_curve()
    return []


def value_at(curve: Sequence[CurvePoint], rung: int, measure: str) -> float | None:
    """The measure at this evaluation; `None` if it is undefined, or not reached yet."""
    return getattr(curve[rung], measure) if rung < len(curve) else None


def rank_of(values: Mapping[str, Sequence[float]], candidate: str, measure: str) -> int:
    """The rank of a candidate by the mean over its seeds, 1 for the best; equal means share a rank.

    Args:
        values: The values of the runs of each candidate.
        candidate: One of them.
        measure: The measure of these values.
    """
    sign = -1 if METRICS[measure].better == "higher" else 1
    means = {name: sign * fmean(each) for name, each in values.items()}
    return 1 + sum(mean < means[candidate] for mean in means.values())


def places(candidates: int, keep: float) -> int:
    """The number of candidates at a rung that go on."""
    return max(1, rounded_up(keep * candidates))


def rounded_up(value: float) -> int:
    """The next whole number. A value a little above a whole number is that number, with an error."""
    return math.ceil(value - _EXACT)
