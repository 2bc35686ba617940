"""Several processes train what one would, and go down and come back together."""

import contextlib
import os
import re
import signal
import subprocess
import sys
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
from tests.support.attempts import attempt, frozen, results
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import random_tokens, small_model
from tests.support.points import SMALL, points_in
from tests.support.submission import until
from tests.support.trainings import CONFIG, HELD_OUT, NO_IDS, fill, kl, training

MEASURED = "base_ce", "spliced_ce", "student_ce", "kl", "fvu", "l0", "top1_agreement"
SAES = [topk_sae(), jumprelu_sae()]
LONG = "train.train_tokens=12288", "train.checkpoint_every_steps=3", "lora.dropout=0.2"


def begun(folders: Sequence[RunFolder], processes: int) -> subprocess.Popen[str]:
    """An attempt that is under way."""
    options = [*(str(folder.path) for folder in folders), f"--processes-per-node={processes}"]
    return subprocess.Popen(
        [sys.executable, "-m", "sae_lora.common.lazy_imports", "sae_lora.run.execute", *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def followers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The followers of a job, as `psutil` names processes; a child that ends meanwhile is none."""
    found = []
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "sae_lora.run.worker" in " ".join(child.cmdline()):
                found.append(child)
    return found


def step_of(folder: RunFolder) -> int:
    progress = folder.read_progress()
    return 0 if progress is None else progress.step


def going_on_from(output: str) -> int:
    found = re.search(r"going on from step ([\d,]+)", output)
    assert found, output
    return int(found[1].replace(",", ""))


class Threads(ProcessGroup):
    """Workers that are threads of this process."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, brought: list[Any]) -> None:
        self.rank = rank
        self._size = size
        self._meeting = meeting
        self._brought = brought
        """By rank."""

    def shard(self, rows: Any) -> Any:
        return rows[self.rank :: self._size]

    def broadcast(self, what: object) -> None:
        self._exchange(what)

    def receive(self) -> Any:
        return self._exchange(None)[0]

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        all_of_them = self._exchange([tensor.clone() for tensor in tensors])
        for tensor, *parts in zip(tensors, *all_of_them, strict=True):
            tensor.copy_(torch.stack(parts).sum(0))

    def _exchange(self, what: object) -> list[Any]:
        self._brought[self.rank] = what
        self._meeting.wait(60)
        found = list(self._brought)
        self._meeting.wait(60)
        return found


@pytest.mark.parametrize("micro_batch", [None, 1])
def test_workers_train_what_one_does(micro_batch: int | None) -> None:
    """SAEs that adapters change the input of, parts that are unequal."""
    steps, size = 4, 2

    def packed(processes: ProcessGroup) -> DistillTrainer:
        model = small_model("gemma2")
        adapters = LoRAConfig(rank=2), LoRAConfig(rank=3, blocks="all")
        those = [
            training(model, sae, CONFIG, steps, one) for one, sae in zip(adapters, SAES, strict=True)
        ]
        comparison = Comparison(Head.of(model))  # of 10 sequences by 3: the last batch is one alone
        evaluate = Evaluator(model, HELD_OUT, NO_IDS, 3, comparison, processes=processes)
        return DistillTrainer(model, Isolation(those), evaluate, NO_IDS, kl(model), micro_batch)

    wide = [random_tokens(batch=3, length=16, seed=seed) for seed in range(steps)]
    alone = packed(ProcessGroup())
    expected = [point for _, point in alone.points(wide)]

    meeting, brought = threading.Barrier(size), [None] * size
    leader, follower = (Threads(rank, size, meeting, brought) for rank in range(size))
    led, follows = packed(leader), packed(follower)

    def follow() -> None:
        while (task := follower.receive()) is not None:
            follows.follow(task)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    found = [point for _, point in led.points(wide)]
    leader.broadcast(None)
    thread.join(60)
    # Rounding switches a latent at its threshold, and which of two equally likely tokens is first.
    a_few = 3 / HELD_OUT.numel()
    for point, theirs in zip(found, expected, strict=True):
        assert point.tokens == theirs.tokens
        for name in MEASURED:
            margin = {"abs": a_few} if name in ("l0", "top1_agreement") else {"rel": 1e-3}
            assert getattr(point, name) == pytest.approx(getattr(theirs, name), **margin), name
    for one, other, theirs in zip(led.active, alone.active, follows.active, strict=True):
        for name, weight in one.student.weights.items():
            torch.testing.assert_close(weight, other.student.weights[name], rtol=1e-3, atol=1e-4)
            assert torch.equal(weight, theirs.student.weights[name])


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """A pack whose batches do not divide, with an SAE that adapters change the input of."""
    overrides = ["train.batch_size=5", "train.train_tokens=1920", "train.micro_batch_size=2"]
    others = "lora.rank=3 lora.blocks=all layer.index=[2,5]".split(), ["sae.l0=8"]
    made: dict[str, list[RunFolder]] = {}
    for home in ("one", "two"):
        point = points_in(tmp_path / home)
        cache = f"data.cache_dir={tmp_path}/cache"
        runs = plan([point(cache, *overrides, *other) for other in others]).runs
        for planned in runs:
            planned.freeze()
        made[home] = [planned.folder for planned in runs]
    assert attempt(*made["one"]).returncode == 0
    code, output = ended(begun(made["two"], 2))
    assert code == 0, output
    for one, two in zip(made["one"], made["two"], strict=True):
        for point_of_one, point_of_two in zip(one.read_curve(), two.read_curve(), strict=True):
            assert point_of_two.tokens == point_of_one.tokens
            for name in MEASURED:
                expected = getattr(point_of_one, name)
                assert getattr(point_of_two, name) == pytest.approx(expected, rel=1e-4), name
            if point_of_one.train_loss is not None:
                assert point_of_two.train_loss == pytest.approx(point_of_one.train_loss, rel=1e-4)
        weights, expected = (load_file(run.adapter / "adapter_model.safetensors") for run in (two, one))
        apart = sum(float((weights[name] - expected[name]).square().sum()) for name in expected)
        moved = sum(float(value.square().sum()) for name, value in expected.items() if "lora_B" in name)
        assert apart < 1e-4 * moved


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return frozen(tmp_path, *SMALL[1:-1], *LONG)


@pytest.mark.slow
def test_stopped_they_go_on_as_if_they_had_not(folder: RunFolder, tmp_path: Path) -> None:
    """Also what dropout hits in each of them is the same."""
    whole = frozen(tmp_path / "whole", *SMALL[1:-1], *LONG, f"data.cache_dir={tmp_path}/cache")
    code, output = ended(begun([whole], 2))
    assert code == 0, output
    process = begun([folder], 2)
    until(lambda: step_of(folder) >= 5, "step 5")
    process.send_signal(signal.SIGUSR2)
    for one in followers(process):  # a terminal, or SLURM, would tell them too
        with contextlib.suppress(psutil.NoSuchProcess):  # it has gone already, told by the first
            one.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == EXIT_INTERRUPTED, output
    code, output = ended(begun([folder], 2))
    assert code == 0, output
    assert "going on from step" in output
    assert results(folder) == results(whole)


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["follower", "leader"])
def test_none_of_them_is_left_where_one_dies(folder: RunFolder, dies: str) -> None:
    process = begun([folder], 3)
    until(lambda: step_of(folder) >= 4, "step 4")
    others = followers(process)
    assert len(others) == 2
    (process if dies == "leader" else others[0]).send_signal(signal.SIGKILL)
    code, output = ended(process)
    if dies == "follower":
        assert code == EXIT_NOT_TOGETHER, output
        assert "a process that shares the batches (exit code -9)" in output.strip().splitlines()[-1]
    _, alive = psutil.wait_procs(others, timeout=30)
    assert not alive
    assert not folder.has_failed
    reached = step_of(folder)
    found = attempt(folder)  # alone, from the checkpoint that there is
    assert found.returncode == 0, found.stderr
    kept = going_on_from(found.stdout)
    assert kept >= reached if dies == "follower" else kept >= 3  # what the leader has, it saves


@pytest.mark.slow
@pytest.mark.parametrize("when", ["while they start", "while they train"])
def test_asked_to_stop_while_others_are_killed(folder: RunFolder, when: str) -> None:
    """As `scancel` ends a job of several nodes: it has not failed, and goes on."""
    process = begun([folder], 2)
    trains = when == "while they train"
    until(lambda: step_of(folder) >= 4 if trains else followers(process), when)
    (other,) = followers(process)
    other.send_signal(signal.SIGTERM)  # which it does not hear
    process.send_signal(signal.SIGTERM)
    if trains:
        other.kill()
    code, output = ended(process)
    assert code == EXIT_INTERRUPTED, output
    assert not folder.has_failed
    if trains:
        reached = step_of(folder)
        found = attempt(folder)
        assert found.returncode == 0, found.stderr
        assert going_on_from(found.stdout) >= reached


def test_processes_drop_inputs_of_their_own() -> None:
    model = small_model("llama")
    adapters = LoRAConfig(rank=2, dropout=0.5)
    one, other = (training(model, SAES[0], adapters=adapters) for _ in range(2))
    for each in (one, other):
        fill(each.student.weights)
    trunk = Trunk(model, random_tokens(batch=1, length=16, seed=0), NO_IDS, one.student.cuts)

    def found(training: TrainState, rank: int) -> Tensor:
        training.seed_rank(rank)
        (states,) = training.hidden(trunk)
        return states.detach()

    assert torch.equal(found(one, 1), found(other, 1))
    assert not torch.equal(found(one, 1), found(one, 2))


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
