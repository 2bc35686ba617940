"""The command line: `python -m sae_lora --help`. Each command is a few lines that call a room.

A command imports a room that needs torch, plotly or pandas by itself.
"""

import argparse
import dataclasses
import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lora.common.console import complain, say, show
from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.common.lazy_imports import import_quickly
from sae_lora.config.enums import Suite
from sae_lora.records.folder import RunFolder, runs_of
from sae_lora.records.status import State, counts
from sae_lora.report.tables import comparison_table, evaluation_tables

_EVERY_SUITE = ("core", "mechanism", "lora", "downstream")
_TIME_TO_CE = "how soon LoRA around an SAE reaches what an SAE trained end to end does"
_COMPARISONS = {
    "budget": ("methods", "methods", "methods side by side, after the same tokens and the same seconds"),
    "time_to_ce": ("time_to_ce", "time_to_ce", _TIME_TO_CE),
    "saes": ("saes", "multi_sae", "what each SAE costs, of runs that have several"),
    "groups": ("layer_groups", "groups", "SAEs that serve groups of blocks, side by side"),
}
"""By command: the module in `comparisons/`, the experiment, and the help text."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command, and return its exit code."""
    import_quickly()
    description = "Show, compare, evaluate and share runs."
    parser = argparse.ArgumentParser(prog="python -m sae_lora", description=description)
    _add_commands(parser.add_subparsers(dest="command", required=True))
    chosen = parser.parse_args(arguments)
    try:
        return chosen.do(chosen) or 0
    except UserError as error:
        complain("error", str(error))
        return 1


def _add_commands(commands: Any) -> None:
    """Declare every command, its arguments, and the function that carries it out."""

    def add(
        name: str, do: Callable[[Namespace], int | None], text: str, **paths: str
    ) -> argparse.ArgumentParser:
        """Declare a command and, by name, the help of each path that it takes."""
        command = commands.add_parser(name, help=text)
        command.set_defaults(do=do)
        for path, about in paths.items():
            command.add_argument(path, type=Path, help=about)
        return command

    sweep, run = "outputs/<sweep>", "outputs/<sweep>/<run>"
    runs = f"{sweep}, or one run in it"
    add("status", _status, "how far each run is; exit code 1 where one has failed", sweep=runs)
    add("logs", _logs, "what a run has printed, and why it failed", run=run)
    add("cancel", _cancel, "take a sweep's runs out of SLURM's queue", sweep=runs)
    add("table", _table, "the finished runs of a sweep side by side", sweep=sweep)
    reach = add("reach", _reach, "how soon a sweep reaches the gap that another ends at, run by run")
    reach.add_argument("other", type=Path, help=f"{sweep} that sets the gap")
    reach.add_argument("sweep", type=Path, help=f"{sweep} that reaches it")
    reach.add_argument("--to", type=Path, help="file for the figures, .json")
    for name, (_, experiment, text) in _COMPARISONS.items():
        about = f"{sweep} of experiment={experiment}, or one like it"
        comparison = add(name, _compare, text, sweep=about)
        comparison.add_argument("--to", type=Path, help="folder for the numbers and the figures")
    report = add("report", _report, "a page with all that sweeps have found, and its figures")
    report.add_argument("sweep", type=Path, nargs="+", help=f"{sweep}, one or more")
    report.add_argument("--to", type=Path, help="folder for it; by default report/ in the first sweep's")
    report.add_argument("--no-pictures", action="store_true", help="no SVG and PNG: they need a browser")
    evaluate = add("evaluate", _evaluate, "suites of measures for finished runs", sweep=runs)
    suites = [*(suite.name for suite in Suite), "all"]
    evaluate.add_argument("--suite", nargs="+", choices=suites, default=["core"])
    evaluate.add_argument("--again", action="store_true", help="also what was measured before")
    evaluate.add_argument("--device", help="auto, cpu or cuda; by default the run's own")
    keys = "keys of `evaluation`, as for launch.py"
    evaluate.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help=keys)
    setup = add("setup", _setup, "what a suite needs that cannot be installed beside it")
    setup.add_argument("what", choices=["saebench"], help="SAEBench, in an environment of its own")
    export = add("export", _export, "a run's adapters as a folder for others, with a card", run=run)
    export.add_argument("--to", type=Path, required=True, help="the folder: a new or an empty one")
    export.add_argument("--merge", action="store_true", help="the whole model, adapters merged into it")
    push = add("push", _push, "send an exported folder to the Hugging Face hub", folder="made by export")
    push.add_argument("--repo", required=True, help="org/name; made where there is none")
    push.add_argument("--private", action="store_true", help="make it for its owners alone")
    push.add_argument("--revision", help="the branch; made where there is none")
    add("sync", _sync, "make W&B show what it does not have of a sweep's runs", sweep=runs)
    dashboard = add("dashboard", _dashboard, "make a W&B workspace for a sweep", sweep=sweep)
    dashboard.add_argument("--dry-run", action="store_true", help="print what it would be, in JSON")
    benchmark = add("benchmark", _benchmark, "how fast training is, against the published loop")
    option = benchmark.add_argument
    option("--style", nargs="+", choices=["gemma2", "llama"], help="whose layers; by default both")
    option("--context", nargs="+", type=int, help="tokens per sequence; by default 256 and 1024")
    option("--pack", nargs="+", type=int, choices=[1, 5, 25], help="runs that train together")
    option("--rounds", type=int, default=5, help="pairs of times for each row; by default 5")
    option("--tuned", action="store_true", help="with the C allocator's thresholds raised, for both")
    option("--to", type=Path, help="file for the record, .json")


def _status(chosen: Namespace) -> int:
    from sae_lora.launch.live_view import status_rows, status_table

    statuses = status_rows(runs_of(chosen.sweep))
    show(status_table(statuses))
    say(counts(status.state for status in statuses))
    return int(any(status.state is State.failed for status in statuses))


def _logs(chosen: Namespace) -> None:
    (folder, *others) = runs_of(chosen.run)
    if others:
        raise UserError(f"{chosen.run} holds {len(others) + 1} runs; name one: {folder.path}")
    if folder.log.exists():
        say(folder.log.read_text(errors="replace").rstrip())
    failure = folder.read_failure()
    if failure is not None:
        say(f"\nfailed: {failure['message']}\n\n{failure['details'].rstrip()}")
    elif not folder.log.exists():
        say(f"{folder.path.name} has printed nothing yet")


def _cancel(chosen: Namespace) -> None:
    from sae_lora.launch.submit import cancel

    cancel(runs_of(chosen.sweep))


def _table(chosen: Namespace) -> None:
    show(comparison_table(runs_of(chosen.sweep)))


def _reach(chosen: Namespace) -> None:
    from sae_lora.comparisons.recipes import savings, savings_table

    results = savings(runs_of(chosen.other), runs_of(chosen.sweep))
    show(savings_table(results))
    if chosen.to is not None:
        chosen.to.parent.mkdir(parents=True, exist_ok=True)
        _write_results(chosen.to, results)


def _compare(chosen: Namespace) -> None:
    module, experiment, _ = _COMPARISONS[chosen.command]
    comparison = importlib.import_module(f"sae_lora.comparisons.{module}")
    folders = runs_of(chosen.sweep)
    results = comparison.compare(folders)
    show(comparison.table(results))
    if chosen.to is not None:
        chosen.to.mkdir(parents=True, exist_ok=True)
        _write_results(chosen.to / f"{experiment}.json", results)
        _draw(chosen.to, comparison.figures(folders))


def _report(chosen: Namespace) -> None:
    from sae_lora.report import frames, page

    runs = frames.load_sweep(*chosen.sweep)
    folder = chosen.to or chosen.sweep[0] / "report"
    for note in page.write(runs, folder, pictures=not chosen.no_pictures):
        complain("left out", note)
    say(f"report of {len(runs)} runs: {folder / 'index.html'}")


def _evaluate(chosen: Namespace) -> int:
    from sae_lora.evaluation import run_suites, suite_records

    folders = [folder for folder in runs_of(chosen.sweep) if folder.is_finished]
    if not folders:
        raise UserError("none of these runs is finished")
    names = [name for asked in chosen.suite for name in (_EVERY_SUITE if asked == "all" else [asked])]
    suites = [Suite[name] for name in names]
    failed: list[Suite] = []
    applicable: list[Suite] = []
    for folder in folders:
        config = run_suites.settings(folder, chosen.set)
        applicable += suite_records.applicable(suites, folder.read_config(), vars(config))
        failed += run_suites.evaluate(folder, suites, config, again=chosen.again, device=chosen.device)
    for table in evaluation_tables(folders, dict.fromkeys(applicable)):
        show(table)
    say(f"evaluation/*.json in the folders of {len(folders)} runs")
    if Suite.lora in suites:
        _compare_adapters(folders)
    return int(bool(failed))


def _compare_adapters(folders: list[RunFolder]) -> None:
    """Compare the adapters of each sweep that has several alike; write and draw the results."""
    from sae_lora.evaluation.lora import similarity, similarity_results

    for sweep in dict.fromkeys(folder.path.parent for folder in folders):
        pairs = similarity.compare([folder for folder in folders if folder.path.parent == sweep])
        if pairs:
            similarity_results.write(sweep, pairs)
            path = similarity_results.path_in(sweep)
            say(f"{len(pairs)} pairs of adapters compared: {path}")
            _draw(path.parent, similarity_results.figures(pairs))


def _setup(chosen: Namespace) -> None:
    from sae_lora.evaluation.saebench import environment

    say(f"ready: {environment.make()}")


def _export(chosen: Namespace) -> None:
    from sae_lora.export.export import export

    say(f"exported: {export(chosen.run, chosen.to, merge=chosen.merge)}")


def _push(chosen: Namespace) -> None:
    from sae_lora.export.push import push

    say(push(chosen.folder, chosen.repo, private=chosen.private, revision=chosen.revision))


def _sync(chosen: Namespace) -> None:
    from sae_lora.tracking.sync import upload

    show(upload(runs_of(chosen.sweep)))


def _dashboard(chosen: Namespace) -> None:
    from sae_lora.tracking import dashboard

    make = dashboard.specification if chosen.dry_run else dashboard.save
    say(make(runs_of(chosen.sweep)))


def _benchmark(chosen: Namespace) -> None:
    repository = Path(__file__).parents[1]
    if not (repository / "scripts" / "benchmark").is_dir():
        raise UserError("the benchmark is no part of the installed package: run it in a clone")
    sys.path.insert(0, str(repository))
    from scripts.benchmark import compare

    compare.run(
        styles=chosen.style,
        contexts=chosen.context,
        packs=chosen.pack,
        rounds=chosen.rounds,
        tuned=chosen.tuned,
        to=chosen.to,
    )


def _write_results(file: Path, results: Sequence[Any]) -> None:
    write_atomically(file, as_json([dataclasses.asdict(result) for result in results]))


def _draw(to: Path, figures: Mapping[str, Any]) -> None:
    """Write figures as SVG into a folder, where there is a browser for it."""
    from sae_lora.common import plots

    pictures = [(figure, to / f"{name}.svg") for name, figure in figures.items()]
    for note in plots.try_pictures(pictures):
        complain("left out", note)
