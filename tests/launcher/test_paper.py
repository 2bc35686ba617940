"""The paper's experiments (arXiv 2501.19406): every point composes, and has its SAE and an estimate."""

import functools
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from huggingface_hub import constants
from rich.table import Table

from sae_lora.common.errors import NoSuchCellError
from sae_lora.config.enums import Device, LauncherKind, Suite
from sae_lora.config.execution import LauncherConfig
from sae_lora.config.identity import train_steps
from sae_lora.config.lora_targets import adapted_blocks
from sae_lora.config.schema import Config
from sae_lora.evaluation import suite_records
from sae_lora.launcher import launch as launcher
from sae_lora.launcher.packs import packed
from sae_lora.launcher.plan import Plan, Run, plan
from sae_lora.models import loading
from sae_lora.models.hookpoints import Place
from sae_lora.saes.pretrained_table import table
from sae_lora.splice.kl import room_bytes
from sae_lora.train.cost.estimate import estimate
from sae_lora.train.cost.memory import CUDA_BYTES, PROCESS_BYTES
from sae_lora.train.cost.runs import shapes
from tests.support.coders import write_cfg
from tests.support.commands import launch
from tests.support.composing import combinations, composed, each_composed
from tests.support.hub import COMMIT, serving
from tests.support.repositories import published_configs, write_configs
from tests.support.sweeps import summed_up

pytestmark = pytest.mark.slow  # many seconds in all

RANKS = (1, 4, 16, 64, 256)
GEMMA = "google/gemma-2-2b"
Cell = tuple[str, str, int, object]
"""Model, the SAE's id, rank, adapted blocks."""
CELLS: dict[str, list[Cell]] = {
    "paper_sparsity": [
        (GEMMA, f"layer_12/width_16k/average_l0_{l0}", rank, "after")
        for l0 in (22, 41, 82, 176, 445)
        for rank in RANKS
    ],
    "paper_width": [
        (GEMMA, f"layer_12/width_{width}/average_l0_{l0}", rank, "after")
        for width, l0 in (("32k", 76), ("65k", 72), ("131k", 67), ("262k", 67), ("524k", 65))
        for rank in RANKS
    ],
    "paper_layer": [
        (GEMMA, f"layer_{block}/width_16k/average_l0_{l0}", rank, "after")
        for block, l0 in ((6, 70), (9, 73), (15, 78), (18, 74))
        for rank in RANKS
    ],
    "paper_size": [
        (f"google/gemma-2-{size}", f"layer_{block}/width_131k/average_l0_{l0}", rank, "after")
        for size, block, l0 in (("9b", 20, 62), ("27b", 22, 82))
        for rank in RANKS
    ],
    "paper_block": [(GEMMA, "layer_12/width_16k/average_l0_82", 64, [block]) for block in range(13, 26)],
}
"""The cells in the paper, for each experiment around pretrained SAEs of Gemma."""
EXPERIMENTS = [*CELLS, "paper_several", "paper_downstream", "paper_timing"]
WITH_80_GB = LauncherConfig(kind=LauncherKind.slurm, gpu_mem_gb=80)
PILE, REDPAJAMA = "monology/pile-uncopyrighted", "togethercomputer/RedPajama-Data-1T-Sample"
TENTHS = [n / 10 for n in range(1, 11)]
NEW_SAES = {
    "paper_timing_gemma2_2b": (GEMMA, 2304),
    "paper_timing_llama32_1b": ("meta-llama/Llama-3.2-1B", 2048),
}
"""Models for which the experiment trains new SAEs, by the sweep's name: name and d_model."""


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Only the configs of the models are in the cache, and there is no network."""
    cache = tmp_path_factory.mktemp("cache")
    for name, config in published_configs().items():
        folder = cache / f"models--{name.replace('/', '--')}"
        config.save_pretrained(folder / "snapshots" / COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(COMMIT)

    def refuse(*_: object) -> NoReturn:
        pytest.fail("planning must not fetch anything")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(loading, "load_model", refuse)
        yield
    shapes.cache_clear()


@functools.cache
def points(experiment: str) -> list[Config]:
    """The different points of an experiment. `init_at` does not change new SAEs: one value is enough."""
    different = [
        overrides
        for overrides in combinations(experiment)
        if "init_at=0.1" in overrides or "init_at" not in str(overrides) or "_lora" in str(overrides)
    ]
    return each_composed(different, "output_dir=/nowhere")


@functools.cache
def planned(experiment: str) -> Plan:
    return plan(points(experiment))


def cell(run: Run) -> Cell:
    (sae,) = run.config.sae.used
    lora = run.config.lora
    return run.config.model.name, str(sae.id), lora.rank, lora.blocks


@pytest.mark.parametrize("experiment", CELLS)
def test_the_cells_are_those_of_the_paper(experiment: str) -> None:
    result = planned(experiment)
    assert sorted(map(repr, map(cell, result.runs))) == sorted(map(repr, CELLS[experiment]))
    assert result.notes == [] and result.waiting == []
    for run in result.runs:
        (sae,) = run.config.sae.used
        size = run.config.model.name.removeprefix("google/gemma-2-")
        entries = table()[f"gemma-scope-{size}-pt-res"]["saes"]
        listed = {entry["id"]: entry.get("l0") for entry in entries}
        assert sae.l0 == listed[str(sae.id)] == run.config.sae.l0
        assert f"layer_{sae.block}/" in str(sae.id)


def test_there_are_93_runs() -> None:
    assert [len(planned(experiment).runs) for experiment in CELLS] == [25, 25, 20, 10, 13]
    runs = [run for experiment in CELLS for run in planned(experiment).runs]
    assert len({run.folder.path for run in runs}) == sum(map(len, CELLS.values())) == 93
    assert len({run.name for run in runs}) == 93  # also without the name of the sweep


@pytest.mark.parametrize("experiment", [*CELLS, "paper_several", "paper_downstream"])
def test_the_recipe_is_that_of_the_paper(experiment: str) -> None:
    several = experiment == "paper_several"
    for run in planned(experiment).runs:
        config = run.config
        train, lora, data = config.train, config.lora, config.data
        assert train_steps(config) == (30_000 if several else 15_000)
        assert (train.batch_size, data.context_length, data.seed) == (1, 1024, 42)
        assert data.validation_tokens >= 1_000_000
        assert data.name == (REDPAJAMA if several else PILE)
        assert config.model.dtype.name == train.dtype.name == "bfloat16"
        assert (train.lr, train.schedule.name, train.grad_clip) == (5e-5, "constant", 1.0)
        assert train.kl_reduction.name == "sequence_sum"
        assert (lora.alpha, lora.dropout, lora.rank_stabilised, lora.targets) == (32, 0.1, False, "all")
        assert config.sweep == experiment


@pytest.mark.parametrize(
    ("experiment", "wanted", "field", "nearest"),
    [
        ("paper_layer", {"l0": 71.0}, "sae.l0", "70"),
        ("paper_width", {"width": "40k"}, "sae.width", 32_768),
        ("paper_several", {"width": "100k"}, "sae.width", 131_072),
    ],
)
def test_nearest_saes_are_refused(
    experiment: str, wanted: dict[str, Any], field: str, nearest: object
) -> None:
    with pytest.raises(NoSuchCellError) as error:
        plan([replace(point, sae=replace(point.sae, **wanted)) for point in points(experiment)])
    assert (error.value.field, error.value.nearest) == (field, nearest)


def test_several_saes_are_at_every_jth_block() -> None:
    """As published: the first SAE is at block j; with j = 1, at block 0."""
    configs = [run.config for run in planned("paper_several").runs]
    blocks = [[sae.block for sae in config.sae.used] for config in configs]
    assert blocks == [list(range(j if j > 1 else 0, 32, j)) for j in (1, 2, 3, 4, 6, 8, 12, 16)]
    for config in configs:
        assert (config.lora.rank, config.lora.blocks) == (64, "all")
        assert all(sae.release == "llama_scope_lxr_32x" for sae in config.sae.used)
        assert all((sae.id, sae.width) == (f"l{sae.block}r_32x", 131_072) for sae in config.sae.used)


def test_downstream_runs_ask_for_every_suite_of_the_paper() -> None:
    runs = planned("paper_downstream").runs
    assert {cell(run) for run in runs} == {
        (GEMMA, "layer_12/width_16k/average_l0_82", 64, "after"),
        (GEMMA, "layer_12/width_16k/average_l0_82", 1, "after"),
        ("google/gemma-2-9b", "layer_20/width_131k/average_l0_62", 64, "after"),
    }
    assert len(runs) == 3
    for run in runs:
        evaluation = vars(run.config.evaluation)
        suites = suite_records.applicable(evaluation["suites"], {"method": {"kind": "lora"}}, evaluation)
        assert set(suites) == set(Suite) - {Suite.downstream, Suite.latents, Suite.circuits}
    # They are runs of other experiments, with more suites.
    scaling = {run.name for name in ("paper_sparsity", "paper_size") for run in planned(name).runs}
    assert {run.name for run in runs} <= scaling


def test_new_saes_come_first() -> None:
    result = planned("paper_timing")
    assert len(combinations("paper_timing")) == 60
    assert (len(result.runs), len(result.waiting)) == (4, 20)
    for run in result.runs:
        config = run.config
        name, d_model = NEW_SAES[config.sweep]
        (sae,) = config.sae.used
        assert (config.model.name, sae.block, sae.width, sae.l0) == (name, 12, 8 * d_model, 64)
        assert config.sae.architecture.name == "topk"
        assert config.train.train_tokens == {GEMMA: 2e9}.get(name, 4e9)
        # The published code: 2e-4 for 2^14 latents, 1,000 warm-up steps, one sequence per step.
        assert config.train.lr == pytest.approx(2e-4 * (2**14 / (8 * d_model)) ** 0.5, rel=1e-3)
        assert config.train.warmup_share * train_steps(config) == pytest.approx(1000, abs=1)
        assert train_steps(config) == -(-config.train.train_tokens // 1024)
        shares = TENTHS[:-1] if config.method.kind.name == "sae" else []
        assert config.method.checkpoints == shares
    for config in result.waiting:
        assert (config.init, config.lora.rank, config.lora.blocks) == ("sae", 64, "all")
        assert train_steps(config) == 15_000
    for config in (*(run.config for run in result.runs), *result.waiting):
        assert config.model.dtype.name == config.train.dtype.name == "float32"
        assert config.data.name == REDPAJAMA
        assert config.launcher.pack == "off"


FINISHED_WIDTH = 64
"""Number of latents of the SAEs that `finish` writes: 8 · d_model would take gigabytes."""


def finish(run: Run, d_model: int) -> None:
    """Write the files of a finished run of method=sae that planning reads."""
    run.freeze()
    folders = [run.folder.sae_at / f"{at:g}" for at in TENTHS[:-1]]
    for number, parent in enumerate((*folders, run.folder.sae)):
        folder = parent / "blocks.12.hook_resid_post"
        hook = {"hook_name": "blocks.12.hook_resid_post"}
        size = {"d_in": d_model, "d_sae": FINISHED_WIDTH}
        write_cfg(folder, number, architecture="topk", **size, k=64, metadata=hook)
    summed_up(run.folder)


@pytest.fixture(scope="module")
def timing_plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """The plan of `paper_timing` when its SAEs are trained."""
    home = tmp_path_factory.mktemp("outputs")
    moved = [replace(point, output_dir=str(home)) for point in points("paper_timing")]
    for run in plan(moved).runs:
        if run.config.method.kind.name == "sae":
            finish(run, NEW_SAES[run.config.sweep][1])
    return plan(moved)


def test_ten_lora_runs_follow_each_new_sae(timing_plan: Plan) -> None:
    assert timing_plan.waiting == []
    assert len({run.name for run in timing_plan.runs}) == len(timing_plan.runs) == 24
    for sweep, (name, _) in NEW_SAES.items():
        configs = [run.config for run in timing_plan.runs if run.config.sweep == sweep]
        assert {config.model.name for config in configs} == {name}
        lora = [config for config in configs if config.init]
        assert [config.init_at for config in lora] == TENTHS
        assert len({config.sae.used[0].sha256 for config in lora}) == 10
        assert {config.sae.used[0].width for config in lora} == {FINISHED_WIDTH}


def test_steering_also_uses_a_new_sae(timing_plan: Plan) -> None:
    """With `init`, as in the experiment's file; rank 1 on the blocks after the SAE, 13 to 25."""
    (sae_run,) = [
        run
        for run in timing_plan.runs
        if run.config.method.kind.name == "sae" and run.config.model.name == GEMMA
    ]
    steering = "experiment=paper_downstream", "variant=paper_downstream/steering"
    (run,) = plan([composed(*steering, f"init={sae_run.folder.path}", "output_dir=/nowhere")]).runs
    (sae,) = run.config.sae.used
    path = str(sae_run.folder.sae / str(Place.of(sae)))
    assert (sae.block, sae.width, sae.path) == (12, FINISHED_WIDTH, path)
    assert run.config.lora.rank == 1
    assert adapted_blocks(run.config.lora.blocks, sae.block, 26) == list(range(13, 26))


PARAMETERS = {
    GEMMA: 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}
"""Published numbers of parameters."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_estimates_use_models_of_the_real_size_without_memory(name: str) -> None:
    weights = list(shapes(name, None).model.parameters())
    assert sum(weight.numel() for weight in weights) == PARAMETERS[name]
    assert all(weight.is_meta for weight in weights)


def test_the_estimate_of_a_point_by_hand() -> None:
    """Gemma-2-2B, 16k latents after block 12, rank 1: the formulas of train/cost in numbers."""
    wanted = GEMMA, "layer_12/width_16k/average_l0_82", 1, "after"
    (config,) = [run.config for run in planned("paper_sparsity").runs if cell(run) == wanted]
    config.launcher.kind, config.launcher.gpus_per_node = LauncherKind.slurm, 1
    result = estimate([config])
    d_model, heads, keys, inner, d_vocab = 2304, 2048, 1024, 9216, 256_000
    latents, context = 16_384, 1024

    matrices = d_model * (2 * heads + 2 * keys + 3 * inner)
    forward = 2 * matrices + 4 * context * heads
    backward = 2 * matrices + 8 * context * heads
    ends = 2 * (d_model + heads) + 2 * (d_model + keys) + 3 * (d_model + inner)
    # Teacher and student share the first 13 blocks. On a GPU, an SAE of 16k latents is dense.
    blocks = 26 * forward + 13 * (forward + backward)
    heads_of_models = 3 * 2 * d_model * d_vocab
    per_token = blocks + heads_of_models + 4 * d_model * latents + 6 * 13 * ends
    assert result.adapter_weights == 13 * ends == 648_960
    assert result.flops == per_token * context * 15_000 == pytest.approx(1.895e17, rel=1e-3)

    model = 2 * PARAMETERS[GEMMA]
    sae = 4 * 2 * d_model * latents
    logits = room_bytes(4096, None, d_vocab, "cuda")
    # Compiled blocks keep what their matrices write, what attention gives, and the residual stream; and
    # for each adapted matrix what dropout leaves of its input, with the mask.
    written = heads + 2 * keys + d_model + 2 * inner + d_model
    block_bytes = 2 * (written + heads + d_model) + (2 + 1) * (5 * d_model + heads + inner)
    graph = context * 13 * block_bytes
    at_least = CUDA_BYTES + model + sae + (16 + 2 - 4) * 13 * ends + logits + graph
    assert at_least < result.peak_bytes < 1.3 * at_least

    # On a CPU, more is needed while the float32 files are loaded as bfloat16.
    config.train.device = Device.cpu
    assert estimate([config]).peak_bytes == PROCESS_BYTES + (4 + 2) * PARAMETERS[GEMMA]


def estimated(configs: Sequence[Config], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The rows of the table of `launcher.dry_run=true`, as dictionaries by column."""
    shown: list[Table] = []
    monkeypatch.setattr(launcher, "show", shown.append)
    monkeypatch.setattr(launcher, "say", lambda text: None)
    monkeypatch.setattr(launcher.slurm, "check_partition", lambda partition: None)
    settings = replace(
        configs[0].launcher, kind=WITH_80_GB.kind, gpu_mem_gb=80.0, timeout_min=60, dry_run=True
    )
    assert launcher.launch([replace(config, launcher=settings) for config in configs]) == 0
    names = [str(column.header) for column in shown[0].columns]
    rows = zip(*(column.cells for column in shown[0].columns), strict=True)
    return [dict(zip(names, map(str, row), strict=True)) for row in rows]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_dry_run_estimates_every_run(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = estimated(points(experiment), monkeypatch)
    assert [row["run"] for row in rows] == [run.name for run in planned(experiment).runs]
    for row in rows:
        assert row["state"] == "new"
        assert float(row["training FLOPs"]) > 1e16
        assert float(row["peak memory"].removesuffix(" GB")) > 4
        assert int(row["trained weights"].replace(",", "")) > 0


def test_a_dry_run_estimates_runs_that_waited(
    timing_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = estimated([run.config for run in timing_plan.runs], monkeypatch)
    assert [row["state"] for row in rows].count("done") == 2
    assert len(rows) == 24 and all(float(row["training FLOPs"]) > 1e16 for row in rows)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_all_runs_fit_80_gb_except_an_sae_at_every_block_of_8b(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # logits get more memory on a GPU
    runs = planned(experiment).runs
    packs = packed(runs, replace(WITH_80_GB, pack=runs[0].config.launcher.pack))
    pack_costs = [estimate([run.config for run in pack]) for pack in packs]
    run_costs = [estimate([run.config]) for run in runs]
    assert sum(map(len, packs)) == len(runs)
    saved = sum(run.flops for run in run_costs) - sum(pack.flops for pack in pack_costs)
    assert saved > 0 if len(packs) < len(runs) else saved == 0
    larger = [pack for pack, total in zip(packs, pack_costs, strict=True) if total.peak_bytes > 80e9]
    assert [[len(run.config.sae.used) for run in pack] for pack in larger] == (
        [[32]] if experiment == "paper_several" else []
    )


@pytest.mark.slow
def test_the_command_in_a_process(tmp_path: Path) -> None:
    """With Hydra's sweeper, against a hub that only has the configs of the models."""
    write_configs(tmp_path / "hub")
    options = "launcher.dry_run=true", "tracking=disabled", f"output_dir={tmp_path}/outputs"
    with serving(tmp_path / "hub") as hub:
        variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": None}
        finished = launch("experiment=paper_timing", "init_at=0.1,1", *options, **variables)
    assert finished.returncode == 0, finished.stderr
    assert "4 points are duplicates of other points" in finished.stdout
    assert "4 points will start after these runs" in finished.stdout
    assert "4 runs: 4 new" in finished.stdout
    fetched = {line.split()[1].rsplit("/", 1)[-1] for line in hub.requests if "/resolve/" in line}
    assert fetched == {"config.json"}
    assert not (tmp_path / "outputs").exists()
