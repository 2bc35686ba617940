"""The content of a finished run's `summary.json`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sae_lora.config.identity import ADAPTING
from sae_lora.config.schema import Config, LoRAConfig
from sae_lora.records.schema import CurvePoint, Summary
from sae_lora.saes.loading import LoadedSAE
from sae_lora.saes.metadata import Notices, differences, differs_in_l0
from sae_lora.splice.positions import Special
from sae_lora.train.evaluator import Contribution


def summarise(
    config: Config,
    points: Sequence[CurvePoint],
    saes: Sequence[LoadedSAE],
    contributions: Mapping[str, Contribution],
    data: Mapping[str, Any],
    special: Sequence[Special],
    noticed: Sequence[str],
    left_out: Mapping[str, int],
    **remaining: Any,
) -> Summary:
    """Build the summary of a run.

    Args:
        config: The run's config.
        points: All points of its curve.
        saes: Its SAEs, as they were before training.
        contributions: Contribution of each SAE by hookpoint, if there are several.
        data: Description of the text.
        special: The rule for special positions of each SAE.
        noticed: Notes about the model, and positions that hold most of the variance of an SAE's input.
        left_out: Weights in the adapted blocks that stay frozen: paths and numbers.
        remaining: The fields of the summary that do not follow from the other arguments.
    """
    first, last = points[0], points[-1]
    closed = [point.gap_closed for point in points if point.gap_closed is not None]
    shared_names = {field.name for field in fields(CurvePoint)} & {
        field.name for field in fields(Summary)
    }
    measured = {name: contribution._asdict() for name, contribution in contributions.items()}
    return Summary(
        **{name: getattr(last, name) for name in shared_names},
        initial_gap=last.spliced_ce - last.base_ce,
        initial_kl=first.kl,
        best_gap_closed=max(closed, default=None),
        train_tokens=last.tokens,
        train_steps=last.step,
        sae=[
            {
                **sae.description,
                "kept": {**rule._asdict(), "ids": list(rule.ids)},
                **last.per_sae[hookpoint],
                **measured.get(hookpoint, {}),
            }
            for sae, rule in zip(saes, special, strict=True)
            for hookpoint in [sae.description["hookpoint"]]
        ],
        data=dict(data),
        notes=[*notes(config, saes, data["bos"], first), *noticed],
        lora=_describe_lora(config.lora, left_out) if config.method.kind in ADAPTING else {},
        method={"kind": config.method.kind.name, "rank": config.method.rank, "init": config.init},
        seed=config.train.seed,
        **remaining,
    )


def notes(
    config: Config, saes: Sequence[LoadedSAE], begins_with_bos: bool | None, before: CurvePoint
) -> list[str]:
    """Differences between a run and what the metadata of its SAEs states, also in their L0.

    Args:
        config, saes: The run, and its SAEs.
        begins_with_bos: True if its sequences begin with BOS; `None` if it is not known.
        before: Its evaluation before training.
    """
    noticed = Notices()
    for sae in saes:
        noticed.add(sae.description["block"], differences(sae.stated, config, begins_with_bos))
    return [*noticed.lines, *l0_notes(saes, before)]


def l0_notes(saes: Sequence[LoadedSAE], before: CurvePoint) -> list[str]:
    """The SAEs whose L0 is far from the stated one, before training; a line for each stated L0."""
    noticed = Notices()
    for sae in saes:
        if sae.stated:  # a new SAE states no L0: it is asked for one
            measured = before.per_sae[sae.description["hookpoint"]]["l0"]
            text = differs_in_l0(sae.description["stated_l0"], measured)
            noticed.add(sae.description["block"], [] if text is None else [text])
    return noticed.lines


def _describe_lora(config: LoRAConfig, left_out: Mapping[str, int]) -> dict[str, Any]:
    scale = config.alpha / (math.sqrt(config.rank) if config.rank_stabilised else config.rank)
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "scale": scale,
        "init": config.init.name,
        "dropout": config.dropout,
        "targets": config.targets,
        "blocks": config.blocks,
        "left_out": dict(left_out),
    }
