"""Fault injection into real runs of the embedded model, with a table of the results.

python -m scripts.faults                      all campaigns, half an hour on two cores
python -m scripts.faults kills folders        some of: kills, processes, mutations, folders, sweep,
                                              launches, refusals
python -m scripts.faults --to docs/results/faults.md  also write the table into this file
"""

import argparse
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.progress import Progress

from sae_lora.config.serialize import load
from sae_lora.launcher.launch import launch
from sae_lora.launcher.plan import plan
from sae_lora.records.folder import RunFolder
from sae_lora.records.status import State, read_statuses
from scripts.damaged_folders import attempts, commands
from tests.support.attempts import FORKS, Together, attempt, frozen, results
from tests.support.commands import REPOSITORY
from tests.support.damage import DAMAGE
from tests.support.points import folders_in, points_in
from tests.support.refusals import WRONG, fault_of, prepare

STEPS = 50
RUN = (
    "train.train_tokens=1600",
    "train.batch_size=1",
    "train.eval_every_tokens=320",
    "data.context_length=32",
    "data.validation_tokens=512",
    "lora.rank=2",
    "lora.dropout=0.2",
)
AT_ONCE = 2
"""Number of attempts at the same time, with a core each."""

_COMPOSING = threading.Lock()
"""Hydra composes one config at a time."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    fault: str
    """The fault and the expected result."""
    tried: int
    """Number of attempts."""
    passed: int
    """Number of attempts with the expected result."""
    detail: str = ""


# ---- attempts, each in its own process ----------------------------------------------------------


def _run_folder(home: Path, name: str, *overrides: str) -> RunFolder:
    """A run folder with a resolved config, ready to be executed."""
    with _COMPOSING:
        return frozen(home / name, *RUN, f"data.cache_dir={home}/cache", *overrides)


def _in_parallel(
    passes: Callable[[int], bool], numbers: range, title: str, progress: Progress
) -> list[bool]:
    """Make an attempt for each number, `AT_ONCE` at a time; return true for each that passes."""
    task = progress.add_task(title, total=len(numbers))

    def with_progress(number: int) -> bool:
        try:
            return passes(number)
        finally:
            progress.advance(task)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(with_progress, numbers))


# ---- kills --------------------------------------------------------------------------------------


def kills(home: Path, progress: Progress) -> list[Row]:
    """SIGKILL at every step, and at random moments of a run that saves after every step."""
    whole = _run_folder(home, "whole", "train.checkpoint_every_steps=7")
    started = time.monotonic()
    assert attempt(whole).returncode == 0
    duration = time.monotonic() - started
    expected = results(whole)

    def at_step(step: int) -> bool:
        folder = _run_folder(home, f"step-{step}", "train.checkpoint_every_steps=7")
        killed = attempt(folder, step=step, what=signal.SIGKILL.value).returncode == -signal.SIGKILL
        return killed and attempt(folder).returncode == 0 and results(folder) == expected

    generator = random.Random(0)
    moments = [generator.uniform(0.15, 1.0) for _ in range(100)]
    saving = []  # true if the kill left a half-written checkpoint

    def at_moment(number: int) -> bool:
        folder = _run_folder(home, f"moment-{number}", "train.checkpoint_every_steps=1")
        killed = attempt(folder, after_s=moments[number] * duration).returncode == -signal.SIGKILL
        saving.append(any(folder.checkpoints.glob(".step-*")))
        finished = attempt(folder).returncode == 0
        return finished and results(folder) == expected and (killed or folder.is_finished)

    of_steps = _in_parallel(at_step, range(1, STEPS + 1), "kills at steps", progress)
    of_moments = _in_parallel(at_moment, range(len(moments)), "kills at random moments", progress)
    return [
        Row(
            f"SIGKILL at every step of a {STEPS}-step run: the resumed run is bit-identical",
            len(of_steps),
            sum(of_steps),
        ),
        Row(
            "SIGKILL at a random moment: the resumed run is bit-identical",
            len(of_moments),
            sum(of_moments),
            f"{sum(saving)} of them left a half-written checkpoint",
        ),
    ]


# ---- several processes --------------------------------------------------------------------------


def processes(home: Path, progress: Progress) -> list[Row]:
    """One of several processes that share the batches dies, at a random step; the run goes on later."""
    shared = "train.batch_size=4", "train.train_tokens=6400", "train.checkpoint_every_steps=7"
    expected = {}
    for shard in (False, True):
        whole = _run_folder(home, f"whole-{shard}", *shared)
        code, output = Together([whole], 2, shard=shard).ended()
        assert code == 0, output
        expected[shard] = results(whole)
    generator = random.Random(2)
    faults = [
        (shard, who, generator.randrange(3, STEPS - 5))
        for shard in (False, True)
        for who in ("leader", "follower", "agent", "stop")
        for _ in range(3)
    ]
    saved = []  # true if a living leader has saved the step that it had reached

    def survives(number: int) -> bool:
        shard, who, step = faults[number]
        folder = _run_folder(home, f"dies-{number}", *shared)
        pack = Together([folder], 2, shard=shard)
        while pack.is_alive and _step(folder) < step:
            time.sleep(0.02)
        leader, follower = pack.members
        kill = {"leader": leader.kill, "follower": follower.kill, "agent": pack.kill}
        kill.get(who, lambda: pack.send_signal(signal.SIGUSR2))()
        failed, _ = pack.ended()
        reached = _step(folder)
        code, output = Together([folder], 2, shard=shard).ended()
        resumed = re.search(r"resuming from step (\d+)", output)
        if who != "leader":
            saved.append(resumed is not None and int(resumed[1]) >= reached)
        return failed != 0 and code == 0 and results(folder) == expected[shard]

    passed = _in_parallel(survives, range(len(faults)), "several processes", progress)
    return [
        Row(
            "two processes share the batches, in half of the cases also the model; one of them, or the "
            "process that started them, is killed, or all are stopped: the resumed run is bit-identical",
            len(passed),
            sum(passed),
        ),
        Row("the same, if the leader lives: it has saved its last step", len(saved), sum(saved)),
    ]


def _step(folder: RunFolder) -> int:
    progress = folder.read_progress()
    return 0 if progress is None else progress.step


# ---- damaged checkpoints ------------------------------------------------------------------------


def mutations(home: Path, progress: Progress) -> list[Row]:
    """Damage to the newest checkpoint is detected, and the checkpoint before it is used."""
    whole = _run_folder(home, "undamaged", "train.checkpoint_every_steps=7")
    assert attempt(whole).returncode == 0
    expected = results(whole)
    killed = _run_folder(home, "killed", "train.checkpoint_every_steps=7")
    assert attempt(killed, step=30, what=signal.SIGKILL.value).returncode == -signal.SIGKILL
    files = "tensors.safetensors", "state.json", "manifest.json"
    generator = random.Random(1)

    def truncated(name: str, share: float) -> Callable[[Path], None]:
        return lambda path: os.truncate(path / name, int(share * (path / name).stat().st_size))

    def flipped(name: str, share: float) -> Callable[[Path], None]:
        def flip(path: Path) -> None:
            content = bytearray((path / name).read_bytes())
            content[int(share * len(content))] ^= 1 << generator.randrange(8)
            (path / name).write_bytes(content)

        return flip

    def of_another_run(path: Path) -> None:
        values = json.loads((path / "manifest.json").read_text())
        values["run"] = "0" * 8
        (path / "manifest.json").write_text(json.dumps(values))

    def of_another_step(path: Path) -> None:
        shutil.rmtree(path)
        shutil.copytree(path.with_name("step-00000021"), path)

    def swapped(path: Path) -> None:
        for name in ("tensors.safetensors", "state.json"):
            shutil.copy(path.with_name("step-00000021") / name, path / name)

    def emptied(path: Path) -> None:
        for file in path.iterdir():
            file.unlink()

    damages: list[tuple[str, Callable[[Path], None]]] = [
        *(
            (f"{name} cut at {share:.0%}", truncated(name, share))
            for name in files
            for share in (0, 0.3, 0.6, 0.99)
        ),
        *(
            (f"{name} with a flipped bit at {share:.0%}", flipped(name, share))
            for name in files
            for share in (0, 0.2, 0.4, 0.6, 0.8, 0.99)
        ),
        *((f"{name} missing", lambda path, name=name: (path / name).unlink()) for name in files),
        ("of another run", of_another_run),
        ("of another step", of_another_step),
        ("tensors and state of an earlier step", swapped),
        ("an empty folder", emptied),
    ]

    def survives_damage(number: int) -> bool:
        damage = damages[number][1]
        folder = RunFolder(home / f"damaged-{number}" / killed.path.name)
        shutil.copytree(killed.path, folder.path)
        damage(folder.checkpoints / "step-00000028")
        ended = attempt(folder)
        printed = ended.stdout + ended.stderr
        resumed = "from step 21 of" in printed and "step-00000028" in printed and "not used" in printed
        return ended.returncode == 0 and resumed and results(folder) == expected

    def survives_full_disk(number: int) -> bool:
        """The disk is full at the next checkpoint, and has space at the next attempt."""
        folder = RunFolder(home / f"full-{number}" / killed.path.name)
        shutil.copytree(killed.path, folder.path)
        tensors = folder.checkpoints / "step-00000028/tensors.safetensors"
        free_bytes = tensors.stat().st_size * (number + 1) // 8
        failed = attempt(folder, largest_file=free_bytes).returncode == 1
        reported = folder.failure_message is not None
        return failed and reported and attempt(folder).returncode == 0 and results(folder) == expected

    of_damages = _in_parallel(survives_damage, range(len(damages)), "damage", progress)
    of_full_disks = _in_parallel(survives_full_disk, range(40 - len(damages)), "full disk", progress)
    missed = [damage for (damage, _), passed in zip(damages, of_damages, strict=True) if not passed]
    return [
        Row(
            "newest checkpoint cut, with a flipped bit, missing, empty or of another run: reported, the "
            "checkpoint before it is used",
            len(of_damages),
            sum(of_damages),
            "; ".join(missed),
        ),
        Row(
            "no space for a checkpoint: reported, the run resumes when there is space",
            len(of_full_disks),
            sum(of_full_disks),
        ),
    ]


# ---- damaged run folders ------------------------------------------------------------------------


def folders(home: Path, progress: Progress) -> list[Row]:
    """Every kind of damage to a finished run: all commands show it, and no launch counts it as done."""
    kinds = len(DAMAGE)
    task = progress.add_task("damaged run folders", total=kinds)
    wrong, counted = attempts(home, lambda: progress.advance(task))
    tried = kinds * len(commands("", ""))
    what = f"{kinds} kinds of damage to a finished run"
    of_commands = f"{what} × {tried // kinds} commands: shown, exit code 1, no traceback"
    of_launches = f"{what}: a launch neither runs it nor counts it as done"
    return [
        Row(of_commands, tried, tried - len(wrong), "; ".join(wrong)),
        Row(of_launches, kinds, kinds - len(counted), "; ".join(counted)),
    ]


# ---- a sweep with faulty runs -------------------------------------------------------------------

_FAULTY = """
import sys
if "sae_lora.run.execute" in sys.orig_argv:
    import os, signal, time
    import torch
    from sae_lora.train.train_state import TrainState
    KINDS = ["exception", "exit", "kill", "memory", "nan", "hang"]
    take_step = TrainState.take_step

    def stepping(training, batch):
        seed = training._config.seed
        if training.step == 3 and seed < 12:
            match KINDS[seed // 2]:
                case "exception":
                    raise ZeroDivisionError("injected")
                case "exit":
                    os._exit(17)
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "memory":
                    torch.empty(10**16)
                case "nan":
                    for weight in training.student.weights.values():
                        weight.data.fill_(float("nan"))
                case "hang":
                    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
                    time.sleep(3600)
        take_step(training, batch)

    TrainState.take_step = stepping
"""
_CAUSES = ("ZeroDivisionError: injected", "code 17", "SIGKILL", "memory", "is nan", "hangs")
"""Parts of the failure messages, in the order of `KINDS`."""


def sweep(home: Path, progress: Progress) -> list[Row]:
    """40 runs, 12 of them with faults of 6 kinds: the others finish, and each cause is reported."""
    task = progress.add_task("a sweep of 40 runs, three times", total=3)
    (home / "faulty").mkdir(parents=True)
    (home / "faulty/sitecustomize.py").write_text(_FAULTY)
    small = [f"output_dir={home}/outputs", f"data.cache_dir={home}/cache", "tracking=disabled"]
    seeds = ",".join(map(str, range(40)))
    command = [
        *(sys.executable, "launch.py", "-m", *RUN, *small),
        *("train.train_tokens=1280", f"train.seed={seeds}", f"launcher.max_parallel={AT_ONCE}"),
        # The shortest limit that is far longer than a run that does not hang.
        *("launcher.timeout_min=1", "launcher.signal_delay_s=10"),
    ]

    def launched(*overrides: str, faulty: bool) -> dict[int, tuple[str, int]]:
        """Launch the sweep; return the failure message and the number of starts of each seed."""
        path = f"{home}/faulty:" if faulty else ""
        variables = os.environ | {"PYTHONPATH": path + os.environ.get("PYTHONPATH", "")}
        subprocess.run(
            [*command, *overrides], cwd=REPOSITORY, env=variables, capture_output=True, check=False
        )
        progress.advance(task)
        return {
            load(folder.config.read_text()).train.seed: (
                folder.failure_message or "",
                sum(map(folder.log.read_text().count, ("loading model", "trains together with"))),
            )
            for folder in folders_in(home / "outputs")
        }

    first = launched(faulty=True)
    done = [status.state is State.done for status in read_statuses(folders_in(home / "outputs"))]
    reported = sum(_CAUSES[seed // 2] in first[seed][0] for seed in range(12))
    second = launched("launcher.retry_failed=true", faulty=False)
    again = sorted(seed for seed in second if second[seed][1] > first[seed][1])
    third = launched(faulty=False)
    causes = "; ".join(sorted({first[seed][0].splitlines()[0] for seed in range(12) if first[seed][0]}))
    return [
        Row("sweep of 40 runs, 12 with faults of 6 kinds: the other runs finish", 28, sum(done)),
        Row("causes reported (exception, exit, SIGKILL, memory, NaN, hang)", 12, reported, causes),
        Row(
            "launcher.retry_failed=true runs exactly the 12 failed runs",
            12,
            len(again) if again == list(range(12)) else 0,
        ),
        Row("a third launch runs nothing", 40, sum(third[seed][1] == second[seed][1] for seed in third)),
    ]


# ---- two launches at once -----------------------------------------------------------------------


def _launching(home: Path, ready: float) -> None:
    time.sleep(max(0, ready - time.time()))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        launch([points_in(home)("launcher.cpus_per_task=1")])


def launches(home: Path, progress: Progress) -> list[Row]:
    """Two launches of the same run at the same time: only one of them trains it."""
    task = progress.add_task("two launches at once", total=50)
    once = 0
    shifts = random.Random(2)
    for number in range(50):
        folder = home / f"launch-{number}"
        ready = time.time() + 1
        processes = [
            FORKS.Process(target=_launching, args=(folder, ready + shift))
            for shift in (0, shifts.choice((0, shifts.uniform(0, 12))))
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        (run,) = plan([points_in(folder)()]).runs
        log = run.folder.log.read_text()
        once += run.folder.is_finished and log.count("training ") == 1
        progress.advance(task)
    return [Row("two launches of the same run at the same time: it is trained once", 50, once)]


# ---- invalid commands ----------------------------------------------------------------------------


def refusals(home: Path, progress: Progress) -> list[Row]:
    """Commands that cannot work: each is refused with one clear message."""
    prepare(home)
    task = progress.add_task("invalid commands", total=len(WRONG))
    faults, seconds = [], []
    for command, words in WRONG:
        started = time.monotonic()
        faults.append(fault_of(command, words, home))
        seconds.append(time.monotonic() - started)
        progress.advance(task)
    rows = _full_output(home)
    commands = [command for command, _ in WRONG]
    wrong = [f"{command}: {fault}" for command, fault in zip(commands, faults, strict=True) if fault]
    quick = sum(taken < 3 for taken in seconds)
    median = sorted(seconds)[len(seconds) // 2]
    slow = dict(sorted(zip(seconds, commands, strict=True), reverse=True)[: len(WRONG) - quick])
    slowest = f"slowest {max(seconds):.1f} s, median {median:.1f} s"
    slowest += "".join(f"; {command}: {taken:.1f} s" for taken, command in slow.items())
    return [
        Row(
            "commands that cannot work: refused with one clear message",
            len(WRONG),
            faults.count(None),
            "; ".join(wrong),
        ),
        Row("the same commands: refused in less than 3 s", len(WRONG), quick, slowest),
        *rows,
    ]


def _full_output(home: Path) -> list[Row]:
    """A launch onto a full disk, if this user may mount one."""
    disk = home / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        return []
    try:
        fault = fault_of(f"output_dir={disk}", ["output_dir", "No space left on device"], home)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    return [
        Row("a full output folder: refused before anything runs", 1, int(fault is None), fault or "")
    ]


# ---- the table ----------------------------------------------------------------------------------

CAMPAIGNS = {
    "kills": kills,
    "processes": processes,
    "mutations": mutations,
    "folders": folders,
    "sweep": sweep,
    "launches": launches,
    "refusals": refusals,
}


_ABOVE = [
    "# Faults",
    "",
    "Results of injecting faults into real runs of the embedded model, by `python -m scripts.faults`.",
    "*Tried* is the number of attempts, *passed* the number of attempts with the expected result.",
    "",
]


def as_markdown(rows: list[Row]) -> str:
    """The page with the table."""
    lines = [*_ABOVE, "| fault and expected result | tried | passed | |", "|---|---:|---:|---|"]
    lines += [f"| {row.fault} | {row.tried} | {row.passed} | {row.detail} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the chosen campaigns; return 1 if an attempt did not pass."""
    parser = argparse.ArgumentParser(prog="python -m scripts.faults", description=__doc__)
    parser.add_argument("campaigns", nargs="*", help=f"some of {', '.join(CAMPAIGNS)}; default: all")
    parser.add_argument("--to", type=Path, help="file to write the table to")
    chosen = parser.parse_args()
    unknown = set(chosen.campaigns) - set(CAMPAIGNS)
    if unknown:
        parser.error(f"no such campaign: {', '.join(unknown)}")
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    rows = []
    with Progress() as progress:
        for name in chosen.campaigns or CAMPAIGNS:
            with TemporaryDirectory(prefix="faults-") as home:
                rows += CAMPAIGNS[name](Path(home), progress)
    table = as_markdown(rows)
    print("\n".join(table.splitlines()[len(_ABOVE) :]))
    if chosen.to is not None:
        chosen.to.write_text(table)
    return int(any(row.passed != row.tried for row in rows))


if __name__ == "__main__":
    sys.exit(main())
