"""The content of a finished run's `summary.json`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from sae_lora.config.identity import ADAPTING
from sae_lora.config.schema import Config, LoRAConfig
from sae_lora.records.schema import CurvePoint, Summary
from sae_lora.train.evaluator import Contribution


def summarise(
    config: Config,
    points: Sequence[CurvePoint],
    saes: Sequence[Mapping[str, Any]],
    contributions: Mapping[str, Contribution],
    **remaining: Any,
) -> Summary:
    """Build the summary of a run.

    Args:
        config: The run's config.
        points: All points of its curve.
        saes: Descriptions of its SAEs.
        contributions: Contribution of each SAE by hookpoint, if there are several.
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
            {**sae, **last.per_sae[hookpoint], **measured.get(hookpoint, {})}
            for sae in saes
            for hookpoint in [sae["hookpoint"]]
        ],
        lora=_describe_lora(config.lora) if config.method.kind in ADAPTING else {},
        method={"kind": config.method.kind.name, "rank": config.method.rank, "init": config.init},
        seed=config.train.seed,
        **remaining,
    )


def _describe_lora(config: LoRAConfig) -> dict[str, Any]:
    scale = config.alpha / (math.sqrt(config.rank) if config.rank_stabilised else config.rank)
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "scale": scale,
        "init": config.init.name,
        "dropout": config.dropout,
        "targets": config.targets,
        "blocks": config.blocks,
    }
