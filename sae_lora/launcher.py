"""The launcher: gets every point of a sweep at once, plans, and gives what is left to submitit.

A job (`Job`) holds runs and executes them one after another, each in a process of its own. On this
machine jobs are started as places become free, and watched; on a cluster they are submitted.
"""

import os
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import submitit
from rich.table import Table
from submitit.core.utils import FailedJobError

from sae_lora import slurm, tracking
from sae_lora.config import Config, LauncherConfig, LauncherKind
from sae_lora.errors import ConfigError, UserError
from sae_lora.job import Job
from sae_lora.lease import HeldError, held, holder
from sae_lora.plan import Plan, Run, plan
from sae_lora.records import RunFolder, SubmittedJob, check_writable
from sae_lora.report import comparison_table, run_table
from sae_lora.standing import Standing, State, standings
from sae_lora.terminal import complain, say, show
from sae_lora.watch import Watch

_NO_LIMIT_MIN = 10 * 365 * 24 * 60
_TIMEOUTS = 1_000
"""How often a job may run out of time and be started again; one that hangs ends itself."""
_OFFLINE = {"HF_HUB_OFFLINE": "1"}
"""All is fetched before; a node without internet is the normal case."""
_LOOK_EVERY_S = 0.5
_ASK_SLURM_EVERY_S = 2.0


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
    for note in planned.notes:
        say(f"note: {note}")
    if settings.dry_run:
        _show_plan(planned)
        return 0
    sweeps = sorted({run.folder.path.parent for run in planned.runs})
    for sweep in sweeps:
        check_writable(sweep)
    match settings.kind:
        case LauncherKind.local:
            left = _to_do(planned, settings)
            if left:
                _run_here(left, settings)
        case LauncherKind.slurm:
            with _alone_in(sweeps):
                left = _to_do(planned, settings)
                jobs = _submit(left, settings) if left else set()
            if not settings.wait:
                return 0
            _wait_for(jobs, [run.folder for run in planned.runs])
        case _:
            raise NotImplementedError(settings.kind)
    _conclude(planned)
    return 0 if all(run.folder.is_finished for run in planned.runs) else 1


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


def _show_plan(planned: Plan) -> None:
    """Every run of the plan: what it means, how far it is, what it will cost."""
    from sae_lora.estimate import estimate  # brings torch in

    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("run", "state", "SAE"):
        table.add_column(name, no_wrap=True)
    for name in ("adapter weights", "training FLOPs", "peak memory"):
        table.add_column(name, justify="right")
    flops, memory = 0.0, 0.0
    count: Counter[State] = Counter()
    for run, standing in zip(planned.runs, _standings(planned), strict=True):
        cost = estimate(run.config)
        count[standing.state] += 1
        if standing.state is not State.done:
            flops, memory = flops + cost.flops, max(memory, cost.peak_bytes)
        table.add_row(
            run.name,
            standing.state.value,
            ", ".join(f"{one.id or one.path or 'identity'}" for one in run.config.sae.used),
            f"{cost.adapter_weights:,}",
            f"{cost.flops:.2e}",
            f"{cost.peak_bytes / 1e9:.2f} GB",
        )
    show(table)
    states = ", ".join(f"{number} {state.value}" for state, number in count.items())
    say(f"{len(planned.runs)} runs: {states}")
    say(f"to do: {flops:.2e} training FLOPs (evaluations come on top), at most {memory / 1e9:.2f} GB")


def _to_do(planned: Plan, settings: LauncherConfig) -> list[Run]:
    """The runs that are to be run now, frozen, with all that they read fetched.

    Says what becomes of the others.
    """
    found = []
    count: Counter[State] = Counter()
    for run, standing in zip(planned.runs, _standings(planned), strict=True):
        count[standing.state] += 1
        if standing.is_to_do or (standing.state is State.failed and settings.retry_failed):
            found.append(run)
        elif standing.state in (State.running, State.queued):
            complain("left alone", f"{run.name} is {standing.state.value}, {standing.note}")
    if count[State.done]:
        say(f"{count[State.done]} of {len(planned.runs)} done before, not run again")
    if count[State.failed]:
        again = (
            "run again" if settings.retry_failed else "not run again unless launcher.retry_failed=true"
        )
        complain(f"{count[State.failed]} failed before", again)
    if not found:
        return found
    from sae_lora.prefetch import prefetched  # brings torch in

    configs = prefetched([run.config for run in found])
    found = [replace(run, config=config) for run, config in zip(found, configs, strict=True)]
    for run in found:
        run.freeze()
    return found


def _standings(planned: Plan) -> list[Standing]:
    return standings([run.folder for run in planned.runs])


@contextmanager
def _alone_in(sweeps: Sequence[Path]) -> Iterator[None]:
    """One launch at a time looks which runs are free and submits them, so that none goes in twice."""
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
        UserError: Where the point cannot work.
    """
    from sae_lora.run import execute

    (run,) = plan([point]).runs
    if not run.folder.is_finished:
        run.freeze()
        with held(run.folder.path) as lease:
            if not run.folder.is_finished:  # another process may have ended it meanwhile
                execute(run.folder, make_sure=lease.check)
    return run.folder.read_summary()["ce_gap"]


def _run_here(runs: Sequence[Run], settings: LauncherConfig) -> None:
    """Executes the runs on this machine, as many at a time as there are places, and shows them."""
    executor = submitit.LocalExecutor(_pickles(runs), max_num_timeout=_TIMEOUTS)
    timeout_min = settings.timeout_min or _NO_LIMIT_MIN
    executor.update_parameters(timeout_min=timeout_min, signal_delay_s=settings.signal_delay_s)
    free = deque(_places(runs, settings))
    waiting = deque(runs)
    at_work: list[tuple[submitit.Job[None], dict[str, str]]] = []
    variables = _OFFLINE | tracking.settled(runs[0].config.tracking)
    with Watch([run.folder for run in runs]) as watch:
        try:
            while waiting or at_work:
                while waiting and free:
                    place, run = free.popleft(), waiting.popleft()
                    job = executor.submit(_job(run, variables | place, settings))
                    at_work.append((job, place))
                time.sleep(_LOOK_EVERY_S)
                watch.update()
                free.extend(place for job, place in at_work if job.done())
                at_work = [(job, place) for job, place in at_work if not job.done()]
        except KeyboardInterrupt:
            say("stopping: each run saves where it stands")
            for job, _ in at_work:
                job.cancel()
            while any(holder(run.folder.path) for run in runs):
                time.sleep(_LOOK_EVERY_S)
                watch.update()
            raise


def _submit(runs: Sequence[Run], settings: LauncherConfig) -> set[str]:
    """Submits the runs to SLURM as array jobs and returns the jobs' numbers.

    Raises:
        UserError: Where SLURM refuses.
    """
    executor = submitit.AutoExecutor(_pickles(runs), "slurm", slurm_max_num_timeout=_TIMEOUTS)
    executor.update_parameters(
        name=f"sae_lora-{runs[0].config.sweep}",
        timeout_min=settings.timeout_min,
        gpus_per_node=settings.gpus_per_node or None,
        cpus_per_task=settings.cpus_per_task,
        mem_gb=settings.mem_gb,
        slurm_partition=settings.partition,
        slurm_account=settings.account,
        slurm_qos=settings.qos,
        slurm_constraint=settings.constraint,
        slurm_setup=settings.setup or None,
        slurm_signal_delay_s=settings.signal_delay_s,
        slurm_array_parallelism=settings.array_parallelism,
        slurm_additional_parameters={"requeue": True} | (settings.sbatch or {}),
    )
    threads = {"OMP_NUM_THREADS": str(settings.cpus_per_task)} if settings.cpus_per_task else {}
    submitted: set[str] = set()
    for start in range(0, len(runs), settings.max_array_size):
        part = runs[start : start + settings.max_array_size]
        try:
            with executor.batch():
                jobs = [executor.submit(_job(run, _OFFLINE | threads, settings)) for run in part]
        except FailedJobError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"launcher=slurm: sbatch refused the jobs: {reason}") from error
        for run, job in zip(part, jobs, strict=True):
            run.folder.write_job(SubmittedJob("slurm", job.job_id))
            submitted.add(job.job_id)
    sweep = runs[0].folder.path.parent
    say(f"{len(runs)} submitted to SLURM; `python -m sae_lora status {sweep}` shows them")
    return submitted


def _wait_for(jobs: set[str], folders: Sequence[RunFolder]) -> None:
    """Shows the runs until SLURM has none of the jobs any more."""
    with Watch(folders) as watch:
        while slurm.queue().keys() & jobs:
            time.sleep(_ASK_SLURM_EVERY_S)
            watch.update()


def _pickles(runs: Sequence[Run]) -> Path:
    """Where submitit keeps its own files."""
    return runs[0].folder.path.parent.absolute() / ".submitit"


def _job(run: Run, variables: dict[str, str], settings: LauncherConfig) -> Job:
    return Job(
        [run.folder.path.absolute()],
        variables,
        settings.timeout_min or _NO_LIMIT_MIN,
        answer_s=0.8 * settings.signal_delay_s,
    )


def _places(runs: Sequence[Run], settings: LauncherConfig) -> list[dict[str, str]]:
    """Where runs can be at the same time: for each place, the variables that keep a run to it."""
    gpus = [] if all(run.config.train.device.name == "cpu" for run in runs) else _gpus()
    number = settings.max_parallel or len(gpus) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = settings.cpus_per_task or (max(1, cores // number) if number > 1 else None)
    shared = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return [
        shared | ({"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {})
        for place in range(number)
    ]


def _gpus() -> list[str]:
    """The GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch  # already there: planning needs it

    return [str(number) for number in range(torch.cuda.device_count())]


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
    failed = [run for run in planned.runs if run.folder.has_failed]
    for run in failed:
        complain("failed", f"{run.folder.failure_message}\n        {run.folder.failure}")
    if failed:
        complain(f"{len(failed)} failed", "launcher.retry_failed=true runs what failed again")
