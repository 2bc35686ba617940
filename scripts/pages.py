"""Tables in pages of results, each after its comment: `<!-- rates -->`."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence


def markdown(columns: Mapping[str, Sequence[str]]) -> str:
    """A table; the first column holds text, the others hold numbers."""
    names = list(columns)
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def percent(values: Iterable[float]) -> list[str]:
    """Shares as percentages; nothing for a missing one."""
    return ["" if math.isnan(value) else f"{100 * value:.1f}%" for value in values]


def fixed(values: Iterable[float], digits: int = 3) -> list[str]:
    """Numbers with a fixed number of digits after the point."""
    return [f"{value:.{digits}f}" for value in values]


def whole(values: Iterable[float]) -> list[str]:
    """Whole numbers."""
    return [f"{value:,.0f}" for value in values]


def with_tables(page: str, table: Callable[[str], str]) -> str:
    """The text of a page in which the table after each comment is `table(name)`."""

    def made(match: re.Match[str]) -> str:
        comment, name = match.groups()
        return f"{comment}\n\n{table(name)}\n\n"

    return re.sub(r"(<!-- (\w+) -->)\n\n?(?:(?:\|.*\n)+\n?)?", made, page).rstrip("\n") + "\n"
