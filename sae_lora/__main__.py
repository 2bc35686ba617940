"""What there is to do with runs that are there: `python -m sae_lora --help`."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_lora.common.console import complain, say, show
from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.common.lazy_imports import quick_imports
from sae_lora.comparisons.recipes import savings, savings_table
from sae_lora.config.enums import Suite
from sae_lora.evaluation import suite_records
from sae_lora.launch.live_view import status_table, statuses_of
from sae_lora.records import slurm
from sae_lora.records.folder import RunFolder, runs_of
from sae_lora.records.status import State, counts, standings
from sae_lora.report.frames import load_sweep
from sae_lora.report.tables import comparison_table, evaluation_tables

_ALL = {"all": ["core", "mechanism", "lora", "downstream"]}
"""A word for every suite."""


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
    time_to_ce = commands.add_parser(
        "time_to_ce", help="how soon LoRA around an SAE reaches what an SAE trained end to end does"
    )
    time_to_ce.add_argument("sweep", type=Path, help="outputs/<sweep> of experiment=time_to_ce")
    time_to_ce.add_argument("--to", type=Path, help="folder for the numbers and the figure")
    methods = commands.add_parser(
        "budget", help="methods side by side, after the same tokens and after the same seconds"
    )
    methods.add_argument(
        "sweep", type=Path, help="outputs/<sweep> of experiment=methods, or one like it"
    )
    methods.add_argument("--to", type=Path, help="folder for the numbers and the figures")
    saes = commands.add_parser("saes", help="what each SAE costs, of runs that have several")
    saes.add_argument("sweep", type=Path, help="outputs/<sweep>, or one run in it")
    saes.add_argument("--to", type=Path, help="folder for the numbers and the figure")
    groups = commands.add_parser("groups", help="SAEs that serve groups of blocks, side by side")
    groups.add_argument("sweep", type=Path, help="outputs/<sweep> of experiment=groups, or one like it")
    groups.add_argument("--to", type=Path, help="folder for the numbers and the figures")
    page = commands.add_parser("report", help="a page with all that sweeps have found, and its figures")
    page.add_argument("sweep", type=Path, nargs="+", help="outputs/<sweep>, one or more")
    page.add_argument("--to", type=Path, help="folder for it; by default report/ in the first sweep's")
    page.add_argument(
        "--no-pictures", action="store_true", help="no SVG and PNG beside the page, which take a browser"
    )
    evaluate = commands.add_parser(
        "evaluate", help="what finished runs are worth: suites of measures, kept in their folders"
    )
    evaluate.add_argument("sweep", type=Path, help="outputs/<sweep>, or one run in it")
    evaluate.add_argument(
        "--suite", nargs="+", choices=[*(suite.name for suite in Suite), *_ALL], default=["core"]
    )
    evaluate.add_argument("--again", action="store_true", help="also what was measured before")
    evaluate.add_argument("--device", help="auto, cpu or cuda; by default the run's own")
    evaluate.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="keys of `evaluation`, as for launch.py",
    )
    setup = commands.add_parser("setup", help="what a suite needs that cannot be installed beside it")
    setup.add_argument("what", choices=["saebench"], help="SAEBench, in an environment of its own")
    export = commands.add_parser("export", help="a run's adapters as a folder for others, with a card")
    export.add_argument("run", type=Path, help="outputs/<sweep>/<run>")
    export.add_argument("--to", type=Path, required=True, help="the folder: a new or an empty one")
    export.add_argument(
        "--merge", action="store_true", help="the whole model, the adapters merged into its weights"
    )
    push = commands.add_parser("push", help="send an exported folder to the Hugging Face hub")
    push.add_argument("folder", type=Path, help="what export has written")
    push.add_argument("--repo", required=True, help="org/name; made where there is none")
    push.add_argument("--private", action="store_true", help="make it for its owners alone")
    push.add_argument("--revision", help="the branch; made where there is none")
    sync = commands.add_parser("sync", help="make W&B show what it does not have of a sweep's runs")
    sync.add_argument("sweep", type=Path, help="outputs/<sweep>, or one run in it")
    dashboard = commands.add_parser("dashboard", help="make a W&B workspace for a sweep")
    dashboard.add_argument("sweep", type=Path, help="outputs/<sweep>")
    dashboard.add_argument("--dry-run", action="store_true", help="print what it would be, in JSON")
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
            case "time_to_ce":
                compare_arms(runs_of(chosen.sweep), chosen.to)
            case "budget":
                compare_methods(chosen.sweep, chosen.to)
            case "saes":
                compare_saes(runs_of(chosen.sweep), chosen.to)
            case "groups":
                compare_groups(runs_of(chosen.sweep), chosen.to)
            case "report":
                write_report(chosen.sweep, chosen.to, pictures=not chosen.no_pictures)
            case "evaluate":
                wanted = [Suite[one] for name in chosen.suite for one in _ALL.get(name, [name])]
                return measure(runs_of(chosen.sweep), wanted, chosen)
            case "setup":
                from sae_lora.evaluation.saebench import environment

                say(f"ready: {environment.make()}")
            case "export":
                with quick_imports():
                    from sae_lora.export.export import export as export_run  # brings torch in

                say(f"exported: {export_run(chosen.run, chosen.to, merge=chosen.merge)}")
            case "push":
                from sae_lora.export.push import push as push_folder  # brings the hub's library in

                say(
                    push_folder(
                        chosen.folder, chosen.repo, private=chosen.private, revision=chosen.revision
                    )
                )
            case "sync":
                with quick_imports():
                    from sae_lora.tracking.sync import upload  # brings torch in

                show(upload(runs_of(chosen.sweep)))
            case "dashboard":
                from sae_lora.tracking import dashboard as workspace  # brings wandb in

                make = workspace.specification if chosen.dry_run else workspace.save
                say(make(runs_of(chosen.sweep)))
            case "benchmark":
                with quick_imports():
                    from scripts.benchmark import (
                        compare,  # brings torch in
                        shapes,
                    )

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


def compare_arms(folders: list[RunFolder], to: Path | None) -> None:
    """Shows how soon LoRA is where an SAE trained end to end ends up, and draws it.

    Raises:
        UserError: Where one of the two is missing.
    """
    from sae_lora.comparisons import time_to_ce  # plotly takes a while

    found = time_to_ce.branches(folders)
    show(time_to_ce.table(found))
    if to is not None:
        _write_comparison(to, "time_to_ce", found, {"time_to_ce": time_to_ce.figure(folders)})


def compare_methods(sweep: Path, to: Path | None) -> None:
    """Shows what each method comes to, and draws their curves.

    Raises:
        UserError: Where no run is finished.
    """
    from sae_lora.comparisons import methods  # plotly and pandas take a while

    runs = load_sweep(sweep)
    found = methods.outcomes(runs.folders)
    show(methods.table(found))
    if to is not None:
        over = "tokens", "train_seconds", "train_flops"
        drawn = {f"methods_{one}": methods.figure(runs, one) for one in over}
        _write_comparison(to, "methods", found, drawn)


def compare_saes(folders: list[RunFolder], to: Path | None) -> None:
    """Shows what each of several SAEs costs, and draws what they cost together.

    Raises:
        UserError: Where no run has several.
    """
    from sae_lora.comparisons import saes as per_block  # plotly takes a while

    found = per_block.several(folders)
    show(per_block.table(found))
    if to is not None:
        _write_comparison(to, "multi_sae", found, {"multi_sae": per_block.compounded(found)})


def compare_groups(folders: list[RunFolder], to: Path | None) -> None:
    """Shows what each way of sharing blocks out comes to, and draws it.

    Raises:
        UserError: Where no run has SAEs that serve groups.
    """
    from sae_lora.comparisons import layer_groups  # plotly and scipy take a while

    found = layer_groups.shared(folders)
    show(layer_groups.table(found))
    if to is not None:
        _write_comparison(to, "groups", found, layer_groups.figures(folders))


def measure(folders: list[RunFolder], wanted: list[Suite], chosen: argparse.Namespace) -> int:
    """Takes suites of measures of the finished runs; returns 1 where one could not be taken.

    Raises:
        UserError: Where no run is finished.
    """
    with quick_imports():
        from sae_lora.evaluation import run_suites  # brings torch in

    done = [folder for folder in folders if folder.is_finished]
    if not done:
        raise UserError("none of these runs is finished")
    failed: list[Suite] = []
    asked: list[Suite] = []
    for folder in done:
        config = run_suites.settings(folder, chosen.set)
        asked += suite_records.applicable(wanted, folder.read_config(), vars(config))
        failed += run_suites.evaluate(folder, wanted, config, again=chosen.again, device=chosen.device)
    for table in evaluation_tables(done, dict.fromkeys(asked)):
        show(table)
    say(f"evaluation/*.json in the folders of {len(done)} runs")
    if Suite.lora in wanted:
        compare_adapters(done)
    return int(bool(failed))


def compare_adapters(folders: list[RunFolder]) -> None:
    """Writes and draws what adapters have in common, in the folder of each sweep that has several alike.

    Raises:
        UserError: Where adapters are missing or damaged.
    """
    from sae_lora.evaluation.lora import (
        similarity,
        similarity_figures,
        similarity_results,  # plotly takes a while
    )

    for sweep in dict.fromkeys(folder.path.parent for folder in folders):
        found = similarity.compare([folder for folder in folders if folder.path.parent == sweep])
        if not found:
            continue
        similarity_results.write(sweep, found)
        say(f"{len(found)} pairs of adapters compared: {similarity_results.path_in(sweep)}")
        _draw(similarity_results.path_in(sweep).parent, similarity_figures.figures(found))


def _write_comparison(to: Path, name: str, found: Sequence[Any], drawn: dict[str, Any]) -> None:
    """Writes numbers as JSON and, where there is a browser for it, figures as SVG into a folder."""
    to.mkdir(parents=True, exist_ok=True)
    write_atomically(to / f"{name}.json", as_json([dataclasses.asdict(one) for one in found]))
    _draw(to, drawn)


def _draw(to: Path, drawn: dict[str, Any]) -> None:
    """Writes figures as SVG into a folder, where there is a browser for it."""
    from sae_lora.common import plots

    for note in plots.try_pictures([(figure, to / f"{name}.svg") for name, figure in drawn.items()]):
        complain("left out", note)


def write_report(sweeps: list[Path], to: Path | None, *, pictures: bool) -> None:
    """Writes the report of some sweeps.

    Raises:
        UserError: Where one holds no runs, or the folder something else.
    """
    from sae_lora.report import page  # plotly and pandas take a while

    found = load_sweep(*sweeps)
    folder = to or sweeps[0] / "report"
    for note in page.write(found, folder, pictures=pictures):
        complain("left out", note)
    say(f"report of {len(found)} runs: {folder / 'index.html'}")


if __name__ == "__main__":
    sys.exit(main())
