"""Evaluation suites after training, from the config: `python -m sae_lora.run.evaluate <run folder> …`.

Jobs call this module; users call `sae-lora evaluate`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from sae_lora.common.console import complain
from sae_lora.common.errors import EXIT_INTERRUPTED, UserError
from sae_lora.common.signals import Interrupted, Interruption
from sae_lora.config.serialize import load
from sae_lora.evaluation import run_suites
from sae_lora.evaluation.suite_records import pending
from sae_lora.records.folder import RunFolder
from sae_lora.tracking.sync import upload


def evaluate_pending(folders: Sequence[RunFolder]) -> bool:
    """Run the missing suites of finished runs; return True if all succeeded. No error fails a run."""
    succeeded = True
    for folder in folders:
        if not pending(folder):
            continue
        config = load(folder.config.read_text()).evaluation
        try:
            succeeded &= not run_suites.evaluate(folder, config.suites, config)
            if "://" in (folder.read_summary()["tracked_at"] or ""):
                upload([folder])  # the W&B run has ended without these results
        except UserError as error:
            complain(f"evaluation of {folder.path.name}", str(error))
            succeeded = False
    return succeeded


def main() -> int:
    """Evaluate the given runs; return the exit code: 1 if a suite failed."""
    folders = [RunFolder(Path(path)) for path in sys.argv[1:]]
    try:
        with Interruption().watching():
            return int(not evaluate_pending(folders))
    except Interrupted:
        lacking = [suite.name for folder in folders for suite in pending(folder)]
        names = ", ".join(dict.fromkeys(lacking))
        complain("stopped on request", f"finished suites are kept; not done: {names or 'none'}")
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
