"""Steering with a latent: whether adding its direction makes text likelier that has what it stands for.

A latent is added in two ways. Without the SAE, in the plain and in the adapted model, the residual
stream gets what the latent adds to the reconstruction on its positive texts, on average, times the
strength: its decoder's direction in the length of its typical activation. With the SAE in place, in
the spliced model and in the student, the latent's typical activation times the strength is added to
the code, which is the same amount where the run has trained the SAE. Both happen at every position but
those whose activation the SAE keeps. All else is as it is in that model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sae_lora.config import EvaluationConfig
from sae_lora.errors import ConfigError, UserError
from sae_lora.evaluation.bootstrap import Bootstrap, Interval, Resampled
from sae_lora.evaluation.steering_texts import Halves, Texts, batches, residuals, texts_of
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.head import Head
from sae_lora.kl import log_probabilities
from sae_lora.metrics import NO_LABEL, next_tokens
from sae_lora.splice import Coder, Splice
from sae_lora.trunk import Splices

HEEDS = (
    *("resamples", "sequences", "steering_latents", "steering_block", "steering_strengths"),
    *("steering_texts", "steering_examples", "steering_text_tokens"),
)
"""The keys of `evaluation` that steering depends on."""
_LOGITS_AT_ONCE = 2**22
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
    validation: list[float]
    """The difference on the validation texts, in nats per token, at each of `strengths`."""
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
        UserError: Where the file of texts cannot be used.
    """
    splice = _splice_at(subject.after, config.steering_block)
    halves = texts_of(subject, splice, config)
    steered = SteeredModels(subject, splice, halves)
    strengths = sorted(config.steering_strengths, key=abs)
    curves = {cell: _curves(steered, cell, halves, strengths) for cell in subject.cells}
    # The first of equals is the weakest.
    best = {cell: [strengths[one] for one in curve.argmax(0)] for cell, curve in curves.items()}
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
                cell.value: Tuned(best[cell][place], curves[cell][:, place].tolist(), one.effect)
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


class _Pushed:
    """An SAE in form alone, that adds to what it reads.

    Args:
        added: To the residuals `[batch, pos, d_model]`, `[batch, 1, d_model]`.
    """

    def __init__(self, added: Tensor) -> None:
        self._added = added

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts + self._added


class _Raised:
    """An SAE with one latent raised in each text.

    Args:
        sae: The SAE.
        latents: Which latent, `[batch]`.
        by: How much, `[batch]`.
    """

    def __init__(self, sae: Coder, latents: Tensor, by: Tensor) -> None:
        self._sae, self._latents, self._by = sae, latents, by

    def encode(self, x: Tensor) -> Tensor:
        code = self._sae.encode(x)
        shape = (*code.shape[:-1], 1)
        latents, by = (one[:, None, None].expand(shape) for one in (self._latents, self._by))
        return code.scatter_add(-1, latents, by.to(code.dtype))

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self._sae.decode(feature_acts)


class SteeredModels:
    """A run's models, with a latent added to each text.

    Args:
        subject: The run.
        splice: The SAE whose latents are added.
        halves: The latents, and the texts; validation tells how active a latent is.

    Raises:
        UserError: For a latent that is active nowhere on its positive validation texts.
    """

    def __init__(self, subject: Subject, splice: Splice, halves: Halves) -> None:
        self._subject = subject
        self._splice = splice
        self._latents = torch.tensor(halves.latents, device=subject.device)
        self.activations, self.pushes = _typical(subject, splice, halves)
        """Typical activation of each latent, `[latent]`, and what that adds to the residual stream,
        `[latent, d_model]`."""

    def log_probability(self, cell: Cell, texts: Texts, strengths: Tensor | None = None) -> Tensor:
        """The log-probability of each text in nats, given its first token, `[text]` in float64.

        Args:
            cell: In which model.
            texts: The texts.
            strengths: Of the latent of each, `[text]`; `None` for the model as it is.
        """
        found = []
        for rows in batches(self._subject, texts.tokens):
            tokens = texts.tokens[rows].to(self._subject.device)
            instead = None
            if strengths is not None:
                instead = self._steered(cell, texts.which[rows], strengths[rows])
            hidden = self._subject.hidden(cell, tokens, instead=instead)
            found.append(text_log_probability(self._subject.head, hidden, tokens, texts.lengths[rows]))
        return torch.cat(found)

    def _steered(self, cell: Cell, which: Tensor, strengths: Tensor) -> Splices:
        """What is in place of the cell's SAEs, for texts whose latents and strengths are these."""
        which = which.to(self._subject.device)
        strengths = strengths.to(self._subject.device)
        there = self._subject.splices_of(cell)
        if not there:
            return (
                self._splice._replace(sae=_Pushed((strengths[:, None] * self.pushes[which])[:, None])),
            )
        by = strengths * self.activations[which]
        return tuple(
            one._replace(sae=_Raised(one.sae, self._latents[which], by))
            if one.place == self._splice.place
            else one
            for one in there
        )


@torch.no_grad()
def _typical(subject: Subject, splice: Splice, halves: Halves) -> tuple[Tensor, Tensor]:
    """The mean activation of each latent on its positive validation texts, where it is active, and the
    mean of what it adds to the reconstruction there: `[latent]` and `[latent, d_model]`.

    That is found by leaving the latent out, which is the same for every kind of decoder.
    """
    texts = halves.validation
    number, d_model = len(halves.latents), subject.model.config.hidden_size
    tokens = torch.zeros(number, device=subject.device)
    activations = torch.zeros(number, device=subject.device)
    pushes = torch.zeros(number, d_model, device=subject.device)
    positions = torch.arange(texts.tokens.shape[1])
    for rows, resid, kept in residuals(subject, splice, texts.tokens):
        own = (positions < texts.lengths[rows, None]) & texts.positive[rows, None]
        read = own.to(subject.device) & ~kept
        if not read.any():
            continue
        which = texts.which[rows].to(subject.device)[:, None].expand_as(read)[read]
        latents = torch.tensor(halves.latents, device=subject.device)[which]
        code = splice.sae.encode(resid[read])
        values = code.gather(-1, latents[:, None])
        without = code.scatter(-1, latents[:, None], 0)
        added = (splice.sae.decode(code) - splice.sae.decode(without)).float()
        active = values[:, 0] > 0
        tokens.index_add_(0, which[active], torch.ones_like(tokens[which[active]]))
        activations.index_add_(0, which[active], values[active, 0].float())
        pushes.index_add_(0, which[active], added[active])
    for latent, count in zip(halves.latents, tokens.tolist(), strict=True):
        if count == 0:
            raise UserError(
                f"latent {latent} at {splice.hookpoint} is active on no token of its positive texts for "
                "validation, so that there is no strength to add it with"
            )
    return activations / tokens, pushes / tokens[:, None]


def text_log_probability(head: Head, hidden: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    """The log-probability of each text in nats, given its first token, `[text]` in float64 on the CPU.

    What the head says at a position is about the token after it.

    Args:
        head: Of the model.
        hidden: What it reads, `[text, pos, d_model]`.
        tokens: `[text, pos]`.
        lengths: Tokens of each text; what comes after them is not scored, `[text]`.
    """
    labels = next_tokens(tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    beyond = positions >= lengths.to(tokens.device)[:, None] - 1
    labels = labels.masked_fill(beyond, NO_LABEL).flatten()
    flat = hidden.flatten(0, 1)
    found = []
    at_once = max(1, _LOGITS_AT_ONCE // head.d_vocab)
    for start in range(0, len(labels), at_once):
        chunk = slice(start, start + at_once)
        log_p = log_probabilities(head.logits(flat[chunk]))
        found.append(log_p.gather(-1, labels[chunk].clamp(min=0)[:, None])[:, 0])
    scores = torch.cat(found).double().masked_fill(labels == NO_LABEL, 0)
    return scores.reshape(tokens.shape).sum(1).cpu()


def _curves(steered: SteeredModels, cell: Cell, halves: Halves, strengths: Sequence[float]) -> Tensor:
    """The difference of the effects on validation texts, `[strength, latent]`, in nats per token."""
    texts = halves.validation
    plain = steered.log_probability(cell, texts)
    curves = []
    for strength in strengths:
        same = torch.full_like(plain, strength, dtype=torch.float32)
        effects = steered.log_probability(cell, texts, same) - plain
        curves.append([_difference(effects, texts, place) for place in range(len(halves.latents))])
    return torch.tensor(curves, dtype=torch.float64)


def _difference(effects: Tensor, texts: Texts, place: int) -> float:
    positive, negative = (
        float(effects[own].sum() / texts.scored[own].sum())
        for own in (texts.of(place, positive=True), texts.of(place, positive=False))
    )
    return positive - negative


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
    strengths = torch.tensor(best)[texts.which]
    effects = steered.log_probability(cell, texts, strengths) - steered.log_probability(cell, texts)

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
