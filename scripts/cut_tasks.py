"""Makes the rows of the tasks that ship: `python -m scripts.cut_tasks`, in a moment.

They are cut from held-out files of the Python standard library. The same for the same Python: what is
drawn of a file depends on its name alone.
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
"""Ends of a line to choose from."""
LONGEST_TEXT = 300
"""Characters of what is to be continued."""
_ROWS_PER_FILE = 6
_ALIKE = 12
"""Ends nearest in length to the real one, of which the wrong ones are drawn."""
_LINE = range(24, 80)
_SHORTEST_END = 8
_NAME = re.compile(r"(?<=[.(\[])[A-Za-z][A-Za-z0-9_]{2,23}\b")


class Continuation(NamedTuple):
    """A row of `tiny_continuation`: the text may end in one of several ways.

    Args:
        document: The file it is from.
        text: Some lines, and the beginning of the next.
        choices: Ends of that line, without the space between.
        answer: Index of the real one.
    """

    document: str
    text: str
    choices: list[str]
    answer: int


class Generation(NamedTuple):
    """A row of `tiny_generation`: a name comes next.

    Args:
        document: The file it is from.
        text: Some lines, in which the name stands, and the beginning of the next, up to it.
        answer: The name.
    """

    document: str
    text: str
    answer: str


def held_out() -> list[Document]:
    """The library's files that neither the embedded model nor a run of the default trains on."""
    share = DataConfig().validation_share
    return [one for one in stdlib_documents() if in_validation(one.key, share)]


def continuations(documents: Iterable[Document]) -> Iterator[Continuation]:
    """The rows of `tiny_continuation`, some of each file that has lines enough."""
    for document in documents:
        draw = random.Random(document.key)
        divided = list(_divided(document.text))
        if len({end for _, end in divided}) <= _ALIKE:
            continue
        for text, end in draw.sample(divided, _ROWS_PER_FILE):
            others = {other for _, other in divided} - {end}
            choices = [end, *draw.sample(_nearest_in_length(others, end), CHOICES - 1)]
            draw.shuffle(choices)
            yield Continuation(document.key, text, choices, choices.index(end))


def generations(documents: Iterable[Document]) -> Iterator[Generation]:
    """The rows of `tiny_generation`, some of each file."""
    for document in documents:
        draw = random.Random(document.key)
        found = [
            Generation(document.key, text, match[0])
            for match in _NAME.finditer(document.text)
            if re.search(rf"\b{match[0]}\b", text := _shortened(document.text[: match.start()]))
        ]
        yield from draw.sample(found, min(len(found), _ROWS_PER_FILE))


def _nearest_in_length(others: Iterable[str], end: str) -> list[str]:
    return sorted(others, key=lambda other: (abs(len(other) - len(end)), other))[:_ALIKE]


def _divided(text: str) -> Iterator[tuple[str, str]]:
    """Each line that can be divided, with those before it: up to a space near its middle; its end."""
    start = 0
    for line in text.splitlines(keepends=True):
        whole = line.rstrip()
        indented = len(whole) - len(whole.lstrip())
        if len(whole) - indented in _LINE:
            middle = (indented + len(whole)) // 2
            spaces = [match.start() for match in re.finditer(r"(?<=\S) (?=\S)", whole)]
            space = min(spaces, key=lambda place: abs(place - middle), default=len(whole))
            end = whole[space + 1 :]
            if len(end) >= _SHORTEST_END:
                yield _shortened(text[: start + space]), end
        start += len(line)


def _shortened(text: str) -> str:
    """The end of the text, from the beginning of a line."""
    if len(text) <= LONGEST_TEXT:
        return text
    cut = text[-LONGEST_TEXT:]
    return cut[cut.find("\n") + 1 :]


def make(folder: Path) -> None:
    """Writes the rows, a file for each task.

    Args:
        folder: Where.
    """
    documents = held_out()
    _write(folder / "tiny_continuation.jsonl", continuations(documents))
    _write(folder / "tiny_generation.jsonl", generations(documents))


def _write(file: Path, rows: Iterable[Continuation | Generation]) -> None:
    lines = [json.dumps(row._asdict(), ensure_ascii=False) for row in rows]
    random.Random(0).shuffle(lines)  # so that the first ones are of many files
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    make(FOLDER)
