"""A stopped run resumes to the last bit as if it had not stopped, or it refuses."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae_lora.common.errors import UserError
from sae_lora.config.schema import TrainConfig
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import CurvePoint
from sae_lora.train import checkpoint
from sae_lora.train.checkpoint import Snapshot
from sae_lora.train.train_state import TrainState
from tests.support.clock import Clock
from tests.support.coders import topk_sae
from tests.support.families import small_model
from tests.support.trainings import batches, comparable, pack, same, stopped, training

STEPS = 11
BATCHES = batches(STEPS)
MODEL = small_model("llama")


def new_training() -> TrainState:
    """A training as a new process builds it, only from the seed; dropout is on."""
    return training(MODEL, topk_sae(), steps=STEPS)


def points(state: TrainState) -> Iterator[CurvePoint]:
    """The remaining points of a training, without times."""
    for _, point in pack(MODEL, state).points(BATCHES[state.step :]):
        yield comparable(point)


def alike(first: Snapshot, second: Snapshot) -> bool:
    timeless = [
        {key: value for key, value in state.values.items() if key not in ("train_seconds", "interval")}
        for state in (first, second)
    ]
    return timeless[0] == timeless[1] and same(first.tensors, second.tensors)


@pytest.fixture(scope="module")
def whole() -> tuple[list[CurvePoint], Snapshot]:
    """The curve and the last state of a training that was not stopped."""
    state = new_training()
    return list(points(state)), state.state()


@pytest.mark.slow
@pytest.mark.parametrize("stop", range(STEPS + 1))
def test_a_training_stopped_at_any_step_ends_the_same(stop: int, whole, tmp_path: Path) -> None:
    """Saved after a step and before its evaluation, then restored from disk."""
    first = new_training()
    stopped(pack(MODEL, first), stop, STEPS)
    checkpoint.save(tmp_path, "hash", first.state())
    state = checkpoint.newest(tmp_path, "hash", pytest.fail)
    assert state is not None
    curve = whole[0][: state.values["points"]]
    second = new_training()
    torch.rand(7)  # other code may draw random numbers
    second.restore(state)
    assert curve + list(points(second)) == whole[0]
    assert alike(second.state(), whole[1])


def test_a_point_that_was_not_recorded_is_measured_again(whole) -> None:
    """The run stops between the evaluation and its line in the file."""
    first = new_training()
    source = points(first)
    taken = [next(source), next(source)]
    state = first.state()
    assert state.values["points"] == 1
    second = new_training()
    second.restore(state)
    assert [taken[0], *points(second)] == whole[0]


def test_a_finished_training_does_nothing(whole) -> None:
    restored = new_training()
    restored.restore(whole[1])
    assert list(points(restored)) == []
    assert alike(restored.state(), whole[1])


class TestCheckpoints:
    """The files on disk."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "checkpoints"
        for step in (10, 20, 30):
            checkpoint.save(folder, "hash", state_at(step))
        return folder

    def test_the_two_newest_are_kept(self, folder: Path) -> None:
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]
        newest = checkpoint.newest(folder, "hash", pytest.fail)
        assert newest is not None
        assert alike(newest, state_at(30))

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        assert checkpoint.newest(tmp_path / "checkpoints", "hash", pytest.fail) is None

    def test_files_of_a_killed_writer_are_not_a_checkpoint(self, folder: Path) -> None:
        shutil.copytree(folder / "step-00000030", folder / ".step-00000040.123")
        newest = checkpoint.newest(folder, "hash", pytest.fail)
        assert newest is not None
        assert newest.values["step"] == 30
        checkpoint.save(folder, "hash", state_at(40))
        assert not list(folder.glob(".*"))

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: (path / "tensors.safetensors").unlink(),
            lambda path: (path / "state.json").unlink(),
            lambda path: (path / "manifest.json").unlink(),
            lambda path: (path / "tensors.safetensors").write_bytes(b""),
            lambda path: (path / "state.json").write_text(""),
            lambda path: (path / "manifest.json").write_text(""),
            lambda path: (path / "manifest.json").write_text("[]"),
            lambda path: (path / "manifest.json").write_text('{"version": 99}'),
            lambda path: flip(path / "tensors.safetensors", -1),
            lambda path: flip(path / "tensors.safetensors", 3),
            lambda path: flip(path / "state.json", 20),
            lambda path: truncate(path / "tensors.safetensors"),
            lambda path: truncate(path / "state.json"),
            lambda path: truncate(path / "manifest.json"),
            lambda path: edit_manifest(path, run="another"),
            lambda path: edit_manifest(path, step=29),
            lambda path: edit_manifest(path, files={}),
        ],
    )
    def test_a_damaged_checkpoint_is_skipped_and_named(
        self, folder: Path, damage: Callable[[Path], object]
    ) -> None:
        damage(folder / "step-00000030")
        messages: list[str] = []
        newest = checkpoint.newest(folder, "hash", messages.append)
        assert newest is not None
        assert alike(newest, state_at(20))
        assert len(messages) == 1
        assert "step-00000030" in messages[0]
        damage(folder / "step-00000020")
        with pytest.raises(UserError, match="step-00000020"):
            checkpoint.newest(folder, "hash", messages.append)

    def test_a_checkpoint_of_another_run_is_never_used(self, folder: Path) -> None:
        with pytest.raises(UserError, match="another run"):
            checkpoint.newest(folder, "other", lambda text: None)

    def test_a_full_disk_keeps_the_old_checkpoints(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def no_space(tensors: object, path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint, "save_file", no_space)
        with pytest.raises(OSError, match="No space"):
            checkpoint.save(folder, "hash", state_at(40))
        monkeypatch.undo()
        assert sorted(path.name for path in folder.iterdir()) == ["step-00000020", "step-00000030"]
        newest = checkpoint.newest(folder, "hash", pytest.fail)
        assert newest is not None


def state_at(step: int) -> Snapshot:
    generator = torch.Generator().manual_seed(step)
    tensors = {"adapter/a": torch.randn(4, 3, generator=generator), "rng/cpu": torch.get_rng_state()}
    return Snapshot(tensors, {"step": step, "points": 1, "grad_norm": 0.1 + step})


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 0x01
    file.write_bytes(content)


def truncate(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_the_curve_is_cut_to_the_points_of_the_checkpoint(tmp_path: Path, whole) -> None:
    folder = RunFolder(tmp_path)
    for point in whole[0][:3]:
        folder.append_point(point)
    with folder.curve.open("a") as file:
        file.write('{"step": 9, "tok')
    folder.cut_curve(2)
    folder.append_point(whole[0][2])
    assert folder.read_curve() == whole[0][:3]


def test_adapters_in_a_checkpoint_are_those_of_the_model(tmp_path: Path) -> None:
    state = new_training()
    list(points(state))
    checkpoint.save(tmp_path, "hash", state.state())
    saved = load_file(tmp_path / f"step-{STEPS:08d}" / "tensors.safetensors")
    weights = {name: value for name, value in saved.items() if name.startswith("adapter/")}
    moments = [name for name in saved if name.startswith("optimizer/exp_avg/")]
    assert len(weights) == len(moments) > 0


@pytest.mark.parametrize(
    ("minutes", "cost", "waits"),
    [
        (10.0, 1.0, 600),
        (10.0, 30.0, 1000),  # 3% of the time
        (0.5, 0.3, 30),
        (None, 1.0, None),
    ],
)
@pytest.mark.case("C3")
def test_checkpoints_by_time_take_a_small_share_of_it(
    minutes: float | None, cost: float, waits: int | None
) -> None:
    """Steps of 20 s or less, far fewer than `checkpoint_every_steps`."""
    clock = Clock()
    timer = checkpoint.Timer(clock)
    with timer.saving():
        clock.advance(cost)
    config = TrainConfig(checkpoint_every_steps=1000, checkpoint_every_min=minutes)
    if waits is None:
        clock.advance(1e6)
        assert not timer.is_due(1, config)
        return
    clock.advance(waits - 0.1)
    assert not timer.is_due(1, config)
    assert timer.is_due(1000, config)
    clock.advance(0.2)
    assert timer.is_due(1, config)
