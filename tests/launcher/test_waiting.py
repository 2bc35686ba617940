"""Points that begin with the result of another run of the same command wait for this run."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from sae_lora.common.errors import ConfigError
from sae_lora.config.execution import LauncherConfig
from sae_lora.config.schema import Config
from sae_lora.config.serialize import load
from sae_lora.launcher import expected_time, prefetch
from sae_lora.launcher import launch as launcher
from sae_lora.launcher.plan import Pack, Run, plan
from sae_lora.records.folder import RunFolder
from sae_lora.saes import layer_groups
from tests.support.composing import combinations, each_composed
from tests.support.families import random_distances
from tests.support.points import Point, folders_in, points_in, run_here

pytestmark = pytest.mark.slow  # many seconds in all

SAE = (
    "method=sae",
    "sae.width=256",
    "sae.l0=8",
    "method.checkpoints=[0.5]",
    "method.buffer_tokens=1024",
)
SHARES = (0.5, 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def point(tmp_path: Path, cache: Path) -> Point:
    return functools.partial(points_in(tmp_path), f"data.cache_dir={cache}")


def sweep(point: Point, *overrides: str, seeds: Sequence[int] = (0,)) -> list[Config]:
    """For each seed: an SAE, and LoRA around the SAE after half of its training and at its end."""
    return [
        point(*keys, f"train.seed={seed}", *overrides)
        for seed in seeds
        for keys in (SAE, *(("init=sae", f"init_at={at}") for at in SHARES))
    ]


def test_points_with_init_wait(point: Point, tmp_path: Path) -> None:
    """For any order of the points."""
    points = sweep(point)
    for ordered in (points, points[::-1]):
        planned = plan(ordered)
        assert [run.config.method.kind.name for run in planned.runs] == ["sae"]
        assert planned.waiting == [config for config in ordered if config.init == "sae"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "requests",
    [
        [("init=sae",), ()],  # no run with this method
        [("init=e2e",), SAE],
        [("init=sae", "train.seed=1"), SAE],
        [("init=sae", "data.seed=1"), SAE],
        [("init=sae", "layer.index=3"), SAE],
        [("init=sae", "layer.index=3"), (*SAE, "layer.index=4")],
    ],
)
def test_init_without_a_matching_run_is_refused(requests: list[tuple[str, ...]], point: Point) -> None:
    with pytest.raises(ConfigError, match="no runs of this command have method=") as error:
        plan([point(*overrides) for overrides in requests])
    assert error.value.field == "init" and "this model, layer and seed" in str(error.value)
    assert "the method of exactly one other run of this command" in error.value.allowed


def test_init_with_two_matching_runs_is_refused(point: Point) -> None:
    with pytest.raises(ConfigError, match="2 runs of this command have method=sae") as error:
        plan([point(*SAE), point(*SAE, "sae.l0=4"), point("init=sae")])
    assert (error.value.field, error.value.got) == ("init", "sae")


def test_init_with_a_run_that_is_named_twice_is_allowed(point: Point) -> None:
    """As in a sweep over `init_at`, which does not change the training of the SAE."""
    planned = plan([point(*SAE), point(*SAE, "init_at=0.5"), point("init=sae", "init_at=0.5")])
    assert len(planned.runs) == len(planned.waiting) == 1


@pytest.mark.parametrize(
    ("overrides", "field", "nearest"),
    [
        (("init_at=0.3",), "init_at", "0.5"),
        (("init_at=0.9",), "init_at", "1"),
        (("lora.blocks=[2,99]",), "lora.blocks", [2]),
        (("data.context_length=512", "train.batch_size=1"), "data.context_length", 256),
        (("method=sae",), "init", None),
    ],
)
def test_impossible_waiting_points_are_refused_before_anything_runs(
    overrides: tuple[str, ...], field: str, nearest: object, point: Point
) -> None:
    with pytest.raises(ConfigError) as error:
        plan([point(*SAE), point("init=sae", *overrides)])
    assert (error.value.field, error.value.nearest) == (field, nearest)


def test_only_methods_that_train_saes_save_them_during_training(point: Point) -> None:
    init = "init=linear_adapter", "init_at=0.5"
    with pytest.raises(ConfigError, match="saves no intermediate results") as error:
        plan([point("method=linear_adapter"), point(*init)])
    assert error.value.nearest == 1


def test_dry_run_names_waiting_points_and_starts_nothing(
    point: Point, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.launch(sweep(point, "launcher.dry_run=true")) == 0
    printed = capsys.readouterr().out
    assert "2 points will start after these runs" in printed
    assert "1 run: 1 new" in printed
    assert list(tmp_path.iterdir()) == []


def test_points_do_not_start_if_their_run_fails(
    point: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Run] = []
    monkeypatch.setattr(prefetch, "prefetched", list)

    def fail(packs: Sequence[Pack], settings: LauncherConfig, folder: Path) -> None:
        for run in itertools.chain(*packs):
            started.append(run)
            run.folder.write_failure("out of memory", "…")

    monkeypatch.setattr(expected_time, "run_here", fail)
    assert launcher.launch(sweep(point)) == 1
    assert [run.config.method.kind.name for run in started] == ["sae"]
    assert len(folders_in(tmp_path)) == 1


def test_on_a_cluster_a_second_command_submits_waiting_points(
    point: Point, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[Run] = []
    monkeypatch.setattr(prefetch, "prefetched", list)
    monkeypatch.setattr(launcher.slurm, "check_partition", lambda partition: None)
    monkeypatch.setattr(launcher, "submit", lambda packs, settings: submitted.extend(*packs))
    cluster = "launcher=slurm", "launcher.timeout_min=60", "launcher.gpus_per_node=0"
    assert launcher.launch(sweep(point, *cluster)) == 0
    assert [run.config.method.kind.name for run in submitted] == ["sae"]
    assert "2 points not submitted yet" in capsys.readouterr().out


class Trained(NamedTuple):
    """Finished SAE runs of two seeds.

    Args:
        point: Composes points in the same output folder.
        saes: The runs, by seed.
    """

    point: Point
    saes: list[RunFolder]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Trained:
    outputs = tmp_path_factory.mktemp("outputs")
    point = functools.partial(points_in(outputs), f"data.cache_dir={cache}")
    return Trained(point, run_here(*(point(*SAE, f"train.seed={seed}") for seed in (0, 1))))


def test_each_seed_begins_with_the_sae_of_this_seed(trained: Trained) -> None:
    planned = plan(sweep(trained.point, seeds=(0, 1)))
    assert planned.waiting == []
    lora = [run.config for run in planned.runs if run.config.method.kind.name == "lora"]
    assert [(config.train.seed, config.init_at) for config in lora] == [
        (seed, at) for seed in (0, 1) for at in SHARES
    ]
    assert len({run.folder.path for run in planned.runs}) == 6
    for config in lora:
        source = trained.saes[config.train.seed]
        assert config.init == str(source.path)
        (used,) = config.sae.used
        parent = source.sae if config.init_at == 1 else source.sae_at / "0.5"
        assert used.path == str((parent / "blocks.3.hook_resid_post").resolve())
        assert (used.block, used.width, used.l0) == (3, 256, 8)
    assert len({config.sae.used[0].sha256 for config in lora}) == 4


@pytest.mark.parametrize(("at", "nearest"), [(0.25, 0.5), (0.6, 0.5), (0.9, 1)])
def test_a_share_that_was_not_saved_is_refused(at: float, nearest: float, trained: Trained) -> None:
    for init in ("sae", str(trained.saes[0].path)):
        with pytest.raises(ConfigError) as error:
            plan([trained.point(*SAE), trained.point(f"init={init}", f"init_at={at}")])
        assert (error.value.field, error.value.got, error.value.nearest) == (
            "init_at",
            at,
            f"{nearest:g}",
        )


@pytest.mark.usefixtures("forked_jobs")
def test_waiting_points_run_after_their_sae_and_only_once(
    point: Point, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = sweep(point)
    assert launcher.launch(points) == 0
    assert "2 points will start after these runs" in capsys.readouterr().out
    folders = {load(folder.config.read_text()).init_at: folder for folder in folders_in(tmp_path)}
    runs = plan(points).runs
    assert len(folders_in(tmp_path)) == len(runs) == 3
    by_share = {run.config.init_at: run.folder for run in runs[1:]}
    assert set(by_share) == {0.5, 1.0} <= set(folders)
    sae, curve = runs[0].folder.read_summary(), runs[0].folder.read_curve()
    # Each begins with the SAE at its share of training: after half of the tokens, and at the end.
    assert [point.tokens for point in curve] == [0, 512, 1024]
    for at, expected in ((0.5, curve[1].student_ce), (1.0, sae["student_ce"])):
        summary = by_share[at].read_summary()
        assert summary["spliced_ce"] == pytest.approx(expected, abs=1e-6)
        assert summary["trained_together"] == 2
    times = {path: path.stat().st_mtime_ns for run in runs for path in run.folder.path.rglob("*")}
    assert launcher.launch(points) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "3 of 3 already done, skipped" in capsys.readouterr().out


RUNS = {"methods": (12, 2), "multi_sae": (6, 0), "groups": (8, 10), "time_to_ce": (4, 8)}
"""For each experiment: the number of runs, and of points that wait for a run."""


@pytest.mark.parametrize("name", RUNS)
def test_every_point_of_an_experiment_plans(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All combinations of the sweep, as `python launch.py experiment=…` composes them."""
    distances = random_distances(8, seed=3)
    monkeypatch.setattr(layer_groups, "_distances", lambda *_: distances.tolist())
    planned = plan(each_composed(combinations(name), f"output_dir={tmp_path}"))
    assert (len(planned.runs), len(planned.waiting)) == RUNS[name]
    assert not [note for note in planned.notes if note.startswith("dropped")]
    assert all(run.config.sweep == name for run in planned.runs)
    if name == "groups":
        groups = [run.groups.groups for run in planned.runs if run.groups is not None]
        assert sorted(map(len, groups)) == [1, 2, 2, 3, 3, 4, 4, 7]


def test_a_chain_of_points_waits_for_the_first_run(tmp_path: Path) -> None:
    """For any order of the points: an SAE, the same SAE finetuned, LoRA around the finetuned SAE."""
    point = points_in(tmp_path)
    links = "method=lora init=sae_finetune", "method=sae_finetune init=sae", "method=sae"
    planned = plan([point(*link.split()) for link in links])
    assert [run.config.method.kind.name for run in planned.runs] == ["sae"]
    assert [config.method.kind.name for config in planned.waiting] == ["sae_finetune", "lora"]
