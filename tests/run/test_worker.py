"""Several processes give the results of one process, and stop, fail and resume together."""

import contextlib
import re
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_lora.common.errors import EXIT_INTERRUPTED, EXIT_NOT_TOGETHER, ConfigError
from sae_lora.common.isolation import Isolation
from sae_lora.config.schema import LoRAConfig
from sae_lora.launcher.plan import plan
from sae_lora.records.folder import RunFolder
from sae_lora.splice.head import Head
from sae_lora.splice.kl import Comparison
from sae_lora.splice.trunk import Trunk
from sae_lora.train.distill import DistillTrainer
from sae_lora.train.distributed import ProcessGroup
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.train_state import TrainState
from tests.support.attempts import Together, attempt, frozen, results
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import random_tokens, small_model
from tests.support.points import SMALL, points_in
from tests.support.submission import until
from tests.support.trainings import CONFIG, HELD_OUT, fill, kl, training

MEASURED = "base_ce", "spliced_ce", "student_ce", "kl", "fvu", "l0", "top1_agreement"
SAES = [topk_sae(), jumprelu_sae()]
LONG = (
    *("train.train_tokens=12288", "train.checkpoint_every_steps=3", "lora.dropout=0.2"),
    "train.eval_every_tokens=6144",
)


def step_of(folder: RunFolder) -> int:
    progress = folder.read_progress()
    return 0 if progress is None else progress.step


def first_step(output: str) -> int:
    """The step from which an attempt has resumed, by its output."""
    match = re.search(r"resuming from step ([\d,]+)", output)
    assert match, output
    return int(match[1].replace(",", ""))


class Threads(ProcessGroup):
    """A process group whose members are threads of this process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, messages: list[Any]) -> None:
        self.rank = rank
        self._size = size
        self._barrier = barrier
        self._messages = messages
        """The message of each rank."""

    def shard(self, rows: Any) -> Any:
        return rows[self.rank :: self._size]

    def broadcast(self, message: object) -> None:
        self._exchange(message)

    def receive(self) -> Any:
        return self._exchange(None)[0]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        gathered = self._exchange([tensor.clone() for tensor in tensors])
        for tensor, *parts in zip(tensors, *gathered, strict=True):
            tensor.copy_(torch.stack(parts).sum(0))

    def _exchange(self, message: object) -> list[Any]:
        self._messages[self.rank] = message
        self._barrier.wait(60)
        messages = list(self._messages)
        self._barrier.wait(60)
        return messages


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch", [None, 1])
def test_two_ranks_train_like_one_process(micro_batch: int | None) -> None:
    """Adapters change the inputs of the SAEs, and the shards of a batch have different sizes."""
    steps, size = 4, 2

    def packed(processes: ProcessGroup) -> DistillTrainer:
        model = small_model("gemma2")
        adapters = LoRAConfig(rank=2), LoRAConfig(rank=3, blocks="all")
        trainings = [
            training(model, sae, CONFIG, steps, lora) for lora, sae in zip(adapters, SAES, strict=True)
        ]
        comparison = Comparison(Head.of(model))
        # 10 sequences in batches of 3: the last batch has only one sequence.
        evaluate = Evaluator(model, HELD_OUT, 3, comparison, processes=processes)
        return DistillTrainer(model, Isolation(trainings), evaluate, kl(model), micro_batch)

    batches = [random_tokens(batch=3, length=16, seed=seed) for seed in range(steps)]
    alone = packed(ProcessGroup())
    expected = [point for _, point in alone.points(batches)]

    barrier, messages = threading.Barrier(size), [None] * size
    leader, worker = (Threads(rank, size, barrier, messages) for rank in range(size))
    leader_trainer, worker_trainer = packed(leader), packed(worker)

    def follow() -> None:
        while (task := worker.receive()) is not None:
            worker_trainer.follow(task)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    points = [point for _, point in leader_trainer.points(batches)]
    leader.broadcast(None)
    thread.join(60)
    # Rounding can switch a latent at its threshold, and the order of two equally likely tokens.
    tolerance = 3 / HELD_OUT.numel()
    for point, expected_point in zip(points, expected, strict=True):
        assert point.tokens == expected_point.tokens
        for name in MEASURED:
            margin = {"abs": tolerance} if name in ("l0", "top1_agreement") else {"rel": 1e-3}
            value = getattr(expected_point, name)
            assert getattr(point, name) == pytest.approx(value, **margin), name
    trainers = leader_trainer, worker_trainer, alone
    for trainings in zip(*(trainer.active for trainer in trainers), strict=True):
        leading, working, single = (training.student.weights for training in trainings)
        for name, weight in leading.items():
            torch.testing.assert_close(weight, single[name], rtol=1e-3, atol=1e-4)
            assert torch.equal(weight, working[name])


def trained_both_ways(
    home: Path, overrides: Sequence[str], variants: Sequence[Sequence[str]], **options: bool
) -> list[list[RunFolder]]:
    """The runs, trained in one process, and in two with these options of `Together`."""
    both: list[list[RunFolder]] = []
    for name in ("one", "two"):
        point = points_in(home / name)
        cache = f"data.cache_dir={home}/cache"
        runs = plan([point(cache, *overrides, *variant) for variant in variants]).runs
        for planned in runs:
            planned.freeze()
        both.append([planned.folder for planned in runs])
    assert attempt(*both[0]).returncode == 0
    code, output = Together(both[1], 2, **options).ended()
    assert code == 0, output
    return both


@pytest.mark.slow
def test_two_processes_train_like_one_process(tmp_path: Path) -> None:
    """Batches do not divide evenly, and adapters change the input of an SAE."""
    overrides = ["train.batch_size=5", "train.train_tokens=1920", "train.micro_batch_size=2"]
    variants = "lora.rank=3 lora.blocks=all layer.index=[2,5]".split(), ["sae.l0=8"]
    alone, together = trained_both_ways(tmp_path, overrides, variants, forked=False)
    for single, shared in zip(alone, together, strict=True):
        for expected_point, point in zip(single.read_curve(), shared.read_curve(), strict=True):
            assert point.tokens == expected_point.tokens
            for name in MEASURED:
                value = getattr(expected_point, name)
                assert getattr(point, name) == pytest.approx(value, rel=1e-4), name
            if expected_point.train_loss is not None:
                assert point.train_loss == pytest.approx(expected_point.train_loss, rel=1e-4)
        weights, expected = (
            load_file(run.adapter / "adapter_model.safetensors") for run in (shared, single)
        )
        error = sum(float((weights[name] - expected[name]).square().sum()) for name in expected)
        change = sum(float(value.square().sum()) for name, value in expected.items() if "lora_B" in name)
        assert error < 1e-4 * change


@pytest.mark.slow
def test_processes_that_divide_the_model_train_like_one(tmp_path: Path) -> None:
    """Also with an uneven number of held-out batches, adapters before the SAE, and recomputed blocks."""
    overrides = [
        "train.activation_checkpointing=true",
        *("train.batch_size=4", "train.train_tokens=1536", "train.eval_batch_tokens=128"),
        *("train.micro_batch_size=1", "data.validation_tokens=896"),
    ]
    variants = "lora.rank=3 lora.blocks=all".split(), ["sae.l0=8", "lora.init=svd"]
    alone, together = trained_both_ways(tmp_path, overrides, variants, shard=True)
    for single, divided in zip(alone, together, strict=True):
        for expected_point, point in zip(single.read_curve(), divided.read_curve(), strict=True):
            for name in MEASURED:
                value = getattr(expected_point, name)
                assert getattr(point, name) == pytest.approx(value, rel=1e-4), name


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return frozen(tmp_path, *SMALL[1:-1], *LONG)


@pytest.mark.slow
def test_stopped_processes_resume_with_the_same_results(folder: RunFolder, tmp_path: Path) -> None:
    """Dropout in each process is also the same."""
    whole = frozen(tmp_path / "whole", *SMALL[1:-1], *LONG, f"data.cache_dir={tmp_path}/cache")
    code, output = Together([whole], 2).ended()
    assert code == 0, output
    processes = Together([folder], 2)
    until(lambda: step_of(folder) >= 5, "step 5")
    processes.send_signal(signal.SIGUSR2)
    for member in processes.members[1:]:  # SLURM may signal them too
        with contextlib.suppress(psutil.NoSuchProcess):  # it may have ended already
            member.send_signal(signal.SIGTERM)
    code, output = processes.ended()
    assert code == EXIT_INTERRUPTED, output
    code, output = Together([folder], 2).ended()
    assert code == 0, output
    assert "resuming from step" in output
    assert results(folder) == results(whole)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["a follower", "the process that started them"])
def test_all_processes_end_if_one_dies(folder: RunFolder, dies: str) -> None:
    processes = Together([folder], 3)
    until(lambda: step_of(folder) >= 4, "step 4")
    members = processes.members
    assert len(members) == 3
    (members[1].kill if dies == "a follower" else processes.kill)()
    code, output = processes.ended()
    _, alive = psutil.wait_procs(members, timeout=60)
    assert not alive
    if dies == "the process that started them":
        assert code == -signal.SIGKILL
    else:
        assert code == EXIT_NOT_TOGETHER, output
        # With forked processes, torch's agent tells only one of the exit codes.
        assert re.search(
            r"process that shares the batches (\(exit code -9\)|has ended)$", output.strip()
        )
    assert not folder.has_failed and folder.stop_message is None
    last_step = step_of(folder)
    finished = attempt(folder)  # in one process, from the newest checkpoint
    assert finished.returncode == 0, finished.stderr
    resumed = first_step(finished.stdout)
    assert (
        resumed >= 3 if dies == "the leader" else resumed >= last_step
    )  # a living leader saves its state


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while they start", "while they train"])
def test_a_job_stops_while_its_processes_are_killed(folder: RunFolder, when: str) -> None:
    """As when `scancel` ends a job of several nodes: the run has not failed, and resumes."""
    processes = Together([folder], 2)
    trains = when == "while they train"
    until(lambda: step_of(folder) >= 4 if trains else len(processes.members) == 2, when)
    _, follower = processes.members
    follower.send_signal(signal.SIGTERM)  # ignored by followers
    processes.send_signal(signal.SIGTERM)
    if trains:
        follower.kill()
    code, output = processes.ended()
    assert code == EXIT_INTERRUPTED, output
    assert not folder.has_failed
    if trains:
        last_step = step_of(folder)
        finished = attempt(folder)
        assert finished.returncode == 0, finished.stderr
        assert first_step(finished.stdout) >= last_step


@pytest.mark.slow
def test_a_divided_model_is_stopped_and_killed_without_loss(folder: RunFolder, tmp_path: Path) -> None:
    """A stop, then the death of a follower; each time the run goes on where it was."""
    whole = frozen(tmp_path / "whole", *SMALL[1:-1], *LONG, f"data.cache_dir={tmp_path}/cache")
    code, output = Together([whole], 2, shard=True).ended()
    assert code == 0, output
    processes = Together([folder], 2, shard=True)
    until(lambda: step_of(folder) >= 5, "step 5")
    processes.send_signal(signal.SIGUSR2)
    code, output = processes.ended()
    assert code == EXIT_INTERRUPTED, output
    stopped = step_of(folder)
    processes = Together([folder], 2, shard=True)
    until(lambda: step_of(folder) >= stopped + 3, "three more steps")
    processes.members[1].kill()
    code, output = processes.ended()
    assert code == EXIT_NOT_TOGETHER, output
    assert first_step(output) >= 5
    code, output = Together([folder], 2, shard=True).ended()
    assert code == 0, output
    assert first_step(output) >= stopped + 3
    assert results(folder) == results(whole)


@pytest.mark.slow
def test_a_finished_run_needs_no_processes(folder: RunFolder) -> None:
    assert attempt(folder).returncode == 0
    code, output = Together([folder], 2).ended()
    assert code == 0, output


def test_dropout_differs_between_processes() -> None:
    model = small_model("llama")
    adapters = LoRAConfig(rank=2, dropout=0.5)
    first, second = (training(model, SAES[0], adapters=adapters) for _ in range(2))
    for state in (first, second):
        fill(state.student.weights)
    trunk = Trunk(model, random_tokens(batch=1, length=16, seed=0), first.student.cuts)

    def hidden(training: TrainState, rank: int) -> Tensor:
        training.seed_rank(rank)
        (states,) = training.hidden(trunk)
        return states.detach()

    assert torch.equal(hidden(first, 1), hidden(second, 1))
    assert not torch.equal(hidden(first, 1), hidden(first, 2))


def test_every_process_needs_a_sequence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size = 4 .*\n.* 6 processes"):
        points_in(tmp_path)("launcher=slurm", "launcher.nodes=2", "launcher.gpus_per_node=3")
    with pytest.raises(ConfigError, match=r"launcher\.nodes = 2"):
        points_in(tmp_path)("launcher.nodes=2")


def test_every_process_needs_a_gpu(tmp_path: Path) -> None:
    three = "launcher=slurm", "launcher.processes_per_node=3"
    with pytest.raises(ConfigError, match=r"launcher\.processes_per_node = 3 .*\n.* at most 1"):
        points_in(tmp_path)(*three)
    points_in(tmp_path)(*three, "train.device=cpu")
    points_in(tmp_path)(*three, "launcher.gpus_per_node=0")
