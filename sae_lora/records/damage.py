"""Damage to run folders: files that are missing, cannot be read or do not belong together.

Imports no torch.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_lora.common.errors import UserError
from sae_lora.common.files import sha256
from sae_lora.common.locks import LEASE
from sae_lora.config.enums import Method
from sae_lora.config.identity import ADAPTING, TRAINING_SAES, identity_of
from sae_lora.config.serialize import completed
from sae_lora.records import halving
from sae_lora.records.folder import DamagedError, RunFolder, summary_digest
from sae_lora.records.schema import SUMMARY_VERSION, CurvePoint, Summary, check_types

_NEEDED = [
    field.name
    for field in dataclasses.fields(Summary)
    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
]
"""The keys of `summary.json` in every version."""
_SHARED = ("student_ce", "ce_gap", "gap_closed", "kl")
"""Measures that the last point of the curve and the summary have in common."""
_WEIGHTS = {
    "adapter": ("adapter_config.json", "adapter_model.safetensors"),
    "sae": ("cfg.json", "sae_weights.safetensors"),
    "output_adapter": ("output_adapter.json", "output_adapter.safetensors"),
}
"""Folders of trained weights, and the files in each of their folders: settings, then weights."""
_known: dict[Path, tuple[tuple[object, ...], str | None]] = {}
"""The damage of folders that were looked at before, and the state of their files then."""


def damage(folder: RunFolder) -> str | None:
    """The damage of a run folder, in one line; `None` for a sound one.

    Checks that all files that the run leaves are there and can be read, that their schema is known, and
    that the config is the one that the run was started with: it has the run's hash. Weights are checked
    for their complete length, but not read (`damage_of_weights`). A folder that has not changed is not
    read again.
    """
    state = _state(folder)
    if folder.path not in _known or _known[folder.path][0] != state:
        _known[folder.path] = state, _find(folder)
    return _known[folder.path][1]


def weights_of(folder: RunFolder) -> dict[str, str]:
    """SHA-256 of each file of trained weights by its path, also after shares of training (`sae_at/`)."""
    kinds = (*_WEIGHTS, "sae_at")
    return _digests(folder, (file for kind in kinds for file in _inside(folder, kind, "*.safetensors")))


def files_of(folder: RunFolder) -> dict[str, str]:
    """SHA-256 of the other files that a finished run leaves beside its config and summary."""
    single = [file for file in (folder.curve, folder.groups) if file.exists()]
    settings = [file for kind, parts in _WEIGHTS.items() for file in _inside(folder, kind, parts[0])]
    return _digests(folder, [*single, *settings])


def _inside(folder: RunFolder, kind: str, pattern: str) -> list[Path]:
    return sorted(getattr(folder, kind).rglob(pattern))


def _digests(folder: RunFolder, files: Iterable[Path]) -> dict[str, str]:
    return {file.relative_to(folder.path).as_posix(): sha256(file) for file in files}


def damage_of_weights(folder: RunFolder, at: float = 1.0) -> str | None:
    """The damage of the trained weights of a sound run, in one line; reads them all.

    `damage` does not read them, because they may be large. Commands that use them ask here first.

    Args:
        folder: The run.
        at: Share of its training after which the weights are used.
    """
    saved: dict[str, str] = folder.read_summary().get("weights", {})
    used = {
        name: digest
        for name, digest in saved.items()
        if (name.startswith(f"sae_at/{at:g}/") if at < 1 else not name.startswith("sae_at/"))
    }
    return _difference(folder, used)


def _difference(folder: RunFolder, saved: Mapping[str, str]) -> str | None:
    """The first of these files that is not the one with this digest, in one line; `None` if all are."""
    for name, digest in saved.items():
        file = folder.path / name
        if not file.is_file():
            return f"{name} is missing"
        if sha256(file) != digest:
            return f"{name} has changed since the run wrote it"
    return None


def _state(folder: RunFolder) -> tuple[object, ...]:
    """Sizes and times of the files that `_find` reads."""
    files = (folder.config, folder.summary, folder.curve, folder.failure, folder.stop, folder.job_file)
    weights = [file for kind in _WEIGHTS for file in _inside(folder, kind, "*.*")]
    others = (folder.groups, folder.halving, folder.checkpoints, folder.progress)
    return tuple(_stamp(path) for path in (*files, *weights, *others))


def _stamp(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _find(folder: RunFolder) -> str | None:
    try:
        _check(folder)
    except DamagedError as error:
        return error.cause
    return None


def _check(folder: RunFolder) -> None:
    """Raise a `DamagedError` for the first damage."""
    if not folder.path.is_dir():
        if os.path.lexists(folder.path):
            raise DamagedError(folder.path, "it is no folder")
        return
    folders = (folder.checkpoints, folder.evaluation, folder.sae_at, folder.path / LEASE)
    for path in (*folders, *(getattr(folder, kind) for kind in _WEIGHTS)):
        if path.exists() and not path.is_dir():
            raise DamagedError(folder.path, f"{path.name} is a file, not a folder")
    curve = folder.read_curve()
    _ = folder.read_failure(), folder.stop_message, folder.job, halving.read(folder)
    if not any(not entry.name.startswith(".") for entry in folder.path.iterdir()):
        return  # a run that a launch has just planned
    config, run_hash = _config(folder)
    named = re.search(r"-([0-9a-f]{8})$", folder.path.name)
    if named and named[1] != run_hash:
        raise _other_config(folder, named[1], run_hash)
    if folder.is_outranked and not curve:
        without = "is empty" if folder.curve.exists() else "is missing"
        raise DamagedError(folder.path, f"curve.jsonl {without}")
    if folder.summary.exists():
        _check_results(folder, config, run_hash, curve)
    elif _has_lost_its_summary(folder):
        raise DamagedError(folder.path, "summary.json is missing")


def _has_lost_its_summary(folder: RunFolder) -> bool:
    """True if the run has finished: its weights are there, and what an unfinished run has is gone."""
    has_weights = any(getattr(folder, kind).exists() for kind in _WEIGHTS)
    return has_weights and not (folder.checkpoints.exists() or folder.progress.exists())


def _check_results(
    folder: RunFolder, config: dict[str, Any], run_hash: str, curve: Sequence[CurvePoint]
) -> None:
    """Check the summary of a finished run, its curve and its weights."""
    summary = folder.read_summary()
    version = summary.get("version")
    if isinstance(version, int) and version != SUMMARY_VERSION:
        cause = f"summary.json has version {version}; this sae_lora reads version {SUMMARY_VERSION}"
        raise DamagedError(folder.path, cause)
    if missing := [name for name in (*_NEEDED, "version") if name not in summary]:
        raise DamagedError(folder.path, f"summary.json lacks {missing[0]}")
    try:
        check_types(Summary, summary)
    except ValueError as error:
        raise DamagedError(folder.path, f"summary.json: {error}") from error
    if summary["hash"] != run_hash:
        raise _other_config(folder, summary["hash"], run_hash)
    if not curve or curve[-1].step != summary["train_steps"]:
        without = "is empty" if folder.curve.exists() else "is missing"
        step = f"ends at step {curve[-1].step}" if curve else without
        raise DamagedError(folder.path, f"curve.jsonl {step}, summary.json at {summary['train_steps']}")
    if differing := [name for name in _SHARED if getattr(curve[-1], name) != summary[name]]:
        raise DamagedError(folder.path, f"{differing[0]} of curve.jsonl is not that of summary.json")
    _check_weights(folder, config)
    # Summaries of older versions have neither digest nor files.
    if {"digest", "files"} & set(summary) and summary.get("digest") != summary_digest(summary):
        raise DamagedError(folder.path, "summary.json has changed since the run wrote it")
    if (cause := _difference(folder, summary.get("files", {}))) is not None:
        raise DamagedError(folder.path, cause)


def _config(folder: RunFolder) -> tuple[dict[str, Any], str]:
    """The complete config and its hash."""
    values = folder.read_config()
    try:
        config = completed(values)
        return config, identity_of(config)
    except UserError as error:
        cause = str(error).partition("\n")[0]
        raise DamagedError(folder.path, f"config.yaml: {cause}") from error
    except (TypeError, LookupError, AttributeError) as error:
        cause = f"config.yaml is no config of this package: {type(error).__name__} {error}"
        raise DamagedError(folder.path, cause) from error


def _other_config(folder: RunFolder, expected: str, found: str) -> DamagedError:
    cause = f"config.yaml has changed: its hash is {found}, the run's is {expected}"
    return DamagedError(folder.path, cause)


def _check_weights(folder: RunFolder, config: dict[str, Any]) -> None:
    """Check that the trained weights are there, each file complete."""
    kind = Method[config["method"]["kind"]]
    places = [
        f"blocks.{min([choice['block'], *choice['group']])}.hook_{choice['hook']}"
        for choice in config["sae"]["used"]
    ]
    trained = {
        "adapter": [""] if kind in ADAPTING else [],
        "sae": places if kind in TRAINING_SAES else [],
        "output_adapter": [] if kind in (*ADAPTING, *TRAINING_SAES) else places,
    }
    for name, inside in trained.items():
        for file in (Path(name, place, part) for place in inside for part in _WEIGHTS[name]):
            if not (folder.path / file).exists():
                raise DamagedError(folder.path, f"{file} is missing")
            if file.suffix == ".safetensors" and not _is_complete(folder.path / file):
                raise DamagedError(folder.path, f"{file} is cut off, or holds no weights")
            if name == "adapter" and file.suffix == ".json":
                _check_rank(folder, folder.path / file, config["lora"]["rank"])


def _check_rank(folder: RunFolder, file: Path, rank: int) -> None:
    """Refuse adapters of another rank: those of another run."""
    try:
        saved = json.loads(file.read_text())["r"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedError(folder.path, f"{file.name} cannot be read") from error
    if saved != rank:
        raise DamagedError(folder.path, f"{file.name} is of rank {saved}, the run of rank {rank}")


def _is_complete(file: Path) -> bool:
    """True if a safetensors file has weights, and is as long as its header says."""
    try:
        length = file.stat().st_size
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = opened.read(size) if size < length else b""
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
        return bool(ends) and length >= 8 + size + max(ends)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
