"""Figures of suites' results: each model's value with its error bar, for each run."""

from typing import Any

import plotly.graph_objects as go
import pytest

from sae_lora.config.execution import BENCHMARKS
from sae_lora.evaluation import suite_figures
from sae_lora.evaluation.headlines import SHOWN_FIRST


def points(figure: go.Figure, name: str) -> list[tuple[str, float]]:
    """The points of a run, panel by panel."""
    traces = [trace for trace in figure.data if trace.name == name]
    return [point for trace in traces for point in zip(trace.x, trace.y, strict=True)]


def scored(value: float, stderr: float | None) -> dict[str, Any]:
    return {"acc": {"value": value, "stderr": stderr}, "acc_norm": {"value": 0.1, "stderr": 0.1}}


def test_tasks_show_their_first_metric() -> None:
    metrics = {"acc": True, "acc_norm": True}
    cells = {"base": scored(0.7, 0.02), "student": scored(0.6, 0.01)}
    mmlu = {"higher_is_better": metrics, "cells": cells}
    piqa = {"higher_is_better": metrics, "cells": {"base": scored(0.5, None)}}
    figure = suite_figures.tasks(
        {"a": {"scores": {"mmlu": mmlu, "piqa": piqa}}, "b": {"scores": {"mmlu": mmlu}}}
    )
    assert points(figure, "a") == [("base", 0.7), ("student", 0.6), ("base", 0.5)]
    assert points(figure, "b") == [("base", 0.7), ("student", 0.6)]
    first, second = figure.data[0], figure.data[2]
    assert list(first.error_y.array) == pytest.approx([1.96 * 0.02, 1.96 * 0.01])
    assert second.error_y.array is None  # the harness gives none
    assert [trace.showlegend for trace in figure.data] == [True, True, False]
    titles = {axis.title.text for axis in (figure.layout.yaxis, figure.layout.yaxis2)}
    assert titles == {"mmlu, acc", "piqa, acc"}


def test_steering_shows_its_interval() -> None:
    cells = {
        "base": {"difference": {"value": 0.3, "low": 0.1, "high": 0.6}},
        "student": {"difference": {"value": 0.2, "low": None, "high": None}},
    }
    (trace,) = suite_figures.steering({"a": {"cells": cells}}).data
    assert (list(trace.x), list(trace.y)) == (["base"], [0.3])
    assert list(trace.error_y.array) == pytest.approx([0.3])
    assert list(trace.error_y.arrayminus) == pytest.approx([0.2])


def test_saebench_shows_its_first_metric() -> None:
    assert set(SHOWN_FIRST) == set(BENCHMARKS)
    cells = {"spliced": {"ce_loss_score": 0.9, "l0": 8.0}, "student": {"ce_loss_score": 0.95}}
    lacking = {"spliced": {"scr_dir1_threshold_2": 0.1}}
    scores = {"blocks.3.hook_resid_post": {"core": cells, "scr": lacking}}
    figure = suite_figures.saebench({"a": {"scores": scores}})
    assert points(figure, "a") == [("spliced", 0.9), ("student", 0.95)]
    assert not suite_figures.saebench({"a": {"scores": {}}}).data


def test_latents_has_shares_and_similarities() -> None:
    change = {name: {"value": 0.5, "low": 0.4, "high": 0.7} for name in NAMES}
    change["turned"] = {"value": None, "low": None, "high": None}
    figure = suite_figures.latents({"a": {"saes": {"first": change, "second": {}}}})
    shown = {
        label: value for trace in figure.data for label, value in zip(trace.x, trace.y, strict=True)
    }
    assert set(shown) == {"contexts changed", "effect", "activations", "contexts", "promoted tokens"}
    assert set(shown.values()) == {0.5}


NAMES = ("turned", "contexts_changed", "cosine", "correlation", "overlap", "promoted")
