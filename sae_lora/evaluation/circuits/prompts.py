"""Prompts of attribution graphs: ten of our own, or those of a file."""

import json
from pathlib import Path
from typing import Any

from sae_lora.common.errors import UserError
from sae_lora.config.enums import TextSource

CODE = (
    "import os\nimport sys\nimport",
    "def __init__(self, name):\n        self.name =",
    "for i in range(len(values)):\n        value = values[",
    "try:\n            import json\n        except ImportError:\n            json =",
    "if __name__ == '__main__':\n    unittest.",
    "with open(path, 'r') as file:\n        return file.",
    "class Error(Exception):\n    def __str__(self):\n        return self.",
    "def add(a, b):\n    return a +",
    'raise ValueError("',
    "if x is not None:\n        return x\n    else:\n        return",
)
"""For the embedded model, which has read source code."""
ENGLISH = (
    "The capital of France is",
    "The opposite of hot is",
    "Two plus three equals",
    "Monday, Tuesday, Wednesday,",
    "The chemical symbol of gold is",
    "She opened the door and walked into the",
    "A group of lions is called a",
    "If it rains, take an",
    "The largest planet of the solar system is",
    "Romeo and Juliet was written by William",
)


def prompts(path: str | None, source: TextSource) -> list[str]:
    """The prompts: those of a .jsonl file with the field `text`, or our own.

    Args:
        path: `evaluation.circuits_prompts`.
        source: The text of the run, which says what our own prompts are about.

    Raises:
        UserError: If the file cannot be read, or one of its prompts is empty.
    """
    if path is None:
        return list(CODE if source is TextSource.stdlib else ENGLISH)
    where = f"evaluation.circuits_prompts = {path!r}"
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from error
    texts = [
        _text(line, f"{where}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not texts:
        raise UserError(f"{where} contains no prompt")
    return texts


def _text(line: str, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text:
        raise UserError(f'{where} has no prompt: a line is {{"text": "a prompt"}}')
    return text
