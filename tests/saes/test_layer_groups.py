"""layer=groups: the blocks that share an SAE, its training, and the runs that start from it."""

import functools
import itertools
import json
import math
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

import sae_lora
from sae_lora.common.errors import ConfigError
from sae_lora.common.isolation import Isolation
from sae_lora.config.enums import DType, Hook
from sae_lora.config.identity import train_steps
from sae_lora.config.schema import Config
from sae_lora.config.serialize import load
from sae_lora.config.validate import check
from sae_lora.data import corpus
from sae_lora.launcher.plan import plan
from sae_lora.models import language_model, loading
from sae_lora.models.dimensions import read_dimensions
from sae_lora.models.hookpoints import resid_post
from sae_lora.records.folder import RunFolder
from sae_lora.run.active_run import ActiveRun
from sae_lora.run.build import Builder
from sae_lora.saes import layer_groups
from sae_lora.saes.loading import SAEs
from sae_lora.splice.mlp_input import Stream
from sae_lora.splice.positions import Special
from sae_lora.train.distributed import ProcessGroup
from sae_lora.train.reconstruct import ReconstructTrainer, sources_of
from tests.support.attempts import attempt, frozen, killed, results
from tests.support.composing import composed
from tests.support.points import SMALL, Point, points_in, run_here

pytestmark = pytest.mark.slow  # many seconds in all

CPU = torch.device("cpu")
LAST = 7
"""Index of the embedded model's last block."""
TWO = ("method=sae", "layer.n_groups=2", "sae.width=256", "sae.l0=8", "method.buffer_tokens=1024")

QUICK = "train.eval_each_sae=false"


@functools.cache
def default(method: str) -> Config:
    return composed(f"method={method}")


def ask(method: str, layer: dict[str, Any], init: str | None = None) -> None:
    """Check the config that `python launch.py method=… layer.…=… init=…` composes."""
    config = default(method)
    check(replace(config, init=init, layer=replace(config.layer, **layer)))


@pytest.mark.parametrize(
    ("method", "layer", "field", "nearest"),
    [
        ("sae", {"amad_max": 0.2, "n_groups": 3}, "amad_max", "null"),
        ("sae", {"amad_max": 0.0}, "amad_max", 0.2),
        ("sae", {"amad_max": -0.1}, "amad_max", 0.2),
        ("sae", {"amad_max": 1.01}, "amad_max", 0.2),
        ("sae", {"amad_max": math.nan}, "amad_max", 0.2),
        ("sae", {"n_groups": 0}, "n_groups", 1),
        ("sae", {"evenly": True}, "evenly", "false"),
        ("sae", {"evenly": True, "amad_max": 0.2}, "evenly", "false"),
        ("lora", {"amad_max": 0.2}, "amad_max", "null"),
        ("lora", {"n_groups": 2}, "n_groups", "null"),
        ("e2e", {"n_groups": 2}, "n_groups", "null"),
        ("sae_finetune", {"amad_max": 0.2}, "amad_max", "null"),
        ("sae", {"n_groups": 2, "index": 3}, "index", "null"),
        ("sae", {"n_groups": 2, "every": 2}, "every", "null"),
        ("sae", {"amad_max": 0.2, "hook": Hook.mlp_out}, "hook", "null"),
    ],
)
def test_what_is_refused(method: str, layer: dict[str, Any], field: str, nearest: object) -> None:
    with pytest.raises(ConfigError) as error:
        ask(method, layer)
    assert (error.value.field, error.value.nearest) == (f"layer.{field}", nearest)


def test_one_way_to_choose_groups_is_accepted() -> None:
    for limit in (1e-6, 0.2, 1.0):
        ask("sae", {"amad_max": limit})
    ask("sae", {"n_groups": 1})
    ask("sae", {"n_groups": 3, "evenly": True})
    for method in ("lora", "sae_finetune"):
        ask(method, {"n_groups": 3}, init="sae")
    assert composed("method=sae", "layer=groups").layer.amad_max == 0.2  # the paper's


def refuse(*_: object, **__: object) -> object:
    pytest.fail("nothing may be loaded")


@pytest.fixture
def loads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("load_model", "load_tokenizer"):
        monkeypatch.setattr(loading, name, refuse)
    monkeypatch.setattr(corpus, "load", refuse)


@pytest.mark.usefixtures("loads_nothing")
@pytest.mark.parametrize("number", [8, 100])
def test_more_groups_than_blocks_are_refused_before_a_model_is_loaded(
    number: int, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="the number of blocks without the last") as error:
        plan([points_in(tmp_path)("method=sae", f"layer.n_groups={number}")])
    assert (error.value.field, error.value.got, error.value.nearest) == ("layer.n_groups", number, 7)


@dataclass(frozen=True)
class Home:
    """Points in a folder with cached distances, and a run with two groups."""

    point: Point
    run: RunFolder

    @property
    def groups(self) -> list[list[int]]:
        """The groups of the run."""
        return json.loads(self.run.groups.read_text())["groups"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    point = points_in(tmp_path_factory.mktemp("outputs"))
    (run,) = run_here(point(*TWO))
    return Home(point, run)


def groups_of(point: Config) -> list[list[int]]:
    (planned,) = plan([point]).runs
    assert planned.groups is not None
    return planned.groups.groups


def test_distances_are_measured_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_model", refuse)
    assert groups_of(home.point(*TWO)) == home.groups
    assert len(groups_of(home.point("method=sae", "layer.n_groups=3"))) == 3
    assert groups_of(home.point("method=sae", "layer.amad_max=1")) == [list(range(LAST))]


def test_the_points_of_a_sweep_read_the_text_once(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, load = [], corpus.load

    def counted(*arguments: Any, **options: Any) -> corpus.Corpus:
        reads.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(corpus, "load", counted)
    plan([home.point("method=sae", f"layer.n_groups={number}") for number in (1, 2, 3)])
    assert len(reads) == 1


@pytest.mark.parametrize("override", ["data.validation_tokens=512", "train.dtype=bfloat16"])
def test_other_text_or_precision_is_measured_again(
    override: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MeasuredError(Exception):
        pass

    def load_model(*_: object) -> language_model.LanguageModel:
        raise MeasuredError

    monkeypatch.setattr(loading, "load_model", load_model)
    with pytest.raises(MeasuredError):
        plan([home.point(*TWO, override)])


def test_every_block_except_the_last_has_the_sae_of_its_group(home: Home) -> None:
    (planned,) = plan([home.point(*TWO)]).runs
    used = planned.config.sae.used
    assert [choice.block for choice in used] == list(range(LAST))
    assert {tuple(choice.group) for choice in used} == set(map(tuple, home.groups))
    assert all(choice.block in choice.group for choice in used)
    assert all((choice.width, choice.l0) == (256, 8) for choice in used)
    assert load(home.run.config.read_text()).sae.used == used
    assert planned.folder.path.name.startswith("tiny-l0to6in2-sae-s0")


def test_even_groups_are_neighbours(home: Home) -> None:
    (planned,) = plan([home.point("method=sae", "layer.n_groups=3", "layer.evenly=true")]).runs
    assert planned.groups is not None and planned.groups.evenly
    assert planned.groups.groups == [[0, 1, 2], [3, 4], [5, 6]]
    distances = torch.tensor(planned.groups.distances)
    assert planned.groups.amad == pytest.approx(layer_groups.amad(distances, planned.groups.groups))


def test_equal_groups_are_the_same_run(home: Home) -> None:
    """Groups of one block: by number, by distance, and evenly."""
    requests = ["n_groups=7"], ["amad_max=1e-6"], ["n_groups=7", "evenly=true"]
    points = [home.point("method=sae", *(f"layer.{value}" for value in values)) for values in requests]
    (planned,) = plan(points).runs
    assert [choice.group for choice in planned.config.sae.used] == [[block] for block in range(LAST)]
    assert planned.groups is not None and planned.groups.sae_flops_saved == 0


def test_the_run_records_its_groups_and_distances(home: Home) -> None:
    record = json.loads(home.run.groups.read_text())
    distances = torch.tensor(record["distances"], dtype=torch.float64)
    assert distances.shape == (LAST + 1, LAST + 1)
    assert torch.equal(distances, distances.T) and (distances.diagonal() == 0).all()
    groups, amads = layer_groups.group_blocks(distances, n_groups=2)
    assert record["groups"] == groups
    assert sorted(block for group in record["groups"] for block in group) == list(range(LAST))
    assert record["amad"] == pytest.approx(amads[1])
    assert record["amad_by_count"] == pytest.approx(amads)
    assert record["evenly"] is False
    assert record["sae_flops_saved"] == pytest.approx(1 - 2 / 7)


def test_sae_lens_loads_the_folder_of_each_group(home: Home) -> None:
    folders = {path.name: path for path in home.run.sae.iterdir()}
    assert set(folders) == {resid_post(group[0]) for group in home.groups}
    for group in home.groups:
        folder = folders[resid_post(group[0])]
        values = json.loads((folder / "cfg.json").read_text())
        assert values["metadata"]["group_blocks"] == group
        assert values["metadata"]["hook_name"] == resid_post(group[0])
        sae = SAE.load_from_disk(folder)
        assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.architecture()) == (128, 256, "topk")


def test_the_summary_lists_every_block(home: Home) -> None:
    saes = home.run.read_summary()["sae"]
    assert [sae["block"] for sae in saes] == list(range(LAST))
    assert [sae["hookpoint"] for sae in saes] == [resid_post(block) for block in range(LAST)]
    assert all(sae["block"] in sae["group"] and sae["alone_ce"] > 0 for sae in saes)


@pytest.mark.slow
def test_a_run_killed_within_a_fill_resumes_and_ends_the_same(home: Home, tmp_path: Path) -> None:
    """The block of each token is drawn again, and is the same."""
    cached = f"data.cache_dir={home.point(*TWO).data.cache_dir}"
    interrupted = frozen(tmp_path, *SMALL, *TWO, cached, "train.checkpoint_every_steps=1")
    assert killed(attempt(interrupted, step=2, what=signal.SIGKILL))
    assert attempt(interrupted).returncode == 0
    assert results(interrupted) == results(home.run)


def text_of(config: Config) -> corpus.Corpus:
    size = config.train.batch_size
    return corpus.load(
        config.data, loading.load_tokenizer(config.model), train_steps(config) * size, size
    )


def test_activations_come_from_every_block_of_a_group(home: Home) -> None:
    """Every activation that an SAE reads comes from a block of its group, and every block occurs."""
    run = ActiveRun(home.run)
    run.read()
    text, model = text_of(run.config), loading.load_model(run.config.model, DType.float32, CPU)
    tokens = next(text.batches(run.config.train.batch_size, run.config.data.seed))
    run.build(model, [], text.special_ids, tokens)
    student = run.training.student
    assert len({id(splice.sae) for splice in student.splices}) == len(student.modules) == 2
    names = {"+".join(map(resid_post, group)): group for group in home.groups}
    assert {name: source.streams for name, source in sources_of(student).items()} == {
        name: [Stream(resid_post(block)) for block in group] for name, group in names.items()
    }
    pack = Builder(run.config).trainer(Isolation([run.training]), text.validation_tokens, ProcessGroup())
    assert isinstance(pack, ReconstructTrainer)
    batches = text.batches(run.config.train.batch_size, run.config.data.seed)
    read = list(itertools.islice(batches, pack._buffer.batches_per_fill))
    with torch.no_grad():
        streams = {
            block: torch.cat([_resid(model, block, batch, text.special_ids) for batch in read])
            for block in range(LAST)
        }
    served = pack._buffer.serve(0, iter(read))
    assert set(served) == set(names)
    for name, group in names.items():
        blocks = []
        for activation in served[name][:60]:
            matching = [block for block in range(LAST) if (streams[block] == activation).all(-1).any()]
            assert len(matching) == 1
            blocks += matching
        assert set(blocks) == set(group)


def _resid(
    model: language_model.LanguageModel, block: int, tokens: torch.Tensor, special_ids: tuple[int, ...]
) -> torch.Tensor:
    """The output of a block at tokens that are not special, `[token, d_model]`."""
    resid = model.resid_entering(block + 1, tokens)
    assert resid is not None
    return resid[~Special(special_ids, first=True).positions(tokens)]


# ---- runs that start from the SAEs ----------------------------------------------------------------


@pytest.fixture(scope="module")
def lora(home: Home) -> RunFolder:
    (run,) = run_here(home.point(f"init={home.run.path}", "lora.blocks=all", QUICK))
    return run


@pytest.fixture(scope="module")
def finetuned(home: Home) -> RunFolder:
    (run,) = run_here(home.point("method=sae_finetune", f"init={home.run.path}", QUICK))
    return run


def ce(run: RunFolder) -> float:
    """The CE of a run's saved model, from transformers' forward pass and whole logits."""
    adapted = sae_lora.load_adapted(run)
    tokens = text_of(adapted.config).validation_tokens
    logits = adapted(tokens)[:, :-1].double()
    return float(cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_lora_starts_at_the_ce_of_the_trained_saes(home: Home, lora: RunFolder) -> None:
    trained, adapted = home.run.read_summary(), lora.read_summary()
    assert adapted["spliced_ce"] == pytest.approx(trained["student_ce"], abs=1e-6)
    assert adapted["student_ce"] != adapted["spliced_ce"]
    assert [sae["group"] for sae in adapted["sae"]] == [sae["group"] for sae in trained["sae"]]
    assert adapted["method"]["init"] == str(home.run.path)


def test_saved_runs_have_the_ce_of_their_summaries(home: Home, lora: RunFolder) -> None:
    for run in (home.run, lora):
        assert ce(run) == pytest.approx(run.read_summary()["student_ce"], rel=1e-6)
        saes = sae_lora.load_adapted(run).splices
        by_sae = {
            id(splice.sae): [shared.block for shared in saes if shared.sae is splice.sae]
            for splice in saes
        }
        assert sorted(by_sae.values()) == home.groups


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{name}": weight
        for path in sorted(run.sae.glob("*/sae_weights.safetensors"))
        for name, weight in load_file(path).items()
    }


def test_finetuning_trains_one_sae_for_each_group(home: Home, finetuned: RunFolder) -> None:
    initial, trained = weights(home.run), weights(finetuned)
    assert initial.keys() == trained.keys()
    assert {name.split("/")[0] for name in trained} == {resid_post(group[0]) for group in home.groups}
    assert all(
        not torch.equal(trained[name], weight) for name, weight in initial.items() if "W_" in name
    )
    summary = finetuned.read_summary()
    assert summary["spliced_ce"] == pytest.approx(home.run.read_summary()["student_ce"], abs=1e-6)
    per_sae = 2 * 128 * 256 + 128 + 256
    assert summary["trainable_parameters"] == 2 * per_sae
    for group in home.groups:
        values = json.loads((finetuned.sae / resid_post(group[0]) / "cfg.json").read_text())
        assert values["metadata"]["group_blocks"] == group


def test_a_run_can_start_from_finetuned_saes(home: Home, finetuned: RunFolder) -> None:
    assert ce(finetuned) == pytest.approx(finetuned.read_summary()["student_ce"], rel=1e-6)
    (run,) = run_here(home.point(f"init={finetuned.path}", "lora.blocks=all", QUICK))
    assert run.read_summary()["spliced_ce"] == pytest.approx(
        finetuned.read_summary()["student_ce"], abs=1e-6
    )
    config = load(run.config.read_text())
    saes = SAEs(read_dimensions(config.model), CPU).of(config.sae)
    assert len({id(loaded.sae) for loaded in saes}) == len(home.groups)
    assert [choice.group for choice in config.sae.used] == [
        next(group for group in home.groups if block in group) for block in range(LAST)
    ]
