"""The schema of `evaluation`: the measurements of a run that has ended."""

from dataclasses import dataclass, field
from typing import Any

from sae_lora.config.enums import Suite

BENCHMARKS = ("core", "sparse_probing", "scr", "tpp", "absorption")
"""The benchmarks of SAEBench that need no account and no judge, whatever the model."""
SHORTEST_TEXT = 2
"""Tokens of a text for steering, at least: the first is context alone."""


@dataclass
class EvaluationConfig:
    """The measurements of a run that has ended. Does not change its result."""

    suites: list[Suite] = field(default_factory=list)
    """core, mechanism, lora, tasks, steering, saebench, or downstream for the last three: at the end of
    every run; `python -m sae_lora evaluate` does so at any time."""
    resamples: int = 1000
    """Resamples of the held-out sequences, for the intervals around means."""
    sequences: int = 500
    """Held-out sequences that the suites mechanism and lora read, at most."""
    directions: int = 16
    """Suite lora: directions of an SAE's error and of its decoder, at most, to compare with adapters."""
    steering_latents: Any = 8
    """A list of latents to steer with; or a number of them, whose activations tell texts apart best."""
    steering_block: int | None = None
    """The block whose SAE has these latents; null: the first SAE's."""
    steering_strengths: list[float] = field(default_factory=lambda: [0.0625, 0.125, 0.25, 0.5, 1.0])
    """Amounts of a latent to add, in units of its mean activation where it is active. Each latent gets,
    in each model, the strength that is best on half of the texts; the other half is measured."""
    steering_max_harm: float | None = 0.0
    """Nats per token that positive texts may lose by a strength that is chosen: 0 asks that they become
    likelier. Null: any number, also by a strength that makes negative texts yet more unlikely."""
    steering_texts: str | None = None
    """A .jsonl file of text to steer on, with `latent` (its index), `text`, and `label`: positive where
    the text has what the latent stands for, else negative. Null: held-out text, told apart by
    activation."""
    steering_examples: int = 8
    """Held-out text: a latent's positive texts in each half, at most, and as many negative ones."""
    steering_text_tokens: int = 64
    """Held-out text: tokens of each, from the beginning of a sequence; at most `sequences` texts."""
    tasks: list[str] = field(default_factory=lambda: ["mmlu", "hellaswag", "truthfulqa_mc2"])
    """Tasks or groups of lm-evaluation-harness; or tiny_continuation and tiny_generation, which ship."""
    task_limit: int | None = None
    """Documents of each task, from the first on; null: all."""
    few_shot: int | None = None
    """Examples before each document; null: as many as the task says. A task that says none gets none."""
    task_batch_size: int = 8
    """Texts in a forward pass of a task. Changes memory and time; the result by rounding alone."""
    saebench: list[str] = field(default_factory=lambda: list(BENCHMARKS))
    """Benchmarks of SAEBench, in the environment that `python -m sae_lora setup saebench` makes."""
    saebench_options: Any = None
    """By benchmark, fields of its own config (SAEBench's `EvalConfig` classes) and their values, such as
    `{sparse_probing: {probe_train_set_size: 400}}`; null: all as SAEBench has them."""
    saebench_python: str | None = None
    """The Python of an environment that has SAEBench; null: of the environment that `setup` has made."""
