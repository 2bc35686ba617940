"""The suite `lora`: results computed by hand, or compared to torch's functions."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.config.enums import Suite
from sae_lora.config.execution import EvaluationConfig
from sae_lora.config.schema import LoRAConfig
from sae_lora.evaluation import run_suites, suite_records
from sae_lora.evaluation.lora import similarity, similarity_results, weights
from sae_lora.evaluation.lora.sae_overlap import Overlap, overlap, shared
from sae_lora.evaluation.lora.similarity import directions, expected, similarities
from sae_lora.evaluation.lora.similarity_figures import figures, kinds_map, similarity_map
from sae_lora.evaluation.suite_records import Record
from sae_lora.models import adapter_files, lora
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.lora import AdaptedMatrix, adapted_matrices
from sae_lora.records.folder import RunFolder, runs_of
from sae_lora.saes.loading import IdentitySAE
from sae_lora.splice.hooks import Splice
from tests.support.architectures import tiny_model
from tests.support.coders import topk_sae
from tests.support.families import D_MODEL, small_model
from tests.support.points import run_here
from tests.support.subjects import Made, quick_points_in
from tests.support.sweeps import MadeUp, curve_point, summed_up
from tests.support.trainings import fill

CONFIG = EvaluationConfig()


def at_block_1(sae: object = None, block: int = 1) -> tuple[Splice, ...]:
    return (Splice(block, sae or topk_sae()),)  # pyright: ignore[reportArgumentType]


def plain(weight: Tensor, b: Tensor, a: Tensor, scale: float = 1.0) -> AdaptedMatrix:
    delta = scale * b @ a
    return AdaptedMatrix("blocks.0.q", 0, "q", True, weight, delta, a, b, scale, None)


def measured(matrix: AdaptedMatrix) -> weights.Matrix:
    return weights.measured(matrix, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("stabilised", [False, True])
def test_delta_is_the_change_that_peft_computes(
    model: LanguageModel, dora: bool, stabilised: bool
) -> None:
    """The change of each layer's output. Names are the names of the model's modules."""
    config = LoRAConfig(rank=3, alpha=5.0, blocks=[1, 3], dora=dora, rank_stabilised=stabilised)
    lora.attach(model, config, first_sae=0)
    fill(lora.trainable_weights(model))
    layers: dict[str, Any] = {
        name: module for name, module in model.model.named_modules() if isinstance(module, LoraLayer)
    }
    matrices = {matrix.name: matrix for matrix in adapted_matrices(model)}
    assert matrices.keys() == layers.keys()
    for name, matrix in matrices.items():
        layer = layers[name]
        x = torch.randn(5, matrix.weight.shape[1])
        with torch.no_grad():
            added = layer(x) - layer.get_base_layer()(x)
        torch.testing.assert_close(x @ matrix.delta.T, added, rtol=1e-4, atol=1e-4)
        assert matrix.block in (1, 3) and name.endswith(f".{matrix.block}.{matrix.kind}")
        assert (matrix.magnitude is not None) == dora
        if not dora:
            torch.testing.assert_close(matrix.delta, matrix.scale * matrix.b @ matrix.a)
    # Some of a block's matrices read the residual stream; these have d_model inputs.
    reading = [matrix for matrix in matrices.values() if matrix.reads_stream]
    assert 0 < len(reading) < len(matrices)
    assert all(matrix.weight.shape[1] == D_MODEL for matrix in reading)


@pytest.mark.parametrize(("rank", "dora"), [(3, False), (3, True), (40, False)])
def test_singular_vectors_are_those_of_delta(rank: int, dora: bool) -> None:
    """If the rank is larger than the matrix's smaller size, there are as many vectors as this size."""
    model = small_model("llama")
    lora.attach(model, LoRAConfig(rank=rank, blocks=[1], dora=dora), first_sae=0)
    fill(lora.trainable_weights(model))
    for matrix in adapted_matrices(model):
        outputs, values, inputs = weights.decomposed(matrix)
        torch.testing.assert_close((outputs * values @ inputs.T).float(), matrix.delta)
        n = len(values)
        assert n == min(matrix.delta.shape if dora else (rank, *matrix.delta.shape))
        torch.testing.assert_close(values, torch.linalg.svdvals(matrix.delta.double())[:n])
        eye = torch.eye(n, dtype=torch.float64)
        torch.testing.assert_close(outputs.T @ outputs, eye)
        torch.testing.assert_close(inputs.T @ inputs, eye)


def test_one_direction_by_hand() -> None:
    """ΔW = 2 · 5 · e₀ e₁ᵀ, W is 0.5 at this entry, and W's largest singular value is 3; ‖W‖ = √13.25."""
    weight = torch.tensor([[0.0, 0.5, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    b, a = torch.tensor([[5.0], [0.0], [0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    result = measured(plain(weight, b, a, scale=2.0))
    assert result.delta_norm == pytest.approx(10)
    assert result.weight_norm == pytest.approx(13.25**0.5)
    assert result.singular_values == pytest.approx([10])
    assert result.effective_rank == pytest.approx(1)
    assert result.energy == {"1": pytest.approx(1)}
    assert result.projection.delta == pytest.approx(0.5)
    assert result.projection.weight == pytest.approx(3)
    assert 0 < result.projection.random < 3
    assert result.amplification == pytest.approx(20)
    assert dataclasses.astuple(result.cost) == (6, 9, 36, 18)


def test_two_directions_by_hand() -> None:
    """ΔW = diag(3, 1, 0) around W = diag(1, 2, 4): 9 of 10 of its energy in the first direction."""
    weight = torch.diag(torch.tensor([1.0, 2.0, 4.0]))
    b = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    result = measured(plain(weight, b, torch.eye(3)[:2]))
    assert result.singular_values == pytest.approx([3, 1])
    assert result.energy == {"1": pytest.approx(0.9)}
    assert result.projection.delta == pytest.approx(5**0.5)
    assert result.projection.weight == pytest.approx(20**0.5)
    assert result.amplification == pytest.approx(2**0.5)
    # exp of the entropy of the shares 3/4 and 1/4.
    assert result.effective_rank == pytest.approx((4 / 3) ** 0.75 * 4**0.25)


def test_random_directions_have_their_share_of_a_matrix() -> None:
    """E ‖UᵀWV‖² = r² ‖W‖² / (outputs · inputs); the mean of many draws is within a tenth of it."""
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(3))
    random = torch.Generator().manual_seed(0)
    b, a = torch.ones(12, 3), torch.ones(3, 20)
    squares = [weights.measured(plain(weight, b, a), random).projection.random ** 2 for _ in range(20)]
    share = 9 / (12 * 20) * float(weight.square().sum())
    assert sum(squares) / len(squares) == pytest.approx(share, rel=0.1)


def test_effective_rank() -> None:
    assert weights.effective_rank(torch.full((7,), 0.3)) == pytest.approx(7)
    assert weights.effective_rank(torch.tensor([2.0, 0.0, 0.0])) == pytest.approx(1)
    assert weights.effective_rank(torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(2)
    assert weights.effective_rank(torch.zeros(3)) is None


def test_energy_is_reported_up_to_the_number_of_directions() -> None:
    assert weights.energy(torch.ones(5)) == {"1": pytest.approx(1 / 5), "4": pytest.approx(4 / 5)}
    assert weights.energy(torch.zeros(5)) == {}


@pytest.mark.parametrize("dora", [False, True])
def test_untrained_adapters_change_nothing(model: LanguageModel, dora: bool) -> None:
    subject = Made(model, at_block_1(), LoRAConfig(rank=2, dora=dora), filled=False)
    for matrix in weights.evaluate(subject, CONFIG).matrices:
        assert matrix.delta_norm == pytest.approx(0, abs=1e-5 * matrix.weight_norm)
        if not dora:
            assert matrix.delta_norm == 0 and matrix.singular_values == [0.0, 0.0]
            assert matrix.effective_rank is matrix.amplification is matrix.projection.delta is None
            assert matrix.energy == {}


@pytest.mark.parametrize("dora", [False, True])
def test_parameters_are_the_elements_of_the_tensors(model: LanguageModel, dora: bool) -> None:
    subject = Made(model, at_block_1(), LoRAConfig(rank=3, dora=dora))
    result = weights.evaluate(subject, CONFIG)
    adapters = lora.trainable_weights(subject.with_adapters).values()
    assert result.cost.parameters == sum(matrix.cost.parameters for matrix in result.matrices)
    assert result.cost.parameters == sum(weight.numel() for weight in adapters)
    of_blocks = [
        weight.numel()
        for block in model.blocks[2:]
        for name, weight in block.named_parameters()
        if weight.ndim == 2 and "norm" not in name
    ]
    assert result.cost.whole_parameters == sum(of_blocks)
    assert result.cost.whole_flops == 2 * sum(of_blocks)
    if not dora:
        assert result.cost.flops == 6 * result.cost.parameters


def test_the_projection_on_its_own_singular_vectors_is_the_largest(model: LanguageModel) -> None:
    for matrix in weights.evaluate(Made(model, at_block_1(), LoRAConfig(rank=4)), CONFIG).matrices:
        projection, values = matrix.projection, matrix.singular_values
        assert projection.delta is not None and matrix.amplification is not None
        assert projection.delta < projection.weight < matrix.weight_norm
        assert projection.random < projection.weight
        assert matrix.amplification == pytest.approx(matrix.delta_norm / projection.delta)
        assert values == sorted(values, reverse=True)
        assert sum(value**2 for value in values) == pytest.approx(matrix.delta_norm**2, rel=1e-4)


def test_experts_are_measured_one_by_one() -> None:
    """Their overlaps with the SAE have a name for each expert, of the first adapted block."""
    subject = Made(tiny_model("qwen3_moe"), at_block_1(), LoRAConfig(rank=2, targets="mlp"))
    result = weights.evaluate(subject, CONFIG)
    experts = [matrix for matrix in result.matrices if "experts" in matrix.kind]
    assert {matrix.block for matrix in experts} == {3}
    assert {matrix.kind for matrix in experts} == {
        f"mlp.experts.{name}[{expert}]" for name in ("gate_up_proj", "down_proj") for expert in range(4)
    }
    trained = lora.trainable_weights(subject.with_adapters).values()
    assert result.cost.parameters == sum(weight.numel() for weight in trained)
    assert result.overlap is not None and result.overlap.block == 2
    assert set(result.overlap.matrices) == {"mlp.gate_proj", "mlp.up_proj"}


def test_a_run_without_adapters_is_refused() -> None:
    with pytest.raises(UserError, match="trains no LoRA adapters"):
        weights.evaluate(Made(small_model("llama"), at_block_1()), CONFIG)


def phi(first: Tensor, second: Tensor, i: int, j: int) -> float:
    """Similarity of the i largest directions of one matrix and the j largest of another."""
    return float(similarities(directions(first)[:, :i], directions(second)[:, :j])[i - 1, j - 1])


def test_subspaces() -> None:
    random = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 6, 40, generator=random)
    for i in range(1, 7):
        assert phi(first, first, i, i) == pytest.approx(1)
        assert phi(first, first, i, 6) == pytest.approx(1)  # the smaller lies in the larger
        assert phi(first, second, i, 3) == pytest.approx(phi(second, first, 3, i))
    # Along axes: {e₀, e₁} and {e₁, e₂, e₃} share one of two directions, {e₄} none.
    axes = torch.eye(8)
    assert phi(axes[:2], axes[1:4], 2, 3) == pytest.approx(0.5)
    assert phi(axes[:2], axes[4:5], 2, 1) == 0
    # At 60 degrees.
    slanted = torch.tensor([[0.5, 0.75**0.5]])
    assert phi(torch.tensor([[1.0, 0.0]]), slanted, 1, 1) == pytest.approx(0.25)


def test_the_grid_equals_the_similarities_of_each_size() -> None:
    first, second = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(1))
    grid = similarities(directions(first), directions(second)[:, :3])
    assert grid.shape == (5, 3)
    for i in range(1, 6):
        for j in range(1, 4):
            u, v = torch.linalg.svd(first)[2][:i], torch.linalg.svd(second)[2][:j]
            assert float(grid[i - 1, j - 1]) == pytest.approx(
                float((u @ v.T).square().sum()) / min(i, j), rel=1e-4
            )


@pytest.mark.parametrize(("i", "j"), [(1, 1), (4, 4), (3, 8)])
def test_random_subspaces_have_the_expected_similarity(i: int, j: int) -> None:
    random = torch.Generator().manual_seed(2)
    draws = [
        phi(torch.randn(i, 32, generator=random), torch.randn(j, 32, generator=random), i, j)
        for _ in range(400)
    ]
    assert sum(draws) / len(draws) == pytest.approx(expected(i, j, 32), rel=0.2)


def test_directions_without_a_singular_value_are_left_out() -> None:
    rows = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    assert directions(torch.cat([rows, rows[:2] + rows[1:]])).shape == (20, 3)
    assert directions(torch.zeros(2, 20)).shape == (20, 0)
    assert directions(torch.zeros(0, 20)).shape == (20, 0)


class Cut:
    """A stand-in for an SAE: each latent is a coordinate, and the first few are lost."""

    def __init__(self, lost: int) -> None:
        self._lost = lost

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x[..., : self._lost]), x[..., self._lost :]], dim=-1)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts


class Rarer(Cut):
    """A stand-in whose second latent is active on every second token, the third on every third …"""

    def __init__(self) -> None:
        super().__init__(0)

    def encode(self, x: Tensor) -> Tensor:
        token = torch.arange(x[..., 0].numel()).view(x.shape[:-1])
        return torch.where(token[..., None] % torch.arange(1, 1 + x.shape[-1]) == 0, x, 0.0)


def test_overlap_with_the_error_and_the_decoder_of_an_sae() -> None:
    """The SAE's error is the whole of e₀ … e₃, so only adapters that read these overlap with it."""
    subject = Made(small_model("llama"), at_block_1(Cut(4)), LoRAConfig(rank=2, targets="all"))
    axes = torch.eye(D_MODEL)
    rows = {"self_attn.q_proj": axes[:2], "self_attn.v_proj": axes[[3, 9]], "mlp.up_proj": axes[5:7]}
    for kind, values in rows.items():
        layer = subject.with_adapters.blocks[2].get_submodule(kind)
        assert isinstance(layer, LoraLayer)
        layer.lora_A["default"].weight.data = values.clone()
    result = overlap(subject, 500, 16)
    assert isinstance(result, Overlap)
    assert (result.block, result.hookpoint) == (2, "blocks.1.hook_resid_post")
    assert result.tokens == subject.tokens.numel()
    assert result.error_share == pytest.approx(1)
    assert {kind.split(".")[1] for kind in result.matrices} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    }
    for kind, share in (("self_attn.q_proj", 1), ("self_attn.v_proj", 0.5), ("mlp.up_proj", 0)):
        error = result.matrices[kind].error
        assert (error.adapter_directions, error.other_directions) == (2, 4)  # the error has no more
        assert error.similarity == pytest.approx(share, abs=1e-6)
        assert error.expected == 4 / D_MODEL
    reads_error, reads_else = result.matrices["self_attn.q_proj"], result.matrices["mlp.up_proj"]
    assert reads_error.error.energy == pytest.approx(1, rel=1e-5)
    assert reads_else.error.energy == pytest.approx(0, abs=1e-9)
    assert reads_error.decoder.similarity == pytest.approx(0, abs=1e-9)
    assert reads_error.decoder.other_directions == 16
    assert reads_error.decoder.expected == 16 / D_MODEL
    assert reads_else.error.expected_energy == 4 / D_MODEL


def test_the_decoder_directions_are_of_the_most_active_latents() -> None:
    subject = Made(small_model("llama"), at_block_1(Rarer()), LoRAConfig(rank=2, targets="q"))
    layer = subject.with_adapters.blocks[2].get_submodule("self_attn.q_proj")
    assert isinstance(layer, LoraLayer)
    for latents, share in (([0, 1], 1), ([2, 7], 0.5), ([4, 5], 0)):
        layer.lora_A["default"].weight.data = torch.eye(D_MODEL)[latents]
        result = overlap(subject, 500, 3)
        assert isinstance(result, Overlap)
        assert result.matrices["self_attn.q_proj"].decoder.similarity == pytest.approx(share, abs=1e-6)


def test_energy_is_the_share_that_delta_reads() -> None:
    """3² of 3² + 4² are along the first axis, for any A."""
    b, a = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.eye(5)[:2]
    result = shared(plain(torch.eye(2, 5), b, a), torch.eye(5, dtype=torch.float64)[:, :1])
    assert result.energy == pytest.approx(9 / 25)
    assert (result.similarity, result.expected) == (pytest.approx(1), 2 / 5)
    untouched = shared(plain(torch.eye(2, 5), 0 * b, a), torch.eye(5, dtype=torch.float64)[:, :1])
    assert untouched.energy is None


@pytest.mark.parametrize(
    ("sae", "adapters", "reason"),
    [
        (topk_sae(), LoRAConfig(rank=2, blocks="all"), "there is no SAE before block 0"),
        (topk_sae(), LoRAConfig(rank=2, targets="o"), "reads the residual stream"),
        (IdentitySAE(), LoRAConfig(rank=2), "makes no error"),
        (Cut(D_MODEL), LoRAConfig(rank=2), "no active latent"),
    ],
)
def test_a_missing_overlap_has_a_reason(sae, adapters: LoRAConfig, reason: str) -> None:
    result = weights.evaluate(Made(small_model("llama"), at_block_1(sae), adapters), CONFIG)
    assert result.overlap is None
    assert result.no_overlap is not None and reason in result.no_overlap


def test_the_last_sae_before_the_adapters_is_compared() -> None:
    splices = tuple(Splice(block, topk_sae(seed=block)) for block in (0, 1, 2))
    result = overlap(Made(small_model("llama"), splices, LoRAConfig(rank=2, blocks=[2, 3])), 500, 4)
    assert isinstance(result, Overlap)
    assert (result.block, result.hookpoint) == (2, "blocks.1.hook_resid_post")


def make_run(home: Path, model: LanguageModel, config: LoRAConfig, seed: int) -> None:
    """Make a finished run with untrained adapters."""
    view = model.view()
    torch.manual_seed(seed)
    adapters = lora.attach(view, config, first_sae=1)
    folder = MadeUp(home).finished(rank=config.rank, seed=seed)
    adapter_files.save(adapters, folder.adapter, "org/base")
    summed_up(folder)


def test_only_runs_with_results_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite does not apply to one of three runs, and fails for another."""
    sweep = MadeUp(tmp_path / "sweep")
    folders = [sweep.finished(rank=rank) for rank in (1, 4)]
    folders.append(sweep.told("finetuned", [curve_point(0)], {"method.kind": "sae_finetune"}))

    def evaluate(folder: RunFolder, suites: Sequence[Suite], *_: object, **__: object) -> list[Suite]:
        if folder is not folders[0]:
            return list(suites) if folder is folders[1] else []
        suite_records.write(folder, Record("lora", {}, {}, {}, 1.0))
        return []

    monkeypatch.setattr(run_suites, "evaluate", evaluate)
    done = run_suites.evaluate_all(folders, [Suite.lora], [], again=False, device=None)
    assert done == ([Suite.lora], 1, True)


def test_runs_that_adapt_the_same_matrices_are_compared(tmp_path: Path) -> None:
    model = small_model("llama")
    for rank, seed, targets in ((2, 0, "all"), (12, 1, "all"), (2, 5, "qv")):
        make_run(tmp_path, model, LoRAConfig(rank=rank, targets=targets), seed)
    folders = runs_of(tmp_path)
    (pair,) = similarity.compare(folders)  # the third adapts other matrices
    assert sorted([pair["first"], pair["second"]]) == ["tiny-l3-l0_4-r12-s1", "tiny-l3-l0_4-r2-s0"]
    sizes = {pair["first"]: pair["first_sizes"], pair["second"]: pair["second_sizes"]}
    assert sizes["tiny-l3-l0_4-r2-s0"] == [1, 2]
    assert sizes["tiny-l3-l0_4-r12-s1"] == [1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert pair["matrices"] == 7 * 2 and len(pair["of_kinds"]) == 7
    by_name = {folder.path.name: folder for folder in folders}
    first, second = (by_name[name].adapter for name in (pair["first"], pair["second"]))
    names = adapter_files.saved_inputs(first)
    saved_a = adapter_files.saved_a
    assert {inputs for _, inputs in names} == {D_MODEL, 48}
    for row, i in enumerate(pair["first_sizes"]):
        for column, j in enumerate(pair["second_sizes"]):
            by_matrix = {
                name: phi(saved_a(first, name), saved_a(second, name), i, j) for name, _ in names
            }
            mean = sum(by_matrix.values()) / len(by_matrix)
            assert pair["of_all"]["similarity"][row][column] == pytest.approx(mean)
            of_q = [value for name, value in by_matrix.items() if name.endswith("q_proj")]
            assert pair["of_kinds"]["self_attn.q_proj"]["similarity"][row][column] == pytest.approx(
                sum(of_q) / len(of_q)
            )
            assert pair["of_kinds"]["mlp.down_proj"]["expected"][row][column] == max(i, j) / 48


def test_equal_adapters_have_similarity_one_and_results_are_read_as_written(tmp_path: Path) -> None:
    model, config = small_model("gpt2"), LoRAConfig(rank=3)
    make_run(tmp_path, model, config, seed=0)
    make_run(tmp_path, model, config, seed=1)
    first, second = runs_of(tmp_path)
    shutil.rmtree(second.adapter)
    shutil.copytree(first.adapter, second.adapter)
    (pair,) = pairs = similarity.compare([first, second])
    assert [pair["of_all"]["similarity"][n][n] for n in range(3)] == pytest.approx([1] * 3)
    assert set(pair["of_kinds"]) == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert similarity_results.read(tmp_path) == []
    similarity_results.write(tmp_path, pairs)
    assert similarity_results.read(tmp_path) == pairs


def test_damaged_adapters_are_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path, small_model("llama"), LoRAConfig(rank=2), seed)
    file = runs_of(tmp_path)[0].adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"is damaged \(adapter/adapter_model"):
        similarity.compare(runs_of(tmp_path))


def test_figures_show_the_grids(tmp_path: Path) -> None:
    for seed in range(4):
        make_run(tmp_path, small_model("llama"), LoRAConfig(rank=2), seed)
    pairs = similarity.compare(runs_of(tmp_path))
    assert len(pairs) == 6
    pair = pairs[0]
    whole: Any = similarity_map(pair)
    kinds: Any = kinds_map(pair)
    measured, random = whole.data
    assert [list(row) for row in measured.z] == pair["of_all"]["similarity"]
    assert [list(row) for row in random.z] == pair["of_all"]["expected"]
    assert list(measured.x) == ["1", "2"]
    assert len(kinds.data) == 7
    assert len(figures(pairs * 2)) == 12  # two for each of the first six pairs


@pytest.mark.slow
def test_the_command_measures_a_sweep_and_compares_its_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[Path] = []

    def no_browser(files: Sequence[tuple[object, Path]]) -> list[str]:
        paths.extend(path for _, path in files)
        return ["no pictures (a browser is needed)"]

    monkeypatch.setattr("sae_lora.common.plots.try_pictures", no_browser)
    point = quick_points_in(tmp_path)
    folders = run_here(*(point(f"train.seed={seed}") for seed in (0, 1)))
    sweep = folders[0].path.parent
    arguments = ["evaluate", str(sweep), "--suite", "lora", "--set", "directions=4"]
    assert main(arguments) == 0
    for folder in folders:
        record = suite_records.read(folder, Suite.lora)
        assert record is not None
        assert record.settings == {"sequences": 500, "directions": 4}
        summary = folder.read_summary()
        assert record.results["cost"]["parameters"] == summary["trainable_parameters"]
        assert {matrix["block"] for matrix in record.results["matrices"]} == {4, 5, 6, 7}
        assert record.results["overlap"]["hookpoint"] == "blocks.3.hook_resid_post"
        error = record.results["overlap"]["matrices"]["self_attn.q_proj"]["error"]
        assert error["other_directions"] == 4
    (pair,) = similarity_results.read(sweep)
    assert {pair["first"], pair["second"]} == {folder.path.name for folder in folders}
    output = capsys.readouterr()
    rows = [line.split("│")[1:-1] for line in output.out.splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["0", "1"]  # a row for each seed
    assert "amplification" in output.out
    assert "1 pair of adapters compared" in output.out
    assert "left out: no pictures" in output.err
    names = ["similarity_1.svg", "similarity_1_kinds.svg"]
    assert paths == [sweep / "evaluation" / name for name in names]
