"""The config as text and plain values, and back; keys that the schema does not have are refused."""

import dataclasses
import typing
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError

from sae_lora.common.errors import UserError, listed, nearest_name
from sae_lora.config.schema import WRITTEN_BY_PLANNER, Config


def typed(composed: DictConfig) -> Config:
    """The composed config as typed objects, interpolations resolved.

    Raises:
        UserError: For a key that the schema does not have (`+foo=1` gets past Hydra).
    """
    values = OmegaConf.to_container(composed, resolve=True, enum_to_str=True)
    assert isinstance(values, dict)
    try:
        merged = OmegaConf.merge(_schema(), values)
    except ConfigKeyError as error:
        raise unknown_key(str(error.full_key)) from error
    config = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    return config


@cache
def _schema() -> DictConfig:
    # Cached: OmegaConf takes as long to make it as to merge a config into it.
    return OmegaConf.structured(Config)


def as_dict(config: Config) -> dict[str, Any]:
    """The config as plain nested values, enums as their names."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    return typing.cast(dict[str, Any], plain)


def load(text: str) -> Config:
    """The config that `OmegaConf.to_yaml(as_dict(config))` came from."""
    loaded = OmegaConf.create(text)
    assert isinstance(loaded, DictConfig)
    return typed(loaded)


def keys(schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its type; groups are included."""
    types: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(schema).items():
        types[f"{prefix}{name}"] = kind
        if dataclasses.is_dataclass(kind):
            types |= keys(typing.cast(type, kind), f"{prefix}{name}.")
    return types


def unknown_key(key: str) -> UserError:
    """The error for a key that the schema does not have, with the keys beside it."""
    known = [name for name in keys() if name not in WRITTEN_BY_PLANNER]
    group, _, name = key.rpartition(".")
    beside = [other for other in known if other.rpartition(".")[0] == group]
    siblings = beside or [other for other in known if "." not in other]
    by_last_part = {other.rpartition(".")[2]: other for other in [*known, *siblings]}
    lines = [f"there is no key {key}", f"  there are: {listed(siblings, 30)}"]
    if (nearest := nearest_name(name, by_last_part)) is not None:
        lines.append(f"  nearest valid: {by_last_part[nearest]}")
    return UserError("\n".join(lines))
