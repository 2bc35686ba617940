"""The command that makes a run once more, from its config alone."""

import operator
import re
import shlex
from contextlib import suppress
from functools import cache, reduce
from typing import Any

from sae_lora.config.compose import default
from sae_lora.config.schema import WRITTEN_BY_PLANNER
from sae_lora.config.serialize import as_dict, keys

_OF_THE_PLACE = {"launcher", "evaluation", "tracking", "output_dir", "data.cache_dir", "train.device"}
"""Keys that say where a run is made, not what it computes."""
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")
_WORDS = {"null", "true", "false", "nan", "inf", "yes", "no", "on", "off"}
"""Plain words that Hydra does not read as text."""


def command(config: dict[str, Any]) -> str:
    """The command that makes the same run, with every value that is not the default's.

    Args:
        config: As `config.yaml` holds it.

    Returns:
        The command, quoted for a shell.
    """
    defaults = flat(as_dict(default()))
    overrides = [
        f"{key}={written(value)}" for key, value in flat(config).items() if value != defaults[key]
    ]
    return " ".join(["sae-lora launch", *map(shlex.quote, overrides)])


def written(value: Any) -> str:
    """A value as Hydra reads it on the command line."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list():
            return f"[{','.join(map(written, value))}]"
        case dict():
            return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
        case str():
            if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
                return value
            # A backslash stands for itself, except before a quote.
            escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
            return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'
        case _:
            raise NotImplementedError(type(value))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key, those that a user sets and that say what is computed.

    Args:
        config: As `config.yaml` holds it. What an older version did not have is left out.
    """
    values = {}
    for key in _settable():
        with suppress(KeyError, TypeError):
            values[key] = reduce(operator.getitem, key.split("."), config)
    return values


@cache
def _settable() -> list[str]:
    known = keys()
    groups = {key.rpartition(".")[0] for key in known}
    left_out = WRITTEN_BY_PLANNER | _OF_THE_PLACE
    return [key for key in known if key not in groups and not {key, key.split(".")[0]} & left_out]
