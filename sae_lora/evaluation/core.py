"""What a run's SAEs cost and what it gave back, token by token: cross-entropies, KL, reconstruction."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae_lora.config.evaluation import EvaluationConfig
from sae_lora.evaluation.bootstrap import Bootstrap, Interval, Resampled
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.splice.hooks import Coder, Reading
from sae_lora.splice.kl import log_probabilities
from sae_lora.splice.trunk import Splices
from sae_lora.train.evaluator import NO_LABEL, Reconstruction, next_tokens

_LOGITS_AT_ONCE = 2**22
DENSITY_EDGES = np.arange(-5, 0.25, 0.25).tolist()
"""Of the histogram of latents: log10 of the share of tokens that one is active on."""
CHANGE_EDGES = np.arange(-5, 5.25, 0.25).tolist()
"""Of the histogram of tokens: change of their loss, in nats."""


@dataclass(frozen=True)
class Recovered:
    """Share of the cross-entropy that is kept, `(ablated − it) / (ablated − base)`; 1 is all of it."""

    ablated_ce: Interval
    """With the activation replaced, in nats per token."""
    spliced: Interval | None
    student: Interval


@dataclass(frozen=True)
class Distance:
    """How far a model's predictions are from the plain model's, per token."""

    forward_kl: Interval
    """KL(base ‖ it), in nats."""
    reverse_kl: Interval
    """KL(it ‖ base)."""
    top1_agreement: Interval
    """Share of positions at which both put the same token first."""


@dataclass(frozen=True)
class Read:
    """What an SAE does with what it reads."""

    fvu: float
    """Residual variance / total variance."""
    cosine: float
    """Mean cosine similarity of what it reads and what it puts back."""
    l0: float
    """Mean number of active latents per token."""
    dead: float
    """Share of latents that are active on no token."""
    density: list[int]
    """Latents by the log10 of the share of tokens that they are active on: below the first of
    `density_edges`, between each and the next, above the last; dead ones are in none."""


@dataclass(frozen=True)
class LossChange:
    """How the loss of single tokens changes, in nats."""

    tokens: list[int]
    """How many: below the first of `change_edges`, between each and the next, above the last."""
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
    """Undefined where the SAE opens no gap, or is new."""
    harm: Interval | None
    """Adapted, without the SAE, over base: what the adapters do to the plain model."""
    recovered: dict[str, Recovered]
    """By what stands in for the activation: zero, mean."""
    distance: dict[str, Distance]
    """By cell."""
    saes: dict[str, dict[str, Read]]
    """By hook point, in the spliced model (`before`) and in the student (`after`)."""
    loss_change: dict[str, LossChange]
    """Student over spliced, and student over base."""
    ce_by_position: dict[str, list[float]]
    """By cell: mean loss of the token after each position."""
    density_edges: list[float] = field(default_factory=lambda: DENSITY_EDGES)
    change_edges: list[float] = field(default_factory=lambda: CHANGE_EDGES)


def evaluate(subject: Subject, config: EvaluationConfig) -> Core:
    """Measures a run on all of its held-out text.

    Args:
        subject: The run.
        config: How many resamples there are.
    """
    bootstrap = Bootstrap(len(subject.tokens), config.resamples)
    readings: dict[str, _Observed] = {
        cell: _Observed.of(subject, cell) for cell in subject.cells if subject.splices_of(cell)
    }
    stand_ins = _stand_ins(subject)
    losses = _Losses(subject, [*subject.cells, *stand_ins])
    for tokens in subject.batches():
        hidden = {cell: subject.hidden(cell, tokens, readings.get(cell)) for cell in subject.cells}
        hidden |= {
            name: subject.hidden(Cell.base, tokens, instead=splices)
            for name, splices in stand_ins.items()
        }
        losses.add(tokens, hidden)
    return _core(subject, losses, readings, bootstrap)


class _SAE(Reconstruction):
    """What one SAE does, its cosine similarity too."""

    def __init__(self, sae: Coder, d_model: int, device: torch.device) -> None:
        super().__init__(sae, d_model, device)
        self._cosines = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, reading: Reading) -> None:
        super().add(reading)
        self._cosines += cosine_similarity(reading.resid.double(), reading.recon.double()).sum()

    @property
    def read(self) -> Read:
        """All of it."""
        tokens = float(self.sums[0])
        shares = (self.active[self.active > 0] / tokens).log10().cpu()
        return Read(
            fvu=self.fvu,
            cosine=float(self._cosines) / tokens,
            l0=self.l0,
            dead=self.dead,
            density=_histogram(shares, DENSITY_EDGES),
        )


class _Observed(dict[str, _SAE]):
    """What each SAE of a cell does, by hook point; called as an observer."""

    @classmethod
    def of(cls, subject: Subject, cell: Cell) -> "_Observed":
        """For the SAEs of a cell."""
        d_model = subject.model.config.hidden_size
        return cls(
            (splice.hookpoint, _SAE(splice.sae, d_model, subject.device))
            for splice in subject.splices_of(cell)
        )

    def __call__(self, reading: Reading) -> None:
        self[reading.hookpoint].add(reading)


class _Same:
    """An SAE in form alone: it puts back what it reads."""

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts


class _Always(_Same):
    """Puts back the same whatever it reads."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self._value.expand_as(feature_acts)


def _stand_ins(subject: Subject) -> dict[str, Splices]:
    """What takes the place of the activations that SAEs replace: zeros, and their mean over the text."""
    same = tuple(splice._replace(sae=_Same()) for splice in subject.after)
    sums: dict[str, Tensor] = {}
    tokens = 0

    def add(reading: Reading) -> None:
        nonlocal tokens
        total = reading.resid.double().sum(0)
        sums[reading.hookpoint] = sums.get(reading.hookpoint, torch.zeros_like(total)) + total
        tokens += len(reading.resid) if reading.hookpoint == same[0].hookpoint else 0

    for batch in subject.batches():
        subject.hidden(Cell.base, batch, add, same)
    means = {hookpoint: total / tokens for hookpoint, total in sums.items()}
    return {
        "zero": tuple(one._replace(sae=_Always(0 * means[one.hookpoint])) for one in same),
        "mean": tuple(one._replace(sae=_Always(means[one.hookpoint])) for one in same),
    }


class _Losses:
    """What each model predicts of each token, beside the plain model.

    Args:
        subject: The run.
        names: Of the models, `Cell.base` first.
    """

    def __init__(self, subject: Subject, names: Sequence[str]) -> None:
        self._head = subject.head
        self._names = list(names)
        self._chunk = max(1, _LOGITS_AT_ONCE // (len(names) * self._head.d_vocab))
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, tokens: Tensor, hidden: Mapping[str, Tensor]) -> None:
        """Takes in a batch.

        Args:
            tokens: `[batch, pos]`.
            hidden: By name, what the head reads, `[batch, pos, d_model]`.
        """
        labels = next_tokens(tokens).flatten()
        flat = {name: hidden[name].flatten(0, 1) for name in self._names}
        found: dict[str, list[Tensor]] = defaultdict(list)
        for start in range(0, len(labels), self._chunk):
            rows = slice(start, start + self._chunk)
            for key, values in self._chunk_of(labels[rows], flat, rows):
                found[key].append(values)
        for key, values in found.items():
            self._parts[key].append(torch.cat(values).double().cpu().reshape(tokens.shape))

    def _chunk_of(
        self, labels: Tensor, hidden: Mapping[str, Tensor], rows: slice
    ) -> Iterator[tuple[str, Tensor]]:
        log_p: Tensor | None = None
        for name in self._names:
            log_q = log_probabilities(self._head.logits(hidden[name][rows]))
            losses = -log_q.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
            yield f"ce {name}", torch.where(labels == NO_LABEL, 0.0, losses)
            log_p = log_q if log_p is None else log_p
            yield f"forward {name}", (log_p.exp() * (log_p - log_q)).sum(-1)
            yield f"reverse {name}", (log_q.exp() * (log_q - log_p)).sum(-1)
            yield f"top1 {name}", (log_p.argmax(-1) == log_q.argmax(-1)).double()

    def of(self, what: str, name: str) -> Tensor:
        """A measure of a model at each position, `[sequence, pos]`, on the CPU in float64.

        Args:
            what: `ce`, whose last position has no label and is zero, `forward` or `reverse` KL, or
                `top1`, whether both put the same token first.
            name: Of the model.
        """
        return torch.cat(self._parts[f"{what} {name}"])


def _core(
    subject: Subject, losses: _Losses, readings: Mapping[str, _Observed], bootstrap: Bootstrap
) -> Core:
    """The suite's results, from what single tokens have cost."""
    sequences, length = subject.tokens.shape

    def mean(what: str, name: str) -> Resampled:
        of_sequences = losses.of(what, name).sum(1)
        positions = length - 1 if what == "ce" else length
        return bootstrap.mean(of_sequences, torch.full_like(of_sequences, positions))

    def interval(measure: Resampled) -> Interval:
        return bootstrap.interval(measure)

    ce = {cell: mean("ce", cell) for cell in subject.cells}
    base, student, spliced = ce[Cell.base], ce[Cell.student], ce.get(Cell.spliced)
    adapted = ce.get(Cell.adapted)
    has_gap = spliced is not None and spliced[0] > base[0]
    return Core(
        tokens=subject.tokens.numel(),
        sequences=sequences,
        ce={cell.value: interval(measure) for cell, measure in ce.items()},
        initial_gap=None if spliced is None else interval(spliced - base),
        ce_gap=interval(student - base),
        gap_closed=interval(1 - (student - base) / (spliced - base)) if has_gap else None,
        harm=None if adapted is None else interval(adapted - base),
        recovered={
            name: Recovered(
                ablated_ce=interval(ablated := mean("ce", name)),
                spliced=None if spliced is None else interval((ablated - spliced) / (ablated - base)),
                student=interval((ablated - student) / (ablated - base)),
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
        saes=_saes(readings),
        loss_change={
            f"student over {cell.value}": _change(
                losses.of("ce", Cell.student)[:, :-1] - losses.of("ce", cell)[:, :-1]
            )
            for cell in (Cell.spliced, Cell.base)
            if cell in ce
        },
        ce_by_position={
            cell.value: losses.of("ce", cell)[:, :-1].mean(0).tolist() for cell in subject.cells
        },
    )


def _saes(readings: Mapping[str, _Observed]) -> dict[str, dict[str, Read]]:
    """By hook point, as they were before the run and after it."""
    when = {Cell.spliced: "before", Cell.student: "after"}
    found: dict[str, dict[str, Read]] = {}
    for cell, observed in readings.items():
        for hookpoint, sae in observed.items():
            found.setdefault(hookpoint, {})[when[Cell(cell)]] = sae.read
    return found


def _change(losses: Tensor) -> LossChange:
    return LossChange(
        tokens=_histogram(losses.flatten(), CHANGE_EDGES),
        mean=float(losses.mean()),
        worse=float((losses > 0).double().mean()),
    )


def _histogram(values: Tensor, edges: Sequence[float]) -> list[int]:
    """How many are below the first edge, between each and the next, and above the last."""
    places = torch.bucketize(values.double().cpu(), torch.tensor(edges, dtype=torch.float64))
    return torch.bincount(places, minlength=len(edges) + 1).tolist()
