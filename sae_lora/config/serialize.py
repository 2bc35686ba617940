"""Conversion of the config to text and plain values, and back. Unknown keys are refused."""

import dataclasses
import enum
import re
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue

from sae_lora.common.errors import UserError, listed, nearest_name, with_nearest
from sae_lora.config.schema import WRITTEN_BY_PLANNER, Config, SAEChoice


def typed(composed: DictConfig) -> Config:
    """The composed config as typed objects, with interpolations resolved.

    Raises:
        UserError: For a key that the schema does not have (`+foo=1` gets past Hydra), and for a key
            without a value.
    """
    values = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    try:
        merged = OmegaConf.merge(_schema(), values)
    except ConfigKeyError as error:
        raise unknown_key(str(error.full_key)) from error
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        (key, *_) = sorted(OmegaConf.missing_keys(merged))
        raise UserError(f"{key} has no value: add {key}=<value>") from error
    assert isinstance(config, Config)
    return config


@cache
def _schema() -> DictConfig:
    # Cached, because building the schema takes as long as merging a config into it.
    return OmegaConf.structured(Config)


def as_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested values, with enums as their names."""
    return _plain(config, Config)


def _plain(value: Any, kind: Any) -> Any:
    """A value of a key of this type as OmegaConf writes it, which takes much longer."""
    if dataclasses.is_dataclass(value):
        types = _types(type(value))
        return {name: _plain(getattr(value, name), types[name]) for name in types}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Mapping):
        return {key: _plain(each, Any) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, Any) for each in value]
    if kind in (float, float | None) and isinstance(value, int):
        return float(value)
    return value


def load(text: str) -> Config:
    """The config in this YAML text, the inverse of `OmegaConf.to_yaml(as_dict(config))`."""
    loaded = OmegaConf.create(text)
    assert isinstance(loaded, DictConfig)
    return typed(loaded)


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a `config.yaml`, with the defaults of keys that it lacks: as `as_dict` gives them.

    Much quicker than `load`, for commands that read hundreds of run folders.

    Raises:
        UserError: For a key that the schema does not have, and for a key without a value.
    """
    complete = _filled(Config, values, "")
    used = complete["sae"]["used"]
    complete["sae"]["used"] = [_filled(SAEChoice, choice, "sae.used.") for choice in used]
    return complete


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Plain values of a config by dotted key, without the groups. Lists stay whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        flat |= leaves(value, f"{key}.") if key in _groups() else {key: value}
    return flat


@cache
def _groups() -> set[str]:
    return {key for key, kind in keys().items() if dataclasses.is_dataclass(kind)}


def _filled(schema: type, values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Values of a group, with its defaults."""
    if unknown := [name for name in values if name not in _defaults(schema)]:
        raise unknown_key(f"{prefix}{unknown[0]}")
    filled = {}
    for name, (default, kind) in _defaults(schema).items():
        value = values.get(name, default)
        if dataclasses.is_dataclass(kind):
            value = _filled(typing.cast(type, kind), value, f"{prefix}{name}.")
        elif kind in (float, float | None) and isinstance(value, int):
            value = float(value)
        if value == MISSING:
            raise UserError(f"{prefix}{name} has no value")
        filled[name] = value
    return filled


@cache
def _defaults(schema: type) -> dict[str, tuple[Any, Any]]:
    """The default of each key of a group as a plain value, and the key's type."""
    plain = OmegaConf.to_container(OmegaConf.structured(schema), enum_to_str=True)
    types = _types(schema)
    return {name: (value, types[name]) for name, value in typing.cast(dict[str, Any], plain).items()}


@cache
def _types(schema: type) -> dict[str, Any]:
    """The type of each key of a group."""
    return typing.get_type_hints(schema)


PLAIN_TEXT = re.compile(r"[A-Za-z_./][\w./-]*", re.ASCII)
"""Text that Hydra reads without quotes."""
_WORDS = {"null", "true", "false", "nan", "inf", "yes", "no", "on", "off"}
"""Words that Hydra does not read as text unless they are quoted."""


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
            return "{" + ",".join(f"{key}:{written(inner)}" for key, inner in value.items()) + "}"
        case str():
            if PLAIN_TEXT.fullmatch(value) and value.lower() not in _WORDS:
                return value
            # Hydra reads a backslash literally, except before a quote.
            escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
            return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'
        case _:
            raise NotImplementedError(type(value))


def keys(schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema, also of groups, with its type."""
    types: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        types[f"{prefix}{name}"] = kind
        if dataclasses.is_dataclass(kind):
            types |= keys(typing.cast(type, kind), f"{prefix}{name}.")
    return types


def unknown_key(key: str) -> UserError:
    """The error for an unknown key; it lists the keys of the same group."""
    known = [name for name in keys() if name not in WRITTEN_BY_PLANNER]
    group = key.rpartition(".")[0]
    siblings = [known_key for known_key in known if known_key.rpartition(".")[0] == group]
    siblings = siblings or [known_key for known_key in known if "." not in known_key]
    existing = f"  existing keys: {listed(siblings, 30)}"
    nearest = _nearest_key(key, known, siblings)
    return UserError(with_nearest(f"there is no key {key}", existing, nearest=nearest))


def _nearest_key(key: str, known: Sequence[str], siblings: Sequence[str]) -> str | None:
    """The key that is probably meant: of this name elsewhere, or of a similar name in the same group."""
    name = key.rpartition(".")[2]
    elsewhere = {known_key.rpartition(".")[2]: known_key for known_key in known}
    beside = {known_key.rpartition(".")[2]: known_key for known_key in siblings}
    if name in elsewhere:
        return elsewhere[name]
    if "_" in key and "." not in key and (whole := nearest_name(key.replace("_", "."), known)):
        return whole  # lora_rank for lora.rank
    for names, similarity in ((beside, 0.5), (elsewhere, 0.7)):
        if near := nearest_name(name, names, similarity):
            return names[near]
    return None
