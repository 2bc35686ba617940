"""Repetitions: runs that differ only in their seeds, and means over them. Imports no torch.

All tables, comparisons and figures average over these groups, and over nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_lora.common.errors import UserError, listed
from sae_lora.records.factors import SEEDS, FinishedRun, differing, label, values_of
from sae_lora.records.folder import RunFolder
from sae_lora.report.fits import mean_and_margin


@dataclass(frozen=True)
class Mean:
    """The mean of a measure over repetitions."""

    value: float | None
    """`None` if a run has no value."""
    margin: float | None
    """Half the 95% interval of the mean, from Student's distribution; `None` for a single run."""

    def written(self, write: Callable[[float | None], str]) -> str:
        """The mean with its margin, each as `write` writes it: `16.6% ± 1.2%`."""
        if self.value is None or not self.margin:  # a measure of the config is equal in all
            return write(self.value)
        return f"{write(self.value)} ± {write(self.margin).lstrip('+')}"


def mean_of(values: Sequence[float | None]) -> Mean:
    """The mean of the values of repetitions."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Mean(None, None)
    if len(known) == 1:
        return Mean(known[0], None)
    return Mean(*mean_and_margin(known))


def in_words(values: Sequence[float], form: str) -> str:
    """The mean of the values of repetitions with its margin, each in this format: `2.4 ± 0.3`."""
    return mean_of(values).written(lambda value: "–" if value is None else format(value, form))


@dataclass(frozen=True)
class Repeats:
    """Finished runs that differ in nothing but their seeds."""

    runs: list[FinishedRun]

    @property
    def factors(self) -> dict[str, Any]:
        """The factors that the runs have in common. Single runs also have their seeds."""
        factors = self.runs[0].factors
        if len(self.runs) == 1:
            return factors
        return {name: value for name, value in factors.items() if name not in SEEDS}

    def mean(self, measure: Callable[[FinishedRun], float | None]) -> Mean:
        """The mean of a measure."""
        return mean_of([measure(run) for run in self.runs])


def repeats(runs: Sequence[FinishedRun]) -> list[Repeats]:
    """Groups of runs that differ only in their seeds, in the order of their first runs."""
    groups: dict[object, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(_without_seeds(run.folder), []).append(run)
    return [Repeats(group) for group in groups.values()]


def check_repeats(runs: Sequence[FinishedRun], which: str) -> None:
    """Refuse to take a mean over runs that differ in more than their seeds.

    Raises:
        UserError: Names the factors. `which` says in words which runs these are.
    """
    if len(repeats(runs)) > 1:
        names = [label(name) for name in differing([run.factors for run in runs])]
        raise UserError(
            f"{which} differ in {listed(names)}, and means are taken over seeds only: compare runs with "
            "one value of each"
        )


def _without_seeds(folder: RunFolder) -> object:
    """A value that is equal for repetitions: all settings that may change a result, but the seeds.

    For a run that began with another run's result, the settings of that run are meant, not its folder.
    """
    config = folder.read_config()
    values = {name: repr(value) for name, value in values_of(config, {}).items() if name not in SEEDS}
    init = config.get("init")
    if init is None:
        return tuple(sorted(values.items()))
    del values["init"]
    values.pop("sae.path", None)
    try:
        before = _without_seeds(folder.before(init))
    except UserError:  # it was deleted
        before = Path(init).name
    return (*sorted(values.items()), before)
