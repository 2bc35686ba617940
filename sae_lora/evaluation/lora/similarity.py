"""What adapters of several runs have in common: the directions that they read.

Source: arXiv 2106.09685, section 7.2.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.config.identity import trains_adapters
from sae_lora.evaluation.lora.similarity_results import Grid, Pair
from sae_lora.models import adapter_files
from sae_lora.records.folder import RunFolder

_EACH_UP_TO = 8
"""Sizes of a grid are all up to this, and then twice as large each time."""


def directions(matrix: Tensor) -> Tensor:
    """The right-singular vectors of a matrix, `[d, n]`, float64, the largest first.

    Those are left out that belong to no singular value but, by rounding, to zero.

    Args:
        matrix: `[rows, d]`.
    """
    _, values, vectors = torch.linalg.svd(matrix.double(), full_matrices=False)
    # Of what float32 makes of a matrix with fewer directions than rows.
    least = max(matrix.shape) * torch.finfo(torch.float32).eps * values[:1]
    return vectors[values > least].T


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """φ of the first i directions of one and the first j of the other, `[i, j]`.

    φ = ‖U₁ⁱᵀ U₂ʲ‖²_F / min(i, j), the mean squared cosine of the angles between the two subspaces: 0
    where they are orthogonal, 1 where the smaller lies in the larger.

    Args:
        first: Orthonormal columns, `[d, n]`.
        second: Orthonormal columns, `[d, m]`.

    Source: arXiv 2106.09685, equation 4.
    """
    sums = (first.T @ second).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, device=sums.device) for n in sums.shape)
    return sums / torch.minimum(i[:, None], j[None, :])


def phi(first: Tensor, second: Tensor, i: int, j: int) -> float:
    """The subspace similarity of the i largest directions that one matrix reads and the j of another.

    Args:
        first: `[rows, d]`, of rank i or more.
        second: `[rows, d]`, of rank j or more.
        i: Right-singular vectors of the first.
        j: Right-singular vectors of the second.
    """
    return float(similarities(directions(first)[:, :i], directions(second)[:, :j])[i - 1, j - 1])


def expected(i: int, j: int, d: int) -> float:
    """The mean of φ where one of the two subspaces is random: i · j / d cosines, over min(i, j)."""
    return max(i, j) / d


def compare(folders: Sequence[RunFolder]) -> list[Pair]:
    """The pairs of runs that adapt the same matrices of the same model, whatever else they differ in.

    Adapters that begin along the singular vectors of the model's own matrices (`lora.init=svd`) have
    these in common from the first step on.

    Args:
        folders: Finished runs; those without adapters are left out.

    Raises:
        UserError: Where adapters are missing or damaged.
    """
    alike: dict[str, list[RunFolder]] = defaultdict(list)
    for folder in folders:
        config = folder.read_config()
        if trains_adapters(config):
            model = [config["model"][key] for key in ("name", "revision")]
            alike[repr((model, adapter_files.saved_inputs(folder.adapter)))].append(folder)
    return [pair for runs in alike.values() if len(runs) > 1 for pair in _pairs(runs)]


def _pairs(runs: Sequence[RunFolder]) -> list[Pair]:
    """All pairs of runs that adapt the same matrices. Of all runs one matrix is held at a time."""
    found = {pair: _Compared() for pair in itertools.combinations(range(len(runs)), 2)}
    for name, inputs in adapter_files.saved_inputs(runs[0].adapter):
        read = [directions(adapter_files.saved_a(run.adapter, name)) for run in runs]
        for (one, other), compared in found.items():
            compared.add(_kind(name), similarities(read[one], read[other]), inputs)
    return [
        compared.pair(runs[one].path.name, runs[other].path.name)
        for (one, other), compared in found.items()
    ]


class _Compared:
    """What matrices of two runs have in common, one after another."""

    def __init__(self) -> None:
        self._found: list[tuple[str, Tensor, int]] = []

    def add(self, kind: str, grid: Tensor, inputs: int) -> None:
        """Takes in a matrix.

        Args:
            kind: Its path inside of its block.
            grid: All similarities, `[i, j]`.
            inputs: How many it has.
        """
        self._found.append((kind, grid, inputs))

    def pair(self, first: str, second: str) -> Pair:
        """The means, of two runs with these names.

        Raises:
            UserError: Where a matrix reads nothing at all.
        """
        most = [min(grid.shape[axis] for _, grid, _ in self._found) for axis in (0, 1)]
        if 0 in most:
            raise UserError(f"{first} and {second}: an adapter's A is zero, and reads no direction")
        sizes = [_sizes(n) for n in most]
        kinds = dict.fromkeys(kind for kind, _, _ in self._found)
        return Pair(
            first=first,
            second=second,
            matrices=len(self._found),
            first_sizes=sizes[0],
            second_sizes=sizes[1],
            of_all=_mean(self._found, sizes),
            of_kinds={
                kind: _mean([one for one in self._found if one[0] == kind], sizes) for kind in kinds
            },
        )


def _mean(found: Sequence[tuple[str, Tensor, int]], sizes: Sequence[Sequence[int]]) -> Grid:
    of_first, of_second = sizes
    rows, columns = (torch.tensor(one) - 1 for one in sizes)
    measured = torch.stack([grid[rows][:, columns] for _, grid, _ in found])
    return Grid(
        similarity=measured.mean(0).tolist(),
        expected=[
            [sum(expected(i, j, inputs) for _, _, inputs in found) / len(found) for j in of_second]
            for i in of_first
        ],
    )


def _sizes(n: int) -> list[int]:
    """1, 2, … 8, 16, 32 … and n."""
    few = list(range(1, min(n, _EACH_UP_TO) + 1))
    while few[-1] < n:
        few.append(min(n, 2 * few[-1]))
    return few


def _kind(name: str) -> str:
    """The path of a matrix inside of its block: all behind the first number."""
    match = re.search(r"\.\d+\.(.+)$", name)
    return name if match is None else match[1]
