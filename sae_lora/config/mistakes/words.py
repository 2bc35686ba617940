"""Words of a command line that Hydra would refuse with advice that does not work here."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sae_lora.common.console import complain
from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name, with_nearest
from sae_lora.config.serialize import keys, written

_OPTIONS = "  allowed: -m, --config-dir FOLDER, --help; and key=value, which `--help` lists"
_REFUSED = {
    "config_name": "the package has one config; options of your own are files in --config-dir FOLDER",
    "config_path": "the package has one config; options of your own are files in --config-dir FOLDER",
    "experimental_rerun": "repeat the command instead; finished runs are left out",
    "shell_completion": "`sae-lora --install-completion` completes commands",
}
"""Hydra's options that do nothing here, and what to do instead."""


def check_words(words: Sequence[str], groups: Mapping[str, Sequence[str]], default: Any) -> None:
    """Refuse words that Hydra would refuse with advice that does not work here.

    Args:
        words: Options and overrides.
        groups: The config groups with their options.
        default: Returns the default of a key.

    Raises:
        UserError: For the first of them. The message has the words that work.
    """
    options = given(words)
    _check_options(words, options)
    overrides = options.overrides
    for word in overrides:
        key, equals, value = word.partition("=")
        name = key.lstrip("+~")
        if name == "hydra/launcher":
            raise UserError(
                f"{word} has no use here: sae_lora plans and packs the points of every sweeper itself; "
                "launcher=slurm submits them, launcher.max_parallel sets how many run at a time"
            )
        if "@" in name:
            raise UserError(f"{word}: a group is chosen by its name: {name.split('@')[0]}={value}")
        if key.startswith(("+", "~")) and name in groups:
            raise UserError(
                f"{word}: every command has the group {name}; write {name}={value or 'option'}"
            )
        if key.startswith("+") and not key.startswith("++") and name in keys():
            raise UserError(f"{word}: the config has the key {name}; write {name}={value or 'value'}")
        if key.startswith("~") and name in keys():
            raise UserError(
                f"{word}: a key cannot be deleted; without {word}, it is {name}={written(default(name))}"
            )
        if name in groups and value in ("null", "???"):
            raise UserError(f"{word}: a group needs one of its options; `--help` lists them")
        if value == "???":
            raise UserError(f"{word} is no value; without it, {name} has its default")
        if key != key.strip():
            raise UserError(
                f"{word}: write {key.strip()}={value.strip()}, without spaces around the sign"
            )
        if not equals:
            near = nearest_name(name, [*keys(), *groups])
            raise UserError(
                f"{word} has no value; write {near or 'key'}=value, without spaces around the sign"
            )
        if name == "experiment" and _has_several(value):
            first = value.split(",")[0] if re.match(r"\w+,", value) else None
            because = "each experiment has a sweep of its own"
            raise ConfigError("experiment", value, "one for each command", first, because)
        _check_values(word)
        if name in groups:
            _check_option(word, name, groups[name])
    keys_given = Counter(word.lstrip("+~").partition("=")[0] for word in overrides)
    for key in (key for key, number in keys_given.items() if number > 1):
        last = next(word for word in reversed(overrides) if word.lstrip("+~").startswith(f"{key}="))
        complain("note", f"{key} is given {keys_given[key]} times; {last} is used")


def _check_values(word: str) -> None:
    """Refuse the values of a sweep that do not exist: `range(1,9,0)`."""
    try:
        override = OverridesParser.create().parse_override(word)
        if override.is_sweep_override() and not override.is_choice_sweep():
            list(override.sweep_iterator())
    except HydraException:  # Hydra refuses it, and `explain.py` explains
        return
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{word} cannot be read: {error}") from error


def _check_option(word: str, group: str, options: Sequence[str]) -> None:
    """Refuse a number, a truth value or a list in place of an option: `lora=16`."""
    try:
        override = OverridesParser.create().parse_override(word)
        values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    except (HydraException, ValueError):  # Hydra refuses it, and `explain.py` explains
        return
    wrong = [value for value in values if isinstance(value, bool | int | float | list | dict)]
    if wrong:
        own = [key for key in keys() if key.startswith(f"{group}.")]
        set_by_name = f"; its keys are set by their names: {listed(own, 4)}" if own else ""
        got = wrong[0] if override.is_sweep_override() else word.partition("=")[2]
        raise ConfigError(group, got, f"one of {listed(options, 40)}{set_by_name}")


def _has_several(value: str) -> bool:
    return "," in re.sub(r"\[[^\]]*\]|\"[^\"]*\"|'[^']*'", "", value) or value.startswith("glob(")


def _check_options(words: Sequence[str], options: Any) -> None:
    parser = get_args_parser()
    if options.multirun and (options.cfg or options.info):
        raise UserError(
            "--cfg and --info show one config: leave out -m, and give one value for each key"
        )
    for name in ("resolve", "package"):
        if getattr(options, name) and not options.cfg:
            value = "" if name == "resolve" else f" {options.package}"
            raise UserError(f"--{name} belongs to --cfg: write --cfg job --{name}{value}")
    for name, instead in _REFUSED.items():
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} has no use here: {instead}")
    if options.config_dir and not Path(options.config_dir).is_dir():
        raise UserError(f"--config-dir {options.config_dir}: there is no such folder")
    unknown = [word for word in parser.parse_known_args(list(words))[1] if word.startswith("-")]
    if not unknown:
        return
    name, _, value = unknown[0].lstrip("-").partition("=")
    if name in keys():
        following = words[list(words).index(unknown[0]) + 1 :]
        value = value or (following[0] if following and "=" not in following[0] else "value")
        raise UserError(f"{unknown[0]}: keys have no dashes; write {name}={value}")
    names = [name for action in parser._actions for name in action.option_strings if name[:2] == "--"]
    near = nearest_name(unknown[0], names)
    raise UserError(with_nearest(f"there is no option {unknown[0]}", _OPTIONS, nearest=near))


def asks_for_help(options: Any) -> bool:
    """True if Hydra only prints something with these options, from `given`."""
    return any((options.help, options.hydra_help, options.cfg, options.info, options.shell_completion))


def given(words: Sequence[str]) -> Any:
    """Hydra's options among the words, and the overrides.

    Raises:
        UserError: If an option lacks its value, or has one that it does not take.
    """
    parser = get_args_parser()
    parser.error = _refuse  # argparse would print every option and end the process
    return parser.parse_known_args(list(words))[0]


def _refuse(message: str) -> NoReturn:
    """Raise a message of argparse as a UserError: `argument --run/-r: ignored explicit argument '1'`."""
    cause = message.removeprefix("argument ")
    cause = cause.replace("ignored explicit argument", "it takes no value, and got")
    raise UserError(f"{cause}\n{_OPTIONS}")
