"""No secret appears in a config, a message or a file."""

import json
from pathlib import Path

import pytest

from sae_lora.common import console
from sae_lora.common.errors import ConfigError
from sae_lora.common.secrets import redacted, secret_in
from sae_lora.records.folder import RunFolder
from tests.support.composing import composed

FAKE = "a1B2c3D4e5F6g7H8i9J0"
SECRETS = {
    "https://me:hunter2@git.example/repo": "https://me:***@git.example/repo",
    "http://:hunter2@proxy:8080": "http://:***@proxy:8080",
    f"hf_{FAKE}": "***",
    f"refused: ghp_{FAKE}.": "refused: ***.",
    f"sk-{FAKE}": "***",
    f"wandb_v1_{FAKE}": "***",
    "export HF_TOKEN=hunter2; module load cuda": "export HF_TOKEN=***; module load cuda",
    'WANDB_API_KEY="hunter2"': 'WANDB_API_KEY="***"',
    "PASSWORD=hunter2": "PASSWORD=***",
    f"https://x.example/file?token={FAKE}&part=2": "https://x.example/file?token=***&part=2",
    f"Authorization: Bearer {FAKE}": "Authorization: Bearer ***",
}
ORDINARY = [
    "0df10b5e8c1a4b7d9f3e2c6a5b8d7e9f0a1b2c3d",  # a git commit
    "export HF_TOKEN=$(cat ~/.token)",
    "export HF_TOKEN=$MINE",
    "train.train_tokens=400000 data.validation_tokens=32768 pad_token=<s>",
    "https://huggingface.co/google/gemma-2-2b",
    "sk-learn, hf_hub, risk-free",
    "user@host:/path",
    "monkey=business keyboard=us",
]


@pytest.mark.parametrize(("text", "shown"), SECRETS.items())
def test_secrets_are_detected_and_hidden(text: str, shown: str) -> None:
    assert secret_in(text)
    assert redacted(text) == shown
    assert not secret_in(shown)


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_is_unchanged(text: str) -> None:
    assert not secret_in(text)
    assert redacted(text) == text


def test_values_of_secret_variables_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse")
    monkeypatch.setenv("MY_KEY", "tiny")  # too short: it may be an ordinary word
    assert redacted("said: correct horse, a tiny model") == "said: ***, a tiny model"


@pytest.mark.parametrize(
    "override",
    [
        "launcher.setup=['export HF_TOKEN=hunter2']",
        "model.name=https://me:hunter2@git.example/model",
        "launcher.sbatch={export:'WANDB_API_KEY=hunter2'}",
        "launcher.sbatch={WANDB_API_KEY:hunter2}",
    ],
)
def test_a_config_with_a_secret_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        composed(override)
    assert str(refusal.value).startswith(override.partition("=")[0])
    assert "wandb login" in str(refusal.value)
    assert "hunter2" not in str(refusal.value)


def test_secrets_are_neither_printed_nor_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_PASSWORD", "correct horse")
    text = f"no access with hf_{FAKE} or correct horse"
    console.say(text)
    console.complain("error", text)
    folder = RunFolder(tmp_path)
    folder.write_failure(text, f"Traceback\n{text}")
    printed = capsys.readouterr()
    assert printed.out == "no access with *** or ***\n"
    assert printed.err == "error: no access with *** or ***\n"
    assert json.loads(folder.failure.read_text()) == {
        "message": "no access with *** or ***",
        "details": "Traceback\nno access with *** or ***",
    }
