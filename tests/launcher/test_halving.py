"""`launcher.halving` in a launch: refusals, runs that compete, and runs that stop and go on."""

from pathlib import Path

import pytest

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.schema import Config
from sae_lora.launcher import launch as launcher
from sae_lora.launcher.command import launch_trials
from sae_lora.launcher.halving import (
    brackets,
    check_halving,
    described,
    rungs_of,
    write_brackets,
)
from sae_lora.launcher.plan import plan
from sae_lora.records import halving
from sae_lora.records.folder import RunFolder
from sae_lora.records.status import RunStatus, State, read_statuses
from tests.support.attempts import results
from tests.support.points import Point, folders_in, points_in, run_here

RATES = (1e-5, 4e-3, 1e-3, 1e-4)  # the best one at the rung is not the first
HALVING = "launcher.halving=train.lr"
HALF = "launcher.keep=0.5"


def over_rates(point: Point, *overrides: str) -> list[Config]:
    return [point(f"train.lr={rate}", *overrides) for rate in RATES]


def states(home: Path) -> dict[float, State]:
    """The state of each run, by its rate."""
    folders = folders_in(home)
    statuses = read_statuses(folders)
    return {
        folder.read_config()["train"]["lr"]: status.state
        for folder, status in zip(folders, statuses, strict=True)
    }


@pytest.mark.parametrize(
    ("words", "cause", "nearest"),
    [
        ("launcher.halving=lora.rnk", "keys of lora, train, sae, layer, method", "lora.rank"),
        ("launcher.halving=rank", "a config key", "lora.rank"),
        ("launcher.halving=launcher.pack", "can compete", None),
        ("launcher.halving=data.seed", "their mean counts", "train.lr"),
        ("launcher.halving=train.seed", "their mean counts", "train.lr"),
        ("launcher.halving=train.warmup_share", "the same schedule", "train.lr"),
        ("launcher.halving=train.train_tokens", "the same schedule", "train.lr"),
        ("launcher.halving=off", "a config key", "null"),
        ("launcher.halving=false", "a config key", "null"),
        ("launcher.halving=3", "a config key", None),
        ("launcher.halving=[]", "or a list of such keys", "train.lr"),
        ("launcher.halving=[train.lr,train.lr]", "or a list of such keys", "train.lr"),
        ("launcher.halving=[[train.lr]]", "a config key", "train.lr"),
        ("launcher.rungs=[500]", "multiples of train.eval_every_tokens, from 512 to 512", "[512]"),
        ("launcher.rungs=[512,1024]", "from 512 to 512", "[512]"),
        ("launcher.rungs=[0]", "from 512 to 512", "[512]"),
        ("launcher.rungs=[]", "from 512 to 512", "[512]"),
        ("train.eval_every_tokens=1024", "needs an evaluation before the end", 128),
        ("objective=[kl,ce_gap]", "with launcher.halving one of", "kl"),
        ("objective=best_gap_closed", "with launcher.halving one of", "ce_gap"),
        ("objective=speed", "one of student_ce", None),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    point: Point, tmp_path: Path, words: str, cause: str, nearest: object
) -> None:
    points = over_rates(point, HALVING, words)
    with pytest.raises(ConfigError) as refusal:
        launcher.launch(points)
    assert cause in str(refusal.value)
    assert nearest is None or refusal.value.nearest == nearest
    assert not folders_in(tmp_path)
    if not words.startswith(("launcher.halving", "objective", "train")):  # other settings need halving
        check_halving(over_rates(point, words))


@pytest.mark.parametrize("value", ["0", "1", "nan", "-0.5"])
def test_a_share_that_keeps_all_or_none_is_refused(point: Point, value: str) -> None:
    with pytest.raises(ConfigError, match=r"launcher\.keep .*\n.*0\.01 to 0\.99"):
        point(f"launcher.keep={value}")


def test_every_suggestion_works(point: Point) -> None:
    for words in ("launcher.halving=lora.rnk", "launcher.rungs=[500]", "train.eval_every_tokens=1024"):
        with pytest.raises(ConfigError) as refusal:
            check_halving(over_rates(point, HALVING, words))
        suggestion = f"{refusal.value.field}={refusal.value.nearest}"
        check_halving(over_rates(point, HALVING, suggestion))


def test_runs_that_must_finish_are_refused(point: Point) -> None:
    with pytest.raises(ConfigError, match="adaptive sweeper"):
        launch_trials(over_rates(point, HALVING), [])
    sae = "method=sae", "sae.width=64", "sae.l0=8"
    with pytest.raises(ConfigError, match="init names a method"):
        launcher.launch([point(*sae, HALVING), point("init=sae", HALVING)])


@pytest.mark.parametrize(
    ("tokens", "every", "rungs"),
    [
        (400_000, 100_000, [1, 2]),  # the default
        (400_000, 50_000, [1, 2, 4]),
        (400_000, 12_500, [4, 8, 16]),
        (102_400, 51_200, [1]),
        (1024, 512, [1]),
        (1024, 1, [1]),  # an evaluation after every step, of two
    ],
)
def test_the_default_rungs_are_evaluations_after_shares_of_training(
    point: Point, tokens: int, every: int, rungs: list[int]
) -> None:
    config = point(f"train.train_tokens={tokens}", f"train.eval_every_tokens={every}", HALVING)
    assert rungs_of(config) == rungs


def test_rungs_are_numbers_of_evaluations(point: Point) -> None:
    options = "train.train_tokens=400000", "train.eval_every_tokens=50000", HALVING
    assert rungs_of(point(*options, "launcher.rungs=[200000,50000]")) == [1, 4]
    with pytest.raises(ConfigError, match="to 350,000"):
        rungs_of(point(*options, "launcher.rungs=[400000]"))


def test_runs_compete_if_they_differ_in_the_named_keys_only(point: Point) -> None:
    both = "launcher.halving=[train.lr,lora.rank]"
    points = [
        *(point(both, f"lora.rank={rank}", f"train.lr={rate}") for rank in (2, 4) for rate in RATES),
        point(both, "train.seed=1"),
        point(both, "sae.l0=16"),
        point(both, "lora.targets=mlp", "train.eval_batch_tokens=512", "tracking.name=x"),
    ]
    runs = plan(points).runs
    of_run = list(brackets(runs).values())
    assert len({each.bracket for each in of_run[:9]}) == 1  # alpha follows the rank
    assert len({each.bracket for each in of_run}) == 3
    assert len({each.candidate for each in of_run[:9]}) == 8 + 1
    without_effect = "train.device=cpu", "train.eval_batch_tokens=512", "train.checkpoint_every_steps=7"
    same = brackets(plan([point(both, *without_effect, "train.lr=1e-5", "lora.rank=2")]).runs)
    assert [*same.values()] == of_run[:1]
    text = described(runs)
    assert text is not None
    assert "halving: 3 groups of 1 to 9 that differ in train.lr, lora.rank; at 512 tokens" in text
    assert "runs of other launches count" in str(described(runs[-1:]))
    assert described(plan([point()]).runs) is None


def test_seeds_are_repetitions(point: Point) -> None:
    points = [
        point(HALVING, f"train.seed={seed}", f"train.lr={rate}") for seed in (0, 1) for rate in RATES
    ]
    of_run = brackets(plan(points).runs).values()
    assert len({each.bracket for each in of_run}) == 1
    assert len({each.candidate for each in of_run}) == len(RATES)


def test_a_dry_run_says_who_competes(point: Point, capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.launch(over_rates(point, HALVING, HALF, "launcher.dry_run=true")) == 0
    printed = capsys.readouterr().out
    assert "halving: 1 group of 4 that differ in train.lr; at 512 tokens, the best 50% by gap" in printed
    assert "at most" in printed


@pytest.fixture
def stopped(
    point: Point, tmp_path: Path, forked_jobs: None, capsys: pytest.CaptureFixture[str]
) -> list[RunFolder]:
    """The runs of a sweep over rates, of which two were stopped at the only rung."""
    assert launcher.launch(over_rates(point, HALVING, HALF)) == 0
    printed = capsys.readouterr().out
    assert "halving stopped 2 of 4 runs and saved 1,024 training tokens" in printed
    return [folder for folder in folders_in(tmp_path) if folder.is_outranked]


@pytest.mark.slow
def test_the_worst_runs_stop_and_the_others_are_as_without_halving(
    stopped: list[RunFolder], point: Point, tmp_path: Path
) -> None:
    assert states(tmp_path) == {
        1e-5: State.outranked,
        1e-4: State.outranked,
        1e-3: State.done,
        4e-3: State.done,
    }
    for folder in stopped:
        assert len(folder.read_curve()) == 2 and not folder.summary.exists()
        assert folder.checkpoint_step == 1 and not folder.adapter.exists()
        assert "of 4 by gap after" in str(folder.stop_message)
    whole = tmp_path / "whole"
    run_here(*over_rates(points_in(whole)))
    for folder in folders_in(tmp_path):
        alone = RunFolder(whole / "main" / folder.path.name)
        if folder.is_finished:
            assert results(folder) == results(alone)
            summary = folder.read_summary()
            assert summary["total_seconds"] > summary["train_seconds"]
        same = [point.ce_gap for point in alone.read_curve()[: len(folder.read_curve())]]
        assert [point.ce_gap for point in folder.read_curve()] == same


@pytest.mark.slow
def test_what_was_stopped_goes_on_only_if_halving_is_off(
    stopped: list[RunFolder], point: Point, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And ends with the same bits as a run that was never stopped."""
    assert launcher.launch(over_rates(point, HALVING, HALF)) == 0
    printed = capsys.readouterr().out
    assert "2 of 4 already done" in printed and "halving stopped 2 of 4 runs" in printed
    assert all(folder.is_outranked for folder in stopped)
    assert launcher.launch(over_rates(point)) == 0
    assert "2 runs resuming from step 1" in capsys.readouterr().out
    assert set(states(tmp_path).values()) == {State.done}
    whole = tmp_path / "whole"
    run_here(*over_rates(points_in(whole)))
    for folder in folders_in(tmp_path):
        assert results(folder) == results(RunFolder(whole / "main" / folder.path.name))


@pytest.mark.slow
def test_runs_of_other_packs_and_launches_count_by_their_folders(
    point: Point, tmp_path: Path, forked_jobs: None, capsys: pytest.CaptureFixture[str]
) -> None:
    points = {rate: point(f"train.lr={rate}", HALVING, HALF, "launcher.pack=off") for rate in RATES}
    assert launcher.launch([point("train.lr=4e-3")]) == 0  # without halving
    assert "halving" not in capsys.readouterr().out
    assert launcher.launch([points[4e-3], points[1e-4]]) == 0  # one after the other
    assert states(tmp_path) == {4e-3: State.done, 1e-4: State.outranked}
    assert launcher.launch([points[1e-3]]) == 0
    assert states(tmp_path)[1e-3] is State.done  # rank 2 of 3
    assert launcher.launch([points[1e-5]]) == 0
    (last,) = [folder for folder in folders_in(tmp_path) if "rank 4 of 4" in str(folder.stop_message)]
    assert halving.read(last) is not None


def test_runs_of_another_launch_keep_its_rule(point: Point) -> None:
    """Until that launch has ended."""
    (run,) = plan([point(HALVING)]).runs
    run.freeze()
    new = [(run, RunStatus(State.new))]
    write_brackets(new)
    before = halving.read(run.folder)
    assert before is not None and before.keep == 0.75
    (other,) = plan([point(HALVING, HALF)]).runs
    for state in (State.running, State.queued):
        write_brackets([(other, RunStatus(state))])
        assert halving.read(run.folder) == before
    write_brackets([(other, RunStatus(State.done))])
    assert halving.read(run.folder) != before
    run.folder.halving.unlink()
    write_brackets([(other, RunStatus(State.running))])  # a launch without halving: it competes
    assert halving.read(run.folder) is not None


@pytest.mark.slow
def test_a_pack_may_hold_runs_of_several_sweeps(point: Point, tmp_path: Path, forked_jobs: None) -> None:
    points = [
        point(HALVING, HALF, f"train.lr={rate}", f"sweep={name}") for name in "ab" for rate in RATES[:2]
    ]
    assert launcher.launch(points) == 0
    for name in "ab":
        outranked = [path for path in (tmp_path / name).glob("*-*") if RunFolder(path).is_outranked]
        assert len(outranked) == 1


@pytest.mark.slow
def test_all_of_a_pack_may_stop(point: Point, tmp_path: Path, forked_jobs: None) -> None:
    assert launcher.launch([point("train.lr=4e-3", HALVING)]) == 0
    assert (
        launcher.launch(
            [point(f"train.lr={rate}", HALVING, "launcher.keep=0.1") for rate in (1e-5, 1e-4)]
        )
        == 0
    )
    (finished,) = [folder for folder in folders_in(tmp_path) if folder.is_finished]
    assert finished.read_config()["train"]["lr"] == 4e-3


@pytest.mark.slow
def test_a_stopped_run_is_not_a_result(stopped: list[RunFolder]) -> None:
    from sae_lora.records.status import finished
    from sae_lora.report.sweep import load_sweep

    with pytest.raises(UserError, match=r"outranked, at step 1 of 2 \(stopped at 512 tokens, rank"):
        finished(stopped[0].path)
    frame = load_sweep(stopped[0].path.parent).frame()
    assert sorted(frame["state"]) == ["done", "done", "outranked", "outranked"]
