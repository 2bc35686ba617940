"""Makes the rows of the tasks that ship: `python -m sae_lora.evaluation.tasks`, in a moment."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

from sae_lora.evaluation.tasks import FOLDER, cutting


def make(folder: Path) -> None:
    """Writes them, a file a task.

    Args:
        folder: Where.
    """
    documents = cutting.held_out()
    _write(folder / "tiny_continuation.jsonl", cutting.continuations(documents))
    _write(folder / "tiny_generation.jsonl", cutting.generations(documents))


def _write(file: Path, rows: Iterable[cutting.Continuation | cutting.Generation]) -> None:
    lines = [json.dumps(row._asdict(), ensure_ascii=False) for row in rows]
    random.Random(0).shuffle(lines)  # so that the first ones are of many files
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(FOLDER)
