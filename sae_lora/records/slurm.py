"""Jobs and partitions of SLURM, through its own commands."""

import getpass
import subprocess
from collections.abc import Collection, Sequence

from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name

JOB_NAME = "sae_lora-"
"""The beginning of the names of our jobs."""
_TIMEOUT_S = 60


class UnreachableError(UserError):
    """There is no SLURM on this machine, or it does not answer."""


def queue() -> dict[str, str]:
    """Our jobs of this user that wait or run: state by number, `12`, or `12_3` in an array.

    Raises:
        UnreachableError: Where SLURM cannot be asked.
    """
    whose = ["--all", "--array", "--user", getpass.getuser()]
    lines = _output(["squeue", "--noheader", *whose, "--format", "%i %T %j"]).splitlines()
    jobs = (line.split(maxsplit=2) for line in lines)
    return {number: state for number, state, name in jobs if name.startswith(JOB_NAME)}


def ends(jobs: Collection[str]) -> dict[str, str]:
    """The end of jobs that have left the queue (`NODE_FAIL`), as far as SLURM's accounting knows it."""
    if not jobs:
        return {}
    whole = ",".join(sorted({job.split("_")[0] for job in jobs}))
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format", "JobID,State"]
    try:
        lines = _output([*command, "--jobs", whole]).splitlines()
    except UserError:  # a cluster need not keep accounts
        return {}
    states = dict(line.split("|", 1) for line in lines)
    return {job: states[job].split()[0] for job in jobs if job in states}


def cancel(jobs: Sequence[str]) -> None:
    """Take the jobs out of the queue; those that run are stopped.

    Raises:
        UserError: Where SLURM cannot be asked, or refuses.
    """
    for start in range(0, len(jobs), 500):  # a command line has an end
        _output(["scancel", *jobs[start : start + 500]])


def check_partition(partition: str | None) -> None:
    """Refuse a partition that the cluster does not have.

    Raises:
        ConfigError: Names the partitions that there are.
        UnreachableError: Where SLURM cannot be asked.
    """
    known = sorted(set(_output(["sinfo", "--all", "--noheader", "--format", "%R"]).split()))
    unknown = set((partition or "").split(",")) - {"", *known}
    if unknown:
        near = nearest_name(min(unknown), known)
        raise ConfigError("launcher.partition", partition, f"one of {listed(known, 30)}", near)


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
