"""The run folder, the truth that every view is made from. Imports no torch.

outputs/<sweep>/<name>-<hash>/
    config.yaml     the resolved config, written first
    curve.jsonl     one line per evaluation, appended and fsynced
    summary.json    written last: its presence is what "finished" means
    failure.json    instead, where the run failed
    adapter/        the trained adapters in peft's format (method=lora, mezo)
    sae/            the trained SAEs in sae-lens's format, by hookpoint (method=sae, e2e, sae_finetune);
                    sae_at/<share>/ as they were after a share of the tokens (method.checkpoints)
    groups.json     with layer=groups: the blocks that share an SAE, and how they were found
    output_adapter/ trained maps on what SAEs put back, by hookpoint (method=linear_adapter, mlp_adapter)
    checkpoints/    while it is under way: what it goes on from
    progress.json   while it is under way: where it stands; a view, replaced every second
    log.txt         what its attempts have printed
    job.json        the SLURM job that it was last submitted with
    evaluation/     <suite>.json: what `python -m sae_lora evaluate` has found (`evaluation/record.py`)
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.common.secrets import redacted
from sae_lora.records.schema import CurvePoint, Failure, Progress, SubmittedJob, Summary


class RunFolder:
    """One run's folder.

    Args:
        path: `outputs/<sweep>/<name>-<hash>`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.curve = path / "curve.jsonl"
        self.summary = path / "summary.json"
        self.failure = path / "failure.json"
        self.adapter = path / "adapter"
        self.sae = path / "sae"
        self.sae_at = path / "sae_at"
        self.groups = path / "groups.json"
        self.output_adapter = path / "output_adapter"
        self.checkpoints = path / "checkpoints"
        self.progress = path / "progress.json"
        self.log = path / "log.txt"
        self.job_file = path / "job.json"
        self.evaluation = path / "evaluation"

    def before(self, init: str) -> "RunFolder":
        """The run that this one has begun with: where that was or, where a sweep was moved, beside it.

        Args:
            init: Its folder, as the config has it.

        Raises:
            UserError: Where it is gone.
        """
        said = Path(init).expanduser()
        for path in (said, self.path.parent / said.name):
            if (folder := RunFolder(path)).config.exists():
                return folder
        raise UserError(f"{self.path}: the run that it has begun with is gone: {init}")

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended well."""
        return self.summary.exists()

    @property
    def has_failed(self) -> bool:
        """Whether the last attempt ended with an error."""
        return self.failure.exists() and not self.is_finished

    def write_config(self, text: str) -> None:
        """Writes the resolved config of the next attempt, before anything else is there.

        Raises:
            UserError: Where the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, text)
        except OSError as error:
            raise UserError(f"output_dir: cannot write {self.path}: {error.strerror}") from error

    def clear_failure(self) -> None:
        """Forgets an old job, and puts the cause of a failure away, for who looks back."""
        self._set_aside(self.failure)
        self.job_file.unlink(missing_ok=True)

    def set_aside(self, *, curve: bool) -> None:
        """Keeps what an attempt that did not end has left, out of the way of the next one.

        Args:
            curve: Whether the next attempt begins anew, and with it the curve.
        """
        results = self.adapter, self.sae, self.output_adapter
        anew = (self.curve, self.sae_at) if curve else ()
        self._set_aside(self.failure, *results, *anew)

    def _set_aside(self, *paths: Path) -> None:
        left = [path for path in paths if path.exists()]
        if not left:
            return
        numbers = [int(path.name.rpartition("-")[2]) for path in self.path.glob("unfinished-*")]
        number = 1 + max(numbers, default=0)
        aside = self.path / f"unfinished-{number}"
        aside.mkdir()
        for path in left:
            path.rename(aside / path.name)

    def write_summary(self, summary: Summary) -> None:
        """Writes the summary; from then on the run is finished."""
        write_atomically(self.summary, as_json(dataclasses.asdict(summary)))

    def read_config(self) -> dict[str, Any]:
        """The resolved config as plain values."""
        return yaml.load(self.config.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    def read_summary(self) -> dict[str, Any]:
        """The summary as plain values."""
        return json.loads(self.summary.read_text())

    def write_failure(self, message: str, details: str) -> None:
        """Records why the run ended early: one line, and the whole story."""
        failure = Failure(redacted(message), redacted(details))
        write_atomically(self.failure, as_json(dataclasses.asdict(failure)))

    def write_progress(self, progress: Progress) -> None:
        """Shows where the run stands. Not made to last: what a crash takes is written anew."""
        write_atomically(self.progress, as_json(dataclasses.asdict(progress)), lasting=False)

    def read_progress(self) -> Progress | None:
        """Where the run stands, as it said last."""
        try:
            return Progress(**json.loads(self.progress.read_text()))
        except (OSError, ValueError, TypeError):  # none yet, or of another version
            return None

    def write_job(self, job: SubmittedJob) -> None:
        """Notes which job has the run now."""
        write_atomically(self.job_file, as_json(dataclasses.asdict(job)))

    @property
    def job(self) -> SubmittedJob | None:
        """The job that the run was last submitted with; `None` where it never was."""
        try:
            return SubmittedJob(**json.loads(self.job_file.read_text()))
        except FileNotFoundError:
            return None

    def read_failure(self) -> Failure | None:
        """Why the last attempt ended early; `None` where it has not."""
        try:
            return Failure(**json.loads(self.failure.read_text()))
        except FileNotFoundError:
            return None

    @property
    def failure_message(self) -> str | None:
        """The same in a line."""
        failure = self.read_failure()
        return failure.message if failure is not None else None

    def read_curve(self) -> list[CurvePoint]:
        """The evaluations in order; a last line cut short by a crash is left out."""
        return list(_points(self.curve)) if self.curve.exists() else []


def _points(path: Path) -> Iterator[CurvePoint]:
    known = {field.name for field in dataclasses.fields(CurvePoint)}
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            values = json.loads(line)
            if not values.keys() <= known:  # of another version
                values = {key: values[key] for key in known & values.keys()}
            yield CurvePoint(**values)


class CurveWriter:
    """Appends points to `curve.jsonl`, each on the disk before the next line of code runs.

    Args:
        path: The file.
        keep: Points to keep of an attempt before; what it measured after its checkpoint comes again.

    Raises:
        UserError: Where the file holds fewer.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines[:keep] if line.endswith("\n")]
        if len(kept) < keep:
            raise UserError(
                f"{path} holds {len(kept)} points, and the checkpoint was made after {keep}; "
                "delete the run folder to begin this run anew"
            )
        if len(lines) > keep:
            write_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self.points = keep
        """Points in the file."""

    def append(self, point: CurvePoint) -> None:
        """Adds one line."""
        self.points += 1
        self._file.write(json.dumps(dataclasses.asdict(point), allow_nan=False) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Nothing more is added."""
        self._file.close()

    def __enter__(self) -> "CurveWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def runs_of(sweep: Path) -> list[RunFolder]:
    """The runs of a sweep, by name; a run's own folder stands for itself.

    Raises:
        UserError: Where there are none.
    """
    configs = (
        [sweep / "config.yaml"] if (sweep / "config.yaml").exists() else sweep.glob("*/config.yaml")
    )
    found = [
        RunFolder(path.parent)
        for path in sorted(configs, key=lambda path: _by_numbers(path.parent.name))
    ]
    if not found:
        raise UserError(f"{sweep} holds no runs; a sweep's folder is outputs/<sweep>")
    return found


def _by_numbers(name: str) -> list[str | int]:
    """Sorts s2 before s10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
