"""The command line: `sae-lora --help`. Each command is a few lines that call other modules.

Imports of modules that need torch, plotly or pandas are inside the commands.
"""

import errno
import os
import signal
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer

from sae_lora.arguments import Run, Runs, SeveralValues, one_of
from sae_lora.common.console import complain, count, say, show
from sae_lora.common.errors import EXIT_STOPPED, UserError, causes, listed
from sae_lora.common.files import check_writable
from sae_lora.common.lazy_imports import import_quickly
from sae_lora.common.signals import handling
from sae_lora.comparisons import commands as comparisons
from sae_lora.comparisons.commands import Sweep
from sae_lora.config import reference
from sae_lora.config.enums import Device, Suite
from sae_lora.config.mistakes.explain import TRACEBACK_VARIABLE
from sae_lora.evaluation import suite_records
from sae_lora.evaluation.lora import similarity_results
from sae_lora.records import slurm
from sae_lora.records.damage import damage
from sae_lora.records.factors import differences_of, ordered
from sae_lora.records.folder import RunFolder, runs_of
from sae_lora.records.status import ENDED_BADLY, State, counts, read_statuses, sound
from sae_lora.report import results
from sae_lora.report.tables import evaluation_tables

PROGRAM = "sae-lora"
_RUN, _LOOK, _SHARE = "Run", "Look", "Share"
_PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True}
_EVERY_SUITE = ("core", "mechanism", "lora", "downstream")
"""The suites that `all` stands for."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of a disk, also of one that the output of a command is written to."""
_STOPPED = "repeat the command to continue"
_RENAMED = {
    "reach": "recipes",
    "budget": "methods",
    "time_to_ce": "time-to-ce",
    "saes": "saes",
    "groups": "groups",
}
"""Commands of version 0.1, and their present names below `compare`."""


app = typer.Typer(
    name=PROGRAM,
    help="Close the cross-entropy gap of sparse autoencoders with LoRA, in sweeps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(comparisons.app, name="compare", rich_help_panel=_LOOK)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code. A `UserError` is shown as one message."""
    import_quickly()
    try:
        with handling((signal.SIGTERM, signal.SIGHUP), signal.default_int_handler):  # like Ctrl-C
            app(sys.argv[1:] if arguments is None else arguments, prog_name=PROGRAM)
    except SystemExit as exit:
        if stops := [cause for cause in causes(exit) if isinstance(cause, KeyboardInterrupt)]:
            complain("stopped", str(stops[0]) or _STOPPED)
        return exit.code if isinstance(exit.code, int) else 0
    except UserError as error:
        if os.environ.get(TRACEBACK_VARIABLE) == "1":
            traceback.print_exc()
        complain("error", str(error))
        return 1
    except KeyboardInterrupt as stop:
        complain("stopped", str(stop) or _STOPPED)
        return EXIT_STOPPED
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        complain("error", f"cannot write {error.filename or 'the output'}: {error.strerror}")
        return 1
    return 0


def _print_version(is_requested: bool) -> None:
    if is_requested:
        say(f"sae_lora {version('sae_lora')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Close the cross-entropy gap of sparse autoencoders with LoRA, in sweeps."""


# ---- run ----------------------------------------------------------------------------------------


@app.command("launch", rich_help_panel=_RUN, context_settings=_PASS_THROUGH, add_help_option=False)
def _launch(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[-m] [GROUP=OPTION] [KEY=VALUE]")
    ] = None,
) -> None:
    """Train a run, or with -m a sweep, here or on SLURM; `launch --help` lists every key."""
    words = arguments or []
    if {"-h", "--help"} & set(words):
        reference.show_help([word for word in words if word not in ("-h", "--help")])
        return
    from sae_lora.launcher.command import launch_command

    code, _ = launch_command(words)
    raise typer.Exit(code)


@app.command("status", rich_help_panel=_RUN)
def _status(
    sweep: Annotated[
        Path, typer.Argument(metavar="SWEEP", help="outputs/<sweep>, one run in it, or outputs")
    ] = Path("outputs"),
) -> None:
    """Show the progress of each run, or each sweep; exit code 1 if a run has failed or is damaged."""
    from sae_lora.launcher.status_tables import status_rows, status_table, sweeps_in, sweeps_table

    if sweeps := sweeps_in(sweep):
        show(sweeps_table(sweeps))
        statuses = [status for runs in sweeps.values() for status in runs.values()]
        raise typer.Exit(any(status.state in ENDED_BADLY for status in statuses))
    folders = ordered(runs_of(sweep))
    statuses = status_rows(folders, lacking=True)
    show(status_table(statuses, differences_of(folders)))
    say(counts(status.state for status in statuses))
    lacking = _lack_records([folder for folder in folders if damage(folder) is None])
    raise typer.Exit(lacking or any(status.has_ended_badly for status in statuses))


@app.command("logs", rich_help_panel=_RUN)
def _logs(run: Run) -> None:
    """Show the output of a run, and the cause if it failed."""
    folder, *more = runs_of(run)
    if more:
        raise UserError(f"{run} contains {len(more) + 1} runs; choose one, such as {folder.path}")
    if folder.log.is_file():
        say(folder.log.read_text(errors="replace").rstrip())
    (folder,) = sound([folder])
    failure = folder.read_failure()
    if failure is not None:
        say(f"\nfailed: {failure['message']}\n\n{failure['details'].rstrip()}")
    elif not folder.log.exists():
        job = folder.job and slurm.last_message(folder.path.parent, folder.job)
        say(
            f"its SLURM job {folder.job}: {job}"
            if job
            else f"{folder.path.name} has printed nothing yet"
        )


@app.command("cancel", rich_help_panel=_RUN)
def _cancel(sweep: Runs) -> None:
    """Cancel the SLURM jobs of a sweep. Its runs keep their checkpoints."""
    from sae_lora.launcher.submit import cancel

    raise typer.Exit(not cancel(runs_of(sweep)))


@app.command("setup", rich_help_panel=_RUN)
def _setup(
    suite: Annotated[
        Literal["saebench", "circuits"], typer.Argument(help="SAEBench, or circuit-tracer for circuits.")
    ],
) -> None:
    """Install the packages of a suite that needs its own environment."""
    from sae_lora.evaluation.environments import BY_SUITE

    say(f"ready: {BY_SUITE[suite].make()}")


@app.command("benchmark", rich_help_panel=_RUN, cls=SeveralValues)
def _benchmark(
    style: Annotated[
        list[str] | None,
        typer.Option(callback=one_of("gemma2", "llama"), help="gemma2 or llama; default: both."),
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=2, help="Tokens per sequence; default: 256 and 1024.")
    ] = None,
    pack: Annotated[
        list[int] | None,
        typer.Option(
            callback=one_of(1, 5, 25), help="Runs that train together: 1, 5 or 25; default: all three."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of times for each row.")] = 5,
    tuned: Annotated[
        bool, typer.Option(help="Raise the thresholds of the C allocator, for both loops.")
    ] = False,
    to: Annotated[Path | None, typer.Option(help="File for the record, .json.")] = None,
) -> None:
    """Compare the speed of training with the published loop. Needs a clone of the repository."""
    repository = Path(__file__).parents[1]
    if not (repository / "scripts" / "benchmark").is_dir():
        raise UserError("the benchmark is not part of the installed package: run it in a clone")
    sys.path.insert(0, str(repository))
    from scripts.benchmark import compare

    compare.run(styles=style, contexts=context, packs=pack, rounds=rounds, tuned=tuned, to=to)


# ---- look ---------------------------------------------------------------------------------------


@app.command("table", rich_help_panel=_LOOK, cls=SeveralValues)
def _table(
    sweep: Sweep,
    columns: Annotated[
        list[str] | None,
        typer.Option(help="Factors, config keys, measures or suite/name, such as rank,kl,train.lr."),
    ] = None,
    sort: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Sort by this column, the best first.")
    ] = None,
    as_format: Annotated[
        str,
        typer.Option(
            "--format",
            callback=one_of("text", *results.FORMATS),
            help=f"text, {listed(results.FORMATS)}; csv and json have full precision.",
        ),
    ] = "text",
    each_seed: Annotated[
        bool, typer.Option("--each-seed", help="A row for each run, instead of means over seeds.")
    ] = False,
) -> None:
    """Show the finished runs of a sweep side by side; runs that differ only in seeds as their mean."""
    every = runs_of(sweep)
    folders = sound(every)
    if not any(folder.is_finished for folder in folders):
        raise UserError(f"no run in {sweep} is finished; `{PROGRAM} status {sweep}` shows them")
    names = [name for value in columns or () for name in value.split(",")]
    table = results.results(folders, columns=names, sort=sort, each_seed=each_seed)
    if as_format == "text":
        show(results.as_table(table))
        states = [status.state for status in read_statuses(folders) if status.state is not State.done]
        if states:
            say(f"not in the table: {counts(states)}")
    else:
        say(results.FORMATS[as_format](table))
    raise typer.Exit(_lack_records(folders) or len(folders) < len(every))


def _lack_records(folders: list[RunFolder]) -> bool:
    """Name the results of suites that cannot be used; return true if there are any."""
    sweeps = dict.fromkeys(folder.path.parent for folder in folders)
    similarities = filter(None, map(similarity_results.damage, sweeps))
    lines = [*suite_records.damaged(folders), *similarities]
    for line in lines:
        complain("damaged", f"{line}; `{PROGRAM} evaluate` measures it again")
    return bool(lines)


@app.command("report", rich_help_panel=_LOOK)
def _report(
    sweeps: Annotated[list[Path], typer.Argument(metavar="SWEEP", help="outputs/<sweep>, one or more")],
    to: Annotated[
        Path | None, typer.Option(help="Folder of the page; default: report/ in the first sweep.")
    ] = None,
    no_pictures: Annotated[
        bool, typer.Option("--no-pictures", help="Do not write SVG and PNG, which need a browser.")
    ] = False,
) -> None:
    """Write a page with the results of sweeps, and its figures."""
    from sae_lora.report import page
    from sae_lora.report.sweep import load_sweep

    runs = load_sweep(*sweeps)
    intact = sound(runs.folders)
    folder = to or sweeps[0] / "report"
    for note in page.write(runs, folder, pictures=not no_pictures):
        complain("left out", note)
    say(f"report of {count(len(runs), 'run')}: {folder / 'index.html'}")
    raise typer.Exit(_lack_records(intact) or len(intact) < len(runs))


@app.command("evaluate", rich_help_panel=_LOOK, cls=SeveralValues)
def _evaluate(
    sweep: Runs,
    suite: Annotated[
        list[str],
        typer.Option(
            callback=one_of(*Suite.__members__, "all"), help=f"{listed(Suite.__members__, 20)}, or all."
        ),
    ] = ["core"],  # noqa: B006 typer copies the list
    again: Annotated[bool, typer.Option("--again", help="Repeat suites that have results.")] = False,
    device: Annotated[
        str | None,
        typer.Option(
            callback=one_of(*Device.__members__),
            help="auto, cpu or cuda; default: the device of the run.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Keys of `evaluation`, as for launch."),
    ] = None,
) -> None:
    """Measure finished runs with suites: core, mechanism, lora, latents, tasks, steering, saebench,
    circuits.
    """
    from sae_lora.evaluation import run_suites
    from sae_lora.evaluation.lora import similarity

    every = runs_of(sweep)
    intact = sound(every)
    folders = [folder for folder in intact if folder.is_finished]
    if not folders:
        raise UserError("none of these runs is finished")
    check_writable(folders[0].path.parent, "SWEEP")
    names = [name for value in suite for name in (_EVERY_SUITE if value == "all" else [value])]
    suites = [Suite[name] for name in names]
    done = run_suites.evaluate_all(folders, suites, settings or [], again=again, device=device)
    for table in evaluation_tables(folders, done.suites):
        show(table)
    if done.written:
        say(f"written into the folders of {count(done.written, 'run')}: evaluation/*.json")
    if Suite.lora in done.suites:
        similarity.compare_in_sweeps(folders)
    raise typer.Exit(done.has_failed or len(intact) < len(every))


# ---- share --------------------------------------------------------------------------------------


@app.command("export", rich_help_panel=_SHARE)
def _export(
    run: Run,
    to: Annotated[Path, typer.Option(help="A new or an empty folder.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the whole model with merged adapters.")
    ] = False,
    latents: Annotated[
        bool,
        typer.Option("--latents", help="Write its latents for Neuronpedia and SAEDashboard instead."),
    ] = False,
) -> None:
    """Write the trained weights of a run into a folder, with its SAEs and a model card."""
    if latents:
        if merge:
            raise UserError("--merge writes a model, --latents no model: choose one of them")
        from sae_lora.evaluation.latents.neuronpedia import export as export_latents

        say(f"exported: {export_latents(run, to)}")
        return
    from sae_lora.export.export import export

    say(f"exported: {export(run, to, merge=merge)}")


@app.command("push", rich_help_panel=_SHARE)
def _push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="written by `export`")],
    repo: Annotated[str, typer.Option(help="org/name; created if it does not exist.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create it as a private repository.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="The branch; created if it does not exist.")
    ] = None,
) -> None:
    """Upload an exported folder to the Hugging Face hub."""
    from sae_lora.export.push import push

    say(push(folder, repo, private=private, revision=revision))


@app.command("sync", rich_help_panel=_SHARE)
def _sync(sweep: Runs) -> None:
    """Upload the missing data of a sweep's runs to W&B."""
    from sae_lora.tracking.sync import upload

    every = runs_of(sweep)
    folders = sound(every)
    show(upload(folders))
    raise typer.Exit(len(folders) < len(every))


@app.command("dashboard", rich_help_panel=_SHARE)
def _dashboard(
    sweep: Sweep,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print it, as JSON.")] = False,
) -> None:
    """Create a W&B workspace for a sweep."""
    from sae_lora.tracking import dashboard

    make = dashboard.specification if dry_run else dashboard.save
    every = runs_of(sweep)
    folders = sound(every)
    say(make(folders))
    raise typer.Exit(len(folders) < len(every))


# ---- commands of version 0.1 --------------------------------------------------------------------


def _renamed(old: str, new: str) -> None:
    """Declare a hidden command that prints the new name of a command."""

    @app.command(old, hidden=True, context_settings=_PASS_THROUGH, add_help_option=False)
    def _(_words: Annotated[list[str] | None, typer.Argument()] = None) -> None:
        raise UserError(f"`{old}` is now `{PROGRAM} compare {new}`")


for _old, _new in _RENAMED.items():
    _renamed(_old, _new)
