"""Checks of a config beyond types: impossible values and combinations."""

import math
import os
from importlib import util
from operator import attrgetter

from sae_lora.common.errors import ConfigError, listed, nearest_name
from sae_lora.common.files import LONGEST_NAME
from sae_lora.config.enums import (
    Architecture,
    Device,
    LauncherKind,
    Method,
    SAEFamily,
    Suite,
    TextSource,
    TrackingMode,
)
from sae_lora.config.execution import BENCHMARKS, SHORTEST_TEXT
from sae_lora.config.identity import TRAINING_SAES, step_tokens
from sae_lora.config.lora_targets import canonical_alpha, target_words
from sae_lora.config.schema import Config, as_list
from sae_lora.config.value_checks import (
    check_blocks,
    check_passes,
    check_processes,
    check_repeats,
    check_shard,
    check_texts,
    check_transcoder,
    check_wandb,
    is_whole,
    refusal,
)


def check(config: Config) -> None:
    """Refuse a config that cannot work. Only its values are checked: nothing is read or loaded.

    Raises:
        ConfigError: Names the field, its value, the allowed values and the nearest valid value.
    """
    check_texts(config)  # first, because other messages show the value
    _check_ranges(config)
    _check_names(config)
    check_wandb(config)
    _check_homes(config)
    _check_groups(config)
    _check_layer(config)
    _check_sae(config)
    _check_method(config)
    check_transcoder(config)
    _check_new_sae(config)
    _check_data(config)
    _check_launcher(config)
    _check_processes(config)
    _check_lora(config)
    _check_steering(config)
    _check_saebench(config)
    _check_packages(config)


def _check_packages(config: Config) -> None:
    """Refuse what needs a package that is not installed."""
    if config.tracking.mode is TrackingMode.trackio and util.find_spec("trackio") is None:
        allowed = "another one, or after `pip install 'sae_lora[trackio]'`"
        raise ConfigError("tracking.mode", "trackio", allowed, "auto")
    evaluation = config.evaluation
    needs_lm_eval = Suite.tasks in evaluation.suites or (
        Suite.downstream in evaluation.suites and bool(evaluation.tasks)
    )
    if needs_lm_eval and util.find_spec("lm_eval") is None:
        allowed = "suites without tasks, or after `pip install 'sae_lora[downstream]'`"
        suites = [suite.name for suite in evaluation.suites]
        raise ConfigError("evaluation.suites", suites, allowed)


_POSITIVE = (
    *("layer.every", "layer.n_groups", "lora.rank", "method.rank", "method.epsilon"),
    *("method.dead_after_tokens", "method.buffer_tokens"),
    *("sae.sparsity_coefficient", "data.validation_tokens"),
    *("data.shuffle_buffer", "train.train_tokens", "train.batch_size", "train.micro_batch_size"),
    *("train.lr", "train.loraplus_ratio", "train.kl_chunk_tokens", "train.eval_every_tokens"),
    *("train.eval_batch_tokens", "train.checkpoint_every_steps", "evaluation.resamples"),
    *("evaluation.sequences", "evaluation.directions", "evaluation.task_batch_size"),
    *("evaluation.latents_effect_tokens", "evaluation.circuits_max_features"),
    *("evaluation.task_limit", "evaluation.steering_examples", "launcher.signal_delay_s"),
    *("launcher.array_parallelism", "launcher.max_array_size", "launcher.nodes"),
    *("launcher.processes_per_node", "launcher.timeout_min", "launcher.cpus_per_task"),
    *("launcher.max_parallel", "launcher.mem_gb", "launcher.gpu_mem_gb", "tracking.finish_timeout_s"),
)
_NOT_NEGATIVE = (
    *("launcher.gpus_per_node", "model.middle_block", "train.weight_decay", "train.eval_cache_gb"),
    *("train.seed", "data.seed", "evaluation.few_shot"),
    *("evaluation.steering_block", "evaluation.steering_max_harm"),
)
_SHARES = {
    "lora.dropout": (0, 0.9),
    "train.warmup_share": (0, 1.0),
    "data.validation_share": (0.001, 0.9),
    "init_at": (0.001, 1.0),
    "launcher.keep": (0.01, 0.99),
}
_SHORTEST_CONTEXT = 8
_LARGEST = 10**15
"""Largest whole number; no text has as many tokens."""
_LARGEST_SEED = 2**32 - 1


def _check_ranges(config: Config) -> None:
    for key in _POSITIVE:
        value = attrgetter(key)(config)
        if value is not None and not 0 < value < math.inf:
            is_int = isinstance(value, int)
            allowed = "a whole number above 0" if is_int else "a finite number above 0"
            raise refusal(config, key, allowed, 1 if is_int else None)
    for key in _NOT_NEGATIVE:
        value = attrgetter(key)(config)
        if value is not None and not 0 <= value < math.inf:
            raise refusal(config, key, "a number of 0 or more", 0)
    for key in (*_POSITIVE, *_NOT_NEGATIVE):
        value = attrgetter(key)(config)
        if isinstance(value, int) and value > _LARGEST:
            raise refusal(config, key, f"at most {_LARGEST}", _LARGEST)
    for key, (low, high) in _SHARES.items():
        value = attrgetter(key)(config)
        if not low <= value <= high:
            nearest = low if value < low else high
            raise refusal(config, key, f"a share from {low:g} to {high:g}", nearest)
    for key in ("train.seed", "data.seed"):
        if attrgetter(key)(config) > _LARGEST_SEED:
            raise refusal(config, key, f"at most {_LARGEST_SEED}", _LARGEST_SEED)
    length = config.data.context_length
    if length < _SHORTEST_CONTEXT:
        allowed = f"at least {_SHORTEST_CONTEXT} tokens"
        raise refusal(config, "data.context_length", allowed, _SHORTEST_CONTEXT)
    check_passes(config)
    if config.train.grad_clip is not None and not config.train.grad_clip > 0:
        raise refusal(config, "train.grad_clip", "a number above 0, or null", "null")
    minutes = config.train.checkpoint_every_min
    if minutes is not None and not 0 < minutes < math.inf:
        allowed = "minutes above 0, or null for checkpoints only by steps"
        raise refusal(config, "train.checkpoint_every_min", allowed, "null")
    if config.sae.l0 is not None and not 0 < config.sae.l0 < math.inf:
        raise refusal(config, "sae.l0", "active latents per token, above 0")


def _check_names(config: Config) -> None:
    for key, default in (("sweep", "main"), ("output_dir", "outputs")):
        if not getattr(config, key).strip():
            raise refusal(config, key, "the name of a folder", default)
    if "/" in config.sweep or config.sweep.startswith("."):
        nearest = config.sweep.strip("./").replace("/", "_") or "main"
        raise refusal(config, "sweep", "one folder name that does not begin with a dot", nearest)
    length = len(config.sweep.encode())
    if length > LONGEST_NAME:
        nearest = config.sweep.encode()[:LONGEST_NAME].decode(errors="ignore")
        allowed = f"at most {LONGEST_NAME} bytes, the longest name of a folder"
        raise refusal(config, "sweep", allowed, nearest, f"it has {length} bytes")
    if not config.model.name.strip():
        raise refusal(config, "model.name", "a repository, a folder, or tiny", "tiny")


_PATHS = (
    *("model.name", "sae.path", "data.files", "data.cache_dir", "output_dir", "init"),
    "evaluation.steering_texts",
)


def _check_homes(config: Config) -> None:
    """Refuse `~name` at the beginning of a path if this machine has no such user."""
    for key in _PATHS:
        for path in as_list(attrgetter(key)(config)):
            if isinstance(path, str) and os.path.expanduser(path).startswith("~"):  # noqa: PTH111 it does not raise
                user = path.split("/")[0]
                raise refusal(config, key, "a path", f"./{path}", f"there is no user {user[1:]!r}")


def _check_layer(config: Config) -> None:
    layer = config.layer
    if layer.index is not None:
        check_blocks(config, "layer.index")
    if layer.every is None:
        if layer.first is not None:
            raise refusal(config, "layer.first", "null without layer.every", "null")
        return
    if layer.index is not None:
        allowed = "null, because layer.index names the blocks; or set layer.index=null"
        raise refusal(config, "layer.every", allowed, "null", f"layer.index is {layer.index}")
    if layer.first is not None and layer.first < 0:
        raise refusal(config, "layer.first", "a block's index, or null", 0)


def _check_groups(config: Config) -> None:
    """Refuse contradictory settings of layer groups."""
    layer = config.layer
    group_keys = [
        f"layer.{name}" for name in ("amad_max", "n_groups") if getattr(layer, name) is not None
    ]
    if layer.evenly and layer.n_groups is None:
        raise refusal(config, "layer.evenly", "false without layer.n_groups", "false")
    if not group_keys:
        return
    if len(group_keys) > 1:
        raise refusal(config, group_keys[0], "null with layer.n_groups", "null")
    if layer.amad_max is not None and not 0 < layer.amad_max <= 1:
        raise refusal(config, "layer.amad_max", "a distance above 0 and up to 1", 0.2)
    if config.method.kind is not Method.sae and config.init is None:
        allowed = "null, except with method=sae, which trains an SAE per group, or with init=<that run>"
        raise refusal(config, group_keys[0], allowed, "null")
    for name in ("index", "every", "hook"):
        if getattr(layer, name) is not None:
            raise refusal(config, f"layer.{name}", f"null with {group_keys[0]}", "null")


def _check_lora(config: Config) -> None:
    target_words(config.lora.targets)
    canonical_alpha(config.lora)
    blocks = config.lora.blocks
    if not isinstance(blocks, str):
        check_blocks(config, "lora.blocks")
    elif blocks not in ("after", "all"):
        nearest = nearest_name(blocks, ("after", "all")) or "after"
        raise refusal(config, "lora.blocks", "after, all, or a list of indices", nearest)


def latents(width: str) -> int:
    """The number of latents of a width such as `16k`, `131k`, `1m` or `1024`.

    The `k` in names of SAEs is not exact: 16k is 16,384, and 65k is 65,536. With a unit, the next power
    of two is taken if it is at most about 6% larger.

    Raises:
        ConfigError: If the text is not a width.
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


def _check_sae(config: Config) -> None:
    sae = config.sae
    if sae.width is not None:
        latents(sae.width)
    if sae.outlier_norm is not None and not 1 < sae.outlier_norm < math.inf:
        raise refusal(config, "sae.outlier_norm", "a number above 1, in medians", nearest=10)
    if sae.id is not None or sae.family in (SAEFamily.disk, SAEFamily.identity):
        for key in ("sae.width", "sae.l0"):
            if attrgetter(key)(config) is not None:
                allowed = "null, because sae.id, sae.path or sae=identity already determines the SAE"
                raise refusal(config, key, allowed, "null")
    if sae.family is SAEFamily.registry:
        if sae.release is None:
            raise refusal(config, "sae.release", "a release of the sae-lens registry")
    elif sae.family is SAEFamily.disk:
        _check_folders(config)
    else:
        needs = {"sae.release": "registry", "sae.id": "registry", "sae.path": "disk"}
        for key, family in needs.items():
            if attrgetter(key)(config) is not None:
                allowed = f"null with sae={sae.family.name}; it belongs to sae={family}"
                raise refusal(config, key, allowed, "null")


def _check_folders(config: Config) -> None:
    """Check `sae.path`: a folder, or a list of folders that name their places."""
    path, allowed = config.sae.path, "a folder with cfg.json and the weights of an SAE"
    folders = as_list(path)
    if not folders or not all(isinstance(folder, str) and folder for folder in folders):
        raise refusal(config, "sae.path", f"{allowed}, or a list of such folders")
    if not isinstance(path, list):
        return
    if any("{block}" in folder for folder in folders):
        raise refusal(config, "sae.path", f"in a list, {allowed}, without {{block}}")
    for key in ("layer.index", "layer.every", "layer.hook", "layer.reads"):
        if attrgetter(key)(config) is not None:
            allowed = "null with a list in sae.path, each of whose folders names its place"
            raise refusal(config, key, allowed, "null")


def _check_method(config: Config) -> None:
    method, family, kind = config.method, config.sae.family, config.method.kind
    if kind is Method.mezo and config.lora.dropout > 0:
        raise refusal(config, "lora.dropout", "0 with method=mezo", 0)
    if family is SAEFamily.new and kind not in (Method.e2e, Method.sae):
        allowed = f"an existing SAE with method={kind.name}; method=sae and method=e2e train new ones"
        raise refusal(config, "sae.family", allowed)
    if kind is Method.sae and family is not SAEFamily.new:
        raise refusal(config, "sae.family", "new with method=sae, which trains a new SAE", "new")
    if kind in TRAINING_SAES and family is SAEFamily.identity:
        raise refusal(config, "sae.family", f"an SAE that can be trained, with method={kind.name}")
    if method.checkpoints and (kind not in TRAINING_SAES or kind is Method.lora_sae):
        allowed = f"none with method={kind.name}: only methods that train nothing but SAEs save them"
        raise refusal(config, "method.checkpoints", allowed, "[]")
    if not all(0 < share <= 1 for share in method.checkpoints):
        raise refusal(config, "method.checkpoints", "shares above 0 and up to 1")
    check_repeats(config, "method.checkpoints", "share")
    rate = method.lora_lr
    if rate is not None and (kind is not Method.lora_sae or not 0 <= rate < math.inf):
        allowed = "0 or above, and null with other methods than lora_sae"
        raise refusal(config, "method.lora_lr", allowed, "null")
    if rate == 0 and config.init is None and config.lora.begun is None:
        allowed = "above 0, or null, without init=<a run with adapters>"
        raise refusal(config, "method.lora_lr", allowed, "null")


TOPK_LIKE = (
    *(Architecture.topk, Architecture.batchtopk, Architecture.matryoshka),
    Architecture.batchtopk_transcoder,
)
"""Architectures with k active latents per token."""


def _check_new_sae(config: Config) -> None:
    sae = config.sae
    if sae.family is not SAEFamily.new:
        return
    if sae.width is None:
        raise refusal(config, "sae.width", "a number of latents, such as 16k or 1024")
    if sae.architecture not in TOPK_LIKE:
        return
    kind = f"sae.architecture={sae.architecture.name}"
    if sae.l0 is None:
        raise refusal(config, "sae.l0", f"k, with {kind}", 32)
    if sae.architecture is Architecture.topk and sae.l0 != round(sae.l0):
        raise refusal(config, "sae.l0", f"a whole number, with {kind}", round(sae.l0))
    if sae.l0 > latents(sae.width):
        raise refusal(config, "sae.l0", "at most sae.width", latents(sae.width))
    if sae.sparsity_coefficient is not None:
        allowed = f"null with {kind}, whose sparsity is sae.l0"
        raise refusal(config, "sae.sparsity_coefficient", allowed, "null")


_PATTERNS = "a path or glob pattern, or a list of them"


def _check_data(config: Config) -> None:
    data = config.data
    if data.source is TextSource.hub and data.name is None:
        raise refusal(config, "data.name", "a Hugging Face data set, such as org/name")
    if data.source is TextSource.text_files and not data.files:
        raise refusal(config, "data.files", _PATTERNS)
    for pattern in as_list(data.files or []):
        if not isinstance(pattern, str) or not pattern:
            because = f"{pattern!r} is not text; quote a name of digits twice: 'data.files=\"2024\"'"
            raise refusal(config, "data.files", _PATTERNS, because=because)
    if not (data.bos == "auto" or isinstance(data.bos, bool)):
        nearest = str(data.bos).lower() if str(data.bos).lower() in ("true", "false") else "auto"
        raise refusal(config, "data.bos", "auto, true or false", nearest)
    step = step_tokens(config)
    if config.train.train_tokens < step:
        allowed = f"at least one step of {step} tokens (train.batch_size × data.context_length)"
        raise refusal(config, "train.train_tokens", allowed, step)
    length = data.context_length
    if data.validation_tokens < length:
        allowed = f"at least one sequence of {length} tokens (data.context_length)"
        raise refusal(config, "data.validation_tokens", allowed, length)


def _check_launcher(config: Config) -> None:
    launcher, pack = config.launcher, config.launcher.pack
    # YAML reads off as False.
    if pack is not False and pack not in ("auto", "off") and not (is_whole(pack) and pack > 0):
        nearest = nearest_name(str(pack), ("auto", "off"))
        nearest = nearest or ("off" if isinstance(pack, int) else "auto")
        raise refusal(config, "launcher.pack", "auto, off or a number of runs", nearest)
    if launcher.sbatch is not None and not isinstance(launcher.sbatch, dict):
        raise refusal(config, "launcher.sbatch", "options of sbatch, as {option: value}")
    if launcher.kind is LauncherKind.slurm and launcher.timeout_min is None:
        raise refusal(config, "launcher.timeout_min", "minutes, with launcher=slurm", 240)
    if launcher.timeout_min is not None and 60 * launcher.timeout_min <= launcher.signal_delay_s:
        allowed = f"less than the {60 * launcher.timeout_min} s of launcher.timeout_min"
        raise refusal(config, "launcher.signal_delay_s", allowed, 15 * launcher.timeout_min)


def _check_processes(config: Config) -> None:
    """Refuse more processes than a batch has sequences, or than the method or the launcher supports."""
    launcher = config.launcher
    processes = launcher.nodes * launcher.node_processes
    if config.sae.family is SAEFamily.new and processes > 1:
        for name in ("nodes", "gpus_per_node", "processes_per_node"):
            if (getattr(launcher, name) or 0) > 1:
                key = f"launcher.{name}"
                raise refusal(config, key, "1 with sae=new: one process trains a new SAE", 1)
    if launcher.nodes > 1 and launcher.kind is not LauncherKind.slurm:
        raise refusal(config, "launcher.nodes", "1, except with launcher=slurm", 1)
    if launcher.kind is LauncherKind.slurm and config.train.device is not Device.cpu:
        check_processes(launcher)
    if launcher.shards is None and launcher.shard != "auto":
        raise refusal(config, "launcher.shard", "auto, on or off", "auto")
    if launcher.shards:
        check_shard(config)
    if config.train.batch_size < processes:
        allowed = (
            f"at least {processes}, one sequence for each of {processes} processes "
            "(launcher.nodes × launcher.processes_per_node or launcher.gpus_per_node)"
        )
        raise refusal(config, "train.batch_size", allowed, processes)


def _check_steering(config: Config) -> None:
    evaluation = config.evaluation
    key = "evaluation.steering_latents"
    allowed = "a number of latents above 0, or a list of indices such as [3,17]"
    value = evaluation.steering_latents
    if isinstance(value, list):
        if not value or not all(is_whole(latent) and latent >= 0 for latent in value):
            raise refusal(config, key, allowed)
        check_repeats(config, key, "latent")
    elif not is_whole(value) or value < 1:
        raise refusal(config, key, allowed, 1)
    key = "evaluation.steering_strengths"
    strengths = evaluation.steering_strengths
    if not strengths or not all(map(math.isfinite, strengths)):
        raise refusal(config, key, "a list of finite numbers", "[1.0]")
    check_repeats(config, key, "strength")
    if evaluation.steering_text_tokens < SHORTEST_TEXT:
        allowed = f"at least {SHORTEST_TEXT}: the first token of a text is not scored"
        raise refusal(config, "evaluation.steering_text_tokens", allowed, SHORTEST_TEXT)


def _check_saebench(config: Config) -> None:
    names, options = config.evaluation.saebench, config.evaluation.saebench_options
    options = {} if options is None else options
    if not isinstance(options, dict):
        shape = "{benchmark: {setting: value}}, or null"
        raise refusal(config, "evaluation.saebench_options", shape, "null")
    for key, benchmarks in (("saebench", names), ("saebench_options", options)):
        for name in benchmarks:
            if name not in BENCHMARKS:
                allowed = f"one of SAEBench's {listed(BENCHMARKS)}"
                raise ConfigError(f"evaluation.{key}", name, allowed, nearest_name(name, BENCHMARKS))
    check_repeats(config, "evaluation.saebench", "benchmark")
    for name, values in options.items():
        if not isinstance(values, dict):
            allowed = "fields of the benchmark's config class, as {setting: value}"
            raise ConfigError(f"evaluation.saebench_options.{name}", values, allowed)
