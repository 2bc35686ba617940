"""Refusals of single values of a config, and checks of lists."""

from operator import attrgetter
from typing import Any

from sae_lora.common.errors import ConfigError
from sae_lora.config.schema import Config, as_list


def refusal(
    config: Config, key: str, allowed: str, nearest: object = None, because: str | None = None
) -> ConfigError:
    """The error for the value at a dotted key."""
    value = attrgetter(key)(config)
    return ConfigError(key, getattr(value, "name", value), allowed, nearest, because)


def is_whole(value: Any) -> bool:
    """True for a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_blocks(config: Config, key: str) -> None:
    """Refuse every value at this key except a block's index or a list of indices."""
    entries = as_list(attrgetter(key)(config))
    allowed = "a block's index or a list of indices, such as 3 or [1,4]"
    if not entries:
        raise refusal(config, key, allowed)
    for entry in entries:
        if not is_whole(entry) or entry < 0:
            raise refusal(config, key, allowed, 0 if isinstance(entry, int) else None)
    check_repeats(config, key, "block")


def check_repeats(config: Config, key: str, entry: str) -> None:
    """Refuse a list with repeated entries."""
    entries = as_list(attrgetter(key)(config))
    distinct = list(dict.fromkeys(entries))
    if len(distinct) < len(entries):
        raise refusal(config, key, f"each {entry} once", distinct)
