"""What there is to do with runs that are there: `python -m sae_lora --help`."""

import argparse
import sys
from pathlib import Path

from sae_lora.errors import UserError
from sae_lora.records import RunFolder
from sae_lora.report import comparison_table
from sae_lora.terminal import complain, say, show


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and does what it says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sae_lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table", help="the finished runs of a sweep side by side")
    table.add_argument("sweep", type=Path, help="outputs/<sweep>")
    figure = commands.add_parser("figure", help="the CE-gap curves of a sweep as one picture")
    figure.add_argument("sweep", type=Path, help="outputs/<sweep>")
    figure.add_argument(
        "--to", type=Path, required=True, help=".html; or .svg, .png, .pdf with the extra [figures]"
    )
    chosen = parser.parse_args(arguments)
    try:
        folders = runs_of(chosen.sweep)
        match chosen.command:
            case "table":
                show(comparison_table(folders))
            case "figure":
                draw(folders, chosen.to)
            case _:
                raise NotImplementedError(chosen.command)
    except UserError as error:
        complain("error", str(error))
        return 1
    return 0


def runs_of(sweep: Path) -> list[RunFolder]:
    """The runs of a sweep, by name.

    Raises:
        UserError: Where there are none.
    """
    found = [RunFolder(path.parent) for path in sorted(sweep.glob("*/config.yaml"))]
    if not found:
        raise UserError(f"{sweep} holds no runs; a sweep's folder is outputs/<sweep>")
    return found


def draw(folders: list[RunFolder], to: Path) -> None:
    """Writes the CE-gap curves as a picture or a page.

    Raises:
        UserError: Where no run is finished, or the picture's kind cannot be made here.
    """
    from sae_lora.figures import gap_curves  # plotly takes a second to import

    figure = gap_curves(folders)
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".html":
        figure.write_html(to)
    else:
        try:
            figure.write_image(to)
        except (ValueError, RuntimeError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"{to} cannot be made ({reason}). Pictures need `pip install -e '.[figures]'` and "
                "Chrome or Chromium; .html needs neither"
            ) from error
    say(f"drawn: {to}")


if __name__ == "__main__":
    sys.exit(main())
