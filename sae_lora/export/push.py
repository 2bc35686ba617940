"""Upload of an exported folder to the Hugging Face hub. Imports no torch."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from sae_lora.common.errors import UserError
from sae_lora.common.hub import explained
from sae_lora.records.folder import MODEL_CARD

_EXPORTED_FILES = (MODEL_CARD, "config.yaml", "curve.jsonl", "summary.json")
_WEIGHTS = ("adapter_config.json", "config.json", "sae", "output_adapter")
_REFUSALS = {
    401: "you are not logged in; run `hf auth login` with a token that has write access",
    402: "the hub requires a payment",
    403: "your token has no write access; check the repository name, your role in the organisation and "
    "the permissions of the token (`hf auth whoami`)",
}


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload an exported folder to a model repository, and create repository and branch if necessary.

    Returns:
        The address of the repository.

    Raises:
        UserError: If `export` has not written the folder, the hub refuses the upload, or `private` is
            set and the repository is public.
    """
    missing = [name for name in _EXPORTED_FILES if not (folder / name).is_file()]
    if missing or not any((folder / name).exists() for name in _WEIGHTS):
        raise UserError(
            f"{folder} is not an export: {', '.join(missing) or 'weights'} missing; "
            "write it with `sae-lora export <run> --to DIR`"
        )
    if repo.count("/") != 1:
        raise UserError(f"--repo = {repo!r} cannot be written: it must have the form org/name")
    if constants.is_offline_mode():
        raise UserError(f"--repo = {repo!r} cannot be written: HF_HUB_OFFLINE is set")
    api = HfApi()
    with explained("--repo", repo, "be written"):
        try:
            api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.model_info(repo).private:
                raise UserError(
                    f"--repo = {repo!r} exists and is public; --private applies to new repositories only"
                )
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            message = "Exported by sae_lora"
            api.upload_folder(
                repo_id=repo, folder_path=folder, revision=revision, commit_message=message
            )
        except HfHubHTTPError as error:
            reason = _REFUSALS.get(error.response.status_code)
            if reason is None:
                raise
            raise UserError(f"--repo = {repo!r} cannot be written: {reason}") from error
    return f"{constants.ENDPOINT}/{repo}" + (f"/tree/{revision}" if revision is not None else "")
