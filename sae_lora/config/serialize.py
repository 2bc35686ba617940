"""Conversion of the config to text and plain values, and back. Unknown keys are refused."""

import dataclasses
import re
import typing
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue

from sae_lora.common.errors import UserError, listed, nearest_name
from sae_lora.config.schema import WRITTEN_BY_PLANNER, Config


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
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True, enum_to_str=True)
    return typing.cast(dict[str, Any], plain)


def load(text: str) -> Config:
    """The config in this YAML text, the inverse of `OmegaConf.to_yaml(as_dict(config))`."""
    loaded = OmegaConf.create(text)
    assert isinstance(loaded, DictConfig)
    return typed(loaded)


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
    group, _, name = key.rpartition(".")
    siblings = [known_key for known_key in known if known_key.rpartition(".")[0] == group]
    siblings = siblings or [known_key for known_key in known if "." not in known_key]
    by_last_part = {known_key.rpartition(".")[2]: known_key for known_key in [*known, *siblings]}
    lines = [f"there is no key {key}", f"  existing keys: {listed(siblings, 30)}"]
    if (nearest := nearest_name(name, by_last_part)) is not None:
        lines.append(f"  nearest valid: {by_last_part[nearest]}")
    return UserError("\n".join(lines))
