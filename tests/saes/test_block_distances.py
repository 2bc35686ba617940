"""Distances between blocks, the groups that follow from them, and their figures."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.cluster import hierarchy

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.comparisons.layer_group_figures import amad_by_groups, distance_map, tree
from sae_lora.config.schema import Config, LayerConfig
from sae_lora.models.dimensions import Dimensions
from sae_lora.models.language_model import LanguageModel, outputs_of
from sae_lora.saes import block_distances, layer_groups
from sae_lora.saes.block_distances import angular_distances
from sae_lora.saes.layer_groups import amad, group_blocks, linkage
from sae_lora.splice.positions import NOT_SPECIAL, Special
from tests.support import families
from tests.support.composing import composed
from tests.support.families import D_MODEL, N_BLOCKS, random_distances, random_tokens, small_model

TOKENS = random_tokens(batch=4, length=12)
SPECIAL = Special(tuple(torch.unique(TOKENS[:, ::3]).tolist()))


def hooks(model: LanguageModel) -> int:
    return sum(len(module._forward_hooks) for module in model.model.modules())


def put_out(model: LanguageModel, block: int, resid: torch.Tensor) -> None:
    """Replace the output of a block by `resid`, `[batch, pos, d_model]`."""
    model.blocks[block].register_forward_hook(lambda *_: resid)


def in_a_plane(degrees: Sequence[float], length: float) -> torch.Tensor:
    """One vector of this length per token of one sequence, in these directions in a plane."""
    resid = torch.zeros(1, len(degrees), D_MODEL)
    resid[..., 3] = length * torch.cos(torch.deg2rad(torch.tensor(degrees)))
    resid[..., 8] = length * torch.sin(torch.deg2rad(torch.tensor(degrees)))
    return resid


def naive(model: LanguageModel, tokens: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The distances, from one token and one pair of blocks at a time."""
    streams = [model.resid_entering(block + 1, tokens) for block in range(N_BLOCKS)]
    distances = torch.zeros(N_BLOCKS, N_BLOCKS, dtype=torch.float64)
    for first, second in itertools.permutations(range(N_BLOCKS), 2):
        angles = []
        for row, pos in counted.nonzero().tolist():
            u, v = streams[first][row, pos].double(), streams[second][row, pos].double()
            angles.append(math.acos(float(u @ v) / float(u.norm() * v.norm())) / math.pi)
        distances[first, second] = sum(angles) / len(angles)
    return distances


def of_pairs(n: int, pairs: dict[tuple[int, int], float], other: float) -> torch.Tensor:
    """Distances `[n, n]`: those of `pairs`, and `other` for all other pairs."""
    distances = torch.full((n, n), other, dtype=torch.float64).fill_diagonal_(0)
    for (first, second), distance in pairs.items():
        distances[first, second] = distances[second, first] = distance
    return distances


def as_sets(groups: Sequence[Sequence[int]]) -> set[frozenset[int]]:
    return set(map(frozenset, groups))


def test_angles_between_known_vectors() -> None:
    """Lengths do not matter; the angles of two tokens are averaged."""
    model = small_model("llama")
    put_out(model, 0, in_a_plane([0, 0], length=1))
    put_out(model, 1, in_a_plane([60, 30], length=5))
    put_out(model, 2, in_a_plane([90, 90], length=0.1))
    put_out(model, 3, in_a_plane([180, 90], length=1000))
    distances = angular_distances(model, [torch.tensor([[1, 2]])], NOT_SPECIAL)
    # Degrees between blocks for the first and the second token, their mean, and its share of 180:
    #   0–1: 60 and 30, mean 45, 0.25      1–2: 30 and 60, mean 45, 0.25
    #   0–2: 90 and 90, mean 90, 0.5       1–3: 120 and 60, mean 90, 0.5
    #   0–3: 180 and 90, mean 135, 0.75    2–3: 90 and 0, mean 45, 0.25
    expected = of_pairs(4, {(0, 2): 0.5, (1, 3): 0.5, (0, 3): 0.75}, 0.25)
    torch.testing.assert_close(distances, expected, rtol=0, atol=1e-7)


def test_same_and_opposite_directions_are_the_ends_of_the_scale() -> None:
    """Also if rounding makes a cosine larger than 1, as for some of these."""
    model, resid = small_model("gpt2"), torch.randn(*TOKENS.shape, D_MODEL)
    for block, factor in enumerate((1, 4, -8, 0.25)):
        put_out(model, block, factor * resid)
    distances = angular_distances(model, [TOKENS], NOT_SPECIAL)
    expected = of_pairs(4, {(0, 1): 0.0, (0, 3): 0.0, (1, 3): 0.0}, 1.0)
    torch.testing.assert_close(distances, expected, rtol=0, atol=1e-6)
    assert float(distances.min()) >= 0 and float(distances.max()) <= 1


def test_distances_are_those_of_each_token_and_pair(model: LanguageModel) -> None:
    distances = angular_distances(model, [TOKENS], NOT_SPECIAL)
    assert (distances.shape, distances.dtype, distances.device.type) == (
        (N_BLOCKS,) * 2,
        torch.float64,
        "cpu",
    )
    assert torch.equal(distances, distances.T) and not distances.diagonal().any()
    expected = naive(model, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool))
    assert float(expected[0, 1]) > 0.01
    torch.testing.assert_close(distances, expected, rtol=0, atol=1e-9)


def test_many_blocks_have_distances_that_are_symmetric_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With only a few blocks the product itself is symmetric."""
    n_blocks = 33
    monkeypatch.setitem(families.LLAMA_LIKE, "num_hidden_layers", n_blocks)
    model = small_model("llama")
    for block in range(n_blocks):
        put_out(model, block, torch.randn(*TOKENS.shape, D_MODEL))
    distances = angular_distances(model, [TOKENS], NOT_SPECIAL)
    assert len(distances) == n_blocks and torch.equal(distances, distances.T)


def test_special_positions_are_left_out(model: LanguageModel) -> None:
    counted = ~SPECIAL.positions(TOKENS)
    assert 0 < int(counted.sum()) < counted.numel()
    distances = angular_distances(model, [TOKENS], SPECIAL)
    torch.testing.assert_close(distances, naive(model, TOKENS, counted), rtol=0, atol=1e-9)
    assert not torch.allclose(
        distances, angular_distances(model, [TOKENS], NOT_SPECIAL), rtol=0, atol=1e-5
    )


def test_every_token_has_the_same_weight_for_any_batching(model: LanguageModel) -> None:
    """Batches of one and of three rows: the mean of their means would differ."""
    together = angular_distances(model, [TOKENS], NOT_SPECIAL)
    rows = TOKENS.split([1, 3])
    torch.testing.assert_close(angular_distances(model, rows, NOT_SPECIAL), together, rtol=0, atol=1e-5)
    of_batches = torch.stack([angular_distances(model, [row], NOT_SPECIAL) for row in rows]).mean(0)
    assert not torch.allclose(of_batches, together, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tokens", [5, 1])
def test_distances_do_not_depend_on_the_tokens_per_step(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    model = small_model("qwen3")
    whole = angular_distances(model, [TOKENS], SPECIAL)
    monkeypatch.setattr(block_distances, "_NUMBERS_AT_ONCE", tokens * N_BLOCKS * (N_BLOCKS + D_MODEL))
    resid = [torch.randn(2, 6, D_MODEL) for _ in range(N_BLOCKS)]
    sizes = [len(angles) for angles in block_distances._angles(resid, torch.arange(12))]
    assert max(sizes) == tokens and sum(sizes) == 12
    torch.testing.assert_close(angular_distances(model, [TOKENS], SPECIAL), whole, rtol=0, atol=1e-13)


def test_one_forward_pass_per_batch_with_progress() -> None:
    model, forwards, reported = small_model("gemma2"), [], []
    model.model.requires_grad_(True)
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: forwards.append(number))
    n_hooks = hooks(model)
    distances = angular_distances(model, TOKENS.split([1, 3]), SPECIAL, reported.append)
    assert forwards == 2 * list(range(N_BLOCKS))
    counted = (~SPECIAL.positions(TOKENS)).sum(1)
    assert reported == [int(counted[0]), int(counted.sum())]
    assert hooks(model) == n_hooks and not distances.requires_grad


def test_blocks_may_return_a_tensor_or_a_tuple() -> None:
    """All rows of a plain tensor are used, not only the first."""

    class Tupled(torch.nn.Module):
        def forward(self, resid: torch.Tensor) -> tuple[torch.Tensor, str]:
            return resid, "extra"

    model = small_model("llama")
    model.blocks = torch.nn.ModuleList([torch.nn.Identity(), Tupled()])
    resid = torch.randn(3, 5, D_MODEL)
    with outputs_of(model.blocks) as streams:
        for block in model.blocks:
            block(resid)
    assert len(streams) == 2 and all(torch.equal(stream, resid) for stream in streams)


def test_no_hook_is_left_after_an_exception(model: LanguageModel) -> None:
    n_hooks = hooks(model)

    def broken() -> Iterator[torch.Tensor]:
        yield TOKENS
        assert hooks(model) == n_hooks + N_BLOCKS
        raise RuntimeError("while reading")

    with pytest.raises(RuntimeError, match="while reading"):
        angular_distances(model, broken(), NOT_SPECIAL)
    assert hooks(model) == n_hooks
    with pytest.raises(IndexError):
        angular_distances(model, [torch.full((1, 4), 10**6)], NOT_SPECIAL)
    assert hooks(model) == n_hooks


@pytest.mark.parametrize("batches", [[], [torch.tensor([SPECIAL.ids])]])
def test_nothing_to_measure_is_refused(batches: list[torch.Tensor]) -> None:
    with pytest.raises(UserError, match="the text has none"):
        angular_distances(small_model("gpt2"), batches, SPECIAL)


# Four blocks, and a last one close to block 3 that must not be grouped with it.
BY_HAND = of_pairs(
    5,
    {
        (0, 1): 0.1,
        (1, 2): 0.15,
        (2, 3): 0.2,
        (1, 3): 0.4,
        (0, 2): 0.5,
        (0, 3): 0.6,
        (3, 4): 0.01,
    },
    0.9,
)


def test_groups_and_amad_by_hand() -> None:
    # {0, 1} merge at 0.1. Their distance to 2 is 0.5 (block 0's, the larger), so that 2 joins 3 at 0.2,
    # although it is nearer to 1. All merge at 0.6. AMAD:
    #   1 group 0.6; 2 groups (0.1 + 0.2) / 2 = 0.15; 3 groups (0.1 + 0 + 0) / 3; 4 groups 0
    groups, amads = group_blocks(BY_HAND, amad_max=0.2)
    assert groups == [[0, 1], [2, 3]]
    assert amads == pytest.approx([0.6, 0.15, 0.1 / 3, 0])
    assert linkage(BY_HAND)[:, 2] == pytest.approx([0.1, 0.2, 0.6])
    assert group_blocks(BY_HAND, n_groups=3)[0] == [[0, 1], [2], [3]]
    assert group_blocks(BY_HAND, amad_max=1)[0] == [[0, 1, 2, 3]]
    assert group_blocks(BY_HAND, amad_max=1e-9)[0] == [[0], [1], [2], [3]]


def test_the_amad_is_below_the_threshold_and_not_equal() -> None:
    distances = of_pairs(4, {(0, 1): 0.25}, 0.5)  # AMAD 0.5, 0.125 and 0, all exact
    assert len(group_blocks(distances, amad_max=0.125)[0]) == 3
    assert len(group_blocks(distances, amad_max=0.1251)[0]) == 2


def test_an_amad_that_rises_with_more_groups() -> None:
    # 1 group: 1. 2 groups: {0} and all others, (0 + 0.3) / 2 = 0.15. 3 groups: {0}, {1, 2}, {3, 4},
    # 0.56 / 3 = 0.187, which is larger, because the two pairs are nearly as wide as the four blocks.
    # 4 groups: 0.28 / 4 = 0.07.
    distances = of_pairs(
        6,
        {(1, 2): 0.28, (3, 4): 0.28} | {(0, block): 1.0 for block in range(1, 5)},
        0.3,
    )
    groups, amads = group_blocks(distances, amad_max=0.16)
    assert amads == pytest.approx([1, 0.15, 0.56 / 3, 0.07, 0])
    assert groups == [[0], [1, 2, 3, 4]]
    assert len(group_blocks(distances, amad_max=0.1)[0]) == 4


@pytest.mark.parametrize("seed", range(5))
def test_groups_equal_scipys_without_ties(seed: int) -> None:
    n = 11
    distances = random_distances(n + 1, seed)
    for count in range(1, n + 1):
        groups, _ = group_blocks(distances, n_groups=count)
        assert len(groups) == count
        assert groups == sorted(map(sorted, groups))
        assert sorted(itertools.chain(*groups)) == list(range(n))
        labels = hierarchy.fcluster(linkage(distances), count, criterion="maxclust")
        assert as_sets(groups) == as_sets(
            [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
        )


@pytest.mark.parametrize("seed", range(5))
def test_blocks_share_a_group_if_the_tree_joins_them_below_the_cut(seed: int) -> None:
    n = 9
    distances = random_distances(n + 1, seed)
    among = distances[:n, :n].numpy()
    merges = linkage(distances)
    joined = np.zeros((n, n))
    joined[np.triu_indices(n, 1)] = hierarchy.cophenet(merges)
    assert (joined[np.triu_indices(n, 1)] >= among[np.triu_indices(n, 1)]).all()  # complete linkage
    for count in range(1, n):
        groups, _ = group_blocks(distances, n_groups=count)
        height = merges[n - count - 1, 2]
        for first, second in itertools.combinations(range(n), 2):
            together = any(first in group and second in group for group in groups)
            assert together == (joined[first, second] <= height)


@pytest.mark.parametrize("seed", range(5))
def test_amad_is_the_mean_of_the_largest_distances(seed: int) -> None:
    n = 10
    distances = random_distances(n + 1, seed)
    _, amads = group_blocks(distances, n_groups=1)
    assert len(amads) == n and amads[-1] == 0
    for count, expected in enumerate(amads, 1):
        groups, _ = group_blocks(distances, n_groups=count)
        widest = [
            max(float(distances[first, second]) for first in group for second in group)
            for group in groups
        ]
        assert amad(distances, groups) == expected == pytest.approx(sum(widest) / count)
    for limit in (0.4, 0.3, 0.2, 0.1, 0.05):
        chosen, _ = group_blocks(distances, amad_max=limit)
        assert amads[len(chosen) - 1] < limit
        assert all(second >= limit for second in amads[: len(chosen) - 1])


def test_ties_give_exactly_the_requested_number_of_groups() -> None:
    n = 6
    equal = of_pairs(n + 1, {}, 0.5)
    pairs = of_pairs(n + 1, {(0, 1): 0.1, (2, 3): 0.1, (4, 5): 0.1}, 0.5)
    for distances in (equal, pairs, torch.zeros(n + 1, n + 1)):
        for count in range(1, n + 1):
            groups, amads = group_blocks(distances, n_groups=count)
            assert len(groups) == count
            assert sorted(itertools.chain(*groups)) == list(range(n))
            assert amads[count - 1] == amad(distances, groups)
    # scipy takes all merges of the same height or none.
    assert len(np.unique(hierarchy.fcluster(linkage(equal), 3, criterion="maxclust"))) == 1


def test_two_blocks_leave_one_group_and_one_block_none() -> None:
    assert group_blocks(of_pairs(2, {}, 0.5), amad_max=0.2) == ([[0]], [0])
    assert linkage(of_pairs(2, {}, 0.5)).shape == (0, 4)
    with pytest.raises(UserError, match="one block"):
        group_blocks(torch.zeros(1, 1), amad_max=0.2)


@pytest.mark.parametrize(("n_groups", "nearest"), [(5, 4), (0, 1), (-3, 1)])
def test_more_groups_than_blocks_and_none_are_refused(n_groups: int, nearest: int) -> None:
    config = Config(layer=LayerConfig(n_groups=n_groups))
    with pytest.raises(ConfigError, match=rf"nearest valid: layer\.n_groups={nearest}\b") as refused:
        layer_groups.groups(config, Dimensions(D_MODEL, len(BY_HAND), 96, None), {})
    assert (refused.value.field, refused.value.nearest) == ("layer.n_groups", nearest)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_even_groups_are_consecutive_blocks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_groups, "_distances", lambda *_: random_distances(8, 0).tolist())
    config = composed("method=sae", f"layer.n_groups={count}", "layer.evenly=true")
    result = layer_groups.groups(config, Dimensions(D_MODEL, 8, 96, None), {})
    assert result is not None and len(result.groups) == count
    assert list(itertools.chain(*result.groups)) == list(range(7))
    assert max(map(len, result.groups)) - min(map(len, result.groups)) <= 1


def test_the_map_frames_the_distances_within_groups() -> None:
    """A group with a gap has a frame for each part, and for the distances between two parts."""
    distances, groups = random_distances(6, 0), [[0, 3], [1, 2], [4]]
    figure: Any = distance_map(distances, groups)
    assert np.array_equal(np.array(figure.data[0].z), distances.numpy())
    framed = np.zeros((6, 6), dtype=int)
    for shape in figure.layout.shapes:
        rows, columns = (
            [block for block in range(6) if low < block < high]
            for low, high in ((shape.y0, shape.y1), (shape.x0, shape.x1))
        )
        framed[np.ix_(rows, columns)] += 1
    expected = np.zeros((6, 6), dtype=int)
    for group in groups:
        expected[np.ix_(group, group)] = 1
    assert np.array_equal(framed, expected)


@pytest.mark.parametrize("count", range(1, 9))
def test_the_tree_has_a_colour_for_each_group_and_is_cut_between_them(count: int) -> None:
    n = 8
    distances = random_distances(n + 1, 3)
    groups, _ = group_blocks(distances, n_groups=count)
    merges = linkage(distances)
    figure: Any = tree(merges, groups)
    *links, leaves = figure.data
    assert sorted(max(link.y) for link in links) == pytest.approx(sorted(merges[:, 2]))
    blocks = [int(name) for name in figure.layout.xaxis.ticktext]
    assert sorted(blocks) == list(range(n)) and list(leaves.customdata) == blocks
    colour_of = dict(zip(blocks, leaves.marker.color, strict=True))
    assert as_sets(groups) == {
        frozenset(block for block in blocks if colour_of[block] == colour)
        for colour in set(colour_of.values())
    }
    (cut,) = figure.layout.shapes
    above = [link for link in links if max(link.y) > cut.y0]
    assert len(above) == count - 1
    groups_colours = set(colour_of.values())
    assert all((link.line.color in groups_colours) == (link not in above) for link in links)


def test_a_tree_with_ties_still_has_a_colour_for_each_group() -> None:
    for count in range(1, 7):
        distances = of_pairs(7, {}, 0.5)
        groups, _ = group_blocks(distances, n_groups=count)
        figure: Any = tree(linkage(distances), groups)
        assert len(set(figure.data[-1].marker.color)) == count


def test_neighbouring_groups_keep_the_order_of_blocks_in_the_tree() -> None:
    groups, _ = group_blocks(BY_HAND, n_groups=2)
    figure: Any = tree(linkage(BY_HAND), groups)
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "3"]


def test_the_amad_is_drawn_with_the_choice() -> None:
    groups, amads = group_blocks(BY_HAND, amad_max=0.2)
    figure: Any = amad_by_groups(amads, len(groups))
    curve, chosen = figure.data
    assert list(curve.x) == [1, 2, 3, 4]
    assert list(curve.y) == amads
    assert (chosen.x[0], chosen.y[0]) == (2, amads[1])
