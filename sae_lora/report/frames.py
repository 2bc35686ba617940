"""Sweeps as data frames with a row per run or per evaluation, from run folders. Imports no torch."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

import pandas

from sae_lora.config.overrides import command
from sae_lora.evaluation.headlines import headlines
from sae_lora.records.damage import damage
from sae_lora.records.factors import FACTORS, ORIGINS, by_value, values_of, varying
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint
from sae_lora.records.status import RunStatus, State, read_statuses
from sae_lora.report.fits import Frame

_MEASURED = [
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "best_gap_closed"),
    *("initial_kl", "kl", "top1_agreement", "fvu", "fvu_without_outliers"),
    *("trainable_parameters", "train_tokens", "train_seconds", "total_seconds", "train_flops"),
    *("trained_together", "tracked_at"),
]
"""Keys of `summary.json`. Unfinished runs have only the ones that are also fields of their curve."""


def runs_frame(folders: Sequence[RunFolder]) -> Frame:
    """A row per run in any state, ordered by the factors in which the runs differ.

    Of a damaged run, only `sweep`, `run`, `state`, `note` and `folder` are known.

    Columns: `sweep`, `run`, `state`, `note` (where it runs, why it failed); all `FACTORS`, and other
    config keys that differ; measures (cross-entropies and KL in nats per token), from the last point of
    the curve if a run is not finished; `closed_per_million_parameters`, `closed_per_petaflop` and
    `closed_per_minute` of training; `sae_notes`, differences between a finished run and its SAEs'
    metadata, a line each; `command` and `folder`; headline numbers of suites by `suite/name`.
    """
    rows = list(map(_row, *_each_once(folders)))
    frame: Frame = pandas.DataFrame(rows)
    keys = [name for name in frame if _is_key(name)]
    sound = frame[frame["state"] != State.damaged.value]
    same = [name for name in keys if sound[name].map(repr).nunique() == 1]
    frame = frame.drop(columns=same)
    closed = frame["gap_closed"].astype(float)
    for name, cost, unit in (
        ("closed_per_million_parameters", "trainable_parameters", 1e6),
        ("closed_per_petaflop", "train_flops", 1e15),
        ("closed_per_minute", "train_seconds", 60),
    ):
        amount = frame[cost].astype(float)
        frame[name] = closed / (amount / unit).where(amount > 0)
    first = ["sweep", "run", "state", "note", *FACTORS, *(key for key in keys if key not in same)]
    frame = frame[list(dict.fromkeys([*first, *frame]))]
    return frame.sort_values(["sweep", *factors(frame)], ignore_index=True, key=in_order)


def _each_once(folders: Sequence[RunFolder]) -> tuple[list[RunFolder], list[RunStatus]]:
    """The runs and their states, without copies of finished runs in the same sweep."""
    known: set[tuple[str, str]] = set()
    kept: dict[RunFolder, RunStatus] = {}
    for folder, status in zip(folders, read_statuses(folders), strict=True):
        if status.state is State.done:
            key = _sweep_of(folder), folder.read_summary()["hash"]
            if key in known:
                continue
            known.add(key)
        kept[folder] = status
    return list(kept), list(kept.values())


def curves_frame(folders: Sequence[RunFolder]) -> Frame:
    """A row per evaluation: `sweep`, `run`, and the fields of `CurvePoint` except `per_sae`."""
    names = [field.name for field in dataclasses.fields(CurvePoint) if field.name != "per_sae"]
    fields_of = operator.attrgetter(*names)
    rows = []
    for folder in folders:
        if damage(folder) is not None:
            continue
        run = _sweep_of(folder), folder.path.name
        rows += [(*run, *fields_of(point)) for point in folder.read_curve()]
    return pandas.DataFrame(rows, columns=["sweep", "run", *names])


def factors(frame: Frame) -> list[str]:
    """The factors in which the runs of a frame differ, as `varying` names them."""
    names = [*FACTORS, *(name for name in frame if _is_key(name))]
    return varying(frame[frame["state"] != State.damaged.value][names].to_dict("records"))


def _is_key(column: str) -> bool:
    """True for the column of a config key that is no factor."""
    return "." in column or column in ORIGINS


def _sweep_of(folder: RunFolder) -> str:
    return folder.path.resolve().parent.name


def _row(folder: RunFolder, status: RunStatus) -> dict[str, Any]:
    """A run's row of the frame, by column."""
    place = {"sweep": _sweep_of(folder), "run": folder.path.name, "folder": str(folder.path)}
    state = {"state": status.state.value, "note": status.note}
    if status.state is State.damaged:
        unknown = dict.fromkeys([*FACTORS, *_MEASURED, "measured_l0", "command"])
        return place | state | unknown | {"sae_notes": ""}
    config = folder.read_config() if folder.config.exists() else {}
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
        place
        | state
        | values_of(config, measured)
        | {name: measured.get(name) for name in _MEASURED}
        | {"measured_l0": measured.get("l0"), "sae_notes": "\n".join(measured.get("notes", []))}
        | {"command": command(config)}
        | headlines(folder)
    )


def in_order(column: Any) -> Any:
    """Sort keys of a column that holds numbers or text."""
    return column.map(by_value)
