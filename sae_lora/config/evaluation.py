"""The schema of `evaluation`: the measurements of finished runs."""

from dataclasses import dataclass, field
from typing import Any

from sae_lora.config.enums import Suite

BENCHMARKS = ("core", "sparse_probing", "scr", "tpp", "absorption")
"""The benchmarks of SAEBench that work with any model and need no account and no LLM judge."""
SHORTEST_TEXT = 2
"""Least number of tokens of a text for steering: the first token is only context."""


@dataclass
class EvaluationConfig:
    """The measurements of finished runs. Does not change their training."""

    suites: list[Suite] = field(default_factory=list)
    """Suites at the end of each run: core, mechanism, lora, tasks, steering, saebench, or downstream for
    the last three. `sae-lora evaluate` runs them at any time."""
    resamples: int = 1000
    """Number of bootstrap resamples of held-out sequences, for intervals of means."""
    sequences: int = 500
    """Largest number of held-out sequences that the suites mechanism and lora read."""
    directions: int = 16
    """Suite lora: largest number of directions of the SAE's error and decoder to compare with
    adapters."""
    steering_latents: Any = 8
    """Latents to steer with: a list of indices, or a number; then the latents whose activations separate
    texts best."""
    steering_block: int | None = None
    """Block of the SAE with these latents; null: the first SAE."""
    steering_strengths: list[float] = field(default_factory=lambda: [0.0625, 0.125, 0.25, 0.5, 1.0])
    """Strengths to try, in units of the latent's mean activation where it is active. For each latent and
    model the strength that is best on one half of the texts is measured on the other half."""
    steering_max_harm: float | None = 0.0
    """Largest loss of positive texts, in nats per token, that a strength may cause; with 0 they must
    become likelier. Null: no limit."""
    steering_texts: str | None = None
    """A .jsonl file of text to steer on, with the fields `latent` (index), `text` and `label` (positive
    if the text has what the latent stands for, else negative). Null: held-out text, labelled by
    activation."""
    steering_examples: int = 8
    """Held-out text: largest number of positive texts per latent in each half, and of negative ones."""
    steering_text_tokens: int = 64
    """Held-out text: tokens per text, from the beginning of a sequence."""
    tasks: list[str] = field(default_factory=lambda: ["mmlu", "hellaswag", "truthfulqa_mc2"])
    """Tasks or groups of lm-evaluation-harness, or the included tiny_continuation and
    tiny_generation."""
    task_limit: int | None = None
    """Number of documents per task, from the first; null: all."""
    few_shot: int | None = None
    """Number of examples before each document; null: the task's own number, or none."""
    task_batch_size: int = 8
    """Texts per forward pass of a task. Results differ only by rounding."""
    saebench: list[str] = field(default_factory=lambda: list(BENCHMARKS))
    """Benchmarks of SAEBench, which needs `sae-lora setup saebench` once."""
    saebench_options: Any = None
    """Fields of SAEBench's config classes, by benchmark, such as `{sparse_probing:
    {probe_train_set_size: 400}}`; null: SAEBench's own values."""
    saebench_python: str | None = None
    """Python of an environment with SAEBench; null: the environment of `sae-lora setup saebench`."""
