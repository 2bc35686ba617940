"""Similarity of the directions that the adapters of two runs read.

Source: arXiv 2106.09685, section 7.2.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.common.console import count, say
from sae_lora.common.errors import UserError
from sae_lora.common.plots import write_svgs
from sae_lora.config.identity import trains_adapters
from sae_lora.evaluation.lora import similarity_figures, similarity_results
from sae_lora.evaluation.lora.similarity_results import Grid, Pair
from sae_lora.models import adapter_files
from sae_lora.records.damage import damage_of_weights
from sae_lora.records.folder import RunFolder
from sae_lora.records.status import with_weights

_EACH_UP_TO = 8
"""A grid has all sizes up to this one; each further size is twice the one before."""


def directions(matrix: Tensor) -> Tensor:
    """Right-singular vectors of a matrix `[rows, d]`: `[d, n]` in float64, the largest first.

    Vectors whose singular value is zero up to rounding are left out.
    """
    _, values, vectors = torch.linalg.svd(matrix.double(), full_matrices=False)
    # Rounding in float32 turns the zero singular values of a matrix of low rank into small ones.
    least = max(matrix.shape) * torch.finfo(torch.float32).eps * values[:1]
    return vectors[values > least].T


def similarities(first: Tensor, second: Tensor) -> Tensor:
    """Similarity φ of the first i directions of one matrix and the first j of another, `[i, j]`.

    φ = ‖U₁ⁱᵀ U₂ʲ‖²_F / min(i, j), the mean squared cosine of the angles between the two subspaces: 0 if
    they are orthogonal, 1 if the smaller lies in the larger. The matrices have orthonormal columns,
    `[d, n]` and `[d, m]`.

    Source: arXiv 2106.09685, equation 4.
    """
    sums = (first.T @ second).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, n + 1, device=sums.device) for n in sums.shape)
    return sums / torch.minimum(i[:, None], j[None, :])


def expected(i: int, j: int, d: int) -> float:
    """Expected φ if one of the two subspaces is random: (i · j / d) / min(i, j)."""
    return max(i, j) / d


def compare_in_sweeps(folders: Sequence[RunFolder]) -> None:
    """Compare the adapters of finished runs within each sweep; write and draw the results."""
    for sweep in dict.fromkeys(folder.path.parent for folder in folders):
        runs = [folder for folder in folders if folder.path.parent == sweep]
        pairs = compare([folder for folder in runs if damage_of_weights(folder) is None])
        if pairs:
            similarity_results.write(sweep, pairs)
            path = similarity_results.path_in(sweep)
            say(f"{count(len(pairs), 'pair')} of adapters compared: {path}")
            write_svgs(similarity_figures.figures(pairs), path.parent)


def compare(folders: Sequence[RunFolder]) -> list[Pair]:
    """Compare all pairs of finished runs that adapt the same matrices of the same model.

    Adapters that start along the singular vectors of the model's matrices (`lora.init=svd`) have these
    directions in common from the first step on.

    Raises:
        UserError: If adapters are missing or damaged.
    """
    comparable: dict[str, list[RunFolder]] = defaultdict(list)
    for folder in folders:
        config = folder.read_config()
        if trains_adapters(config):
            with_weights(folder.path)
            model = [config["model"][key] for key in ("name", "revision")]
            comparable[repr((model, adapter_files.saved_inputs(folder.adapter)))].append(folder)
    return [pair for runs in comparable.values() if len(runs) > 1 for pair in _pairs(runs)]


class _Similarities(NamedTuple):
    """Similarities φ `[i, j]` of one matrix in two runs."""

    kind: str
    """Path of the matrix inside its block."""
    grid: Tensor
    inputs: int


def _pairs(runs: Sequence[RunFolder]) -> list[Pair]:
    """Compare all pairs of runs that adapt the same matrices, with one matrix per run in memory."""
    pairs: dict[tuple[int, int], list[_Similarities]] = {
        pair: [] for pair in itertools.combinations(range(len(runs)), 2)
    }
    for name, inputs in adapter_files.saved_inputs(runs[0].adapter):
        kind = re.sub(r"^.*?\.\d+\.", "", name)
        of_runs = [directions(adapter_files.saved_a(run.adapter, name)) for run in runs]
        for (first, second), matrices in pairs.items():
            matrices.append(_Similarities(kind, similarities(of_runs[first], of_runs[second]), inputs))
    return [
        _pair(runs[first].path.name, runs[second].path.name, matrices)
        for (first, second), matrices in pairs.items()
    ]


def _pair(first: str, second: str, matrices: Sequence[_Similarities]) -> Pair:
    """Means over the matrices of two runs with these names."""
    n_directions = [min(matrix.grid.shape[axis] for matrix in matrices) for axis in (0, 1)]
    if 0 in n_directions:
        raise UserError(
            f"{first} and {second}: the matrix A of an adapter is zero and has no directions"
        )
    sizes = [_sizes(n) for n in n_directions]
    by_kind: dict[str, list[_Similarities]] = defaultdict(list)
    for matrix in matrices:
        by_kind[matrix.kind].append(matrix)
    return Pair(
        first=first,
        second=second,
        matrices=len(matrices),
        first_sizes=sizes[0],
        second_sizes=sizes[1],
        of_all=_mean(matrices, sizes),
        of_kinds={kind: _mean(of_kind, sizes) for kind, of_kind in by_kind.items()},
    )


def _mean(matrices: Sequence[_Similarities], sizes: Sequence[Sequence[int]]) -> Grid:
    rows, columns = (torch.tensor(numbers) - 1 for numbers in sizes)
    measured = torch.stack([matrix.grid[rows][:, columns] for matrix in matrices])

    def random(i: int, j: int) -> float:
        return sum(expected(i, j, matrix.inputs) for matrix in matrices) / len(matrices)

    return Grid(
        similarity=measured.mean(0).tolist(),
        expected=[[random(i, j) for j in sizes[1]] for i in sizes[0]],
    )


def _sizes(n: int) -> list[int]:
    """1, 2, … 8, 16, 32 … and n."""
    sizes = list(range(1, min(n, _EACH_UP_TO) + 1))
    while sizes[-1] < n:
        sizes.append(min(n, 2 * sizes[-1]))
    return sizes
