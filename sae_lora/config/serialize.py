"""The config as text and plain values, and back; keys that the schema does not have are refused."""

import dataclasses
import typing
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sae_lora.common.errors import UnknownKeyError, nearest_name
from sae_lora.config.schema import Config


def typed(composed: DictConfig) -> Config:
    """The composed config as typed objects, interpolations resolved.

    Raises:
        UnknownKeyError: For a key that the schema does not have (`+foo=1` gets past Hydra).
    """
    values = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    _reject_unknown_keys(values, Config)
    merged = OmegaConf.merge(OmegaConf.structured(Config), values)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


def as_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested values, enums as their names."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    return typing.cast(dict[str, Any], plain)


def load(text: str) -> Config:
    """The config that `OmegaConf.to_yaml(as_dict(config))` came from."""
    loaded = OmegaConf.create(text)
    assert isinstance(loaded, DictConfig)
    return typed(loaded)


def keys(schema: type = Config, prefix: str = "") -> dict[str, typing.Any]:
    """Every dotted key of the schema with its type; groups are included."""
    found: dict[str, typing.Any] = {}
    hints = typing.get_type_hints(schema)
    for entry in dataclasses.fields(schema):
        name = f"{prefix}{entry.name}"
        found[name] = hints[entry.name]
        if dataclasses.is_dataclass(hints[entry.name]):
            found |= keys(typing.cast(type, hints[entry.name]), f"{name}.")
    return found


def _reject_unknown_keys(values: dict[Any, Any], schema: type, prefix: str = "") -> None:
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(f"{prefix}{key}")
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            _reject_unknown_keys(value, typing.cast(type, hints[key]), f"{prefix}{key}.")


def unknown_key(key: str) -> UnknownKeyError:
    """The error for a key that the schema does not have, with the keys beside it."""
    known = keys()
    group, _, name = key.rpartition(".")
    siblings = [one for one in known if one.rpartition(".")[0] == group] or [
        one for one in known if "." not in one
    ]
    by_last_part = {one.rpartition(".")[2]: one for one in [*known, *siblings]}
    nearest = nearest_name(name, by_last_part)
    return UnknownKeyError(key, siblings, by_last_part[nearest] if nearest else None)
