"""How soon LoRA around an SAE reaches what an SAE trained end to end reaches: a table and a figure."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

from sae_lora.common.errors import UserError
from sae_lora.common.plots import COLOURS, finished, logarithmic
from sae_lora.comparisons.interpolate import first_reached, value_at
from sae_lora.config.enums import Method
from sae_lora.config.schema import Config
from sae_lora.config.serialize import load
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint
from sae_lora.report.tables import in_whole_words, spread

COSTS = ("train_seconds", "train_flops")
"""What a curve is read over."""


@dataclass(frozen=True)
class Branch:
    """LoRA around what an SAE's training has kept, beside an SAE trained end to end.

    Costs of LoRA hold those of the SAE until it was kept.
    """

    at: float
    """Share of the SAE's training after which it was kept."""
    seed: int
    ce: float
    """Held-out cross-entropy that both reach, in nats per token: the higher one of the two that they end
    at."""
    lora_ce: float
    """What LoRA ends at."""
    e2e_ce: float
    """What the SAE trained end to end ends at."""
    lora: dict[str, float]
    """By name of `COSTS`: what LoRA takes to get there."""
    sae: dict[str, float]
    """What of that is the SAE's training, which an SAE that is there already does not cost."""
    e2e: dict[str, float]
    """What the SAE trained end to end takes."""


@dataclass(frozen=True)
class _Arm:
    config: Config
    curve: list[CurvePoint]
    path: Path


def compare(folders: Sequence[RunFolder]) -> list[Branch]:
    """Every finished LoRA run of a sweep beside the end-to-end run of the same seed.

    Args:
        folders: Runs of `experiment=time_to_ce`, or of one like it: method=sae, lora and e2e.

    Raises:
        UserError: Where one of the three is missing.
    """
    arms = [_arm(folder) for folder in folders if folder.is_finished]
    found = []
    for lora in _of(arms, Method.lora):
        if lora.config.init is None:
            continue
        before = _before(lora)
        for e2e in _of(arms, Method.e2e):
            if _place(e2e) == _place(lora) and e2e.config.train.seed == lora.config.train.seed:
                found.append(_branch(lora, before, e2e))
    if not found:
        raise UserError(
            "no finished run of method=lora begins with an SAE (init=) beside a finished one of "
            "method=e2e with the same model, block and seed"
        )
    return sorted(found, key=lambda one: (one.at, one.seed))


def _arm(folder: RunFolder) -> _Arm:
    return _Arm(load(folder.config.read_text()), folder.read_curve(), folder.path)


def _before(arm: _Arm) -> _Arm:
    """The run whose result this one begins with."""
    assert arm.config.init is not None
    return _arm(RunFolder(arm.path).before(arm.config.init))


def _of(arms: Sequence[_Arm], kind: Method) -> list[_Arm]:
    return [arm for arm in arms if arm.config.method.kind is kind]


def _place(arm: _Arm) -> tuple[Any, ...]:
    return arm.config.model.name, tuple(choice.block for choice in arm.config.sae.used)


def _branch(lora: _Arm, sae: _Arm, e2e: _Arm) -> Branch:
    lora_ce, e2e_ce = lora.curve[-1].student_ce, e2e.curve[-1].student_ce
    ce = max(lora_ce, e2e_ce)
    before = {cost: _kept_at(sae, lora.config.init_at, cost) for cost in COSTS}
    return Branch(
        at=lora.config.init_at,
        seed=lora.config.train.seed,
        ce=ce,
        lora_ce=lora_ce,
        e2e_ce=e2e_ce,
        lora={cost: before[cost] + _cost_of(lora, ce, cost) for cost in COSTS},
        sae=before,
        e2e={cost: _cost_of(e2e, ce, cost) for cost in COSTS},
    )


def _cost_of(arm: _Arm, ce: float, cost: str) -> float:
    """What a training had taken when its student first got down to a cross-entropy."""
    reading = first_reached(arm.curve, "student_ce", ce)
    assert reading is not None  # one of its points is as low
    return reading.read(cost)


def _kept_at(arm: _Arm, share: float, cost: str) -> float:
    """What an SAE's training had taken after a share of its tokens."""
    return value_at(arm.curve, "tokens", share * arm.curve[-1].tokens, cost)


def table(found: Sequence[Branch]) -> Table:
    """A row for each share of the SAE's training; medians, in brackets the least and most over seeds.

    `LoRA alone` is how many times sooner it is where the SAE is there already.
    """
    made = Table(title="until both are at the same cross-entropy", title_justify="left")
    for name in (
        *("SAE trained to", "LoRA ends at", "e2e ends at", "SAE and LoRA", "e2e"),
        *("times sooner", "times fewer FLOPs", "LoRA alone", "seeds"),
    ):
        made.add_column(name, justify="right")
    for at in sorted({one.at for one in found}):
        those = [one for one in found if one.at == at]
        seconds, flops = COSTS
        made.add_row(
            f"{at:.0%}",
            f"{statistics.median(one.lora_ce for one in those):.3f}",
            f"{statistics.median(one.e2e_ce for one in those):.3f}",
            f"{statistics.median(one.lora[seconds] for one in those):.0f} s",
            f"{statistics.median(one.e2e[seconds] for one in those):.0f} s",
            spread([one.e2e[seconds] / one.lora[seconds] for one in those]),
            f"{statistics.median(one.e2e[flops] / one.lora[flops] for one in those):.1f}",
            f"{statistics.median(_sooner_alone(one, seconds) for one in those):.1f}",
            str(len(those)),
        )
    return in_whole_words(made)


def _sooner_alone(branch: Branch, cost: str) -> float:
    """How many times less LoRA takes where the SAE is there already."""
    alone = branch.lora[cost] - branch.sae[cost]
    return branch.e2e[cost] / alone if alone else math.inf


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """Cross-entropy over seconds and FLOPs: the SAE's training, LoRA that branches off it, and e2e.

    Args:
        folders: As for `compare`. One seed is drawn, the first.
    """
    arms = [_arm(folder) for folder in folders if folder.is_finished]
    seed = min(arm.config.train.seed for arm in arms)
    arms = [arm for arm in arms if arm.config.train.seed == seed]
    lines = [
        *(("reconstruction", COLOURS[6], arm) for arm in _of(arms, Method.sae)),
        *(("end to end", COLOURS[5], arm) for arm in _of(arms, Method.e2e)),
        *(("LoRA", COLOURS[0], arm) for arm in _of(arms, Method.lora) if arm.config.init is not None),
    ]
    drawn = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.05)
    axes = ("seconds of training", ".3~g"), ("training FLOPs", ".2~s")
    for column, (cost, (title, tickformat)) in enumerate(zip(COSTS, axes, strict=True), 1):
        amounts: list[float] = []
        named: set[str] = set()
        for name, colour, arm in lines:
            begins = _kept_at(_before(arm), arm.config.init_at, cost) if name == "LoRA" else 0.0
            # The very first point is at nothing, which a logarithmic axis has no place for.
            taken = [begins + (getattr(point, cost) or 0.0) or None for point in arm.curve]
            amounts += [amount for amount in taken if amount]
            drawn.add_scatter(
                x=taken,
                y=[point.student_ce for point in arm.curve],
                mode="lines",
                line={"color": colour, "width": 2},
                name=name,
                legendgroup=name,
                showlegend=column == 1 and name not in named,
                row=1,
                col=column,
            )
            named.add(name)
        drawn.update_xaxes(title=title, row=1, col=column, **logarithmic(amounts, tickformat))
    base = arms[0].curve[-1].base_ce
    drawn.add_hline(base, line={"color": "#999999", "dash": "dot", "width": 1})
    drawn.update_yaxes(title="held-out CE (nats per token)", row=1, col=1)
    ends = [arm.curve[-1].student_ce for arm in arms]
    drawn.update_yaxes(range=[base - 0.1, max(ends) + 1.2])
    return {"time_to_ce": finished(drawn)}
