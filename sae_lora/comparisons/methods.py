"""Methods side by side, after the same tokens and after the same seconds."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from rich.table import Table

from sae_lora.common.errors import UserError
from sae_lora.common.plots import logarithmic
from sae_lora.comparisons.interpolate import value_at
from sae_lora.config.serialize import load
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint
from sae_lora.report.figures import gap_curves
from sae_lora.report.fits import Frame
from sae_lora.report.frames import Sweep
from sae_lora.report.tables import in_whole_words, mean_and_range


@dataclass(frozen=True)
class Outcome:
    """What one method comes to; CE gaps in nats per token, a value for each seed."""

    method: str
    """Its name; of a run that begins with another's result, both."""
    trained_weights: int
    seconds: list[float]
    """Of training, for all its tokens."""
    flops: list[float]
    gap_after_tokens: list[float]
    """CE gap after the tokens that all runs have been trained on."""
    gap_after_seconds: list[float]
    """CE gap after the seconds that the quickest run took for them."""
    initial_gap: float
    """Before training; of the first seed."""
    fvu: list[float]
    """At the end."""


def compare(folders: Sequence[RunFolder]) -> list[Outcome]:
    """What each method of a sweep comes to, the smallest gap after the same tokens first.

    Args:
        folders: Runs on the same text, on their own each (`launcher.pack=off`), or seconds are shares.

    Raises:
        UserError: Where none of them is finished, or a run that one has begun with is gone.
    """
    finished = [folder for folder in folders if folder.is_finished]
    if not finished:
        raise UserError("none of these runs is finished")
    curves = {folder.path: folder.read_curve() for folder in finished}
    tokens = min(curve[-1].tokens for curve in curves.values())
    seconds = min(value_at(curve, "tokens", tokens, "train_seconds") for curve in curves.values())
    by_method: dict[str, list[RunFolder]] = defaultdict(list)
    for folder in finished:
        by_method[method_of(folder)].append(folder)
    found = []
    for method, those in by_method.items():
        own = [curves[folder.path] for folder in those]
        first = own[0][0]
        found.append(
            Outcome(
                method=method,
                trained_weights=those[0].read_summary()["trainable_parameters"],
                seconds=[value_at(curve, "tokens", tokens, "train_seconds") for curve in own],
                flops=[value_at(curve, "tokens", tokens, "train_flops") for curve in own],
                gap_after_tokens=_gaps(own, "tokens", tokens),
                gap_after_seconds=_gaps(own, "train_seconds", seconds),
                initial_gap=first.spliced_ce - first.base_ce,
                fvu=[curve[-1].fvu for curve in own],
            )
        )
    return sorted(found, key=lambda one: statistics.mean(one.gap_after_tokens))


def _gaps(curves: Sequence[Sequence[CurvePoint]], over: str, amount: float) -> list[float]:
    return [value_at(curve, over, amount, "ce_gap") for curve in curves]


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """The CE gap of each method on its way, over tokens, seconds and FLOPs, by name of the file.

    Args:
        folders: As for `compare`.
    """
    runs = Sweep(folders)
    frame, curves = runs.frame(), runs.curves()
    frame["method"] = [method_of(RunFolder(Path(path))) for path in frame["folder"]]
    over = "tokens", "train_seconds", "train_flops"
    return {f"methods_{name}": _figure(frame, curves, name) for name in over}


def _figure(frame: Frame, curves: Frame, over: str) -> go.Figure:
    """The CE gap of each method, on a logarithmic axis that ends where the worst one does."""
    drawn = gap_curves(frame, curves, over, ["method"])
    # A new SAE begins far above what the others differ by.
    gaps = [gap for gap in frame["ce_gap"] if gap is not None and gap > 0]
    if gaps:
        drawn.update_yaxes(logarithmic(gaps))
    return drawn


def method_of(folder: RunFolder) -> str:
    """The method of a run; where it begins with another's result, both.

    Raises:
        UserError: Where that other run is gone.
    """
    config = load(folder.config.read_text())
    name = config.method.kind.name
    if config.init is None:
        return name
    before = load(folder.before(config.init).config.read_text())
    return f"{name} after {before.method.kind.name}"


def table(found: Sequence[Outcome]) -> Table:
    """A row for each; means over seeds, in brackets the least and the most."""
    made = Table(title="CE gap in nats per token", title_justify="left")
    for name in (
        *("method", "before", "after the same tokens", "after the same seconds"),
        *("FVU", "weights", "seconds", "FLOPs"),
    ):
        made.add_column(name, justify="right")
    for one in found:
        made.add_row(
            one.method,
            f"{one.initial_gap:+.3f}",
            mean_and_range(one.gap_after_tokens),
            mean_and_range(one.gap_after_seconds),
            f"{statistics.mean(one.fvu):.3f}",
            f"{one.trained_weights:,}",
            f"{statistics.mean(one.seconds):.0f}",
            f"{statistics.mean(one.flops):.1e}",
        )
    return in_whole_words(made)
