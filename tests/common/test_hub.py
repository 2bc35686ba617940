"""Commands of a researcher against a local server that imitates the Hugging Face hub."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import yaml
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from tests.support.commands import Session, session
from tests.support.hub import COMMIT, commit_of, serving
from tests.support.repositories import GEMMA_WIDTH, GPT2_WIDTH, PYTHIA_D_MODEL, documents, write_all

pytestmark = pytest.mark.slow

GEMMA = "model=gemma2_2b sae=gemma_scope sae.width=16k sae.l0=82 layer.index=12 data=pile".split()
LLAMA = "model=llama31_8b sae=llama_scope sae.width=32k layer.index=16 data=pile".split()
SMALL = (
    "data.context_length=32 data.validation_tokens=128 train.train_tokens=128 train.batch_size=2 "
    "train.eval_every_tokens=64 tracking=disabled lora.rank=2"
).split()


REFUSED = {
    "a data set with a loading script": (
        (*LLAMA, *SMALL, "data=redpajama", "data.revision=main"),
        "data.name = 'togethercomputer/RedPajama-Data-1T-Sample' cannot be loaded",
        "data.revision=refs/convert/parquet",
    ),
    "missing model": (
        (*GEMMA, *SMALL, "model.name=google/gemma-2-9b"),
        "model.name = 'google/gemma-2-9b' cannot be loaded",
        "no such repository",
    ),
    "missing data set": (
        (*LLAMA, *SMALL, "data=hf", "data.name=no/such"),
        "data.name = 'no/such' cannot be loaded",
    ),
    "missing column": (
        (*LLAMA, *SMALL, "data.column=txt"),
        "data.column = 'txt'",
        "nearest valid: data.column=text",
    ),
    "too little text": (
        (*LLAMA, *SMALL, "train.train_tokens=10000000"),
        "train.train_tokens",
        "data.repeat=true",
    ),
}
"""For each refused command, its arguments and parts of its message."""


@dataclass(frozen=True)
class Researcher:
    """Someone who launches commands in one process, with one cache of the hub's files."""

    session: Session
    cache: Path
    refused: dict[str, CompletedProcess[str]]
    """Commands before which nothing was run, so that no data set is in the cache, by what is wrong."""

    def launch(self, home: Path, *overrides: str) -> CompletedProcess[str]:
        """`sae-lora launch` with outputs in this folder."""
        return self.session.launch(*overrides, *_places(home))


@pytest.fixture(scope="module")
def researcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Researcher]:
    root, cache = (tmp_path_factory.mktemp(name) for name in ("hub", "hf"))
    write_all(root)
    with (
        serving(root, listening=False) as hub,
        session(HF_ENDPOINT=hub.address, HF_HOME=str(cache), HF_HUB_OFFLINE=None) as started,
    ):
        researcher = Researcher(started, cache, {})

        def launch(name: str, *overrides: str) -> None:
            home = tmp_path_factory.mktemp("refused")
            researcher.refused[name] = researcher.launch(home, *overrides)

        launch("no network", *GEMMA, *SMALL)
        hub.listen()
        hub.gated.add("google/gemma-2-2b")
        launch("gated", *GEMMA, *SMALL)
        hub.gated.clear()
        hub.truncated.add("model.safetensors")
        launch("broken download", *LLAMA, *SMALL)
        hub.truncated.clear()
        for name, (overrides, *_) in REFUSED.items():
            launch(name, *overrides)
        yield researcher


def _places(home: Path) -> tuple[str, str]:
    return f"output_dir={home}/outputs", f"data.cache_dir={home}/cache"


def summary_in(home: Path) -> dict:
    (path,) = home.glob("outputs/main/*/summary.json")
    return json.loads(path.read_text())


def summaries_in(home: Path) -> list[dict]:
    """The summaries of all runs; those of SAEs at mlp_out come last."""
    summaries = [json.loads(path.read_text()) for path in home.glob("outputs/main/*/summary.json")]
    return sorted(summaries, key=lambda summary: "mlp" in summary["name"])


def test_the_experiments_on_smollm2_end_to_end(researcher: Researcher, tmp_path: Path) -> None:
    """A new SAE, and adapters of two ranks around it, with the model and the text of the hub."""
    few = ("train.train_tokens=2048", "train.eval_every_tokens=2048", "data.validation_tokens=512")
    trained = researcher.launch(tmp_path, "experiment=smollm2_saes", "sae.l0=4", "sae.width=64", *few)
    assert trained.returncode == 0, trained.stderr
    (sae,) = tmp_path.glob("outputs/smollm2_saes/*/sae/blocks.15.hook_resid_post")
    ranks = ("experiment=smollm2_ranks", f"sae.path={sae}", "lora.rank=1,2", *few)
    finished = researcher.launch(tmp_path, *ranks)
    assert finished.returncode == 0, finished.stderr
    summaries = [
        json.loads(path.read_text()) for path in tmp_path.glob("outputs/smollm2_ranks/*/summary.json")
    ]
    assert sorted(summary["lora"]["rank"] for summary in summaries) == [1, 2]
    for summary in summaries:
        assert summary["model"]["name"] == "HuggingFaceTB/SmolLM2-135M"
        assert summary["model"]["commit"] == summary["data"]["revision"] == COMMIT
        assert summary["sae"][0]["block"] == 15 and summary["sae"][0]["l0"] == 4


def test_gemma_scope_end_to_end(researcher: Researcher, tmp_path: Path) -> None:
    sweep = "-m", *GEMMA, *SMALL, "layer.hook=resid_post,mlp_out"
    of_mlp = "gemma-scope-2b-pt-mlp", "layer_12/width_16k/average_l0_108"
    elsewhere = (
        *("model=gemma2_2b", "sae=registry", f"sae.release={of_mlp[0]}", f"sae.id={of_mlp[1]}"),
        *(*SMALL, "data=pile", "sweep=guessed"),
    )
    finished = researcher.launch(tmp_path, *sweep)
    refused = researcher.launch(tmp_path, *elsewhere)
    assert finished.returncode == 0, finished.stderr
    summary, mlp_summary = summaries_in(tmp_path)
    (sae,) = summary["sae"]
    assert (sae["release"], sae["id"]) == ("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")
    assert (sae["width"], sae["block"], sae["stated_l0"]) == (GEMMA_WIDTH, 12, 82)
    assert summary["model"]["commit"] == sae["commit"] == COMMIT
    assert summary["model"]["class"] == "Gemma2ForCausalLM"
    assert summary["data"]["revision"] == COMMIT
    assert summary["data"]["special_tokens_kept"] is True
    assert summary["data"]["bos"] is True
    # Without the hub, a repeated command finds the finished run, and a new point runs from the cache.
    ranks = "-m", *GEMMA, *SMALL, "lora.rank=2,1"
    with session(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(researcher.cache)) as offline:
        again = offline.launch(*ranks, *_places(tmp_path))
    assert again.returncode == 0, again.stderr
    assert "1 of 2 already done" in again.stdout
    assert len(list(tmp_path.glob("outputs/main/*/summary.json"))) == 3
    # The metadata of an MLP's SAE names its place. Another place is refused before anything runs.
    (sae,) = mlp_summary["sae"]
    assert (sae["release"], sae["id"]) == of_mlp
    assert (sae["hookpoint"], sae["block"]) == ("blocks.12.hook_mlp_out", 12)
    assert "l12mlp_out" in mlp_summary["name"]
    assert mlp_summary["initial_gap"] != 0
    assert refused.returncode == 1
    assert "was trained at blocks.12.hook_mlp_out" in refused.stderr
    assert "nearest valid: layer.hook=mlp_out" in refused.stderr
    assert not list(tmp_path.glob("outputs/guessed/*/summary.json"))
    assert "training" not in refused.stdout


def test_gemma_scopes_transcoders_end_to_end(researcher: Researcher, tmp_path: Path) -> None:
    """They read the norm's output without its weight, as their metadata says, and replace the MLP's."""
    finished = researcher.launch(
        tmp_path, "model=gemma2_2b", "sae=transcoder", "layer.index=12", "data=pile", *SMALL
    )
    assert finished.returncode == 0, finished.stderr
    summary = summary_in(tmp_path)
    (sae,) = summary["sae"]
    assert (sae["release"], sae["id"]) == (
        *("gemma-scope-2b-pt-transcoders", "layer_12/width_16k/average_l0_6"),
    )
    assert (sae["hookpoint"], sae["width"], sae["commit"]) == (
        *("blocks.12.hook_mlp_out", GEMMA_WIDTH, COMMIT),
    )
    (config,) = tmp_path.glob("outputs/main/*/config.yaml")
    (used,) = yaml.safe_load(config.read_text())["sae"]["used"]
    assert used["reads"] == "mlp_normalized"
    assert summary["initial_gap"] != 0


def test_llama_scope_end_to_end(researcher: Researcher, tmp_path: Path) -> None:
    """Data sets are downloaded, not streamed. RedPajama is read only from the hub's parquet files."""
    texts = "data=pile,redpajama", "data.streaming=false"
    finished = researcher.launch(tmp_path, "-m", *LLAMA[:-1], *SMALL, *texts)
    assert finished.returncode == 0, finished.stderr
    first, second = summaries_in(tmp_path)
    for summary in (first, second):
        (sae,) = summary["sae"]
        assert (sae["release"], sae["id"], sae["block"]) == ("llama_scope_lxr_8x", "l16r_8x", 16)
        assert summary["data"]["special_tokens_kept"] is False
        assert summary["model"]["class"] == "LlamaForCausalLM"
    revisions = {summary["data"]["revision"] for summary in (first, second)}
    assert revisions == {COMMIT, commit_of("refs/convert/parquet")}


def test_registry_sae_of_the_older_format_end_to_end(researcher: Researcher, tmp_path: Path) -> None:
    """GPT-2, whose tokenizer adds no BOS, and an SAE that normalises its input."""
    release, name = "gpt2-small-resid-post-v5-32k", "blocks.6.hook_resid_post"
    sae = [f"sae.release={release}", f"sae.id={name}"]
    # The same SAE from its hub repository, which no registry lists.
    repository = ["sae.release=jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", "sae.id=v5_32k_layer_6.pt"]
    common = "model=gpt2", "sae=registry", *SMALL
    finished = researcher.launch(tmp_path, *common, *sae)
    again = researcher.launch(tmp_path, *common, *repository, "layer.index=6", "sweep=unlisted")
    assert finished.returncode == 0, finished.stderr
    summary = summary_in(tmp_path)
    (sae,) = summary["sae"]
    assert (sae["release"], sae["id"], sae["block"]) == (release, name, 6)
    assert (sae["width"], sae["commit"]) == (GPT2_WIDTH, COMMIT)
    assert summary["model"]["class"] == "GPT2LMHeadModel"
    assert summary["data"]["bos"] is False
    assert summary["l0"] == pytest.approx(8, abs=0.5)
    assert again.returncode == 0, again.stderr
    (path,) = tmp_path.glob("outputs/unlisted/*/summary.json")
    unlisted = json.loads(path.read_text())
    assert unlisted["spliced_ce"] == summary["spliced_ce"]


def test_a_users_sae_and_text_end_to_end(researcher: Researcher, tmp_path: Path) -> None:
    sae = TopKSAE(
        TopKSAEConfig(
            d_in=PYTHIA_D_MODEL,
            d_sae=64,
            k=4,
            metadata=SAEMetadata(hook_name="blocks.3.hook_resid_post"),
        )
    )
    sae.save_model(tmp_path / "my_sae")
    (tmp_path / "books").mkdir()
    for number, text in enumerate(documents(100)):
        (tmp_path / "books" / f"{number}.txt").write_text(text)
    finished = researcher.launch(
        *(tmp_path, "model=pythia_70m", "sae=disk", f"sae.path={tmp_path}/my_sae"),
        *("data=text_files", f"data.files={tmp_path}/books/*.txt", *SMALL),
    )
    assert finished.returncode == 0, finished.stderr
    summary = summary_in(tmp_path)
    (described,) = summary["sae"]
    assert (described["block"], described["width"], described["stated_l0"]) == (3, 64, 4)
    assert summary["model"]["class"] == "GPTNeoXForCausalLM"
    assert summary["model"]["commit"] == COMMIT


def refusal(finished: CompletedProcess[str]) -> str:
    """The error message of a command that must fail without a traceback."""
    assert finished.returncode == 1
    assert "Traceback" not in finished.stderr + finished.stdout
    return finished.stderr


def test_gated(researcher: Researcher) -> None:
    message = refusal(researcher.refused["gated"])
    assert "model.name = 'google/gemma-2-2b'" in message
    assert "gated" in message
    assert "hf auth login" in message


def test_refused_commands(researcher: Researcher) -> None:
    for name, (_, *parts) in REFUSED.items():
        message = refusal(researcher.refused[name])
        assert all(part in message for part in parts), (name, message)


def test_no_network(researcher: Researcher) -> None:
    message = refusal(researcher.refused["no network"])
    assert "model.name = 'google/gemma-2-2b' cannot be loaded" in message
    assert "cannot be reached" in message


def test_broken_download(researcher: Researcher) -> None:
    message = refusal(researcher.refused["broken download"])
    assert "model.name = 'meta-llama/Llama-3.1-8B' cannot be loaded" in message
