"""What each of several SAEs in a model costs, block by block, and all of them together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

from sae_lora.common.console import percent
from sae_lora.common.errors import UserError
from sae_lora.common.plots import COLOURS, SYMBOLS, finished
from sae_lora.records.factors import finished_runs
from sae_lora.records.folder import RunFolder


@dataclass(frozen=True)
class Cost:
    """What one of several SAEs costs, in nats per token."""

    hookpoint: str
    block: int
    alone_fvu: float
    """Alone in the plain model."""
    fvu: float
    """With all of them in place, and what was trained."""
    alone: float
    """CE over the plain model's, alone in it."""
    without: float
    """CE over the student's, all else as it is, without this SAE: below zero where it costs."""


@dataclass(frozen=True)
class Several:
    """What a run with several SAEs comes to, in nats per token."""

    run: str
    initial_gap: float
    """With all of them in place, before training."""
    ce_gap: float
    """After it."""
    gap_closed: float | None
    saes: list[Cost]

    @property
    def sum_alone(self) -> float:
        """What the gap before would be if costs added up."""
        return sum(sae.alone for sae in self.saes)


def compare(folders: Sequence[RunFolder]) -> list[Several]:
    """The runs with several SAEs whose contributions were measured, by what they differ in.

    Args:
        folders: Runs; others are left out.

    Raises:
        UserError: Where none is left.
    """
    found = [
        _several(run.summary)
        for run in finished_runs(folders)
        if all("alone_ce" in sae for sae in run.summary["sae"])
    ]
    if not found:
        raise UserError("no finished run here has several SAEs whose contributions were measured")
    return found


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


def table(found: Sequence[Several]) -> Table:
    """A row for each SAE of each run."""
    made = Table(title="each SAE of the runs with several", title_justify="left")
    longest = max(len(sae.hookpoint) for run in found for sae in run.saes)
    for name in ("SAEs", "gap before", "gap after", "closed"):
        made.add_column(name, justify="right")
    made.add_column("hook point", no_wrap=True, min_width=longest)
    for name in ("FVU alone", "FVU with all", "CE alone", "CE without it"):
        made.add_column(name, justify="right")
    for run in found:
        first = [
            str(len(run.saes)),
            f"{run.initial_gap:+.3f}",
            f"{run.ce_gap:+.3f}",
            percent(run.gap_closed),
        ]
        for number, sae in enumerate(run.saes):
            made.add_row(
                *(first if number == 0 else [""] * len(first)),
                sae.hookpoint,
                f"{sae.alone_fvu:.3f}",
                f"{sae.fvu:.3f}",
                f"{sae.alone:+.3f}",
                f"{sae.without:+.3f}",
                end_section=number == len(run.saes) - 1,
            )
    return made


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """The gap of all SAEs together, before and after, beside the sum of what each costs alone.

    Args:
        folders: As for `compare`.
    """
    by_number = sorted(compare(folders), key=lambda run: len(run.saes))
    blocks = ["+".join(str(sae.block) for sae in run.saes) for run in by_number]
    drawn = go.Figure()
    for name, colour, values in (
        ("sum of each alone", "#bbbbbb", [run.sum_alone for run in by_number]),
        ("all at once", COLOURS[1], [run.initial_gap for run in by_number]),
        ("after training", COLOURS[0], [run.ce_gap for run in by_number]),
    ):
        drawn.add_bar(x=blocks, y=values, name=name, marker={"color": colour})
    drawn.update_layout(
        xaxis={"title": "blocks with an SAE", "type": "category"},
        yaxis={"title": "CE gap (nats per token)"},
    )
    return {"multi_sae": finished(drawn)}


def by_block(runs: Sequence[Several], names: Sequence[str]) -> go.Figure:
    """FVU and CE of each SAE alone in the plain model, over its block.

    Args:
        runs: With several SAEs.
        names: What the legend calls each.
    """
    drawn = make_subplots(1, 2, horizontal_spacing=0.12)
    for number, (run, name) in enumerate(zip(runs, names, strict=True)):
        colour = COLOURS[number % len(COLOURS)]
        fvus, costs = [sae.alone_fvu for sae in run.saes], [sae.alone for sae in run.saes]
        for column, values in ((1, fvus), (2, costs)):
            drawn.add_scatter(
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
    drawn.update_xaxes(title="block", dtick=1)
    drawn.update_yaxes(title="FVU of the SAE alone", rangemode="tozero", row=1, col=1)
    drawn.update_yaxes(title="CE of it alone (nats per token)", rangemode="tozero", row=1, col=2)
    return finished(drawn)
