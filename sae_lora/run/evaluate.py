"""Evaluates runs as their configs say: `python -m sae_lora.run.evaluate outputs/<sweep>/<run> …`.

What a job does after training; `python -m sae_lora evaluate` is for people.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sae_lora.common.console import complain
from sae_lora.common.errors import UserError
from sae_lora.config.serialize import load
from sae_lora.evaluation import run_suites
from sae_lora.evaluation.suite_records import pending
from sae_lora.records.folder import RunFolder
from sae_lora.tracking.sync import upload


def evaluate_pending(folders: Sequence[RunFolder]) -> bool:
    """Takes what is not there yet of the suites that each run's config asks for.

    What cannot be taken fails no run.

    Args:
        folders: Finished runs.

    Returns:
        Whether all could be taken.
    """
    all_taken = True
    for folder in folders:
        if not pending(folder):
            continue
        config = load(folder.config.read_text()).evaluation
        try:
            all_taken &= not run_suites.evaluate(folder, config.suites, config)
            if "://" in (folder.read_summary()["tracked_at"] or ""):
                upload([folder])  # the W&B run ended before there was this to show
        except UserError as error:
            complain(f"{folder.path.name}, its evaluation", str(error))
            all_taken = False
    return all_taken


def main() -> int:
    """Evaluates the runs that are named; returns 1 where something could not be taken."""
    return int(not evaluate_pending([RunFolder(Path(path)) for path in sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
