"""`MeZOState` and maps on the output of SAEs: the effect of a step, and the state it keeps."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from sae_lora.common.errors import UserError
from sae_lora.config.enums import Method
from sae_lora.config.schema import Config, LoRAConfig, MethodConfig, TrainConfig
from sae_lora.models.language_model import LanguageModel
from sae_lora.records.schema import CurvePoint
from sae_lora.saes import output_adapter
from sae_lora.saes.output_adapter import AdaptedCoder, OutputAdapter
from sae_lora.splice.hooks import Coder
from sae_lora.splice.positions import NOT_SPECIAL, Special
from sae_lora.splice.trunk import Trunk
from sae_lora.train import checkpoint
from sae_lora.train.cost.memory import PeakMemory
from sae_lora.train.cost.runs import sae_weights
from sae_lora.train.optim import MeZOState
from sae_lora.train.train_state import TrainState
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import D_MODEL, random_tokens, small_model
from tests.support.learners import WIDTH
from tests.support.stepping import (
    SPECIAL,
    STEPS,
    TOKENS,
    BuiltTraining,
    build_training,
    frozen_standard,
    gradients,
    spliced_sae,
    step,
    whole_kl,
)
from tests.support.trainings import CONFIG, batches, curves, fill, kl, pack, same, stopped

MODEL = small_model("llama")
PLAIN = dataclasses.replace(CONFIG, grad_clip=None)
MAPS = [
    (Method.linear_adapter, None),
    (Method.linear_adapter, 3),
    (Method.mlp_adapter, None),
    (Method.mlp_adapter, 5),
]


class Smooth(nn.Module):
    """An SAE with smooth latents, so that finite differences approximate derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = frozen_standard().W_enc

    def encode(self, x: Tensor) -> Tensor:
        return softplus(x @ self.matrix)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.matrix.T


def mezo(train: TrainConfig = PLAIN, **settings: Any) -> BuiltTraining:
    """A training by MeZO whose adapters change the output."""
    run = build_training(MODEL, Method.mezo, topk_sae(), train=train, **settings)
    fill(run.training.student.weights)
    return run


def direction(run: BuiltTraining) -> dict[str, Tensor]:
    assert isinstance(run.training, MeZOState)
    return dict(zip(run.weights, run.training._direction(), strict=True))


def slope_of(run: BuiltTraining, epsilon: float, tokens: Tensor = TOKENS) -> float:
    """Slope of the mean KL along the direction, from weights that are shifted by hand to both sides."""
    student, totals = run.training.student, []
    weights, directions, originals = student.weights, direction(run), run.weights
    for distance in (epsilon, -epsilon):
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(torch.add(originals[name], directions[name], alpha=distance))
            trunk = Trunk(MODEL, tokens, student.cuts)
            (summed,) = kl(MODEL)(trunk.hidden(), [student.hidden(trunk)], [None])
        totals.append(summed.total)
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(originals[name])
    return float(totals[0] - totals[1]) / tokens.numel() / (2 * epsilon)


class TestMeZO:
    """Training by forward passes only."""

    def test_a_rate_of_zero_changes_no_bit(self) -> None:
        run = mezo(dataclasses.replace(PLAIN, lr=0.0, weight_decay=0.1))
        originals, frozen = run.weights, {n: w.clone() for n, w in MODEL.model.state_dict().items()}
        for _ in range(3):
            step(MODEL, run.training)
        assert run.training.step == 3
        assert same(run.weights, originals)
        assert same(MODEL.model.state_dict(), frozen)

    def test_there_is_no_gradient_and_no_graph(self, monkeypatch: pytest.MonkeyPatch) -> None:
        run, hidden = mezo(), []

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("a gradient was computed")

        plain = MeZOState.hidden

        def watched(learner: MeZOState, trunk: Trunk) -> list[Tensor]:
            hidden.extend(plain(learner, trunk))
            return hidden[-2:]

        monkeypatch.setattr(torch.autograd, "grad", refuse)
        monkeypatch.setattr(torch.autograd, "backward", refuse)
        monkeypatch.setattr(torch.Tensor, "backward", refuse)
        monkeypatch.setattr(MeZOState, "hidden", watched)
        originals = run.weights
        step(MODEL, run.training, micro_batch=2)
        assert len(hidden) == 4
        assert all(states.grad_fn is None for states in hidden)
        weights = run.training.student.weights
        assert all(weight.grad is None for weight in weights.values())
        assert all(weight.requires_grad for weight in weights.values())
        assert not any(torch.equal(weight, originals[name]) for name, weight in weights.items())

    @pytest.mark.parametrize("blocks", ["after", "all"])
    def test_the_slope_is_the_derivative_along_the_direction(self, blocks: str) -> None:
        lora = LoRAConfig(rank=2, blocks=blocks)
        run = build_training(MODEL, Method.mezo, Smooth(), train=PLAIN, lora=lora, epsilon=1e-3)
        student = run.training.student
        fill(student.weights)
        for weight in student.weights.values():
            weight.data *= 0.1  # the loss is nearly linear over a short distance
        loss = whole_kl(MODEL, student.model, student.splices)
        slopes = torch.autograd.grad(loss, list(student.weights.values()))
        directions = direction(run).values()
        expected = float(
            sum((slope * part).sum() for slope, part in zip(slopes, directions, strict=True))
        )
        originals = run.weights
        step(MODEL, run.training)
        slope = float(run.training._last_norm or 0)
        assert slope == pytest.approx(abs(expected), rel=2e-3)
        # The step goes down the slope: against the direction if the loss rises along it.
        name, part = next(iter(direction_before(run)))
        change = student.weights[name].detach() - originals[name]
        assert float((change * part).sum()) * expected < 0

    def test_the_direction_follows_from_seed_and_step(self) -> None:
        run, same_seed = mezo(), mezo()
        other_seed = mezo(dataclasses.replace(PLAIN, seed=1))
        assert same(direction(run), direction(same_seed))
        assert not same(direction(run), direction(other_seed))
        first = direction(run)
        torch.rand(5)  # other code may draw random numbers
        assert same(direction(run), first)
        step(MODEL, run.training)
        second = direction(run)
        assert not any(torch.equal(first[name], second[name]) for name in first)
        step(MODEL, same_seed.training, tokens=random_tokens(seed=3))
        assert same(second, direction(same_seed))
        whole = torch.cat([part.flatten() for part in first.values()])
        assert float(whole.mean()) == pytest.approx(0, abs=5 / len(whole) ** 0.5)
        assert float(whole.std()) == pytest.approx(1, abs=5 / len(whole) ** 0.5)

    @pytest.mark.parametrize("decay", [0.0, 0.1])
    @pytest.mark.parametrize("clip", [None, 1e-3])
    def test_one_step_worked_by_hand(self, clip: float | None, decay: float) -> None:
        config = dataclasses.replace(PLAIN, grad_clip=clip, weight_decay=decay, warmup_share=0.0)
        run = mezo(config, epsilon=1e-2)
        directions, originals = direction(run), run.weights
        slope = slope_of(run, 1e-2)
        assert same(run.weights, originals)
        clipped = slope if clip is None else clip * slope / abs(slope)
        assert abs(slope) > 1e-3
        step(MODEL, run.training)
        for name, weight in run.weights.items():
            expected = originals[name] * (1 - config.lr * decay)
            expected = torch.sub(expected, directions[name], alpha=config.lr * clipped)
            torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)
        assert run.training._last_norm == pytest.approx(abs(slope), rel=1e-9)

    @pytest.mark.parametrize("blocks", ["after", "all"])
    def test_memory_is_that_of_a_forward_pass(self, blocks: str) -> None:
        """In addition to it: a copy of the trained weights, and the result of the other pass."""
        tokens = random_tokens(batch=16, length=32)
        lora = LoRAConfig(rank=2, blocks=blocks)
        mezo, gradient = (
            build_training(MODEL, kind, topk_sae(), lora=lora).training
            for kind in (Method.mezo, Method.lora)
        )
        comparison = kl(MODEL)

        def forward() -> None:
            with torch.no_grad():
                trunk = Trunk(MODEL, tokens, mezo.student.cuts)
                comparison(trunk.hidden(), [mezo.student.hidden(trunk)], [None])

        def peak(action: Callable[[], object]) -> int:
            action()  # the first call allocates memory that is kept between steps
            with PeakMemory() as memory:
                action()
            return memory.peak

        packs = [pack(MODEL, run) for run in (mezo, gradient)]
        by_forward_passes, by_gradient = (
            peak(lambda run=run: run._take_step(run.active, tokens)) for run in packs
        )
        weights = sum(weight.numel() for weight in mezo.student.weights.values())
        second_pass = tokens.numel() * D_MODEL
        allowed = peak(forward) + 4 * (weights + second_pass)
        assert by_forward_passes == pytest.approx(allowed, rel=0.02)
        assert by_forward_passes < 0.4 * by_gradient

    def test_a_packed_run_equals_a_single_run(self) -> None:
        def variants() -> list[BuiltTraining]:
            return [
                mezo(),
                mezo(dataclasses.replace(PLAIN, seed=2, lr=1e-2), lora=LoRAConfig(rank=3, blocks="all")),
                build_training(MODEL, Method.lora, topk_sae(), lora=LoRAConfig(rank=2, dropout=0.3)),
                build_training(MODEL, Method.linear_adapter, topk_sae()),
                build_training(MODEL, Method.e2e, spliced_sae("topk")),
            ]

        expected = []
        for run in variants():
            (curve,) = curves(pack(MODEL, run.training), STEPS).values()
            expected.append((curve, run.weights))
        runs = variants()
        packed = curves(pack(MODEL, *(run.training for run in runs)), STEPS)
        for run, (curve, weights) in zip(runs, expected, strict=True):
            assert packed[run.training] == curve
            assert same(run.weights, weights)


def direction_before(run: BuiltTraining) -> list[tuple[str, Tensor]]:
    """The direction of the last step."""
    run.training.step -= 1
    result = list(direction(run).items())
    run.training.step += 1
    return result


class TestMaps:
    """Linear maps and MLPs on the output of an SAE."""

    @pytest.mark.parametrize(("kind", "rank"), MAPS)
    @pytest.mark.parametrize("sae", [topk_sae, jumprelu_sae])
    def test_an_untrained_map_changes_no_bit(
        self, kind: Method, rank: int | None, sae: Callable[[], Coder], model: LanguageModel
    ) -> None:
        student = build_training(model, kind, sae(), rank=rank).training.student
        trunk = Trunk(model, TOKENS, student.cuts)
        with torch.no_grad():
            assert torch.equal(student.hidden(trunk), trunk.hidden(student.before))

    @pytest.mark.parametrize(("kind", "rank"), MAPS)
    def test_an_untrained_map_changes_nothing_with_special_tokens(
        self, kind: Method, rank: int | None
    ) -> None:
        """Equal up to rounding: the SAE reads fewer positions, and fewer rows may round differently."""
        student = build_training(MODEL, kind, topk_sae(), rank=rank, special=SPECIAL).training.student
        trunk = Trunk(MODEL, TOKENS, student.cuts)
        with torch.no_grad():
            result, expected = student.hidden(trunk), trunk.hidden(student.before)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        assert not torch.equal(expected, trunk.hidden())

    @pytest.mark.parametrize(("kind", "rank"), MAPS)
    def test_only_the_map_is_trained(self, kind: Method, rank: int | None) -> None:
        sae = topk_sae()
        run = build_training(MODEL, kind, sae, rank=rank)
        frozen = {**MODEL.model.state_dict(), **sae.state_dict(prefix="sae.")}
        frozen = {name: weight.clone() for name, weight in frozen.items()}
        originals = run.weights
        points = [point for _, point in pack(MODEL, run.training).points(batches(STEPS))]
        assert points[-1].kl < points[0].kl
        assert same({**MODEL.model.state_dict(), **sae.state_dict(prefix="sae.")}, frozen)
        assert not any(torch.equal(weight, originals[name]) for name, weight in run.weights.items())
        assert all(weight.grad is None for weight in sae.parameters())

    @pytest.mark.parametrize("special", [NOT_SPECIAL, SPECIAL])
    @pytest.mark.parametrize(("kind", "rank"), MAPS)
    def test_the_gradient_equals_that_of_one_plain_pass(
        self, kind: Method, rank: int | None, special: Special
    ) -> None:
        """The map on the first SAE changes the input of the second SAE."""
        run = build_training(
            MODEL, kind, jumprelu_sae(), topk_sae(), train=PLAIN, rank=rank, special=special
        )
        student = run.training.student
        fill(student.weights)
        loss = whole_kl(MODEL, MODEL, student.splices)
        expected = torch.autograd.grad(loss, list(student.weights.values()))
        result = gradients(MODEL, run.training, micro_batch=3)
        for gradient, slope in zip(result.values(), expected, strict=True):
            torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-5)
        assert run.training.loss == pytest.approx(loss.item(), rel=1e-5)

    @pytest.mark.parametrize(("kind", "rank"), MAPS)
    def test_saving_and_loading_keeps_every_bit(
        self, kind: Method, rank: int | None, tmp_path: Path
    ) -> None:
        run = build_training(MODEL, kind, topk_sae(), rank=rank)
        fill(run.training.student.weights)
        run.artifact.save(tmp_path)
        (folder,) = tmp_path.iterdir()
        assert folder.name == "blocks.1.hook_resid_post"
        loaded = output_adapter.load(folder, torch.device("cpu"))
        (adapter,) = run.training.student.modules.values()
        assert same(dict(loaded.state_dict()), dict(adapter.state_dict()))
        assert (loaded.kind, loaded.d_model, loaded.rank) == (kind, D_MODEL, rank)
        assert not any(weight.requires_grad for weight in loaded.parameters())
        recon = torch.randn(5, 7, D_MODEL)
        assert torch.equal(loaded(recon), adapter(recon))
        assert not torch.equal(loaded(recon), recon)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda folder: (folder / "output_adapter.safetensors").unlink(),
            lambda folder: (folder / "output_adapter.json").unlink(),
            lambda folder: (folder / "output_adapter.safetensors").write_bytes(b""),
            lambda folder: cut(folder / "output_adapter.safetensors"),
            lambda folder: cut(folder / "output_adapter.json"),
            lambda folder: (folder / "output_adapter.json").write_text("{}"),
            lambda folder: (folder / "output_adapter.json").write_text("[]"),
            lambda folder: edit(folder, '"rank": 3', '"rank": 4'),
            lambda folder: edit(folder, '"rank": 3', '"rank": "three"'),
            lambda folder: edit(folder, '"linear_adapter"', '"lora"'),
            lambda folder: edit(folder, '"linear_adapter"', '"linear"'),
        ],
    )
    def test_a_damaged_adapter_is_one_clear_error(
        self, damage: Callable[[Path], object], tmp_path: Path
    ) -> None:
        output_adapter.save(OutputAdapter(Method.linear_adapter, D_MODEL, 3), tmp_path)
        damage(tmp_path)
        with pytest.raises(UserError, match=r"adapter in .* cannot be loaded") as error:
            output_adapter.load(tmp_path, torch.device("cpu"))
        assert str(tmp_path) in str(error.value)

    def test_the_number_of_weights(self) -> None:
        """d + d² for a map of full rank, d + 2dr for rank r; the middle of an MLP also has a bias."""
        d = D_MODEL
        expected = [d + d * d, d + 2 * d * 3, 2 * d * d + 2 * d, 2 * d * 5 + 5 + d]
        for (kind, rank), weights in zip(MAPS, expected, strict=True):
            adapter = OutputAdapter(kind, d, rank)
            config = Config(method=MethodConfig(kind=kind, rank=rank))
            assert sum(weight.numel() for weight in adapter.parameters()) == weights
            assert sae_weights(config, d, WIDTH) == weights

    def test_linear_maps_by_hand(self) -> None:
        """Worked by hand: x + W x + b, and with rank x + W₂ W₁ x + b."""
        recon = torch.randn(4, D_MODEL)
        whole = OutputAdapter(Method.linear_adapter, D_MODEL, None)
        narrow = OutputAdapter(Method.linear_adapter, D_MODEL, 3)
        for adapter in (whole, narrow):
            fill(dict(adapter.named_parameters()))
        weights = dict(whole.named_parameters())
        expected = recon + recon @ weights["added.weight"].T + weights["added.bias"]
        torch.testing.assert_close(whole(recon), expected)
        weights = dict(narrow.named_parameters())
        inner = recon @ weights["added.0.weight"].T
        expected = recon + inner @ weights["added.1.weight"].T + weights["added.1.bias"]
        torch.testing.assert_close(narrow(recon), expected)
        assert torch.linalg.matrix_rank(narrow(torch.eye(D_MODEL)) - narrow(torch.zeros(D_MODEL))) > 3
        added = narrow.added(torch.eye(D_MODEL)) - narrow.added(torch.zeros(D_MODEL))
        assert torch.linalg.matrix_rank(added, rtol=1e-4) == 3

    def test_latents_are_those_of_the_sae(self) -> None:
        sae = topk_sae()
        coder = AdaptedCoder(sae, OutputAdapter(Method.mlp_adapter, D_MODEL, 5))
        resid = torch.randn(6, D_MODEL)
        assert torch.equal(coder.encode(resid), sae.encode(resid))


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def edit(folder: Path, old: str, new: str) -> None:
    file = folder / "output_adapter.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


STOPPED: dict[str, Callable[[], BuiltTraining]] = {
    "mezo": lambda: mezo(CONFIG),
    "linear_adapter": lambda: build_training(MODEL, Method.linear_adapter, topk_sae()),
    "mlp_adapter": lambda: build_training(MODEL, Method.mlp_adapter, topk_sae(), rank=5),
    "sae_finetune": lambda: build_training(MODEL, Method.sae_finetune, topk_sae(), dead_after_tokens=64),
    "lora_sae": lambda: build_training(MODEL, Method.lora_sae, topk_sae(), lora_lr=1e-2),
    "sae_finetune of rank 2": lambda: build_training(MODEL, Method.sae_finetune, jumprelu_sae(), rank=2),
    "sae_finetune by KL": lambda: build_training(
        MODEL, Method.sae_finetune, frozen_standard(), mse=False
    ),
    **{
        f"e2e {architecture}": lambda architecture=architecture: build_training(
            MODEL, Method.e2e, spliced_sae(architecture, scale=0.5, dead_after=1)
        )
        for architecture in ("topk", "batchtopk", "jumprelu", "standard", "gated", "matryoshka")
    },
}


@functools.cache
def whole(name: str) -> tuple[list[CurvePoint], TrainState]:
    """The curve of a training that was not stopped, and its state at the end."""
    training = STOPPED[name]().training
    (curve,) = curves(pack(MODEL, training), STEPS).values()
    return curve, training


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
@pytest.mark.parametrize("stop", [2, 3])
def test_a_restored_training_ends_the_same(name: str, stop: int, tmp_path: Path) -> None:
    """Stopped after a step without an evaluation, and between a step and its evaluation."""
    first, second = (STOPPED[name]() for _ in range(2))
    expected, ended = whole(name)
    stopped(pack(MODEL, first.training), stop, STEPS)
    checkpoint.save(tmp_path, "hash", first.training.state())
    state = checkpoint.newest(tmp_path, "hash", pytest.fail)
    assert state is not None
    torch.rand(7)  # other code may draw random numbers
    second.training.restore(state)
    (points,) = curves(pack(MODEL, second.training), STEPS).values()
    assert expected[: state.values["points"]] + points == expected
    assert same(second.training.state().tensors, ended.state().tensors)
