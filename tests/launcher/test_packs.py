"""Packs contain runs that may train together and fit into memory; each pack gets a slot."""

import os
from dataclasses import replace

import pytest

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import LauncherKind
from sae_lora.config.identity import pack_key
from sae_lora.launcher import packs
from sae_lora.launcher.packs import divides, packed, slots, too_large
from sae_lora.launcher.plan import Pack, Run, plan
from sae_lora.train.cost.estimate import estimate
from sae_lora.train.cost.runs import first_own_block
from tests.support.points import Point


def plan_runs(point: Point, *overrides: str, launcher: str = "") -> list[Run]:
    """A run for each of the overrides, all with the given launcher settings."""
    return plan([point(*words.split(), *launcher.split()) for words in overrides]).runs


def pack_runs(runs: list[Run], **settings: object) -> list[Pack]:
    packs = packed(runs, replace(runs[0].config.launcher, **settings))  # pyright: ignore[reportArgumentType]
    assert sorted(run.name for pack in packs for run in pack) == sorted(run.name for run in runs)
    return packs


SEEDS = [f"train.seed={seed}" for seed in range(11)]


def test_pack_sizes(point: Point) -> None:
    runs = plan_runs(point, *SEEDS)
    expected = {"auto": [5, 6], "off": [1] * 11, 1: [1] * 11, 3: [2, 3, 3, 3], 99: [11]}
    for pack, sizes in expected.items():
        assert sorted(map(len, pack_runs(runs, pack=pack))) == sizes


def test_every_slot_gets_a_pack(point: Point) -> None:
    runs = plan_runs(point, *SEEDS[:6], launcher="launcher.max_parallel=3")
    assert [len(pack) for pack in pack_runs(runs)] == [2, 2, 2]
    runs = plan_runs(point, *SEEDS[:2], launcher="launcher.max_parallel=3")
    assert [len(pack) for pack in pack_runs(runs)] == [1, 1]


@pytest.mark.parametrize(("rates", "sizes"), [(3, [6, 6]), (6, [6] * 4), (5, [5] * 4), (10, [5] * 8)])
def test_runs_that_compete_share_a_pack(point: Point, rates: int, sizes: list[int]) -> None:
    """As far as packs of eight allow."""
    every = [f"train.lr={1e-4 * number}" for number in range(1, rates + 1)]
    words = [f"{rate} lora.rank={rank}" for rate in every for rank in (1, 2, 4, 8)]
    runs = plan_runs(point, *words, launcher="launcher.halving=train.lr")
    packs = pack_runs(runs)
    assert [len(pack) for pack in packs] == sizes
    of_rank = [[run.config.lora.rank for run in pack] for pack in packs]
    assert max(len({*ranks}) for ranks in of_rank) == (2 if rates == 3 else 1)


def test_every_slot_gets_runs_also_if_they_compete(point: Point) -> None:
    words = [f"train.lr={1e-4 * number}" for number in range(1, 10)]
    runs = plan_runs(point, *words, launcher="launcher.halving=train.lr launcher.max_parallel=8")
    assert sorted(map(len, pack_runs(runs))) == [1] * 7 + [2]


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
    "train.seed=7 train.checkpoint_every_min=null",
)
MUST_NOT_DIFFER = (
    "data.seed=1",
    "data.context_length=64",
    "train.train_tokens=2048",
    "train.batch_size=2",
    "train.dtype=bfloat16",
    "model.dtype=bfloat16",
    "train.eval_every_tokens=256",
)


@pytest.mark.parametrize("override", MAY_DIFFER)
def test_runs_that_share_a_pack(point: Point, override: str) -> None:
    assert len(pack_runs(plan_runs(point, "", override))) == 1


@pytest.mark.parametrize("override", MUST_NOT_DIFFER)
def test_runs_that_cannot_share_a_pack(point: Point, override: str) -> None:
    packs = pack_runs(plan_runs(point, "", override, "lora.rank=3"))
    assert sorted(len(pack) for pack in packs) == [1, 2]
    for pack in packs:
        assert len({pack_key(run.config) for run in pack}) == 1


def test_runs_that_share_most_work_are_packed_together(point: Point) -> None:
    overrides = [
        f"layer.index={block} lora.blocks={blocks} lora.rank={rank}"
        for rank in (1, 2)
        for blocks in ("after", "all")
        for block in (1, 4)
    ]
    for pack in pack_runs(plan_runs(point, *overrides, launcher="launcher.pack=2")):
        assert len({run.config.sae.used[0].id for run in pack}) == 1
        assert len({first_own_block(run.config) for run in pack}) == 1


def test_packs_fit_into_memory(point: Point) -> None:
    overrides = [f"lora.blocks=all lora.rank=64 train.seed={seed}" for seed in range(8)]
    runs = plan_runs(point, *overrides)
    sizes = []
    for size in (8, 4, 2, 1):
        memory = 1.01 * estimate([run.config for run in runs[:size]]).peak_bytes / 0.9e9
        packs = pack_runs(runs, kind=LauncherKind.slurm, gpus_per_node=1, gpu_mem_gb=memory)
        for pack in packs:
            needed = estimate([run.config for run in pack]).peak_bytes / 1e9
            assert needed <= 0.9 * memory
        sizes.append(max(len(pack) for pack in packs))
    assert sizes == [8, 4, 2, 1]
    too_little = 0.5 * estimate([runs[0].config]).peak_bytes / 1e9
    packs = pack_runs(runs, kind=LauncherKind.slurm, gpus_per_node=1, gpu_mem_gb=too_little)
    assert max(map(len, packs)) == 1


def test_a_run_that_fits_nowhere_does_not_split_other_packs(point: Point) -> None:
    big, *small = runs = plan_runs(point, "lora.blocks=all lora.rank=1024", *SEEDS[:7])
    memory = 1.2 * estimate([run.config for run in small]).peak_bytes / 1e9
    assert estimate([big.config]).peak_bytes / 1e9 > memory
    packs = pack_runs(runs, kind=LauncherKind.slurm, gpu_mem_gb=memory)
    assert sorted(map(len, packs)) == [1, 1, 2, 4]


def test_a_pack_costs_less_than_its_runs_alone(point: Point) -> None:
    """The teacher and the shared prefix run once for both runs."""
    runs = plan_runs(point, "lora.rank=1", "lora.rank=4")
    single = [estimate([run.config]).flops for run in runs]
    together = estimate([run.config for run in runs]).flops
    assert max(single) < together < 0.85 * sum(single)


@pytest.fixture
def sixteen_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)


def slots_for(runs: list[Run], **settings: int) -> list[dict[str, str]]:
    return slots(runs, replace(runs[0].config.launcher, **settings))  # pyright: ignore[reportArgumentType]


def gpus_of(runs: list[Run], **settings: int) -> list[str]:
    return [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_for(runs, **settings)]


def test_each_gpu_is_a_slot(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 5,GPU-abc")
    runs = plan_runs(point, "")
    assert gpus_of(runs) == ["2", "5", "GPU-abc"]
    assert gpus_of(runs, max_parallel=4) == ["2", "5", "GPU-abc", "2"]


def test_slots_of_several_gpus(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    runs = plan_runs(point, "")
    assert gpus_of(runs, gpus_per_node=2) == ["0,1", "2,3"]
    with pytest.raises(ConfigError, match=r"launcher\.gpus_per_node = 6"):
        slots_for(runs, gpus_per_node=6)
    with pytest.raises(ConfigError, match=r"launcher\.processes_per_node = 3"):
        slots_for(runs, gpus_per_node=2, processes_per_node=3)
    assert slots_for(runs, gpus_per_node=0) == [{"CUDA_VISIBLE_DEVICES": ""}]


def test_a_run_on_the_cpu_takes_no_gpu(point: Point, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert slots_for(plan_runs(point, "train.device=cpu")) == [{}]


def test_runs_share_the_cores(point: Point, sixteen_cores: None) -> None:
    """Without a GPU, runs go one after another with all cores, unless the config asks for more slots."""
    runs = plan_runs(point, "")
    assert slots_for(runs) == [{}]
    assert slots_for(runs, max_parallel=3) == [{"OMP_NUM_THREADS": "5"}] * 3
    assert slots_for(runs, max_parallel=3, cpus_per_task=2) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert slots_for(runs, processes_per_node=4) == [{"OMP_NUM_THREADS": "4"}]


def test_the_list_of_gpus_ends_before_a_name_that_is_none(
    point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA reads it."""
    runs = plan_runs(point, "")
    for names, gpus in (
        ("-1", []),
        ("0,-1,1", ["0"]),
        ("NoDevFiles", []),
        ("MIG-a,GPU-b", ["MIG-a", "GPU-b"]),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
        assert [slot.get("CUDA_VISIBLE_DEVICES") for slot in slots_for(runs)] == (gpus or [None])


ON_GPUS = "launcher=slurm", "launcher.gpus_per_node=2", "train.batch_size=4"


def test_a_model_is_divided_if_a_run_alone_does_not_fit(
    point: Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run,) = plan_runs(point, " ".join(ON_GPUS))
    settings = run.config.launcher
    assert not divides([run], settings)
    assert divides([run], replace(settings, shard="on"))
    whole = estimate([run.config]).peak_bytes
    monkeypatch.setattr(packs, "_free_bytes", lambda *_: whole)  # not all of it is used
    assert divides([run], settings)
    assert not divides([run], replace(settings, shard="off"))
    assert not divides([run], replace(settings, gpus_per_node=1))
    assert estimate([run.config], True).peak_bytes < whole


def test_a_run_that_is_too_large_is_noted(point: Point) -> None:
    (run,) = plan_runs(point, "launcher=slurm")
    assert too_large([[run]], run.config.launcher) == []
    (note,) = too_large([[run]], replace(run.config.launcher, gpu_mem_gb=0.3))
    assert "and a GPU has 0.3 GB: launcher.gpus_per_node=2 launcher.shard=on" in note


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        (("launcher.shard=on",), "launcher.shard"),
        (("launcher.shard=perhaps",), "launcher.shard"),
        ((*ON_GPUS, "launcher.shard=on", "train.batch_size=5"), "train.batch_size"),
        ((*ON_GPUS, "launcher.shard=on", "lora.dora=true"), "lora.dora"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(
    overrides: tuple[str, ...], field: str, point: Point
) -> None:
    with pytest.raises(ConfigError) as refusal:
        point(*overrides)
    assert refusal.value.field == field
