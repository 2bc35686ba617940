"""Evaluates runs as their configs say: `python -m sae_lora.run.evaluate outputs/<sweep>/<run> …`.

What a job does after training; `python -m sae_lora evaluate` is for people.
"""

import sys
from pathlib import Path

from sae_lora.common.console import complain
from sae_lora.common.errors import UserError
from sae_lora.config.serialize import load
from sae_lora.evaluation import run_suites
from sae_lora.records.folder import RunFolder
from sae_lora.tracking.sync import upload


def main() -> int:
    """Takes what is not there yet of each run's suites; returns 1 where something could not be taken."""
    code = 0
    for path in sys.argv[1:]:
        folder = RunFolder(Path(path))
        config = load(folder.config.read_text()).evaluation
        try:
            code |= bool(run_suites.evaluate(folder, config.suites, config))
            if "://" in (folder.read_summary()["tracked_at"] or ""):
                upload([folder])  # the W&B run ended before there was this to show
        except UserError as error:
            complain(f"{folder.path.name}, its evaluation", str(error))
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
