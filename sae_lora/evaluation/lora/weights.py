"""Changes of the model's matrices by LoRA: their size, their number of directions, amplification.

Source: arXiv 2106.09685, section 7, for amplification and subspace similarity.
"""

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation.lora.sae_overlap import Overlap, overlap
from sae_lora.evaluation.subject import Subject
from sae_lora.models import lora
from sae_lora.models.lora import AdaptedMatrix

_FIRST = (1, 4, 16, 64, 256)
"""Numbers of directions whose share of the energy is reported."""
_SEED = 0
"""Seed of the random matrices."""
_RANDOM_DIRECTIONS = 64
"""Total number of random directions, because the result for a single one varies widely."""


@dataclass(frozen=True)
class Projection:
    """‖Uᵀ W Vᵀ‖_F, where U and V are the r largest singular vectors of a matrix; r is the rank."""

    delta: float | None
    """With the vectors of ΔW; undefined if ΔW is zero."""
    weight: float
    """With the vectors of W itself: the maximum."""
    random: float
    """With the vectors of a Gaussian matrix; root mean square over several matrices if r is small."""


@dataclass(frozen=True)
class Cost:
    """Cost of training a matrix, through its adapter or as a whole.

    FLOPs are the ones that training adds to a step with the frozen matrix, per token. Each parameter of
    an adapter takes two in the forward pass and, in the backward pass, two for the gradient of its input
    and two for its own gradient. The whole matrix adds only its own gradient. DoRA's lengths are not
    counted.
    """

    parameters: int
    """Parameters of the adapter: rank · (inputs + outputs), and DoRA's lengths."""
    whole_parameters: int
    """Parameters of the matrix: inputs · outputs."""
    flops: int
    whole_flops: int


@dataclass(frozen=True)
class Matrix:
    """Change of one matrix W, which is now W + ΔW, by an adapter."""

    name: str
    """Dotted path in the transformers model."""
    block: int
    kind: str
    """Path inside the block."""
    rank: int
    """Rank of the adapter."""
    scale: float
    """Factor of B · A."""
    weight_norm: float
    """‖W‖_F."""
    delta_norm: float
    """‖ΔW‖_F."""
    singular_values: list[float]
    """The r largest of ΔW, in descending order; r is the rank (DoRA's ΔW has more than r)."""
    effective_rank: float | None
    """exp of the entropy of the singular values as shares of their sum; undefined if ΔW is zero."""
    energy: dict[str, float]
    """Share of ‖ΔW‖²_F in the first directions, by their number; empty if ΔW is zero."""
    projection: Projection
    amplification: float | None
    """‖ΔW‖_F / ‖Uᵀ W Vᵀ‖_F, with U and V of ΔW: how much larger its directions are than in W."""
    cost: Cost


@dataclass(frozen=True)
class Weights:
    """Results of the suite `lora`."""

    matrices: list[Matrix]
    cost: Cost
    """Sum over the matrices."""
    overlap: Overlap | None
    """Overlap of the first adapted block with the last SAE before it."""
    no_overlap: str | None
    """Reason for a missing overlap."""


def evaluate(subject: Subject, config: EvaluationConfig) -> Weights:
    """Measure a run's adapters.

    Raises:
        UserError: If the run has no adapters.
    """
    if subject.adapted.peft is None:
        kind = subject.config.method.kind.name
        raise UserError(f"method.kind={kind} trains no LoRA adapters, which the suite lora needs")
    random = torch.Generator().manual_seed(_SEED)
    matrices = [measured(matrix, random) for matrix in lora.adapted_matrices(subject.with_adapters)]
    costs = zip(*(astuple(matrix.cost) for matrix in matrices), strict=True)
    result = overlap(subject, config.sequences, config.directions)
    return Weights(
        matrices=matrices,
        cost=Cost(*map(sum, costs)),
        overlap=result if isinstance(result, Overlap) else None,
        no_overlap=result if isinstance(result, str) else None,
    )


def effective_rank(values: Tensor) -> float | None:
    """Effective rank of a matrix with these singular values `[n]`; undefined if all are zero.

    It is exp of the entropy, in nats, of the values as shares of their sum: n if n values are equal.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality (2007).
    """
    total = values.double().sum()
    return float(torch.special.entr(values.double() / total).sum().exp()) if total > 0 else None


def energy(values: Tensor) -> dict[str, float]:
    """Share of the first 1, 4, 16 … in the sum of squared singular values `[n]`, largest first."""
    squares = values.double().square()
    if not squares.any():
        return {}
    shares = squares.cumsum(0) / squares.sum()
    return {str(n): float(shares[n - 1]) for n in _FIRST if n <= len(shares)}


@torch.no_grad()
def measured(matrix: AdaptedMatrix, random: torch.Generator) -> Matrix:
    """Measure the change of one matrix; `random` draws the random directions."""
    weight, delta = matrix.weight.double(), matrix.delta.double()
    outputs, values, inputs = decomposed(matrix)
    r = min(len(matrix.a), *weight.shape)
    norm = float(delta.norm())
    of_delta = _projected(weight, outputs[:, :r], inputs[:, :r]) if values.any() else None
    return Matrix(
        name=matrix.name,
        block=matrix.block,
        kind=matrix.kind,
        rank=len(matrix.a),
        scale=matrix.scale,
        weight_norm=float(weight.norm()),
        delta_norm=norm,
        singular_values=values[:r].tolist(),
        effective_rank=effective_rank(values),
        energy=energy(values),
        projection=Projection(
            delta=of_delta,
            weight=_largest(weight, r),
            random=_at_random(weight, r, random),
        ),
        amplification=norm / of_delta if of_delta else None,
        cost=Cost(
            parameters=matrix.parameters,
            whole_parameters=weight.numel(),
            flops=6 * (matrix.a.numel() + matrix.b.numel()),
            whole_flops=2 * weight.numel(),
        ),
    )


def decomposed(matrix: AdaptedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """ΔW's left singular vectors `[output, n]`, values `[n]` and right singular vectors `[input, n]`.

    The ΔW of plain LoRA lies in the columns of B and the rows of A, so only a square matrix of the
    rank's size is decomposed. DoRA also scales W, so its whole ΔW is decomposed.
    """
    delta = matrix.delta.double()
    if matrix.magnitude is not None:
        outputs, values, inputs = torch.linalg.svd(delta, full_matrices=False)
        return outputs, values, inputs.T
    of_outputs, _ = torch.linalg.qr(matrix.b.double())
    of_inputs, _ = torch.linalg.qr(matrix.a.double().T)
    outputs, values, inputs = torch.linalg.svd(of_outputs.T @ delta @ of_inputs, full_matrices=False)
    return of_outputs @ outputs, values, of_inputs @ inputs.T


def _projected(weight: Tensor, outputs: Tensor, inputs: Tensor) -> float:
    return float((outputs.T @ weight @ inputs).norm())


def _largest(weight: Tensor, r: int) -> float:
    """Projection of a matrix onto its r largest singular vectors: the norm of these singular values."""
    square = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
    return float(torch.linalg.eigvalsh(square)[-r:].clamp(min=0).sum().sqrt())


def _at_random(weight: Tensor, r: int, random: torch.Generator) -> float:
    """Root mean square of projections onto random directions."""
    draws = -(-_RANDOM_DIRECTIONS // r)
    squares = [
        _projected(weight, *(_frame(n, r, random).to(weight) for n in weight.shape)) ** 2
        for _ in range(draws)
    ]
    return (sum(squares) / draws) ** 0.5


def _frame(n: int, r: int, random: torch.Generator) -> Tensor:
    """Random orthonormal columns `[n, r]`, uniformly distributed."""
    frame, _ = torch.linalg.qr(torch.randn(n, r, generator=random, dtype=torch.float64))
    return frame
