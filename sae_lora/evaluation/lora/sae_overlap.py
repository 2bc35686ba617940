"""Do adapters read the directions of an SAE's error, or of its decoder? Measures both overlaps."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lora.evaluation.lora.similarity import directions, expected, similarities
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.models import lora
from sae_lora.models.lora import AdaptedMatrix
from sae_lora.splice.hooks import Reading, Splice


@dataclass(frozen=True)
class Shared:
    """Overlap of an adapter's input subspace (the rows of A) with other directions."""

    adapter_directions: int
    other_directions: int
    similarity: float
    """Subspace similarity φ: the mean squared cosine, from 0 to 1."""
    expected: float
    """Similarity of a random subspace of the same size."""
    energy: float | None
    """Share of ‖ΔW‖²_F that reads the other directions; undefined if ΔW is zero."""
    expected_energy: float
    """Energy of a ΔW that reads random directions."""


@dataclass(frozen=True)
class OfMatrix:
    """Overlaps of one matrix of the first adapted block."""

    error: Shared
    """Overlap with the largest principal components of the SAE's error."""
    decoder: Shared
    """Overlap with the decoder directions of the most frequently active latents."""


@dataclass(frozen=True)
class Overlap:
    """Overlaps of the first adapted block with the last SAE before it.

    An approximation: the normalisation layer before a matrix multiplies each coordinate of the residual
    stream by a weight. The rows of A are compared without these weights.
    """

    block: int
    """The first adapted block."""
    hookpoint: str
    """Hookpoint of the SAE."""
    tokens: int
    """Number of tokens that the SAE's statistics are from."""
    error_share: float
    """Share of the variance of the SAE's error that its principal components explain."""
    matrices: dict[str, OfMatrix]
    """The matrices that read the residual stream, by path inside the block."""


def overlap(subject: Subject, sequences: int, n: int) -> Overlap | str:
    """Overlap of the first adapted block with the last SAE before it, or the reason why there is none.

    `sequences` is the largest number of held-out sequences to read, n the largest number of directions
    of the error and of the decoder to compare.
    """
    by_block = itertools.groupby(
        lora.adapted_matrices(subject.with_adapters), key=lambda matrix: matrix.block
    )
    first, adapted = next(by_block)
    matrices = [matrix for matrix in adapted if matrix.reads_stream]
    # `after` is meant in time, after training; `preceding` in place, before the first adapted block.
    preceding = [splice for splice in subject.after if splice.block < first]
    if not preceding:
        return f"there is no SAE before block {first}, the first adapted block"
    if not matrices:
        return f"no adapted matrix of block {first}, the first adapted block, reads the residual stream"
    statistics = _Statistics(subject, preceding[-1], sequences)
    components, share = statistics.error_components(n)
    decoder = statistics.decoder_directions(n)
    hookpoint = preceding[-1].hookpoint
    if components.shape[1] == 0:
        return f"the SAE at {hookpoint} makes no error, or the same error on all tokens"
    if decoder.shape[1] == 0:
        return f"the SAE at {hookpoint} has no active latent with a decoder direction"
    return Overlap(
        block=first,
        hookpoint=hookpoint,
        tokens=statistics.tokens,
        error_share=share,
        matrices={
            matrix.kind: OfMatrix(shared(matrix, components), shared(matrix, decoder))
            for matrix in matrices
        },
    )


def shared(matrix: AdaptedMatrix, others: Tensor) -> Shared:
    """Overlap of an adapter's input subspace with other directions, orthonormal columns `[input, n]`."""
    inputs = directions(matrix.a)
    d, i = inputs.shape
    j = others.shape[1]
    delta = matrix.delta.double()
    total = float(delta.square().sum())
    return Shared(
        adapter_directions=i,
        other_directions=j,
        similarity=float(similarities(inputs, others)[-1, -1]),
        expected=expected(i, j, d),
        energy=float((delta @ others).square().sum()) / total if total else None,
        expected_energy=j / d,
    )


class _Statistics:
    """Statistics of an SAE's error and of its active latents, on held-out text.

    The SAE is before all adapters of the run. `sequences` is the largest number of sequences to read.
    """

    def __init__(self, subject: Subject, splice: Splice, sequences: int) -> None:
        self._splice = splice
        d_model = subject.model.config.hidden_size
        self._sum = torch.zeros(d_model, dtype=torch.float64, device=subject.device)
        self._squares = torch.zeros(d_model, d_model, dtype=torch.float64, device=subject.device)
        self._active = torch.zeros((), dtype=torch.long, device=subject.device)
        self._dtype = torch.float32
        self.tokens = 0
        for tokens in subject.batches(sequences):
            subject.hidden(Cell.student, tokens, self._add)

    def _add(self, reading: Reading) -> None:
        if reading.hookpoint != self._splice.hookpoint:
            return
        error = reading.resid.double() - reading.recon.double()
        self._sum += error.sum(0)
        self._squares += error.T @ error
        self._active = self._active + (reading.latents != 0).sum(0)
        self._dtype = reading.latents.dtype
        self.tokens += len(error)

    def error_components(self, n: int) -> tuple[Tensor, float]:
        """Largest principal components of the error, and their share of its variance.

        Returns:
            The components `[d_model, m]`, m at most n, except those whose variance is zero up to
            rounding; and their share.
        """
        mean = self._sum / self.tokens
        covariance = self._squares / self.tokens - torch.outer(mean, mean)
        variances, components = torch.linalg.eigh(covariance)
        # Subtracting the mean's square leaves rounding errors of this size.
        least = len(mean) * torch.finfo(torch.float64).eps * float(self._squares.trace()) / self.tokens
        nonzero = variances > least
        variances, components = variances[nonzero].flip(0), components[:, nonzero].flip(1)
        share = float(variances[:n].sum() / variances.sum()) if len(variances) else 0.0
        return components[:, :n], share

    @torch.no_grad()
    def decoder_directions(self, n: int) -> Tensor:
        """Span of the decoder directions of the most frequently active latents.

        Returns:
            Orthonormal columns `[d_model, m]`, m at most n: less if directions are linearly dependent.
        """
        counts, active = self._active.topk(min(n, len(self._active)))
        active = active[counts > 0]
        rows = len(active) + 1
        latents = torch.zeros(rows, len(self._active), device=active.device, dtype=self._dtype)
        latents[torch.arange(1, rows, device=active.device), active] = 1
        # Some SAEs normalise their input, and `decode` undoes this with factors of the last `encode`:
        # encode the same vector in each row, so that all rows get equal factors.
        resid = torch.linspace(-1, 1, len(self._sum), device=active.device, dtype=self._dtype)
        self._splice.sae.encode(resid.expand(rows, -1))
        # Row 0 has no active latent: subtracting its output removes the bias.
        recon = self._splice.sae.decode(latents).float()
        return directions(recon[1:] - recon[0])
