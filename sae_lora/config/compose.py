"""Between Hydra and the launcher: points are collected, and errors become one clear message."""

import os
import re
import traceback
import typing
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException, ValidationError

from sae_lora.common.console import complain
from sae_lora.common.errors import ConfigError, UserError, causes, listed, nearest_name
from sae_lora.common.lazy_imports import import_quickly
from sae_lora.config.schema import Config
from sae_lora.config.serialize import keys, typed, unknown_key
from sae_lora.config.validate import check

ConfigStore.instance().store(name="schema", node=Config)

CONF = Path(__file__).parents[2] / "conf"
"""The values, where the package lies beside them."""
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


def default() -> Config:
    """What `python launch.py` composes, typed; not checked."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config"))


def is_dispatched_by_hydra() -> bool:
    """Whether the user chose another Hydra launcher, or a sweeper that needs each point's result."""
    hydra = HydraConfig.get()
    launcher, sweeper = hydra.launcher._target_, hydra.sweeper._target_
    return not (
        launcher.startswith("hydra._internal.core_plugins.basic_launcher")
        and sweeper.startswith("hydra._internal.core_plugins.basic_sweeper")
    )


def main(compose: Callable[[], object], launch: Callable[[], int]) -> int:
    """Composes, launches, and returns the exit code; what a user can mend is one message."""
    import_quickly()
    full = os.environ.get(TRACEBACK_VARIABLE) == "1"
    os.environ[TRACEBACK_VARIABLE] = "1"  # or Hydra prints errors itself and exits
    try:
        compose()
        return launch()
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if full:
            traceback.print_exc()
        complain("error", explanation(error))
        return 1
    except KeyboardInterrupt:
        complain("stopped", "what was reached is saved; the same command goes on from there")
        return 130


def explanation(error: BaseException) -> str:
    """What the user did, in terms of fields and values, whichever library noticed it."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        allowed = f"one of {listed(error.options, 40)}"
        return str(ConfigError(group, choice, allowed, nearest_name(choice, error.options)))
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: {str(error).splitlines()[0]}"
    for link in causes(error):
        text = str(link)
        if isinstance(link, ValidationError) and getattr(link, "full_key", None):
            return _explain_type(str(link.full_key), text)
        if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
            key = (match[1] or match[2]).split("@")[0]
            if key not in keys():
                return str(unknown_key(key))
    return str(error).splitlines()[0] + _hint(error)


def _hint(error: BaseException) -> str:
    lines = str(error).splitlines()[1:]
    return "".join(f"\n  {line}" for line in lines if "HYDRA_FULL_ERROR" not in line)


def _explain_type(key: str, text: str) -> str:
    match = re.search(r"[Vv]alue '(.*?)'", text)
    got = match[1] if match else "?"
    kind = keys().get(key)
    optional = " or null" if "None" in str(kind) else ""
    for one in (kind, *typing.get_args(kind)):
        if members := getattr(one, "__members__", None):
            allowed = f"one of {listed(members)}{optional}"
            return str(ConfigError(key, got, allowed, nearest_name(got, members)))
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    names = [word for name, word in words.items() if name in str(kind)]
    nearest = round(float(got)) if kind is int and re.fullmatch(r"-?\d+(\.\d+)?", got) else None
    return str(ConfigError(key, got, (names[0] if names else str(kind)) + optional, nearest))
