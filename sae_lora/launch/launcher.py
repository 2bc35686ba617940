"""The launcher: gets every point of a sweep at once, plans, and dispatches what is left to do."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.table import Table

from sae_lora.common.console import complain, say, show
from sae_lora.common.errors import EXIT_INTERRUPTED, ConfigError, UserError
from sae_lora.common.files import check_writable
from sae_lora.common.locks import HeldError, held
from sae_lora.config.enums import LauncherKind
from sae_lora.config.schema import Config, LauncherConfig
from sae_lora.evaluation.suite_records import pending
from sae_lora.launch.packs import packed
from sae_lora.launch.plan import Plan, Run, plan, unpinned
from sae_lora.launch.submit import run_here, submit, wait_for
from sae_lora.records import slurm
from sae_lora.records.status import Standing, State, counts, standings
from sae_lora.report.tables import comparison_table, run_table

_LOOK_EVERY_S = 0.5
_MOST_LINES = 5
"""Runs that are named one by one; the rest is counted."""


def launch(points: Sequence[Config]) -> int:
    """Plans the points and runs what is not done. Ends with a table.

    Returns:
        The process's exit code: 0 where every run of the plan is finished, or is submitted.

    Raises:
        UserError: Before anything runs, where a point cannot work.
    """
    if not points:  # Hydra was asked for help, or to show a config
        return 0
    settings = _common_settings(points)
    if settings.kind is LauncherKind.slurm:
        slurm.check_partition(settings.partition)
    planned = plan(points)
    _say_notes(planned)
    if settings.dry_run:
        _show_plan(planned, settings)
        return 0
    code = _carry_out(planned, settings)
    while code == 0 and planned.waiting and (settings.kind is LauncherKind.local or settings.wait):
        planned = plan(points)
        code = _carry_out(planned, settings, again=True)
    if code == 0 and planned.waiting:
        say(f"{len(planned.waiting)} more begin with what these make; the same command submits them")
    return code


def _carry_out(planned: Plan, settings: LauncherConfig, *, again: bool = False) -> int:
    """Runs, or submits, what can be; returns the process's exit code.

    Args:
        planned: What is wanted.
        settings: How.
        again: Whether this command has carried out a part of it before.
    """
    sweeps = sorted({run.folder.path.parent for run in planned.runs})
    for sweep in sweeps:
        check_writable(sweep, "output_dir")
    match settings.kind:
        case LauncherKind.local:
            with _alone_in(sweeps):
                to_do = _to_do(planned, settings, again=again)
            if to_do:
                run_here(packed(to_do, settings), settings)
        case LauncherKind.slurm:
            with _alone_in(sweeps):
                to_do = _to_do(planned, settings, again=again)
                if to_do:
                    submit(packed(to_do, settings), settings)
            if not settings.wait:
                return 0
            try:
                wait_for([run.folder for run in planned.runs])
            except KeyboardInterrupt:
                say("the jobs go on without this command")
                return 130
        case _:
            raise NotImplementedError(settings.kind)
    _conclude(planned)
    return 0 if all(run.folder.is_finished for run in planned.runs) else 1


def _say_notes(planned: Plan) -> None:
    for note in planned.notes:
        say(f"note: {note}")
    if planned.waiting:
        say(f"{len(planned.waiting)} more points begin with the result of one of these, and come after")


def _common_settings(points: Sequence[Config]) -> LauncherConfig:
    """What the launcher is to do, which is the same for all points.

    Raises:
        ConfigError: Where points differ in it.
    """
    first = asdict(points[0].launcher)
    for point in points[1:]:
        for name, value in asdict(point.launcher).items():
            if value != first[name]:
                raise ConfigError(
                    f"launcher.{name}", value, "the same for all points of a sweep", first[name]
                )
    return points[0].launcher


def _show_plan(planned: Plan, settings: LauncherConfig) -> None:
    """Every run of the plan: what it means, how far it is, with whom it trains, what it will cost.

    A name on the hub is taken to stand for what it stood for when a run was begun.
    """
    from sae_lora.train.cost import estimate  # brings torch in

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("run", "state", "SAE"):
        table.add_column(name, no_wrap=True)
    for name in ("pack", "trained weights", "training FLOPs", "peak memory"):
        table.add_column(name, justify="right")
    found = _standings(planned)
    wanted = _wanted(settings)
    to_do = [
        replace(run, config=unpinned(run.config))
        for run, standing in zip(planned.runs, found, strict=True)
        if standing.state in wanted
    ]
    packs = packed(to_do, settings)
    number = {run.name: number for number, pack in enumerate(packs, 1) for run in pack}
    alone = 0.0
    for run, standing in zip(planned.runs, found, strict=True):
        cost = estimate([run.config])
        alone += cost.flops if standing.state in wanted else 0.0
        table.add_row(
            run.name,
            standing.state.value,
            ", ".join(one.id or one.path or run.config.sae.family.name for one in run.config.sae.used),
            str(number.get(run.name, "–")),
            f"{cost.adapter_weights:,}",
            f"{cost.flops:.2e}",
            f"{cost.peak_bytes / 1e9:.2f} GB",
        )
    show(table)
    say(f"{len(planned.runs)} runs: {counts(standing.state for standing in found)}")
    costs = [estimate([run.config for run in pack]) for pack in packs]
    flops = sum(cost.flops for cost in costs)
    memory = max((cost.peak_bytes for cost in costs), default=0.0)
    say(
        f"to do: {len(to_do)} runs in {len(packs)} packs, {flops:.2e} training FLOPs "
        f"({alone:.2e} if each were alone; evaluations come on top), at most {memory / 1e9:.2f} GB"
    )


def _wanted(settings: LauncherConfig) -> set[State]:
    """The states from which a run is run."""
    return {State.new, State.resumable} | ({State.failed} if settings.retry_failed else set())


def _to_do(planned: Plan, settings: LauncherConfig, *, again: bool) -> list[Run]:
    """The runs that are to be run now, frozen, with all that they read fetched.

    Says what becomes of the others; `again`, of those that are done nothing more.
    """
    before = _standings(planned)
    count = Counter(standing.state for standing in before)
    if count[State.done] and not again:
        say(f"{count[State.done]} of {len(planned.runs)} done before, not run again")
    if count[State.failed]:
        advice = "run again" if settings.retry_failed else "launcher.retry_failed=true runs them again"
        complain(f"{count[State.failed]} failed before", advice)
    elsewhere = [
        f"{run.name} is {standing.state.value}, {standing.note}"
        for run, standing in zip(planned.runs, before, strict=True)
        if standing.state in (State.running, State.queued)
    ]
    for line in elsewhere[:_MOST_LINES]:
        complain("left alone", line)
    if len(elsewhere) > _MOST_LINES:
        complain("left alone", f"{len(elsewhere) - _MOST_LINES} more that are running or queued")

    wanted = _wanted(settings)
    found = [run for run, standing in zip(planned.runs, before, strict=True) if standing.state in wanted]
    if not found:
        return []
    from sae_lora.launch.prefetch import prefetched  # brings torch in

    configs = prefetched([run.config for run in found])
    # That may have taken an hour, in which another launch's runs have gone on.
    now = standings([run.folder for run in found])
    ready = [
        replace(run, config=config)
        for run, config, standing in zip(found, configs, now, strict=True)
        if standing.state in wanted
    ]
    for run in ready:
        run.freeze()
    return ready


def _standings(planned: Plan) -> list[Standing]:
    return standings([run.folder for run in planned.runs])


@contextmanager
def _alone_in(sweeps: Sequence[Path]) -> Iterator[None]:
    """One launch at a time looks which runs are free, so that none is frozen or submitted twice."""
    with ExitStack() as stack:
        for sweep in sweeps:
            said = False
            while True:
                try:
                    stack.enter_context(held(sweep))
                    break
                except HeldError:
                    if not said:
                        say(f"another launch of {sweep.name} is at work; waiting for it")
                    said = True
                    time.sleep(_LOOK_EVERY_S)
        yield


def run_now(point: Config) -> float:
    """Runs one point on the spot, for Hydra's own launchers and adaptive sweepers.

    Returns:
        The objective to minimise: the CE gap that is left, in nats per token.

    Raises:
        UserError: Where the point cannot work, or its run fails.
        KeyboardInterrupt: When asked to stop; where training stands is saved.
    """
    from sae_lora.run.evaluate import evaluate_pending
    from sae_lora.run.execute import attempt

    (run,) = plan([point]).runs
    if not run.folder.is_finished:
        with held(run.folder.path):
            if not run.folder.is_finished:  # another process may have ended it meanwhile
                run.freeze()
        if attempt([run.folder]) == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        if not run.folder.is_finished:
            raise UserError(run.folder.failure_message or f"{run.name} was not finished")
        evaluate_pending([run.folder])
    return run.folder.read_summary()["ce_gap"]


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
    ended = _standings(planned)
    for run, standing in zip(planned.runs, ended, strict=True):
        if standing.state is State.failed:
            complain("failed", f"{standing.note}\n        {run.folder.failure}")
        elif standing.state is not State.done:
            note = f" ({standing.note})" if standing.note else ""
            complain("not finished", f"{run.name} is {standing.state.value}{note}")
    for run in finished:  # most ask for none, whose configs need not be read once more
        if run.config.evaluation.suites and (left := pending(run.folder)):
            names = ", ".join(suite.name for suite in left)
            complain(
                "not evaluated", f"{names} of {run.name}: its log says why\n        {run.folder.log}"
            )
    failed = sum(standing.state is State.failed for standing in ended)
    if failed:
        complain(f"{failed} failed", "launcher.retry_failed=true runs what failed again")
