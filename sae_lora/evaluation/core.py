"""The suite `core`: cross-entropies, KL and reconstruction of a run, token by token."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation.bootstrap import Bootstrap, Interval, Resampled, interval
from sae_lora.evaluation.subject import Cell, Replacement, Subject
from sae_lora.records.schema import gap_closed, rounding_error
from sae_lora.saes.loading import IdentitySAE
from sae_lora.splice.hooks import Coder, Observer, Reading
from sae_lora.splice.kl import Comparison, most_likely
from sae_lora.splice.trunk import Splices
from sae_lora.train.evaluator import Reconstruction, cross_entropies, next_tokens, relative_rounding

DENSITY_EDGES = np.arange(-5, 0.25, 0.25).tolist()
"""Edges of the histogram of latents: log10 of the share of tokens that a latent is active on."""
CHANGE_EDGES = np.arange(-5, 5.25, 0.25).tolist()
"""Edges of the histogram of tokens: change of their loss, in nats."""


@dataclass(frozen=True)
class Recovered:
    """Share of the cross-entropy that a model keeps, `(ablated − model) / (ablated − base)`.

    Undefined if the ablation opens no gap above rounding.
    """

    ablated_ce: Interval
    """With the activation replaced, in nats per token."""
    spliced: Interval | None
    student: Interval | None


@dataclass(frozen=True)
class Distance:
    """Distance of a model's predictions to the plain model's, per token."""

    forward_kl: Interval
    """KL(base ‖ model), in nats."""
    reverse_kl: Interval
    """KL(model ‖ base), in nats."""
    top1_agreement: Interval
    """Share of positions at which both models predict the same most likely token."""


@dataclass(frozen=True)
class Read:
    """Reconstruction by one SAE."""

    fvu: float
    """Residual variance / total variance."""
    fvu_without_outliers: float
    """The same without the tokens of large norm, as in `Reconstruction`."""
    cosine: float
    """Mean cosine similarity of the SAE's input and its reconstruction."""
    l0: float
    """Mean number of active latents per token."""
    dead: float
    """Share of latents that are active on no token."""
    density: list[int]
    """Histogram of latents by the log10 of the share of tokens that they are active on: below the first
    of `density_edges`, between neighbouring edges, above the last. Dead latents are not counted."""


@dataclass(frozen=True)
class LossChange:
    """Changes of the loss of single tokens, in nats."""

    tokens: list[int]
    """Number of tokens below the first of `change_edges`, between neighbouring edges, above the last."""
    mean: float
    worse: float
    """Share of the tokens whose loss rises."""


@dataclass(frozen=True)
class Core:
    """The suite `core`. Cross-entropies and gaps in nats per token, with 95% bootstrap intervals."""

    tokens: int
    sequences: int
    ce: dict[str, Interval]
    """By cell: base, spliced, student, adapted."""
    initial_gap: Interval | None
    ce_gap: Interval
    gap_closed: Interval | None
    """Undefined if there was no gap above rounding, or the SAE is new."""
    harm: Interval | None
    """CE of adapted − base: the cost of the adapters without an SAE."""
    recovered: dict[str, Recovered]
    """By the replacement of the activation: zero, mean."""
    distance: dict[str, Distance]
    """By cell."""
    saes: dict[str, dict[str, Read]]
    """By hook point, in the spliced model (`before`) and in the student (`after`)."""
    loss_change: dict[str, LossChange]
    """Student over spliced, and student over base."""
    ce_by_position: dict[str, list[float]]
    """By cell: mean loss of the token after each position, in nats."""
    density_edges: list[float] = field(default_factory=lambda: DENSITY_EDGES)
    change_edges: list[float] = field(default_factory=lambda: CHANGE_EDGES)


def evaluate(subject: Subject, config: EvaluationConfig) -> Core:
    """Measure a run on all of its held-out text."""
    readings = {cell: _readings(subject, subject.splices_of(cell)) for cell in subject.cells}
    ablations = _ablations(subject)
    comparison = Comparison(subject.head, subject.config.train.kl_chunk_tokens)
    batches = []
    for tokens in subject.batches():
        hidden: dict[str, Tensor] = {
            cell: subject.hidden(cell, tokens, _observer(saes)) for cell, saes in readings.items()
        }
        hidden |= {
            name: subject.hidden(Cell.base, tokens, instead=splices)
            for name, splices in ablations.items()
        }
        batches.append(_measures(comparison, tokens, hidden))
    measures = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return _core(subject, measures, readings, Bootstrap(len(subject.tokens), config.resamples))


class _SAE(Reconstruction):
    """Sums over tokens for one SAE, with its cosine similarity."""

    def __init__(self, sae: Coder, d_model: int, device: torch.device) -> None:
        super().__init__(sae, d_model, device)
        self._cosines = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, reading: Reading) -> None:
        super().add(reading)
        self._cosines += cosine_similarity(reading.resid.double(), reading.recon.double()).sum()

    def read(self) -> Read:
        tokens = float(self.sums[0])
        shares = (self.active[self.active > 0] / tokens).log10().cpu()
        return Read(
            fvu=self.fvu,
            fvu_without_outliers=self.metrics["fvu_without_outliers"],
            cosine=float(self._cosines) / tokens,
            l0=self.l0,
            dead=self.dead,
            density=_histogram(shares, DENSITY_EDGES),
        )


def _readings(subject: Subject, splices: Splices) -> dict[str, _SAE]:
    """Empty sums for each SAE, by hook point."""
    d_model = subject.model.config.hidden_size
    return {splice.hookpoint: _SAE(splice.sae, d_model, subject.device) for splice in splices}


def _observer(saes: Mapping[str, _SAE]) -> Observer:
    return lambda reading: saes[reading.hookpoint].add(reading)


def _ablations(subject: Subject) -> dict[str, Splices]:
    """Splices that replace the SAEs' activations by zeros, and by their mean over the text."""
    identities = tuple(splice._replace(sae=IdentitySAE().eval()) for splice in subject.after)
    readings = _readings(subject, identities)
    for tokens in subject.batches():
        subject.hidden(Cell.base, tokens, _observer(readings), identities)
    means = {hookpoint: sae.sums[3:] / sae.sums[0] for hookpoint, sae in readings.items()}
    return {
        name: tuple(
            splice._replace(sae=Replacement((factor * means[splice.hookpoint]).expand_as))
            for splice in subject.after
        )
        for name, factor in (("zero", 0), ("mean", 1))
    }


def _measures(
    comparison: Comparison, tokens: Tensor, hidden: Mapping[str, Tensor]
) -> dict[tuple[str, str], Tensor]:
    """Measures at each position of tokens, `[batch, pos]` in float64 on the CPU, by measure and model.

    They are computed as in `Evaluator`, so that their means are those of the run's summary. `ce` is zero
    at the last position, which has no label; `forward` and `reverse` are KL(base ‖ model) and
    KL(model ‖ base); `top1` is 1 where the base's most likely token is also the model's. The base has
    only `ce`.

    Args:
        comparison: Compares the logits of the models with those of the base.
        tokens: The batch, `[batch, pos]`.
        hidden: The head's input of each model, `[batch, pos, d_model]`.
    """
    labels, unit = next_tokens(tokens).flatten(), comparison.head.unit
    states = {name: inputs.flatten(0, 1) for name, inputs in hidden.items()}
    base = states.pop(Cell.base)
    parts: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for rows in comparison.chunks(base):
        scores, log_sums = comparison.teacher
        top = most_likely(scores)
        parts["ce", Cell.base].append(cross_entropies(scores, log_sums, labels[rows], unit))
        for name, flat in states.items():
            for part in comparison.parts(flat[rows]):
                differences = (part.scores - scores[part.rows]).mul_(part.numerators / part.sums)
                reverse = differences.sum(-1, keepdim=True).double() * unit
                ce = cross_entropies(part.scores, part.log_sums, labels[rows][part.rows], unit)
                parts["ce", name].append(ce)
                parts["forward", name].append(part.kl)
                parts["reverse", name].append(reverse + log_sums[part.rows] - part.log_sums)
                parts["top1", name].append(part.puts_first(top[part.rows]))
    return {
        key: torch.cat([value.flatten() for value in values]).double().cpu().reshape(tokens.shape)
        for key, values in parts.items()
    }


def _core(
    subject: Subject,
    measures: Mapping[tuple[str, str], Tensor],
    readings: Mapping[Cell, Mapping[str, _SAE]],
    bootstrap: Bootstrap,
) -> Core:
    sequences, length = subject.tokens.shape

    def mean(measure: str, name: str) -> Resampled:
        sums = measures[measure, name].sum(1)
        positions = length - 1 if measure == "ce" else length
        return bootstrap.mean(sums, torch.full_like(sums, positions))

    ce = {cell: mean("ce", cell) for cell in subject.cells}
    base, student = ce[Cell.base], ce[Cell.student]
    spliced, adapted = ce.get(Cell.spliced), ce.get(Cell.adapted)
    rounding = rounding_error(relative_rounding(subject.model), subject.tokens.numel())

    def closed(before: Resampled, after: Resampled) -> Interval | None:
        """The share of a gap that is closed, undefined in resamples without a gap."""
        ces = zip(base, before, after, strict=True)
        share = interval(np.array([gap_closed(*each, rounding) for each in ces], dtype=float))
        return None if share.value is None else share

    return Core(
        tokens=subject.tokens.numel(),
        sequences=sequences,
        ce={cell.value: interval(measure) for cell, measure in ce.items()},
        initial_gap=None if spliced is None else interval(spliced - base),
        ce_gap=interval(student - base),
        gap_closed=None if spliced is None else closed(spliced, student),
        harm=None if adapted is None else interval(adapted - base),
        recovered={
            name: Recovered(
                ablated_ce=interval(ablated := mean("ce", name)),
                spliced=None if spliced is None else closed(ablated, spliced),
                student=closed(ablated, student),
            )
            for name in ("zero", "mean")
        },
        distance={
            cell.value: Distance(
                forward_kl=interval(mean("forward", cell)),
                reverse_kl=interval(mean("reverse", cell)),
                top1_agreement=interval(mean("top1", cell)),
            )
            for cell in subject.cells
            if cell is not Cell.base
        },
        saes={
            hookpoint: {
                time: readings[cell][hookpoint].read()
                for time, cell in (("before", Cell.spliced), ("after", Cell.student))
                if cell in readings
            }
            for hookpoint in readings[Cell.student]
        },
        loss_change={
            f"student over {cell.value}": _change(
                measures["ce", Cell.student][:, :-1] - measures["ce", cell][:, :-1]
            )
            for cell in (Cell.spliced, Cell.base)
            if cell in ce
        },
        ce_by_position={
            cell.value: measures["ce", cell][:, :-1].mean(0).tolist() for cell in subject.cells
        },
    )


def _change(losses: Tensor) -> LossChange:
    return LossChange(
        tokens=_histogram(losses.flatten(), CHANGE_EDGES),
        mean=float(losses.mean()),
        worse=float((losses > 0).double().mean()),
    )


def _histogram(values: Tensor, edges: Sequence[float]) -> list[int]:
    """Number of values below the first edge, between neighbouring edges, and above the last."""
    bins = torch.bucketize(values.double().cpu(), torch.tensor(edges, dtype=torch.float64))
    return torch.bincount(bins, minlength=len(edges) + 1).tolist()
