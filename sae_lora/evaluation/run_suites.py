"""Suites of measures, taken of finished runs one after another; each is kept as soon as it is there."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sae_lora.common.console import complain, say
from sae_lora.common.errors import UserError
from sae_lora.common.provenance import environment
from sae_lora.config.compose import explanation
from sae_lora.config.enums import Suite
from sae_lora.config.evaluation import EvaluationConfig
from sae_lora.config.serialize import keys, load, typed, unknown_key
from sae_lora.config.validate import check
from sae_lora.evaluation import core, lm_eval, mechanism, suite_records
from sae_lora.evaluation.lora import weights
from sae_lora.evaluation.saebench import suite as saebench
from sae_lora.evaluation.steering import effects
from sae_lora.evaluation.subject import Subject
from sae_lora.evaluation.suite_records import Record
from sae_lora.models.loading import quieten
from sae_lora.records.folder import RunFolder


class _Suite(NamedTuple):
    """How a suite is taken.

    Args:
        measure: Takes it; its result is a dataclass of plain values.
        heeds: The keys of `evaluation` that it depends on.
        check: Refuses, before anything is loaded, what it cannot be taken of.
    """

    measure: Callable[[Subject, EvaluationConfig], Any]
    heeds: tuple[str, ...]
    check: Callable[[EvaluationConfig], None] = lambda config: None


_SUITES: dict[Suite, _Suite] = {
    Suite.core: _Suite(core.evaluate, ("resamples",)),
    Suite.mechanism: _Suite(mechanism.evaluate, ("resamples", "sequences")),
    Suite.lora: _Suite(weights.evaluate, ("sequences", "directions")),
    Suite.tasks: _Suite(lm_eval.score, lm_eval.HEEDS, lm_eval.check),
    Suite.steering: _Suite(effects.steer, effects.HEEDS),
    Suite.saebench: _Suite(saebench.score, saebench.HEEDS, saebench.check),
}


def settings(folder: RunFolder, assignments: Sequence[str]) -> EvaluationConfig:
    """How a run is to be evaluated: as its own config says, but for some keys.

    Args:
        folder: The run.
        assignments: `key=value`, keys of `evaluation`, values as on the command line.

    Raises:
        UserError: For a key or a value that there is not.
    """
    own = OmegaConf.structured(load(folder.config.read_text()))
    wanted = [f"evaluation.{one.removeprefix('evaluation.')}" for one in assignments]
    for key, _, _ in (one.partition("=") for one in wanted):
        if key not in keys():
            raise unknown_key(key)
    try:
        merged = OmegaConf.merge(own, OmegaConf.from_dotlist(wanted))
        assert isinstance(merged, DictConfig)
        config = typed(merged)
    except OmegaConfBaseException as error:
        raise UserError(explanation(error)) from error
    check(config)
    return config.evaluation


def evaluate(
    folder: RunFolder,
    wanted: Sequence[Suite],
    config: EvaluationConfig,
    *,
    again: bool = False,
    device: str | None = None,
) -> list[Suite]:
    """Takes those of the suites that are not there yet, as far as they apply to the run.

    What one of them lacks, a download or a package, is said, and the others go on.

    Args:
        folder: A finished run.
        wanted: The suites.
        config: How.
        again: Whether those that are there are taken once more.
        device: auto, cpu or cuda; by default what the run's `train.device` says.

    Returns:
        Those that could not be taken.

    Raises:
        UserError: Where the run is not finished, or something of it is missing.
    """
    left = [
        suite
        for suite in suite_records.applicable(wanted, folder.read_config(), vars(config))
        if again or not _is_there(folder, suite, config)
    ]
    if not left:
        return []
    quieten()
    say(f"evaluating {folder.path.name}: {', '.join(suite.name for suite in left)}")
    failed: list[Suite] = []

    def leave_out(suite: Suite, error: UserError) -> None:
        complain(f"{suite.name} of {folder.path.name} left out", str(error))
        failed.append(suite)

    for suite in left:
        try:
            _SUITES[suite].check(config)
        except UserError as error:
            leave_out(suite, error)
    if len(failed) == len(left):
        return failed
    subject = Subject(folder, device)
    for suite in [one for one in left if one not in failed]:
        began = time.perf_counter()
        try:
            results = _SUITES[suite].measure(subject, config)
        except UserError as error:
            leave_out(suite, error)
            continue
        suite_records.write(
            folder,
            Record(
                suite=suite.name,
                settings=_settings(suite, config),
                results=dataclasses.asdict(results),
                environment=environment(subject.device),
                seconds=time.perf_counter() - began,
            ),
        )
        for part, why in getattr(results, "missing", {}).items():
            leave_out(suite, UserError(f"{part}: {why}"))
    return list(dict.fromkeys(failed))


def _is_there(folder: RunFolder, suite: Suite, config: EvaluationConfig) -> bool:
    """Whether all of it is; what a part of it has lacked may have come meanwhile."""
    there = suite_records.read(folder, suite)
    if there is None or there.settings != _settings(suite, config):
        return False
    return not there.results.get("missing")


def _settings(suite: Suite, config: EvaluationConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SUITES[suite].heeds}
