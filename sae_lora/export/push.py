"""Upload of an exported folder to the Hugging Face hub. Imports no torch."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from sae_lora.common.errors import UserError
from sae_lora.common.hub import explained

_OF_EVERY_EXPORT = ("README.md", "config.yaml", "curve.jsonl", "summary.json")
_WEIGHTS = ("adapter_config.json", "config.json")
_NOT_TAKEN = {
    401: "you are not logged in there: `hf auth login`, with a token that may write",
    402: "the hub wants to be paid for it first",
    403: "your token may not write there; its name, your rights in that organisation and the token's "
    "are to be looked at (`hf auth whoami`)",
}


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Send an exported folder to a model's repository and branch, made where there are none.

    Returns:
        Its address.

    Raises:
        UserError: For a folder that `export` has not written, where the hub does not take it, and where
            `private` meets a public repository.
    """
    missing = [name for name in _OF_EVERY_EXPORT if not (folder / name).is_file()]
    if missing or not any((folder / name).is_file() for name in _WEIGHTS):
        raise UserError(
            f"{folder} is not what `sae-lora export <run> --to DIR` writes: it lacks "
            f"{', '.join(missing) or 'the weights'}"
        )
    if repo.count("/") != 1:
        raise UserError(f"--repo = {repo!r} cannot be written: it is to be org/name")
    if constants.is_offline_mode():
        raise UserError(f"--repo = {repo!r} cannot be written: HF_HUB_OFFLINE is set")
    api = HfApi()
    with explained("--repo", repo, "be written"):
        try:
            api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise UserError(f"--repo = {repo!r} is there and public; --private is for a new one")
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            message = "Exported by sae_lora"
            api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=message
            )
        except HfHubHTTPError as error:
            reason = _NOT_TAKEN.get(error.response.status_code)
            if reason is None:
                raise
            raise UserError(f"--repo = {repo!r} cannot be written: {reason}") from error
    return f"{constants.ENDPOINT}/{repo}" + (f"/tree/{revision}" if revision is not None else "")
