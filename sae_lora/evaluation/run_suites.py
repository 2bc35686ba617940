"""Run suites on finished runs. Each suite is written as soon as it is done."""

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_lora.common.console import Report, complain, say, stage_display
from sae_lora.common.errors import UserError
from sae_lora.common.provenance import environment
from sae_lora.config.compose import checked
from sae_lora.config.enums import Suite
from sae_lora.config.execution import EvaluationConfig
from sae_lora.config.mistakes.explain import explanation
from sae_lora.evaluation import core, lm_eval, mechanism, suite_records
from sae_lora.evaluation.circuits import suite as circuits
from sae_lora.evaluation.latents import suite as latents
from sae_lora.evaluation.lora import weights
from sae_lora.evaluation.saebench import suite as saebench
from sae_lora.evaluation.steering import effects
from sae_lora.evaluation.subject import Subject
from sae_lora.evaluation.suite_records import Record
from sae_lora.models.loading import silence_transformers
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import Progress


class _Suite(NamedTuple):
    measure: Callable[[Subject, EvaluationConfig], Any]
    """Function that measures a run and returns a dataclass of plain values."""
    depends_on: tuple[str, ...]
    """The keys of `evaluation` that the results depend on."""
    check: Callable[[EvaluationConfig, RunFolder], None] = lambda config, folder: None
    """Function that raises for a config or a run that cannot work, before anything is loaded."""


_OF_TASKS = "resamples", "tasks", "task_limit", "few_shot"
_SUITES: dict[Suite, _Suite] = {
    Suite.core: _Suite(core.evaluate, ("resamples",)),
    Suite.mechanism: _Suite(mechanism.evaluate, ("resamples", "sequences")),
    Suite.lora: _Suite(weights.evaluate, ("sequences", "directions")),
    Suite.tasks: _Suite(lm_eval.score, _OF_TASKS, lambda config, _: lm_eval.check(config)),
    Suite.steering: _Suite(effects.steer, effects.DEPENDS_ON),
    Suite.saebench: _Suite(
        saebench.score, saebench.DEPENDS_ON, lambda config, _: saebench.check(config)
    ),
    Suite.latents: _Suite(latents.evaluate, latents.DEPENDS_ON, latents.check),
    Suite.circuits: _Suite(circuits.score, circuits.DEPENDS_ON, circuits.check),
}


def settings(folder: RunFolder, assignments: Sequence[str]) -> EvaluationConfig:
    """The `evaluation` section of a run's own config, with some keys replaced.

    The assignments are `key=value`, with keys of `evaluation` and values as on the command line.

    Raises:
        UserError: For an unknown key or an invalid value.
    """
    dotlist = [f"evaluation.{assignment.removeprefix('evaluation.')}" for assignment in assignments]
    config = OmegaConf.create(folder.config.read_text())
    assert isinstance(config, DictConfig)
    try:
        config.merge_with_dotlist(dotlist)
        return checked(config).evaluation
    except OmegaConfBaseException as error:
        raise UserError(explanation(error)) from error
    except yaml.YAMLError as error:
        raise UserError(f"--set {' '.join(assignments)}: a value is not valid YAML: {error}") from error


class Evaluated(NamedTuple):
    """The outcome of an evaluation of several runs."""

    suites: list[Suite]
    """The suites that apply to at least one of the runs."""
    written: int
    """The number of runs that have results of these suites now."""
    has_failed: bool


def evaluate_all(
    folders: Sequence[RunFolder],
    suites: Sequence[Suite],
    assignments: Sequence[str],
    *,
    again: bool,
    device: str | None,
) -> Evaluated:
    """Run the suites on each finished run, as `evaluate`; name the runs that a suite does not apply to.

    Raises:
        UserError: For an unknown key of `evaluation` or an invalid value in the assignments.
    """
    failed: list[Suite] = []
    applicable: list[Suite] = []
    written = 0
    for folder in folders:
        config = settings(folder, assignments)
        measured = suite_records.applicable(suites, folder.read_config(), vars(config))
        if Suite.lora in suites and Suite.lora not in measured:
            complain("skipped", f"lora of {folder.path.name}: the run trained no adapters")
        applicable += measured
        failed += evaluate(folder, suites, config, again=again, device=device)
        written += any(suite_records.read(folder, suite) for suite in measured)
    return Evaluated(list(dict.fromkeys(applicable)), written, bool(failed))


def evaluate(
    folder: RunFolder,
    requested: Sequence[Suite],
    config: EvaluationConfig,
    *,
    again: bool = False,
    device: str | None = None,
) -> list[Suite]:
    """Run the suites that apply to a finished run; return those that failed.

    A suite that cannot run, because a download or a package is missing, is reported and skipped. An
    error of a suite ends this suite of this run only; its log has the traceback. So does a run that
    cannot be loaded. Suites that are done run only if `again` is true. The device is auto, cpu or cuda;
    by default the run's `train.device`.
    """
    suites = [
        suite
        for suite in suite_records.applicable(requested, folder.read_config(), vars(config))
        if again or not _is_done(folder, suite, config)
    ]
    if not suites:
        return []
    silence_transformers()
    say(f"evaluating {folder.path.name}: {', '.join(suite.name for suite in suites)}")
    failed: list[Suite] = []

    def skip(suite: Suite, reason: object) -> None:
        complain(f"skipped {suite.name} of {folder.path.name}", str(reason))
        failed.append(suite)

    def fail(suite: Suite, error: Exception) -> None:
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        details = "".join(traceback.format_exception(error))
        log = suite_records.write_failure(folder, suite, message, details)
        complain("failed", f"{suite.name} of {folder.path.name}: {message}\n  {log}")
        failed.append(suite)
        # Otherwise the traceback keeps tensors of this suite in memory.
        traceback.clear_frames(error.__traceback__)

    def drop(suite: Suite, error: Exception) -> None:
        skip(suite, error) if isinstance(error, UserError) else fail(suite, error)

    ready = []
    for suite in suites:
        try:
            _SUITES[suite].check(config, folder)
            suite_records.check_can_be_written(folder, suite)
            ready.append(suite)
        except UserError as error:
            skip(suite, error)
    if not ready:
        return failed
    with _progress(folder, [_LOADING, *map(_stage, ready)]) as report:
        report(_LOADING, 0, 0)
        try:
            subject = Subject(folder, device, report)
        except Exception as error:  # the other runs must go on
            for suite in ready:
                drop(suite, error)
        else:
            _measure(folder, ready, config, subject, skip, drop)
    return list(dict.fromkeys(failed))


def _measure(
    folder: RunFolder,
    ready: Sequence[Suite],
    config: EvaluationConfig,
    subject: Subject,
    skip: Callable[[Suite, object], None],
    drop: Callable[[Suite, Exception], None],
) -> None:
    """Run the suites and write their results.

    Args:
        folder, ready, config, subject: The run, the suites, their settings, and the loaded run.
        skip: Called with a part of a suite that cannot run.
        drop: Called with a suite that fails.
    """
    for suite in ready:
        subject.begin(_stage(suite))
        began = time.perf_counter()
        try:
            results = _SUITES[suite].measure(subject, config)
        except Exception as error:  # the other suites and the other runs must go on
            drop(suite, error)
            continue
        record = Record(
            suite=suite.name,
            settings=_settings(suite, config),
            results=dataclasses.asdict(results),
            environment=environment(subject.device),
            seconds=time.perf_counter() - began,
        )
        suite_records.write(folder, record)
        for part, reason in record.results.get("missing", {}).items():
            skip(suite, f"{part}: {reason}")


_LOADING = "loading model"


def _stage(suite: Suite) -> str:
    return f"evaluating suite {suite.name}"


@contextmanager
def _progress(folder: RunFolder, announced: Sequence[str]) -> Iterator[Report]:
    """Show stages inside the block, and write them into the run folder about once a second.

    A line names the suites already; further lines appear only if they take long.
    """
    written_at, current = -math.inf, ""
    with stage_display(announced=announced) as show:

        def report(stage: str, done: int, total: int) -> None:
            nonlocal written_at, current
            show(stage, done, total)
            now = time.monotonic()
            if stage != current or now - written_at >= 1:
                folder.write_progress(Progress(stage, done, total))
                written_at, current = now, stage

        try:
            yield report
        finally:
            folder.progress.unlink(missing_ok=True)


def _is_done(folder: RunFolder, suite: Suite, config: EvaluationConfig) -> bool:
    record = suite_records.read(folder, suite)
    if record is None or record.settings != _settings(suite, config):
        return False
    return not record.results.get("missing")  # the missing part may be available now


def _settings(suite: Suite, config: EvaluationConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SUITES[suite].depends_on}
