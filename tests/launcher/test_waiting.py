"""Points that begin with the result of another of the same command: they wait until it is there."""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from sae_lora.common.errors import ConfigError
from sae_lora.config.schema import Config, LauncherConfig
from sae_lora.config.serialize import load
from sae_lora.launcher import launch as launcher
from sae_lora.launcher import prefetch
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
KEPT = (0.5, 1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def point(tmp_path: Path, cache: Path) -> Point:
    return functools.partial(points_in(tmp_path), f"data.cache_dir={cache}")


def sweep(point: Point, *overrides: str, seeds: Sequence[int] = (0,)) -> list[Config]:
    """An SAE and LoRA around it as it was after half of its training and at its end, for each seed."""
    return [
        point(*each, f"train.seed={seed}", *overrides)
        for seed in seeds
        for each in (SAE, *(("init=sae", f"init_at={at}") for at in KEPT))
    ]


def test_what_begins_with_another_waits(point: Point, tmp_path: Path) -> None:
    """In whatever order they are asked for."""
    points = sweep(point)
    for asked in (points, points[::-1]):
        planned = plan(asked)
        assert [run.config.method.kind.name for run in planned.runs] == ["sae"]
        assert planned.waiting == [one for one in asked if one.init == "sae"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "asked",
    [
        [("init=sae",), ()],  # of a method that none of them has
        [("init=e2e",), SAE],
        [("init=sae", "train.seed=1"), SAE],
        [("init=sae", "data.seed=1"), SAE],
        [("init=sae", "layer.index=3"), SAE],
        [("init=sae", "layer.index=3"), (*SAE, "layer.index=4")],
    ],
)
def test_no_run_to_begin_with_is_refused(asked: list[tuple[str, ...]], point: Point) -> None:
    with pytest.raises(ConfigError, match="none of them have method=") as error:
        plan([point(*one) for one in asked])
    assert error.value.field == "init" and "this model, layer and seed" in str(error.value)
    assert "the method of just one other run of this command" in error.value.allowed


def test_two_runs_to_begin_with_are_refused(point: Point) -> None:
    with pytest.raises(ConfigError, match="2 of them have method=sae") as error:
        plan([point(*SAE), point(*SAE, "sae.l0=4"), point("init=sae")])
    assert (error.value.field, error.value.got) == ("init", "sae")


def test_one_run_that_is_asked_for_twice_is_one(point: Point) -> None:
    """As of a sweep over `init_at`, which means nothing to the SAE's own training."""
    planned = plan([point(*SAE), point(*SAE, "init_at=0.5"), point("init=sae", "init_at=0.5")])
    assert len(planned.runs) == len(planned.waiting) == 1


@pytest.mark.parametrize(
    ("asked", "field", "nearest"),
    [
        (("init_at=0.3",), "init_at", "0.5"),
        (("init_at=0.9",), "init_at", "1"),
        (("lora.blocks=[2,99]",), "lora.blocks", [2]),
        (("data.context_length=512", "train.batch_size=1"), "data.context_length", 256),
        (("method=sae",), "init", None),
    ],
)
def test_what_cannot_work_later_is_refused_before_anything_runs(
    asked: tuple[str, ...], field: str, nearest: object, point: Point
) -> None:
    with pytest.raises(ConfigError) as error:
        plan([point(*SAE), point("init=sae", *asked)])
    assert (error.value.field, error.value.nearest) == (field, nearest)


def test_only_what_trains_saes_keeps_them_on_its_way(point: Point) -> None:
    after = "init=linear_adapter", "init_at=0.5"
    with pytest.raises(ConfigError, match="saves no intermediate results") as error:
        plan([point("method=linear_adapter"), point(*after)])
    assert error.value.nearest == 1


def test_dry_run_says_what_waits_and_starts_nothing(
    point: Point, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launcher.launch(sweep(point, "launcher.dry_run=true")) == 0
    printed = capsys.readouterr().out
    assert "2 points will follow" in printed
    assert "1 runs: 1 new" in printed
    assert list(tmp_path.iterdir()) == []


def test_what_waits_for_a_run_that_fails_is_not_begun(
    point: Point, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Run] = []
    monkeypatch.setattr(prefetch, "prefetched", list)

    def fail(packs: Sequence[Pack], settings: LauncherConfig) -> None:
        for run in itertools.chain(*packs):
            begun.append(run)
            run.folder.write_failure("out of memory", "…")

    monkeypatch.setattr(launcher, "run_here", fail)
    assert launcher.launch(sweep(point)) == 1
    assert [run.config.method.kind.name for run in begun] == ["sae"]
    assert len(folders_in(tmp_path)) == 1


def test_on_a_cluster_the_same_command_submits_them_later(
    point: Point, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted: list[Run] = []
    monkeypatch.setattr(prefetch, "prefetched", list)
    monkeypatch.setattr(launcher.slurm, "check_partition", lambda partition: None)
    monkeypatch.setattr(launcher, "submit", lambda packs, settings: submitted.extend(*packs))
    cluster = "launcher=slurm", "launcher.timeout_min=60", "launcher.gpus_per_node=0"
    assert launcher.launch(sweep(point, *cluster)) == 0
    assert [run.config.method.kind.name for run in submitted] == ["sae"]
    said = capsys.readouterr().out
    assert "2 points still to submit" in said


class Trained(NamedTuple):
    """SAEs of two seeds, finished.

    Args:
        point: Composes points whose runs land beside them.
        saes: By seed.
    """

    point: Point
    saes: list[RunFolder]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Trained:
    outputs = tmp_path_factory.mktemp("outputs")
    point = functools.partial(points_in(outputs), f"data.cache_dir={cache}")
    return Trained(point, run_here(*(point(*SAE, f"train.seed={seed}") for seed in (0, 1))))


def test_each_seed_begins_with_its_own(trained: Trained) -> None:
    planned = plan(sweep(trained.point, seeds=(0, 1)))
    assert planned.waiting == []
    lora = [run.config for run in planned.runs if run.config.method.kind.name == "lora"]
    assert [(one.train.seed, one.init_at) for one in lora] == [
        (seed, at) for seed in (0, 1) for at in KEPT
    ]
    assert len({run.folder.path for run in planned.runs}) == 6
    for one in lora:
        before = trained.saes[one.train.seed]
        assert one.init == str(before.path)
        (used,) = one.sae.used
        made = before.sae if one.init_at == 1 else before.sae_at / "0.5"
        assert used.path == str((made / "blocks.3.hook_resid_post").resolve())
        assert (used.block, used.width, used.l0) == (3, 256, 8)
    assert len({one.sae.used[0].sha256 for one in lora}) == 4


@pytest.mark.parametrize(("at", "nearest"), [(0.25, 0.5), (0.6, 0.5), (0.9, 1)])
def test_what_was_not_kept_is_refused(at: float, nearest: float, trained: Trained) -> None:
    for init in ("sae", str(trained.saes[0].path)):
        with pytest.raises(ConfigError) as error:
            plan([trained.point(*SAE), trained.point(f"init={init}", f"init_at={at}")])
        assert (error.value.field, error.value.got, error.value.nearest) == (
            "init_at",
            at,
            f"{nearest:g}",
        )


@pytest.mark.slow
def test_all_of_them_run_one_after_another_and_once(
    point: Point, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = sweep(point)
    assert launcher.launch(points) == 0
    assert "2 points will follow" in capsys.readouterr().out
    folders = {load(folder.config.read_text()).init_at: folder for folder in folders_in(tmp_path)}
    runs = plan(points).runs
    assert len(folders_in(tmp_path)) == len(runs) == 3
    by_share = {run.config.init_at: run.folder for run in runs[1:]}
    assert set(by_share) == {0.5, 1.0} <= set(folders)
    sae, curve = runs[0].folder.read_summary(), runs[0].folder.read_curve()
    # Each goes on where the SAE was kept: after a half of its tokens, and at its end.
    assert [point.tokens for point in curve] == [0, 512, 1024]
    for at, kept in ((0.5, curve[1].student_ce), (1.0, sae["student_ce"])):
        summary = by_share[at].read_summary()
        assert summary["spliced_ce"] == pytest.approx(kept, abs=1e-6)
        assert summary["trained_together"] == 2
    before = {path: path.stat().st_mtime_ns for one in runs for path in one.folder.path.rglob("*")}
    assert launcher.launch(points) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "3 of 3 done before, not run again" in capsys.readouterr().out


RUNS = {"methods": (12, 2), "multi_sae": (6, 0), "groups": (8, 10), "time_to_ce": (4, 8)}
"""Of each experiment: different runs, and points that wait for one of them."""


@pytest.mark.parametrize("name", RUNS)
def test_every_point_of_an_experiment_plans(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All combinations of what it sweeps over, as `python launch.py experiment=…` composes them."""
    distances = random_distances(8, seed=3)
    monkeypatch.setattr(layer_groups, "_distances", lambda config: distances.tolist())
    planned = plan(each_composed(combinations(name), f"output_dir={tmp_path}"))
    assert (len(planned.runs), len(planned.waiting)) == RUNS[name]
    assert not [note for note in planned.notes if note.startswith("dropped")]
    assert all(run.config.sweep == name for run in planned.runs)
    if name == "groups":
        groups = [run.groups.groups for run in planned.runs if run.groups is not None]
        assert sorted(map(len, groups)) == [1, 2, 2, 3, 3, 4, 4, 7]


def test_a_chain_waits_for_its_first_link(tmp_path: Path) -> None:
    """In whatever order the points stand: an SAE, the same finetuned, LoRA around that."""
    point = points_in(tmp_path)
    links = "method=lora init=sae_finetune", "method=sae_finetune init=sae", "method=sae"
    planned = plan([point(*link.split()) for link in links])
    assert [run.config.method.kind.name for run in planned.runs] == ["sae"]
    assert [one.method.kind.name for one in planned.waiting] == ["sae_finetune", "lora"]
