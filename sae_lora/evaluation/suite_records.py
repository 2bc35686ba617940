"""Results of suites: `evaluation/<suite>.json` in a run folder; logs of failures. Imports no torch."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, json_digest, text_of, write_atomically
from sae_lora.common.secrets import redacted
from sae_lora.config.enums import Suite
from sae_lora.config.identity import trains_adapters
from sae_lora.records.folder import RunFolder
from sae_lora.records.schema import check_types

VERSION = 1
"""Version of the schema; fields are only ever added within a version."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Results of one suite on one run: the schema of `evaluation/<suite>.json`."""

    suite: str
    settings: dict[str, Any]
    """The keys of `evaluation` that the results depend on."""
    results: dict[str, Any]
    """The fields of `Core`, `Mechanism`, `Weights`, `Tasks`, `Steering` or `SAEBench`."""
    environment: dict[str, Any]
    """Versions, device, host, git commit."""
    seconds: float
    """Duration, without loading the run."""
    run: str | None = None
    """The hash of the run. Null in records of older versions; so is `digest`."""
    digest: str | None = None
    """SHA-256 of run, suite, settings and results."""
    version: int = VERSION


def write(folder: RunFolder, record: Record) -> None:
    """Write a record into the run's folder, over an older one."""
    folder.evaluation.mkdir(exist_ok=True)
    path = folder.evaluation / f"{record.suite}.json"
    values = dataclasses.asdict(record) | {"run": folder.read_summary()["hash"]}
    write_atomically(path, as_json(values | {"digest": _digest(values)}))
    _failure(folder, Suite[record.suite]).unlink(missing_ok=True)


def check_can_be_written(folder: RunFolder, suite: Suite) -> None:
    """Refuse to measure a run if a folder has the name of the suite's record.

    Raises:
        UserError: If it is so.
    """
    path = folder.evaluation / f"{suite.name}.json"
    if path.is_dir():
        raise UserError(f"{path} is a folder, and must be a file: move it away")


def write_failure(folder: RunFolder, suite: Suite, message: str, details: str) -> Path:
    """Write why a suite failed, with the traceback, into a log file; return its path."""
    folder.evaluation.mkdir(exist_ok=True)
    path = _failure(folder, suite)
    write_atomically(path, redacted(f"{message}\n\n{details}"))
    return path


def failure(folder: RunFolder, suite: Suite) -> str | None:
    """Why the last attempt at a suite failed, or why its record cannot be read, in one line.

    `None` if neither is so.
    """
    path = _failure(folder, suite)
    if path.exists():
        return path.read_text(errors="replace").partition("\n")[0]
    content = _content(folder, suite)
    return content if isinstance(content, str) else None


def _failure(folder: RunFolder, suite: Suite) -> Path:
    return folder.evaluation / f"{suite.name}_failed.log"


def damaged(folders: Sequence[RunFolder]) -> Iterator[str]:
    """Records that cannot be used: damaged, of another version or of another run, in a line each."""
    for folder in folders:
        for suite in Suite if folder.is_finished else ():
            if isinstance(cause := _content(folder, suite), str):
                yield f"{folder.path}: evaluation/{cause}"


def read(folder: RunFolder, suite: Suite) -> Record | None:
    """The record of a suite; `None` if it is missing, damaged, of another version or of another run."""
    content = _content(folder, suite)
    return content if isinstance(content, Record) else None


def _content(folder: RunFolder, suite: Suite) -> Record | str | None:
    """The record of a suite; `None` without one; the cause if it cannot be read."""
    path = folder.evaluation / f"{suite.name}.json"
    try:
        values = json.loads(text_of(path))
        version = values.get("version")
        if version != VERSION:
            return f"{path.name} is of version {version}; this sae_lora reads version {VERSION}"
        check_types(Record, values)
        record = Record(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return f"{path.name} is damaged: {' '.join(str(error).split())}"
    if record.suite != suite.name or record.run not in (None, _hash(folder)):
        return f"{path.name} is of another {'run' if record.suite == suite.name else 'suite'}"
    if record.digest is not None and record.digest != _digest(values):
        return f"{path.name} has changed since the suite wrote it"
    return record


def _digest(values: Mapping[str, Any]) -> str:
    return json_digest([values.get(name) for name in ("run", "suite", "settings", "results")])


def _hash(folder: RunFolder) -> str | None:
    """The hash of the run; `None` if it is not finished."""
    return folder.read_summary()["hash"] if folder.is_finished else None


def pending(folder: RunFolder) -> list[Suite]:
    """The suites that a finished run's config asks for and that have no record yet."""
    if not (folder.is_finished and folder.config.exists()):
        return []
    evaluation = folder.read_config().get("evaluation", {})
    return missing(folder, [Suite[name] for name in evaluation.get("suites", [])], evaluation)


def missing(folder: RunFolder, suites: Sequence[Suite], evaluation: Mapping[str, Any]) -> list[Suite]:
    """The suites that apply to a finished run and have no record yet.

    `evaluation` holds the settings of the suites.
    """
    wanted = applicable(suites, folder.read_config(), evaluation)
    return [suite for suite in wanted if read(folder, suite) is None]


def evaluate_command(sweep: Path, names: Iterable[str]) -> str:
    """The command that runs these suites on the finished runs of a sweep, or on a single run."""
    return f"sae-lora evaluate {sweep} --suite {' '.join(sorted(names))}"


def applicable(
    suites: Sequence[Suite], config: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> list[Suite]:
    """The suites that apply to a run, each once. `lora` needs adapters; `downstream` is three suites.

    `config` is the run's `config.yaml`, `evaluation` the settings of the suites.
    """
    downstream = [
        *([Suite.tasks] if evaluation.get("tasks") else []),
        Suite.steering,
        *([Suite.saebench] if evaluation.get("saebench") else []),
    ]
    each = [part for suite in suites for part in (downstream if suite is Suite.downstream else [suite])]
    return [suite for suite in dict.fromkeys(each) if suite is not Suite.lora or trains_adapters(config)]
