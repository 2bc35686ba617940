"""Composition of configs through Hydra, with errors as one clear message."""

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
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException, ValidationError

from sae_lora.common.console import complain
from sae_lora.common.errors import ConfigError, UserError, causes, listed, nearest_name
from sae_lora.config.schema import Config
from sae_lora.config.serialize import PLAIN_TEXT, keys, typed, unknown_key, written
from sae_lora.config.validate import check

ConfigStore.instance().store(name="schema", node=Config)

_INSTALLED = Path(__file__).parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "conf"
"""Folder of the config values: in the installed package, or beside it in a clone of the repository."""
RENAMED_GROUPS = {"arm": "variant"}
"""Names of config groups in version 0.1, with their present names."""
TRACEBACK_VARIABLE = "HYDRA_FULL_ERROR"
"""Hydra's environment variable that makes it print tracebacks."""


def checked(composed: DictConfig) -> Config:
    """One composed point, typed and checked.

    Raises:
        ConfigError: If a value or a combination is impossible.
    """
    config = typed(composed)
    check(config)
    return config


@cache
def default() -> Config:
    """The default config, that of `sae-lora launch` without overrides; typed, not checked."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config"))


def points(arguments: Sequence[str], run_now: Callable[[Config], float]) -> list[Config]:
    """The points of a command line, as Hydra and its sweeper compose them.

    Args:
        arguments: Overrides and options of Hydra: `["-m", "lora.rank=1,4"]`.
        run_now: Runs a point and returns its objective, which is minimised. Launchers and sweepers other
            than Hydra's basic ones call it, because they may need a result before the next point. The
            returned list is then empty.

    Raises:
        UserError: For an impossible point.
    """
    composed: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def collect(point: DictConfig) -> float | None:
        if _is_dispatched_by_hydra():
            return run_now(checked(point))
        composed.append(point)
        return None

    words = [with_quoted_text(_with_new_names(word)) for word in with_options_first(arguments)]
    original_argv = sys.argv
    # hydra.main reads its arguments only from sys.argv.
    sys.argv = [original_argv[0], *words]
    try:
        with mistakes_explained():
            collect()
            return [checked(point) for point in composed]
    finally:
        sys.argv = original_argv


def with_options_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with overrides last: Hydra does not read options after overrides."""
    return sorted(arguments, key=lambda word: "=" in word and not word.startswith("-"))


def _with_new_names(argument: str) -> str:
    """The argument with the present name of its group, if it uses a name of version 0.1."""
    for old, new in RENAMED_GROUPS.items():
        if argument.startswith(f"{old}="):
            complain("note", f"the config group `{old}` is called `{new}` now")
            return argument.replace(old, new, 1)
    return argument


def with_quoted_text(argument: str) -> str:
    """The argument with quotes around text that Hydra cannot read without them.

    This is the path of an existing file or folder, such as `data.files=a,b=[1].txt`, and a path or name
    that Hydra refuses, such as `sae.path=saes/{block}`. Between the commas of a sweep or a list, each
    text gets its own quotes. Everything that Hydra can read keeps its meaning.

    Raises:
        ConfigError: For the path of an existing file or folder that looks like an interpolation.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in _text_keys() or PLAIN_TEXT.fullmatch(value):
        return argument
    if os.path.exists(os.path.expanduser(value)):  # noqa: PTH110, PTH111 False for a path that is too long
        if "${" in value:
            because = "${…} stands for the value of another key"
            allowed = "a path without ${: rename the file or folder, or make a link to it"
            raise ConfigError(key, value, allowed, because=because)
        return f"{key}={written(value)}"
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return f"{key}={_quoted(value)}"
    return argument


@cache
def _text_keys() -> frozenset[str]:
    """The keys whose values are text."""
    texts = {key for key, kind in keys().items() if kind in (str, str | None)}
    return frozenset(texts | {"data.files"})


def _quoted(value: str) -> str:
    """A value of Hydra's command line with quotes around each text in it."""
    parts = re.findall(r"(?:[^,\[\](){}]|\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|[\[\](){}])+", value)
    return ",".join(map(_quoted_part, parts))


def _quoted_part(part: str) -> str:
    if part.startswith("[") and part.endswith("]"):
        return f"[{_quoted(part[1:-1])}]"
    part = part.strip()
    is_read = PLAIN_TEXT.fullmatch(part) or part[:1] in "\"'" or re.match(r"\w+\(", part)
    return part if is_read else written(part)


def _is_dispatched_by_hydra() -> bool:
    """True if the user chose another launcher or sweeper than Hydra's basic ones."""
    chosen = HydraConfig.get()
    basic = "hydra._internal.core_plugins.basic_"
    return not all(part._target_.startswith(basic) for part in (chosen.launcher, chosen.sweeper))


@contextmanager
def mistakes_explained() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf inside the block into one that names the field and the value.

    Raises:
        UserError: Replaces these errors.
    """
    previous = os.environ.get(TRACEBACK_VARIABLE)
    os.environ[TRACEBACK_VARIABLE] = "1"  # otherwise Hydra prints errors itself and exits
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explanation(error)) from error
    finally:
        del os.environ[TRACEBACK_VARIABLE]
        if previous is not None:
            os.environ[TRACEBACK_VARIABLE] = previous


def explanation(error: BaseException) -> str:
    """The mistake of the user in terms of fields and values, whichever library raised the error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _explain_choice(error.missing_cfg_file or "", error.options)
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        quoted = shlex.quote(f'{key}="{value}"')
        return (
            f"{error.override} cannot be read: {str(error).splitlines()[0]}\n"
            f"  text with special characters needs quotes inside quotes: {quoted}"
        )
    for cause in causes(error):
        text = str(cause)
        if isinstance(cause, ValidationError) and getattr(cause, "full_key", None):
            return _explain_type(str(cause.full_key), text)
        if "Key 'experiment' not in 'Config'" in text or "Key 'variant' not in 'Config'" in text:
            return "the YAML file of an experiment or variant must begin with `# @package _global_`"
        if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
            key = (match[1] or match[2]).split("@")[0]
            if key in RENAMED_GROUPS:
                return f"the config group `{key}` is called `{RENAMED_GROUPS[key]}` now"
            if key not in keys():
                return str(unknown_key(key))
    first, *more = str(error).splitlines()
    return "\n  ".join([first, *(line for line in more if TRACEBACK_VARIABLE not in line)])


def _explain_choice(path: str, options: Sequence[str]) -> str:
    group, _, choice = path.rpartition("/")
    nearest = nearest_name(choice, options)
    name = path.removeprefix("model/")
    if name != path and ("/" in name or Path(name).is_dir()):  # the name of a model, not of an option
        group, choice, nearest = "model", name, f"hf model.name={name}"
    return str(ConfigError(group, choice, f"one of {listed(options, 40)}", nearest))


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
