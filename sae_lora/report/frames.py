"""Sweeps as tables, made from run folders alone: a row per run, or per point. Imports no torch."""

import dataclasses
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sae_lora.config.overrides import command
from sae_lora.evaluation.headlines import headlines
from sae_lora.records.factors import FACTORS, values_of, varying
from sae_lora.records.folder import RunFolder, runs_of
from sae_lora.records.schema import CurvePoint
from sae_lora.records.status import standings
from sae_lora.report.fits import Frame

_MEASURED = [
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "best_gap_closed"),
    *("initial_kl", "kl", "top1_agreement", "fvu"),
    *("trainable_parameters", "train_tokens", "train_seconds", "total_seconds", "train_flops"),
    *("trained_together", "tracked_at"),
]
"""Of a summary; what of them a curve has too, unfinished runs have from there."""


class Sweep:
    """The runs of one sweep, or of several.

    Args:
        folders: Their folders. They are read when a table is asked for.
    """

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        self.folders = list(folders)

    def __iter__(self) -> Iterator[RunFolder]:
        return iter(self.folders)

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, number: int) -> RunFolder:
        return self.folders[number]

    def frame(self) -> Frame:
        """A row per run, whatever its state, ordered by what the runs differ in.

        Columns: `sweep`, `run`, `state`, `note` (who has it, why it failed); all `FACTORS`, and by its
        key whatever else differs; what was measured, of a run that is not finished the last
        point of its curve (cross-entropies and KL in nats per token); `closed_per_million_parameters`,
        `closed_per_petaflop` and `closed_per_minute` of training; `command` and `folder`; and where runs
        were evaluated, headlines by `suite/name`.
        """
        import pandas  # takes a while, which looking at a sweep's state need not

        rows = [
            {
                "sweep": _sweep_of(folder),
                "run": folder.path.name,
                "state": standing.state.value,
                "note": standing.note,
            }
            | _row(folder)
            for folder, standing in zip(self.folders, standings(self.folders), strict=True)
        ]
        found: Frame = pandas.DataFrame(rows)
        other = [name for name in found.columns if "." in name]
        same = [name for name in other if found[name].map(repr).nunique() == 1]
        found = found.drop(columns=same)
        closed = found["gap_closed"].astype(float)
        for name, of, unit in (
            ("closed_per_million_parameters", "trainable_parameters", 1e6),
            ("closed_per_petaflop", "train_flops", 1e15),
            ("closed_per_minute", "train_seconds", 60),
        ):
            amount = found[of].astype(float)
            found[name] = closed / (amount / unit).where(amount > 0)
        order = ["sweep", "run", "state", "note", *FACTORS, *(set(other) - set(same))]
        order += [name for name in found.columns if name not in order]
        by = factors(found)
        return found[order].sort_values(["sweep", *by], ignore_index=True, key=_by_value)

    def curves(self) -> Frame:
        """A row per evaluation: `sweep`, `run`, and the fields of `CurvePoint`."""
        import pandas

        names = [field.name for field in dataclasses.fields(CurvePoint) if field.name != "per_sae"]
        values_of = operator.attrgetter(*names)
        rows = [
            (*run, *values_of(point))
            for folder in self.folders
            for run in [(_sweep_of(folder), folder.path.name)]
            for point in folder.read_curve()
        ]
        return pandas.DataFrame(rows, columns=["sweep", "run", *names])


def load_sweep(*paths: Path | str) -> Sweep:
    """The runs of one sweep or several: `load_sweep("outputs/ranks").frame()`.

    Args:
        paths: `outputs/<sweep>`, or single runs.

    Raises:
        UserError: Where one of them holds no runs.
    """
    return Sweep([folder for path in paths for folder in runs_of(Path(path))])


def factors(frame: Frame) -> list[str]:
    """The factors in which runs differ, in their usual order, the seed last.

    One that only follows another (alpha, where it is twice the rank) is not named beside it.
    """
    names = [*FACTORS, *(name for name in frame if "." in name)]
    return varying(frame[names].to_dict("records"))


def _sweep_of(folder: RunFolder) -> str:
    return folder.path.resolve().parent.name


def _row(folder: RunFolder) -> dict[str, Any]:
    """What a folder says of its run."""
    config = folder.read_config()
    measured: dict[str, Any] = {}
    if folder.is_finished:
        measured = folder.read_summary()
    elif curve := folder.read_curve():
        first, last = curve[0], curve[-1]
        measured = dataclasses.asdict(last) | {
            "initial_gap": last.spliced_ce - last.base_ce,
            "initial_kl": first.kl,
            "train_tokens": last.tokens,
        }
    return (
        values_of(config, measured)
        | {name: measured.get(name) for name in _MEASURED}
        | {"measured_l0": measured.get("l0"), "command": command(config), "folder": str(folder.path)}
        | headlines(folder)
    )


def _by_value(column: Any) -> Any:
    """Sorts numbers by their value, also where some runs have words there."""
    return column.map(
        lambda value: (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))
    )
