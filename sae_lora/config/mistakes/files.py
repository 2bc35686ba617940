"""The YAML files that a command line chooses: faults in them, and the lines that set a key."""

import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cached_property
from pathlib import Path

import yaml
from omegaconf import MISSING, OmegaConf

from sae_lora.common.errors import UserError, listed, nearest_name, with_nearest
from sae_lora.config.serialize import keys, unknown_key

_OF_THE_WHOLE_CONFIG = ("experiment", "variant")
"""Groups whose files set keys of all groups."""
_HEADER = "# @package _global_"
RENAMED_GROUPS = {"arm": "variant"}
"""Names of config groups in version 0.1, with their present names."""


class _FaultError(Exception):
    """A fault in a file, with its line if it has one."""

    def __init__(self, cause: object, line: int | None = None) -> None:
        super().__init__(str(cause))
        self.line = line


@dataclass(frozen=True)
class _Default:
    """An entry of a defaults list: the option of a group."""

    group: str
    option: str
    line: int
    is_override: bool
    is_of_own_group: bool


@dataclass(frozen=True)
class _File:
    """A file of a config group."""

    home: Path
    group: str
    option: str

    @property
    def path(self) -> Path:
        return self.home / self.group / f"{self.option}.yaml"

    def at(self, line: int | None) -> str:
        return str(self.path) if line is None else f"{self.path}, line {line}"

    @cached_property
    def text(self) -> str:
        content = self.path.read_bytes()
        if content.startswith(b"\xef\xbb\xbf"):
            raise _FaultError("it begins with a byte order mark; save it as UTF-8 without one")
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise _FaultError("this is not text in UTF-8", line) from error

    @cached_property
    def node(self) -> yaml.MappingNode:
        try:
            node = yaml.compose(self.text)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            is_tab = "\\t" in str(error.problem)
            cause = "a tab; YAML indents with spaces" if is_tab else error.problem
            raise _FaultError(cause, mark.line + 1 if mark else None) from error
        except yaml.YAMLError as error:
            raise _FaultError(" ".join(str(error).split())) from error
        if self._is_global and _HEADER not in (line.strip() for line in self.text.splitlines()):
            raise _FaultError(f"a file of the group {self._root} must begin with `{_HEADER}`", 1)
        if not isinstance(node, yaml.MappingNode):
            raise _FaultError("it holds no keys and values")
        return node

    @property
    def _root(self) -> str:
        return self.folder.partition("/")[0]

    @property
    def folder(self) -> str:
        """The group, with the folders in the option: `variant/addup` for `variant=addup/lora`."""
        return self.path.parent.relative_to(self.home).as_posix()

    @property
    def _is_global(self) -> bool:
        return self._root in _OF_THE_WHOLE_CONFIG

    @property
    def _prefix(self) -> str:
        """The text before its keys in the whole config: `lora.`."""
        header = re.search(r"^#\s*@package\s+(\S+)\s*$", self.text, re.MULTILINE)
        package = header[1] if header else "_group_"
        known = {"_global_": "", "_group_": self.folder.replace("/", ".")}
        package = known.get(package, package)
        return f"{package}." if package else ""

    def defaults(self) -> Iterator[_Default]:
        """The entries of its defaults list, without `_self_` and those without an option."""
        for name, value in self.node.value:
            if name.value != "defaults":
                continue
            if not isinstance(value, yaml.SequenceNode):
                raise _FaultError("`defaults` is a list: lines that begin with a dash", _line(name))
            for entry in value.value:
                yield from self._default(entry)

    def _default(self, entry: yaml.Node) -> Iterator[_Default]:
        if isinstance(entry, yaml.ScalarNode):
            if entry.value == "_self_":
                return
            group, _, option = entry.value.lstrip("/").rpartition("/")
            is_own = not entry.value.startswith("/")
            group, option = (self.folder, entry.value) if is_own else (group, option)
            yield _Default(group, option, _line(entry), False, is_own)
            return
        if not isinstance(entry, yaml.MappingNode):
            raise _FaultError("an entry of `defaults` is a file or `group: option`", _line(entry))
        for name, value in entry.value:
            *words, group = str(name.value).split("@")[0].split()
            options = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for option in options:
                if option.tag.endswith(":null") or "${" in str(option.value):
                    continue
                is_root = group.startswith("/") or "override" in words
                inside = group.lstrip("/") if is_root else f"{self.folder}/{group}"
                yield _Default(inside, str(option.value), _line(name), "override" in words, False)

    def lines(self) -> Iterator[tuple[str, yaml.Node, int]]:
        """The dotted keys that it sets, each with its value and its line; also those that it varies."""
        yield from _keys_in(self.node, self._prefix)

    def check(self) -> None:
        """Raise a `_FaultError` for the first fault."""
        seen = set()
        for key, value, line in self.lines():
            if key in seen and not isinstance(value, yaml.MappingNode):
                raise _FaultError(f"{key} is set twice", line)
            if key in seen:
                raise _FaultError(f"a second section `{key.rpartition('.')[2]}`: join the two", line)
            seen.add(key)
            if key.startswith("hydra"):
                _check_hydra(key, value, line)
            else:
                _check_value(key, value, line)


class ChosenFiles:
    """The files of config groups that a command line chooses, also through the defaults of others.

    Args:
        overrides: The overrides of the command line.
        shipped: The folder of the options that come with the package.
        own: The user's folder (`--config-dir`); `None` without one.

    Raises:
        UserError: For the first fault in a file, with its line.
    """

    def __init__(self, overrides: Sequence[str], shipped: Path, own: Path | None) -> None:
        self._homes = [shipped] if own is None else [shipped, own]
        self._groups = _groups_in(self._homes)
        self._given = [word.lstrip("+~").partition("=")[0] for word in overrides]
        self._files: list[_File] = []
        if own is not None:
            _check_names(own, shipped)
        for word in overrides:
            group, equals, value = word.lstrip("+").partition("=")
            if equals and group in self._groups:
                for option in value.split(","):
                    self._add(group, option, ())
        self._check_values_to_give()

    def _add(self, group: str, option: str, within: tuple[_File, ...]) -> None:
        """Add a file and those that it chooses. Hydra explains options that do not exist."""
        file = self._find(group, option)
        if file is None:
            return
        try:
            entries = list(file.defaults())
            for entry in entries:
                self._check_entry(file, entry)
            file.check()
        except _FaultError as fault:
            raise UserError(f"{file.at(fault.line)}: {fault}") from fault
        for entry in entries:
            chosen = self._find(entry.group, entry.option)
            if chosen is not None and chosen in (*within, file):
                raise UserError(f"{file.at(entry.line)}: {entry.option} leads back to this file")
            self._add(entry.group, entry.option, (*within, file))
        self._files.append(file)

    def _check_values_to_give(self) -> None:
        """Refuse a key that is `???` in a file of the user's, and is not given.

        Hydra would leave the value of a shipped file in its place.
        """
        given, to_give = set(self._given), []
        for file in self._files:
            for key, value, line in file.lines():
                is_missing = isinstance(value, yaml.ScalarNode) and value.value == MISSING
                name = key.removeprefix("hydra.sweeper.params.")
                if is_missing and file.home != self._homes[0]:
                    to_give.append((name, file.at(line)))
                elif not is_missing:
                    given.add(name)
        for key, place in to_give:
            if key not in given:
                raise UserError(f"{place}: {key} has no value: give it on the command line, {key}=value")

    def _find(self, group: str, option: str) -> _File | None:
        option = option.strip("\"' ").removesuffix(".yaml")
        files = (_File(home, group, option) for home in self._homes)
        return next((file for file in files if option and file.path.is_file()), None)

    def _check_entry(self, file: _File, entry: _Default) -> None:
        """Refuse an option that does not exist, and one that needs the word `override`.

        Every command has an option of each group, which an entry without this word would add again.
        """
        root = entry.group.partition("/")[0]
        if root == "hydra":
            return
        if entry.group not in self._groups:
            within = entry.group.removeprefix(f"{file.folder}/")
            if within in self._groups:  # `model: tiny` in an experiment
                raise _FaultError(f"write `- override /{within}: {entry.option}`", entry.line)
            raise _FaultError(_no_group(within, self._groups), entry.line)
        if self._find(entry.group, entry.option) is None:
            options = self._groups.get(entry.group, ())
            near = "_self_" if "self" in entry.option else nearest_name(entry.option, options)
            allowed = f"  allowed: {listed(options, 40)}"
            cause = with_nearest(f"{entry.group} has no option {entry.option}", allowed, nearest=near)
            raise _FaultError(cause, entry.line)
        if not entry.is_override and not entry.is_of_own_group and root not in _OF_THE_WHOLE_CONFIG:
            raise _FaultError(f"write `- override /{entry.group}: {entry.option}`", entry.line)

    def place_of(self, key: str) -> str | None:
        """File and line that set a key; `None` if the command line or no chosen file does."""
        if key in self._given:
            return None
        for file in reversed(self._files):
            for name, _, line in file.lines():
                if key in (name, name.removeprefix("hydra.sweeper.params.")):
                    return file.at(line)
        return None


def _groups_in(homes: Sequence[Path]) -> Mapping[str, list[str]]:
    """Every config group with its options."""
    options: dict[str, list[str]] = {}
    for home in homes:
        for path in filter(Path.is_file, sorted(home.rglob("*.yaml"))):
            parts = path.relative_to(home).with_suffix("").parts
            for depth in range(1, len(parts)):
                options.setdefault("/".join(parts[:depth]), []).append("/".join(parts[depth:]))
    return options


def _check_names(own: Path, shipped: Path) -> None:
    """Refuse a user's file that Hydra would not read, because a shipped one has its name."""
    for path in sorted(own.rglob("*.yaml")):
        name = path.relative_to(own)
        twin = shipped / name
        if twin.is_file() and twin.read_bytes() != path.read_bytes():
            raise UserError(
                f"{path}: sae_lora has an option of this name, and would use that one; rename the file"
            )


def _no_group(group: str, groups: Mapping[str, object]) -> str:
    if group in RENAMED_GROUPS:
        return f"the config group `{group}` is called `{RENAMED_GROUPS[group]}` now"
    roots = [name for name in groups if "/" not in name]
    near = nearest_name(group, roots)
    allowed = f"  allowed: {listed(sorted(roots), 20)}"
    return with_nearest(f"there is no config group {group}", allowed, nearest=near)


def _check_value(key: str, value: yaml.Node, line: int) -> None:
    last = key.rpartition(".")[2]
    if key not in keys():
        raise _FaultError(unknown_key(key), line)
    if is_dataclass(keys()[key]):
        if not isinstance(value, yaml.MappingNode):
            raise _no_section(key, line)
    elif keys()[key] in (str, str | None) and _is_plain(value):
        text = value.value
        read = OmegaConf.create(f"text: {text}").text
        if read is not None and str(read) != text:
            raise _FaultError(f'{key} is a text, and YAML reads {read}: write {last}: "{text}"', line)


def _no_section(key: str, line: int) -> _FaultError:
    name = key.rpartition(".")[2]
    return _FaultError(f"`{name}` is a section: its keys stand below it, indented", line)


def _is_plain(value: yaml.Node) -> bool:
    """True for a value without quotes that stands for itself."""
    is_scalar = isinstance(value, yaml.ScalarNode) and value.style is None
    return is_scalar and "${" not in value.value and value.value != MISSING


def _check_hydra(key: str, value: yaml.Node, line: int) -> None:
    is_section = isinstance(value, yaml.MappingNode)
    if key in ("hydra", "hydra.sweeper", "hydra.sweeper.params") and not is_section:
        raise _no_section(key, line)
    varied = key.removeprefix("hydra.sweeper.params.")
    if varied != key and "." in varied and varied.split(".")[0] in keys() and varied not in keys():
        raise _FaultError(unknown_key(varied), line)


def _keys_in(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node, int]]:
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        if key == "defaults" or (name.value == "defaults" and isinstance(value, yaml.SequenceNode)):
            continue
        if "." in name.value and not key.startswith("hydra."):
            section, _, last = name.value.rpartition(".")
            raise _FaultError(f"write `{section}:`, and `{last}:` below it, indented", _line(name))
        yield key, value, _line(name)
        if isinstance(value, yaml.MappingNode) and (key.startswith("hydra") or _is_section(key)):
            yield from _keys_in(value, f"{key}.")


def _is_section(key: str) -> bool:
    return is_dataclass(keys().get(key)) or any(known.startswith(f"{key}.") for known in keys())


def _line(node: yaml.Node) -> int:
    return typing.cast(yaml.Mark, node.start_mark).line + 1
