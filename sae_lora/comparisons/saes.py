"""Cost of several SAEs in a model, each alone and all together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Column, Table

from sae_lora.common.console import percent
from sae_lora.common.errors import UserError
from sae_lora.common.plots import COLOURS, SYMBOLS, finished
from sae_lora.records.factors import FinishedRun, finished_runs
from sae_lora.records.folder import RunFolder
from sae_lora.report.tables import explained, right_aligned


@dataclass(frozen=True)
class Cost:
    """Cost of one of several SAEs, in nats per token."""

    hookpoint: str
    block: int
    alone_fvu: float
    """FVU of the SAE alone in the plain model."""
    fvu: float
    """FVU with all SAEs in place, after training."""
    alone: float
    """CE with the SAE alone in the plain model, minus CE of the plain model."""
    without: float
    """CE of the student without this SAE minus CE with it: negative if the SAE increases CE."""


@dataclass(frozen=True)
class Several:
    """Results of a run with several SAEs, in nats per token."""

    run: str
    initial_gap: float
    """CE gap with all SAEs in place, before training."""
    ce_gap: float
    """CE gap after training."""
    gap_closed: float | None
    saes: list[Cost]


def compare(folders: Sequence[RunFolder]) -> list[Several]:
    """The finished runs with several SAEs that were also evaluated one by one.

    Runs are ordered by the factors in which they differ.

    Raises:
        UserError: If there are none.
    """
    return [_several(run.summary) for run in evaluated_one_by_one(folders)]


def evaluated_one_by_one(folders: Sequence[RunFolder]) -> list[FinishedRun]:
    """The finished runs with several SAEs that were also evaluated one by one, in their order.

    Raises:
        UserError: If there are none.
    """
    runs = [
        run for run in finished_runs(folders) if all("alone_ce" in sae for sae in run.summary["sae"])
    ]
    if not runs:
        raise UserError(
            "no finished run has several SAEs that were also evaluated one by one (train.eval_each_sae)"
        )
    return runs


def _several(summary: dict[str, Any]) -> Several:
    return Several(
        run=summary["name"],
        initial_gap=summary["initial_gap"],
        ce_gap=summary["ce_gap"],
        gap_closed=summary["gap_closed"],
        saes=[
            Cost(
                hookpoint=sae["hookpoint"],
                block=sae["block"],
                alone_fvu=sae["alone_fvu"],
                fvu=sae["fvu"],
                alone=sae["alone_ce"] - summary["base_ce"],
                without=sae["left_out_ce"] - summary["student_ce"],
            )
            for sae in summary["sae"]
        ],
    )


def table(runs: Sequence[Several]) -> Table:
    """A row for each SAE of each run."""
    longest = max(len(sae.hookpoint) for run in runs for sae in run.saes)
    gaps = "SAEs", "gap before", "gap after", "closed"
    hookpoint = Column("hook point", no_wrap=True, min_width=longest)
    columns = *gaps, hookpoint, "FVU alone", "FVU with all", "CE alone", "CE without it"
    rows = right_aligned("SAEs of runs with several SAEs", columns)
    for run in runs:
        first = [
            str(len(run.saes)),
            f"{run.initial_gap:+.3f}",
            f"{run.ce_gap:+.3f}",
            percent(run.gap_closed),
        ]
        for number, sae in enumerate(run.saes):
            rows.add_row(
                *(first if number == 0 else [""] * len(first)),
                sae.hookpoint,
                f"{sae.alone_fvu:.3f}",
                f"{sae.fvu:.3f}",
                f"{sae.alone:+.3f}",
                f"{sae.without:+.3f}",
                end_section=number == len(run.saes) - 1,
            )
    return explained(rows, [run.gap_closed for run in runs])


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """The gap of all SAEs together, before and after training, beside the sum of each SAE's CE alone."""
    by_number = sorted(compare(folders), key=lambda run: len(run.saes))
    blocks = ["+".join(str(sae.block) for sae in run.saes) for run in by_number]
    figure = go.Figure()
    for name, colour, values in (
        ("sum of each SAE alone", "#bbbbbb", [sum(sae.alone for sae in run.saes) for run in by_number]),
        ("all SAEs, before training", COLOURS[1], [run.initial_gap for run in by_number]),
        ("all SAEs, after training", COLOURS[0], [run.ce_gap for run in by_number]),
    ):
        figure.add_bar(x=blocks, y=values, name=name, marker={"color": colour})
    figure.update_layout(
        xaxis={"title": "blocks with an SAE", "type": "category"},
        yaxis={"title": "CE gap (nats per token)"},
    )
    return {"multi_sae": finished(figure)}


def by_block(runs: Sequence[Several], names: Sequence[str]) -> go.Figure:
    """FVU and CE of each SAE alone in the plain model, over its block, with a named line per run."""
    figure = make_subplots(1, 2, horizontal_spacing=0.12)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        fvus, costs = [sae.alone_fvu for sae in run.saes], [sae.alone for sae in run.saes]
        for column, values in ((1, fvus), (2, costs)):
            figure.add_scatter(
                x=[sae.block for sae in run.saes],
                y=values,
                mode="lines+markers",
                line={"color": colour, "width": 2},
                marker={"symbol": SYMBOLS[number % len(SYMBOLS)], "size": 7},
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                row=1,
                col=column,
            )
    figure.update_xaxes(title="block", dtick=1)
    figure.update_yaxes(title="FVU of the SAE alone", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title="CE gap, SAE alone (nats per token)", rangemode="tozero", row=1, col=2)
    return finished(figure)
