"""What no single type can say: impossible values and combinations, and what the short names mean.

From the values alone: nothing is read or loaded.
"""

from collections.abc import Iterator
from typing import Any

from sae_lora.common.errors import ConfigError, nearest_name
from sae_lora.common.secrets import secret_in
from sae_lora.config.enums import Architecture, Device, LauncherKind, Method, SAEFamily, TextSource
from sae_lora.config.evaluation import check_evaluation
from sae_lora.config.identity import TRAINING_SAES
from sae_lora.config.lora_targets import canonical_alpha, target_matrices
from sae_lora.config.schema import (
    Config,
    DataConfig,
    LauncherConfig,
    LayerConfig,
    LoRAConfig,
    MethodConfig,
    SAEConfig,
    as_list,
)
from sae_lora.config.serialize import as_dict


def check(config: Config) -> None:
    """Refuses what cannot work, from the values alone: nothing is read or loaded.

    Raises:
        ConfigError: Names the field, what it got, what it may be and the nearest valid value.
    """
    _check_secrets(config)  # first: other refusals show the value
    _check_ranges(config)
    _check_names(config)
    _check_layer(config.layer, config.method.kind, begins=config.init is not None)
    _check_sae_request(config.sae)
    _check_method(config.method, config.sae, config.lora)
    _check_data_request(config.data)
    _check_budget(config)
    _check_launcher(config.launcher)
    _check_shared_batches(config)
    target_matrices(config.lora.targets)
    canonical_alpha(config.lora)
    _check_blocks(config.lora.blocks)
    check_evaluation(config.evaluation)


def _check_secrets(config: Config) -> None:
    for key, name, text in _texts(as_dict(config)):
        if secret_in(text) or secret_in(f"{name}={text}"):
            raise ConfigError(
                key,
                "***",
                "a value without keys, tokens or passwords; they belong into the environment, or are "
                "kept by `hf auth login` and `wandb login`",
                because="it looks like a secret, and a config is written down and shown",
            )


def _texts(values: Any, key: str = "", name: str = "") -> Iterator[tuple[str, str, str]]:
    """Every text in nested values: the config's key, the innermost name, the text itself."""
    match values:
        case dict():
            for inner, value in values.items():
                # The schema has two levels; what is below belongs to one key.
                yield from _texts(value, f"{key}.{inner}".lstrip(".") if "." not in key else key, inner)
        case list():
            for value in values:
                yield from _texts(value, key, name)
        case str():
            yield key, name, values


_POSITIVE = (
    *("lora.rank", "data.context_length", "data.validation_tokens"),
    *("data.shuffle_buffer", "train.train_tokens", "train.batch_size", "train.lr"),
    *("train.eval_every_tokens", "train.eval_batch_tokens", "train.checkpoint_every_steps"),
    "train.loraplus_ratio",
    *("method.epsilon", "method.dead_after_tokens", "method.buffer_tokens"),
    *("evaluation.resamples", "evaluation.sequences", "evaluation.directions"),
    *("evaluation.task_batch_size", "evaluation.steering_examples"),
    *("launcher.signal_delay_s", "launcher.array_parallelism", "launcher.max_array_size"),
    "launcher.nodes",
    "tracking.finish_timeout_s",
)
_POSITIVE_IF_GIVEN = (
    *("launcher.timeout_min", "launcher.cpus_per_task", "launcher.max_parallel", "launcher.mem_gb"),
    *("launcher.gpu_mem_gb", "train.kl_chunk_tokens", "train.micro_batch_size"),
    *("launcher.processes_per_node", "method.rank", "sae.sparsity_coefficient"),
    "evaluation.task_limit",
)
_NOT_NEGATIVE = (
    "launcher.gpus_per_node",
    "model.middle_block",
    "train.weight_decay",
    "train.eval_cache_gb",
    "train.seed",
    "data.seed",
    "evaluation.few_shot",
)
_SHARES = {
    "lora.dropout": (0, 0.9),
    "train.warmup_share": (0, 1.0),
    "data.validation_share": (0.001, 0.9),
    "init_at": (0.001, 1.0),
}
_SHORTEST_CONTEXT = 8
_LARGEST_SEED = 2**32 - 1


def _value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _check_ranges(config: Config) -> None:
    given = [key for key in _POSITIVE_IF_GIVEN if _value(config, key) is not None]
    for key in (*_POSITIVE, *given):
        value = _value(config, key)
        if not 0 < value < float("inf"):
            whole = isinstance(value, int)
            allowed = "a whole number above 0" if whole else "a finite number above 0"
            raise ConfigError(key, value, allowed, nearest=1 if whole else None)
    for key in _NOT_NEGATIVE:
        value = _value(config, key)
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(key, value, "a number that is not negative", nearest=0)
    for key, (least, most) in _SHARES.items():
        value = _value(config, key)
        if not least <= value <= most:
            nearest = least if value < least else most
            raise ConfigError(key, value, f"a share from {least:g} to {most:g}", nearest=nearest)
    for key in ("train.seed", "data.seed"):
        if _value(config, key) > _LARGEST_SEED:
            raise ConfigError(
                key, _value(config, key), f"at most {_LARGEST_SEED}", nearest=_LARGEST_SEED
            )
    context = config.data.context_length
    if context < _SHORTEST_CONTEXT:
        allowed = f"at least {_SHORTEST_CONTEXT} tokens"
        raise ConfigError("data.context_length", context, allowed, nearest=_SHORTEST_CONTEXT)
    clip = config.train.grad_clip
    if clip is not None and not clip > 0:
        raise ConfigError("train.grad_clip", clip, "a number above 0, or null", nearest="null")
    if config.sae.l0 is not None and not 0 < config.sae.l0 < float("inf"):
        raise ConfigError("sae.l0", config.sae.l0, "active latents per token, above 0")


def _check_names(config: Config) -> None:
    for key, value in {"sweep": config.sweep, "output_dir": config.output_dir}.items():
        if not value.strip():
            raise ConfigError(key, value, "a folder's name", nearest="main")
    if "/" in config.sweep or config.sweep in {".", ".."}:
        raise ConfigError(
            "sweep", config.sweep, "one folder name", nearest=config.sweep.strip("./").replace("/", "_")
        )
    if not config.model.name.strip():
        raise ConfigError("model.name", config.model.name, "a repository, a folder, or tiny", "tiny")


def _check_indices(key: str, value: Any, *, optional: bool) -> None:
    allowed = "a block's index or a list of them, such as 3 or [1,4]"
    if value is None:
        if optional:
            return
        raise ConfigError(key, value, allowed)
    entries = as_list(value)
    if not entries:
        raise ConfigError(key, value, allowed)
    for entry in entries:
        if not isinstance(entry, int) or isinstance(entry, bool) or entry < 0:
            raise ConfigError(key, value, allowed, nearest=0 if isinstance(entry, int) else None)
    if len(set(entries)) < len(entries):
        raise ConfigError(key, value, "each block once", nearest=sorted(set(entries)))


def _check_layer(layer: LayerConfig, method: Method, *, begins: bool) -> None:
    _check_indices("layer.index", layer.index, optional=True)
    _check_groups(layer, method, begins=begins)
    if layer.every is None:
        if layer.first is not None:
            raise ConfigError("layer.first", layer.first, "null without layer.every", nearest="null")
        return
    if layer.index is not None:
        raise ConfigError(
            "layer.every",
            layer.every,
            "null with layer.index, which names the blocks; or layer.index=null",
            nearest="null",
            because=f"layer.index is {layer.index}",
        )
    if layer.every < 1:
        raise ConfigError("layer.every", layer.every, "a whole number above 0", nearest=1)
    if layer.first is not None and layer.first < 0:
        raise ConfigError("layer.first", layer.first, "a block's index, or null", nearest=0)


def _check_groups(layer: LayerConfig, method: Method, *, begins: bool) -> None:
    """Whether blocks are asked for by groups, and in one way."""
    asked = {"layer.amad_max": layer.amad_max, "layer.n_groups": layer.n_groups}
    given = [key for key, value in asked.items() if value is not None]
    if layer.evenly and layer.n_groups is None:
        raise ConfigError("layer.evenly", True, "false without layer.n_groups", nearest="false")
    if not given:
        return
    if len(given) > 1:
        raise ConfigError(given[0], layer.amad_max, "null with layer.n_groups", nearest="null")
    if layer.amad_max is not None and not 0 < layer.amad_max <= 1:
        raise ConfigError("layer.amad_max", layer.amad_max, "a distance above 0 and up to 1", 0.2)
    if layer.n_groups is not None and layer.n_groups < 1:
        raise ConfigError("layer.n_groups", layer.n_groups, "a whole number above 0", nearest=1)
    if method is not Method.sae and not begins:
        raise ConfigError(
            given[0],
            asked[given[0]],
            "null, but with method=sae, which trains an SAE for each group; init=<that run> uses them",
            nearest="null",
        )
    for name in ("index", "every", "hook"):
        value = getattr(layer, name)
        if value is not None:
            shown = getattr(value, "name", value)
            raise ConfigError(f"layer.{name}", shown, f"null with {given[0]}", nearest="null")


def _check_blocks(value: object) -> None:
    if isinstance(value, str):
        if value not in {"after", "all"}:
            nearest = nearest_name(value, ["after", "all"]) or "after"
            raise ConfigError("lora.blocks", value, "after, all, or a list of indices", nearest)
        return
    _check_indices("lora.blocks", value, optional=False)


def latents(width: str) -> int:
    """The number of latents that a width such as `16k`, `131k`, `1m` or `1024` means.

    The `k` of SAE names is loose: 16k is 16,384, and 65k is 65,536. Powers of two win.

    Raises:
        ConfigError: When it is no width.
    """
    text = str(width).strip().lower()
    factor = {"k": 1_000, "m": 1_000_000}.get(text[-1:], 1)
    digits = text[:-1] if factor > 1 else text
    try:
        number = float(digits) * factor
    except ValueError:
        number = 0.0
    if not 1 <= number < 1e9:
        raise ConfigError("sae.width", width, "a number of latents, such as 16k, 131k or 1024")
    if factor > 1:
        for power in range(1, 31):
            if 0.94 < number / 2**power <= 1:
                return 2**power
    return round(number)


def _check_sae_request(sae: SAEConfig) -> None:
    if sae.width is not None:
        latents(sae.width)
    if sae.id is not None or sae.family in (SAEFamily.disk, SAEFamily.identity):
        for key, value in {"sae.width": sae.width, "sae.l0": sae.l0}.items():
            if value is not None:
                raise ConfigError(
                    key, value, "null, where sae.id, sae.path or sae=identity settles the SAE", "null"
                )
    match sae.family:
        case SAEFamily.registry:
            if sae.release is None:
                raise ConfigError("sae.release", None, "a release of the sae-lens registry")
        case SAEFamily.disk:
            if sae.path is None:
                raise ConfigError("sae.path", None, "a folder that holds cfg.json and the weights")
        case _:
            given = {"sae.release": sae.release, "sae.id": sae.id, "sae.path": sae.path}
            for key, value in given.items():
                if value is not None:
                    family = "disk" if key == "sae.path" else "registry"
                    raise ConfigError(
                        key, value, f"null with sae={sae.family.name}; use sae={family} for it", "null"
                    )


TOPK_LIKE = (Architecture.topk, Architecture.batchtopk, Architecture.matryoshka)
"""Architectures of which k latents are active."""


def _check_method(method: MethodConfig, sae: SAEConfig, lora: LoRAConfig) -> None:
    kind = method.kind.name
    if method.kind is Method.mezo and lora.dropout > 0:
        raise ConfigError("lora.dropout", lora.dropout, "0 with method=mezo", nearest=0)
    if sae.family is SAEFamily.new and method.kind not in (Method.e2e, Method.sae):
        raise ConfigError(
            "sae.family",
            "new",
            f"an SAE that exists, with method={kind}; method=sae and method=e2e make one",
        )
    if method.kind is Method.sae and sae.family is not SAEFamily.new:
        raise ConfigError("sae.family", sae.family.name, "new with method=sae, which makes one", "new")
    if method.kind in TRAINING_SAES and sae.family is SAEFamily.identity:
        raise ConfigError("sae.family", "identity", f"an SAE that can be trained, with method={kind}")
    if method.checkpoints and method.kind not in TRAINING_SAES:
        allowed = f"none with method={kind}, which trains no SAE"
        raise ConfigError("method.checkpoints", method.checkpoints, allowed, nearest="[]")
    for share in method.checkpoints:
        if not 0 < share <= 1:
            raise ConfigError("method.checkpoints", method.checkpoints, "shares above 0 and up to 1")
    if len(set(method.checkpoints)) < len(method.checkpoints):
        nearest = sorted(set(method.checkpoints))
        raise ConfigError("method.checkpoints", method.checkpoints, "each share once", nearest)
    if sae.family is SAEFamily.new:
        _check_new(sae)


def _check_new(sae: SAEConfig) -> None:
    if sae.width is None:
        raise ConfigError("sae.width", None, "a number of latents, such as 16k or 1024")
    if sae.architecture in TOPK_LIKE:
        if sae.l0 is None:
            raise ConfigError(
                "sae.l0", None, f"k, with sae.architecture={sae.architecture.name}", nearest=32
            )
        if sae.architecture is Architecture.topk and sae.l0 != round(sae.l0):
            raise ConfigError(
                "sae.l0", sae.l0, "a whole number, with sae.architecture=topk", round(sae.l0)
            )
        if sae.l0 > latents(sae.width):
            raise ConfigError("sae.l0", sae.l0, "no more than sae.width", nearest=latents(sae.width))
    if sae.sparsity_coefficient is not None and sae.architecture in TOPK_LIKE:
        raise ConfigError(
            "sae.sparsity_coefficient",
            sae.sparsity_coefficient,
            f"null with sae.architecture={sae.architecture.name}, whose sparsity is sae.l0",
            nearest="null",
        )


def _check_data_request(data: DataConfig) -> None:
    if data.source is TextSource.hub and data.name is None:
        raise ConfigError("data.name", None, "a Hugging Face data set, such as org/name")
    if data.source is TextSource.text_files and not data.files:
        raise ConfigError("data.files", data.files, "a path or glob pattern, or a list of them")


def _check_budget(config: Config) -> None:
    step = config.train.batch_size * config.data.context_length
    if config.train.train_tokens < step:
        raise ConfigError(
            "train.train_tokens",
            config.train.train_tokens,
            f"at least one step of {step} tokens (train.batch_size × data.context_length)",
            nearest=step,
        )
    if config.data.validation_tokens < config.data.context_length:
        raise ConfigError(
            "data.validation_tokens",
            config.data.validation_tokens,
            f"at least one sequence of {config.data.context_length} tokens (data.context_length)",
            nearest=config.data.context_length,
        )


def _check_launcher(launcher: LauncherConfig) -> None:
    pack = launcher.pack
    is_number = isinstance(pack, int) and not isinstance(pack, bool) and pack > 0
    if not is_number and pack is not False and pack not in ("auto", "off"):  # YAML's off is False
        raise ConfigError(
            "launcher.pack", pack, "auto, off or a number of runs", nearest=_nearest_pack(pack)
        )
    if launcher.sbatch is not None and not isinstance(launcher.sbatch, dict):
        raise ConfigError("launcher.sbatch", launcher.sbatch, "options of sbatch: {option: value}")
    if launcher.kind is LauncherKind.slurm and launcher.timeout_min is None:
        raise ConfigError("launcher.timeout_min", None, "minutes, with launcher=slurm", nearest=240)
    if launcher.timeout_min is not None and 60 * launcher.timeout_min <= launcher.signal_delay_s:
        raise ConfigError(
            "launcher.signal_delay_s",
            launcher.signal_delay_s,
            f"less than the {60 * launcher.timeout_min} s of launcher.timeout_min",
            nearest=15 * launcher.timeout_min,
        )


def _check_shared_batches(config: Config) -> None:
    """Every process that shares a batch needs a sequence of it."""
    launcher = config.launcher
    if config.sae.family is SAEFamily.new and launcher.nodes * launcher.node_processes > 1:
        for key in ("nodes", "gpus_per_node", "processes_per_node"):
            value = getattr(launcher, key)
            if value is not None and value > 1:
                raise ConfigError(f"launcher.{key}", value, "1 with sae=new: one process makes it", 1)
    if launcher.nodes > 1 and launcher.kind is not LauncherKind.slurm:
        raise ConfigError("launcher.nodes", launcher.nodes, "1, but with launcher=slurm", nearest=1)
    if launcher.kind is LauncherKind.slurm and config.train.device is not Device.cpu:
        check_processes(launcher)
    if config.train.batch_size < launcher.nodes * launcher.node_processes:
        raise ConfigError(
            "train.batch_size",
            config.train.batch_size,
            f"at least a sequence for each of {launcher.nodes * launcher.node_processes} processes "
            "(launcher.nodes · launcher.gpus_per_node or launcher.processes_per_node)",
            nearest=launcher.nodes * launcher.node_processes,
        )


def check_processes(launcher: LauncherConfig) -> None:
    """Each process on a GPU needs one of its own.

    Raises:
        ConfigError: Where there are more of them.
    """
    if launcher.node_processes > launcher.gpus_per_node > 0:
        raise ConfigError(
            "launcher.processes_per_node",
            launcher.node_processes,
            f"at most {launcher.gpus_per_node}, one to a GPU (launcher.gpus_per_node), but with "
            "train.device=cpu",
            nearest=launcher.gpus_per_node,
        )


def _nearest_pack(pack: Any) -> str:
    return nearest_name(str(pack), ("auto", "off")) or ("off" if isinstance(pack, int) else "auto")
