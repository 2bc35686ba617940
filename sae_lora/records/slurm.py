"""Jobs and partitions of SLURM, through its command line programs."""

import getpass
import subprocess
from collections.abc import Collection, Sequence
from pathlib import Path

from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.common.secrets import redacted

JOB_NAME = "sae_lora-"
"""The beginning of the names of this program's jobs."""
_TIMEOUT_S = 60


class UnreachableError(UserError):
    """SLURM does not exist on this machine, or does not answer."""


def queue() -> dict[str, str]:
    """States of this user's jobs in the queue, by number: `12`, or `12_3` in an array.

    Raises:
        UnreachableError: If SLURM does not answer.
    """
    selection = ["--all", "--array", "--user", getpass.getuser()]
    lines = _output(["squeue", "--noheader", *selection, "--format", "%i %T %j"]).splitlines()
    jobs = (line.split(maxsplit=2) for line in lines)
    return {number: state for number, state, name in jobs if name.startswith(JOB_NAME)}


def ends(jobs: Collection[str]) -> dict[str, str]:
    """Final states (such as `NODE_FAIL`) of jobs that left the queue, if SLURM's accounting has them."""
    if not jobs:
        return {}
    ids = ",".join(sorted({job.split("_")[0] for job in jobs}))
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format", "JobID,State"]
    try:
        lines = _output([*command, "--jobs", ids]).splitlines()
    except UserError:  # some clusters have no accounting
        return {}
    states = dict(line.split("|", 1) for line in lines)
    return {job: states[job].split()[0] for job in jobs if job in states}


def last_message(sweep: Path, job: str) -> str | None:
    """The last line that a job printed outside its runs, such as why its node could not start it.

    `None` without one. `sweep` is the folder of the job's runs, in which submitit writes its logs.
    """
    for file in sorted(sweep.glob(f".submitit/*/{job}_*_log.err"), reverse=True):
        if lines := file.read_text(errors="replace").split("\n"):
            return next((redacted(line.strip()) for line in reversed(lines) if line.strip()), None)
    return None


def cancel(jobs: Sequence[str]) -> None:
    """Cancel the jobs, also running ones.

    Raises:
        UserError: If SLURM does not answer, or refuses.
    """
    for start in range(0, len(jobs), 500):  # the length of a command line is limited
        _output(["scancel", *jobs[start : start + 500]])


def check_partition(partition: str | None) -> None:
    """Refuse a partition that the cluster does not have.

    Raises:
        ConfigError: If a partition does not exist. The message lists the existing ones.
        UnreachableError: If SLURM does not answer.
    """
    known = sorted(set(_output(["sinfo", "--all", "--noheader", "--format", "%R"]).split()))
    unknown = set((partition or "").split(",")) - {"", *known}
    if unknown:
        nearest = nearest_name(min(unknown), known)
        raise ConfigError("launcher.partition", partition, f"one of {listed(known, 30)}", nearest)


def _output(command: list[str]) -> str:
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise UnreachableError(f"there is no SLURM on this machine (no `{command[0]}`)") from None
    except subprocess.TimeoutExpired:
        raise UnreachableError(f"SLURM does not answer (`{command[0]}`, {_TIMEOUT_S} s)") from None
    if finished.returncode != 0:
        raise UnreachableError(f"SLURM: {finished.stderr.strip()}")
    return finished.stdout
