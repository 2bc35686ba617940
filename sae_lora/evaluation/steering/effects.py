"""Steering with a latent: whether adding its direction makes text likelier that has what it stands for.

How a latent is added, `steered_models` says. How strongly is settled on one half of the texts, for each
latent and in each model; the other half is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_lora.common.errors import ConfigError
from sae_lora.config.evaluation import EvaluationConfig
from sae_lora.evaluation.bootstrap import Bootstrap, Interval, Resampled
from sae_lora.evaluation.steering.models import SteeredModels
from sae_lora.evaluation.steering.texts import Halves, texts_of
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.splice.hooks import Splice
from sae_lora.splice.trunk import Splices

HEEDS = (
    *("resamples", "sequences", "steering_latents", "steering_block", "steering_strengths"),
    *("steering_max_harm", "steering_texts", "steering_examples", "steering_text_tokens"),
)
"""The keys of `evaluation` that steering depends on."""
_ABSENT = {
    Cell.spliced: "the run has made its SAEs: before it there were none",
    Cell.adapted: "the run has trained no adapters: without an SAE, its model is the plain one",
}
_CHANGES = ((Cell.adapted, Cell.base), (Cell.student, Cell.spliced))
"""Pairs of cells that are steered in the same way, after the run and before it."""


@dataclass(frozen=True)
class Effect:
    """What steering adds to the log-probability of text, in nats per token.

    The bounds are of 95% bootstrap intervals over the texts of each latent and label.
    """

    positive: Interval
    """On texts that have what the latent stands for."""
    negative: Interval
    """On texts that have not."""
    difference: Interval
    """The first minus the second: how well the latent steers."""


@dataclass(frozen=True)
class Tuned:
    """One latent in one model, at the strength that is best on the validation texts."""

    strength: float
    """In units of the latent's typical activation."""
    positive: list[float]
    """The effect on positive validation texts, in nats per token, at each of `strengths`."""
    negative: list[float]
    """The same on negative ones."""
    effect: Effect
    """On the test texts."""


@dataclass(frozen=True)
class SteeredLatent:
    """One latent in all models."""

    latent: int
    """Its index."""
    activation: float
    """Its typical activation: the mean over the tokens of positive validation texts it is active on."""
    push: float
    """Length of what is added to the residual stream at strength 1."""
    positive_texts: int
    """For the test."""
    negative_texts: int
    """For the test."""
    validation_texts: int
    """Of both labels."""
    cells: dict[str, Tuned]
    """By cell."""
    changes: dict[str, Effect]
    """What the run has changed of it: `adapted over base`, without the SAE, `student over spliced`."""


@dataclass(frozen=True)
class Steering:
    """Steering with the latents of one SAE, in nats per token."""

    hookpoint: str
    """Where the SAE sits."""
    source: str
    """Of the texts: `held out`, or the file."""
    strengths: list[float]
    """Those tried, the weakest first."""
    latents: list[SteeredLatent]
    cells: dict[str, Effect]
    """The mean over latents, each at its own strength, by cell."""
    changes: dict[str, Effect]
    """The mean over latents of what the run has changed."""
    absent: dict[str, str]
    """Cells that there are not of this run, and why."""


def steer(subject: Subject, config: EvaluationConfig) -> Steering:
    """Measures how well the latents of one of a run's SAEs steer, before the run and after it.

    Latents and texts are those of the SAE as the run has left it, reading the plain model.

    Args:
        subject: The run.
        config: Which latents, on which texts, how strongly.

    Raises:
        ConfigError: For a block or a latent that there is not, or one that no text shows.
        UserError: Where the file of texts cannot be used, or a latent is active on none of its own.
    """
    splice = _splice_at(subject.after, config.steering_block)
    halves = texts_of(subject, splice, config)
    steered = SteeredModels(subject, splice, halves)
    strengths = sorted(config.steering_strengths, key=abs)
    curves = {cell: _Curves.of(steered, cell, halves, strengths) for cell in subject.cells}
    best = {
        cell: [strengths[one] for one in curve.best(config.steering_max_harm)]
        for cell, curve in curves.items()
    }
    measured = {cell: _on_test(steered, cell, halves, best[cell], config) for cell in subject.cells}

    def of_latent(place: int) -> SteeredLatent:
        effects = {cell: every[place] for cell, every in measured.items()}
        return SteeredLatent(
            latent=halves.latents[place],
            activation=float(steered.activations[place]),
            push=float(steered.pushes[place].norm()),
            positive_texts=int(halves.test.of(place, positive=True).sum()),
            negative_texts=int(halves.test.of(place, positive=False).sum()),
            validation_texts=int((halves.validation.which == place).sum()),
            cells={
                cell.value: Tuned(
                    strength=best[cell][place],
                    positive=curves[cell].positive[:, place].tolist(),
                    negative=curves[cell].negative[:, place].tolist(),
                    effect=one.effect,
                )
                for cell, one in effects.items()
            },
            changes=_changes(effects),
        )

    whole = {cell: _mean(every) for cell, every in measured.items()}
    return Steering(
        hookpoint=splice.hookpoint,
        source=config.steering_texts or "held out",
        strengths=strengths,
        latents=[of_latent(place) for place in range(len(halves.latents))],
        cells={cell.value: one.effect for cell, one in whole.items()},
        changes=_changes(whole),
        absent={cell.value: why for cell, why in _ABSENT.items() if cell not in subject.cells},
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
        nearest=min(blocks, key=lambda one: abs(one - block)),
    )


@dataclass(frozen=True)
class _Curves:
    """Effects on the validation texts of each latent at each strength, in nats per token.

    Args:
        positive: On texts that have what the latent stands for, `[strength, latent]`.
        negative: On the others, `[strength, latent]`.
    """

    positive: Tensor
    negative: Tensor

    @classmethod
    def of(
        cls, steered: SteeredModels, cell: Cell, halves: Halves, strengths: Sequence[float]
    ) -> "_Curves":
        """In one of the models."""
        texts = halves.validation
        effects = steered.effects(cell, texts, torch.tensor(strengths)[:, None].expand(-1, len(texts)))

        def means(*, positive: bool) -> Tensor:
            own = [texts.of(place, positive=positive) for place in range(len(halves.latents))]
            return torch.stack([effects[:, one].sum(1) / texts.scored[one].sum() for one in own], dim=1)

        return cls(means(positive=True), means(positive=False))

    def best(self, max_harm: float | None) -> list[int]:
        """Which strength tells positive from negative texts best, for each latent, the first of equals.

        Args:
            max_harm: What positive texts may lose by it; where they lose more by all, it is the one by
                which they lose least.
        """
        allowed = self.positive >= (-torch.inf if max_harm is None else -max_harm)
        difference = (self.positive - self.negative).where(allowed, -torch.inf)
        return difference.argmax(0).where(allowed.any(0), self.positive.argmax(0)).tolist()


@dataclass(frozen=True)
class _Measured:
    """Effects on the test texts, in all resamples.

    Args:
        bootstrap: Whose they are.
        positive: On texts that have what the latent stands for.
        negative: On the others.
    """

    bootstrap: Bootstrap
    positive: Resampled
    negative: Resampled

    @property
    def effect(self) -> Effect:
        """With intervals."""
        measures = self.positive, self.negative, self.positive - self.negative
        return Effect(*(self.bootstrap.interval(one) for one in measures))

    def over(self, other: "_Measured") -> Effect:
        """How much more the effects are than another model's on the same texts."""
        return _Measured(
            self.bootstrap, self.positive - other.positive, self.negative - other.negative
        ).effect


def _on_test(
    steered: SteeredModels, cell: Cell, halves: Halves, best: Sequence[float], config: EvaluationConfig
) -> list[_Measured]:
    """The effects on the test texts of each latent.

    Args:
        steered: The models.
        cell: Which.
        halves: The texts.
        best: The strength of each latent.
        config: How many resamples there are.
    """
    texts = halves.test
    (effects,) = steered.effects(cell, texts, torch.tensor(best)[None, texts.which])

    def resampled(place: int, *, positive: bool) -> tuple[Bootstrap, Resampled]:
        own = texts.of(place, positive=positive)
        # Each draws for itself, and in every model the same: models are compared text by text.
        bootstrap = Bootstrap(int(own.sum()), config.resamples, seed=2 * place + positive)
        return bootstrap, bootstrap.mean(effects[own], texts.scored[own])

    found = []
    for place in range(len(halves.latents)):
        bootstrap, positive = resampled(place, positive=True)
        found.append(_Measured(bootstrap, positive, resampled(place, positive=False)[1]))
    return found


def _mean(every: Sequence[_Measured]) -> _Measured:
    """Over latents, each of which counts the same."""
    return _Measured(
        every[0].bootstrap,
        np.mean([one.positive for one in every], axis=0),
        np.mean([one.negative for one in every], axis=0),
    )


def _changes(measured: dict[Cell, _Measured]) -> dict[str, Effect]:
    return {
        f"{after.value} over {before.value}": measured[after].over(measured[before])
        for after, before in _CHANGES
        if after in measured and before in measured
    }
