"""What `evaluation` may ask for: of steering, with which latents and how strongly; of SAEBench, what."""

import math
from typing import Any

from sae_lora.common.errors import ConfigError, listed, nearest_name
from sae_lora.evaluation_config import BENCHMARKS, EvaluationConfig

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
    for field, names in (
        ("evaluation.saebench", config.saebench),
        ("evaluation.saebench_options", options),
    ):
        for name in names:
            if name not in BENCHMARKS:
                raise ConfigError(field, name, allowed, nearest_name(name, BENCHMARKS))
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
