"""The launcher: plans all points of a sweep, and dispatches the runs that are not done."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from rich.table import Table

from sae_lora.common.console import complain, count, say, show
from sae_lora.common.errors import EXIT_STOPPED, ConfigError
from sae_lora.common.files import check_can_be_made, check_writable
from sae_lora.common.locks import HeldError, held
from sae_lora.config.enums import LauncherKind, TrackingMode
from sae_lora.config.execution import LauncherConfig
from sae_lora.config.schema import WRITTEN_BY_PLANNER, Config
from sae_lora.config.serialize import as_dict, completed, leaves, written
from sae_lora.evaluation.suite_records import evaluate_command, missing, pending
from sae_lora.launcher.expected_time import at_most, expected_time, run_timed
from sae_lora.launcher.halving import (
    check_halving,
    described,
    refuse,
    saved,
    write_brackets,
)
from sae_lora.launcher.objective import check_objective
from sae_lora.launcher.packs import divides, packed, too_large
from sae_lora.launcher.plan import Plan, Run, plan, unpinned
from sae_lora.launcher.submit import launching, submit, wait_for, wait_for_others
from sae_lora.records import slurm
from sae_lora.records.factors import differences, values_of
from sae_lora.records.status import RunStatus, State, counts, is_done, read_statuses
from sae_lora.report.results import comparison_table
from sae_lora.report.tables import run_table
from sae_lora.tracking.wandb_view import trial_id

_POLL_S = 0.5
_MAX_LINES = 5
"""Largest number of runs that are named in messages; the others are counted."""


_OF_COMMAND = {
    *("launcher.dry_run", "launcher.retry_failed", "launcher.wait", "tracking.name"),
    *("launcher.halving", "launcher.rungs", "launcher.keep"),
}
"""Keys that say what a command does with runs, or what it calls them."""


def launch(points: Sequence[Config]) -> int:
    """Plan the points, run or submit those that are not done, and print a table.

    Returns:
        The exit code: 0 if every run of the plan is finished, outranked or submitted.

    Raises:
        UserError: If a point cannot work, before anything runs.
    """
    settings = _common_settings(points)
    for point in points:
        check_objective(point)
    check_halving(points)
    if settings.kind is LauncherKind.slurm:
        try:
            slurm.check_partition(settings.partition)
        except slurm.UnreachableError as error:
            if not settings.dry_run:  # a plan may be made on another machine
                raise
            say(f"note: the partition was not checked: {error}")
    planned = plan(points)
    refuse(planned.waiting, "points whose init names a method begin with finished runs of this command")
    for note in planned.notes:
        say(f"note: {note}")
    if (rule := described(planned.runs)) is not None:
        say(rule)
    if planned.waiting:
        waiting = count(len(planned.waiting), "point")
        say(f"{waiting} will start after these runs, from their results")
    if settings.dry_run:
        _show_plan(planned, settings)
        return int(_complain_of_damage(_with_status(planned.runs)))
    code = _execute(planned, settings)
    while code == 0 and planned.waiting and (settings.kind is LauncherKind.local or settings.wait):
        planned = plan(points)
        code = _execute(planned, settings, again=True)
    if code == 0 and planned.waiting:
        waiting = count(len(planned.waiting), "point")
        say(f"{waiting} not submitted yet: repeat the command when these runs are done")
    return code


def _execute(planned: Plan, settings: LauncherConfig, *, again: bool = False) -> int:
    """Run or submit the plan and return the exit code; `again` if this command did so before."""
    for run, status in _with_status(planned.runs):
        if _is_to_run(run, status, settings):
            _check_can_run(run.config)
    sweeps = sorted({run.folder.path.parent for run in planned.runs})
    for sweep in sweeps:
        check_writable(sweep, "output_dir")
    on_slurm = settings.kind is LauncherKind.slurm
    with ExitStack() as stack:
        with _locked(sweeps):
            packs = packed(_prepare_runs(planned, settings, again=again), settings)
            for note in too_large(packs, settings):
                complain("note", note)
            write_brackets(_with_status(planned.runs))
            if packs and on_slurm:
                say(expected_time(packs, settings)[0])
                submit(packs, settings)
            starts_here = packs and not on_slurm
            folder = stack.enter_context(launching(packs)) if starts_here else None
        if folder is not None:
            try:
                run_timed(packs, settings, folder)
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt(_how_to_continue(planned)) from stop
    if not packs and trial_id() is not None:  # `wandb agent` repeats a run that is done
        from sae_lora.tracking.sync import upload  # brings torch in

        upload([run.folder for run in planned.runs if is_done(run.folder) or run.folder.is_outranked])
    if not on_slurm:
        _wait_for_others(planned)
    if on_slurm:
        if not settings.wait:
            return int(_complain_of_damage(_with_status(planned.runs)))
        try:
            wait_for([run.folder for run in planned.runs])
        except KeyboardInterrupt:
            say("the jobs continue without this command")
            return EXIT_STOPPED
    return _print_results(planned, settings)


def _check_can_run(config: Config) -> None:
    """Refuse what the model lacks, a folder that cannot be, and a GPU that this machine lacks."""
    from sae_lora.train.cost.runs import check_fits  # brings torch in

    check_fits(config)
    if config.tracking.dir is not None and config.tracking.mode is not TrackingMode.disabled:
        check_can_be_made(Path(config.tracking.dir).expanduser(), "tracking.dir (or WANDB_DIR)")
    if config.launcher.kind is LauncherKind.local:
        from sae_lora.models.loading import device_of  # brings torch in

        device_of(config)


def _common_settings(points: Sequence[Config]) -> LauncherConfig:
    """The launcher's settings, which all points must share."""
    first = asdict(points[0].launcher)
    for point in points[1:]:
        for name, value in asdict(point.launcher).items():
            if value != first[name]:
                raise ConfigError(
                    f"launcher.{name}", value, "the same for all points of a sweep", first[name]
                )
    return points[0].launcher


def _show_plan(planned: Plan, settings: LauncherConfig) -> None:
    """Print a table of all runs: state, SAEs, pack and cost."""
    from sae_lora.launcher.prefetch import bos_notes, check_local  # brings torch in
    from sae_lora.train.cost.estimate import estimate
    from sae_lora.train.cost.runs import notes

    for note in bos_notes([run.config for run in planned.runs]):
        say(f"note: {note}")
    table = Table(box=None, pad_edge=False, header_style="dim")
    varying = differences([values_of(as_dict(run.config), {}) for run in planned.runs])
    table.add_column("run", no_wrap=True)
    for name in varying:
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("state", "SAE"):
        table.add_column(name, no_wrap=True)
    for name in ("pack", "trained weights", "training FLOPs", "peak memory"):
        table.add_column(name, justify="right")
    # With their commits, runs that were started before would not share packs with new runs.
    runs = _with_status([replace(run, config=unpinned(run.config)) for run in planned.runs])
    to_do = [run for run, status in runs if _is_to_run(run, status, settings)]
    check_local([run.config for run in to_do])
    for run in to_do:
        _check_can_run(run.config)
    packs = packed(to_do, settings)
    numbers = {run.name: number for number, pack in enumerate(packs, 1) for run in pack}
    flops_unpacked = 0.0
    for number, (run, status) in enumerate(runs):
        cost = estimate([run.config])
        flops_unpacked += cost.flops if run in to_do else 0.0
        table.add_row(
            run.name,
            *(values[number] for values in varying.values()),
            status.state.value,
            _sae_names(run.config),
            str(numbers.get(run.name, "–")),
            f"{cost.adapter_weights:,}",
            f"{cost.flops:.2e}",
            f"{cost.peak_bytes / 1e9:.2f} GB",
        )
    show(table)
    remarks = Counter(note for run in planned.runs for note in notes(run.config))
    for text, number in remarks.items():
        say(f"note: {count(number, 'run')}: {text}")
    say(f"{count(len(runs), 'run')}: {counts(status.state for _, status in runs)}")
    if not to_do:
        say("nothing to do")
        return
    for note in too_large(packs, settings):
        say(f"note: {note}")
    costs = [estimate([run.config for run in pack], divides(pack, settings)) for pack in packs]
    flops = sum(cost.flops for cost in costs)
    memory = max((cost.peak_bytes for cost in costs), default=0.0)
    say(
        f"to do: {count(len(to_do), 'run')} in {count(len(packs), 'pack')}, "
        f"{at_most(settings)}{flops:.2e} training FLOPs ({flops_unpacked:.2e} without packs) plus "
        f"evaluations, peak memory {memory / 1e9:.2f} GB"
    )
    if packs:
        say(expected_time(packs, settings)[0])


def _wait_for_others(planned: Plan) -> None:
    """Wait for the runs that other launches on their machines have begun, or will begin."""
    others = [
        run.folder
        for run, status in _with_status(planned.runs)
        if status.state in (State.running, State.queued) and run.folder.job is None
    ]
    if others:
        say(f"waiting for {count(len(others), 'run')} of another launch")
        wait_for_others(others)


def _sae_names(config: Config) -> str:
    """The SAEs of a run; if they are more than three, their number, the first and the last."""
    names = [choice.id or choice.path or config.sae.family.name for choice in config.sae.used]
    if len(names) > 3:
        return f"{len(names)} SAEs, {names[0]} to {names[-1]}"
    return ", ".join(names)


def _is_to_run(run: Run, status: RunStatus, settings: LauncherConfig) -> bool:
    """True if the launch starts or continues the run: a failed one only if asked to, or changed."""
    if status.state is State.outranked:
        return settings.halving is None
    is_failed = status.state is State.failed
    return status.is_to_do or (is_failed and (settings.retry_failed or bool(_changes(run))))


def _changes(run: Run) -> list[str]:
    """Settings in which the last attempt at a run differs from the plan: `train.device=cuda`.

    None of them can change the result; but one of them may be why the attempt failed.
    """
    before, now = leaves(completed(run.folder.read_config())), leaves(as_dict(run.config))
    return [
        f"{key}={written(value)}"
        for key, value in before.items()
        if key not in WRITTEN_BY_PLANNER | _OF_COMMAND and now[key] != value
    ]


def _how_to_continue(planned: Plan) -> str:
    """Advice after a stop, empty if repeating the command is enough: that leaves out finished runs."""
    done = [run for run in planned.runs if is_done(run.folder)]
    command = _missing_suites(done)
    if command is None:
        return ""
    advice = f"`{command}` runs the suites that finished runs lack"
    is_all = len(done) == len(planned.runs) and not planned.waiting
    return advice if is_all else f"repeat the command to continue the other runs; {advice}"


def _missing_suites(done: Sequence[Run]) -> str | None:
    """The command for suites that this command asks for and finished runs lack; `None` without any."""
    names = {
        suite.name
        for run in done
        if (asked := run.config.evaluation).suites
        for suite in missing(run.folder, asked.suites, vars(asked))
    }
    return evaluate_command(done[0].folder.path.parent, names) if names else None


def _prepare_runs(planned: Plan, settings: LauncherConfig, *, again: bool) -> list[Run]:
    """Fetch the data of the runs to start now, write their configs, and return them.

    Print why other runs are left out; with `again`, do not mention finished runs.
    """
    statuses = _with_status(planned.runs)
    states = Counter(status.state for _, status in statuses)
    if states[State.done] and not again:
        say(f"{states[State.done]} of {len(planned.runs)} already done, skipped")
        done = [run for run, status in statuses if status.state is State.done]
        if command := _missing_suites(done):
            say(f"these runs lack suites that you ask for: `{command}`")
    failed = [(run, status) for run, status in statuses if status.state is State.failed]
    changed = {change for run, _ in failed for change in _changes(run)}
    if failed:
        advice = "launcher.retry_failed=true runs them again"
        if settings.retry_failed:
            advice = "running again"
        elif changed:
            advice = f"with {', '.join(sorted(changed))}; running again with the present settings"
        complain(f"{len(failed)} failed earlier", advice)
    busy = [
        f"{run.name} is {status.state.value}, {status.note}"
        for run, status in statuses
        if status.state in (State.running, State.queued)
    ]
    for line in busy[:_MAX_LINES]:
        say(f"not started: {line}")
    if len(busy) > _MAX_LINES:
        say(f"not started: {len(busy) - _MAX_LINES} more runs that are running or queued")

    runs = [run for run, status in statuses if _is_to_run(run, status, settings)]
    if not runs:
        return []
    from sae_lora.launcher.prefetch import prefetched  # brings torch in

    configs = prefetched([run.config for run in runs])
    fetched = [replace(run, config=config) for run, config in zip(runs, configs, strict=True)]
    # Fetching may take an hour. Another launch may have started some of the runs meanwhile.
    ready = [run for run, status in _with_status(fetched) if _is_to_run(run, status, settings)]
    for run in ready:
        run.freeze()
    if saved := [step for run in ready if (step := run.folder.checkpoint_step)]:
        steps = (
            f"step {saved[0]:,}" if len(set(saved)) == 1 else f"steps {min(saved):,} to {max(saved):,}"
        )
        say(f"{count(len(saved), 'run')} resuming from {steps}")
    return ready


def _complain_of_damage(statuses: Sequence[tuple[Run, RunStatus]]) -> bool:
    """Name damaged runs, which are neither run nor counted as done; return true if there are any."""
    damaged = [(run, status) for run, status in statuses if status.state is State.damaged]
    for run, status in damaged[:_MAX_LINES]:
        complain("damaged", f"{run.folder.path}: {status.note}; move the folder away to run it again")
    if len(damaged) > _MAX_LINES:
        complain("damaged", f"{len(damaged) - _MAX_LINES} more runs; `sae-lora status` shows them")
    return bool(damaged)


def _with_status(runs: Sequence[Run]) -> list[tuple[Run, RunStatus]]:
    """Pairs of run and status."""
    return list(zip(runs, read_statuses([run.folder for run in runs]), strict=True))


@contextmanager
def _locked(sweeps: Sequence[Path]) -> Iterator[None]:
    """Let one launch at a time choose runs, so that no run is frozen or submitted twice."""
    with ExitStack() as stack:
        for sweep in sweeps:
            has_printed = False
            while True:
                try:
                    stack.enter_context(held(sweep))
                    break
                except HeldError:
                    if not has_printed:
                        say(f"waiting for another launch of {sweep.name} to start its runs")
                    has_printed = True
                    time.sleep(_POLL_S)
        yield


def _print_results(planned: Plan, settings: LauncherConfig) -> int:
    """Print the table of results, the folders and the unfinished runs; return the exit code."""
    finished = [run for run in planned.runs if is_done(run.folder)]
    if len(planned.runs) == 1 and finished:
        summary = finished[0].folder.read_summary()
        show(run_table(summary))
        say(f"run folder  {finished[0].folder.path}")
        say(f"W&B run     {summary['tracked_at'] or 'none'}")
    elif finished:
        show(comparison_table([run.folder for run in finished]))
        say(f"run folders  {finished[0].folder.path.parent}")
    statuses = _with_status(planned.runs)
    ended = (State.done,) if settings.halving is None else (State.done, State.outranked)
    if outranked := [run for run, status in statuses if status.state is State.outranked]:
        say(saved(outranked, len(planned.runs)))
    for run, status in statuses:
        if status.state is State.failed:
            complain("failed", f"{status.note}\n        {run.folder.failure}")
        elif status.state not in (*ended, State.damaged):
            note = f" ({status.note})" if status.note else ""
            complain("not finished", f"{run.name} is {status.state.value}{note}")
    for run in finished:  # most ask for no suites, and `pending` reads a config from disk
        if run.config.evaluation.suites and (lacking := pending(run.folder)):
            names = ", ".join(suite.name for suite in lacking)
            complain("not evaluated", f"{run.name} by {names}; see its log\n        {run.folder.log}")
    _complain_of_damage(statuses)
    failed = sum(status.state is State.failed for _, status in statuses)
    if failed:
        complain(f"{failed} failed", "launcher.retry_failed=true runs them again")
    return int(any(status.state not in ended for _, status in statuses))
