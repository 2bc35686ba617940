"""What SLURM says of jobs, through its own commands."""

import getpass
import subprocess

from sae_lora.errors import UserError

_TIMEOUT_S = 30


def jobs_in_queue() -> dict[str, str]:
    """The user's jobs that wait or run: state by number, `12` or `12_3` in an array.

    Raises:
        UserError: Where SLURM does not answer, or is not here.
    """
    command = ["squeue", "--noheader", "--array", "--user", getpass.getuser(), "--format", "%i %T"]
    return dict(line.split(maxsplit=1) for line in _output(command).splitlines())


def _output(command: list[str]) -> str:
    try:
        finished = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError:
        raise UserError(f"there is no SLURM on this machine (no `{command[0]}`)") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"SLURM does not answer (`{command[0]}`, {_TIMEOUT_S} s)") from None
    if finished.returncode != 0:
        raise UserError(f"SLURM: {finished.stderr.strip()}")
    return finished.stdout
