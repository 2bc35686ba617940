"""Whether adapters read what an SAE gets wrong, or what it puts back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lora.evaluation.lora.similarity import directions, expected, similarities
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.models import lora
from sae_lora.models.lora import AdaptedMatrix
from sae_lora.splice.hooks import Coder, Reading, Splice


@dataclass(frozen=True)
class Shared:
    """What the input subspace of an adapter (the rows of A) has in common with other directions."""

    adapter_directions: int
    other_directions: int
    similarity: float
    """Subspace similarity φ: the mean squared cosine, from 0 to 1."""
    expected: float
    """That of a random subspace of the same size."""
    energy: float | None
    """Share of ‖ΔW‖²_F that reads the other directions; undefined where ΔW is zero."""
    expected_energy: float
    """That of a ΔW which reads random ones."""


@dataclass(frozen=True)
class OfMatrix:
    """What one matrix of the first adapted block reads."""

    error: Shared
    """With the largest principal components of the SAE's error."""
    decoder: Shared
    """With the decoder directions of the latents that are active on most tokens."""


@dataclass(frozen=True)
class Overlap:
    """What the matrices of the first adapted block read, beside what the last SAE before it does.

    The norm before a matrix scales coordinates of the residual stream; rows of A are taken as they are.
    """

    block: int
    """The first adapted one."""
    hookpoint: str
    """Where the SAE sits."""
    tokens: int
    """On which the SAE was read."""
    error_share: float
    """Of the variance of the SAE's error, in these principal components."""
    matrices: dict[str, OfMatrix]
    """By path inside of the block: those that read the residual stream."""


def overlap(subject: Subject, sequences: int, n: int) -> Overlap | str:
    """What the first adapted block reads, beside what the last SAE before it gets wrong and puts back.

    Args:
        subject: A run with adapters.
        sequences: Held-out sequences to read, at most.
        n: Directions of the error and of the decoder to compare with, at most.

    Returns:
        It, or why there is none.
    """
    first, matrices = _first_block(subject)
    before = [splice for splice in subject.after if splice.block < first]
    if not before:
        return f"no SAE sits before block {first}, the first that is adapted"
    if not matrices:
        return f"no matrix that is adapted in block {first}, the first, reads the residual stream"
    read = _Read(subject, before[-1], sequences)
    components, share = read.error_components(n)
    decoder = read.decoder_directions(n)
    if components.shape[1] == 0:
        return f"the SAE at {read.hookpoint} makes no error, or the same on all tokens"
    if decoder.shape[1] == 0:
        return f"the SAE at {read.hookpoint} has no latent that is active and puts something back"
    return Overlap(
        block=first,
        hookpoint=read.hookpoint,
        tokens=read.tokens,
        error_share=share,
        matrices={
            matrix.kind: OfMatrix(shared(matrix, components), shared(matrix, decoder))
            for matrix in matrices
        },
    )


def shared(matrix: AdaptedMatrix, others: Tensor) -> Shared:
    """What an adapter's input subspace has in common with other directions.

    Args:
        matrix: The adapted matrix.
        others: Orthonormal columns, `[input, n]`.
    """
    own = directions(matrix.a)
    d, i = own.shape
    j = others.shape[1]
    delta = matrix.delta.double()
    total = float(delta.square().sum())
    return Shared(
        adapter_directions=i,
        other_directions=j,
        similarity=float(similarities(own, others)[-1, -1]),
        expected=expected(i, j, d),
        energy=float((delta @ others).square().sum()) / total if total else None,
        expected_energy=j / d,
    )


def _first_block(subject: Subject) -> tuple[int, list[AdaptedMatrix]]:
    """The first adapted block, and those of its adapted matrices that read the residual stream."""
    found: list[AdaptedMatrix] = []
    first = None
    for matrix in lora.adapted_matrices(subject.with_adapters):
        first = matrix.block if first is None else first
        if matrix.block != first:
            break
        if matrix.reads_stream:
            found.append(matrix)
    assert first is not None  # a run with adapters has one somewhere
    return first, found


class _Read:
    """What an SAE gets wrong and which of its latents are active, on held-out text.

    Args:
        subject: The run; the SAE sits before all its adapters.
        splice: The SAE.
        sequences: How many to read, at most.
    """

    def __init__(self, subject: Subject, splice: Splice, sequences: int) -> None:
        self.hookpoint = splice.hookpoint
        self._sae: Coder = splice.sae
        d_model = subject.model.config.hidden_size
        self._sum = torch.zeros(d_model, dtype=torch.float64, device=subject.device)
        self._squares = torch.zeros(d_model, d_model, dtype=torch.float64, device=subject.device)
        self._active = torch.zeros((), dtype=torch.long, device=subject.device)
        self._dtype = torch.float32
        self.tokens = 0
        """Read so far."""
        for tokens in subject.batches(sequences):
            subject.hidden(Cell.student, tokens, self._add)

    def _add(self, reading: Reading) -> None:
        if reading.hookpoint != self.hookpoint:
            return
        error = reading.resid.double() - reading.recon.double()
        self._sum += error.sum(0)
        self._squares += error.T @ error
        self._active = self._active + (reading.latents != 0).sum(0)
        self._dtype = reading.latents.dtype
        self.tokens += len(error)

    def error_components(self, n: int) -> tuple[Tensor, float]:
        """The largest principal components of the error, and their share of its variance.

        Returns:
            `[d_model, m]`, m at most n: those with no variance but, by rounding, zero are left out.
        """
        mean = self._sum / self.tokens
        covariance = self._squares / self.tokens - torch.outer(mean, mean)
        variances, components = torch.linalg.eigh(covariance)
        # The mean's square was taken from it: what is left of that is rounding.
        least = len(mean) * torch.finfo(torch.float64).eps * float(self._squares.trace()) / self.tokens
        there = variances > least
        variances, components = variances[there].flip(0), components[:, there].flip(1)
        share = float(variances[:n].sum() / variances.sum()) if len(variances) else 0.0
        return components[:, :n], share

    @torch.no_grad()
    def decoder_directions(self, n: int) -> Tensor:
        """What the latents that are active on most tokens put back, as orthonormal columns.

        Returns:
            `[d_model, m]`, m at most n: less where directions depend on each other.
        """
        counts, active = self._active.topk(min(n, len(self._active)))
        active = active[counts > 0]
        rows = len(active) + 1
        latents = torch.zeros(rows, len(self._active), device=active.device, dtype=self._dtype)
        latents[torch.arange(1, rows, device=active.device), active] = 1
        # SAEs that normalise what they read scale what they put back by what they have read last.
        read = torch.linspace(-1, 1, len(self._sum), device=active.device, dtype=self._dtype)
        self._sae.encode(read.expand(rows, -1))
        recon = self._sae.decode(latents).float()
        return directions(recon[1:] - recon[0])
