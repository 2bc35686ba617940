"""`python launch.py …` as a user types it."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def launch(*arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs the command offline and returns what it printed.

    Args:
        arguments: Overrides and options.
        environment: Variables to set, or to leave out (`None`).
    """
    changed = os.environ | {"COLUMNS": "160", "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        [sys.executable, "launch.py", *arguments],
        cwd=REPOSITORY,
        env={name: value for name, value in changed.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
