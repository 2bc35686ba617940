"""Objectives of adaptive sweepers: which there are, of which runs, and the best trials."""

import pytest

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.schema import Config
from sae_lora.launcher import command
from sae_lora.launcher import launch as launcher
from sae_lora.launcher.objective import (
    OBJECTIVES,
    check_directions,
    check_objective,
    objective_of,
    show_best,
)
from sae_lora.launcher.plan import plan
from sae_lora.records.metrics import METRICS
from tests.support.points import Point
from tests.support.sweeps import curve_point, summed_up


def finished(point: Config, **values: object) -> None:
    """Make the run of a point a finished one, with these values in its summary."""
    (run,) = plan([point]).runs
    run.freeze()
    run.folder.append_point(curve_point(0))
    summed_up(run.folder, **values)


def test_objectives_are_measures_with_a_better_direction() -> None:
    assert {"ce_gap", "kl", "student_ce", "fvu", "gap_closed", "top1_agreement"} <= {*OBJECTIVES}
    assert all(METRICS[name].better in ("lower", "higher") for name in OBJECTIVES)


@pytest.mark.parametrize(
    ("words", "cause", "nearest"),
    [
        ("objective=gap_close", "one of student_ce", "gap_closed"),
        ("objective=[kl,lr]", "'lr' cannot be used", "kl"),
        ("objective=[kl,kl]", "each once", "ce_gap"),
        ("objective=[]", "one or more measures", "ce_gap"),
        ("objective=gap_closed method=sae sae.width=64 sae.l0=4", "its SAE is new", "ce_gap"),
    ],
)
def test_an_objective_that_a_run_lacks_is_refused(
    point: Point, words: str, cause: str, nearest: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        check_objective(point(*words.split()))
    assert cause in str(refusal.value) and refusal.value.nearest == nearest
    with pytest.raises(ConfigError):
        launcher.launch([point(*words.split())])


def test_the_objective_is_that_of_the_finished_run(point: Point) -> None:
    single, several = point(), point("objective=[kl,gap_closed]")
    error = objective_of(single)
    assert isinstance(error, UserError) and "did not finish" in str(error)
    (run,) = plan([single]).runs
    run.freeze()
    run.folder.write_failure("boom", "boom")
    assert str(objective_of(single)) == "boom"
    run.folder.clear_failure()
    finished(single)
    summary = run.folder.read_summary()
    assert objective_of(single) == summary["ce_gap"]
    assert objective_of(several) == [summary["kl"], summary["gap_closed"]]  # the same run


def test_an_undefined_objective_is_an_error(point: Point) -> None:
    no_gap = point("objective=gap_closed")
    finished(no_gap, gap_closed=None)
    assert str(objective_of(no_gap)).endswith("gap_closed is undefined")


def test_the_best_trials_come_first_with_the_command_of_the_best(
    point: Point, capsys: pytest.CaptureFixture[str]
) -> None:
    gaps = {1: 0.75, 2: 0.25, 4: 0.5}
    points = [point(f"lora.rank={rank}", "objective=[ce_gap,top1_agreement]") for rank in (*gaps, 8)]
    for trial, (rank, gap) in zip(points, gaps.items(), strict=False):
        finished(trial, ce_gap=gap, top1_agreement=rank / 8)
    show_best([*points, points[0]])
    printed = capsys.readouterr()
    rows = [line.split("│")[1].strip() for line in printed.out.splitlines() if line.startswith("│")]
    assert rows == ["2", "4", "1", "4", "2", "1"]
    assert "3 trials by gap after" in printed.out and "3 trials by top-1" in printed.out
    best = [line for line in printed.out.splitlines() if line.startswith("1. sae-lora launch")]
    assert ["lora.rank=2" in best[0], "lora.rank=4" in best[1]] == [True, True]
    assert "1 trial" in printed.err


def test_a_batch_waits_and_a_dry_run_has_no_objectives(
    point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[Config] = []
    monkeypatch.setattr(command, "launch", lambda points: launched.extend(points) or 0)
    finished(point())
    code, objectives = command.launch_trials([point()], [])
    assert (code, len(objectives)) == (0, 1) and launched[0].launcher.wait
    assert command.launch_trials([point("launcher.dry_run=true")], ["minimize"]) == (0, [])


@pytest.mark.parametrize(
    ("objective", "directions", "right"),
    [
        ("ce_gap", ["maximize"], "minimize"),
        ("gap_closed", ["minimize"], "maximize"),
        ("[kl,gap_closed]", ["minimize", "minimize"], "[minimize,maximize]"),
        ("[kl,gap_closed]", ["minimize"], "[minimize,maximize]"),
        ("kl", ["minimize", "minimize"], "minimize"),
    ],
)
def test_a_sweeper_that_looks_for_the_worst_is_refused(
    point: Point, objective: str, directions: list[str], right: str
) -> None:
    trial = point(f"objective={objective}")
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.direction") as refusal:
        command.launch_trials([trial], directions)
    assert refusal.value.nearest == right
    check_directions(trial, right.strip("[]").split(","))
    check_directions(trial, [])  # of a sweeper whose config has none
