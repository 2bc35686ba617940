"""The launcher: gets every point of a sweep at once, settles what each means, and runs what is left.

Planning resolves each point to SAEs that exist, names it, and finds its folder; nothing is loaded.
Dispatching is in this process, one run after another; submitit takes its place behind `launch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from omegaconf import OmegaConf

from sae_lora.checks import adapted_blocks, canonical_blocks
from sae_lora.config import Config, as_dict, identity, readable_name
from sae_lora.errors import ConfigError
from sae_lora.lease import held
from sae_lora.records import RunFolder
from sae_lora.report import comparison_table, run_table
from sae_lora.terminal import complain, console, say, show


class State(Enum):
    """What the run folder says about a run."""

    new = "new"
    unfinished = "unfinished"
    failed = "failed before"
    done = "done"


@dataclass(frozen=True)
class Run:
    """One point of a plan: a config that is complete, and the folder it belongs to."""

    config: Config
    folder: RunFolder

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.path.name

    @property
    def state(self) -> State:
        """What the folder says now."""
        if self.folder.is_finished:
            return State.done
        if self.folder.has_failed:
            return State.failed
        return State.unfinished if self.folder.config.exists() else State.new


@dataclass(frozen=True)
class Plan:
    """Every run of one command, each once."""

    runs: list[Run]
    notes: list[str]
    """What a person should know: the nearest SAE taken, the same point twice."""


def plan(points: Sequence[Config]) -> Plan:
    """Settles what the points mean.

    Raises:
        ConfigError: For a point that cannot work.
        UserError: Where a model's config cannot be had.
    """
    # These bring torch and transformers in, which a wrong config need not wait for.
    from sae_lora.models import read_dimensions
    from sae_lora.saes.registry import resolve

    runs: dict[Path, Run] = {}
    notes: list[str] = []
    for point in points:
        dimensions = read_dimensions(point.model)
        resolution = resolve(point, dimensions)
        config = replace(
            point,
            sae=replace(point.sae, used=resolution.choices),
            lora=replace(point.lora, blocks=canonical_blocks(point.lora.blocks)),
        )
        adapted_blocks(
            config.lora.blocks, min(one.block for one in resolution.choices), dimensions.n_blocks
        )
        _check_context(config, dimensions.max_context)
        notes += [note for note in resolution.notes if note not in notes]
        path = Path(config.output_dir) / config.sweep / f"{readable_name(config)}-{identity(config)}"
        if path in runs:
            notes.append(f"{path.name} is named twice and runs once")
        runs.setdefault(path, Run(config, RunFolder(path)))
    return Plan(list(runs.values()), notes)


def _check_context(config: Config, longest: int | None) -> None:
    if longest is not None and config.data.context_length > longest:
        raise ConfigError(
            "data.context_length",
            config.data.context_length,
            f"at most {longest}, the longest text that {config.model.name} was made for",
            nearest=longest,
        )


def launch(points: Sequence[Config]) -> int:
    """Plans the points and runs what is not done. Ends with a table.

    Returns:
        The process's exit code: 0 where every run of the plan is finished.

    Raises:
        UserError: Before anything runs, where a point cannot work.
    """
    if not points:  # Hydra was asked for help, or to show a config
        return 0
    planned = plan(points)
    settings = points[0].launcher
    for note in planned.notes:
        say(f"note: {note}")
    if settings.dry_run:
        for run in planned.runs:
            say(f"{run.state.value:>13}  {run.name}")
        return 0
    passed_over = {State.done} if settings.retry_failed else {State.done, State.failed}
    left = [run for run in planned.runs if run.state not in passed_over]
    done = sum(run.state is State.done for run in planned.runs)
    for run in left:
        _freeze(run)
    for number, run in enumerate(left, start=1):
        console.rule(f"run {number} of {len(left)}: {run.name}", align="left", style="dim")
        _execute(run.folder)
    if done:
        say(f"{done} of {len(planned.runs)} done before, not run again")
    _conclude(planned)
    return 0 if all(run.folder.is_finished for run in planned.runs) else 1


def run_now(point: Config) -> float:
    """Runs one point on the spot, for Hydra's own launchers and adaptive sweepers.

    Returns:
        The objective to minimise: the CE gap that is left, in nats per token.

    Raises:
        UserError: Where the point cannot work.
    """
    from sae_lora.run import execute

    (run,) = plan([point]).runs
    if run.state is not State.done:
        _freeze(run)
        with held(run.folder.path) as lease:
            execute(run.folder, make_sure=lease.check)
    return run.folder.read_summary()["ce_gap"]


def _freeze(run: Run) -> None:
    """Writes the resolved config into the run's folder: all that the run will read."""
    run.folder.write_config(OmegaConf.to_yaml(as_dict(run.config)))


def _execute(folder: RunFolder) -> None:
    """Runs it here. A failure is written down and shown; the next run goes on."""
    from sae_lora.run import EXIT_INTERRUPTED, attempt

    if attempt(folder) == EXIT_INTERRUPTED:
        raise KeyboardInterrupt  # the sweep stops with it; what was reached is saved


def _conclude(planned: Plan) -> None:
    """The table at the end, and where everything is."""
    finished = [run for run in planned.runs if run.folder.is_finished]
    if len(planned.runs) == 1 and finished:
        summary = finished[0].folder.read_summary()
        show(run_table(summary))
        say(f"run folder  {finished[0].folder.path}")
        say(f"W&B run     {summary['tracked_at'] or 'none'}")
    elif finished:
        show(comparison_table([run.folder for run in finished]))
        say(f"run folders  {finished[0].folder.path.parent}")
    failed = [run for run in planned.runs if run.state is State.failed]
    for run in failed:
        complain("failed", str(run.folder.failure))
    if failed:
        complain(f"{len(failed)} failed", "launcher.retry_failed=true runs what failed again")
