"""Packs hold runs that may train together, each once, as many as fit; each pack has a place."""

import os
from dataclasses import replace

import pytest

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import LauncherKind
from sae_lora.config.identity import pack_key
from sae_lora.launcher.packs import packed, places
from sae_lora.launcher.plan import Pack, Run, plan
from sae_lora.train.cost import estimate, first_own_block
from tests.support.points import Point


def runs(point: Point, *each: str, launcher: str = "") -> list[Run]:
    """A run for each of the overrides, with the launcher's settings in all."""
    return plan([point(*one.split(), *launcher.split()) for one in each]).runs


def packs(made: list[Run], **settings: object) -> list[Pack]:
    found = packed(made, replace(made[0].config.launcher, **settings))  # pyright: ignore[reportArgumentType]
    assert sorted(run.name for pack in found for run in pack) == sorted(run.name for run in made)
    return found


SEEDS = [f"train.seed={seed}" for seed in range(11)]


def test_as_many_as_asked_for(point: Point) -> None:
    made = runs(point, *SEEDS)
    expected = {"auto": [5, 6], "off": [1] * 11, 1: [1] * 11, 3: [2, 3, 3, 3], 99: [11]}
    for pack, sizes in expected.items():
        assert sorted(map(len, packs(made, pack=pack))) == sizes


def test_no_place_is_left_empty(point: Point) -> None:
    made = runs(point, *SEEDS[:6], launcher="launcher.max_parallel=3")
    assert [len(pack) for pack in packs(made)] == [2, 2, 2]
    made = runs(point, *SEEDS[:2], launcher="launcher.max_parallel=3")
    assert [len(pack) for pack in packs(made)] == [1, 1]


MAY_DIFFER = (
    "lora.rank=4 lora.alpha=1 lora.dropout=0.1 lora.targets=qv",
    "lora.blocks=all",
    "sae.l0=8",
    "sae.width=2k",
    "layer.index=[2,5]",
    "sae=identity",
    "train.lr=1e-3 train.schedule=constant train.warmup_share=0",
    "train.loraplus_ratio=8 lora.alpha=2r",
    "train.weight_decay=0.1 train.grad_clip=null train.kl_reduction=sequence_sum",
    "train.seed=7",
)
MUST_NOT = (
    "data.seed=1",
    "data.context_length=64",
    "train.train_tokens=2048",
    "train.batch_size=2",
    "train.dtype=bfloat16",
    "model.dtype=bfloat16",
    "train.eval_every_tokens=256",
)


@pytest.mark.parametrize("override", MAY_DIFFER)
def test_together(point: Point, override: str) -> None:
    assert len(packs(runs(point, "", override))) == 1


@pytest.mark.parametrize("override", MUST_NOT)
def test_not_together(point: Point, override: str) -> None:
    found = packs(runs(point, "", override, "lora.rank=3"))
    assert sorted(len(pack) for pack in found) == [1, 2]
    for pack in found:
        assert len({pack_key(run.config) for run in pack}) == 1


def test_those_that_share_most_stand_together(point: Point) -> None:
    overrides = [
        f"layer.index={block} lora.blocks={blocks} lora.rank={rank}"
        for rank in (1, 2)
        for blocks in ("after", "all")
        for block in (1, 4)
    ]
    for pack in packs(runs(point, *overrides, launcher="launcher.pack=2")):
        assert len({run.config.sae.used[0].id for run in pack}) == 1
        assert len({first_own_block(run.config) for run in pack}) == 1


def test_what_does_not_fit_together_is_apart(point: Point) -> None:
    each = [f"lora.blocks=all lora.rank=64 train.seed={seed}" for seed in range(8)]
    made = runs(point, *each)
    alone = estimate([made[0].config]).peak_bytes / 1e9
    sizes = []
    for room in (100 * alone, 3.4 * alone, 2 * alone, 0.5 * alone):
        found = packs(made, kind=LauncherKind.slurm, gpus_per_node=1, gpu_mem_gb=room)
        for pack in found:
            needed = estimate([run.config for run in pack]).peak_bytes / 1e9
            assert needed <= 0.9 * room or len(pack) == 1
        sizes.append(max(len(pack) for pack in found))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 8
    assert sizes[-1] == 1
    assert len(set(sizes)) > 2


def test_one_that_fits_nowhere_keeps_no_other_apart(point: Point) -> None:
    big, *small = made = runs(point, "lora.blocks=all lora.rank=1024", *SEEDS[:7])
    room = 1.2 * estimate([run.config for run in small]).peak_bytes / 1e9
    assert estimate([big.config]).peak_bytes / 1e9 > room
    found = packs(made, kind=LauncherKind.slurm, gpu_mem_gb=room)
    assert sorted(map(len, found)) == [1, 1, 2, 4]


def test_sharing_saves_what_is_shared(point: Point) -> None:
    """Two runs cost less than twice one: the teacher and the prefix run once for both."""
    one, other = runs(point, "lora.rank=1", "lora.rank=4")
    single = [estimate([run.config]).flops for run in (one, other)]
    together = estimate([one.config, other.config]).flops
    assert max(single) < together < 0.85 * sum(single)


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)


def places_for(made: list[Run], **settings: int) -> list[dict[str, str]]:
    return places(made, replace(made[0].config.launcher, **settings))  # pyright: ignore[reportArgumentType]


def gpus_of(made: list[Run], **settings: int) -> list[str]:
    return [place["CUDA_VISIBLE_DEVICES"] for place in places_for(made, **settings)]


def test_every_gpu_takes_one_run(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,GPU-abc")
    made = runs(point, "")
    assert gpus_of(made) == ["2", "5", "GPU-abc"]
    assert gpus_of(made, max_parallel=4) == ["2", "5", "GPU-abc", "2"]


def test_places_of_several_gpus(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    made = runs(point, "")
    assert gpus_of(made, gpus_per_node=2) == ["0,1", "2,3"]
    with pytest.raises(ConfigError, match=r"launcher\.gpus_per_node = 6"):
        places_for(made, gpus_per_node=6)
    with pytest.raises(ConfigError, match=r"launcher\.processes_per_node = 3"):
        places_for(made, gpus_per_node=2, processes_per_node=3)
    assert places_for(made, gpus_per_node=0) == [{"CUDA_VISIBLE_DEVICES": ""}]


def test_a_run_that_is_to_compute_on_the_cpu_takes_no_gpu(
    point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert places_for(runs(point, "train.device=cpu")) == [{}]


def test_runs_share_the_cores(point: Point, sixteen_cores: None) -> None:
    """Without a GPU they go one after another, with all cores, unless more are asked for."""
    made = runs(point, "")
    assert places_for(made) == [{}]
    assert places_for(made, max_parallel=3) == [{"OMP_NUM_THREADS": "5"}] * 3
    assert places_for(made, max_parallel=3, cpus_per_task=2) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert places_for(made, processes_per_node=4) == [{"OMP_NUM_THREADS": "4"}]
