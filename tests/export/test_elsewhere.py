"""The code of the page about other tools, run as it is printed; its logits are those of `sae_lora`."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from sae_lora.cli import main
from sae_lora.config.schema import LoRAConfig
from sae_lora.models import lora
from sae_lora.splice.hooks import Splice, spliced
from sae_lora.splice.positions import Special
from tests.support.coders import topk_sae
from tests.support.commands import REPOSITORY
from tests.support.families import random_tokens, small_model
from tests.support.hub import serving
from tests.support.points import run_here
from tests.support.subjects import quick_points_in
from tests.support.trainings import fill

PAGE = REPOSITORY / "docs" / "elsewhere.md"


def sections() -> dict[str, str]:
    """The first block of Python in each section of the page, by its heading."""
    parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    blocks = {
        part.partition("\n")[0]: re.findall(r"```python\n(.*?)```", part, re.DOTALL) for part in parts
    }
    return {name: "\n".join(found) for name, found in blocks.items() if found}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its export, under the names of the page."""
    place = tmp_path_factory.mktemp("elsewhere")
    point = quick_points_in(place)
    few = "train.train_tokens=512", "data.validation_tokens=512", "lora.rank=2", "train.lr=1e-2"
    (run,) = run_here(point(*few))
    assert main(["export", str(run.path), "--to", str(place / "my_model"), "--merge"]) == 0
    (place / "outputs" / "main").mkdir(parents=True)
    shutil.copytree(run.path, place / "outputs" / "main" / "RUN")
    return place


def test_the_page_has_these_sections() -> None:
    assert set(sections()) == {"transformers", "nnsight", "TransformerLens and SAELens"}


@pytest.mark.slow
@pytest.mark.parametrize("tool", sections())
def test_the_page(
    tool: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if tool == "nnsight":
        pytest.importorskip("nnsight")
    monkeypatch.chdir(place)
    (place / "code.py").write_text(sections()[tool])  # nnsight reads the code of a trace in its file
    names = runpy.run_path(str(place / "code.py"))
    assert names["difference"] < 1e-4
    assert names.get("without", 0) < 1e-4
    if tool == "nnsight":
        resid = []
        with names["adapted"].spliced(observe=resid.append):
            names["adapted"].model(names["tokens"])
        torch.testing.assert_close(names["recon"][0, 1:], resid[0].recon)
    if tool == "transformers":
        assert capsys.readouterr().out.startswith("<|bos|>import os")


_HOOKED = """
import sys, torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
model = hooked("stanford-crfm/alias-gpt2-small-x21", sys.argv[1])
tokens = load_file(sys.argv[2])["tokens"]
sae = SAE.load_from_disk(sys.argv[3])
save_file({"logits": model.run_with_saes(tokens, saes=[sae], exclude_special_tokens=[0])}, sys.argv[4])
"""


@pytest.mark.slow
def test_a_merged_model_in_a_hooked_transformer(tmp_path: Path) -> None:
    """TransformerLens knows the base model by its name, and reads its config from the hub."""
    model, tokens, sae = small_model("gpt2"), random_tokens(), topk_sae()
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    adapters = lora.attach(model, LoRAConfig(rank=2, targets="all"), first_sae=0)
    fill(lora.trainable_weights(model))
    with torch.no_grad(), spliced(model, (Splice(1, sae, special=Special((0,))),), tokens):
        expected = model.model(tokens).logits
    merged: Any = adapters.merge_and_unload()  # pyright: ignore[reportCallIssue]
    merged.save_pretrained(tmp_path / "merged")
    words = {f"w{number}": number for number in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")), bos_token="w0", eos_token="w0"
    )
    tokenizer.save_pretrained(tmp_path / "merged")
    shutil.copytree(tmp_path / "merged", tmp_path / "hub/models/stanford-crfm/alias-gpt2-small-x21")
    served = tmp_path / "hub/models/stanford-crfm/alias-gpt2-small-x21/config.json"
    values = json.loads(served.read_text())
    served.write_text(json.dumps(values | {"n_ctx": values["n_positions"]}))  # as in files of its time
    save_file({"tokens": tokens}, tmp_path / "tokens.safetensors")
    sae.save_model(tmp_path / "sae")
    (code,) = re.findall(
        r"```python\n(from sae_lens import HookedSAE.*?)```", PAGE.read_text(), re.DOTALL
    )
    names = ("merged", "tokens.safetensors", "sae", "logits.safetensors")
    with serving(tmp_path / "hub") as hub:
        variables = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", code + _HOOKED, *(str(tmp_path / name) for name in names)]
        done = subprocess.run(
            command, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=300
        )
    assert done.returncode == 0, done.stderr[-3000:] + str(hub.requests)
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
