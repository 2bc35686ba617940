"""Upload of an exported folder to the Hugging Face hub. Imports no torch."""

from pathlib import Path

from sae_lora.common import hub
from sae_lora.common.errors import UserError

_OF_EVERY_EXPORT = ("README.md", "config.yaml", "curve.jsonl", "summary.json")
_WEIGHTS = ("adapter_config.json", "config.json")


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Send an exported folder to a repository, as `hub.send` does, and return its address.

    Raises:
        UserError: For a folder that `export` has not written, and where the hub refuses it.
    """
    missing = [name for name in _OF_EVERY_EXPORT if not (folder / name).is_file()]
    if missing or not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(
            f"{folder} is not what `python -m sae_lora export <run> --to DIR` writes: it lacks "
            f"{', '.join(missing) or 'the weights'}"
        )
    return hub.send(folder, repo, private=private, revision=revision)
