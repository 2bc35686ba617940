"""The command line as a user meets it: exit codes, one message, no traceback unless asked for."""

from pathlib import Path

import pytest

from tests.commands import launch


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lora.rnk=3"], ["there is no key lora.rnk", "nearest valid: lora.rank"]),
        (["+foo=1"], ["there is no key foo"]),
        (["lora.rank=abc"], ["lora.rank = 'abc'", "a whole number"]),
        (["train.train_tokens=1e6"], ["nearest valid: train.train_tokens=1000000"]),
        (["sae=gema_scope"], ["nearest valid: sae=gemma_scope"]),
        (["-m", "lora.rank=1,0"], ["lora.rank = 0", "nearest valid: lora.rank=1"]),
        (["layer.index=8"], ["layer.index = 8", "nearest valid: layer.index=6"]),
    ],
)
def test_bad_input_is_one_message(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    refused = launch(*arguments, f"output_dir={tmp_path}")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert "Traceback" not in refused.stderr
    assert refused.stderr.startswith("error: ")
    assert all(word in refused.stderr for word in words), refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_is_there_for_who_asks() -> None:
    assert "Traceback" in launch("lora.rank=0", HYDRA_FULL_ERROR="1").stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--info", "defaults"]])
def test_asking_for_help_is_no_error(arguments: list[str]) -> None:
    asked = launch(*arguments)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout


@pytest.mark.slow
def test_a_sweep_from_the_terminal(tmp_path: Path) -> None:
    small = ["train.train_tokens=1024", "data.validation_tokens=1024", "tracking=disabled"]
    swept = launch("-m", "lora.rank=1,2", "layer.index=1,2", *small, f"output_dir={tmp_path}")
    assert swept.returncode == 0, swept.stderr
    assert len(list(tmp_path.glob("main/*/summary.json"))) == 4
    assert swept.stdout.count("done  tiny") == 4
    assert "gap closed" in swept.stdout
    assert "Traceback" not in swept.stderr
    # Hydra leaves no folders of its own.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["main"]
