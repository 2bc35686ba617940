"""Exports stand alone: they need no file of the machine that wrote them, and name none of its paths."""

import getpass
import json
import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from sae_lens import SAE
from torch.nn import functional

import sae_lora
from sae_lora.cli import main
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import Method
from sae_lora.config.schema import ModelConfig
from sae_lora.embedded import MODEL, SAES
from sae_lora.export.public import BASE_MODEL, public
from sae_lora.records.folder import RunFolder
from sae_lora.saes import output_adapter
from tests.support.coders import write_topk_sae
from tests.support.points import run_here
from tests.support.subjects import quick_points_in

pytestmark = pytest.mark.slow  # many seconds in all
HOST = "a-host-to-keep"
SHORT = ("train.train_tokens=512", "data.validation_tokens=256", "layer.index=3")


class Exported(NamedTuple):
    """An export, and what the run computed."""

    folder: Path
    logits: torch.Tensor
    """Logits of the student, before the run and its SAEs were deleted."""
    tokens: torch.Tensor


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of another machine."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, elsewhere: Path) -> Iterator[dict[str, Exported]]:
    """Exports of every kind by name, in another folder; runs, SAEs and model are deleted."""
    home = tmp_path_factory.mktemp("owner")
    shutil.copytree(MODEL, home / "my model")
    write_topk_sae(home / "my sae", "blocks.3.hook_resid_post")
    cfg = home / "my sae/cfg.json"
    values = json.loads(cfg.read_text())
    values["metadata"] |= {"model_name": str(home / "my model"), "dataset_path": f"{home}/my text"}
    cfg.write_text(json.dumps(values))
    point = quick_points_in(home)
    model = f"model.name='{home}/my model'"
    local = (model, "sae=disk", f"sae.path='{home}/my sae'")
    trained = {
        "sae_finetune": (*local, "method=sae_finetune"),
        "mlp_adapter": (*local, "method=mlp_adapter", "method.rank=4"),
        "linear_adapter": ("sae=identity", "method=linear_adapter"),
        "lora_sae": (*local, "method=lora_sae", "train.lr=1e-2"),
        "e2e": ("method=e2e", "sae.width=64", "sae.l0=4"),
    }
    saes = ",".join(
        f"{SAES}/{name}" for name in ("transcoder_2-width_1024-l0_16", "block_3-width_1024-l0_8")
    )
    transcoders = {
        "transcoders": ("sae=transcoder", "layer.index=[2,3]"),
        "a transcoder and an SAE": (model, "sae=disk", f"sae.path=[{saes}]", "layer.index=null"),
        "a skip transcoder": (
            *("sae=new", "method=sae", "sae.architecture=batchtopk_transcoder", "sae.skip=true"),
            *("sae.width=64", "sae.l0=4"),
        ),
        "a transcoder with a map": ("sae=transcoder", "method=linear_adapter"),
        "a finetuned transcoder": ("sae=transcoder", "method=sae_finetune"),
    }
    trained |= transcoders
    folders: dict[str, RunFolder] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "node", lambda: HOST)
        for name, overrides in trained.items():
            (folders[name],) = run_here(point(*SHORT, *overrides))
        after = {
            "lora after sae_finetune": (model, f"init='{folders['sae_finetune'].path}'"),
            "lora after mlp_adapter": (model, f"init='{folders['mlp_adapter'].path}'"),
            "lora": local,
        }
        for name, overrides in after.items():
            index = () if "after" in name else SHORT[-1:]
            (folders[name],) = run_here(point(*SHORT[:-1], *index, *overrides))
    results = {}
    for name, run in folders.items():
        to = elsewhere / name
        assert main(["export", str(run.path), "--to", str(to)]) == 0
        adapted = sae_lora.load_adapted(run)
        tokens = adapted.tokenizer("import os", return_tensors="pt").input_ids
        results[name] = Exported(to, adapted(tokens), tokens)
    merged = elsewhere / "merged"
    assert main(["export", str(folders["lora"].path), "--to", str(merged), "--merge"]) == 0
    results["merged"] = results["lora"]._replace(folder=merged)
    shutil.rmtree(home)
    (elsewhere / "home").write_text(str(home))
    yield results


def code_of(export: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    return code


@pytest.mark.case("A14")
def test_the_card_gives_the_student_in_another_folder(
    exports: dict[str, Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, exported in exports.items():
        monkeypatch.chdir(exported.folder)
        code = code_of(exported.folder)
        prompt = re.findall(r"tokenizer\(('.*'), return", code)
        assert prompt == ["'import os'"], name  # the text is Python code
        variables: dict[str, Any] = {}
        exec(code.replace(BASE_MODEL, str(MODEL)), variables)
        if name == "merged":
            torch.testing.assert_close(variables["logits"], exported.logits, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(variables["logits"], exported.logits), name


def test_an_export_loads_like_its_run(exports: dict[str, Exported]) -> None:
    for name, exported in exports.items():
        is_local = BASE_MODEL in (exported.folder / "config.yaml").read_text()
        if name == "merged":
            with pytest.raises(UserError, match="is a merged model: transformers loads it"):
                sae_lora.load_adapted(exported.folder)
            continue
        if is_local:
            with pytest.raises(ConfigError, match="the folder of the base model"):
                sae_lora.load_adapted(exported.folder)
        adapted = sae_lora.load_adapted(exported.folder, model=str(MODEL) if is_local else None)
        assert torch.equal(adapted(exported.tokens), exported.logits), name


@pytest.mark.case("A14")
def test_no_file_names_the_machine(exports: dict[str, Exported], elsewhere: Path) -> None:
    home = (elsewhere / "home").read_text()
    names = [home, str(Path(home).parent), str(Path.home()) + "/", HOST, str(MODEL), str(elsewhere)]
    names += [] if getpass.getuser() == "root" else [getpass.getuser()]
    for name, exported in exports.items():
        files = [path for path in exported.folder.rglob("*") if path.is_file()]
        assert {"README.md", "config.yaml", "summary.json", "curve.jsonl"} <= {
            str(path.relative_to(exported.folder)) for path in files
        }
        for file in files:
            content = file.read_bytes()
            for private in names:
                assert private.encode() not in content, (name, file, private)


@pytest.mark.case("A14")
def test_saes_of_no_registry_are_in_the_export(exports: dict[str, Exported]) -> None:
    place = "blocks.3.hook_resid_post"
    with_sae = {name for name, exported in exports.items() if (exported.folder / "sae").exists()}
    embedded = {"linear_adapter", "transcoders", "a transcoder with a map"}
    assert with_sae == exports.keys() - embedded
    for name in with_sae:
        folder = exports[name].folder
        if "transcoder" in name:
            copies = sorted(path.name for path in (folder / "sae").iterdir())
            mixed = ["blocks.2.hook_mlp_out", place]
            assert copies == (mixed if "and" in name else ["blocks.3.hook_mlp_out"])
            continue
        sae = SAE.load_from_disk(folder / "sae" / place)
        assert sae.cfg.metadata.hook_name == place
        if name.startswith("lora") and name != "lora_sae":
            assert sae.cfg.metadata.dataset_path == "my text"
        if name not in ("sae_finetune", "lora_sae", "e2e"):
            (used,) = yaml.safe_load((folder / "config.yaml").read_text())["sae"]["used"]
            assert used["path"] == f"sae/{place}"


def test_a_local_model_has_a_placeholder(exports: dict[str, Exported]) -> None:
    folder = exports["lora"].folder
    for name in ("README.md", "config.yaml", "summary.json", "adapter_config.json"):
        assert BASE_MODEL in (folder / name).read_text(), name
    assert (
        f"Replace `{BASE_MODEL}` in this code and in `adapter_config.json`"
        in (folder / "README.md").read_text()
    )
    assert BASE_MODEL not in (exports["e2e"].folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "rank"), [("linear_adapter", None), ("linear_adapter", 3), ("mlp_adapter", 3)]
)
def test_the_code_of_a_map_computes_the_map(kind: str, rank: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapter = output_adapter.OutputAdapter(Method[kind], 8, rank)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight)
    output_adapter.save(adapter, tmp_path)
    recon, weights = torch.randn(5, 8), dict(adapter.state_dict())
    functions = {"linear": functional.linear, "gelu": functional.gelu}
    added = eval(output_adapter.code(tmp_path), functions | {"recon": recon, "weights": weights})
    assert torch.equal(recon + added, adapter(recon))


def test_paths_are_cut_in_any_value() -> None:
    model = ModelConfig(name="models/mine")
    values = {
        "model_name": "models/mine",
        "text": "sae.path = '/home/me/saes/one' was trained on ~/data/books.jsonl, see https://a.b/c/d",
        "list": ["/home/me/saes/one", "~/x y/z", 3, None, "nats/token", "and/or", "/think"],
        "others": [
            "file:///home/me/data.jsonl",
            "path:/home/me/run",
            "C:\\Users\\me\\sae",
            "../../me/sae",
        ],
        "inside": "this run uses it in models/mine",
    }
    assert public(values, model) == {
        "model_name": BASE_MODEL,
        "text": "sae.path = 'one' was trained on books.jsonl, see https://a.b/c/d",
        "list": ["one", "z", 3, None, "nats/token", "and/or", "think"],
        "others": ["data.jsonl", "run", "sae", "sae"],
        "inside": f"this run uses it in {BASE_MODEL}",
    }
    assert public({"name": "tiny"}, ModelConfig(name="tiny")) == {"name": "tiny"}
    assert public("org/m", ModelConfig(name="org/m", commit="0" * 40)) == "org/m"
