"""The plan: what every point of a sweep means, and where it belongs.

Each point is resolved to SAEs that exist, named, and given its folder; nothing is loaded, nothing is
written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import OmegaConf

from sae_lora.checks import adapted_blocks, canonical_alpha, canonical_blocks
from sae_lora.config import Config, TextSource, as_list
from sae_lora.conversion import as_dict, load
from sae_lora.data.documents import files_matching
from sae_lora.dimensions import Dimensions, read_dimensions
from sae_lora.errors import ConfigError, NoSuchCellError, UserError
from sae_lora.identity import identity, readable_name
from sae_lora.records import RunFolder
from sae_lora.saes.registry import resolve


@dataclass(frozen=True)
class Run:
    """One point of a plan: a config that is complete, and the folder it belongs to."""

    config: Config
    folder: RunFolder

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.folder.path.name

    def freeze(self) -> None:
        """Writes the resolved config into the folder: all that the run will read.

        What an attempt that failed has left is put aside, so that the run can be tried again.

        Raises:
            UserError: Where the folder cannot be written.
        """
        self.folder.write_config(OmegaConf.to_yaml(as_dict(self.config)))
        self.folder.clear_failure()


Pack = list[Run]
"""Runs that train together."""


@dataclass(frozen=True)
class Plan:
    """Every run of one command, each once."""

    runs: list[Run]
    notes: list[str]
    """What a person should know: the nearest SAE taken, the same point twice."""


def plan(points: Sequence[Config]) -> Plan:
    """Settles what the points mean.

    Raises:
        ConfigError: For a point that cannot work.
        UserError: Where a model's config cannot be had, and where no point has an SAE.
    """
    sizes: dict[tuple[str, str | None], Dimensions] = {}
    runs: dict[Path, Run] = {}
    notes: list[str] = []
    for point in points:
        model = (point.model.name, point.model.revision)
        if model not in sizes:
            sizes[model] = read_dimensions(point.model)
        dimensions = sizes[model]
        try:
            resolution = resolve(point, dimensions)
        except NoSuchCellError as error:
            if len(points) == 1 or point.launcher.strict:
                raise
            notes.append(f"dropped: {_asked_for(point)}, since {error.field} may be {error.allowed}")
            continue
        config = replace(
            point,
            sae=replace(point.sae, used=resolution.choices),
            lora=replace(
                point.lora,
                alpha=canonical_alpha(point.lora),
                blocks=canonical_blocks(point.lora.blocks),
            ),
        )
        adapted_blocks(
            config.lora.blocks, min(one.block for one in resolution.choices), dimensions.n_blocks
        )
        _check_context(config, dimensions.max_context)
        if config.data.source is TextSource.text_files:
            files_matching(as_list(config.data.files))
        notes += [note for note in resolution.notes if note not in notes]
        path = Path(config.output_dir) / config.sweep / f"{readable_name(config)}-{identity(config)}"
        if path in runs:
            notes.append(f"{path.name} is named twice and runs once")
        folder = RunFolder(path)
        runs.setdefault(path, Run(_as_begun(config, folder), folder))
    if not runs:
        raise UserError("\n  ".join(["no point of this sweep has an SAE", *notes[:5]]))
    return Plan(list(runs.values()), notes)


def _asked_for(point: Config) -> str:
    """The cell of the grid that a point asks for."""
    parts = {
        "layer.index": point.layer.index,
        "layer.every": point.layer.every,
        "layer.first": point.layer.first,
        "layer.hook": point.layer.hook and point.layer.hook.name,
        "sae.width": point.sae.width,
        "sae.l0": point.sae.l0 and f"{point.sae.l0:g}",
    }
    return " ".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def _as_begun(config: Config, folder: RunFolder) -> Config:
    """A run that goes on reads the same model and text as before, whatever their names stand for now."""
    if folder.is_finished or not folder.checkpoints.exists():
        return config
    begun = load(folder.config.read_text())
    return replace(
        config,
        model=replace(config.model, commit=begun.model.commit),
        sae=replace(config.sae, used=begun.sae.used),
        data=replace(config.data, version=begun.data.version),
    )


def unpinned(config: Config) -> Config:
    """The config before anything was fetched for it: with names, and not what they stood for."""
    return replace(
        config,
        model=replace(config.model, commit=None),
        sae=replace(config.sae, used=[replace(one, commit=None) for one in config.sae.used]),
        data=replace(config.data, version=None),
    )


def _check_context(config: Config, longest: int | None) -> None:
    if longest is not None and config.data.context_length > longest:
        raise ConfigError(
            "data.context_length",
            config.data.context_length,
            f"at most {longest}, the longest text that {config.model.name} was made for",
            nearest=longest,
        )
