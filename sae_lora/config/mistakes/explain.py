"""Errors of Hydra, OmegaConf and YAML, as one clear message: what is wrong, and what works."""

import dataclasses
import os
import re
import shlex
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra.conf import HydraConf
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException, ValidationError

from sae_lora.common.errors import ConfigError, UserError, causes, listed, nearest_name, with_nearest
from sae_lora.config.mistakes.files import RENAMED_GROUPS, ChosenFiles
from sae_lora.config.serialize import keys, unknown_key

TRACEBACK_VARIABLE = "HYDRA_FULL_ERROR"
"""Hydra's environment variable that makes it print tracebacks."""
_SWEEPERS = {
    "hydra/sweeper/optuna": "'sae_lora[optuna]'",
    "hydra/sweeper/ax": "hydra-ax-sweeper",
    "hydra/sweeper/nevergrad": "hydra-nevergrad-sweeper",
}
"""The package of each of Hydra's sweepers."""


@contextmanager
def mistakes_explained(
    files: ChosenFiles | None = None, others: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn errors of Hydra, OmegaConf and YAML inside the block into one that names field or file.

    Args:
        files: The chosen files: for a key that one of them sets, the message begins with its line.
        others: More errors that a mistake can cause inside the block.

    Raises:
        UserError: Replaces these errors.
    """
    try:
        with traceback_variable("1"):  # otherwise Hydra prints errors itself and exits
            yield
    except ConfigError as error:
        error.args = (_placed(str(error), error.field, files),)
        raise
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, *others) as error:
        key = next(filter(None, (getattr(cause, "full_key", None) for cause in causes(error))), None)
        raise UserError(_placed(explanation(error), key, files)) from error


@contextmanager
def traceback_variable(value: str | None) -> Iterator[None]:
    """Give Hydra's variable this value inside the block; `None`: no value."""
    previous = os.environ.pop(TRACEBACK_VARIABLE, None)
    if value is not None:
        os.environ[TRACEBACK_VARIABLE] = value
    try:
        yield
    finally:
        os.environ.pop(TRACEBACK_VARIABLE, None)
        if previous is not None:
            os.environ[TRACEBACK_VARIABLE] = previous


def _placed(message: str, key: object, files: ChosenFiles | None) -> str:
    """The message, after the line of the file that sets the key."""
    place = files.place_of(re.sub(r"\[\d+\]$", "", str(key))) if files and key else None
    return f"{place}: {message}" if place else message


def explanation(error: BaseException) -> str:
    """The mistake of the user in terms of fields and values, whichever library raised the error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _explain_choice(error.missing_cfg_file or "", error.options)
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        if ",," in value or (value.endswith(",") and "[" not in value):
            return f"{error.override} cannot be read: a value is missing beside a comma"
        quoted = shlex.quote(f'{key}="{value}"')
        return (
            f"{error.override} cannot be read: {str(error).splitlines()[0]}\n"
            "  a list has brackets and no spaces: [2,5]\n"
            f"  text with special characters needs quotes inside quotes: {quoted}"
        )
    for cause in causes(error):
        text = str(cause)
        if match := re.match(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
            return _explain_several(match[1], match[2])
        if match := re.match(
            r"In '?(.+?)'?: Override '(\S+) : .*' is defined before '(\S+): (.+?)'", text
        ):
            file, _, group, option = match.groups()
            return f"{file}.yaml: write `- override /{group}: {option}` in its list of defaults"
        key = getattr(cause, "full_key", None)
        if isinstance(cause, ValidationError) and key:
            return _explain_type(str(key), text)
        if isinstance(cause, InterpolationResolutionError) and key:
            return _explain_interpolation(str(key), text)
        if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
            key = (match[1] or match[2]).split("@")[0]
            if key in RENAMED_GROUPS:
                return f"the config group `{key}` is called `{RENAMED_GROUPS[key]}` now"
            if key.startswith("hydra."):
                return _explain_hydra_key(key)
            if key not in keys():
                return str(unknown_key(key))
    first, *more = str(error).splitlines()
    return "\n  ".join([first, *(line for line in more if TRACEBACK_VARIABLE not in line)])


def _explain_several(key: str, values: str) -> str:
    """Advice on a value with commas in a command without -m."""
    lines = [f"{key} has several values, {values}: add -m for a sweep over them"]
    kind = keys().get(key)
    if kind in (str, str | None):
        lines.append("  for one text with commas, write " + shlex.quote(f'{key}="{values}"'))
    elif kind is Any or "list" in str(kind):
        lines.append(f"  for one list, write {key}=[{values}]")
    return "\n".join(lines)


def _explain_choice(path: str, options: Sequence[str]) -> str:
    group, _, choice = path.rpartition("/")
    if package := _SWEEPERS.get(path):
        allowed = f"one of {listed(options)}; or {choice}, after `pip install {package}`"
        return str(ConfigError(group, choice, allowed))
    nearest = nearest_name(choice, options) if choice else None
    name = path.removeprefix("model/")
    is_model = name != path and name != "" and ("/" in name or Path(name).is_dir())
    if is_model:  # the name of a model, not of an option
        group, choice, nearest = "model", name, f"hf model.name={name}"
    hint = "; options of your own are files in --config-dir FOLDER" if nearest is None else ""
    return str(ConfigError(group, choice, f"one of {listed(options, 40)}{hint}", nearest))


def _explain_hydra_key(key: str) -> str:
    names = [f"hydra.{field.name}" for field in dataclasses.fields(HydraConf)]
    near = nearest_name(".".join(key.split(".")[:2]), names, similarity=0.8)
    return with_nearest(f"Hydra has no key {key}", f"  its keys: {listed(names, 40)}", nearest=near)


def _explain_interpolation(key: str, text: str) -> str:
    """A value that stands for another key, or for a variable, which does not exist."""
    if match := re.match(r"Interpolation key '(.+?)' not found", text):
        return f"{key} = ${{{match[1]}}} cannot be used: {unknown_key(match[1])}"
    first = text.splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ")
    return f"{key} cannot be used: {first.strip(chr(34))}"


def _explain_type(key: str, text: str) -> str:
    if key not in keys() and key.startswith("hydra"):
        if "is not a subclass of" in text:
            return f"{key} is a section: set one of its keys, {key}.KEY=value"
        return f"{key}: {text.splitlines()[0]}"
    if "is not a ListConfig" in text:
        return f"{key} takes a list\n  allowed: values in brackets with commas between them: {key}=[A,B]"
    value = r"[Vv]alue '(.*?)'(?: of type| is not| could not|, expected|$)|to string: '(.*)'"
    match = re.search(value, text.splitlines()[0])
    got = (match[1] or match[2] or "") if match else None  # null in place of a value
    kind = keys().get(re.sub(r"\[\d+\]$", "", key))
    optional = " or null" if "None" in str(kind) else ""
    for part in _parts(kind):
        if members := getattr(part, "__members__", None):
            allowed = f"one of {listed(members)}{optional}"
            return str(ConfigError(key, got, allowed, nearest_name(got or "", members)))
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    allowed = next((word for name, word in words.items() if name in str(kind)), str(kind))
    nearest = _number(got or "") if kind is int else None
    if words["int"] == allowed:
        allowed += _several_numbers(key, got or "")
    return str(ConfigError(key, got, allowed + optional, nearest))


def _several_numbers(key: str, text: str) -> str:
    """Advice for several whole numbers: `[1,4]`, and a range such as `1-4`, `1..4` or `1:4`."""
    if text.startswith("["):
        values = text.strip("[]").replace(" ", "")
        sweep = f"; for a sweep, several with commas: -m {key}={values}"
        return sweep if "," in values else f", without brackets: {key}={values}"
    if match := re.fullmatch(r"(\d+)\s*(?:-|\.\.+|:)\s*(\d+)", text):
        first, last = int(match[1]), int(match[2])
        return f"; for a sweep: -m {key}=range({first},{last + 1})" if first < last else ""
    return ""


def _number(text: str) -> int | None:
    """The whole number that a text means: `1.5`, `1e6`, `20k`, `2M`; `None` if it is no number."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?(?:e\d+)?)([kKmM]?)", text)
    return match and round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()])


def _parts(kind: Any) -> Iterator[Any]:
    """A type, and the types that it is made of: `list[Suite]` and `Suite`."""
    yield kind
    for part in typing.get_args(kind):
        yield from _parts(part)
