"""Composition of configs through Hydra."""

import copy
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sae_lora.common.console import complain
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.files import json_digest
from sae_lora.config.batches import Directions, register
from sae_lora.config.execution import TrackingConfig
from sae_lora.config.mistakes.explain import (
    TRACEBACK_VARIABLE,
    mistakes_explained,
    traceback_variable,
)
from sae_lora.config.mistakes.files import RENAMED_GROUPS, ChosenFiles
from sae_lora.config.mistakes.words import asks_for_help, check_words, given
from sae_lora.config.schema import Config
from sae_lora.config.serialize import keys, typed, written
from sae_lora.config.validate import check
from sae_lora.config.value_checks import ONE_LINE, has_control_characters

ConfigStore.instance().store(name="schema", node=Config)

_INSTALLED = Path(__file__).parents[1] / "conf"
CONF = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[2] / "conf"
"""Folder of the config values: in the installed package, or beside it in a clone of the repository."""
STUDY = "optuna.db"
"""Optuna's storage, in the folder of a sweep."""
_STORAGE = "sae_lora.storage"


def _storage(output_dir: str, sweep: str, dry_run: bool) -> str | None:
    """The address of Optuna's storage of a sweep; `None`, in memory, for a dry run."""
    folder = Path(output_dir).expanduser().absolute() / sweep
    return None if dry_run else f"sqlite:///{folder / STUDY}"


OmegaConf.register_new_resolver(_STORAGE, _storage, replace=True)
PROJECT = "sae_lora"
"""The W&B project if neither the config nor a variable names one."""
VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "name": "WANDB_NAME",
    "notes": "WANDB_NOTES",
    "dir": "WANDB_DIR",
}
"""W&B's variable for each text of `tracking`. `WANDB_TAGS` is a list; `tracking/` reads `WANDB_MODE`."""


def checked(composed: DictConfig) -> Config:
    """One composed point, typed and checked.

    Raises:
        ConfigError: If a value or a combination is impossible.
    """
    config = typed(composed)
    config.tracking = with_variables(config.tracking)
    check(config)
    return config


def with_variables(tracking: TrackingConfig) -> TrackingConfig:
    """The settings of W&B, with the values of its own variables where they are null.

    Raises:
        ConfigError: For a value of a variable that a config cannot hold.
    """
    values = {key: getattr(tracking, key) or _variable(name) for key, name in VARIABLES.items()}
    tags = "" if tracking.tags else _variable("WANDB_TAGS") or ""
    return replace(
        tracking,
        **values | {"project": values["project"] or PROJECT},
        tags=tracking.tags or [tag.strip() for tag in tags.split(",") if tag.strip()],
    )


def _variable(name: str) -> str | None:
    """The value of one of W&B's variables; `None` without one.

    Raises:
        ConfigError: For a value that a config cannot hold.
    """
    value = os.environ.get(name)
    if value and "${" in value:
        because = "in a config, ${…} stands for the value of another key"
        raise ConfigError(name, value, "text without ${", because=because)
    if value and name != "WANDB_NOTES" and has_control_characters(value):
        raise ConfigError(name, value, ONE_LINE)
    return value


@cache
def groups() -> Mapping[str, list[str]]:
    """The config groups, `model` and `experiment`, each with the options that the package has."""
    return {
        folder.name: sorted(file.relative_to(folder).with_suffix("").as_posix() for file in files)
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and (files := list(folder.rglob("*.yaml")))
    }


@cache
def default() -> Config:
    """The default config, that of `sae-lora launch` without overrides; typed, not checked."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("config"))


class _LaunchEndedError(Exception):
    """Carries an error of a launch past the explanations of mistakes, or the end of a sweep (`None`)."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def dispatch(
    arguments: Sequence[str],
    launch: Callable[[list[Config], Directions | None], Sequence[Any] | None],
) -> None:
    """Compose the points of a command line, and launch each batch of its sweeper as a whole.

    Args:
        arguments: Overrides and options of Hydra: `["-m", "lora.rank=1,4"]`.
        launch: Launches the points of a batch and returns the result of each: its objective, or the
            error of its run; or `None` to end the sweep. It also gets the directions of an adaptive
            sweeper, which needs the objectives for the next batch; else `None`.

    Raises:
        UserError: For an impossible point, before anything of its batch runs.
    """
    number = 0
    alone: list[DictConfig] = []
    ended: BaseException | None = None
    unused: list[str] = []

    def batch(points: Iterable[DictConfig], directions: Directions | None) -> Sequence[Any]:
        nonlocal number
        configs = [checked(_without_hydra(point)) for point in points]
        number += len(configs)
        if not configs:  # refused below
            return []
        try:
            with traceback_variable(before):
                results = launch(configs, directions)
        except BaseException as error:  # of a run, not of the command line
            raise _LaunchEndedError(error) from None
        if results is None:
            raise _LaunchEndedError(None)
        return results

    def single(point: DictConfig) -> None:
        # Launched when Hydra has ended: of an error in here, Hydra would print lines of its own.
        alone.append(point)
        unused.extend(_unused_params())

    single.batch = batch  # pyright: ignore[reportFunctionMemberAccess]
    words = [with_quoted_text(_with_new_names(word)) for word in with_options_first(arguments)]
    check_words(words, groups(), lambda key: attrgetter(key)(default()))
    study = _study(words)
    ended_with_the_sweep = ExitStack()
    single.study = ended_with_the_sweep if study else None  # pyright: ignore[reportFunctionMemberAccess]
    words += study
    options = given(words)
    files = ChosenFiles(options.overrides, CONF, options.config_dir and Path(options.config_dir))
    register()
    before = os.environ.get(TRACEBACK_VARIABLE)
    original_argv = sys.argv
    # hydra.main reads its arguments only from sys.argv.
    sys.argv = [original_argv[0], *words]
    try:
        with mistakes_explained(files, (ValueError, OSError, RecursionError)):
            hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(single)()
            sweepers = [word for word in words if word.startswith("hydra/sweeper=")]
            if alone and sweepers:
                raise UserError(f"{sweepers[0]} has no use here: this command is of one run\n  add -m")
            if unused:
                raise UserError(
                    f"the chosen files have a sweep over {', '.join(unused)}, and this command is of "
                    "one run\n  add -m, or `mode: MULTIRUN` below `hydra:` in the file"
                )
            if alone:
                batch(alone, None)
    except _LaunchEndedError as end:
        ended = end.error
    finally:
        sys.argv = original_argv
        ended_with_the_sweep.close()
    if ended is not None:  # raised here, where it does not become the context of its own context
        raise ended
    if options.multirun and not (number or asks_for_help(options)):
        empty = ", ".join(word for word in words if "(" in word) or " ".join(words)
        raise UserError(f"this sweep has no points: {empty} stands for no value")


def points(arguments: Sequence[str]) -> list[Config]:
    """The points of a command line, without a launch.

    Raises:
        UserError: For an impossible point, and for an adaptive sweeper, which needs results.
    """
    composed: list[Config] = []

    def collect(batch: list[Config], directions: Directions | None) -> Sequence[None]:
        if directions is not None:
            raise UserError("the points of an adaptive sweeper follow from the results of earlier ones")
        composed.extend(batch)
        return [None] * len(batch)

    dispatch(arguments, collect)
    return composed


def _study(words: Sequence[str]) -> list[str]:
    """Overrides for Optuna's sampler and storage, where the words are silent.

    With the seed, the same command proposes the same trials again; their runs are then done. So the
    study in the storage is written anew, by `BatchLauncher`. A storage of the user's own goes on where
    it was, and then a seed would propose the first trials twice.
    """
    keys_given = {word.partition("=")[0].lstrip("+") for word in words}
    if "hydra/sweeper=optuna" not in words or "hydra.sweeper.storage" in keys_given:
        return []
    of_sweep = "${output_dir},${sweep},${launcher.dry_run}"
    added = [f'hydra.sweeper.storage="${{{_STORAGE}:{of_sweep}}}"']
    if "hydra/sweeper/sampler=grid" not in words and "hydra.sweeper.sampler.seed" not in keys_given:
        added.append("hydra.sweeper.sampler.seed=0")
    if "hydra.sweeper.study_name" not in keys_given:
        of_trials = [word for word in words if not word.startswith(("launcher.", "tracking."))]
        digest = json_digest(sorted(of_trials))[:8]
        added.append(f"hydra.sweeper.study_name={digest}")
    return added


def _without_hydra(point: DictConfig) -> DictConfig:
    """A copy of a composed point without Hydra's own config."""
    plain = copy.copy(point)
    with open_dict(plain):
        plain.pop("hydra", None)
    return plain


def with_options_first(arguments: Sequence[str]) -> list[str]:
    """The arguments with overrides last: Hydra does not read options after overrides."""
    overrides = map(_without_dashes, arguments)
    return sorted(overrides, key=lambda word: "=" in word and not word.startswith("-"))


def _without_dashes(argument: str) -> str:
    """The argument without the two dashes before a key, as `wandb agent` writes it: `--lora.rank=4`."""
    key, equals, _ = argument.removeprefix("--").partition("=")
    return argument.removeprefix("--") if equals and (key in keys() or key in groups()) else argument


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
    text gets its own quotes. So does a text that Hydra would read as a number or as a truth value, such
    as `model.revision=12e4`. Everything else that Hydra can read keeps its meaning.

    Raises:
        ConfigError: For the path of an existing file or folder that looks like an interpolation.
    """
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in _text_keys():
        return argument
    if os.path.exists(os.path.expanduser(value)):  # noqa: PTH110, PTH111 False for a path that is too long
        if "${" in value:
            because = "${…} stands for the value of another key"
            allowed = "a path without ${: rename the file or folder, or make a link to it"
            raise ConfigError(key, value, allowed, because=because)
        return f"{key}={written(value)}"
    try:
        override = OverridesParser.create().parse_override(argument)
        values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    except (HydraException, ValueError):
        return f"{key}={_quoted(value)}"
    is_number = any(isinstance(each, bool | int | float) for each in _flat(values))
    return f"{key}={_quoted(value)}" if is_number else argument


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    """The values, and those in lists among them."""
    for value in values:
        yield from _flat(value) if isinstance(value, list) else [value]


@cache
def _text_keys() -> frozenset[str]:
    """The keys whose values are text."""
    texts = {key for key, kind in keys().items() if kind in (str, str | None)}
    return frozenset(texts | {"data.files", "sae.path"})


def _quoted(value: str) -> str:
    """A value of Hydra's command line with quotes around each text in it."""
    parts = re.findall(r"(?:[^,\[\](){}]|\[[^\]]*\]|\([^)]*\)|\{[^}]*\}|[\[\](){}])+", value)
    return ",".join(map(_quoted_part, parts))


def _quoted_part(part: str) -> str:
    if part.startswith("[") and part.endswith("]"):
        return f"[{_quoted(part[1:-1])}]"
    part = part.strip()
    is_read = part == "null" or part[:1] in "\"'" or re.match(r"\w+\(", part)
    return part if is_read else written(part)


def _unused_params() -> list[str]:
    """The keys that a file varies in a command of a single point, where their values have no effect."""
    chosen = HydraConfig.get()
    params = getattr(chosen.sweeper, "params", None)
    return list(params or ()) if chosen.mode is not RunMode.MULTIRUN else []
