"""The command that repeats a run, from its config."""

import operator
import shlex
from contextlib import suppress
from functools import cache, reduce
from typing import Any

from sae_lora.config.compose import default
from sae_lora.config.schema import WRITTEN_BY_PLANNER
from sae_lora.config.serialize import as_dict, keys, written

_EXECUTION_KEYS = {
    "launcher",
    "evaluation",
    "tracking",
    "objective",
    "output_dir",
    "data.cache_dir",
    "train.device",
}
"""Keys for where and how a run is executed; they do not change what it computes."""


def command(config: dict[str, Any]) -> str:
    """The command that repeats a run, with an override for every value that differs from the default.

    Args:
        config: The content of `config.yaml`.

    Returns:
        The command, quoted for a shell.
    """
    defaults = flat(as_dict(default()))
    overrides = [
        f"{key}={written(value)}" for key, value in flat(config).items() if value != defaults[key]
    ]
    return " ".join(["sae-lora launch", *map(shlex.quote, overrides)])


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key, only of keys that a user may set and that change what is computed.

    Args:
        config: The content of `config.yaml`. Keys that an older version did not have are left out.
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
    left_out = WRITTEN_BY_PLANNER | _EXECUTION_KEYS
    return [key for key in known if key not in groups and not {key, key.split(".")[0]} & left_out]
