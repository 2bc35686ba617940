"""What LoRA has done to the model's matrices: how much, in how many directions, and in which.

Source: arXiv 2106.09685, section 7, of amplification and subspace similarity.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.config.evaluation import EvaluationConfig
from sae_lora.evaluation.lora.sae_overlap import Overlap, overlap
from sae_lora.evaluation.subject import Subject
from sae_lora.models import lora
from sae_lora.models.lora import AdaptedMatrix

_FIRST = (1, 4, 16, 64, 256)
"""Directions whose share of the energy is told, where there are so many."""
_SEED = 0
"""Of the random matrices."""
_RANDOM_DIRECTIONS = 64
"""Matrices are drawn until there are so many: of one direction alone little can be said."""


@dataclass(frozen=True)
class Projection:
    """‖Uᵀ W Vᵀ‖_F: how much of W lies in r directions, U of its outputs and V of its inputs.

    They are the largest singular vectors of one matrix or another; r is the adapter's rank.
    """

    delta: float | None
    """Of ΔW; undefined where that is zero."""
    weight: float
    """Of W itself: no directions have more."""
    random: float
    """Of a Gaussian matrix: what directions have that nobody has chosen. Of a few such matrices where r
    is small, the root mean square."""


@dataclass(frozen=True)
class Cost:
    """What a matrix costs that is trained, by its adapter and as a whole.

    FLOPs are those that training it adds to the step of a frozen matrix, per token: of an adapter two
    for each parameter in the forward pass, two for what it reads and two for itself in the backward
    pass; of the whole matrix those of its gradient alone. What DoRA's lengths cost is left out.
    """

    parameters: int
    """Of the adapter: rank · (inputs + outputs), and DoRA's lengths."""
    whole_parameters: int
    """Of the matrix: inputs · outputs."""
    flops: int
    whole_flops: int


@dataclass(frozen=True)
class Matrix:
    """What an adapter has done to one matrix W, which is now W + ΔW."""

    name: str
    """Dotted path in the transformers model."""
    block: int
    kind: str
    """Path inside of the block."""
    rank: int
    """Of the adapter."""
    scale: float
    """Of B · A."""
    weight_norm: float
    """‖W‖_F."""
    delta_norm: float
    """‖ΔW‖_F."""
    singular_values: list[float]
    """Of ΔW, the largest first, as many as the rank; of DoRA's ΔW there are more."""
    effective_rank: float | None
    """exp of the entropy of the singular values as shares of their sum; undefined where ΔW is zero."""
    energy: dict[str, float]
    """Share of ‖ΔW‖²_F in the first directions, by their number; none where ΔW is zero."""
    projection: Projection
    amplification: float | None
    """‖ΔW‖_F / ‖Uᵀ W Vᵀ‖_F, U and V those of ΔW: how much larger than in W its directions are."""
    cost: Cost


@dataclass(frozen=True)
class Weights:
    """The suite `lora`: what adapters have done to matrices, and what they read."""

    matrices: list[Matrix]
    cost: Cost
    """Of all of them."""
    overlap: Overlap | None
    """Of what the first adapted block reads with what an SAE before it does."""
    no_overlap: str | None
    """Why there is none."""


def evaluate(subject: Subject, config: EvaluationConfig) -> Weights:
    """Measures a run's adapters.

    Args:
        subject: The run.
        config: How much text and how many directions the overlap is of.

    Raises:
        UserError: Where the run has none.
    """
    if subject.adapted.peft is None:
        kind = subject.config.method.kind.name
        raise UserError(f"method.kind={kind} trains no LoRA adapters; the suite is about those alone")
    random = torch.Generator().manual_seed(_SEED)
    found = [measured(matrix, random) for matrix in lora.adapted_matrices(subject.with_adapters)]
    shared = overlap(subject, config.sequences, config.directions)
    return Weights(
        matrices=found,
        cost=_total([one.cost for one in found]),
        overlap=shared if isinstance(shared, Overlap) else None,
        no_overlap=shared if isinstance(shared, str) else None,
    )


def effective_rank(values: Tensor) -> float | None:
    """In how many directions a matrix acts; of n equal singular values that is n.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality (2007): exp of
    the entropy, in nats, of the singular values as shares of their sum.

    Args:
        values: The singular values, `[n]`; where all are zero it is undefined.
    """
    total = values.double().sum()
    return float(torch.special.entr(values.double() / total).sum().exp()) if total > 0 else None


def energy(values: Tensor) -> dict[str, float]:
    """The share of the squared singular values `[n]`, largest first, in the first 1, 4, 16 … of them."""
    squares = values.double().square()
    if not squares.any():
        return {}
    shares = squares.cumsum(0) / squares.sum()
    return {str(n): float(shares[n - 1]) for n in _FIRST if n <= len(shares)}


def cost(matrix: AdaptedMatrix) -> Cost:
    """What the matrix costs, by its adapter and as a whole."""
    in_products, whole = matrix.a.numel() + matrix.b.numel(), matrix.weight.numel()
    return Cost(
        parameters=matrix.parameters,
        whole_parameters=whole,
        flops=6 * in_products,
        whole_flops=2 * whole,
    )


def _total(costs: Sequence[Cost]) -> Cost:
    return Cost(
        parameters=sum(one.parameters for one in costs),
        whole_parameters=sum(one.whole_parameters for one in costs),
        flops=sum(one.flops for one in costs),
        whole_flops=sum(one.whole_flops for one in costs),
    )


@torch.no_grad()
def measured(matrix: AdaptedMatrix, random: torch.Generator) -> Matrix:
    """What an adapter has done to one matrix.

    Args:
        matrix: With its adapter.
        random: Draws the directions that nobody has chosen.
    """
    weight, delta = matrix.weight.double(), matrix.delta.double()
    outputs, values, inputs = decomposed(matrix)
    r = min(len(matrix.a), *weight.shape)
    norm, acts = float(delta.norm()), bool(values.any())
    of_delta = _projected(weight, outputs[:, :r], inputs[:, :r]) if acts else None
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
        cost=cost(matrix),
    )


def decomposed(matrix: AdaptedMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """ΔW's singular vectors of outputs `[output, n]`, values `[n]`, and vectors of inputs `[input, n]`.

    Plain LoRA's ΔW lies in the columns of B and the rows of A, so that a square of the rank's size is
    all that is decomposed; DoRA's, which also stretches W, is decomposed as it is.
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
    """The projection of a matrix onto its own r largest singular vectors: the norm of those values."""
    square = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
    return float(torch.linalg.eigvalsh(square)[-r:].clamp(min=0).sum().sqrt())


def _at_random(weight: Tensor, r: int, random: torch.Generator) -> float:
    draws = -(-_RANDOM_DIRECTIONS // r)
    squares = [
        _projected(weight, *(_frame(n, r, random).to(weight) for n in weight.shape)) ** 2
        for _ in range(draws)
    ]
    return (sum(squares) / draws) ** 0.5


def _frame(n: int, r: int, random: torch.Generator) -> Tensor:
    """Orthonormal columns `[n, r]` that are as likely as any: singular vectors of a Gaussian matrix."""
    frame, _ = torch.linalg.qr(torch.randn(n, r, generator=random, dtype=torch.float64))
    return frame
