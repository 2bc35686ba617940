"""Make the rows of the shipped tasks: `python -m scripts.cut_tasks`, in a few seconds.

Rows are cut from held-out files of the Python standard library. They are the same for the same version
of Python, because the random choices in a file depend only on its name.
"""

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from sae_lora.config.schema import DataConfig
from sae_lora.data.documents import Document, in_validation, stdlib_documents
from sae_lora.evaluation.tasks import FOLDER

CHOICES = 4
"""Number of ends of a line to choose from."""
LONGEST_TEXT = 300
"""Largest length of the text to be continued, in characters."""
_ROWS_PER_FILE = 6
_NEAREST = 12
"""Number of ends nearest in length to the real one. Wrong ends are drawn from them."""
_LINE = range(24, 80)
_SHORTEST_END = 8
_NAME = re.compile(r"(?<=[.(\[])[A-Za-z][A-Za-z0-9_]{2,23}\b")


class Continuation(NamedTuple):
    """A row of `tiny_continuation`: choose the end of a text.

    Args:
        document: The file of the text.
        text: Some lines, and the beginning of the next line.
        choices: Ends of this line, without the space before them.
        answer: Index of the real end.
    """

    document: str
    text: str
    choices: list[str]
    answer: int


class Generation(NamedTuple):
    """A row of `tiny_generation`: generate the name after a text.

    Args:
        document: The file of the text.
        text: Some lines that contain the name, and the next line up to the name.
        answer: The name.
    """

    document: str
    text: str
    answer: str


def held_out() -> list[Document]:
    """The library's files on which neither the embedded model nor a default run is trained."""
    share = DataConfig().validation_share
    return [document for document in stdlib_documents() if in_validation(document.key, share)]


def continuations(documents: Iterable[Document]) -> Iterator[Continuation]:
    """The rows of `tiny_continuation`: some from each file that has enough lines."""
    for document in documents:
        draw = random.Random(document.key)
        divided = list(_divided(document.text))
        if len({end for _, end in divided}) <= _NEAREST:
            continue
        for text, end in draw.sample(divided, _ROWS_PER_FILE):
            wrong = {candidate for _, candidate in divided} - {end}
            choices = [end, *draw.sample(_nearest_in_length(wrong, end), CHOICES - 1)]
            draw.shuffle(choices)
            yield Continuation(document.key, text, choices, choices.index(end))


def generations(documents: Iterable[Document]) -> Iterator[Generation]:
    """The rows of `tiny_generation`: some from each file."""
    for document in documents:
        draw = random.Random(document.key)
        candidates = [
            Generation(document.key, text, match[0])
            for match in _NAME.finditer(document.text)
            if re.search(rf"\b{match[0]}\b", text := _shortened(document.text[: match.start()]))
        ]
        yield from draw.sample(candidates, min(len(candidates), _ROWS_PER_FILE))


def _nearest_in_length(ends: Iterable[str], end: str) -> list[str]:
    def distance(candidate: str) -> tuple[int, str]:
        return abs(len(candidate) - len(end)), candidate

    return sorted(ends, key=distance)[:_NEAREST]


def _divided(text: str) -> Iterator[tuple[str, str]]:
    """Divide each suitable line at the space nearest to its middle.

    Yields:
        The text up to this space, shortened; the end of the line after it.
    """
    start = 0
    for line in text.splitlines(keepends=True):
        whole = line.rstrip()
        indented = len(whole) - len(whole.lstrip())
        if len(whole) - indented in _LINE:
            middle = (indented + len(whole)) // 2
            spaces = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", whole)]
            space = min(spaces, key=lambda index: abs(index - middle), default=len(whole))
            end = whole[space + 1 :]
            if len(end) >= _SHORTEST_END:
                yield _shortened(text[: start + space]), end
        start += len(line)


def _shortened(text: str) -> str:
    """The end of the text, beginning with a complete line."""
    if len(text) <= LONGEST_TEXT:
        return text
    cut = text[-LONGEST_TEXT:]
    return cut[cut.find("\n") + 1 :]


def make(folder: Path) -> None:
    """Write a file of rows for each task into a folder."""
    documents = held_out()
    _write(folder / "tiny_continuation.jsonl", continuations(documents))
    _write(folder / "tiny_generation.jsonl", generations(documents))


def _write(file: Path, rows: Iterable[Continuation | Generation]) -> None:
    lines = [json.dumps(row._asdict(), ensure_ascii=False) for row in rows]
    random.Random(0).shuffle(lines)  # the first rows are then from many files
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(FOLDER)
