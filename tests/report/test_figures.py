"""The figures of a sweep show the values of its tables."""

from pathlib import Path

import pytest
import yaml
from scipy import stats

from sae_lora.common.plots import COLOURS
from sae_lora.report.figures import by_prominence, efficiency, gap_closed_against, gap_curves, heat_map
from sae_lora.report.fits import Fit, fit
from sae_lora.report.sweep import Sweep, load_sweep
from tests.support.sweeps import MadeUp, summed_up


@pytest.fixture
def grid(tmp_path: Path) -> Sweep:
    MadeUp(tmp_path / "grid").grid(ranks=(1, 4, 16), blocks=(1, 3))
    return load_sweep(tmp_path / "grid")


def test_a_line_per_run_factors_as_colour_and_dash(grid: Sweep) -> None:
    figure = gap_curves(grid.frame(), grid.curves())
    assert [trace.name for trace in figure.data] == ["1, 1", "4, 1", "16, 1", "1, 3", "4, 3", "16, 3"]
    assert figure.layout.legend.title.text == "rank, SAE at block"
    colours, dashes = ([trace.line[key] for trace in figure.data] for key in ("color", "dash"))
    assert colours[:3] == colours[3:] and len(set(colours)) == 3
    assert len(set(dashes[:3])) == len(set(dashes[3:])) == 1 and dashes[0] != dashes[3]
    assert len(set(COLOURS)) == len(COLOURS)


@pytest.mark.parametrize("over", ["tokens", "train_seconds"])
def test_curves_are_the_points(grid: Sweep, over: str) -> None:
    frame, curves = grid.frame(), grid.curves()
    figure = gap_curves(frame, curves, over)
    for (_, run), trace in zip(frame.iterrows(), figure.data, strict=True):
        points = curves[curves["run"] == run["run"]]
        assert list(trace.x) == list(points[over])
        assert list(trace.y) == list(points["ce_gap"])


def test_a_large_legend_names_the_values_of_both_factors(tmp_path: Path) -> None:
    MadeUp(tmp_path / "grid").grid(ranks=(1, 2, 4, 8), blocks=(1, 2, 3))
    sweep = load_sweep(tmp_path / "grid")
    figure = gap_curves(sweep.frame(), sweep.curves())
    shown = [trace.name for trace in figure.data if trace.showlegend is not False]
    assert shown == ["1", "2", "4", "8", "SAE at block 1", "SAE at block 2", "SAE at block 3"]


def test_many_values_have_different_colours(tmp_path: Path) -> None:
    MadeUp(tmp_path / "grid").grid(ranks=range(1, 13), blocks=(3,))
    sweep = load_sweep(tmp_path / "grid")
    colours = [trace.line.color for trace in gap_curves(sweep.frame(), sweep.curves()).data]
    assert len(set(colours)) == 12


def test_seeds_are_drawn_as_their_mean_with_its_interval(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "seeds")
    closed = {1: [0.1, 0.2, 0.3], 4: [0.4, 0.4, 0.7]}
    for rank, values in closed.items():
        for seed, value in enumerate(values):
            sweep.finished(rank=rank, seed=seed, closed=value)
    (trace,) = gap_closed_against(load_sweep(tmp_path / "seeds").frame(), "rank", []).data
    assert list(trace.x) == [1, 4] and list(trace.y) == pytest.approx([0.2, 0.5])
    assert list(trace.text) == ["3 runs", "3 runs"]
    assert [name.split("-r")[1] for name in trace.customdata] == ["1-s0", "4-s0"]
    expected = [
        stats.t.interval(0.95, 2, sum(values) / 3, stats.sem(values))[1] - sum(values) / 3
        for values in closed.values()
    ]
    assert list(trace.error_y.array) == pytest.approx(expected)


def test_the_fit_is_drawn_over_the_range_of_the_factor(grid: Sweep) -> None:
    frame = grid.frame()
    fitted = fit(frame, "rank", ["block"])
    assert isinstance(fitted, Fit)
    figure = gap_closed_against(frame, "rank", ["block"], fitted)
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len(lines) == 2
    for line, group in zip(lines, fitted.intercepts, strict=True):
        assert list(line.x) == [1, 16]
        assert list(line.y) == pytest.approx([fitted.at(group, 1), fitted.at(group, 16)])
    assert figure.layout.xaxis.type == "log"


def test_each_cell_of_a_map_shows_its_mean(grid: Sweep) -> None:
    frame = grid.frame()
    (heatmap,) = heat_map(frame, ["rank", "block"]).data
    for down, row in zip(heatmap.y, heatmap.z, strict=True):
        for across, value in zip(heatmap.x, row, strict=True):
            run = frame[(frame["rank"] == int(across)) & (frame["block"] == int(down))]
            assert value == pytest.approx(run["gap_closed"].item())


def test_a_missing_point_is_an_empty_cell_of_the_map(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "incomplete")
    sweep.grid(ranks=(1, 4), blocks=(1,), l0s=(4.0, 8.0))
    sweep.finished(rank=1, block=3)
    first, second = heat_map(load_sweep(tmp_path / "incomplete").frame(), ["rank", "l0", "block"]).data
    assert second.z[0][1] is None
    assert all(value is not None for row in first.z for value in row)


def test_a_map_names_blocks_of_several_saes_after_single_ones(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "blocks")
    sweep.grid(ranks=(1, 4), blocks=(1, 3))
    for rank in (1, 4):
        folder = sweep.finished(rank=rank, block=5)
        config = folder.read_config()
        config["sae"]["used"] = sweep.saes_at(2, 5)
        folder.write_config(yaml.safe_dump(config))
        summed_up(folder)
    (heatmap,) = heat_map(load_sweep(tmp_path / "blocks").frame(), ["rank", "block"]).data
    assert list(heatmap.y) == ["1", "3", "2+5"]


def test_the_costs_of_all_runs_are_drawn(grid: Sweep) -> None:
    frame = grid.frame()
    figure = efficiency(frame, by_prominence(["block", "rank"]))
    costs = {
        axis: sorted(x for trace in figure.data if (trace.xaxis or "x") == axis for x in trace.x)
        for axis in ("x", "x2", "x3")
    }
    for axis, cost in zip(costs, ("trainable_parameters", "train_flops", "train_seconds"), strict=True):
        assert costs[axis] == sorted(frame[cost])


def test_prominent_factors_come_first() -> None:
    assert by_prominence(["model", "block", "l0", "rank"]) == ["rank", "l0", "block", "model"]
