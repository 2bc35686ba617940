"""What a run is worth downstream: to benchmarks, with and without its SAEs, and to steering."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sae_lora.config import EvaluationConfig
from sae_lora.errors import UserError
from sae_lora.evaluation import harness, steering
from sae_lora.evaluation.harness import Tasks
from sae_lora.evaluation.steering import Steering
from sae_lora.evaluation.subject import Subject
from sae_lora.terminal import complain


@dataclass(frozen=True)
class Downstream:
    """The suite `downstream`."""

    tasks: Tasks | None = None
    """Tasks of lm-evaluation-harness."""
    steering: Steering | None = None
    """With single latents."""
    missing: dict[str, str] = field(default_factory=dict)
    """By part, what it lacks: it is asked for again."""


HEEDS = ("resamples", "tasks", "task_limit", "few_shot", *steering.HEEDS)
"""The keys of `evaluation` that it depends on."""


class _Part(NamedTuple):
    """How a part is taken.

    Args:
        take: Takes it.
        check: Refuses, before anything is loaded, what it cannot be taken of.
    """

    take: Callable[[Subject, EvaluationConfig], Any]
    check: Callable[[EvaluationConfig], None] = lambda config: None


_PARTS = {"tasks": _Part(harness.score, harness.check), "steering": _Part(steering.steer)}
"""By field of `Downstream`."""


def check(config: EvaluationConfig) -> None:
    """Says, before a model is loaded, what parts lack.

    Args:
        config: What is asked for.

    Raises:
        UserError: Where no part can be taken.
    """
    lacking: dict[str, str] = {}
    for name, part in _PARTS.items():
        try:
            part.check(config)
        except UserError as error:
            lacking[name] = str(error)
    if len(lacking) == len(_PARTS):
        raise UserError("\n".join(lacking.values()))
    for name, text in lacking.items():
        complain(f"{name} left out", text)


def evaluate(subject: Subject, config: EvaluationConfig) -> Downstream:
    """Takes each part that can be taken.

    Args:
        subject: The run.
        config: Which tasks, and how much of them.

    Raises:
        UserError: Where none can be.
    """
    found: dict[str, Any] = {}
    lacking: dict[str, str] = {}
    for name, part in _PARTS.items():
        try:
            found[name] = part.take(subject, config)
        except UserError as error:
            lacking[name] = str(error)
    if len(lacking) == len(_PARTS):
        raise UserError("\n".join(lacking.values()))
    return Downstream(**found, missing=lacking)
