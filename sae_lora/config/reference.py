"""The reference of config keys, for `--help` and the pages: type, value and docstring of each."""

import ast
import dataclasses
import enum
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from omegaconf import MISSING, OmegaConf
from rich.table import Table
from rich.text import Text

from sae_lora.common.console import console, say
from sae_lora.config.compose import CONF, with_options_first, with_quoted_text
from sae_lora.config.mistakes.explain import mistakes_explained
from sae_lora.config.schema import WRITTEN_BY_PLANNER, Config
from sae_lora.config.serialize import written


@dataclass(frozen=True)
class Key:
    """A config key that a user may set."""

    name: str
    """The dotted key, as on the command line: `lora.rank`."""
    kind: str
    """Type or allowed words: `int`, `float or null`, `auto, cpu, cuda`."""
    text: str
    """The docstring of its field in the schema, on one line."""

    @property
    def group(self) -> str:
        """The group of the key; empty for a key of the whole run."""
        return self.name.rpartition(".")[0]

    @property
    def sentence(self) -> str:
        """The first sentence of the docstring."""
        return self.text.partition(". ")[0].removesuffix(".")


@cache
def documented_keys() -> tuple[Key, ...]:
    """Every key that a user may set, in the order of the schema."""
    return tuple(key for key in _keys(Config, "") if key.name not in WRITTEN_BY_PLANNER)


def _keys(schema: type, prefix: str) -> Iterator[Key]:
    texts = _docstrings(schema)
    for name, kind in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(kind):
            yield from _keys(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", _in_words(kind), texts[name])


def _docstrings(schema: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, from the source: Python does not keep it."""
    (definition,) = ast.parse(inspect.getsource(schema)).body
    assert isinstance(definition, ast.ClassDef)
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }


def _in_words(kind: Any) -> str:
    """The type of a field in words, for readers of `--help`."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_in_words(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is list:
        return f"list of {_in_words(typing.get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return ", ".join(kind.__members__)
    return {type(None): "null", Any: "see the text"}.get(kind) or kind.__name__


def groups(*folders: Path) -> dict[str, list[str]]:
    """The options of every config group, in the order of the schema; nested options as `methods/lora`.

    Args:
        folders: Folders with groups of the user's own.
    """
    options: dict[str, set[str]] = {field.name: set() for field in dataclasses.fields(Config)}
    for folder in (CONF, *folders):
        for file in sorted(folder.glob("*/**/*.yaml")):
            group, *name = file.relative_to(folder).with_suffix("").parts
            options.setdefault(group, set()).add("/".join(name))
    return {group: sorted(names) for group, names in options.items() if names}


def show_help(arguments: Sequence[str]) -> None:
    """Print the config groups and all keys, with the values that the arguments give them.

    Args:
        arguments: Overrides and options of `launch`. Of the options, only `--config-dir` has an effect.

    Raises:
        UserError: For an impossible override.
    """
    options, _ = get_args_parser().parse_known_args(with_options_first(arguments))
    folders = [Path(options.config_dir).absolute()] if options.config_dir else []
    path = [f"hydra.searchpath=[file://{folder}]" for folder in folders]
    with mistakes_explained(), initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[*map(with_quoted_text, options.overrides), *path])
    say(_INTRODUCTION)
    table = _table("Groups (group=option)")
    for group, names in groups(*folders).items():
        table.add_row(Text(f"  {group}", "bold"), Text(", ".join(names)))
    console.print(table)
    table = _table("Keys (key=value), with their current values")
    group = documented_keys()[0].group
    for key in documented_keys():
        if key.group != group:
            group = key.group
            table.add_row()
        value = OmegaConf.select(config, key.name, throw_on_missing=False, default=MISSING)
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        plain = plain.name if isinstance(plain, enum.Enum) else plain
        table.add_row(
            Text(f"  {key.name}={'' if plain == MISSING else written(plain)}"), Text(key.sentence)
        )
    console.print(table)
    say(_END)


def _table(title: str) -> Table:
    say(f"\n{title}")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(max_width=_WIDEST_KEY, overflow="fold")
    table.add_column(overflow="fold")
    return table


_WIDEST_KEY = 46
"""Largest width of the column with key and value, in characters."""
_INTRODUCTION = """\
Train LoRA adapters that close the cross-entropy gap of an SAE spliced into a language model.

  sae-lora launch                               the default run: embedded model, offline
  sae-lora launch -m lora.rank=1,4,16,64        a sweep over ranks
  sae-lora launch lora=paper launcher.dry_run=true
  sae-lora launch model=gemma2_2b sae=gemma_scope sae.width=16k sae.l0=82 layer.index=12 data=pile

`python launch.py` does the same in a clone of the repository."""
_END = """
Options: -m (several values per key, with commas), --config-dir DIR (your own groups and experiments),
         --cfg job (the composed config), --hydra-help (all of Hydra's options).
Other commands (status, table, report, evaluate, compare, export): sae-lora --help"""
