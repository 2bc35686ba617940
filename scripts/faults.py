"""A campaign of faults against real runs of the embedded default, with a table of what came of each.

python -m scripts.faults                      everything, half an hour on two cores
python -m scripts.faults kills mutations      some of: kills, mutations, sweep, launches, refusals
python -m scripts.faults --to docs/results/faults.md  writes the table there, too
"""

import argparse
import contextlib
import io
import json
import os
import random
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
from tests.support.attempts import FORKS, attempt, frozen, results
from tests.support.commands import REPOSITORY
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
"""Attempts at the same time, a core each."""

_COMPOSING = threading.Lock()
"""Hydra composes one config at a time."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    tried: int
    held: int
    detail: str = ""


# ---- attempts, each a process of its own --------------------------------------------------------


def _copies(home: Path, name: str, *overrides: str) -> RunFolder:
    with _COMPOSING:
        return frozen(home / name, *RUN, f"data.cache_dir={home}/cache", *overrides)


def _all_at_once(
    attempted: Callable[[int], bool], numbers: range, what: str, progress: Progress
) -> list[bool]:
    task = progress.add_task(what, total=len(numbers))

    def advancing(number: int) -> bool:
        try:
            return attempted(number)
        finally:
            progress.advance(task)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        return list(threads.map(advancing, numbers))


# ---- kills --------------------------------------------------------------------------------------


def kills(home: Path, progress: Progress) -> list[Row]:
    """SIGKILL at every step, and at random moments of a run that mostly saves."""
    whole = _copies(home, "whole", "train.checkpoint_every_steps=7")
    started = time.monotonic()
    assert attempt(whole).returncode == 0
    duration = time.monotonic() - started
    expected = results(whole)

    def at_step(step: int) -> bool:
        folder = _copies(home, f"step-{step}", "train.checkpoint_every_steps=7")
        killed = attempt(folder, step=step, what=signal.SIGKILL.value).returncode == -signal.SIGKILL
        return killed and attempt(folder).returncode == 0 and results(folder) == expected

    random_moments = random.Random(0)
    moments = [random_moments.uniform(0.15, 1.0) for _ in range(100)]
    saving = []

    def at_moment(number: int) -> bool:
        folder = _copies(home, f"moment-{number}", "train.checkpoint_every_steps=1")
        killed = attempt(folder, after_s=moments[number] * duration).returncode == -signal.SIGKILL
        saving.append(any(folder.checkpoints.glob(".step-*")))
        ended = attempt(folder).returncode == 0
        return ended and results(folder) == expected and (killed or folder.is_finished)

    steps = _all_at_once(at_step, range(1, STEPS + 1), "kills at steps", progress)
    randomly = _all_at_once(at_moment, range(len(moments)), "random kills", progress)
    return [
        Row(
            f"SIGKILL at every step of a {STEPS}-step run: the resumed run is bit-identical",
            len(steps),
            sum(steps),
        ),
        Row(
            "SIGKILL at a random moment: the resumed run is bit-identical",
            len(randomly),
            sum(randomly),
            f"{sum(saving)} of them left a half-written checkpoint",
        ),
    ]


# ---- damaged checkpoints ------------------------------------------------------------------------


def mutations(home: Path, progress: Progress) -> list[Row]:
    """Damage to the newest checkpoint is noticed, and the one before is used."""
    whole = _copies(home, "unharmed", "train.checkpoint_every_steps=7")
    assert attempt(whole).returncode == 0
    expected = results(whole)
    killed = _copies(home, "killed", "train.checkpoint_every_steps=7")
    assert attempt(killed, step=30, what=signal.SIGKILL.value).returncode == -signal.SIGKILL
    files = "tensors.safetensors", "state.json", "manifest.json"
    share = random.Random(1)

    def truncated(name: str, part: float) -> Callable[[Path], None]:
        return lambda path: os.truncate(path / name, int(part * (path / name).stat().st_size))

    def flipped(name: str, part: float) -> Callable[[Path], None]:
        def flip(path: Path) -> None:
            content = bytearray((path / name).read_bytes())
            content[int(part * len(content))] ^= 1 << share.randrange(8)
            (path / name).write_bytes(content)

        return flip

    def foreign(path: Path) -> None:
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
            (f"{name} cut at {part:.0%}", truncated(name, part))
            for name in files
            for part in (0, 0.3, 0.6, 0.99)
        ),
        *(
            (f"{name}: a bit at {part:.0%}", flipped(name, part))
            for name in files
            for part in (0, 0.2, 0.4, 0.6, 0.8, 0.99)
        ),
        *((f"{name} missing", lambda path, name=name: (path / name).unlink()) for name in files),
        ("a foreign run's", foreign),
        ("another step's", of_another_step),
        ("tensors and state of the step before", swapped),
        ("an empty folder", emptied),
    ]

    def damaged(number: int) -> bool:
        damage = damages[number][1]
        folder = RunFolder(home / f"damaged-{number}" / killed.path.name)
        shutil.copytree(killed.path, folder.path)
        damage(folder.checkpoints / "step-00000028")
        folder.log.unlink()
        ended = attempt(folder).returncode == 0
        said = folder.log.read_text()
        went_on = "going on from step 21 of" in said and "step-00000028" in said and "not used" in said
        return ended and went_on and results(folder) == expected

    def full(number: int) -> bool:
        """The disk has no room for the next checkpoint; later it has."""
        folder = RunFolder(home / f"full-{number}" / killed.path.name)
        shutil.copytree(killed.path, folder.path)
        tensors = folder.checkpoints / "step-00000028/tensors.safetensors"
        room = tensors.stat().st_size * (number + 1) // 8
        refused = attempt(folder, largest_file=room).returncode == 1
        named = folder.failure_message is not None
        return refused and named and attempt(folder).returncode == 0 and results(folder) == expected

    noticed = _all_at_once(damaged, range(len(damages)), "damage", progress)
    room = _all_at_once(full, range(40 - len(damages)), "full disk", progress)
    missed = [what for (what, _), held in zip(damages, noticed, strict=True) if not held]
    return [
        Row(
            "newest checkpoint cut, flipped, missing, empty or foreign: named, the one before used",
            len(noticed),
            sum(noticed),
            "; ".join(missed),
        ),
        Row(
            "no room for a checkpoint: named, nothing lost, goes on when there is room",
            len(room),
            sum(room),
        ),
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
                    raise ZeroDivisionError("befallen")
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
_CAUSES = ("ZeroDivisionError: befallen", "exit code 17", "SIGKILL", "memory", "is nan", "hangs")


def sweep(home: Path, progress: Progress) -> list[Row]:
    """40 runs, 12 of them faulty in 6 ways: the others complete, and each cause has its name."""
    task = progress.add_task("a sweep of 40 runs, three times", total=3)
    (home / "faulty").mkdir(parents=True)
    (home / "faulty/sitecustomize.py").write_text(_FAULTY)
    small = [f"output_dir={home}/outputs", f"data.cache_dir={home}/cache", "tracking=disabled"]
    seeds = ",".join(map(str, range(40)))
    command = [
        *(sys.executable, "launch.py", "-m", *RUN, *small),
        *("train.train_tokens=1280", f"train.seed={seeds}", f"launcher.max_parallel={AT_ONCE}"),
        # The shortest limit that runs which do not hang stay far below.
        *("launcher.timeout_min=1", "launcher.signal_delay_s=10"),
    ]

    def launched(*more: str, faulty: bool) -> dict[int, tuple[str, int]]:
        path = f"{home}/faulty:" if faulty else ""
        variables = os.environ | {"PYTHONPATH": path + os.environ.get("PYTHONPATH", "")}
        subprocess.run(
            [*command, *more], cwd=REPOSITORY, env=variables, capture_output=True, check=False
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
    named = sum(_CAUSES[seed // 2] in first[seed][0] for seed in range(12))
    second = launched("launcher.retry_failed=true", faulty=False)
    again = sorted(seed for seed in second if second[seed][1] > first[seed][1])
    third = launched(faulty=False)
    causes = "; ".join(sorted({first[seed][0].splitlines()[0] for seed in range(12) if first[seed][0]}))
    return [
        Row("sweep of 40 runs, 12 faulty of 6 kinds: good runs complete", 28, sum(done)),
        Row("causes named (exception, exit, SIGKILL, memory, NaN, hang)", 12, named, causes),
        Row(
            "launcher.retry_failed=true runs exactly the 12",
            12,
            len(again) if again == list(range(12)) else 0,
        ),
        Row("a third launch runs none", 40, sum(third[seed][1] == second[seed][1] for seed in third)),
    ]


# ---- two launches at once -----------------------------------------------------------------------


def _launching(home: Path, ready: float) -> None:
    time.sleep(max(0, ready - time.time()))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        launch([points_in(home)("launcher.cpus_per_task=1")])


def launches(home: Path, progress: Progress) -> list[Row]:
    """Two launches of the same run at the same time: one of them trains it."""
    task = progress.add_task("two launches at once", total=50)
    once = 0
    shifts = random.Random(2)
    for number in range(50):
        place = home / f"launch-{number}"
        ready = time.time() + 1
        processes = [
            FORKS.Process(target=_launching, args=(place, ready + shift))
            for shift in (0, shifts.choice((0, shifts.uniform(0, 12))))
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        (run,) = plan([points_in(place)()]).runs
        log = run.folder.log.read_text()
        once += run.folder.is_finished and log.count("training ") == 1
        progress.advance(task)
    return [Row("two launches of the same run at once: it is trained once", 50, once)]


# ---- bad input -----------------------------------------------------------------------------------


def refusals(home: Path, progress: Progress) -> list[Row]:
    """Commands that cannot work: each refused in one clear message."""
    prepare(home)
    task = progress.add_task("bad input", total=len(WRONG))
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
    slowest = f"the slowest in {max(seconds):.1f} s, the median in {median:.1f} s"
    return [
        Row(
            "commands that cannot work: refused in one clear message",
            len(WRONG),
            faults.count(None),
            "; ".join(wrong),
        ),
        Row("the same, in less than 3 s", len(WRONG), quick, slowest),
        *rows,
    ]


def _full_output(home: Path) -> list[Row]:
    """A disk without room, where this user may mount one."""
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
    "mutations": mutations,
    "sweep": sweep,
    "launches": launches,
    "refusals": refusals,
}


_ABOVE = [
    "# Faults",
    "",
    "What came of killing, damaging, starving and doubling real runs of the embedded default, as",
    "`python -m scripts.faults` finds it. *Tried* is how often, *held* how often all was as it must be.",
    "",
]


def as_markdown(rows: list[Row]) -> str:
    """The table as a page."""
    lines = [*_ABOVE, "| fault | tried | held | |", "|---|---:|---:|---|"]
    lines += [f"| {row.what} | {row.tried} | {row.held} | {row.detail} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Runs the campaigns that are named; returns 1 where something did not hold."""
    parser = argparse.ArgumentParser(prog="python -m scripts.faults", description=__doc__)
    parser.add_argument(
        "campaigns", nargs="*", help=f"of {', '.join(CAMPAIGNS)}; all of them where none is named"
    )
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
    return int(any(row.held != row.tried for row in rows))


if __name__ == "__main__":
    sys.exit(main())
