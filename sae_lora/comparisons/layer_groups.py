"""Comparison of SAEs that are shared by groups of blocks: a table and figures."""

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.table import Column, Table

from sae_lora.common.errors import UserError
from sae_lora.comparisons import layer_group_figures, saes
from sae_lora.config.enums import Method
from sae_lora.config.serialize import load
from sae_lora.records.factors import FinishedRun, finished_runs
from sae_lora.records.folder import RunFolder
from sae_lora.report.repeats import check_repeats, in_words
from sae_lora.report.tables import in_whole_words, right_aligned
from sae_lora.saes.layer_groups import group_blocks, linkage


@dataclass(frozen=True)
class Shared:
    """SAEs that share the blocks of a model, and LoRA around all of them. CE in nats per token."""

    groups: list[list[int]]
    evenly: bool
    """True if the groups are neighbouring blocks in equal numbers."""
    amad: float
    """Mean over groups of the largest angular distance in each."""
    sae_flops_saved: float
    """Share of the SAEs' training FLOPs that is saved, compared to one SAE for each block."""
    fvu_alone: float
    """Mean FVU over blocks, each SAE alone in the plain model."""
    ce_alone: float
    """Mean CE over blocks, each SAE alone in the plain model, minus the plain model's CE."""
    gap: float
    """CE gap with all SAEs in place."""
    gaps_with_lora: list[float]
    """CE gap after each LoRA run around these SAEs; may be empty."""


def compare(folders: Sequence[RunFolder]) -> list[Shared]:
    """Results of each way of sharing blocks, ordered by number of groups.

    Args:
        folders: Runs of method=sae with `layer.n_groups` or `layer.amad_max`, and of LoRA around them.

    Raises:
        UserError: If there is no finished run of method=sae with groups.
    """
    with_lora: dict[str, list[FinishedRun]] = defaultdict(list)
    for run in finished_runs(folders):
        config = load(run.folder.config.read_text())
        if config.init is not None and config.method.kind is Method.lora:
            name = Path(config.init).name  # stays the same when the sweep is moved
            with_lora[name].append(run)
    for name, runs in with_lora.items():
        check_repeats(runs, f"runs of LoRA around {name}")
    rows = []
    for folder, sharing in _measured(folders):
        summary = folder.read_summary()
        saes_alone = summary["sae"]
        rows.append(
            Shared(
                groups=sharing["groups"],
                evenly=sharing["evenly"],
                amad=sharing["amad"],
                sae_flops_saved=sharing["sae_flops_saved"],
                fvu_alone=statistics.mean(sae["alone_fvu"] for sae in saes_alone),
                ce_alone=statistics.mean(sae["alone_ce"] - summary["base_ce"] for sae in saes_alone),
                gap=summary["ce_gap"],
                gaps_with_lora=[run.summary["ce_gap"] for run in with_lora[folder.path.name]],
            )
        )
    if not rows:
        raise UserError(
            "no finished run has SAEs for groups of blocks (layer=groups) that were also evaluated one "
            "by one (train.eval_each_sae)"
        )
    return sorted(rows, key=lambda row: (len(row.groups), row.evenly))


def _measured(folders: Sequence[RunFolder]) -> list[tuple[RunFolder, dict[str, Any]]]:
    """Finished runs and the content of their `groups.json`, if each SAE was also evaluated alone."""
    return [
        (folder, json.loads(folder.groups.read_text()))
        for folder in folders
        if folder.is_finished
        and folder.groups.exists()
        and all("alone_ce" in sae for sae in folder.read_summary()["sae"])
    ]


def table(rows: Sequence[Shared]) -> Table:
    """A row for each way of sharing blocks; the mean over the seeds of LoRA, with a 95% interval."""
    numbers = "AMAD", "SAE FLOPs saved", "FVU alone", "CE alone", "gap with all", "with LoRA"
    columns = "groups", Column("blocks", overflow="fold"), *numbers
    lines = right_aligned("SAEs shared by groups of blocks", columns)
    for row in rows:
        lines.add_row(
            f"{len(row.groups)}{' (evenly)' if row.evenly else ''}",
            " ".join(map(_in_words, row.groups)),
            f"{row.amad:.3f}",
            f"{row.sae_flops_saved:.0%}",
            f"{row.fvu_alone:.3f}",
            f"{row.ce_alone:+.3f}",
            f"{row.gap:+.3f}",
            in_words(row.gaps_with_lora, "+.3f") if row.gaps_with_lora else "–",
        )
    return in_whole_words(lines, breakable="blocks")


def _in_words(group: Sequence[int]) -> str:
    """`2–4` for neighbours, `2,4` for others."""
    if len(group) > 1 and list(group) == list(range(group[0], group[-1] + 1)):
        return f"{group[0]}–{group[-1]}"
    return ",".join(map(str, group))


def figures(folders: Sequence[RunFolder]) -> dict[str, go.Figure]:
    """Figures of distances, tree, AMAD, and FVU and CE of each block, by file name.

    Distances and tree show the groups of the run with the fewest groups, but more than one if possible.
    """
    runs = _measured(folders)
    # Groups of equal size are a baseline. They are drawn only if there are no others.
    runs = [(folder, sharing) for folder, sharing in runs if not sharing["evenly"]] or runs
    runs.sort(key=lambda run: len(run[1]["groups"]))
    _, marked = next((run for run in runs if len(run[1]["groups"]) > 1), runs[0])
    n_groups = len(marked["groups"])
    by_distance, _ = group_blocks(marked["distances"], n_groups=n_groups)
    names = [layer_group_figures.count(len(sharing["groups"])) for _, sharing in runs]
    blocks = [saes.compare([folder])[0] for folder, _ in runs]
    return {
        "distances": layer_group_figures.distance_map(marked["distances"], marked["groups"]),
        "tree": layer_group_figures.tree(linkage(marked["distances"]), by_distance),
        "amad": layer_group_figures.amad_by_groups(marked["amad_by_count"], n_groups),
        "blocks": saes.by_block(blocks, names),
    }
