"""Checkpoints of an unfinished run: written atomically, and verified before they are used.

checkpoints/step-00000200/
    tensors.safetensors   trained weights, optimizer, random states
    state.json            step, tokens, sums since the last evaluation
    manifest.json         the run's hash, and size and SHA-256 of the other two files; written last
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, new_folder, sha256, write_atomically
from sae_lora.config.schema import TrainConfig

VERSION = 1
KEPT = 2
"""Number of checkpoints that are kept per run. If the newest is damaged, the older one is used."""

_LARGEST_SHARE = 0.03
"""Largest share of the time that checkpoints by time may take."""
_TENSORS, _VALUES, _MANIFEST = "tensors.safetensors", "state.json", "manifest.json"


class Snapshot(NamedTuple):
    """Everything that training needs to resume as if it had never stopped."""

    tensors: dict[str, Tensor]
    """Trained weights, optimizer and random states, by name."""
    values: dict[str, Any]
    """JSON-able values: the step, and counters."""


class Timer:
    """The times of checkpoints of the runs of a pack, which are saved together.

    Args:
        clock: The time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()
        self._cost = 0.0
        """Seconds of the last checkpoints."""

    def is_due(self, step: int, config: TrainConfig) -> bool:
        """True if a run that has just taken this step should save a checkpoint."""
        if step % config.checkpoint_every_steps == 0:
            return True
        if config.checkpoint_every_min is None:
            return False
        between = max(60 * config.checkpoint_every_min, self._cost / _LARGEST_SHARE)
        return self._clock() - self._last >= between

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the time that checkpoints take, inside the block."""
        start = self._clock()
        yield
        self._last = self._clock()
        self._cost = self._last - start


def save(folder: Path, run_hash: str, state: Snapshot) -> None:
    """Write a checkpoint, unless a valid one of this step exists; keep only the newest `KEPT`.

    Args:
        folder: The run's `checkpoints` folder.
        run_hash: The run's hash; a checkpoint of another run is never used.
        state: The state; its value `step` names the checkpoint.

    Raises:
        OSError: If the checkpoint cannot be written; older checkpoints stay.
    """
    folder.mkdir(exist_ok=True)
    for unfinished in folder.glob(".step-*"):  # from a process that was killed while it wrote
        shutil.rmtree(unfinished)
    step = state.values["step"]
    path = folder / f"step-{step:08d}"
    if path.exists():
        if _fault(path, run_hash) is None:
            return
        shutil.rmtree(path)
    with new_folder(path) as new:
        # safetensors refuses tensors that share memory (a view, a tied weight); a `Snapshot` has none.
        save_file({name: value.contiguous() for name, value in state.tensors.items()}, new / _TENSORS)
        write_atomically(new / _VALUES, as_json(state.values))
        files = {name: _size_and_sha256(new / name) for name in (_TENSORS, _VALUES)}
        manifest = {"version": VERSION, "run": run_hash, "step": step, "files": files}
        write_atomically(new / _MANIFEST, as_json(manifest))
    for old in _paths(folder)[KEPT:]:
        shutil.rmtree(old)


def newest(folder: Path, run_hash: str, complain: Callable[[str], None]) -> Snapshot | None:
    """The newest valid checkpoint; `None` if there are no checkpoints.

    Args:
        folder: The run's `checkpoints` folder.
        run_hash: The run's hash.
        complain: Called with one line about each damaged checkpoint.

    Raises:
        UserError: If there are checkpoints but none is valid: a silent start from the beginning would
            discard their progress.
    """
    faults = []
    for path in _paths(folder):
        fault = _fault(path, run_hash)
        if fault is None:
            try:
                return Snapshot(load_file(path / _TENSORS), json.loads((path / _VALUES).read_text()))
            except (OSError, SafetensorError, ValueError) as error:
                fault = str(error)
        faults.append(f"{path.name}: {fault}")
        complain(f"checkpoint {faults[-1]}; not used")
    if faults:
        raise UserError(
            f"no checkpoint in {folder} can be used ({'; '.join(faults)}). "
            "Delete this folder to start the run from the beginning"
        )
    return None


def points(folder: Path, run_hash: str) -> int:
    """Number of points of the curve up to the newest valid checkpoint; 0 if there is none."""
    valid = (path for path in _paths(folder) if _fault(path, run_hash) is None)
    newest = next(valid, None)
    return 0 if newest is None else json.loads((newest / _VALUES).read_text())["points"]


def _paths(folder: Path) -> list[Path]:
    """All checkpoints, newest first."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _fault(path: Path, run_hash: str) -> str | None:
    """The fault of a checkpoint, as a message; `None` if the checkpoint is valid."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
    except OSError as error:
        return f"{_MANIFEST}: {error.strerror}"
    except ValueError:
        return f"{_MANIFEST} is damaged"
    if not isinstance(manifest, Mapping) or manifest.get("version") != VERSION:
        return f"the version in {_MANIFEST} is not {VERSION}"
    if manifest.get("run") != run_hash:
        return f"it belongs to another run ({manifest.get('run')}, not {run_hash})"
    if path.name != f"step-{manifest.get('step', -1):08d}":
        return f"{_MANIFEST} is that of step {manifest.get('step')}"
    for name in (_TENSORS, _VALUES):
        try:
            identity = _size_and_sha256(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if identity != manifest.get("files", {}).get(name):
            return f"{name} has changed since it was written"
    return None


def _size_and_sha256(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256(file)}
