"""What each of several SAEs in a model costs, block by block: a table and a figure."""

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.table import Table

from sae_lora.errors import UserError
from sae_lora.figures import COLOURS, SYMBOLS, finished
from sae_lora.records import RunFolder
from sae_lora.tables import finished_summaries, percent


def table(folders: Sequence[RunFolder]) -> Table:
    """A row for each SAE of each run; CE in nats per token, over the plain model and over the student.

    Args:
        folders: Runs; those that are not finished, or have one SAE, are left out.

    Raises:
        UserError: Where none is left.
    """
    made = Table(title="each SAE of the runs with several", title_justify="left")
    summaries = _with_several(folders)
    longest = max(len(sae["hookpoint"]) for summary in summaries for sae in summary["sae"])
    for name in ("SAEs", "gap before", "gap after", "closed"):
        made.add_column(name, justify="right")
    made.add_column("hook point", no_wrap=True, min_width=longest)
    for name in ("FVU alone", "FVU with all", "CE alone", "CE without it"):
        made.add_column(name, justify="right")
    for summary in summaries:
        first = [
            str(len(summary["sae"])),
            f"{summary['initial_gap']:+.3f}",
            f"{summary['ce_gap']:+.3f}",
            percent(summary["gap_closed"]),
        ]
        for number, sae in enumerate(summary["sae"]):
            made.add_row(
                *(first if number == 0 else [""] * len(first)),
                sae["hookpoint"],
                f"{sae['alone_fvu']:.3f}",
                f"{sae['fvu']:.3f}",
                f"{sae['alone_ce'] - summary['base_ce']:+.3f}",
                f"{sae['left_out_ce'] - summary['student_ce']:+.3f}",
                end_section=number == len(summary["sae"]) - 1,
            )
    return made


def figure(summaries: Sequence[dict[str, Any]], names: Sequence[str]) -> go.Figure:
    """FVU and CE of each SAE alone in the plain model, over its block.

    Args:
        summaries: Of runs with several SAEs.
        names: What the legend calls each.
    """
    drawn = make_subplots(1, 2, horizontal_spacing=0.12)
    for number, (summary, name) in enumerate(zip(summaries, names, strict=True)):
        blocks = [sae["block"] for sae in summary["sae"]]
        colour = COLOURS[number % len(COLOURS)]
        costs = [sae["alone_ce"] - summary["base_ce"] for sae in summary["sae"]]
        for column, values in ((1, [sae["alone_fvu"] for sae in summary["sae"]]), (2, costs)):
            drawn.add_scatter(
                x=blocks,
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


def _with_several(folders: Sequence[RunFolder]) -> list[dict[str, Any]]:
    found = [
        summary
        for _, summary in finished_summaries(folders)
        if all("alone_ce" in sae for sae in summary["sae"])
    ]
    if not found:
        raise UserError("no finished run here has several SAEs whose contributions were measured")
    return found
