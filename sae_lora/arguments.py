"""Arguments and options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sae_lora.common.errors import listed

Runs = Annotated[Path, typer.Argument(metavar="SWEEP", help="outputs/<sweep>, or one run in it")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="outputs/<sweep>/<run>")]


class SeveralValues(TyperCommand):
    """A command whose repeatable options take several values at once: `--suite core lora`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {
            name for option in self.params if getattr(option, "multiple", False) for name in option.opts
        }
        spread: list[str] = []
        flag: str | None = None
        for argument in args:
            if argument.startswith("-"):
                flag = argument if argument in repeatable else None
            elif flag is not None and spread[-1] != flag:
                spread.append(flag)
            spread.append(argument)
        return super().parse_args(ctx, spread)


def one_of(*allowed: str | int) -> Callable[[Any], Any]:
    """A check that the value of an option, or each value of a repeatable one, is allowed."""

    def check(values: Any) -> Any:
        for value in values if isinstance(values, list) else [values] if values else ():
            if value not in allowed:
                raise typer.BadParameter(f"{value!r} is not one of {listed(map(str, allowed), 20)}")
        return values

    return check
