"""The plan: what every point of a sweep means, and where it belongs.

Each point is resolved to SAEs that exist, named, and given its folder. Nothing is written, and no model
is loaded but to measure the distances between its blocks, once, for layer=groups.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sae_lora.common.errors import ConfigError, NoSuchCellError, UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.enums import Method, TextSource
from sae_lora.config.identity import ADAPTING, identity, readable_name
from sae_lora.config.lora_targets import adapted_blocks, canonical_alpha, canonical_blocks
from sae_lora.config.schema import Config, as_list
from sae_lora.config.serialize import as_dict, load
from sae_lora.data.documents import files_matching
from sae_lora.models.dimensions import Dimensions, read_dimensions
from sae_lora.records.folder import RunFolder
from sae_lora.saes.from_run import begun, check_goes_on
from sae_lora.saes.layer_groups import Distances, LayerGroups, are_wanted, groups
from sae_lora.saes.resolve import Resolution, resolve


@dataclass(frozen=True)
class Run:
    """One point of a plan: a config that is complete, and the folder it belongs to."""

    config: Config
    folder: RunFolder
    groups: LayerGroups | None = None
    """Where its SAEs are one for several blocks each: which, and how they were found."""

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
        if self.groups is not None:
            write_atomically(self.folder.groups, as_json(asdict(self.groups)))
        self.folder.clear_failure()


Pack = list[Run]
"""Runs that train together."""


@dataclass(frozen=True)
class Plan:
    """Every run of one command, each once."""

    runs: list[Run]
    notes: list[str]
    """What a person should know: the nearest SAE taken, the same point twice."""
    waiting: list[Config]
    """Points that begin with the result of a run of this plan that is not finished; planned after it."""


def plan(points: Sequence[Config]) -> Plan:
    """Settles what the points mean.

    Raises:
        ConfigError: For a point that cannot work.
        UserError: Where a model's config cannot be had, and where no point has an SAE.
    """
    planner = _Planner(strict=len(points) == 1 or any(point.launcher.strict for point in points))
    waiting: list[Config] = []
    for point in points:
        if point.init not in Method.__members__:
            planner.add(point)
    for point in _in_order([one for one in points if one.init in Method.__members__]):
        if any(_is_named(one, point) for one in waiting):
            waiting.append(point)
            continue
        before = planner.run_before(point)
        if before.folder.is_finished:
            planner.add(replace(point, init=str(before.folder.path)))
        else:
            planner.check_waiting(point, before)
            waiting.append(point)
    if not planner.runs:
        raise UserError("\n  ".join(["no point of this sweep has an SAE", *planner.notes[:5]]))
    return Plan(list(planner.runs.values()), planner.all_notes, waiting)


def _in_order(points: Sequence[Config]) -> Iterator[Config]:
    """Points whose `init` names others, each after those of them that it names."""
    left = list(points)
    while left:
        ready = [one for one in left if not any(_is_named(other, one) for other in left)] or left
        yield from ready
        taken = {id(one) for one in ready}
        left = [one for one in left if id(one) not in taken]


def _is_named(one: Config, by: Config) -> bool:
    """Whether a point is of the method that another begins with, and otherwise at the same place."""
    return one is not by and one.method.kind.name == by.init and _place(one) == _place(by)


def _place(config: Config) -> tuple[Any, ...]:
    model = config.model.name, config.model.revision
    return model, config.layer, config.train.seed, config.data.seed


_MOST_NAMED = 3
"""Runs that are named one by one."""


class _Planner:
    """Takes in one point after another.

    Args:
        strict: Whether a point at which there is no SAE is refused, rather than left out.
    """

    def __init__(self, *, strict: bool) -> None:
        self.runs: dict[Path, Run] = {}
        self.notes: list[str] = []
        self._strict = strict
        self._sizes: dict[tuple[str, str | None], Dimensions] = {}
        self._distances = Distances()
        self._named: Counter[Path] = Counter()
        self._meant: list[tuple[Config, Path]] = []
        """Points, and the runs that they mean."""

    @property
    def all_notes(self) -> list[str]:
        """What a person should know."""
        again = {path: times for path, times in self._named.items() if times > 1}
        if len(again) > _MOST_NAMED:
            number = sum(again.values()) - len(again)
            return [*self.notes, f"{number} points mean the same run as another, and run once with it"]
        several = [
            f"{path.name} is named {'twice' if times == 2 else f'{times} times'} and runs once"
            for path, times in again.items()
        ]
        return self.notes + several

    def add(self, point: Config) -> None:
        """Adds the run that a point means, but for one at which there is no SAE."""
        asked = point
        dimensions = self._dimensions(point)
        try:
            if point.init is not None:
                point = begun(point, dimensions)
            grouped = are_wanted(point) and not point.init
            shared = groups(point, dimensions, self._distances) if grouped else None
            resolution = (
                Resolution(point.sae.used, [])
                if point.sae.used
                else resolve(point, dimensions, shared and shared.groups)
            )
        except NoSuchCellError as error:
            if self._strict:
                raise
            self.notes.append(
                f"dropped: {_asked_for(point)}, since {error.field} may be {error.allowed}"
            )
            return
        lora = replace(
            point.lora, alpha=canonical_alpha(point.lora), blocks=canonical_blocks(point.lora.blocks)
        )
        config = replace(point, sae=replace(point.sae, used=resolution.choices), lora=lora)
        if config.method.kind in ADAPTING:
            first = min(one.block for one in resolution.choices)
            adapted_blocks(config.lora.blocks, first, dimensions.n_blocks)
        _check_context(config, dimensions.max_context)
        if config.data.source is TextSource.text_files:
            files_matching(as_list(config.data.files))
        self.notes += [note for note in resolution.notes if note not in self.notes]
        path = Path(config.output_dir) / config.sweep / f"{readable_name(config)}-{identity(config)}"
        self._named[path] += 1
        self._meant.append((asked, path))
        folder = RunFolder(path)
        self.runs.setdefault(path, Run(_as_begun(config, folder), folder, shared))

    def run_before(self, point: Config) -> Run:
        """The run of this plan that a point's `init` names by its method.

        Raises:
            ConfigError: Where there is none, or more than one.
        """
        found = {path for asked, path in self._meant if _is_named(asked, point)}
        if len(found) != 1:
            there = (
                f"{len(found) or 'none'} of them have method={point.init}, this model, layer and seed"
            )
            allowed = "a finished run's folder, or the method of just one other run of this command"
            raise ConfigError("init", point.init, allowed, because=there)
        return self.runs[found.pop()]

    def check_waiting(self, point: Config, before: Run) -> None:
        """Refuses now what would be refused once the run before is finished, which may be hours later.

        Raises:
            ConfigError: For a point that cannot work.
        """
        check_goes_on(point, before.config)
        dimensions = self._dimensions(point)
        if point.method.kind in ADAPTING:
            first = min(one.block for one in before.config.sae.used)
            adapted_blocks(canonical_blocks(point.lora.blocks), first, dimensions.n_blocks)
        _check_context(point, dimensions.max_context)

    def _dimensions(self, point: Config) -> Dimensions:
        model = (point.model.name, point.model.revision)
        if model not in self._sizes:
            self._sizes[model] = read_dimensions(point.model)
        return self._sizes[model]


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
