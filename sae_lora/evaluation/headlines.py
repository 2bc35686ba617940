"""The headline numbers of each suite, for tables, the report and W&B. Imports no torch."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from sae_lora.config.enums import Suite
from sae_lora.evaluation import suite_records
from sae_lora.records.folder import RunFolder

Results = Mapping[str, Any]
"""Results of a suite, as in its record."""
Number = float | Mapping[str, float | None] | None
"""A headline number: alone, or with the bounds of its interval; `None` if undefined."""
MEANINGS = {
    "core/harm": ("nats/token", "rise of the plain model's CE by the adapters, without an SAE"),
    "core/CE recovered": ("share", "(CE with zeros at the SAE's place − student CE) / (… − base CE)"),
    "core/reverse KL": ("nats/token", "KL(student ‖ plain model)"),
    "core/tokens worse": ("share", "tokens whose loss is higher with the adapters than without"),
    "core/cosine": ("", "between the SAE's input and its output, after training"),
    "core/dead latents": ("share", "latents that no held-out token makes active"),
    "mechanism/L2 at the end": ("", "distance from the plain model's stream, after the last block"),
    "mechanism/L2 shortened": ("share", "by which the adapters reduce this distance"),
    "mechanism/cosine shortened": ("share", "by which they reduce 1 − cosine, after the last block"),
    "latents/turned": ("share", "latents whose effect on the logits turned by more than 30°"),
    "latents/contexts changed": ("share", "latents with most of their most active tokens changed"),
    "latents/cosine": ("", "of a latent's effects on the logits before and after, mean"),
    "latents/correlation": ("", "of a latent's activations before and after, token by token, mean"),
    "lora/‖ΔW‖ / ‖W‖": ("", "norm of an adapter's change of its matrix, mean over matrices"),
    "lora/effective rank": ("", "directions that a change uses: exp of its singular values' entropy"),
    "lora/amplification": ("", "‖ΔW‖ relative to W in the directions of ΔW, median over matrices"),
}
"""The unit and the meaning of headline numbers that every run has."""
OF_SUITE = {
    Suite.tasks: "the first metric of each task, for each model (base, spliced, student, adapted)",
    Suite.steering: (
        "for each model: change of the log-probability of texts that show a latent by its direction, "
        "minus that of other texts, in nats/token"
    ),
    Suite.saebench: "the metric that SAEBench shows first, in the plain and in the adapted model",
    Suite.circuits: (
        "scores of attribution graphs, before and after training, and the share of error nodes: the "
        "influence that transcoders do not reconstruct"
    ),
}
"""The meaning of the numbers of other suites."""
COVERAGE = {Suite.mechanism: 0.9}
"""Coverage of the intervals of a suite, if it is not 95%."""


@dataclass(frozen=True)
class Headline:
    """A headline number with its 95% interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        """Three digits, with the interval in brackets."""
        if self.low is None or self.high is None:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


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
    return {name: each.value for name, each in measured(folder).items()}


def measured(folder: RunFolder) -> dict[str, Headline]:
    """The headline numbers with their intervals, as `headlines`."""
    numbers = {}
    for suite, headlines_of in _HEADLINES.items():
        if (record := suite_records.read(folder, suite)) is not None:
            for name, number in headlines_of(record.results).items():
                if (headline := _headline(number)) is not None:
                    numbers[f"{suite.name}/{name}"] = headline
    return numbers


def _headline(number: Number) -> Headline | None:
    if number is None or isinstance(number, int | float):
        return None if number is None else Headline(number)
    value = number["value"]
    return None if value is None else Headline(value, number.get("low"), number.get("high"))


def first_metric(task: Mapping[str, Any]) -> str:
    """The headline metric of a task: the first of `TaskScores.higher_is_better`."""
    return next(iter(task["higher_is_better"]))


def _core(results: Results) -> dict[str, Number]:
    saes = [reconstruction["after"] for reconstruction in results["saes"].values()]
    return {
        "harm": results["harm"],
        "CE recovered": results["recovered"]["zero"]["student"],
        "reverse KL": results["distance"]["student"]["reverse_kl"],
        "tokens worse": results["loss_change"].get("student over spliced", {}).get("worse"),
        "cosine": mean(sae["cosine"] for sae in saes),
        "dead latents": mean(sae["dead"] for sae in saes),
    }


def _mechanism(results: Results) -> dict[str, Number]:
    shortened = results["shortened"] or {}
    return {
        "L2 at the end": results["distance"]["student"]["l2"][-1],
        "L2 shortened": shortened.get("l2"),
        "cosine shortened": shortened.get("cosine"),
    }


def _lora(results: Results) -> dict[str, Number]:
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


def _latents(results: Results) -> dict[str, Number]:
    """Numbers of the first SAE."""
    change = next(iter(results["saes"].values()))
    names = "turned", "contexts_changed", "cosine", "correlation"
    return {name.replace("_", " "): change[name] for name in names}


def _tasks(results: Results) -> dict[str, Number]:
    values: dict[str, Number] = {}
    for name, task in results["scores"].items():
        metric = first_metric(task)
        for cell, scores in task["cells"].items():
            if metric in scores:
                values[f"{name} {metric}, {cell}"] = _with_error(scores[metric])
    return values


def _steering(results: Results) -> dict[str, Number]:
    return {cell: effect["difference"] for cell, effect in results["cells"].items()}


def _saebench(results: Results) -> dict[str, Number]:
    """Means over SAEs."""
    values: dict[str, list[float]] = defaultdict(list)
    for benchmarks in results["scores"].values():
        for benchmark, cells in benchmarks.items():
            for cell, metrics in cells.items():
                if (value := metrics.get(SHOWN_FIRST[benchmark])) is not None:
                    values[f"{benchmark}, {cell}"].append(value)
    return {name: mean(of_saes) for name, of_saes in values.items()}


def _circuits(results: Results) -> dict[str, Number]:
    return {
        f"{name.replace('_', ' ')}, {cell}": number
        for cell, means in results["means"].items()
        for name, number in means.items()
    }


_HEADLINES: dict[Suite, Callable[[Results], dict[str, Number]]] = {
    Suite.core: _core,
    Suite.mechanism: _mechanism,
    Suite.lora: _lora,
    Suite.latents: _latents,
    Suite.tasks: _tasks,
    Suite.steering: _steering,
    Suite.saebench: _saebench,
    Suite.circuits: _circuits,
}


def _with_error(score: Mapping[str, Any]) -> Number:
    """A score of a task with the interval that its standard error gives."""
    value, error = score["value"], score.get("stderr")
    if value is None or error is None:
        return value
    return {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error}
