"""Refusals of single values of a config, and checks of lists, texts and numbers of processes."""

import dataclasses
import os
import unicodedata
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

from sae_lora.common.errors import ConfigError, listed, nearest_name
from sae_lora.common.secrets import secret_in
from sae_lora.config.enums import TRANSCODING, DType, Hook, Method, SAEFamily, TrackingMode
from sae_lora.config.execution import LauncherConfig, switch
from sae_lora.config.identity import ADAPTING
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
    allowed = "a block's index, counted from 0, or a list of indices, such as 3 or [1,4]"
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


def check_texts(config: Config) -> None:
    """Refuse secrets and control characters in any text of a config."""
    _check_secrets(config)
    _check_characters(config)


def _check_secrets(config: Config) -> None:
    for key, name, text in _texts(dataclasses.asdict(config)):
        if secret_in(text) or secret_in(f"{name}={text}"):
            raise ConfigError(
                key,
                "***",
                "a value without keys, tokens or passwords; put them into environment variables, or use "
                "`hf auth login` and `wandb login`",
                because="it looks like a secret, and configs are saved and shown",
            )


def _check_characters(config: Config) -> None:
    """Refuse line breaks and other control characters: a line of an sbatch script could end there."""
    for key, _, text in _texts(dataclasses.asdict(config)):
        if key != "tracking.notes" and has_control_characters(text):
            raise ConfigError(key, text, ONE_LINE)


ONE_LINE = "text without line breaks, tabs and other control characters"
"""The allowed values of most texts."""


def has_control_characters(text: str) -> bool:
    """True for a text with a line break, a tab or another control character."""
    return any(unicodedata.category(letter) == "Cc" for letter in text)


def _texts(values: Any, key: str = "", name: str = "") -> Iterator[tuple[str, str, str]]:
    """Every text in nested values, as (config key, innermost name, text)."""
    match values:
        case dict():
            for inner, value in values.items():
                # The schema has two levels; deeper values belong to one key.
                yield from _texts(value, f"{key}.{inner}".lstrip(".") if "." not in key else key, inner)
        case list():
            for value in values:
                yield from _texts(value, key, name)
        case str():
            yield key, name, values


WANDB_MODES = {
    "online": "online",
    "offline": "offline",
    "disabled": "disabled",
    "run": "online",
    "dryrun": "offline",
}
"""The meaning of each value of W&B's variable `WANDB_MODE`; the last two are its old words."""
_NO_PROJECT = "/\\#?%:"
"""Characters that W&B refuses in the name of a project."""


def check_wandb(config: Config) -> None:
    """Refuse what W&B refuses only when a run starts; also in its own variables."""
    for key in ("project", "entity"):
        name = getattr(config.tracking, key)
        if name and set(name) & set(_NO_PROJECT):
            variable = f"WANDB_{key.upper()}"
            is_variable = os.environ.get(variable) == name
            nearest = "".join("-" if letter in _NO_PROJECT else letter for letter in name)
            allowed = f"a name without {' '.join(_NO_PROJECT)}"
            because = f"it is the value of {variable}" if is_variable else None
            raise ConfigError(f"tracking.{key}", name, allowed, nearest, because)
    mode = os.environ.get("WANDB_MODE")
    if mode and config.tracking.mode is TrackingMode.auto and mode not in WANDB_MODES:
        near = nearest_name(mode, WANDB_MODES, similarity=0.7)
        raise ConfigError("WANDB_MODE", mode, f"one of {listed(WANDB_MODES)}", near)


def check_shard(config: Config) -> None:
    """Refuse to divide the weights of a model if the processes would not run the same passes.

    Raises:
        ConfigError: If they would not, or there is only one process.
    """
    launcher, batch = config.launcher, config.train.batch_size
    processes = launcher.nodes * launcher.node_processes
    if processes == 1:
        allowed = (
            "off or auto with one process; several share a batch with launcher.gpus_per_node=2, say"
        )
        raise refusal(config, "launcher.shard", allowed, "off")
    if config.method.kind in ADAPTING and config.lora.dora:
        allowed = "false with launcher.shard: DoRA reads all weights at once"
        raise refusal(config, "lora.dora", allowed, "false")
    if batch % processes:
        allowed = (
            f"a multiple of {processes} processes, which divide the model's weights (launcher.shard)"
        )
        raise refusal(config, "train.batch_size", allowed, batch - batch % processes or processes)


def check_passes(config: Config) -> None:
    """Refuse unknown values of `train.stack` and `train.compile`, and those that cannot be.

    Raises:
        ConfigError: For such a value.
    """
    for key in ("stack", "compile"):
        value = getattr(config.train, key)
        is_on = switch(value)
        if is_on is None and value != "auto":
            raise refusal(config, f"train.{key}", "auto, on or off", "auto")
        reasons = {
            "train.activation_checkpointing, which computes blocks again": (
                config.train.activation_checkpointing
            ),
            "launcher.shard=on, which divides blocks among processes": switch(config.launcher.shard),
            "method=sae, which has no adapters": config.method.kind is Method.sae,
        }
        for reason, holds in reasons.items():
            if is_on and holds:
                raise refusal(config, f"train.{key}", f"off or auto with {reason}", "off")
    _check_products(config)


def _check_products(config: Config) -> None:
    key, train = "train.adapter_products", config.train
    if train.adapter_products not in ("auto", *DType.__members__):
        raise refusal(config, key, "auto, float32 or bfloat16", "auto")
    if train.adapter_products != DType.bfloat16.name:
        return
    alone = switch(train.stack) is False and switch(train.compile) is not True
    reasons = {
        "train.dtype=float32": train.dtype is not DType.bfloat16,
        f"method={config.method.kind.name}": config.method.kind is not Method.lora,
        "lora.dora=true": config.lora.dora,
        "train.activation_checkpointing=true": train.activation_checkpointing,
        "train.stack=off": alone,
    }
    for reason, holds in reasons.items():
        if holds:
            allowed = f"auto or float32 with {reason}: only stacked adapters of a bfloat16 model round"
            raise refusal(config, key, allowed, "auto")


def check_processes(launcher: LauncherConfig) -> None:
    """Refuse more processes than GPUs on a node: each process needs its own GPU.

    Raises:
        ConfigError: If there are more processes than GPUs.
    """
    if launcher.node_processes > launcher.gpus_per_node > 0:
        raise ConfigError(
            "launcher.processes_per_node",
            launcher.node_processes,
            f"at most {launcher.gpus_per_node}, one per GPU (launcher.gpus_per_node), except with "
            "train.device=cpu",
            nearest=launcher.gpus_per_node,
        )


_READING = (SAEFamily.transcoder, SAEFamily.registry, SAEFamily.disk)
"""Families that may have transcoders."""


def check_transcoder(config: Config) -> None:
    """Refuse keys of transcoders where there is none, and transcoders at other places than MLPs."""
    sae, layer = config.sae, config.layer
    is_new = sae.family is SAEFamily.new and sae.architecture in TRANSCODING
    if layer.reads is not None and not is_new and sae.family not in _READING:
        allowed = f"null with sae.family={sae.family.name}: an SAE reads what it replaces"
        raise refusal(config, "layer.reads", allowed, "null")
    if sae.skip and not is_new and sae.family is not SAEFamily.transcoder:
        raise refusal(config, "sae.skip", "false: only transcoders have a skip connection", "false")
    is_at_mlp = is_new or sae.family is SAEFamily.transcoder
    if is_at_mlp and layer.hook not in (None, Hook.mlp_out):
        allowed = "mlp_out with a transcoder, which replaces the output of an MLP"
        raise refusal(config, "layer.hook", allowed, "mlp_out")
