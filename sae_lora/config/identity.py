"""The hash and the name of a run, and the key of runs that may train together."""

import copy
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sae_lora.common.files import LONGEST_NAME
from sae_lora.config.enums import Architecture, Hook, Method, SAEFamily
from sae_lora.config.schema import Config, SAEChoice, as_list
from sae_lora.config.serialize import as_dict
from sae_lora.embedded import NAME as EMBEDDED_NAME

_NOT_HASHED = {
    "": (
        *("launcher", "evaluation", "tracking", "objective", "sweep", "output_dir"),
        *("layer", "init", "init_at"),
    ),
    "model": ("middle_block", "fit_context", "commit", "attention"),
    "sae": ("width", "l0", "release", "id", "path", "sparse", "tf32"),
    "data": ("cache_dir", "version"),
    "train": (
        *("device", "kl", "kl_chunk_tokens", "activation_checkpointing", "eval_each_sae"),
        *("eval_batch_tokens", "eval_cache_gb", "checkpoint_every_steps", "checkpoint_every_min"),
        *("deterministic", "stack", "compile", "adapter_products"),
    ),
}
"""Keys that cannot change a result, or requests that `sae.used` answers."""
_METHOD_KEYS: dict[Method, tuple[str, ...]] = {
    Method.lora: (),
    Method.mezo: ("kind", "epsilon"),
    Method.linear_adapter: ("kind", "rank"),
    Method.mlp_adapter: ("kind", "rank"),
    Method.sae_finetune: ("kind", "rank", "mse", "dead_after_tokens", "checkpoints"),
    Method.lora_sae: ("kind", "lora_lr", "mse", "dead_after_tokens"),
    Method.e2e: ("kind", "dead_after_tokens", "checkpoints"),
    Method.sae: ("kind", "dead_after_tokens", "checkpoints", "buffer_tokens"),
}
"""The keys of `method` that each method reads."""
_UNUSED_BY_SAE = ("grad_clip", "weight_decay", "kl_reduction", "micro_batch_size")
"""The keys of `train` that method=sae does not read, because it takes sae-lens's training steps."""
ADAPTING = (Method.lora, Method.mezo, Method.lora_sae)
"""Methods that train LoRA adapters."""
TRAINING_SAES = (Method.sae_finetune, Method.lora_sae, Method.e2e, Method.sae)
"""Methods that train the SAE itself."""
NOT_HASHED_KEYS = frozenset(f"{group}.{name}" for group, names in _NOT_HASHED.items() for name in names)
"""`_NOT_HASHED` as dotted keys."""


def trains_adapters(config: Mapping[str, Any]) -> bool:
    """True if the run with this `config.yaml` trains LoRA adapters, as all runs without `method` do."""
    return Method[config.get("method", {"kind": Method.lora.name})["kind"]] in ADAPTING


def identity(config: Config) -> str:
    """Hash of a run: eight hexadecimal digits that identify its results.

    It is equal for two configs with equal results by construction: it leaves out output folders,
    launcher, tracking and the request for an SAE, which `sae.used` answers.
    """
    return identity_of(as_dict(config))


def identity_of(values: dict[str, Any]) -> str:
    """The hash, as `identity`, of a config as plain values: from `as_dict` or `completed`."""
    kind = Method[values["method"]["kind"]]
    keeps_first = _keeps_first(values)
    values = _without(copy.deepcopy(values), _NOT_HASHED)
    sae, lora, train = values["sae"], values["lora"], values["train"]
    for choice in sae["used"]:
        del choice["commit"]
        _leave_out_path(choice, "adapter")
        if choice["hook"] == Hook.resid_post.name:  # as in versions that had no other hooks
            del choice["hook"]
        if choice["reads"] is None:  # as in versions that had no transcoders
            del choice["reads"]
        if not choice["group"]:
            del choice["group"]
    if values["data"]["bos"] == "auto":  # as in versions that had no other choice
        del values["data"]["bos"]
    if sae["family"] != SAEFamily.new.name:
        del sae["architecture"]
    if sae["family"] != SAEFamily.new.name or not sae["skip"]:
        del sae["skip"]
    if not keeps_first:
        del sae["keep_first"]
    if sae["outlier_norm"] is None:
        del sae["outlier_norm"]
    if sae["sparsity_coefficient"] is None or kind not in TRAINING_SAES:
        del sae["sparsity_coefficient"]
    if names := _METHOD_KEYS[kind]:
        values["method"] = {name: values["method"][name] for name in names}
    else:  # as in versions that had no other methods
        del values["method"]
    if kind in ADAPTING:
        _leave_out_path(lora, "begun")
        if not lora["dora"]:
            del lora["dora"]
        if lora["selection"] is None:
            del lora["selection"]
    else:
        del values["lora"]
    if kind not in (Method.lora, Method.lora_sae):
        del train["loraplus_ratio"]
    if kind is Method.sae:
        values = _without(values, {"train": _UNUSED_BY_SAE})
    return hashlib.sha256(_canonical(values).encode()).hexdigest()[:8]


def _keeps_first(values: Mapping[str, Any]) -> bool:
    """False if the run treats first positions as version 0.1 did, which had no rule for them."""
    if values["sae"]["keep_first"] is not None:
        return values["sae"]["keep_first"]
    # Other SAEs that were trained without these positions did not exist then. The embedded model's text
    # always begins with BOS, which keeps its activation anyway.
    is_new = values["sae"]["family"] == SAEFamily.new.name
    return is_new and values["model"]["name"] != EMBEDDED_NAME


def _leave_out_path(values: dict[str, Any], name: str) -> None:
    """Identify trained weights by content only: remove their folder, or the key if it is null."""
    if values[name] is None:
        del values[name]
    else:
        del values[name]["path"]


_DIFFER_IN_PACK = {
    "": (
        *("sae", "layer", "lora", "launcher", "evaluation", "tracking"),
        *("objective", "sweep", "output_dir", "init", "init_at"),
    ),
    "method": ("rank", "mse", "lora_lr", "epsilon", "dead_after_tokens", "checkpoints"),
    "model": ("middle_block", "fit_context"),
    "data": ("cache_dir",),
    "train": (
        *("lr", "schedule", "warmup_share", "loraplus_ratio", "weight_decay", "grad_clip"),
        *("kl_reduction", "seed", "checkpoint_every_steps", "checkpoint_every_min"),
    ),
}
"""Keys in which runs that train together may differ."""


def pack_key(config: Config) -> str:
    """A key that is equal for runs that may train together: they share the model and the batches."""
    values = _without(as_dict(config), _DIFFER_IN_PACK)
    if config.method.kind is Method.sae:  # they read the same activations
        for name in ("keep_special_tokens", "keep_first", "outlier_norm"):
            values[name] = getattr(config.sae, name)
    return _canonical(values)


def _without(values: dict[str, Any], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    for group, left_out in names.items():
        part = values[group] if group else values
        for name in left_out:
            del part[name]
    return values


def _canonical(values: dict[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def train_steps(config: Config) -> int:
    """Optimiser steps of a run. Steps are whole, so a run may train on a few tokens more than asked."""
    return math.ceil(config.train.train_tokens / step_tokens(config))


def step_tokens(config: Config) -> int:
    """Tokens per optimiser step."""
    return config.train.batch_size * config.data.context_length


def dead_after_steps(config: Config) -> int:
    """Steps without activity after which a latent of an SAE in training counts as dead; at least 1."""
    return max(1, config.method.dead_after_tokens // step_tokens(config))


def readable_name(config: Config) -> str:
    """A short name for people: model, blocks, SAE, rank, and other settings that usually vary."""
    sae, method, lora = config.sae, config.method, config.lora
    parts = [config.model.name.rstrip("/").split("/")[-1], "l" + _short_places(sae.used)]
    if len(sae.used) == 1 and sae.used[0].width is not None:
        parts.append(f"w{sae.used[0].width}")
        if sae.used[0].l0 is not None:
            parts.append(f"l0_{sae.used[0].l0:g}")
    if method.kind is not Method.lora:
        parts.append(method.kind.name)
    if sae.family is SAEFamily.new and sae.architecture is not Architecture.topk:
        parts.append(sae.architecture.name)
    if method.kind in ADAPTING:
        parts.append(f"r{lora.rank}")
        parts.append(
            lora.blocks if isinstance(lora.blocks, str) else "b" + "+".join(map(str, lora.blocks))
        )
        if lora.targets != "all":
            # `*` and `?` are no names of files in all systems, and shells expand them.
            parts.append("+".join(as_list(lora.targets)).translate(str.maketrans("*?", "xx")))
    elif method.rank is not None and "rank" in _METHOD_KEYS[method.kind]:
        parts.append(f"r{method.rank}")
    if config.init is not None:
        parts.append(f"init{config.init_at:g}" if config.init_at != 1 else "init")
    parts.append(f"s{config.train.seed}")
    return "-".join(parts)


def folder_name(config: Config) -> str:
    """Name of the run folder: the readable name and the hash.

    A name that is too long for a file system is cut. The hash keeps it unique.
    """
    name, run_hash = readable_name(config), identity(config)
    most = LONGEST_NAME - len(run_hash) - 1
    return f"{name.encode()[:most].decode(errors='ignore')}-{run_hash}"


_MOST_BLOCKS = 8
"""Largest number of blocks that a name lists one by one."""


def _short_places(used: Sequence[SAEChoice]) -> str:
    """Places of the SAEs in a name: `3`, `2+5`, `3mlp_out`; `0to30by2` for many blocks at equal steps;
    `0to6in3` for three SAEs that each serve a group of blocks.
    """
    blocks, hooks = [choice.block for choice in used], {choice.hook for choice in used}
    if used and used[0].group:
        return f"{blocks[0]}to{blocks[-1]}in{len({tuple(choice.group) for choice in used})}"
    if len(hooks) > 1:
        if len(used) > _MOST_BLOCKS:
            return f"{blocks[0]}to{blocks[-1]}mixed"
        return "+".join(f"{choice.block}{choice.hook.name}" for choice in used)
    steps = {following - block for block, following in itertools.pairwise(blocks)}
    text = "+".join(map(str, blocks))
    if len(blocks) > _MOST_BLOCKS and len(steps) == 1:
        text = f"{blocks[0]}to{blocks[-1]}by{steps.pop()}"
    return text + "".join(hook.name for hook in hooks if hook is not Hook.resid_post)
