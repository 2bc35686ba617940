"""The commands of `sae-lora compare`: each compares the runs of an experiment.

Imports of modules that need plotly or pandas are inside the commands.
"""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_lora.common.console import show
from sae_lora.common.files import as_json, check_writable, write_atomically
from sae_lora.records.folder import runs_of
from sae_lora.records.status import sound

Sweep = Annotated[Path, typer.Argument(metavar="SWEEP", help="outputs/<sweep>")]
ToFolder = Annotated[Path | None, typer.Option("--to", help="Folder for the numbers and figures.")]
app = typer.Typer(help="Compare the runs of an experiment.", no_args_is_help=True)


@app.command("recipes")
def _recipes(
    target: Annotated[
        Path, typer.Argument(metavar="TARGET", help="outputs/<sweep> whose final gap is the target")
    ],
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="outputs/<sweep> to compare with it")],
    to: Annotated[Path | None, typer.Option(help="File for the numbers, .json.")] = None,
) -> None:
    """Compare how soon a sweep reaches the final gap of another sweep, run by run."""
    from sae_lora.comparisons.recipes import savings, savings_table

    every = runs_of(target), runs_of(sweep)
    folders = sound(every[0]), sound(every[1])
    results = savings(*folders)
    show(savings_table(results))
    if to is not None:
        check_writable(to.parent, "--to")
        _write_results(to, results)
    raise typer.Exit(folders != every)


@app.command("methods")
def _methods(sweep: Sweep, to: ToFolder = None) -> None:
    """Compare methods after equal tokens and after equal time (experiment=methods)."""
    _compare("methods", sweep, to, "methods")


@app.command("time-to-ce")
def _time_to_ce(sweep: Sweep, to: ToFolder = None) -> None:
    """Compare the time of LoRA around an SAE and of an end-to-end SAE (experiment=time_to_ce)."""
    _compare("time_to_ce", sweep, to, "time_to_ce")


@app.command("saes")
def _saes(sweep: Sweep, to: ToFolder = None) -> None:
    """Show the cost of each SAE in runs with several (experiment=multi_sae)."""
    _compare("saes", sweep, to, "multi_sae")


@app.command("groups")
def _groups(sweep: Sweep, to: ToFolder = None) -> None:
    """Compare SAEs that are shared by groups of blocks (experiment=groups)."""
    _compare("layer_groups", sweep, to, "groups")


@app.command("replacement")
def _replacement(sweep: Sweep, to: ToFolder = None) -> None:
    """Compare ways to adapt a model whose MLPs are transcoders (experiment=replacement)."""
    _compare("replacement", sweep, to, "replacement")


@app.command("latents")
def _latents(sweep: Sweep, to: ToFolder = None) -> None:
    """Compare how far ways to adapt change the meaning of latents (experiment=latents)."""
    _compare("latents", sweep, to, "latents")


def _compare(module: str, sweep: Path, to: Path | None, name: str) -> None:
    """Show a comparison, and write its numbers as `<name>.json` and its figures into a folder."""
    from sae_lora.common.plots import write_svgs

    comparison = importlib.import_module(f"sae_lora.comparisons.{module}")
    every = runs_of(sweep)
    folders = sound(every)
    results = comparison.compare(folders)
    show(comparison.table(results))
    if to is not None:
        check_writable(to, "--to")
        _write_results(to / f"{name}.json", results)
        write_svgs(comparison.figures(folders), to)
    raise typer.Exit(len(folders) < len(every))


def _write_results(file: Path, results: Sequence[Any]) -> None:
    write_atomically(file, as_json([dataclasses.asdict(result) for result in results]))
