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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.common.secrets import redacted

SUMMARY_VERSION = 1


@dataclass(frozen=True)
class CurvePoint:
    """One evaluation on the held-out tokens. Cross-entropies and KL in nats per token."""

    step: int
    """Optimiser steps taken."""
    tokens: int
    """Tokens trained on."""
    train_seconds: float
    """Seconds spent training, evaluations left out; where runs train together, this run's share."""
    base_ce: float
    """Cross-entropy of the plain model, the teacher."""
    spliced_ce: float
    """Cross-entropy with the SAE in place and no adapters."""
    student_ce: float
    """Cross-entropy with the SAE in place and the adapters on."""
    ce_gap: float
    """`student_ce − base_ce`; positive is worse."""
    gap_closed: float | None
    """`1 − ce_gap / initial_gap`, where 1 is a closed gap; null where there was no gap to close, and
    where the SAE is new."""
    kl: float
    """KL(teacher ‖ student) over the whole vocabulary."""
    top1_agreement: float
    """Share of positions where teacher and student put the same token first."""
    fvu: float
    """Residual variance / total variance of the reconstruction, as the student's SAEs see it."""
    l0: float
    """Mean number of active latents per token, likewise; mean over SAEs if there are several."""
    per_sae: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    """`fvu`, `l0` and `dead` of each SAE by hookpoint."""
    dead_latents: float | None = None
    """Share of latents that none of the held-out tokens makes active, likewise; mean over SAEs; null
    where an older version wrote the point."""
    train_flops: float | None = None
    """Floating-point operations of its training so far, if it had trained alone (`estimate.py`)."""
    train_loss: float | None = None
    """Mean training KL since the last point, in nats per token; with method=sae the squared error of a
    residual, summed over d_model. Null before the first step."""
    lr: float | None = None
    """Learning rate of the last step."""
    grad_norm: float | None = None
    """Norm of the adapters' gradient in the last step, before clipping."""
    tokens_per_second: float | None = None
    """Training tokens per second since the last point."""
    peak_memory_gb: float | None = None
    """The most memory that the process has held so far, in 10^9 bytes: of the GPU where it computes on
    one, else of the machine."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands while a process is at work on it."""

    stage: str
    """What it is doing, in a few words."""
    step: int = 0
    steps: int = 0
    tokens: int = 0
    """Tokens trained on."""
    train_tokens: int = 0
    """Tokens it will have been trained on."""
    loss: float | None = None
    """Training KL of the last batch, in nats per token."""
    tokens_per_second: float | None = None
    """Over the last few seconds."""
    checkpoint_step: int | None = None
    """Step of the newest checkpoint; null before the first."""


@dataclass(frozen=True)
class Failure:
    """Why a run ended early."""

    message: str
    """In a line or a few."""
    details: str
    """The whole story: the traceback, or the end of what it printed."""


@dataclass(frozen=True)
class SubmittedJob:
    """The SLURM job that a run was last submitted with."""

    id: str
    """Its number: `12`, or `12_3` in an array."""


def gap_closed(base_ce: float, spliced_ce: float, student_ce: float) -> float | None:
    """`1 − (student − base) / (spliced − base)`, or `None` where the SAE opens no gap."""
    initial_gap = spliced_ce - base_ce
    return 1 - (student_ce - base_ce) / initial_gap if initial_gap > 0 else None


@dataclass(frozen=True)
class Summary:
    """What a finished run found and how: the schema of `summary.json`, version 1.

    Fields are only ever added within a version. Cross-entropies and KL in nats per token, over the
    same held-out tokens; definitions as in `CurvePoint`.
    """

    base_ce: float
    spliced_ce: float
    student_ce: float
    initial_gap: float
    """`spliced_ce − base_ce`."""
    ce_gap: float
    """`student_ce − base_ce`."""
    gap_closed: float | None
    """Null where `initial_gap ≤ 0`: there was no gap to close; and where the SAE is new."""
    kl: float
    """KL(teacher ‖ student) after training."""
    initial_kl: float
    """The same before training: KL(teacher ‖ spliced)."""
    top1_agreement: float
    fvu: float
    l0: float
    """Measured on the held-out tokens; what the SAE's makers state is in `sae`."""
    trainable_parameters: int
    train_tokens: int
    train_steps: int
    train_seconds: float
    """Seconds in training steps."""
    total_seconds: float
    """Seconds that the run took, summed over its attempts as far as their checkpoints went on;
    loading and evaluations included."""
    validation_tokens: int
    """Held-out tokens read by every evaluation."""
    best_gap_closed: float | None
    """The largest on the curve."""
    model: dict[str, Any]
    """Name, commit, class, number of blocks, and the precisions of loading and computing."""
    sae: list[dict[str, Any]]
    """Per SAE: block, hookpoint, release, id or path, width, stated L0, measured L0, FVU and share of
    dead latents, the repository's commit and the SHA-256 of its weights. Where there are several, also
    `alone_ce` and `alone_fvu`, with this one alone in the plain model, and `left_out_ce`, of the student
    without it."""
    lora: dict[str, Any]
    """Rank, alpha, dropout, targets, blocks, and the scale that B · A is multiplied by; empty with a
    method that trains no adapters."""
    seed: int
    """Of the adapters' initial values and dropout."""
    data: dict[str, Any]
    """Source, revision or content hash, and how often the training text was gone through."""
    environment: dict[str, Any]
    """Python, package versions, device, threads, host, git commit."""
    tracked_at: str | None
    """Where W&B shows the run: an address, or the folder of an offline run."""
    name: str
    hash: str
    train_flops: float | None = None
    """Floating-point operations of its training steps, if it had trained alone (`estimate.py`); null
    where an older version wrote the summary."""
    trained_together: int = 1
    """Runs that trained in one process and shared the frozen part of their work; of that process's
    time, `train_seconds` and `total_seconds` are this run's share."""
    dead_latents: float | None = None
    """Share of latents that none of the held-out tokens makes active; null in an older summary."""
    method: dict[str, Any] = dataclasses.field(default_factory=lambda: {"kind": "lora"})
    """Kind, the rank of what it trains where that is no LoRA on the model, and `init`."""
    version: int = SUMMARY_VERSION


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
