"""SAEs that serve groups of blocks, against other ways of sharing blocks out: a table and figures."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.table import Table

from sae_lora.common.errors import UserError
from sae_lora.comparisons import layer_group_figures, saes
from sae_lora.config.enums import Method
from sae_lora.config.serialize import load
from sae_lora.records.folder import RunFolder
from sae_lora.report.tables import in_whole_words
from sae_lora.saes.layer_groups import linkage


@dataclass(frozen=True)
class Shared:
    """SAEs that share the blocks of a model, and LoRA around all of them. CE in nats per token."""

    groups: list[list[int]]
    evenly: bool
    """Whether they are neighbours in equal numbers."""
    amad: float
    """Mean over groups of the widest angular distance in each."""
    sae_flops_saved: float
    """Share of the SAEs' own training FLOPs over one SAE for each block."""
    fvu_alone: float
    """Mean over blocks, each SAE alone in the plain model."""
    ce_alone: float
    """CE over the plain model's, likewise."""
    gap: float
    """CE gap with all of them in place."""
    gaps_with_lora: list[float]
    """The same after LoRA, for each run of it around them; there may be none."""


def compare(folders: Sequence[RunFolder]) -> list[Shared]:
    """What each way of sharing blocks out comes to, by number of groups.

    Args:
        folders: Runs of method=sae with `layer.n_groups` or `layer.amad_max`, and of LoRA around them.

    Raises:
        UserError: Where there is none of the first.
    """
    finished = [folder for folder in folders if folder.is_finished]
    configs = {folder.path: load(folder.config.read_text()) for folder in finished}
    around: dict[str, list[RunFolder]] = defaultdict(list)
    for folder in finished:
        config = configs[folder.path]
        if config.init is not None and config.method.kind is Method.lora:
            around[Path(config.init).name].append(folder)  # a name it keeps wherever the sweep is moved
    found = []
    for folder in finished:
        if not _is_measured(folder):
            continue
        how, summary = json.loads(folder.groups.read_text()), folder.read_summary()
        found.append(
            Shared(
                groups=how["groups"],
                evenly=how["evenly"],
                amad=how["amad"],
                sae_flops_saved=how["sae_flops_saved"],
                fvu_alone=statistics.mean(sae["alone_fvu"] for sae in summary["sae"]),
                ce_alone=statistics.mean(_costs(summary)),
                gap=summary["ce_gap"],
                gaps_with_lora=[lora.read_summary()["ce_gap"] for lora in around[folder.path.name]],
            )
        )
    if not found:
        raise UserError(
            "no finished run here has SAEs that serve groups of blocks (layer=groups) and has measured "
            "what each contributes (train.eval_each_sae)"
        )
    return sorted(found, key=lambda one: (len(one.groups), one.evenly))


def _is_measured(folder: RunFolder) -> bool:
    """Whether SAEs serve groups in it, and what each contributes was measured."""
    return folder.groups.exists() and all("alone_ce" in sae for sae in folder.read_summary()["sae"])


def _costs(summary: dict[str, Any]) -> list[float]:
    return [sae["alone_ce"] - summary["base_ce"] for sae in summary["sae"]]


def table(found: Sequence[Shared]) -> Table:
    """A row for each; of several LoRA runs the mean."""
    made = Table(title="SAEs that share blocks", title_justify="left")
    blocks = [" ".join(_in_words(group) for group in one.groups) for one in found]
    made.add_column("groups", justify="right")
    made.add_column("blocks", overflow="fold")
    for name in (
        *("AMAD", "SAE FLOPs saved", "FVU alone", "CE alone"),
        *("gap with all", "with LoRA"),
    ):
        made.add_column(name, justify="right")
    for one, shown in zip(found, blocks, strict=True):
        how = " (evenly)" if one.evenly else ""
        made.add_row(
            f"{len(one.groups)}{how}",
            shown,
            f"{one.amad:.3f}",
            f"{one.sae_flops_saved:.0%}",
            f"{one.fvu_alone:.3f}",
            f"{one.ce_alone:+.3f}",
            f"{one.gap:+.3f}",
            f"{statistics.mean(one.gaps_with_lora):+.3f}" if one.gaps_with_lora else "–",
        )
    return in_whole_words(made, but="blocks")


def _in_words(group: Sequence[int]) -> str:
    """`2–4` for neighbours, `2,4` for others."""
    if len(group) > 1 and list(group) == list(range(group[0], group[-1] + 1)):
        return f"{group[0]}–{group[-1]}"
    return ",".join(map(str, group))


def _counted(groups: int) -> str:
    return "1 group" if groups == 1 else f"{groups} groups"


def figures(folders: Sequence[RunFolder], n_groups: int | None = None) -> dict[str, go.Figure]:
    """Distances, tree, AMAD and the blocks' FVU and CE, by name.

    Args:
        folders: As for `compare`.
        n_groups: Groups that are marked; by default the fewest that are there, but more than one.
    """
    grouped = [folder for folder in folders if folder.is_finished and _is_measured(folder)]
    ways = {folder.path: json.loads(folder.groups.read_text()) for folder in grouped}
    # Those of equal size are what distances are compared with, and drawn where there are no others.
    close = [folder for folder in grouped if not ways[folder.path]["evenly"]] or grouped
    by_count = sorted(close, key=lambda folder: len(ways[folder.path]["groups"]))
    several = [one for one in by_count if len(ways[one.path]["groups"]) > 1] or by_count
    wanted = n_groups or len(ways[several[0].path]["groups"])
    marked = next(ways[one.path] for one in by_count if len(ways[one.path]["groups"]) == wanted)
    names = [_counted(len(ways[folder.path]["groups"])) for folder in by_count]
    return {
        "distances": layer_group_figures.distance_map(marked["distances"], marked["groups"]),
        "tree": layer_group_figures.tree(linkage(marked["distances"]), wanted),
        "amad": layer_group_figures.amad_by_groups(marked["amad_by_count"], wanted),
        "blocks": saes.by_block([saes.compare([folder])[0] for folder in by_count], names),
    }
