"""Time that LoRA around an SAE needs to reach the CE of an SAE trained end to end."""

from collections.abc import Sequence
from dataclasses import dataclass

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

from sae_lora.common.errors import UserError
from sae_lora.common.plots import COLOURS, finished, logarithmic
from sae_lora.comparisons.interpolate import first_reached, speedup, value_at
from sae_lora.config.enums import Method
from sae_lora.config.serialize import load
from sae_lora.records.factors import ORIGINS, differing, finished_runs, label, text
from sae_lora.records.folder import RunFolder
from sae_lora.report.repeats import check_repeats, in_words
from sae_lora.report.tables import in_whole_words, right_aligned

COSTS = ("train_seconds", "train_flops")
"""Fields of a curve's points that measure the cost of training."""


@dataclass(frozen=True)
class Branch:
    """LoRA around a saved SAE, compared to an SAE trained end to end.

    Costs of LoRA include the SAE's training until it was saved.
    """

    at: float
    """Share of the SAE's training after which it was saved."""
    settings: dict[str, str]
    """The other factors in which runs of LoRA differ, without the seeds."""
    seed: int
    ce: float
    """Held-out cross-entropy that both reach, in nats per token: the higher of their final values."""
    lora_ce: float
    """Cross-entropy at the end of LoRA."""
    e2e_ce: float
    """Cross-entropy at the end of end-to-end training."""
    lora: dict[str, float]
    """Cost of LoRA until `ce`, by name of `COSTS`."""
    sae: dict[str, float]
    """The part of `lora` that trains the SAE. It is not needed if the SAE already exists."""
    e2e: dict[str, float]
    """Cost of end-to-end training until `ce`."""


class _Run:
    """A run of the experiment."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.config = load(folder.config.read_text())
        self.curve = folder.read_curve()

    def previous(self) -> "_Run":
        """The run whose result this run begins with."""
        assert self.config.init is not None
        return _Run(self.folder.before(self.config.init))

    def matching(self) -> tuple[object, ...]:
        """Model, blocks and seed, which are the same in runs that are compared."""
        blocks = tuple(choice.block for choice in self.config.sae.used)
        return self.config.model.name, blocks, self.config.train.seed


def compare(folders: Sequence[RunFolder]) -> list[Branch]:
    """Compare every finished LoRA run of a sweep to the end-to-end run with the same seed.

    Args:
        folders: Runs of `experiment=time_to_ce` or of a similar one, with method=sae, lora and e2e.

    Raises:
        UserError: If one of the three methods is missing, or several runs of e2e have the same seed.
    """
    runs = [_Run(folder) for folder in folders if folder.is_finished]
    finished = {run.folder.path: run for run in finished_runs(folders)}
    loras = _of(runs, Method.lora)
    names = differing([finished[lora.folder.path].factors for lora in loras])
    names = [name for name in names if name not in ("init_at", *ORIGINS)]
    branches = []
    for lora in loras:
        matching = [e2e for e2e in _of(runs, Method.e2e) if e2e.matching() == lora.matching()]
        check_repeats(
            [finished[e2e.folder.path] for e2e in matching], "runs of method=e2e with the same seed"
        )
        factors = finished[lora.folder.path].factors
        settings = {label(name): text(factors.get(name)) for name in names}
        branches += [_branch(lora, lora.previous(), e2e, settings) for e2e in matching]
    if not branches:
        raise UserError(
            "no finished run of method=lora that begins with an SAE (init=) has a finished counterpart "
            "of method=e2e with the same model, block and seed"
        )
    return sorted(branches, key=lambda branch: (branch.at, str(branch.settings), branch.seed))


def _of(runs: Sequence[_Run], kind: Method) -> list[_Run]:
    """The runs of a method; for LoRA, only the runs that begin with another run's SAE."""
    chosen = [run for run in runs if run.config.method.kind is kind]
    return [run for run in chosen if kind is not Method.lora or run.config.init is not None]


def _branch(lora: _Run, sae: _Run, e2e: _Run, settings: dict[str, str]) -> Branch:
    lora_ce, e2e_ce = lora.curve[-1].student_ce, e2e.curve[-1].student_ce
    ce = max(lora_ce, e2e_ce)
    sae_costs = {cost: _saved_at(sae, lora.config.init_at, cost) for cost in COSTS}
    return Branch(
        at=lora.config.init_at,
        settings=settings,
        seed=lora.config.train.seed,
        ce=ce,
        lora_ce=lora_ce,
        e2e_ce=e2e_ce,
        lora={cost: sae_costs[cost] + _cost_of(lora, ce, cost) for cost in COSTS},
        sae=sae_costs,
        e2e={cost: _cost_of(e2e, ce, cost) for cost in COSTS},
    )


def _cost_of(run: _Run, ce: float, cost: str) -> float:
    """Cost of a run's training until its student first reaches a cross-entropy."""
    reached = first_reached(run.curve, "student_ce", ce, cost)
    assert reached is not None  # the last point of the curve is at or below `ce`
    return reached


def _saved_at(run: _Run, share: float, cost: str) -> float:
    """Cost of an SAE's training after a share of its tokens."""
    return value_at(run.curve, "tokens", share * run.curve[-1].tokens, cost)


def table(branches: Sequence[Branch]) -> Table:
    """A row for each share of the SAE's training: means over seeds, with 95% intervals.

    `LoRA alone` is the factor of time that LoRA saves if the SAE already exists.
    """
    settings = list(branches[0].settings)
    columns = "SAE trained to", "LoRA ends at", "e2e ends at", "SAE and LoRA", "e2e", "times sooner"
    rows = right_aligned(
        "training to the same cross-entropy",
        [*settings, *columns, "times fewer FLOPs", "LoRA alone", "seeds"],
    )
    seconds, flops = COSTS
    groups: dict[tuple[object, ...], list[Branch]] = {}
    for branch in branches:
        groups.setdefault((branch.at, *branch.settings.values()), []).append(branch)
    for seeds in groups.values():
        rows.add_row(
            *seeds[0].settings.values(),
            f"{seeds[0].at:.0%}",
            in_words([seed.lora_ce for seed in seeds], ".3f"),
            in_words([seed.e2e_ce for seed in seeds], ".3f"),
            f"{in_words([seed.lora[seconds] for seed in seeds], '.0f')} s",
            f"{in_words([seed.e2e[seconds] for seed in seeds], '.0f')} s",
            in_words([seed.e2e[seconds] / seed.lora[seconds] for seed in seeds], ".1f"),
            in_words([seed.e2e[flops] / seed.lora[flops] for seed in seeds], ".1f"),
            in_words([_sooner_alone(seed, seconds) for seed in seeds], ".1f"),
            str(len(seeds)),
        )
    return in_whole_words(rows)


def _sooner_alone(branch: Branch, cost: str) -> float:
    """Cost of end-to-end training divided by the cost of LoRA without the SAE's training."""
    alone = branch.lora[cost] - branch.sae[cost]
    return speedup(branch.e2e[cost], alone)


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """Cross-entropy of the first seed over seconds and FLOPs: SAE, LoRA branches from it, and e2e."""
    runs = [_Run(folder) for folder in folders if folder.is_finished]
    seed = min(run.config.train.seed for run in runs)
    runs = [run for run in runs if run.config.train.seed == seed]
    lines = [
        *(("reconstruction", COLOURS[6], run) for run in _of(runs, Method.sae)),
        *(("end to end", COLOURS[5], run) for run in _of(runs, Method.e2e)),
        *(("LoRA", COLOURS[0], run) for run in _of(runs, Method.lora)),
    ]
    figure = make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.05)
    axes = ("seconds of training", ".3~g"), ("training FLOPs", ".2~s")
    for column, (cost, (title, tickformat)) in enumerate(zip(COSTS, axes, strict=True), 1):
        amounts: list[float] = []
        named: set[str] = set()
        for name, colour, run in lines:
            start = _saved_at(run.previous(), run.config.init_at, cost) if name == "LoRA" else 0.0
            # The first point of a curve is at zero, which a logarithmic axis cannot show.
            costs = [start + (getattr(point, cost) or 0.0) or None for point in run.curve]
            amounts += [amount for amount in costs if amount]
            figure.add_scatter(
                x=costs,
                y=[point.student_ce for point in run.curve],
                mode="lines",
                line={"color": colour, "width": 2},
                name=name,
                legendgroup=name,
                showlegend=column == 1 and name not in named,
                row=1,
                col=column,
            )
            named.add(name)
        figure.update_xaxes(title=title, row=1, col=column, **logarithmic(amounts, tickformat))
    base = runs[0].curve[-1].base_ce
    figure.add_hline(base, line={"color": "#999999", "dash": "dot", "width": 1})
    figure.update_yaxes(title="held-out CE (nats per token)", row=1, col=1)
    ends = [run.curve[-1].student_ce for run in runs]
    figure.update_yaxes(range=[base - 0.1, max(ends) + 1.2])
    return {"time_to_ce": finished(figure)}
