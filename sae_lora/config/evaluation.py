"""The schema of `evaluation`: what is measured of a run that has ended, and how."""

import math
from dataclasses import dataclass, field
from typing import Any

from sae_lora.common.errors import ConfigError, listed, nearest_name
from sae_lora.config.enums import Suite

BENCHMARKS = ("core", "sparse_probing", "scr", "tpp", "absorption")
"""Those of SAEBench that a model of anyone's can take, with no account anywhere and no judge."""


@dataclass
class EvaluationConfig:
    """What is measured of a run that has ended. Does not change its result."""

    suites: list[Suite] = field(default_factory=list)
    """core, mechanism, lora, tasks, steering, saebench, or downstream for the last three: at the end of
    every run; `python -m sae_lora evaluate` does so at any time."""
    resamples: int = 1000
    """Of the held-out sequences, for the intervals around means."""
    sequences: int = 500
    """Held-out sequences that the suites mechanism and lora read, at most."""
    directions: int = 16
    """Of an SAE's error and of its decoder: as many, at most, the suite lora compares with what
    adapters read."""
    steering_latents: Any = 8
    """The latents to steer with, a list of them; or how many, which are then those whose
    activations tell texts apart most sharply."""
    steering_block: int | None = None
    """The block whose SAE these latents are of; null: the first SAE's."""
    steering_strengths: list[float] = field(default_factory=lambda: [0.0625, 0.125, 0.25, 0.5, 1.0])
    """How much of a latent is added, in units of its mean activation where it is active. Each latent
    gets, in each model, the strength that is best on half of the texts; the other half is measured."""
    steering_max_harm: float | None = 0.0
    """Nats per token that positive texts may lose by a strength that is chosen: 0 asks that they become
    likelier. Null: any number, also by a strength that makes negative texts yet more unlikely."""
    steering_texts: str | None = None
    """A file of labelled text to steer on: .jsonl with `latent` (its index), `text`, and `label`, which
    is positive where the text has what the latent stands for, else negative. Null: held-out text, told
    apart by activation."""
    steering_examples: int = 8
    """Of held-out text: a latent's positive texts in each half, at most, and as many negative ones."""
    steering_text_tokens: int = 64
    """Of held-out text: tokens of each, from the beginning of a sequence; of `sequences` at most."""
    tasks: list[str] = field(default_factory=lambda: ["mmlu", "hellaswag", "truthfulqa_mc2"])
    """Tasks or groups of lm-evaluation-harness for the suite tasks; tiny_continuation and
    tiny_generation ship with this package."""
    task_limit: int | None = None
    """Documents of each of them, from the first on; null: all."""
    few_shot: int | None = None
    """Examples before each document; null: as many as the task says. A task that says none gets none."""
    task_batch_size: int = 8
    """Texts in a forward pass of a task. Changes memory and time, and of the result no more than
    rounding does."""
    saebench: list[str] = field(default_factory=lambda: list(BENCHMARKS))
    """Benchmarks of SAEBench for the suite saebench, which runs in an environment of its own:
    `python -m sae_lora setup saebench` makes it."""
    saebench_options: Any = None
    """By benchmark, fields of its own config (SAEBench's `EvalConfig` classes) and their values, such as
    `{sparse_probing: {probe_train_set_size: 400}}`; null: all as SAEBench has them."""
    saebench_python: str | None = None
    """The Python of an environment that has SAEBench; null: of the one that `setup` has made."""


SHORTEST_TEXT = 2
"""Tokens: the first is context alone."""


def check_evaluation(config: EvaluationConfig) -> None:
    """Refuses what cannot be asked for of any run.

    Raises:
        ConfigError: Names the field, what it got, and what it may be.
    """
    _check_steering(config)
    _check_saebench(config)


def _check_saebench(config: EvaluationConfig) -> None:
    allowed = f"of SAEBench: {listed(BENCHMARKS)}"
    options = {} if config.saebench_options is None else config.saebench_options
    if not isinstance(options, dict):
        shape = "{benchmark: {setting: value}}, or null"
        raise ConfigError("evaluation.saebench_options", options, shape, "null")
    for key, names in (
        ("evaluation.saebench", config.saebench),
        ("evaluation.saebench_options", options),
    ):
        for name in names:
            if name not in BENCHMARKS:
                raise ConfigError(key, name, allowed, nearest_name(name, BENCHMARKS))
    if len(set(config.saebench)) < len(config.saebench):
        nearest = list(dict.fromkeys(config.saebench))
        raise ConfigError("evaluation.saebench", config.saebench, "each benchmark once", nearest)
    for name, values in options.items():
        if not isinstance(values, dict):
            allowed = "fields of the benchmark's own config, and their values"
            raise ConfigError(f"evaluation.saebench_options.{name}", values, allowed)


def _check_steering(config: EvaluationConfig) -> None:
    _check_latents(config.steering_latents)
    block = config.steering_block
    if block is not None and block < 0:
        raise ConfigError("evaluation.steering_block", block, "a block's index, or null", nearest=0)
    strengths = config.steering_strengths
    if not strengths or not all(math.isfinite(one) for one in strengths):
        raise ConfigError(
            "evaluation.steering_strengths", strengths, "a list of finite numbers", "[1.0]"
        )
    if len(set(strengths)) < len(strengths):
        nearest = sorted(set(strengths))
        raise ConfigError("evaluation.steering_strengths", strengths, "each strength once", nearest)
    harm = config.steering_max_harm
    if harm is not None and not 0 <= harm < math.inf:
        raise ConfigError("evaluation.steering_max_harm", harm, "nats that are not negative, or null", 0)
    if config.steering_text_tokens < SHORTEST_TEXT:
        raise ConfigError(
            "evaluation.steering_text_tokens",
            config.steering_text_tokens,
            f"at least {SHORTEST_TEXT}: the first token of a text is not scored",
            nearest=SHORTEST_TEXT,
        )


def _check_latents(value: Any) -> None:
    allowed = "a number of latents above 0, or a list of indices such as [3,17]"
    if not isinstance(value, list):
        if not _is_whole(value) or value < 1:
            raise ConfigError("evaluation.steering_latents", value, allowed, nearest=1)
        return
    if not value or not all(_is_whole(one) and one >= 0 for one in value):
        raise ConfigError("evaluation.steering_latents", value, allowed)
    if len(set(value)) < len(value):
        nearest = sorted(set(value))
        raise ConfigError("evaluation.steering_latents", value, "each latent once", nearest)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
