"""The suite `steering`: gain in log-probability of text that shows a latent, when the latent is added.

`models.py` defines how a latent is added. For each latent and each model, the strength is chosen on one
half of the texts and the effect is measured on the other half.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_lora.common.errors import ConfigError
from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation.bootstrap import Bootstrap, Interval, interval
from sae_lora.evaluation.steering.models import SteeredModels
from sae_lora.evaluation.steering.texts import Texts, texts_of
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.splice.hooks import Splice
from sae_lora.splice.trunk import Splices

DEPENDS_ON = (
    *("resamples", "sequences", "steering_latents", "steering_block", "steering_strengths"),
    *("steering_max_harm", "steering_texts", "steering_examples", "steering_text_tokens"),
)
"""The keys of `evaluation` that steering depends on."""
_ABSENT = {
    Cell.spliced: "the run trains new SAEs, so there are none before it",
    Cell.adapted: "the run trains no adapters, so its model without an SAE is the plain model",
}
_CHANGES = ((Cell.adapted, Cell.base), (Cell.student, Cell.spliced))
"""Pairs of cells after and before the run that are steered in the same way."""


@dataclass(frozen=True)
class Effect:
    """Change of the log-probability of text by steering, in nats per token.

    Bounds are 95% bootstrap intervals over the texts of each latent and label.
    """

    positive: Interval
    """On texts that show the latent."""
    negative: Interval
    """On texts that do not show it."""
    difference: Interval
    """Positive minus negative: the quality of steering."""


@dataclass(frozen=True)
class Tuned:
    """One latent in one model, at the strength that is best on the validation texts."""

    strength: float
    """In units of the latent's typical activation."""
    positive: list[float]
    """Effect on positive validation texts, in nats per token, at each of `strengths`."""
    negative: list[float]
    """Effect on negative validation texts."""
    effect: Effect
    """On the test texts."""


@dataclass(frozen=True)
class SteeredLatent:
    """One latent in all models."""

    latent: int
    """Its index."""
    activation: float
    """Typical activation: the mean over the tokens of positive validation texts on which the latent is
    active."""
    push: float
    """Norm of the vector that strength 1 adds to the residual stream."""
    positive_texts: int
    """Number of positive test texts."""
    negative_texts: int
    """Number of negative test texts."""
    validation_texts: int
    """Number of validation texts of both labels."""
    cells: dict[str, Tuned]
    """By cell."""
    changes: dict[str, Effect]
    """Changes by the run: `adapted over base` without the SAE, `student over spliced` with it."""


@dataclass(frozen=True)
class Steering:
    """Steering with the latents of one SAE, in nats per token."""

    hookpoint: str
    """Hookpoint of the SAE."""
    source: str
    """Source of the texts: `held out`, or the file."""
    strengths: list[float]
    """All strengths, the weakest first."""
    latents: list[SteeredLatent]
    cells: dict[str, Effect]
    """Mean over latents, each at its own strength, by cell."""
    changes: dict[str, Effect]
    """Mean over latents of the changes by the run."""
    absent: dict[str, str]
    """Reasons for the cells that the run does not have, by cell."""


def steer(subject: Subject, config: EvaluationConfig) -> Steering:
    """Measure the effect of steering with the latents of one of a run's SAEs, before and after the run.

    Latents and texts are chosen with the SAE after the run, on activations of the plain model.

    Raises:
        ConfigError: For a block or a latent that does not exist, or a latent without texts.
        UserError: For a file of texts that cannot be used, or a latent that is not active on its texts.
    """
    splice = _splice_at(subject.after, config.steering_block)
    halves = texts_of(subject, splice, config)
    steered = SteeredModels(subject, splice, halves)
    strengths = sorted(config.steering_strengths, key=abs)
    validation_texts = halves.validation.groups.sum(-1).tolist()
    test_texts = halves.test.groups.sum(-1).tolist()
    # Every model gets the same resamples, so that models are compared text by text.
    bootstraps = [
        Bootstrap(texts, config.resamples, seed=2 * index + positive)
        for index, numbers in enumerate(test_texts)
        for texts, positive in zip(numbers, (True, False), strict=True)
    ]
    curves: dict[Cell, Tensor] = {}
    best: dict[Cell, list[float]] = {}
    measured: dict[Cell, np.ndarray] = {}
    for cell in subject.cells:
        curves[cell] = _on_validation(steered, cell, halves.validation, strengths)
        best[cell] = [
            strengths[place] for place in best_strengths(curves[cell], config.steering_max_harm)
        ]
        measured[cell] = _on_test(steered, cell, halves.test, best[cell], bootstraps)

    def effect(resampled: np.ndarray) -> Effect:
        positive, negative = resampled
        return Effect(interval(positive), interval(negative), interval(positive - negative))

    def changes(resampled: dict[Cell, np.ndarray]) -> dict[str, Effect]:
        return {
            f"{trained.value} over {untrained.value}": effect(resampled[trained] - resampled[untrained])
            for trained, untrained in _CHANGES
            if trained in resampled and untrained in resampled
        }

    latents = [
        SteeredLatent(
            latent=latent,
            activation=float(steered.activations[index]),
            push=float(steered.pushes[index].norm()),
            positive_texts=test_texts[index][0],
            negative_texts=test_texts[index][1],
            validation_texts=sum(validation_texts[index]),
            cells={
                cell.value: Tuned(
                    strength=best[cell][index],
                    positive=curves[cell][0, :, index].tolist(),
                    negative=curves[cell][1, :, index].tolist(),
                    effect=effect(measured[cell][index]),
                )
                for cell in subject.cells
            },
            changes=changes({cell: resampled[index] for cell, resampled in measured.items()}),
        )
        for index, latent in enumerate(halves.latents)
    ]
    means = {cell: resampled.mean(0) for cell, resampled in measured.items()}
    return Steering(
        hookpoint=splice.hookpoint,
        source=config.steering_texts or "held out",
        strengths=strengths,
        latents=latents,
        cells={cell.value: effect(mean) for cell, mean in means.items()},
        changes=changes(means),
        absent={cell.value: reason for cell, reason in _ABSENT.items() if cell not in subject.cells},
    )


def _splice_at(splices: Splices, block: int | None) -> Splice:
    for splice in splices:
        if block in (None, splice.block):
            return splice
    blocks = sorted({splice.block for splice in splices})
    assert block is not None  # every run has an SAE
    raise ConfigError(
        "evaluation.steering_block",
        block,
        f"null, or a block with an SAE of this run: {', '.join(map(str, blocks))}",
        nearest=min(blocks, key=lambda candidate: abs(candidate - block)),
    )


def _on_validation(
    steered: SteeredModels, cell: Cell, texts: Texts, strengths: Sequence[float]
) -> Tensor:
    """Effects on the validation texts in nats per token, `[label, strength, latent]`, positive first."""
    effects = steered.effects(cell, texts, torch.tensor(strengths)[:, None].expand(-1, len(texts)))
    groups = texts.groups.flatten(0, 1)
    means = [effects[:, rows].sum(1) / texts.scored[rows].sum() for rows in groups]
    return torch.stack(means).unflatten(0, (-1, 2)).permute(1, 2, 0)


def best_strengths(curves: Tensor, max_harm: float | None) -> list[int]:
    """Index of the best strength of each latent; of equal strengths, the first.

    The best strength has the largest difference between positive and negative texts.

    Args:
        curves: Effects on validation texts, `[label, strength, latent]`, positive texts first.
        max_harm: Largest loss of log-probability that positive texts may have, in nats per token. If
            every strength loses more, the one with the smallest loss is chosen.
    """
    positive, negative = curves
    allowed = positive >= (-torch.inf if max_harm is None else -max_harm)
    difference = (positive - negative).where(allowed, -torch.inf)
    return difference.argmax(0).where(allowed.any(0), positive.argmax(0)).tolist()


def _on_test(
    steered: SteeredModels,
    cell: Cell,
    texts: Texts,
    best: Sequence[float],
    bootstraps: Sequence[Bootstrap],
) -> np.ndarray:
    """Effects on the test texts in nats per token, `[latent, label, 1 + resamples]`, positive first.

    `best` has the strength of each latent, `bootstraps` the resamples of each latent and label.
    """
    (effects,) = steered.effects(cell, texts, torch.tensor(best)[None, texts.which])
    means = [
        bootstrap.mean(effects[rows], texts.scored[rows])
        for rows, bootstrap in zip(texts.groups.flatten(0, 1), bootstraps, strict=True)
    ]
    return np.stack(means).reshape(len(best), 2, -1)
