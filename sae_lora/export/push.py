"""An exported folder, sent to the Hugging Face hub."""

from pathlib import Path

from sae_lora.common import hub
from sae_lora.common.errors import UserError

_OF_EVERY_EXPORT = ("README.md", "config.yaml", "curve.jsonl", "summary.json")
_WEIGHTS = ("adapter_config.json", "config.json")


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Sends what `export` wrote to a repository, which is made where there is none.

    Args:
        folder: What `export` wrote.
        repo: `org/name`.
        private: Whether the repository is to be seen by its owners alone.
        revision: The branch; made where there is none.

    Returns:
        The address at which it can be seen.

    Raises:
        UserError: For any other folder, and where the hub does not take it.
    """
    missing = [name for name in _OF_EVERY_EXPORT if not (folder / name).is_file()]
    if missing or not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(
            f"{folder} is not what `python -m sae_lora export <run> --to DIR` writes: it lacks "
            f"{', '.join(missing) or 'the weights'}"
        )
    return hub.send(folder, repo, private=private, revision=revision)
