"""The run folder, from which all tables, reports and W&B runs are made. Imports no torch.

`damage.py` checks that its files belong together.
"""

import contextlib
import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, json_digest, text_of, write_atomically
from sae_lora.common.secrets import redacted
from sae_lora.records.schema import CurvePoint, Progress, Summary, check_types

Content = TypeVar("Content")
_MARKS = (
    *("config.yaml", "curve.jsonl", "summary.json", "failure.json", "log.txt"),
    *("checkpoints", "adapter", "sae", "output_adapter"),
)
"""Files and folders of which every run folder has one, also if others are deleted."""
_HASHED = re.compile(r"-([0-9a-f]{8})$")
"""The end of a run folder's name."""
MODEL_CARD = "README.md"
"""The model card of an exported run, which is no run folder but has the same files."""


class DamagedError(UserError):
    """A file of a run folder is missing or cannot be used.

    Args:
        folder: The run folder.
        cause: The file, and what is wrong with it.
    """

    def __init__(self, folder: Path, cause: str) -> None:
        self.cause = cause
        super().__init__(f"damaged: {folder}: {cause}")


class RunFolder:
    """The folder of a run: `outputs/<sweep>/<name>-<hash>`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # the resolved config, written first
        self.curve = path / "curve.jsonl"  # one line per evaluation, appended and fsynced
        self.summary = path / "summary.json"  # written last: a run with a summary is finished
        self.failure = path / "failure.json"  # the cause, if the run failed
        self.stop = path / "stop.json"  # the cause, if the last attempt was stopped
        self.halving = path / "halving.json"  # the runs that it competes with (`records/halving.py`)
        self.adapter = path / "adapter"  # the trained adapters in peft's format (method=lora, mezo)
        self.sae = path / "sae"  # the trained SAEs in sae-lens's format, by hookpoint
        self.sae_at = path / "sae_at"  # <share>/: the SAEs after this share of the tokens
        self.groups = path / "groups.json"  # layer=groups: blocks that share an SAE, and their distances
        self.output_adapter = path / "output_adapter"  # by hookpoint (linear_adapter, mlp_adapter)
        self.checkpoints = path / "checkpoints"  # unfinished run: the checkpoints that it resumes from
        self.progress = path / "progress.json"  # unfinished run: its progress, replaced every second
        self.log = path / "log.txt"  # the output of its attempts
        self.job_file = path / "job.json"  # the last SLURM job of the run
        self.launch_file = path / "launch.json"  # the last launch that started it on its own machine
        self.evaluation = path / "evaluation"  # <suite>.json: results (`evaluation/suite_records.py`)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A job in SLURM's queue is a pickle, perhaps of a version that knew fewer files.
        RunFolder.__init__(self, state["path"])

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
        """True until the run has finished, failed, or was left behind by others."""
        return not (self.is_finished or self.has_failed or self.is_outranked)

    @property
    def is_outranked(self) -> bool:
        """True if `launcher.halving` has stopped the run because others were ahead."""
        with contextlib.suppress(OSError, ValueError, RecursionError):
            return parsed_object(text_of(self.stop)).get("outranked") is True
        return False

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
        """Forget the last SLURM job and stop, and move the cause of a failure to `unfinished-<n>`."""
        self._set_aside(self.failure)
        self.job_file.unlink(missing_ok=True)
        self.stop.unlink(missing_ok=True)

    def set_aside(self, *, curve: bool) -> None:
        """Move results of an unfinished attempt to `unfinished-<n>`; with `curve`, its curve too."""
        self.stop.unlink(missing_ok=True)
        results = self.adapter, self.sae, self.output_adapter
        from_start = (self.curve, self.sae_at) if curve else ()
        self._set_aside(self.failure, *results, *from_start)

    def _set_aside(self, *paths: Path) -> None:
        paths = tuple(path for path in paths if path.exists())
        if not paths:
            return
        names = (path.name.rpartition("-")[2] for path in self.path.glob("unfinished-*"))
        numbers = [int(name) for name in names if name.isdigit()]
        target = self.path / f"unfinished-{1 + max(numbers, default=0)}"
        target.mkdir()
        for path in paths:
            path.rename(target / path.name)

    def write_summary(self, summary: Summary) -> None:
        """Write the summary with its digest. It marks the run as finished."""
        values = dataclasses.asdict(summary)
        values["digest"] = summary_digest(values)
        write_atomically(self.summary, as_json(values))

    def parsed(self, path: Path, parse: Callable[[str], Content]) -> Content:
        """The content of a file.

        Raises:
            DamagedError: If it is missing, or cannot be read or parsed.
        """
        try:
            text = text_of(path)
            if not text.strip():
                raise DamagedError(self.path, f"{path.name} is empty")
            return parse(text)
        except FileNotFoundError as error:
            raise DamagedError(self.path, f"{path.name} is missing") from error
        except OSError as error:
            raise DamagedError(self.path, f"{path.name} cannot be read: {error.strerror}") from error
        except KeyError as error:
            raise DamagedError(self.path, f"{path.name} lacks {error}") from error
        except RecursionError as error:
            raise DamagedError(
                self.path, f"{path.name} cannot be read: it is nested too deep"
            ) from error
        except (ValueError, LookupError, TypeError, yaml.YAMLError) as error:
            cause = " ".join(str(error).split()).partition("; use sys.")[0]
            raise DamagedError(self.path, f"{path.name} cannot be read: {cause}") from error

    def read_config(self) -> dict[str, Any]:
        """The resolved config as plain values.

        Raises:
            DamagedError: If it is missing or cannot be read.
        """
        return self.parsed(self.config, _yaml)

    def read_summary(self) -> dict[str, Any]:
        """The summary as plain values.

        Raises:
            DamagedError: If it is missing or cannot be read.
        """
        return self.parsed(self.summary, parsed_object)

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
            values = json.loads(text_of(self.progress))
            check_types(Progress, values)
            return Progress(**values)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            # not written yet, or by another version
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

    def write_launch(self, launch: Path) -> None:
        """Record the folder of the launch that will run it on this machine, and holds that folder."""
        write_atomically(self.launch_file, as_json({"folder": str(launch)}))

    @property
    def launch(self) -> Path | None:
        """The folder of the last launch that was to run it on its own machine; `None` if unknown."""
        try:
            folder = Path(json.loads(text_of(self.launch_file))["folder"])
            return folder if folder.is_dir() else None
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return None

    @property
    def job(self) -> str | None:
        """The last SLURM job of the run: `12`, or `12_3` in an array; `None` if there was none.

        Raises:
            DamagedError: If its file cannot be read.
        """
        if not self.job_file.exists():
            return None
        return self.parsed(self.job_file, _job)

    def read_failure(self) -> dict[str, str] | None:
        """The `message` and `details` of the last attempt's failure; `None` if it did not fail.

        Raises:
            DamagedError: If its file cannot be read.
        """
        if not self.failure.exists():
            return None
        return self.parsed(
            self.failure,
            lambda text: {name: str(parsed_object(text)[name]) for name in ("message", "details")},
        )

    def write_stop(self, message: str, *, outranked: bool = False) -> None:
        """Record why the last attempt was stopped, and whether others were ahead."""
        write_atomically(self.stop, as_json({"message": message, "outranked": outranked}))

    @property
    def stop_message(self) -> str | None:
        """Why the last attempt was stopped; `None` if nobody stopped it.

        Raises:
            DamagedError: If its file cannot be read.
        """
        if not self.stop.exists():
            return None
        return self.parsed(self.stop, lambda text: str(parsed_object(text)["message"]))

    @property
    def failure_message(self) -> str | None:
        failure = self.read_failure()
        return failure["message"] if failure is not None else None

    def read_curve(self) -> list[CurvePoint]:
        """The evaluations in order, without a last line that a crash has truncated.

        Raises:
            DamagedError: If another line cannot be read.
        """
        if not self.curve.exists() or (self.curve.is_file() and not self.curve.stat().st_size):
            return []
        return self.parsed(self.curve, _points)

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
        """Append a point to the curve, and flush it to the disk.

        Raises:
            UserError: If a measure is not finite.
        """
        measures = dataclasses.asdict(point).items()
        if lost := [
            name for name, value in measures if isinstance(value, float) and not isfinite(value)
        ]:
            raise UserError(
                f"{', '.join(lost)} of the evaluation after {point.tokens:,} tokens is not finite; "
                "train.lr may be too high"
            )
        line = json.dumps(dataclasses.asdict(point), allow_nan=False) + "\n"
        with self.curve.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _curve_lines(self) -> list[str]:
        lines = self.curve.read_text().splitlines(keepends=True) if self.curve.exists() else []
        return [line for line in lines if line.endswith("\n")]


def summary_digest(summary: Mapping[str, Any]) -> str:
    """The digest of a summary with these values."""
    return json_digest({name: value for name, value in summary.items() if name != "digest"})


def _yaml(text: str) -> dict[str, Any]:
    values = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(values, dict):
        raise ValueError("it holds no keys and values")
    return values


def parsed_object(text: str) -> dict[str, Any]:
    """The keys and values of a JSON object.

    Raises:
        ValueError: For another text.
    """
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError("it holds no keys and values")
    return values


def _job(text: str) -> str:
    job = str(parsed_object(text)["id"])
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise ValueError(f"{job[:40]!r} is no job")
    return job


def _points(text: str) -> list[CurvePoint]:
    """The points in the complete lines of a curve. Fields of other versions are left out."""
    known = {field.name for field in dataclasses.fields(CurvePoint)}
    points: list[CurvePoint] = []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            values = parsed_object(line)
            check_types(CurvePoint, values)
            point = CurvePoint(**{key: values[key] for key in values if key in known})
            if points and point.step <= points[-1].step:
                raise ValueError(f"step {point.step} follows step {points[-1].step}")
            points.append(point)
        except (ValueError, TypeError) as error:
            cause = str(error).replace("CurvePoint.__init__() ", "")
            cause = re.sub(r": line 1 column (\d+) \(char \d+\)$", r" at column \1", cause)
            raise ValueError(f"line {number}: {cause}") from error
    return points


def runs_of(sweep: Path) -> list[RunFolder]:
    """The runs of a sweep, sorted by name. For the folder of a run, only this run.

    `outputs/<sweep>/<hash>` stands for the folder of the run with this hash.

    Raises:
        UserError: If the folder has no runs, or cannot be read.
    """
    try:
        sweep = in_full(sweep)
        inside = sorted(sweep.iterdir()) if sweep.is_dir() else []
        paths = [sweep] if is_run(sweep) else [path for path in inside if is_run(path)]
    except OSError as error:
        raise UserError(f"{sweep} cannot be read: {error.strerror}") from error
    if not paths:
        raise UserError(f"{sweep} holds no runs; the folder of a sweep is outputs/<sweep>")
    return [RunFolder(path) for path in sorted(paths, key=lambda path: _by_numbers(path.name))]


def in_full(run: Path) -> Path:
    """The folder of a run that is given by its hash, `outputs/<sweep>/<hash>`; other paths stay."""
    if run.exists() or not run.parent.is_dir() or not re.fullmatch("[0-9a-f]{8}", run.name):
        return run
    if named := next(run.parent.glob(f"*-{run.name}"), None):
        return named
    renamed = (path for path in run.parent.iterdir() if _hash_inside(path) == run.name)
    return next(renamed, run)


def _hash_inside(run: Path) -> str | None:
    """The hash that a finished run has in its summary; `None` for another folder."""
    try:
        return RunFolder(run).read_summary().get("hash")
    except UserError:
        return None


def hash_of(name: str) -> str:
    """The hash at the end of a run's name, which stands for its folder in commands; else the name."""
    match = _HASHED.search(name)
    return match[1] if match else name


def is_run(path: Path) -> bool:
    """True for the folder of a run, damaged or not; false for an exported run, and for a report."""
    if path.name.startswith("."):
        return False
    if _HASHED.search(path.name):  # perhaps a broken link, or an empty folder
        return True
    is_export = (path / MODEL_CARD).exists() and not (path / "log.txt").exists()
    is_report = (path / "index.html").exists()
    return any((path / mark).exists() for mark in _MARKS) and not is_export and not is_report


def _by_numbers(name: str) -> list[str | int]:
    """Sort key that compares numbers in names by value: s2 comes before s10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
