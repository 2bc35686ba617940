"""What there is to do with runs that are there: `python -m sae_lora --help`."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

from sae_lora import slurm
from sae_lora.errors import UserError
from sae_lora.files import as_json, write_atomically
from sae_lora.reach import savings, savings_table
from sae_lora.records import RunFolder
from sae_lora.report import comparison_table
from sae_lora.standing import State, counts, standings
from sae_lora.terminal import complain, say, show
from sae_lora.watch import status_table, statuses_of


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and does what it says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sae_lora", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    status = commands.add_parser(
        "status", help="how far each run of a sweep is; exit code 1 where one has failed"
    )
    status.add_argument("sweep", type=Path, help="outputs/<sweep>, or one run in it")
    logs = commands.add_parser("logs", help="what a run has printed, and why it failed")
    logs.add_argument("run", type=Path, help="outputs/<sweep>/<run>")
    cancel = commands.add_parser("cancel", help="take a sweep's runs out of SLURM's queue")
    cancel.add_argument("sweep", type=Path, help="outputs/<sweep>, or one run in it")
    table = commands.add_parser("table", help="the finished runs of a sweep side by side")
    table.add_argument("sweep", type=Path, help="outputs/<sweep>")
    reach = commands.add_parser(
        "reach", help="how soon a sweep reaches the gap that another ends at, run by run"
    )
    reach.add_argument("other", type=Path, help="outputs/<sweep> that sets the gap")
    reach.add_argument("sweep", type=Path, help="outputs/<sweep> that reaches it")
    reach.add_argument("--to", type=Path, help="file for the figures, .json")
    figure = commands.add_parser("figure", help="the CE-gap curves of a sweep as one picture")
    figure.add_argument("sweep", type=Path, help="outputs/<sweep>")
    figure.add_argument(
        "--to", type=Path, required=True, help=".html; or .svg, .png, .pdf with the extra [figures]"
    )
    benchmark = commands.add_parser("benchmark", help="how fast training is, against the published loop")
    benchmark.add_argument(
        "--style", nargs="+", choices=["gemma2", "llama"], default=["gemma2", "llama"]
    )
    benchmark.add_argument(
        "--context", nargs="+", type=int, default=[256, 1024], help="tokens per sequence"
    )
    benchmark.add_argument("--rounds", type=int, default=5, help="pairs of times")
    benchmark.add_argument(
        "--tuned", action="store_true", help="with the C allocator's thresholds raised, for both"
    )
    benchmark.add_argument("--to", type=Path, help="file for the record, .json")
    chosen = parser.parse_args(arguments)
    try:
        match chosen.command:
            case "status":
                return tell(runs_of(chosen.sweep))
            case "logs":
                print_log(chosen.run)
            case "cancel":
                cancel_jobs(runs_of(chosen.sweep))
            case "table":
                show(comparison_table(runs_of(chosen.sweep)))
            case "reach":
                compare_sweeps(runs_of(chosen.other), runs_of(chosen.sweep), chosen.to)
            case "figure":
                draw(runs_of(chosen.sweep), chosen.to)
            case "benchmark":
                from sae_lora.benchmark import compare, shapes  # brings torch in

                styles = [shapes.Style[name] for name in chosen.style]
                show(
                    compare.run(styles, chosen.context, chosen.rounds, tuned=chosen.tuned, to=chosen.to)
                )
            case _:
                raise NotImplementedError(chosen.command)
    except UserError as error:
        complain("error", str(error))
        return 1
    return 0


def runs_of(sweep: Path) -> list[RunFolder]:
    """The runs of a sweep, by name; a run's own folder stands for itself.

    Raises:
        UserError: Where there are none.
    """
    configs = (
        [sweep / "config.yaml"] if (sweep / "config.yaml").exists() else sweep.glob("*/config.yaml")
    )
    found = [
        RunFolder(path.parent)
        for path in sorted(configs, key=lambda path: _by_numbers(path.parent.name))
    ]
    if not found:
        raise UserError(f"{sweep} holds no runs; a sweep's folder is outputs/<sweep>")
    return found


def _by_numbers(name: str) -> list[str | int]:
    """Sorts s2 before s10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def tell(folders: list[RunFolder]) -> int:
    """Shows how far the runs are; returns 1 where one has failed."""
    statuses = statuses_of(folders)
    show(status_table(statuses))
    say(counts(status.state for status in statuses))
    return int(any(status.state is State.failed for status in statuses))


def print_log(run: Path) -> None:
    """Prints a run's log and, where it has failed, the whole story.

    Raises:
        UserError: Where there is no such run.
    """
    (folder, *others) = runs_of(run)
    if others:
        raise UserError(f"{run} holds {len(others) + 1} runs; name one: {folder.path}")
    if folder.log.exists():
        say(folder.log.read_text(errors="replace").rstrip())
    failure = folder.read_failure()
    if failure is not None:
        say(f"\nfailed: {failure.message}\n\n{failure.details.rstrip()}")
    elif not folder.log.exists():
        say(f"{folder.path.name} has printed nothing yet")


def cancel_jobs(folders: list[RunFolder]) -> None:
    """Cancels the jobs of runs that have not ended. What they have saved stays, and can go on.

    Raises:
        UserError: Where SLURM cannot be asked, or refuses.
    """
    queue = slurm.queue() if any(folder.job for folder in folders) else {}
    under_way = [folder for folder in folders if not folder.is_finished]
    jobs = {job.id for folder in under_way if (job := folder.job) is not None and job.id in queue}
    if jobs:
        slurm.cancel(sorted(jobs))
    say(f"{len(jobs)} jobs cancelled")
    asked_for = {folder.path for folder in folders}
    for other in runs_of(folders[0].path.parent):
        if other.path not in asked_for and not other.is_finished and other.job and other.job.id in jobs:
            say(f"{other.path.name} trains there too, and stops")
    for folder, standing in zip(folders, standings(folders), strict=True):
        if standing.state is State.running and (folder.job is None or folder.job.id not in jobs):
            complain(
                "left alone", f"{folder.path.name} is running {standing.note}; Ctrl-C there stops it"
            )


def compare_sweeps(others: list[RunFolder], folders: list[RunFolder], to: Path | None) -> None:
    """Shows how soon runs reach what others end at, and writes it down.

    Raises:
        UserError: Where no run has its like in the other sweep.
    """
    found = savings(others, folders)
    show(savings_table(found))
    if to is not None:
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, as_json([dataclasses.asdict(one) for one in found]))


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
