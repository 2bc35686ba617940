"""Exported runs: peft or transformers loads them, and the model card is correct and has no secrets."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import sae_lora
from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.config.schema import LoRAConfig
from sae_lora.config.serialize import load
from sae_lora.data.documents import stdlib_documents
from sae_lora.embedded import MODEL, SAES
from sae_lora.export.adapted_model import Adapted
from sae_lora.export.export import TOLERANCE, export, write_merged
from sae_lora.export.public import BASE_MODEL
from sae_lora.export.push import push
from sae_lora.models import adapter_files, lora
from sae_lora.records.folder import RunFolder
from tests.support.coders import write_topk_sae
from tests.support.commands import REPOSITORY
from tests.support.families import random_tokens, small_model
from tests.support.hub import COMMIT, Hub, serving
from tests.support.points import points_in, run_here
from tests.support.repositories import documents, write_all
from tests.support.trainings import fill

pytestmark = pytest.mark.slow
OWNER = "a-name-to-keep"
"""Name of the user's folder of text, SAEs and runs, of the W&B account, and of the machine."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home") / OWNER
    (home / "books").mkdir(parents=True)
    for number, document in zip(range(60), stdlib_documents(), strict=False):
        (home / f"books/{number}.txt").write_text(document.text)
    shutil.copytree(MODEL, home / "model")
    for block in (2, 4):
        shutil.copytree(SAES / f"block_{block}-width_1024-l0_4", home / f"sae_{block}")
    write_topk_sae(home / "inside_2", "blocks.2.hook_attn_out")
    write_topk_sae(home / "inside_4", "blocks.4.hook_mlp_out")
    return home


@pytest.fixture(scope="module")
def runs(home: Path) -> list[RunFolder]:
    """Three runs: with the embedded model and SAE; with a model and two SAEs in folders of the user, in
    the residual stream; and the same with SAEs inside blocks."""
    point = points_in(home)
    text = ["data=text_files", f"data.files={home}/books/*.txt", "data.context_length=128"]
    common = [*text, f"tracking.entity={OWNER}"]
    two = ["sae=disk", f"sae.path='{home}/sae_{{block}}'", "layer.index=[2,4]", "lora.blocks=all"]
    local = [f"model.name={home}/model", *two]
    inside = [*local, f"sae.path='{home}/inside_{{block}}'"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: OWNER)
        return [*run_here(point(*common)), *run_here(point(*common, *local), point(*common, *inside))]


@pytest.fixture(scope="module")
def exported(runs: list[RunFolder], home: Path) -> list[Path]:
    folders = [home / f"exported-{number}" for number in range(len(runs))]
    for run, folder in zip(runs, folders, strict=True):
        assert main(["export", str(run.path), "--to", str(folder)]) == 0
    return folders


@pytest.fixture(scope="module")
def merged(runs: list[RunFolder], home: Path) -> Path:
    (home / "merged").mkdir()  # an empty folder may exist
    description = export(runs[0].path, home / "merged", merge=True)
    (share,) = re.findall(r"no logit differs by more than (\S+) of the largest", description)
    assert 0 < float(share) < TOLERANCE
    return home / "merged"


def tokens_of(adapted: Adapted) -> torch.Tensor:
    return adapted.tokenizer("import os", return_tensors="pt").input_ids


def plain_base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def test_peft_loads_the_adapters(runs: list[RunFolder], exported: list[Path]) -> None:
    for run, folder in zip(runs, exported, strict=True):
        adapted = sae_lora.load_adapted(run)
        tokens = tokens_of(adapted)
        logits = PeftModel.from_pretrained(plain_base(), str(folder)).eval()(tokens).logits
        assert torch.equal(logits, adapted.logits(tokens, sae=False))


def test_transformers_loads_the_merged_model(runs: list[RunFolder], merged: Path) -> None:
    adapted = sae_lora.load_adapted(runs[0])
    tokens = AutoTokenizer.from_pretrained(merged)("import os", return_tensors="pt").input_ids
    logits = AutoModelForCausalLM.from_pretrained(merged)(tokens).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, adapted.logits(tokens, sae=False), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits, adapted.logits(tokens, sae=False, adapters=False), atol=1e-3)


def test_the_code_on_the_card_gives_the_spliced_model(
    runs: list[RunFolder],
    exported: list[Path],
    merged: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for run, folder in zip([*runs, runs[0]], [*exported, merged], strict=True):
        (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(folder)
        variables: dict = {}
        exec(code.replace(BASE_MODEL, str(MODEL)), variables)
        expected = sae_lora.load_adapted(run)(variables["tokens"])
        if folder == merged:
            torch.testing.assert_close(variables["logits"], expected, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(variables["logits"], expected)


def test_the_card_contains_the_results_of_the_run(runs: list[RunFolder], exported: list[Path]) -> None:
    for run, folder in zip(runs, exported, strict=True):
        summary, text = run.read_summary(), (folder / "README.md").read_text()
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["library_name"] == "peft"
        assert "base_model" not in front  # no model comes from the hub
        for name in ("base_ce", "spliced_ce", "student_ce", "kl", "fvu"):
            assert f"{summary[name]:.4f}" in text, name
        assert f"{summary['gap_closed']:.1%}" in text
        for sae in summary["sae"]:
            assert sae["hookpoint"] in text
            assert sae["sha256"] in text
        assert "keep their activations" in text
        assert load((folder / "config.yaml").read_text()).lora.rank == 2
        assert (folder / "curve.jsonl").read_bytes() == run.curve.read_bytes()


def test_the_card_names_the_outputs_that_saes_replace(exported: list[Path]) -> None:
    into = "spliced into its residual stream predicts"
    texts = [(folder / "README.md").read_text() for folder in exported]
    assert [into in text for text in texts] == [True, True, False]
    assert "spliced into its attention's output and its MLPs' output predicts" in texts[2]
    assert '"model.layers.2.self_attn": SAE' in texts[2]
    assert '"model.layers.4.mlp": SAE' in texts[2]


def test_no_private_name_is_published(exported: list[Path], merged: Path) -> None:
    files = [file for folder in (*exported, merged) for file in folder.rglob("*") if file.is_file()]
    for file in files:
        content = file.read_bytes()
        assert content
        for name in (OWNER, str(MODEL)):
            assert name.encode() not in content, (file, name)


def test_nothing_is_overwritten(
    runs: list[RunFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    command = ["export", str(runs[0].path), "--to"]
    assert main([*command, str(tmp_path)]) == 1
    assert "is not an empty folder" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "mine")]) == 1
    assert main([*command, str(tmp_path / "mine/below")]) == 1
    assert "--to: cannot write" in capsys.readouterr().err
    assert main(["export", str(runs[0].path.parent), "--to", str(tmp_path / "new")]) == 1
    assert "is not a run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_merging_changes_only_rounding(family: str, tmp_path: Path) -> None:
    """Also if matrices are transposed (GPT-2), and if head and embedding share weights."""
    model, tokens = small_model(family), random_tokens()
    adapters = lora.attach(model, LoRAConfig(rank=2, alpha=3.5, targets="all"), first_sae=0)
    fill(lora.trainable_weights(model))
    adapter_files.save(adapters, tmp_path / "adapter", "org/base")
    (tmp_path / "merged").mkdir()
    write_merged(small_model(family), tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # In float64 what is left is the rounding of the written weights to float32.
    expected = model.model.double()(tokens).logits
    assert (merged.double()(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings


def test_a_wrong_merge_writes_nothing(
    runs: list[RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PeftModel, "merge_and_unload", lambda model: model.base_model.unload(), False)
    with pytest.raises(UserError, match=r"differs by .* of the largest"):
        export(runs[0].path, tmp_path / "to", merge=True)
    assert not list(tmp_path.iterdir())


def test_damaged_adapters_are_not_exported(runs: list[RunFolder], tmp_path: Path) -> None:
    copy = RunFolder(tmp_path / "run")
    shutil.copytree(runs[0].path, copy.path)
    file = copy.adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"is damaged \(adapter/adapter_model\.safetensors"):
        export(copy.path, tmp_path / "to")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    (tmp_path / "hub").mkdir()
    with serving(tmp_path / "hub") as hub:
        yield hub


def pushed(
    hub: Hub | None, *arguments: str, token: str | None = "hf_test"
) -> subprocess.CompletedProcess[str]:
    """Run `sae-lora push …` against this hub instead of Hugging Face."""
    address = "http://127.0.0.1:9" if hub is None else hub.address
    variables = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": token or "", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "sae_lora", "push", *arguments]
    return subprocess.run(
        command, env=variables, capture_output=True, text=True, check=False, timeout=60
    )


_LOADING = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
logits = {}
for revision in ("main", "two"):
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, "org/name", revision=revision).eval()
    logits[revision] = model(torch.tensor([[0, 345, 779]])).logits
save_file(logits, sys.argv[2])
"""


def test_a_pushed_export_loads_from_the_hub(
    hub: Hub, runs: list[RunFolder], exported: list[Path], tmp_path: Path
) -> None:
    done = pushed(hub, str(exported[0]), "--repo", "org/name", "--private")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/org/name"
    assert hub.private == {"org/name"}
    repository = tmp_path / "hub/models/org/name"
    assert {path.name for path in repository.iterdir()} == {path.name for path in exported[0].iterdir()}
    # A second run, on a branch of the same repository.
    done = pushed(hub, str(exported[1]), "--repo", "org/name", "--revision", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{hub.address}/org/name/tree/two"

    variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", _LOADING, str(MODEL), str(tmp_path / "logits")]
    subprocess.run(command, env=os.environ | variables, check=True, timeout=120)
    logits = load_file(tmp_path / "logits")
    for run, revision in zip(runs[:2], ("main", "two"), strict=True):
        expected = sae_lora.load_adapted(run).logits(torch.tensor([[0, 345, 779]]), sae=False)
        assert torch.equal(logits[revision], expected)


def test_refusals_of_the_hub_are_explained(hub: Hub, exported: list[Path]) -> None:
    hub.closed.add("theirs")
    (hub.root / "models/org/public").mkdir(parents=True)
    folder = str(exported[0])
    for process, words in [
        (
            pushed(hub, folder, "--repo", "org/name", token=None),
            "you are not logged in; run `hf auth login`",
        ),
        (pushed(hub, folder, "--repo", "theirs/name"), "your token has no write access"),
        (pushed(hub, folder, "--repo", "org/public", "--private"), "exists and is public"),
        (pushed(None, folder, "--repo", "org/name"), "the hub cannot be reached"),
    ]:
        assert process.returncode == 1
        assert words in process.stderr
        assert "Traceback" not in process.stderr
    assert not any((hub.root / "models/org/public").iterdir())


def test_only_exports_are_pushed(runs: list[RunFolder], exported: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not an export: README\.md"):
        push(runs[0].path, "org/name")
    copy = tmp_path / "copy"
    shutil.copytree(exported[0], copy)
    with pytest.raises(UserError, match="org/name"):
        push(copy, "name")
    (copy / "adapter_config.json").unlink()
    shutil.rmtree(copy / "sae", ignore_errors=True)
    with pytest.raises(UserError, match="is not an export: weights missing"):
        push(copy, "org/name")


_FROM_THE_HUB = """
import os, re, shutil, sys
from pathlib import Path
from peft import AutoPeftModelForCausalLM
import sae_lora
from sae_lora.cli import main
from tests.support.points import points_in, run_here
(run,) = run_here(points_in(Path.cwd())(*sys.argv[1:]))
assert main(["export", str(run.path), "--to", "adapters"]) == 0
student = sae_lora.load_adapted(run)
shutil.rmtree("main")
os.chdir("adapters")
(code,) = re.findall(r"```python\\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
exec(code)
assert torch.equal(student(tokens), logits)
assert torch.equal(sae_lora.load_adapted(".")(tokens), logits)
reloaded = AutoPeftModelForCausalLM.from_pretrained(".", dtype=torch.float32).eval()
assert torch.equal(reloaded(tokens).logits, model(tokens).logits)
print(tokenizer.decode(tokens[0]))
"""


def test_a_model_of_the_hub_is_named_with_its_commit(hub: Hub, tmp_path: Path) -> None:
    """peft then loads the base model by itself."""
    write_all(hub.root)
    sae = "sae=registry sae.release=gpt2-small-resid-post-v5-32k sae.id=blocks.6.hook_resid_post"
    short = ["data.context_length=32", "data.validation_tokens=128", "train.train_tokens=128"]
    variables = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, "-c", _FROM_THE_HUB, "model=gpt2", *sae.split(), *short]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | variables,
        check=True,
        timeout=300,
        stdout=subprocess.PIPE,
    )
    prompt = done.stdout.decode().splitlines()[-1]  # the beginning of a held-out text
    assert any(text.startswith(prompt) for text in documents(400)), prompt
    front = yaml.safe_load((tmp_path / "adapters/README.md").read_text().split("---\n")[1])
    assert (front["base_model"], front["base_model_relation"]) == ("openai-community/gpt2", "adapter")
    assert front["datasets"] == ["monology/pile-uncopyrighted"]
    adapter_config = json.loads((tmp_path / "adapters/adapter_config.json").read_text())
    assert (adapter_config["base_model_name_or_path"], adapter_config["revision"]) == (
        "openai-community/gpt2",
        COMMIT,
    )
