"""The headline numbers of each suite, for tables, the report and W&B. Imports no torch."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from statistics import mean, median
from typing import Any

from sae_lora.config.enums import Suite
from sae_lora.evaluation import suite_records
from sae_lora.records.folder import RunFolder

Results = Mapping[str, Any]
"""Results of a suite, as in its record."""
SHOWN_FIRST = {
    "core": "ce_loss_score",
    "sparse_probing": "sae_top_1_test_accuracy",
    "scr": "scr_metric_threshold_20",
    "tpp": "tpp_threshold_20_total_metric",
    "absorption": "mean_absorption_fraction_score",
}
"""The metric that SAEBench itself shows first, by benchmark."""


def headlines(folder: RunFolder) -> dict[str, float]:
    """Headline numbers of a run by `suite/name`, from its suites' records."""
    numbers = {}
    for suite, numbers_of in _HEADLINES.items():
        if (record := suite_records.read(folder, suite)) is not None:
            for name, value in numbers_of(record.results).items():
                if value is not None:
                    numbers[f"{suite.name}/{name}"] = value
    return numbers


def first_metric(task: Mapping[str, Any]) -> str:
    """The headline metric of a task: the first of `TaskScores.higher_is_better`."""
    return next(iter(task["higher_is_better"]))


def _core(results: Results) -> dict[str, float | None]:
    saes = [reconstruction["after"] for reconstruction in results["saes"].values()]
    return {
        "harm": _value(results["harm"]),
        "CE recovered": _value(results["recovered"]["zero"]["student"]),
        "reverse KL": _value(results["distance"]["student"]["reverse_kl"]),
        "tokens worse": results["loss_change"].get("student over spliced", {}).get("worse"),
        "cosine": mean(sae["cosine"] for sae in saes),
        "dead latents": mean(sae["dead"] for sae in saes),
    }


def _mechanism(results: Results) -> dict[str, float | None]:
    shortened = results["shortened"] or {}
    return {
        "L2 at the end": results["distance"]["student"]["l2"][-1]["value"],
        "L2 shortened": _value(shortened.get("l2")),
        "cosine shortened": _value(shortened.get("cosine")),
    }


def _lora(results: Results) -> dict[str, float | None]:
    matrices = results["matrices"]
    ranks, amplifications = (
        [matrix[key] for matrix in matrices if matrix[key] is not None]
        for key in ("effective_rank", "amplification")
    )
    return {
        "‖ΔW‖ / ‖W‖": mean(matrix["delta_norm"] / matrix["weight_norm"] for matrix in matrices),
        "effective rank": mean(ranks) if ranks else None,
        "amplification": median(amplifications) if amplifications else None,
    }


def _tasks(results: Results) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    for name, task in results["scores"].items():
        metric = first_metric(task)
        for cell, scores in task["cells"].items():
            if metric in scores:
                values[f"{name} {metric}, {cell}"] = scores[metric]["value"]
    return values


def _steering(results: Results) -> dict[str, float | None]:
    return {cell: _value(effect["difference"]) for cell, effect in results["cells"].items()}


def _saebench(results: Results) -> dict[str, float | None]:
    """Means over SAEs."""
    values: dict[str, list[float]] = defaultdict(list)
    for benchmarks in results["scores"].values():
        for benchmark, cells in benchmarks.items():
            for cell, metrics in cells.items():
                if (value := metrics.get(SHOWN_FIRST[benchmark])) is not None:
                    values[f"{benchmark}, {cell}"].append(value)
    return {name: mean(of_saes) for name, of_saes in values.items()}


_HEADLINES: dict[Suite, Callable[[Results], dict[str, float | None]]] = {
    Suite.core: _core,
    Suite.mechanism: _mechanism,
    Suite.lora: _lora,
    Suite.tasks: _tasks,
    Suite.steering: _steering,
    Suite.saebench: _saebench,
}


def _value(interval: Mapping[str, float | None] | None) -> float | None:
    return None if interval is None else interval["value"]
