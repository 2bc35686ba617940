"""The command that makes a run once more, from its config alone."""

import re
import shlex
from functools import cache
from typing import Any

from sae_lora.config.compose import CONF, default
from sae_lora.config.serialize import as_dict, keys

_NOT_ASKED_FOR = {
    *("launcher", "evaluation", "tracking", "output_dir", "data.cache_dir", "train.device"),
    *("model.commit", "data.version", "sae.used", "lora.begun"),
}
"""What says where a run is made, or what the planner writes."""
_PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")
_WORDS = {"null", "true", "false", "nan", "inf", "yes", "no", "on", "off"}
"""Plain words that are read as something else than text."""


def command(config: dict[str, Any]) -> str | None:
    """What to type to make the same run: every value that is not the default's.

    Args:
        config: As `config.yaml` holds it.

    Returns:
        The command, quoted for a shell; `None` where `conf/` is not beside the package.
    """
    if not CONF.is_dir():
        return None
    defaults = _default_values()
    overrides = [
        f"{key}={written(value)}" for key, value in flat(config).items() if value != defaults[key]
    ]
    return " ".join(["python launch.py", *map(shlex.quote, overrides)])


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
            return "{" + ",".join(f"{key}:{written(one)}" for key, one in value.items()) + "}"
        case str():
            if _PLAIN.fullmatch(value) and value.lower() not in _WORDS:
                return value
            # A backslash stands for itself, but for those before a quote.
            escaped = re.sub(
                r'(\\*)("|$)', lambda found: found[1] * 2 + ("\\" * bool(found[2])) + found[2], value
            )
            return f'"{escaped}"'
        case _:
            raise NotImplementedError(type(value))


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Values by dotted key, those that a user sets and that say what is computed.

    Args:
        config: As `config.yaml` holds it. What an older version did not have is left out.
    """
    found = {}
    for key in _settable():
        value: Any = config
        for part in key.split("."):
            value = value.get(part, _ABSENT) if isinstance(value, dict) else _ABSENT
        if value is not _ABSENT:
            found[key] = value
    return found


_ABSENT = object()


@cache
def _settable() -> list[str]:
    def asked_for(key: str) -> bool:
        parts = key.split(".")
        return not {".".join(parts[:end]) for end in range(1, len(parts) + 1)} & _NOT_ASKED_FOR

    known = keys()
    groups = {key.rpartition(".")[0] for key in known}
    return [key for key in known if key not in groups and asked_for(key)]


@cache
def _default_values() -> dict[str, Any]:
    return flat(as_dict(default()))
