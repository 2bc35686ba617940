"""Errors that a user can cause: one message that says what is wrong and what would be right."""

import difflib
from collections.abc import Iterable, Iterator

EXIT_FAILED, EXIT_HELD, EXIT_NOT_TOGETHER, EXIT_INTERRUPTED = 1, 73, 74, 75
"""Exit codes of an attempt that did not finish its runs: the cause is in `failure.json`; another
process holds a run; the runs cannot train together (too little memory, say), but fewer of them may; they
were asked to stop and go on from their checkpoints."""


class UserError(Exception):
    """Something the user can mend. Shown as one message, without a traceback."""


class ConfigError(UserError):
    """A config value that cannot work.

    Args:
        field: The dotted key, as typed on the command line.
        got: The value found there.
        allowed: What it may be, in words.
        nearest: The closest valid value, where there is one.
        because: Why this value cannot work, where `allowed` alone does not say it.
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
        lines = [f"{field} = {typed} cannot be used" + (f": {because}" if because else "")]
        lines.append(f"  it may be: {allowed}")
        if nearest is not None:
            lines.append(f"  nearest valid: {field}={nearest}")
        super().__init__("\n".join(lines))


class NoSuchCellError(ConfigError):
    """A point of a grid at which there is no SAE: dropped from a sweep, refused alone."""


def nearest_name(name: str, names: Iterable[str]) -> str | None:
    """The name closest in spelling, or `None` where nothing is close."""
    matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return matches[0] if matches else None


def listed(names: Iterable[object], most: int = 12) -> str:
    """The names in one line, cut after `most` of them."""
    every = [str(name) for name in names]
    rest = f", … ({len(every)} in all)" if len(every) > most else ""
    return ", ".join(every[:most]) + rest


def is_out_of_memory(error: BaseException) -> bool:
    """True where there was too little memory, on a GPU or not."""
    words = ("can't allocate memory", "CUDA error: out of memory", "ALLOC_FAILED")
    # torch's error is known by its name, because this module works without torch.
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(word in str(error) for word in words)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, the one it was raised from, and so on: libraries wrap each other's errors."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
