"""Errors of the Hugging Face hub as one clear message, whichever library raised them."""

import errno
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
    """The hub does not answer, and the requested files are not in the cache."""


_OFFLINE = (
    "there is no such folder on this machine, it is not in the local cache, and the hub cannot be "
    "reached (no network, or offline mode)"
)
_BROKEN = "the hub cannot be reached, or the connection broke; check the network and try again"


@contextmanager
def explained(field: str, name: str, cannot: str = "be loaded") -> Iterator[None]:
    """Turn errors of loading from the hub into `<field> = <name> cannot <cannot>: <reason>`.

    Raises:
        UserError: Replaces the library's error, which is its cause.
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
    """The reason in words; `None` for an error that is not about fetching files.

    Libraries wrap each other's errors, so all causes are searched, for the most specific kind first.
    """
    chain = list(causes(error))
    text = "\n".join(map(str, chain)).lower()
    names = {type(cause).__name__ for cause in chain}

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in chain)

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
    for cause in chain:
        if isinstance(cause, OSError) and cause.filename and cause.errno not in _EXPECTED:
            return _refused_by_disk(cause)
    if has(hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        return _OFFLINE
    if has(hub.RemoteEntryNotFoundError, hub.EntryNotFoundError):
        return "the repository lacks a required file; check that it is the right kind of repository"
    if has(hub.HFValidationError):
        return "it is neither a folder on this machine nor the name of a repository (org/name)"
    if says("dataset scripts are no longer supported"):
        return (
            "it needs a loading script, and scripts from the hub are never run. Most of these data sets "
            "have a copy that the hub converted: data.revision=refs/convert/parquet"
        )
    if has(SafetensorError) or says("consistency check failed", "not a zip file", "incomplete"):
        return "a downloaded file is damaged. Delete it from the Hugging Face cache and try again"
    if has(ConnectionError, TimeoutError) or any(
        type(cause).__module__.startswith(("httpx", "httpcore", "requests", "urllib3", "aiohttp"))
        for cause in chain
    ):
        return _BROKEN
    if has(hub.HfHubHTTPError):
        return f"the hub answered: {chain[-1]}"
    if has(OSError) and says("does not appear to have a file named", "is not a local folder"):
        return str(chain[0]).splitlines()[0]
    return None


_EXPECTED = (None, errno.ENOENT, errno.EEXIST)
"""Codes of errors that libraries handle themselves: a file that is not in the cache yet, for example."""


def _refused_by_disk(error: OSError) -> str:
    reason = f"{error.filename}: {error.strerror}"
    caches = (constants.HF_HOME, constants.HF_HUB_CACHE)
    if any(Path(str(error.filename)).is_relative_to(cache) for cache in caches):
        reason += ". This is the Hugging Face cache: set HF_HOME to a folder that can be written"
    return reason


_COMMIT = r"[0-9a-f]{40}"


def cached_commit(repo: str, revision: str | None = None) -> str | None:
    """The commit of the cached copy of a model's repository; `None` if it is not from the hub."""
    if revision is not None and re.fullmatch(_COMMIT, revision):
        return revision
    try:
        folder = repo_folder_name(repo_id=repo, repo_type="model")
    except hub.HFValidationError:  # the path of a folder on this machine
        return None
    reference = Path(constants.HF_HUB_CACHE, folder, "refs", revision or "main")
    return reference.read_text().strip() if reference.is_file() else None


def dataset_commit(name: str, revision: str | None) -> str:
    """The current commit of a data set's revision. If `revision` is a commit, no network is needed.

    Raises:
        UserError: If the data set does not exist or the hub does not answer.
    """
    if revision is not None and re.fullmatch(_COMMIT, revision):
        return revision
    with explained("data.name", name):
        commit = HfApi().dataset_info(name, revision=revision, timeout=30).sha
    assert commit is not None
    return commit
