"""`evaluation/<suite>.json` in a run folder: what a suite has found, and with what. Imports no torch."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.enums import Suite
from sae_lora.config.identity import trains_adapters
from sae_lora.records.folder import RunFolder

VERSION = 1
"""Of the schema; fields are only ever added within a version."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What one suite has found of one run: the schema of `evaluation/<suite>.json`."""

    suite: str
    settings: dict[str, Any]
    """What of `evaluation` the suite heeds, as it was asked for."""
    results: dict[str, Any]
    """The suite's own: `Core`, `Mechanism`, `Weights`, `Tasks`, `Steering` or `SAEBench`, by field."""
    environment: dict[str, Any]
    """Versions, device, host, git commit."""
    seconds: float
    """That it took, loading left out."""
    version: int = VERSION


def write(folder: RunFolder, record: Record) -> None:
    """Puts a record into the run's folder, in the place of an older one."""
    folder.evaluation.mkdir(exist_ok=True)
    write_atomically(_file(folder, Suite[record.suite]), as_json(dataclasses.asdict(record)))


def read(folder: RunFolder, suite: Suite) -> Record | None:
    """The record of a suite; `None` where there is none, or one of another version."""
    path = _file(folder, suite)
    if not path.exists():
        return None
    values = json.loads(path.read_text())
    return Record(**values) if values.get("version") == VERSION else None


def pending(folder: RunFolder) -> list[Suite]:
    """The suites that a run's own config asks for at its end, and that are not there yet."""
    if not (folder.is_finished and folder.config.exists()):
        return []
    config = folder.read_config()
    evaluation = config.get("evaluation", {})
    asked = [Suite[name] for name in evaluation.get("suites", [])]
    return [suite for suite in applicable(asked, config, evaluation) if read(folder, suite) is None]


def applicable(
    suites: Sequence[Suite], config: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> list[Suite]:
    """Those that have anything to measure in a run, each once: `lora` is about adapters.

    Args:
        suites: Some; `downstream` stands for several.
        config: The run's, as `config.yaml` holds it.
        evaluation: How they are to be taken.
    """
    downstream = [
        *([Suite.tasks] if evaluation.get("tasks") else []),
        Suite.steering,
        *([Suite.saebench] if evaluation.get("saebench") else []),
    ]
    every = [one for suite in suites for one in (downstream if suite is Suite.downstream else [suite])]
    return [one for one in dict.fromkeys(every) if one is not Suite.lora or trains_adapters(config)]


def _file(folder: RunFolder, suite: Suite) -> Path:
    return folder.evaluation / f"{suite.name}.json"
