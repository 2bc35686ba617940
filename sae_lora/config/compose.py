"""Hydra's side of a command: configs are composed, and errors become one clear message."""

import os
import re
import shlex
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException, ValidationError

from sae_lora.common.console import complain
from sae_lora.common.errors import ConfigError, UserError, causes, listed, nearest_name
from sae_lora.config.schema import Config
from sae_lora.config.serialize import keys, typed, unknown_key
from sae_lora.config.validate import check

ConfigStore.instance().store(name="schema", node=Config)

_INSTALLED = Path(__file__).parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "conf"
"""The values: in the installed package, or beside it in a clone of the repository."""
RENAMED_GROUPS = {"arm": "variant"}
"""Config groups by their names in version 0.1, and their names now."""
TRACEBACK_VARIABLE = "HYDRA_FULL_ERROR"
"""Hydra's own name for "show me the traceback", which users know."""


def checked(composed: DictConfig) -> Config:
    """One composed point, typed and checked.

    Raises:
        ConfigError: Where it cannot work.
    """
    config = typed(composed)
    check(config)
    return config


@cache
def default() -> Config:
    """The config of `python launch.py`, typed; not checked."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config"))


def points(arguments: Sequence[str], run_now: Callable[[Config], float]) -> list[Config]:
    """The points that a command line stands for, as Hydra and its sweeper compose them.

    Args:
        arguments: Overrides and Hydra's options: `["-m", "lora.rank=1,4"]`.
        run_now: Runs a point and returns its objective, to be minimised. Hydra's other launchers and
            sweepers call it, as they need each result before the next point; then no points are left.

    Raises:
        UserError: For a point that cannot work.
    """
    composed: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def collect(point: DictConfig) -> float | None:
        if _is_dispatched_by_hydra():
            return run_now(checked(point))
        composed.append(point)
        return None

    before = sys.argv
    sys.argv = [before[0], *map(_with_new_names, with_options_first(arguments))]  # Hydra reads no other
    try:
        with mistakes_explained():
            collect()
            return [checked(point) for point in composed]
    finally:
        sys.argv = before


def with_options_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with overrides at the end: Hydra does not read options after overrides."""
    return sorted(arguments, key=lambda word: "=" in word and not word.startswith("-"))


def _with_new_names(argument: str) -> str:
    """An argument that names a group as version 0.1 did, with today's name."""
    for old, new in RENAMED_GROUPS.items():
        if argument.startswith(f"{old}="):
            complain("note", f"the config group `{old}` is called `{new}` now")
            return argument.replace(old, new, 1)
    return argument


def _is_dispatched_by_hydra() -> bool:
    """Whether the user chose another Hydra launcher, or a sweeper that needs each point's result."""
    chosen = HydraConfig.get()
    basic = "hydra._internal.core_plugins.basic_"
    return not all(part._target_.startswith(basic) for part in (chosen.launcher, chosen.sweeper))


@contextmanager
def mistakes_explained() -> Iterator[None]:
    """Turn Hydra's and OmegaConf's errors inside the block into one that names the field and the value.

    Raises:
        UserError: In their place.
    """
    before = os.environ.get(TRACEBACK_VARIABLE)
    os.environ[TRACEBACK_VARIABLE] = "1"  # otherwise Hydra prints errors itself and exits
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explanation(error)) from error
    finally:
        del os.environ[TRACEBACK_VARIABLE]
        if before is not None:
            os.environ[TRACEBACK_VARIABLE] = before


def explanation(error: BaseException) -> str:
    """The user's mistake in terms of fields and values, whichever library noticed it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        allowed = f"one of {listed(error.options, 40)}"
        return str(ConfigError(group, choice, allowed, nearest_name(choice, error.options)))
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        quoted = shlex.quote(f'{key}="{value}"')
        return (
            f"{error.override} cannot be read: {str(error).splitlines()[0]}\n"
            f"  text with special characters needs quotes inside quotes: {quoted}"
        )
    for link in causes(error):
        text = str(link)
        if isinstance(link, ValidationError) and getattr(link, "full_key", None):
            return _explain_type(str(link.full_key), text)
        if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
            key = (match[1] or match[2]).split("@")[0]
            if key in RENAMED_GROUPS:
                return f"the config group `{key}` is called `{RENAMED_GROUPS[key]}` now"
            if key not in keys():
                return str(unknown_key(key))
    first, *more = str(error).splitlines()
    return "\n  ".join([first, *(line for line in more if TRACEBACK_VARIABLE not in line)])


def _explain_type(key: str, text: str) -> str:
    match = re.search(r"[Vv]alue '(.*?)'", text)
    got = match[1] if match else "?"
    kind = keys().get(key)
    optional = " or null" if "None" in str(kind) else ""
    for part in (kind, *typing.get_args(kind)):
        if members := getattr(part, "__members__", None):
            allowed = f"one of {listed(members)}{optional}"
            return str(ConfigError(key, got, allowed, nearest_name(got, members)))
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    allowed = next((word for name, word in words.items() if name in str(kind)), str(kind))
    nearest = round(float(got)) if kind is int and re.fullmatch(r"-?\d+(\.\d+)?", got) else None
    return str(ConfigError(key, got, allowed + optional, nearest))
