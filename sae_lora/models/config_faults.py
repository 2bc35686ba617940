"""The keys of a model's config.json that are the cause of an error of transformers.

An error rarely names its key. So each key is left out in turn, which gives it the default value of
transformers; if the same step then succeeds, the key is a cause.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeGuard

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from sae_lora.common.errors import ConfigError, UserError, is_out_of_memory
from sae_lora.config.schema import ModelConfig
from sae_lora.models.dimensions import config_values, reading, short_cause, unusable

Values = Mapping[str, Any]
"""The values of config.json."""
_KINDS = ("model_type", "architectures", "auto_map", "transformers_version")
"""Keys that name the architecture. They have no default value, or do not change the model."""
_MAX_NAMED = 3


def parsed(values: Values) -> PreTrainedConfig:
    """The config of transformers with these values."""
    with TemporaryDirectory() as folder:  # read as from any folder, with all conversions
        (Path(folder) / "config.json").write_text(json.dumps(values))
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)


def built(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config without weights, on torch's meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def run(model: PreTrainedModel) -> None:
    """Run two tokens through a model without weights.

    Raises:
        Exception: An error of any kind, if its code cannot work with its config. Errors of operations
            that the meta device does not have are left out.
    """
    tokens = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), _Answers():
            model.eval()(input_ids=tokens, use_cache=False)
    except RuntimeError:  # torch's class for operations that need numbers
        return


def asks_for_content(function: Any, arguments: tuple[Any, ...]) -> bool:
    """True if an operation asks a tensor on the meta device for a number, which it does not have."""
    return function is torch.ops.aten._local_scalar_dense.default and arguments[0].is_meta


class _Answers(TorchDispatchMode):
    """Context in which questions to the content of a tensor are answered with yes."""

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: Any = None
    ) -> Any:
        return True if asks_for_content(function, arguments) else function(*arguments, **keywords or {})


@contextmanager
def explained(config: ModelConfig, step: Callable[[Values], object]) -> Iterator[None]:
    """Turn errors of transformers inside the block into one that names the keys of config.json.

    Args:
        config: The model.
        step: The step that the block does, from the values of config.json.

    Raises:
        UserError: Replaces the error, which is its cause.
    """
    with reading(config, "config.json"):
        try:
            yield
        except UserError:
            raise
        except (
            Exception
        ) as error:  # the code of a model can fail in any way with a value of another type
            if not is_out_of_memory(error) and (keys := _named(config, step)):
                raise unusable(config, f"config.json: {short_cause(error)}{keys}") from error
            raise


def _named(config: ModelConfig, step: Callable[[Values], object]) -> str:
    """The keys without which the step succeeds; if there are none, those with unusual numbers."""
    values = config_values(config)

    def works(changed: Values) -> bool:
        try:
            step(changed)
        except Exception:  # as in `explained`
            return False
        return True

    if works(values):  # the error has another cause, such as the network
        return ""
    return _listed(_causes(values, works) or _unusual(values), "")


@contextmanager
def with_unusual_numbers(config: ModelConfig) -> Iterator[None]:
    """Add to a refusal of the model those numbers of its config.json that may be its cause.

    Raises:
        UserError: Replaces the refusal.
    """
    try:
        yield
    except ConfigError:
        raise
    except UserError as refusal:
        raise UserError(f"{refusal}{_listed(_unusual(config_values(config)), 'perhaps ')}") from refusal


def _listed(keys: Mapping[str, Any], doubt: str) -> str:
    words = [f"{key} = {value!r}" for key, value in keys.items()]
    return f"; the cause is {doubt}{' or '.join(words[:_MAX_NAMED])} in config.json" if words else ""


def _causes(values: Values, works: Callable[[Values], bool]) -> dict[str, Any]:
    """The keys, with dots, each without which the step succeeds."""
    causes: dict[str, Any] = {}
    for key, value in values.items():
        if key in _KINDS or not works({name: values[name] for name in values if name != key}):
            continue
        inner: dict[str, Any] = {}
        if isinstance(value, dict):
            inner = _causes(value, lambda changed, key=key: works({**values, key: changed}))
        causes |= {f"{key}.{name}": given for name, given in inner.items()} or {key: value}
    return causes


def _unusual(values: Values) -> dict[str, Any]:
    """Keys with a number of 0 or less whose default in transformers is a positive number."""
    defaults = CONFIG_MAPPING[values["model_type"]]().to_dict()
    return dict(_unlike(values, defaults))


def _unlike(values: Values, defaults: Values) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        default = defaults.get(key)
        if isinstance(value, dict):
            inside = _unlike(value, default if isinstance(default, dict) else {})
            yield from ((f"{key}.{name}", given) for name, given in inside)
            continue
        is_positive = key in _POSITIVE or (_is_number(default) and default > 0)
        if is_positive and not key.endswith("_id") and _is_number(value) and value <= 0:
            yield key, value


_POSITIVE = ("rope_theta", "factor")
"""Numbers of rotary frequencies, whose defaults the config class has elsewhere or not at all."""


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
