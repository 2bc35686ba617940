"""The paper's evaluation (arXiv 2501.19406): every point composes, and has its SAE and a price."""

import functools
import json
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
from sae_lora.config.enums import LauncherKind, Suite
from sae_lora.config.identity import train_steps
from sae_lora.config.lora_targets import adapted_blocks
from sae_lora.config.schema import Config, LauncherConfig
from sae_lora.evaluation import suite_records
from sae_lora.launcher import launch as launcher
from sae_lora.launcher.packs import packed
from sae_lora.launcher.plan import Plan, Run, plan
from sae_lora.models import loading
from sae_lora.models.hookpoints import Place
from sae_lora.saes.pretrained_table import table
from sae_lora.splice.kl import room_bytes
from sae_lora.train import cost
from tests.support.commands import launch
from tests.support.composing import combinations, composed, each_composed
from tests.support.hub import COMMIT, serving
from tests.support.repositories import published_configs, write_configs

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
"""What stands in the paper, of each experiment around pretrained SAEs of Gemma."""
EXPERIMENTS = [*CELLS, "paper_several", "paper_downstream", "paper_timing"]
OF_80_GB = LauncherConfig(kind=LauncherKind.slurm, gpu_mem_gb=80)
PILE, REDPAJAMA = "monology/pile-uncopyrighted", "togethercomputer/RedPajama-Data-1T-Sample"
TENTHS = [n / 10 for n in range(1, 11)]
OWN = {
    "paper_timing_gemma2_2b": (GEMMA, 2304),
    "paper_timing_llama32_1b": ("meta-llama/Llama-3.2-1B", 2048),
}
"""By the folder of its runs: a model with SAEs of its own, and its width."""


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The models' configs are in the cache, nothing else is, and there is no network."""
    cache = tmp_path_factory.mktemp("cache")
    for name, config in published_configs().items():
        folder = cache / f"models--{name.replace('/', '--')}"
        config.save_pretrained(folder / "snapshots" / COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text(COMMIT)

    def refuse(*_: object) -> NoReturn:
        pytest.fail("planning asks for nothing")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(loading, "load_model", refuse)
        yield
    cost._shapes.cache_clear()


@functools.cache
def points(experiment: str) -> list[Config]:
    """Of its combinations, each that means something of its own: `init_at` is nothing to a new SAE."""
    asked = [
        those
        for those in combinations(experiment)
        if "init_at=0.1" in those or "init_at" not in str(those) or "_lora" in str(those)
    ]
    return each_composed(asked, "output_dir=/nowhere")


@functools.cache
def planned(experiment: str) -> Plan:
    return plan(points(experiment))


def cell(run: Run) -> Cell:
    (sae,) = run.config.sae.used
    lora = run.config.lora
    return run.config.model.name, str(sae.id), lora.rank, lora.blocks


@pytest.mark.parametrize("experiment", CELLS)
def test_its_cells_are_the_papers(experiment: str) -> None:
    found = planned(experiment)
    assert sorted(map(repr, map(cell, found.runs))) == sorted(map(repr, CELLS[experiment]))
    assert found.notes == [] and found.waiting == []
    for run in found.runs:
        (sae,) = run.config.sae.used
        size = run.config.model.name.removeprefix("google/gemma-2-")
        listed = {one["id"]: one.get("l0") for one in table()[f"gemma-scope-{size}-pt-res"]["saes"]}
        assert sae.l0 == listed[str(sae.id)] == run.config.sae.l0
        assert f"layer_{sae.block}/" in str(sae.id)


def test_they_are_93() -> None:
    assert [len(planned(experiment).runs) for experiment in CELLS] == [25, 25, 20, 10, 13]
    runs = [run for experiment in CELLS for run in planned(experiment).runs]
    assert len({run.folder.path for run in runs}) == sum(map(len, CELLS.values())) == 93
    assert len({run.name for run in runs}) == 93  # whatever sweep they are of


@pytest.mark.parametrize("experiment", [*CELLS, "paper_several", "paper_downstream"])
def test_the_recipe_is_the_papers(experiment: str) -> None:
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
    ("experiment", "asked", "field", "nearest"),
    [
        ("paper_layer", {"l0": 71.0}, "sae.l0", "70"),
        ("paper_width", {"width": "40k"}, "sae.width", 32_768),
        ("paper_several", {"width": "100k"}, "sae.width", 131_072),
    ],
)
def test_what_is_merely_near_is_refused(
    experiment: str, asked: dict[str, Any], field: str, nearest: object
) -> None:
    with pytest.raises(NoSuchCellError) as error:
        plan([replace(one, sae=replace(one.sae, **asked)) for one in points(experiment)])
    assert (error.value.field, error.value.nearest) == (field, nearest)


def test_several_are_at_every_jth_block() -> None:
    """As published: from block j on, and with j = 1 at every block."""
    runs = [run.config for run in planned("paper_several").runs]
    blocks = [[sae.block for sae in one.sae.used] for one in runs]
    assert blocks == [list(range(j if j > 1 else 0, 32, j)) for j in (1, 2, 3, 4, 6, 8, 12, 16)]
    for one in runs:
        assert (one.lora.rank, one.lora.blocks) == (64, "all")
        assert all(sae.release == "llama_scope_lxr_32x" for sae in one.sae.used)
        assert all((sae.id, sae.width) == (f"l{sae.block}r_32x", 131_072) for sae in one.sae.used)


def test_downstream_runs_are_measured_in_every_way() -> None:
    found = planned("paper_downstream").runs
    assert {cell(run) for run in found} == {
        (GEMMA, "layer_12/width_16k/average_l0_82", 64, "after"),
        (GEMMA, "layer_12/width_16k/average_l0_82", 1, "after"),
        ("google/gemma-2-9b", "layer_20/width_131k/average_l0_62", 64, "after"),
    }
    assert len(found) == 3
    for run in found:
        asked = vars(run.config.evaluation)
        every = suite_records.applicable(asked["suites"], {"method": {"kind": "lora"}}, asked)
        assert set(every) == set(Suite) - {Suite.downstream}
    # They are runs of the other experiments, but for what is measured of them.
    others = {run.name for name in ("paper_sparsity", "paper_size") for run in planned(name).runs}
    assert {run.name for run in found} <= others


def test_own_saes_come_first() -> None:
    found = planned("paper_timing")
    assert len(combinations("paper_timing")) == 60
    assert (len(found.runs), len(found.waiting)) == (4, 20)
    for run in found.runs:
        config = run.config
        name, d_model = OWN[config.sweep]
        (sae,) = config.sae.used
        assert (config.model.name, sae.block, sae.width, sae.l0) == (name, 12, 8 * d_model, 64)
        assert config.sae.architecture.name == "topk"
        assert config.train.train_tokens == {GEMMA: 2e9}.get(name, 4e9)
        # The published code: 2e-4 for 2^14 latents, 1,000 steps of warming up, one sequence a step.
        assert config.train.lr == pytest.approx(2e-4 * (2**14 / (8 * d_model)) ** 0.5, rel=1e-3)
        assert config.train.warmup_share * train_steps(config) == pytest.approx(1000, abs=1)
        assert train_steps(config) == -(-config.train.train_tokens // 1024)
        kept = TENTHS[:-1] if config.method.kind.name == "sae" else []
        assert config.method.checkpoints == kept
    for one in found.waiting:
        assert (one.init, one.lora.rank, one.lora.blocks) == ("sae", 64, "all")
        assert train_steps(one) == 15_000
    for one in (*(run.config for run in found.runs), *found.waiting):
        assert one.model.dtype.name == one.train.dtype.name == "float32"
        assert one.data.name == REDPAJAMA
        assert one.launcher.pack == "off"


def finish(run: Run, d_model: int) -> None:
    """Leaves what a finished run of method=sae leaves, as far as planning reads it."""
    run.freeze()
    folders = [run.folder.sae_at / f"{at:g}" for at in TENTHS[:-1]]
    for number, made in enumerate((*folders, run.folder.sae)):
        folder = made / "blocks.12.hook_resid_post"
        folder.mkdir(parents=True)
        hook = {"hook_name": "blocks.12.hook_resid_post"}
        says = {"architecture": "topk", "d_in": d_model, "d_sae": 8 * d_model, "k": 64, "metadata": hook}
        (folder / "cfg.json").write_text(json.dumps(says))
        (folder / "sae_weights.safetensors").write_text(f"only hashed, {number}")
    run.folder.summary.write_text("{}")


@pytest.fixture(scope="module")
def around_own(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """All of the timing, its SAEs being there."""
    home = tmp_path_factory.mktemp("outputs")
    asked = [replace(one, output_dir=str(home)) for one in points("paper_timing")]
    for run in plan(asked).runs:
        if run.config.method.kind.name == "sae":
            finish(run, OWN[run.config.sweep][1])
    return plan(asked)


def test_then_come_ten_around_each(around_own: Plan) -> None:
    assert around_own.waiting == []
    assert len({run.name for run in around_own.runs}) == len(around_own.runs) == 24
    for sweep, (name, d_model) in OWN.items():
        runs = [run.config for run in around_own.runs if run.config.sweep == sweep]
        assert {one.model.name for one in runs} == {name}
        around = [one for one in runs if one.init]
        assert [one.init_at for one in around] == TENTHS
        assert len({one.sae.used[0].sha256 for one in around}) == 10
        assert {one.sae.used[0].width for one in around} == {8 * d_model}


def test_steering_goes_around_an_own_sae_too(around_own: Plan) -> None:
    """With `init`, as the experiment's file says it; rank 1 on the blocks after it, 13 to 25."""
    (before,) = [
        run
        for run in around_own.runs
        if run.config.method.kind.name == "sae" and run.config.model.name == GEMMA
    ]
    asked = "experiment=paper_downstream", "variant=paper_downstream/steering"
    (run,) = plan([composed(*asked, f"init={before.folder.path}", "output_dir=/nowhere")]).runs
    (sae,) = run.config.sae.used
    assert (sae.block, sae.width, sae.path) == (12, 18_432, str(before.folder.sae / str(Place.of(sae))))
    assert run.config.lora.rank == 1
    assert adapted_blocks(run.config.lora.blocks, sae.block, 26) == list(range(13, 26))


PARAMETERS = {
    GEMMA: 2_614_341_888,
    "google/gemma-2-9b": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
}
"""As published."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_models_are_priced_in_their_own_size_and_hold_nothing(name: str) -> None:
    weights = list(cost._shapes(name, None).model.parameters())
    assert sum(weight.numel() for weight in weights) == PARAMETERS[name]
    assert all(weight.is_meta for weight in weights)


def test_the_price_of_a_point_by_hand() -> None:
    """Gemma-2-2B, 16k latents after block 12, rank 1: the formulas of estimate.py, number by number."""
    asked = GEMMA, "layer_12/width_16k/average_l0_82", 1, "after"
    (config,) = [run.config for run in planned("paper_sparsity").runs if cell(run) == asked]
    found = cost.estimate([config])
    d_model, heads, keys, inner, d_vocab = 2304, 2048, 1024, 9216, 256_000
    latents, context = 16_384, 1024

    matrices = d_model * (2 * heads + 2 * keys + 3 * inner)
    forward = 2 * matrices + 4 * context * heads
    backward = 2 * matrices + 8 * context * heads
    ends = 2 * (d_model + heads) + 2 * (d_model + keys) + 3 * (d_model + inner)
    # The student's first 13 blocks are the teacher's; its SAE is sparse, from 16k latents on.
    blocks = 26 * forward + 13 * (forward + backward)
    heads_of_models = 3 * 2 * d_model * d_vocab
    per_token = blocks + heads_of_models + 2 * d_model * latents + 6 * 13 * ends
    assert found.adapter_weights == 13 * ends == 648_960
    assert found.flops == per_token * context * 15_000 == pytest.approx(1.883e17, rel=1e-3)

    model = 2 * PARAMETERS[GEMMA]
    sae = 4 * 2 * d_model * latents
    # With dropout, what an adapted matrix reads is kept in float32 too, and rank numbers beside it.
    of_a_block = 2 * ends + 4 * (5 * d_model + heads + inner) + 4 * 7
    graph = context * (13 * of_a_block + 2 * 6 * d_model)
    assert graph > 4 * 3 * 4096 * latents  # the codes of an evaluation's batch
    logits = room_bytes(4096, None, d_vocab, "cuda" if torch.cuda.is_available() else "cpu")
    assert found.peak_bytes == model + sae + 16 * 13 * ends + logits + graph


def priced(asked: Sequence[Config], monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The table of `launcher.dry_run=true`, by its columns."""
    shown: list[Table] = []
    monkeypatch.setattr(launcher, "show", shown.append)
    monkeypatch.setattr(launcher, "say", lambda text: None)
    monkeypatch.setattr(launcher.slurm, "check_partition", lambda partition: None)
    settings = replace(
        asked[0].launcher, kind=OF_80_GB.kind, gpu_mem_gb=80.0, timeout_min=60, dry_run=True
    )
    assert launcher.launch([replace(one, launcher=settings) for one in asked]) == 0
    names = [str(column.header) for column in shown[0].columns]
    rows = zip(*(column.cells for column in shown[0].columns), strict=True)
    return [dict(zip(names, map(str, row), strict=True)) for row in rows]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_dry_run_prices_each(experiment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = priced(points(experiment), monkeypatch)
    assert [row["run"] for row in rows] == [run.name for run in planned(experiment).runs]
    for row in rows:
        assert row["state"] == "new"
        assert float(row["training FLOPs"]) > 1e16
        assert float(row["peak memory"].removesuffix(" GB")) > 4
        assert int(row["trained weights"].replace(",", "")) > 0


def test_a_dry_run_prices_what_waited(around_own: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = priced([run.config for run in around_own.runs], monkeypatch)
    assert [row["state"] for row in rows].count("done") == 2
    assert len(rows) == 24 and all(float(row["training FLOPs"]) > 1e16 for row in rows)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_all_fit_80_gb_but_an_sae_at_every_block_of_8b(
    experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # logits have more room on a GPU
    runs = planned(experiment).runs
    packs = packed(runs, replace(OF_80_GB, pack=runs[0].config.launcher.pack))
    prices = [cost.estimate([run.config for run in pack]) for pack in packs]
    alone = [cost.estimate([run.config]) for run in runs]
    assert sum(map(len, packs)) == len(runs)
    saved = sum(price.flops for price in alone) - sum(price.flops for price in prices)
    assert saved > 0 if len(packs) < len(runs) else saved == 0
    larger = [pack for pack, price in zip(packs, prices, strict=True) if price.peak_bytes > 80e9]
    assert [[len(run.config.sae.used) for run in pack] for pack in larger] == (
        [[32]] if experiment == "paper_several" else []
    )


@pytest.mark.slow
def test_the_command_itself(tmp_path: Path) -> None:
    """Through Hydra's own sweeper, against a hub that has the models' configs and nothing else."""
    write_configs(tmp_path / "hub")
    asked = "launcher.dry_run=true", "tracking=disabled", f"output_dir={tmp_path}/outputs"
    with serving(tmp_path / "hub") as hub:
        places = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": None}
        finished = launch("experiment=paper_timing", *asked, **places)
    assert finished.returncode == 0, finished.stderr
    assert "36 points mean the same run as another" in finished.stdout
    assert "20 points will follow" in finished.stdout
    assert "4 runs: 4 new" in finished.stdout
    fetched = {line.split()[1].rsplit("/", 1)[-1] for line in hub.requests if "/resolve/" in line}
    assert fetched == {"config.json"}
    assert not (tmp_path / "outputs").exists()
