"""Mistakes on a command line and in YAML files, as one clear message: what is wrong, and what works."""

import os
import re
import shlex
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException, ValidationError

from sae_lora.common.errors import ConfigError, UserError, causes, listed, nearest_name
from sae_lora.config.serialize import keys, unknown_key, written

TRACEBACK_VARIABLE = "HYDRA_FULL_ERROR"
"""Hydra's environment variable that makes it print tracebacks."""
RENAMED_GROUPS = {"arm": "variant"}
"""Names of config groups in version 0.1, with their present names."""
_OF_THE_WHOLE_CONFIG = ("experiment", "variant")
"""Groups whose files set keys of all groups."""
_HEADER = "# @package _global_"
_PLUGINS = {
    "hydra/sweeper": {
        "optuna": "hydra-optuna-sweeper",
        "ax": "hydra-ax-sweeper",
        "nevergrad": "hydra-nevergrad-sweeper",
    },
    "hydra/launcher": {
        "joblib": "hydra-joblib-launcher",
        "ray": "hydra-ray-launcher",
        "rq": "hydra-rq-launcher",
    },
}
"""Packages of Hydra's plug-ins, by group and option."""


@contextmanager
def mistakes_explained(
    words: Sequence[str] = (), others: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Turn errors of Hydra, OmegaConf and YAML inside the block into one that names field or file.

    Args:
        words: The command line, which may name folders with files of the user's own.
        others: More errors that a mistake can cause inside the block.

    Raises:
        UserError: Replaces these errors.
    """
    previous = os.environ.get(TRACEBACK_VARIABLE)
    os.environ[TRACEBACK_VARIABLE] = "1"  # otherwise Hydra prints errors itself and exits
    try:
        yield
    except (yaml.YAMLError, UnicodeDecodeError) as error:  # a file that Hydra has read
        raise UserError(_fault_in_files(words, all_files=True) or explanation(error)) from error
    except (HydraException, OmegaConfBaseException, *others) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(_fault_in_files(words) or explanation(error)) from error
    finally:
        del os.environ[TRACEBACK_VARIABLE]
        if previous is not None:
            os.environ[TRACEBACK_VARIABLE] = previous


# ---- words of the command line ------------------------------------------------------------------


def check_words(words: Sequence[str], groups: typing.Collection[str], default: Any) -> None:
    """Refuse words that Hydra would refuse with advice that does not work here.

    Args:
        words: Options and overrides.
        groups: The config groups.
        default: Returns the default of a key.

    Raises:
        UserError: For the first of them. The message has the words that work.
    """
    _check_options(words)
    for word in _given(words).overrides:
        key, equals, value = word.partition("=")
        name = key.lstrip("+~")
        if key.startswith(("+", "~")) and name in groups:
            raise UserError(
                f"{word}: every command has the group {name}; write {name}={value or 'option'}"
            )
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


def _has_several(value: str) -> bool:
    return "," in re.sub(r"\[[^\]]*\]|\"[^\"]*\"|'[^']*'", "", value) or value.startswith("glob(")


def _check_options(words: Sequence[str]) -> None:
    parser, given = get_args_parser(), _given(words)
    if given.multirun and (given.cfg or given.info):
        raise UserError(
            "--cfg and --info show one config: leave out -m, and give one value for each key"
        )
    unknown = [word for word in parser.parse_known_args(list(words))[1] if word.startswith("-")]
    if not unknown:
        return
    name, _, value = unknown[0].lstrip("-").partition("=")
    if name in keys():
        following = words[list(words).index(unknown[0]) + 1 :]
        value = value or (following[0] if following and "=" not in following[0] else "value")
        raise UserError(f"{unknown[0]}: keys have no dashes; write {name}={value}")
    options = [
        option for action in parser._actions for option in action.option_strings if option[:2] == "--"
    ]
    near = nearest_name(unknown[0], options)
    raise UserError(
        "\n".join(
            [
                f"there is no option {unknown[0]}",
                "  allowed: -m, --config-dir FOLDER, --help; and key=value, which `--help` lists",
                *([f"  nearest valid: {near}"] if near else []),
            ]
        )
    )


def asks_for_help(words: Sequence[str]) -> bool:
    """True if Hydra only prints something for these words."""
    options = _given(words)
    return any((options.help, options.hydra_help, options.cfg, options.info, options.shell_completion))


def is_sweep(words: Sequence[str]) -> bool:
    """True if the words ask for several points by -m."""
    return bool(_given(words).multirun)


def _given(words: Sequence[str]) -> Any:
    """Hydra's options among the words, and the overrides."""
    return get_args_parser().parse_known_args(list(words))[0]


# ---- errors of Hydra and OmegaConf --------------------------------------------------------------


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
        if isinstance(cause, ValidationError) and getattr(cause, "full_key", None):
            return _explain_type(str(cause.full_key), text)
        if match := re.search(r"Could not override '([^']+)'|Key '([^']+)' is not in struct", text):
            key = (match[1] or match[2]).split("@")[0]
            if key in RENAMED_GROUPS:
                return f"the config group `{key}` is called `{RENAMED_GROUPS[key]}` now"
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
    if package := _PLUGINS.get(group, {}).get(choice):
        allowed = f"one of {listed(options)}; or {choice}, after `pip install {package}`"
        return str(ConfigError(group, choice, allowed))
    if group == "hydra/launcher" and choice.startswith("submitit"):
        allowed = f"one of {listed(options)}; launcher=slurm submits jobs through submitit"
        return str(ConfigError(group, choice, allowed))
    nearest = nearest_name(choice, options)
    name = path.removeprefix("model/")
    if name != path and ("/" in name or Path(name).is_dir()):  # the name of a model, not of an option
        group, choice, nearest = "model", name, f"hf model.name={name}"
    own = "; options of your own need --config-dir FOLDER" if nearest is None else ""
    return str(ConfigError(group, choice, f"one of {listed(options, 40)}{own}", nearest))


def _explain_type(key: str, text: str) -> str:
    match = re.search(r"[Vv]alue '(.*?)'", text)
    got = match[1] if match else None  # null in place of a value
    kind = keys().get(re.sub(r"\[\d+\]$", "", key))
    optional = " or null" if "None" in str(kind) else ""
    for part in _parts(kind):
        if members := getattr(part, "__members__", None):
            allowed = f"one of {listed(members)}{optional}"
            return str(ConfigError(key, got, allowed, nearest_name(got or "", members)))
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    allowed = next((word for name, word in words.items() if name in str(kind)), str(kind))
    nearest = _number(got or "") if kind is int else None
    if words["int"] == allowed and (got or "").startswith("["):
        allowed += (
            f"; for a sweep, several with commas: -m {key}={(got or '').strip('[]').replace(' ', '')}"
        )
    return str(ConfigError(key, got, allowed + optional, nearest))


def _number(text: str) -> int | None:
    """The whole number that a text means: `1.5`, `1e6`, `20k`, `2M`; `None` if it is no number."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?(?:e\d+)?)([kKmM]?)", text)
    return match and round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()])


def _parts(kind: Any) -> Iterator[Any]:
    """A type, and the types that it is made of: `list[Suite]` and `Suite`."""
    yield kind
    for part in typing.get_args(kind):
        yield from _parts(part)


# ---- files of the user's own --------------------------------------------------------------------


def _fault_in_files(words: Sequence[str], *, all_files: bool = False) -> str | None:
    """The first fault in the YAML files that the words choose in the user's folder; else `None`.

    With `all_files`, also in the others: files may choose files, by their defaults.
    """
    given = _given(words)
    if given.config_dir is None:
        return None
    home = Path(given.config_dir)
    chosen = [word.lstrip("+").partition("=") for word in given.overrides]
    files = [
        home / group / f"{option}.yaml"
        for group, equals, value in chosen
        for option in value.split(",")
        if equals and (home / group / f"{option}.yaml").is_file()
    ]
    files += _chosen_by(files, home)
    if all_files:
        files += [file for file in sorted(home.rglob("*.yaml")) if file not in files]
    return next(filter(None, (_fault_in(file, home) for file in files)), None)


def _chosen_by(files: Sequence[Path], home: Path) -> list[Path]:
    """The user's files that the defaults lists of these files name, in their own group."""
    found = []
    for file in files:
        names = re.findall(r"^\s*-\s*([\w/.-]+)\s*$", file.read_text(errors="replace"), re.MULTILINE)
        found += [path for name in names if (path := file.parent / f"{name}.yaml").is_file()]
    return [path for path in dict.fromkeys(found) if path not in files]


def _fault_in(file: Path, home: Path) -> str | None:
    """What is wrong with a YAML file of a config group; `None` if nothing is."""
    content, group = file.read_bytes(), file.parent.relative_to(home).as_posix()
    if content.startswith(b"\xef\xbb\xbf"):
        return f"{file}: it begins with a byte order mark; save it as UTF-8 without one"
    try:
        text = content.decode()
        node = yaml.compose(text)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return f"{file}, line {line}: this is not text in UTF-8"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        tab = "a tab; YAML indents with spaces" if "\\t" in str(error.problem) else error.problem
        return f"{file}, line {line}: {tab}"
    except yaml.YAMLError as error:
        return f"{file}: {' '.join(str(error).split())}"
    is_global = group in _OF_THE_WHOLE_CONFIG
    if is_global and _HEADER not in (line.strip() for line in text.splitlines()):
        return f"{file}, line 1: a file of the group {group} must begin with `{_HEADER}`"
    if not isinstance(node, yaml.MappingNode):
        return f"{file}: it holds no keys and values"
    for key, line in _keys_in(node, "" if is_global else f"{group}."):
        if key not in keys():
            return f"{file}, line {line}: {unknown_key(key)}"
    return None


def _keys_in(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    """The dotted keys in a YAML file with their lines, without those of Hydra."""
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if name.value in ("defaults", "hydra"):
            continue
        yield key, name.start_mark.line + 1
        if isinstance(value, yaml.MappingNode) and any(known.startswith(f"{key}.") for known in keys()):
            yield from _keys_in(value, f"{key}.")
