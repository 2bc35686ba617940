"""Errors of the Hugging Face hub in one clear message, whatever library raised them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hub
from huggingface_hub.file_download import repo_folder_name
from safetensors import SafetensorError

from sae_lora.common.errors import UserError, causes


class UnreachableError(UserError):
    """The hub does not answer, and what is asked for is not in the cache."""


_OFFLINE = "it is not in the local cache, and the hub cannot be reached (no network, or offline mode)"
_BROKEN = "the hub cannot be reached, or the connection broke; check the network and try again"


@contextmanager
def explained(field: str, name: str, cannot: str = "be loaded") -> Iterator[None]:
    """Turn what loading from the hub can raise into `<field> = <name> cannot <cannot>: <reason>`.

    Raises:
        UserError: In place of the libraries' own errors; the original is its cause.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is None:
            raise
        kind = UnreachableError if reason in (_OFFLINE, _BROKEN) else UserError
        raise kind(f"{field} = {name!r} cannot {cannot}: {reason}") from error


def _reason(error: BaseException) -> str | None:
    """A reason in words, or `None` for an error that has nothing to do with fetching files.

    Libraries wrap each other's errors, so the whole chain is looked at, the most telling kind first.
    """
    chain = list(causes(error))
    text = "\n".join(map(str, chain)).lower()
    names = {type(link).__name__ for link in chain}

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(link, kinds) for link in chain)

    def says(*words: str) -> bool:
        return any(word in text for word in words)

    if has(hub.GatedRepoError):
        return (
            "the repository is gated. Accept its terms on its Hugging Face page, "
            "then log in with `hf auth login`"
        )
    if has(hub.RevisionNotFoundError):
        return "the repository has no such revision"
    if has(hub.RepositoryNotFoundError) or "DatasetNotFoundError" in names:
        return "there is no such repository, or it is private and you are not logged in"
    if has(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        return _OFFLINE
    if has(hub.RemoteEntryNotFoundError, hub.EntryNotFoundError):
        return "the repository lacks a file that is needed; is it of the kind that the config says?"
    if has(hub.HFValidationError):
        return "that is neither a folder on this machine nor a repository's name (org/name)"
    if says("dataset scripts are no longer supported"):
        return (
            "it holds a loading script, and none is ever run here. Most such data sets have a copy that "
            "the hub converted itself: data.revision=refs/convert/parquet"
        )
    if has(SafetensorError) or says("consistency check failed", "not a zip file", "incomplete"):
        return "a downloaded file is damaged. Delete it from the Hugging Face cache and try again"
    if has(ConnectionError, TimeoutError) or any(
        type(link).__module__.startswith(("httpx", "httpcore", "requests", "urllib3", "aiohttp"))
        for link in chain
    ):
        return _BROKEN
    if has(hub.HfHubHTTPError):
        return f"the hub answered: {chain[-1]}"
    if has(OSError) and says("does not appear to have a file named", "is not a local folder"):
        return str(chain[0]).splitlines()[0]
    return None


_COMMIT = r"[0-9a-f]{40}"


def cached_commit(repo: str, revision: str | None = None) -> str | None:
    """The commit of the cached copy of a model's repository; `None` for what is not from the hub."""
    if revision is not None and re.fullmatch(_COMMIT, revision):
        return revision
    try:
        folder = repo_folder_name(repo_id=repo, repo_type="model")
    except hub.HFValidationError:  # the path of a folder on this machine
        return None
    reference = Path(constants.HF_HUB_CACHE, folder, "refs", revision or "main")
    return reference.read_text().strip() if reference.is_file() else None


def dataset_commit(name: str, revision: str | None) -> str:
    """The commit that a data set's revision stands for now; a commit stands for itself, offline too.

    Raises:
        UserError: Where the data set cannot be found or the hub cannot be asked.
    """
    if revision is not None and re.fullmatch(_COMMIT, revision):
        return revision
    with explained("data.name", name):
        commit = HfApi().dataset_info(name, revision=revision, timeout=30).sha
    assert commit is not None
    return commit


_NOT_TAKEN = {
    401: "you are not logged in there: `hf auth login`, with a token that may write",
    402: "the hub wants to be paid for it first",
    403: "your token may not write there; its name, your rights in that organisation and the token's "
    "are to be looked at (`hf auth whoami`)",
}


def send(folder: Path, repo: str, *, private: bool, revision: str | None) -> str:
    """Send a folder's files to a model's repository and branch, made where there are none.

    Returns:
        Their address.

    Raises:
        UserError: Where the hub does not take them, and where `private` meets a public repository.
    """
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
        except hub.HfHubHTTPError as error:
            reason = _NOT_TAKEN.get(error.response.status_code)
            if reason is None:
                raise
            raise UserError(f"--repo = {repo!r} cannot be written: {reason}") from error
    return f"{constants.ENDPOINT}/{repo}" + (f"/tree/{revision}" if revision is not None else "")
