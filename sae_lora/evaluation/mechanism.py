"""How far SAEs and adapters take the residual stream from the plain model's, block by block."""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sae_lora.config.evaluation import EvaluationConfig
from sae_lora.evaluation.bootstrap import Bootstrap, Interval, Resampled
from sae_lora.evaluation.subject import Cell, Subject

_SHARE = 0.9
"""Of the resamples that lie within the bounds."""


@dataclass(frozen=True)
class Moved:
    """Distances to the residual stream `h_clean` of the plain model, per token, after each block.

    After a block whose output an SAE replaces, `h` is what the SAE puts back.
    """

    l2: list[Interval]
    """‖h − h_clean‖, by block."""
    cosine: list[Interval]
    """1 − cos(h, h_clean), by block: 0 where both point the same way, 1 where they are orthogonal."""


@dataclass(frozen=True)
class Shortened:
    """The share of a distance that training takes away, `1 − student / spliced`; below zero it adds."""

    l2: Interval
    cosine: Interval


@dataclass(frozen=True)
class Mechanism:
    """The suite `mechanism`. Means over tokens, with 90% bootstrap intervals over sequences."""

    sequences: int
    """Read, from the first held-out one on."""
    tokens: int
    """Positions measured: of special tokens, where those keep their activation, none."""
    norm: list[Interval]
    """‖h_clean‖, by block: what an L2 distance is to be held against."""
    distance: dict[str, Moved]
    """By cell: spliced, student, adapted."""
    shortened: Shortened | None
    """After the last block. Undefined where the SAE is new, or puts back all that it reads."""


def evaluate(subject: Subject, config: EvaluationConfig) -> Mechanism:
    """Measures a run on the first of its held-out sequences.

    Positions that hold special tokens are left out where those keep their activation: no SAE applies
    there, so that they would only dilute what it does, and where the residual stream of BOS is far
    longer than others, they would be most of an L2 distance that adapters make. They are left out of
    all cells, which are so measured on the same tokens.

    Args:
        subject: The run.
        config: How many sequences and resamples there are.

    Source: arXiv 2501.19406, distances to the clean activations.
    """
    distances = _Distances()
    cells = [cell for cell in subject.cells if cell is not Cell.base]
    for tokens in subject.batches(config.sequences):
        kept = subject.kept_positions(tokens, subject.after)
        counted = torch.ones_like(tokens, dtype=torch.bool) if kept is None else ~kept
        clean = subject.streams(Cell.base, tokens)
        distances.count(counted, clean)
        for cell in cells:
            distances.add(cell, subject.streams(cell, tokens), clean, counted)
    return _mechanism(distances, cells, config.resamples)


class _Distances:
    """Sums over the tokens of each sequence, after each block."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._parts: dict[str, list[Tensor]] = defaultdict(list)

    def count(self, counted: Tensor, clean: list[Tensor]) -> None:
        """Takes in a batch of the plain model.

        Args:
            counted: Positions `[batch, pos]` (true) that are measured.
            clean: The residual stream after each block, `[batch, pos, d_model]`.
        """
        self._counts.append(counted.sum(1).double().cpu())
        self._put("norm", [h.double().norm(dim=-1) for h in clean], counted)

    def add(self, cell: Cell, moved: list[Tensor], clean: list[Tensor], counted: Tensor) -> None:
        """Takes in the same batch of another cell."""
        l2, cosine = [], []
        for h, h_clean in zip(moved, clean, strict=True):
            # In float32, a cosine near 1 would blur what is missing from it.
            one, other = h.double(), h_clean.double()
            l2.append((one - other).norm(dim=-1))
            cosine.append((1 - cosine_similarity(one, other, dim=-1)).clamp(min=0))
        self._put(f"l2 {cell}", l2, counted)
        self._put(f"cosine {cell}", cosine, counted)

    def _put(self, key: str, of_blocks: list[Tensor], counted: Tensor) -> None:
        sums = [torch.where(counted, one, 0.0).sum(1) for one in of_blocks]
        self._parts[key].append(torch.stack(sums).cpu())

    @property
    def counts(self) -> Tensor:
        """Tokens measured of each sequence, `[sequence]`."""
        return torch.cat(self._counts)

    def of(self, key: str) -> Tensor:
        """Sums `[block, sequence]`, of `norm`, or of `l2` or `cosine` and a cell."""
        return torch.cat(self._parts[key], dim=1)


def _mechanism(distances: _Distances, cells: list[Cell], resamples: int) -> Mechanism:
    counts = distances.counts
    bootstrap = Bootstrap(len(counts), resamples, share=_SHARE)

    def means(key: str) -> list[Resampled]:
        return [bootstrap.mean(sums, counts) for sums in distances.of(key)]

    def intervals(key: str) -> list[Interval]:
        return [bootstrap.interval(mean) for mean in means(key)]

    def shortened(kind: str) -> Interval:
        student, spliced = (means(f"{kind} {cell}")[-1] for cell in (Cell.student, Cell.spliced))
        return bootstrap.interval(1 - student / spliced)

    moves = Cell.spliced in cells and bool(distances.of(f"l2 {Cell.spliced}")[-1].any())
    return Mechanism(
        sequences=len(counts),
        tokens=int(counts.sum()),
        norm=intervals("norm"),
        distance={
            cell.value: Moved(l2=intervals(f"l2 {cell}"), cosine=intervals(f"cosine {cell}"))
            for cell in cells
        },
        shortened=Shortened(l2=shortened("l2"), cosine=shortened("cosine")) if moves else None,
    )
