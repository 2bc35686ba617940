"""The few numbers of each suite that tables, the report and W&B show. Imports no torch."""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

from sae_lora.config.enums import Suite
from sae_lora.evaluation import suite_records
from sae_lora.records.folder import RunFolder

Results = Mapping[str, Any]
"""Of a suite, as its record holds them."""


def headlines(folder: RunFolder) -> dict[str, float]:
    """What there is of a run, by `suite/name`.

    Args:
        folder: The run; of one that was not evaluated there is nothing.
    """
    found = {}
    for suite, of in _OF.items():
        if (there := suite_records.read(folder, suite)) is not None:
            values = of(there.results)
            found |= {f"{suite.name}/{name}": one for name, one in values.items() if one is not None}
    return found


def first_metric(task: Mapping[str, Any]) -> str:
    """The metric of a task that stands for it: the first that the task names.

    Args:
        task: `TaskScores`, as its record holds them.
    """
    return next(iter(task["higher_is_better"]))


def _core(results: Results) -> dict[str, float | None]:
    after = [read["after"] for read in results["saes"].values()]
    return {
        "harm": _value(results["harm"]),
        "CE recovered": _value(results["recovered"]["zero"]["student"]),
        "reverse KL": _value(results["distance"]["student"]["reverse_kl"]),
        "tokens worse": results["loss_change"].get("student over spliced", {}).get("worse"),
        "cosine": statistics.mean(read["cosine"] for read in after),
        "dead latents": statistics.mean(read["dead"] for read in after),
    }


def _mechanism(results: Results) -> dict[str, float | None]:
    shortened = results["shortened"]
    return {
        "L2 at the end": results["distance"]["student"]["l2"][-1]["value"],
        "L2 shortened": shortened and _value(shortened["l2"]),
        "cosine shortened": shortened and _value(shortened["cosine"]),
    }


def _lora(results: Results) -> dict[str, float | None]:
    matrices = results["matrices"]
    ranks = [one["effective_rank"] for one in matrices if one["effective_rank"] is not None]
    amplified = [one["amplification"] for one in matrices if one["amplification"] is not None]
    return {
        "‖ΔW‖ / ‖W‖": statistics.mean(one["delta_norm"] / one["weight_norm"] for one in matrices),
        "effective rank": statistics.mean(ranks) if ranks else None,
        "amplification": statistics.median(amplified) if amplified else None,
    }


def _tasks(results: Results) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, task in results["scores"].items():
        metric = first_metric(task)
        for cell, scores in task["cells"].items():
            found[f"{name} {metric}, {cell}"] = scores[metric]["value"] if metric in scores else None
    return found


def _steering(results: Results) -> dict[str, float | None]:
    return {cell: _value(effect["difference"]) for cell, effect in results["cells"].items()}


def _saebench(results: Results) -> dict[str, float | None]:
    """Of several SAEs the mean."""
    found: dict[str, list[float]] = {}
    for benchmarks in results["scores"].values():
        for benchmark, cells in benchmarks.items():
            for cell, metrics in cells.items():
                if (value := metrics.get(SHOWN_FIRST[benchmark])) is not None:
                    found.setdefault(f"{benchmark}, {cell}", []).append(value)
    return {name: statistics.mean(values) for name, values in found.items()}


SHOWN_FIRST = {
    "core": "ce_loss_score",
    "sparse_probing": "sae_top_1_test_accuracy",
    "scr": "scr_metric_threshold_20",
    "tpp": "tpp_threshold_20_total_metric",
    "absorption": "mean_absorption_fraction_score",
}
"""Of each of SAEBench's benchmarks the metric that it shows first itself."""


_OF: dict[Suite, Callable[[Results], dict[str, float | None]]] = {
    Suite.core: _core,
    Suite.mechanism: _mechanism,
    Suite.lora: _lora,
    Suite.tasks: _tasks,
    Suite.steering: _steering,
    Suite.saebench: _saebench,
}


def _value(interval: Mapping[str, float | None] | None) -> float | None:
    return None if interval is None else interval["value"]
