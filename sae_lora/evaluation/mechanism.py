"""The suite `mechanism`: distances of the residual stream to the plain model's, block by block."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation.bootstrap import Bootstrap, Interval, Resampled, interval
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.train.evaluator import relative_rounding

_SHARE = 0.9
"""Share of the resamples between the bounds."""
_ROUNDING = 4
"""Distance that rounding explains, in units of `relative_rounding` times the norm."""


@dataclass(frozen=True)
class Mechanism:
    """The suite `mechanism`. Means over tokens, with 90% bootstrap intervals over sequences.

    Distances to the residual stream `h_clean` of the plain model are:

    - `l2`, ‖h − h_clean‖;
    - `cosine`, 1 − cos(h, h_clean): 0 if both point the same way, 1 if they are orthogonal.

    After a block whose output an SAE replaces, `h` is the SAE's reconstruction.
    """

    sequences: int
    """Number of measured sequences: the first of the held-out text."""
    tokens: int
    """Number of measured positions. Special tokens that keep their activation are not measured."""
    norm: list[Interval]
    """‖h_clean‖, by block: the scale of an L2 distance."""
    distance: dict[str, dict[str, list[Interval]]]
    """By cell (spliced, student, adapted), distance and block."""
    shortened: dict[str, Interval] | None
    """Share of each distance after the last block that training removes, `1 − student / spliced`;
    negative if training adds to it. Undefined if the SAE is new, or its error is not above rounding."""


def evaluate(subject: Subject, config: EvaluationConfig) -> Mechanism:
    """Measure a run on the first of its held-out sequences.

    Special tokens that keep their activation are left out in all cells: no SAE applies to them, and the
    residual stream at BOS has a far larger norm than others, which would dominate an L2 distance.

    Source: arXiv 2501.19406, distances to the clean activations.
    """
    cells = [cell for cell in subject.cells if cell is not Cell.base]
    batches = [_sums(subject, cells, tokens) for tokens in subject.batches(config.sequences)]
    sums = {key: torch.cat([batch[key] for batch in batches], dim=-1) for key in batches[0]}
    counts = sums["tokens"]
    bootstrap = Bootstrap(len(counts), config.resamples)

    def means(key: str) -> list[Resampled]:
        return [bootstrap.mean(block, counts) for block in sums[key]]

    def intervals(key: str) -> list[Interval]:
        return [interval(mean, _SHARE) for mean in means(key)]

    def shortened(kind: str) -> Interval:
        student, spliced = (means(f"{kind} {cell}")[-1] for cell in (Cell.student, Cell.spliced))
        return interval(1 - student / spliced, _SHARE)

    def has_error() -> bool:
        error, norm = means(f"l2 {Cell.spliced}")[-1][0], means("norm")[-1][0]
        return error > _ROUNDING * relative_rounding(subject.model) * norm

    return Mechanism(
        sequences=len(counts),
        tokens=int(counts.sum()),
        norm=intervals("norm"),
        distance={
            cell.value: {kind: intervals(f"{kind} {cell}") for kind in _DISTANCES} for cell in cells
        },
        shortened={kind: shortened(kind) for kind in _DISTANCES}
        if Cell.spliced in cells and has_error()
        else None,
    )


def _sums(subject: Subject, cells: list[Cell], tokens: Tensor) -> dict[str, Tensor]:
    """Sums over each sequence's measured tokens, `[block, sequence]`, and their number, `[sequence]`."""
    clean = subject.streams(Cell.base, tokens)
    measured = torch.ones_like(tokens, dtype=torch.bool)
    for splice in subject.after:
        measured &= ~splice.special.positions(tokens, clean[splice.block])

    def summed(blocks: Iterable[Tensor]) -> Tensor:
        return torch.stack([torch.where(measured, values, 0.0).sum(1) for values in blocks]).cpu()

    sums = {
        "tokens": measured.sum(1).double().cpu(),
        "norm": summed(h.double().norm(dim=-1) for h in clean),
    }
    for cell in cells:
        streams = subject.streams(cell, tokens)
        for kind, distance in _DISTANCES.items():
            sums[f"{kind} {cell}"] = summed(map(distance, streams, clean))
    return sums


def _l2(h: Tensor, h_clean: Tensor) -> Tensor:
    return (h.double() - h_clean.double()).norm(dim=-1)


def _cosine_distance(h: Tensor, h_clean: Tensor) -> Tensor:
    # In float32, 1 − cosine loses its digits if the cosine is near 1.
    return (1 - cosine_similarity(h.double(), h_clean.double(), dim=-1)).clamp(min=0)


_DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": _l2, "cosine": _cosine_distance}
