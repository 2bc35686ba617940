"""A run of a mixture of experts, from its plan to its card: its adapters and its frozen weights."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sae_lora.common.errors import ConfigError
from sae_lora.config.schema import Config
from sae_lora.embedded import MODEL
from sae_lora.export.export import export
from sae_lora.launcher.launch import launch
from sae_lora.launcher.plan import plan
from sae_lora.train.cost.estimate import estimate
from tests.support.architectures import tiny_model
from tests.support.points import run_here
from tests.support.subjects import quick_points_in


def with_launcher(config: Config, **values: object) -> Config:
    return replace(config, launcher=replace(config.launcher, **values))


@pytest.mark.case("A2")
def test_a_run_says_which_weights_stay_frozen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, point = tmp_path / "moe", quick_points_in(tmp_path)
    ids = {"vocab_size": 2048, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}
    tiny_model("qwen3_moe", **ids).model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    common = (f"model.name={folder}", "sae=identity", "layer.index=0", "lora.blocks=[1,3]")
    all_matrices = point(*common)
    wrong = point(*common, "lora.targets=mlp.expert.*")
    assert launch([with_launcher(all_matrices, dry_run=True)]) == 0
    assert "note: 1 run: frozen in the adapted blocks: mlp.gate (2)" in capsys.readouterr().out
    for dry_run in (True, False):  # before anything is fetched or loaded
        with pytest.raises(ConfigError, match=r"no matrix mlp\.expert\.\*"):
            launch([with_launcher(wrong, dry_run=dry_run)])
    assert not list(tmp_path.glob("main/*/config.yaml"))

    (run,) = run_here(all_matrices)
    assert "frozen in the adapted blocks: mlp.gate (2)" in capsys.readouterr().out
    summary = run.read_summary()
    assert summary["lora"]["left_out"] == {"mlp.gate": 2}
    planned = plan([all_matrices]).runs[0]
    assert planned.folder.is_finished and planned.config.lora.selection == 2
    assert summary["trainable_parameters"] == estimate([planned.config]).adapter_weights
    export(run.path, tmp_path / "exported", merge=True)
    assert "frozen in these blocks: mlp.gate (2)" in (tmp_path / "exported" / "README.md").read_text()
