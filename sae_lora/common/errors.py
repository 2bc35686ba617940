"""Errors that a user can cause. Each has one message: the problem, and the way to correct it."""

import difflib
from collections.abc import Iterable, Iterator

EXIT_FAILED, EXIT_HELD, EXIT_NOT_TOGETHER, EXIT_INTERRUPTED = 1, 73, 74, 75
"""Exit codes of a process that did not finish its runs: a run failed (its `failure.json` has the cause);
another process holds a run; the runs cannot train together (too little memory, for example), but a
part of them may; the runs were asked to stop and can resume from their checkpoints."""
EXIT_STOPPED = 130
"""The exit code of a command that was stopped, as a shell has it for SIGINT."""


class UserError(Exception):
    """An error that the user can correct. It is shown as one message, without a traceback."""


class ConfigError(UserError):
    """A config value that cannot work.

    Args:
        field: The dotted key, as typed on the command line.
        got: The refused value.
        allowed: The allowed values, in words.
        nearest: The closest valid value, if there is one.
        because: The reason, if `allowed` does not make it clear.
    """

    def __init__(
        self,
        field: str,
        got: object,
        allowed: str,
        nearest: object | None = None,
        because: str | None = None,
    ) -> None:
        self.field = field
        self.got = got
        self.allowed = allowed
        self.nearest = nearest
        typed = "null" if got is None else repr(got) if isinstance(got, str) else str(got)
        reason = f": {because}" if because else ""
        near = None if nearest is None else f"{field}={nearest}"
        super().__init__(
            with_nearest(
                f"{field} = {typed} cannot be used{reason}", f"  allowed: {allowed}", nearest=near
            )
        )


class NoSuchCellError(ConfigError):
    """A point without an SAE. A sweep drops this point; a single run is refused."""


def nearest_name(name: str, names: Iterable[str], similarity: float = 0.5) -> str | None:
    """The name that is closest in spelling; `None` if no name is close.

    Args:
        name: The misspelt name.
        names: The names that exist.
        similarity: The least share of letters in common: 0 for any two names, 1 for equal ones.
    """
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=similarity)
    return matches[0] if matches else None


def with_nearest(*lines: str, nearest: str | None) -> str:
    """The lines of a refusal, with the nearest valid name or value on the last one if there is one."""
    return "\n".join(lines if nearest is None else (*lines, f"  nearest valid: {nearest}"))


def listed(names: Iterable[object], limit: int = 12) -> str:
    """The names in one line, cut after `limit` names."""
    words = [str(name) for name in names]
    end = f", … ({len(words)} in total)" if len(words) > limit else ""
    return ", ".join(words[:limit]) + end


def is_out_of_memory(error: BaseException) -> bool:
    """True if the error means too little memory, of a GPU or of the machine."""
    words = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")
    # The name of torch's class is compared, because this module does not import torch.
    is_known_class = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_known_class or any(word in str(error) for word in words)


class GoneError(Exception):
    """Another process has ended, so that the processes cannot continue together."""


def is_gone(error: BaseException) -> bool:
    """True if the error means that another process of a pack has ended, wherever it was raised."""
    # torch's classes, which are not imported here; for gloo, torch has none. Other connections, such as
    # those to the hub, fail with similar words.
    names = ("DistBackendError", "DistNetworkError", "DistStoreError")
    is_known_class = isinstance(error, GoneError) or type(error).__name__ in names
    return is_known_class or "gloo/transport" in str(error)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and the chain of its causes: libraries wrap each other's errors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
