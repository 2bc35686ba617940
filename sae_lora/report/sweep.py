"""The runs of a sweep in Python: values, data frames, figures and, with torch, models."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lora.common.console import count
from sae_lora.common.errors import ConfigError, listed, nearest_name
from sae_lora.records.folder import RunFolder, runs_of
from sae_lora.records.status import finished, read_statuses
from sae_lora.report.fits import Frame
from sae_lora.report.frames import curves_frame, runs_frame

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from sae_lora.export.adapted_model import Adapted


CURVE_AXES = ("tokens", "train_seconds", "train_flops")
"""Measures that curves are drawn over."""


class Run:
    """One run. Its folder is read at each access.

    Args:
        folder: `outputs/<sweep>/<run>`.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._folder.path

    @property
    def name(self) -> str:
        """The name of the run folder."""
        return self.folder.name

    @property
    def state(self) -> str:
        """The name of its state, a member of `sae_lora.records.status.State`."""
        (status,) = read_statuses([self._folder])
        return status.state.value

    @property
    def config(self) -> dict[str, Any]:
        """The resolved config, nested."""
        return self._folder.read_config()

    @property
    def summary(self) -> dict[str, Any]:
        """The results of the finished run; `sae_lora.records.schema.Summary` names the keys.

        Raises:
            UserError: If the run is not finished; with the cause.
        """
        return finished(self.folder).read_summary()

    def curve(self) -> Frame:
        """A row per evaluation so far; `sae_lora.records.schema.CurvePoint` names the columns."""
        return curves_frame([self._folder]).drop(columns=["sweep", "run"])

    def adapted(self, device: str | None = None) -> "Adapted":
        """The model with SAEs and adapters, from `load_adapted`.

        Args:
            device: auto, cpu or cuda; by default the run's `train.device`.

        Raises:
            UserError: If the run is not finished, or one of its files is missing or has changed.
        """
        from sae_lora.export.adapted_model import load_adapted

        return load_adapted(self._folder, device)

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, {self.state})"


class Sweep(Sequence[Run]):
    """The runs of one or several sweeps, in the order of their folders.

    Args:
        folders: The run folders. They are read at each access.
    """

    def __init__(self, folders: Sequence[RunFolder]) -> None:
        self.folders = list(folders)

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Sweep(self.folders[index])
        return Run(self.folders[index])

    def __iter__(self) -> Iterator[Run]:
        return map(Run, self.folders)

    def __repr__(self) -> str:
        return f"Sweep of {count(len(self), 'run')}: {', '.join(run.name for run in self)}"

    def frame(self) -> Frame:
        """A row per run: its state, factors, measures and the command that repeats it.

        `sae_lora.report.frames.runs_frame` lists the columns.
        """
        return runs_frame(self.folders)

    def curves(self) -> Frame:
        """A row per evaluation of every run: `sweep`, `run`, and the measures."""
        return curves_frame(self.folders)

    def plot(self, over: str = "tokens") -> "go.Figure":
        """The CE gap of each run over its training, in nats per token.

        Args:
            over: `tokens`, `train_seconds` or `train_flops`.

        Raises:
            ConfigError: For another axis.
        """
        from sae_lora.report.figures import gap_curves

        if over not in CURVE_AXES:
            raise ConfigError("over", over, listed(CURVE_AXES), nearest_name(over, CURVE_AXES))
        return gap_curves(self.frame(), self.curves(), over)


def load_sweep(*paths: Path | str) -> Sweep:
    """The runs of one or several sweeps: `load_sweep("outputs/ranks").frame()`.

    Args:
        paths: Folders of sweeps, `outputs/<sweep>`, or of single runs.

    Raises:
        UserError: If one of the folders contains no runs.
    """
    return Sweep([folder for path in paths for folder in runs_of(Path(path))])
