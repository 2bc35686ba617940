"""The run folder, from which all tables, reports and W&B runs are made. Imports no torch."""

import dataclasses
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import yaml

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.common.secrets import redacted
from sae_lora.records.schema import CurvePoint, Progress, Summary


class RunFolder:
    """The folder of a run: `outputs/<sweep>/<name>-<hash>`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # the resolved config, written first
        self.curve = path / "curve.jsonl"  # one line per evaluation, appended and fsynced
        self.summary = path / "summary.json"  # written last: a run with a summary is finished
        self.failure = path / "failure.json"  # the cause, if the run failed
        self.adapter = path / "adapter"  # the trained adapters in peft's format (method=lora, mezo)
        self.sae = path / "sae"  # the trained SAEs in sae-lens's format, by hookpoint
        self.sae_at = path / "sae_at"  # <share>/: the SAEs after this share of the tokens
        self.groups = path / "groups.json"  # layer=groups: blocks that share an SAE, and their distances
        self.output_adapter = path / "output_adapter"  # by hookpoint (linear_adapter, mlp_adapter)
        self.checkpoints = path / "checkpoints"  # unfinished run: the checkpoints that it resumes from
        self.progress = path / "progress.json"  # unfinished run: its progress, replaced every second
        self.log = path / "log.txt"  # the output of its attempts
        self.job_file = path / "job.json"  # the last SLURM job of the run
        self.evaluation = path / "evaluation"  # <suite>.json: results (`evaluation/suite_records.py`)

    def before(self, init: str) -> "RunFolder":
        """The run whose result this one began with: at `init`, or beside it if the sweep was moved.

        Raises:
            UserError: If it no longer exists.
        """
        original = Path(init).expanduser()
        for path in (original, self.path.parent / original.name):
            if (folder := RunFolder(path)).config.exists():
                return folder
        raise UserError(f"{self.path}: the run that it began with no longer exists: {init}")

    @property
    def is_finished(self) -> bool:
        return self.summary.exists()

    @property
    def has_failed(self) -> bool:
        """True if the last attempt ended with an error."""
        return self.failure.exists() and not self.is_finished

    @property
    def is_unsettled(self) -> bool:
        """True until the run has finished or failed."""
        return not self.is_finished and not self.has_failed

    def write_config(self, text: str) -> None:
        """Write the resolved config for the next attempt.

        Raises:
            UserError: If the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, text)
        except OSError as error:
            raise UserError(f"output_dir: cannot write {self.path}: {error.strerror}") from error

    def clear_failure(self) -> None:
        """Forget the last SLURM job, and move the cause of a failure to `unfinished-<n>`."""
        self._set_aside(self.failure)
        self.job_file.unlink(missing_ok=True)

    def set_aside(self, *, curve: bool) -> None:
        """Move results of an unfinished attempt to `unfinished-<n>`; with `curve`, its curve too."""
        results = self.adapter, self.sae, self.output_adapter
        from_start = (self.curve, self.sae_at) if curve else ()
        self._set_aside(self.failure, *results, *from_start)

    def _set_aside(self, *paths: Path) -> None:
        paths = tuple(path for path in paths if path.exists())
        if not paths:
            return
        numbers = [int(path.name.rpartition("-")[2]) for path in self.path.glob("unfinished-*")]
        target = self.path / f"unfinished-{1 + max(numbers, default=0)}"
        target.mkdir()
        for path in paths:
            path.rename(target / path.name)

    def write_summary(self, summary: Summary) -> None:
        """Write the summary, which marks the run as finished."""
        write_atomically(self.summary, as_json(dataclasses.asdict(summary)))

    def read_config(self) -> dict[str, Any]:
        """The resolved config as plain values."""
        return yaml.load(self.config.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    def read_summary(self) -> dict[str, Any]:
        """The summary as plain values."""
        return json.loads(self.summary.read_text())

    def write_failure(self, message: str, details: str) -> None:
        """Record the cause of a failure, without secrets.

        Args:
            message: The cause, in one or a few lines.
            details: The traceback, or the end of the output.
        """
        failure = {"message": redacted(message), "details": redacted(details)}
        write_atomically(self.failure, as_json(failure))

    def write_progress(self, progress: Progress) -> None:
        """Write the progress of the run. It may be lost in a crash: the next attempt writes it again."""
        write_atomically(self.progress, as_json(dataclasses.asdict(progress)), lasting=False)

    def read_progress(self) -> Progress | None:
        """The progress of the run; `None` if unknown."""
        try:
            return Progress(**json.loads(self.progress.read_text()))
        except (OSError, ValueError, TypeError):  # not written yet, or by another version
            return None

    @property
    def seconds_since_progress(self) -> float:
        """Seconds since the progress of the run was written; 0 if it is unknown."""
        try:
            return max(0.0, time.time() - self.progress.stat().st_mtime)
        except OSError:
            return 0.0

    @property
    def checkpoint_step(self) -> int | None:
        """Step of the newest checkpoint, which may be damaged; `None` if there is none."""
        names = (path.name for path in self.checkpoints.glob("step-*"))
        steps = (re.fullmatch(r"step-(\d+)", name) for name in names)
        return max((int(step[1]) for step in steps if step), default=None)

    def write_job(self, job: str) -> None:
        write_atomically(self.job_file, as_json({"id": job}))

    @property
    def job(self) -> str | None:
        """The last SLURM job of the run: `12`, or `12_3` in an array; `None` if there was none."""
        try:
            return json.loads(self.job_file.read_text())["id"]
        except FileNotFoundError:
            return None

    def read_failure(self) -> dict[str, str] | None:
        """The `message` and `details` of the last attempt's failure; `None` if it did not fail."""
        try:
            return json.loads(self.failure.read_text())
        except FileNotFoundError:
            return None

    @property
    def failure_message(self) -> str | None:
        failure = self.read_failure()
        return failure["message"] if failure is not None else None

    def read_curve(self) -> list[CurvePoint]:
        """The evaluations in order, without a last line that a crash has truncated."""
        known = {field.name for field in dataclasses.fields(CurvePoint)}  # versions differ in fields
        return [
            CurvePoint(**{key: value for key, value in json.loads(line).items() if key in known})
            for line in self._curve_lines()
        ]

    def cut_curve(self, points: int) -> None:
        """Keep this number of points; the resumed run measures the points after its checkpoint again.

        Raises:
            UserError: If the curve has fewer points.
        """
        lines = self._curve_lines()
        if len(lines) < points:
            raise UserError(
                f"{self.curve} has {len(lines)} points, but the checkpoint was saved after {points}; "
                "delete the run folder to start this run again"
            )
        write_atomically(self.curve, "".join(lines[:points]))

    def append_point(self, point: CurvePoint) -> None:
        """Append a point to the curve, and flush it to the disk."""
        line = json.dumps(dataclasses.asdict(point), allow_nan=False) + "\n"
        with self.curve.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _curve_lines(self) -> list[str]:
        lines = self.curve.read_text().splitlines(keepends=True) if self.curve.exists() else []
        return [line for line in lines if line.endswith("\n")]


def runs_of(sweep: Path) -> list[RunFolder]:
    """The runs of a sweep, sorted by name. For the folder of a run, only this run.

    Raises:
        UserError: If the folder has no runs, or cannot be read.
    """
    try:
        is_run = (sweep / "config.yaml").exists()
        paths = [sweep] if is_run else [config.parent for config in sweep.glob("*/config.yaml")]
    except OSError as error:
        raise UserError(f"{sweep} cannot be read: {error.strerror}") from error
    if not paths:
        raise UserError(f"{sweep} holds no runs; the folder of a sweep is outputs/<sweep>")
    return [RunFolder(path) for path in sorted(paths, key=lambda path: _by_numbers(path.name))]


def _by_numbers(name: str) -> list[str | int]:
    """Sort key that compares numbers in names by value: s2 comes before s10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
