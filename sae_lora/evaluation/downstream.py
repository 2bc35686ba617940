"""What a run is worth downstream: to benchmarks, with its SAEs in the model and without them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from sae_lora.config import EvaluationConfig
from sae_lora.errors import UserError
from sae_lora.evaluation import harness
from sae_lora.evaluation.harness import Tasks
from sae_lora.evaluation.subject import Subject
from sae_lora.terminal import complain


@dataclass(frozen=True)
class Downstream:
    """The suite `downstream`. A part that lacks something says so, and holds nothing else."""

    tasks: Tasks
    """Tasks of lm-evaluation-harness."""
    # `steering: Steering` belongs here, and its line into `_PARTS`.


class _Part(NamedTuple):
    """How a part is taken.

    Args:
        kind: What holds it; with nothing but `missing` where it could not be taken.
        take: Takes it.
        check: Refuses, before anything is loaded, what it cannot be taken of.
    """

    kind: Callable[..., Any]
    take: Callable[[Subject, EvaluationConfig], Any]
    check: Callable[[EvaluationConfig], None] = lambda config: None


_PARTS = {"tasks": _Part(Tasks, harness.score, harness.check)}
"""By field of `Downstream`."""


def check(config: EvaluationConfig) -> None:
    """Refuses, before a model is loaded, what no part can be taken of.

    Args:
        config: Which tasks there are to be.

    Raises:
        UserError: Names what is missing.
    """
    lacking = []
    for part in _PARTS.values():
        try:
            part.check(config)
        except UserError as error:
            lacking.append(error)
    if len(lacking) == len(_PARTS):
        raise UserError("\n".join(map(str, lacking)))


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
            found[name] = part.kind(missing=str(error))
    if len(lacking) == len(_PARTS):
        raise UserError("\n".join(lacking.values()))
    for name, text in lacking.items():
        complain(f"{name} of {subject.folder.path.name} left out", text)
    return Downstream(**found)
