"""The plan: the run of each point of a sweep, and its folder.

Planning finds the SAEs that a config asks for, and writes no run folder. Only layer=groups may load a
model: it measures the distances between blocks, and caches them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sae_lora.common.errors import ConfigError, NoSuchCellError, UserError
from sae_lora.common.files import as_json, check_readable, write_atomically
from sae_lora.config.enums import Method, TextSource
from sae_lora.config.identity import ADAPTING, folder_name, readable_name
from sae_lora.config.lora_targets import (
    adapted_blocks,
    canonical_alpha,
    canonical_blocks,
    selection_version,
)
from sae_lora.config.schema import Config, SAEChoice, as_list
from sae_lora.config.serialize import as_dict, load
from sae_lora.data.documents import check_hub_name
from sae_lora.data.text_files import files_matching
from sae_lora.models.dimensions import Dimensions, read_dimensions
from sae_lora.models.model_folder import check_files
from sae_lora.records import factors
from sae_lora.records.damage import damage
from sae_lora.records.folder import RunFolder, in_full
from sae_lora.records.status import is_done
from sae_lora.saes.from_run import begun, check_goes_on
from sae_lora.saes.layer_groups import Distances, LayerGroups, groups
from sae_lora.saes.metadata import Notices, differences, stated_by
from sae_lora.saes.resolve import Resolution, resolve


@dataclass(frozen=True)
class Run:
    """A complete config, and its run folder."""

    config: Config
    folder: RunFolder
    request: Config
    """The point as it was asked for."""
    groups: LayerGroups | None = None
    """Groups of blocks that share an SAE, if the run has such groups."""

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.path.name

    def freeze(self) -> None:
        """Write the resolved config into the folder, and move the files of a failed attempt aside.

        Raises:
            UserError: If the folder cannot be written.
        """
        self.folder.write_config(OmegaConf.to_yaml(as_dict(self.config)))
        if self.groups is not None:
            write_atomically(self.folder.groups, as_json(asdict(self.groups)))
        self.folder.clear_failure()


Pack = list[Run]
"""Runs that train together."""


@dataclass(frozen=True)
class Plan:
    """The runs of one command, each once."""

    runs: list[Run]
    notes: list[str]
    """Messages for the user, such as a nearest SAE that is used, or a point that is named twice."""
    waiting: list[Config]
    """Points that begin with the result of an unfinished run of this plan. They are planned after it."""


def plan(points: Sequence[Config]) -> Plan:
    """Plan the run of each point.

    Raises:
        ConfigError: For a point that cannot work.
        UserError: If the config of a model cannot be read, or no point has an SAE.
    """
    # `init` is a folder, or a method: the run of this command with that method, which is planned first.
    planner = _Planner(strict=len(points) == 1 or any(point.launcher.strict for point in points))
    waiting: list[Config] = []
    for point in points:
        if point.init not in Method.__members__:
            planner.add(point)
    for point in _in_order([point for point in points if point.init in Method.__members__]):
        if any(_is_named(earlier, point) for earlier in waiting):
            waiting.append(point)
            continue
        source = planner.init_run(point)
        if is_done(source.folder):
            planner.add(replace(point, init=str(source.folder.path)))
        else:
            planner.check_waiting(point, source)
            waiting.append(point)
    if not planner.runs:
        raise UserError("\n  ".join(["no point of this sweep has an SAE", *planner.notes[:5]]))
    return Plan(_named(list(planner.runs.values())), planner.all_notes, waiting)


def _named(runs: list[Run]) -> list[Run]:
    """The runs with names for W&B in which what varies comes first: `rank=4 lr=0.001 tiny-l3-…`."""
    values = [factors.values_of(as_dict(run.config), {}) for run in runs]
    labels = factors.labels(factors.differences(values), len(runs))
    named = []
    for run, label in zip(runs, labels, strict=True):
        tracking = run.config.tracking
        name = f"{label} {tracking.name or readable_name(run.config)}" if label else tracking.name
        named.append(replace(run, config=replace(run.config, tracking=replace(tracking, name=name))))
    return named


def _in_order(points: Sequence[Config]) -> Iterator[Config]:
    """Points whose `init` names a method, each after the points whose results it begins with."""
    waiting = list(points)
    while waiting:
        ready = [point for point in waiting if not any(_is_named(named, point) for named in waiting)]
        ready = ready or waiting  # a cycle, which `init_run` refuses
        yield from ready
        waiting = [point for point in waiting if not any(point is planned for planned in ready)]


def _is_named(point: Config, by: Config) -> bool:
    """True if `init` of `by` is the method of `point`, and model, layer and seeds are equal."""
    return (
        point is not by
        and point.method.kind.name == by.init
        and _model_layer_seeds(point) == _model_layer_seeds(by)
    )


def _model_layer_seeds(config: Config) -> tuple[Any, ...]:
    model = config.model.name, config.model.revision
    return model, config.layer, config.train.seed, config.data.seed


_MAX_NAMED = 3
"""If more runs than this are repeated, one note gives only their number."""


class _Planner:
    """A plan under construction. A point without an SAE is dropped; if `strict`, it is an error."""

    def __init__(self, *, strict: bool) -> None:
        self.runs: dict[Path, Run] = {}
        self.notes: list[str] = []
        self._strict = strict
        self._noticed = Notices()
        self._stated: dict[tuple[str | None, ...], dict[str, Any]] = {}
        self._sizes: dict[tuple[str, str | None], Dimensions] = {}
        self._distances: dict[str, Distances] = {}
        self._planned: list[tuple[Config, Path]] = []
        """Points, and the folders of their runs."""

    @property
    def all_notes(self) -> list[str]:
        """Messages for the user, also about SAEs and about points that mean the same run."""
        notes = [*self.notes, *self._noticed.lines]
        times = Counter(path for _, path in self._planned)
        repeated = {path: number for path, number in times.items() if number > 1}
        if len(repeated) > _MAX_NAMED:
            number = sum(repeated.values()) - len(repeated)
            return [*notes, f"{number} points are duplicates of other points and run only once"]
        return notes + [
            f"{path.name} is named {'twice' if number == 2 else f'{number} times'} and runs only once"
            for path, number in repeated.items()
        ]

    def add(self, point: Config) -> None:
        """Add the run of a point."""
        request = point
        if point.init is not None:  # perhaps outputs/<sweep>/<hash>
            point = replace(point, init=str(in_full(Path(point.init).expanduser())))
        dimensions = self._dimensions(point)
        point = self._fitted(point, dimensions)
        try:
            if point.init is not None:
                point = begun(point, dimensions)
                self._note_other_text(point)
            shared = groups(point, dimensions, self._distances)
            resolution = (
                Resolution(point.sae.used, [])
                if point.sae.used
                else resolve(point, dimensions, shared and shared.groups)
            )
        except NoSuchCellError as error:
            if self._strict:
                raise
            self.notes.append(
                f"dropped: {_requested_cell(point)}, since {error.field} may be {error.allowed}"
            )
            return
        lora = replace(
            point.lora,
            alpha=canonical_alpha(point.lora),
            blocks=canonical_blocks(point.lora.blocks),
            selection=selection_version(dimensions.model_type),
        )
        config = replace(point, sae=replace(point.sae, used=resolution.choices), lora=lora)
        _check_fits(config, resolution.choices, dimensions)
        if config.data.source is TextSource.text_files:
            files_matching(as_list(config.data.files))
        elif config.data.source is TextSource.hub:
            check_hub_name(config.data.name or "")
        if config.evaluation.steering_texts is not None:  # read only after training
            texts = Path(config.evaluation.steering_texts).expanduser()
            check_readable(texts, "evaluation.steering_texts")
        self.notes += [note for note in resolution.notes if note not in self.notes]
        for choice in resolution.choices:
            key = choice.release, choice.id, choice.path
            if key not in self._stated:
                self._stated[key] = stated_by(choice)
            self._noticed.add(choice.block, differences(self._stated[key], config))
        path = Path(config.output_dir).expanduser() / config.sweep / folder_name(config)
        self._planned.append((request, path))
        folder = RunFolder(path)
        self.runs.setdefault(path, Run(_pinned_to_start(config, folder), folder, request, shared))

    def init_run(self, point: Config) -> Run:
        """The only run of this plan that the `init` of a point names by its method."""
        paths = {path for planned, path in self._planned if _is_named(planned, point)}
        if len(paths) != 1:
            number = len(paths) or "no"
            because = (
                f"{number} runs of this command have method={point.init}, this model, layer and seed"
            )
            allowed = (
                "the folder of a finished run, or the method of exactly one other run of this command"
            )
            raise ConfigError("init", point.init, allowed, because=because)
        return self.runs[paths.pop()]

    def check_waiting(self, point: Config, source: Run) -> None:
        """Check a point before it waits for the run `source`, perhaps for hours."""
        check_goes_on(point, source.config)
        dimensions = self._dimensions(point)
        _check_fits(self._fitted(point, dimensions), source.config.sae.used, dimensions)

    def _note_other_text(self, point: Config) -> None:
        """Note that `init` was trained on other text than the point reads, which may be a mistake."""
        assert point.init is not None
        folder = RunFolder(Path(point.init).expanduser())
        texts = load(folder.config.read_text()).data, point.data
        earlier, now = ((data.source, data.name, data.subset, data.files) for data in texts)
        if earlier != now:
            names = [data.name or data.files or data.source.name for data in texts]
            note = f"init: {folder.path.name} was trained on {names[0]}; this run reads {names[1]}"
            self.notes += [note] if note not in self.notes else []

    def _dimensions(self, point: Config) -> Dimensions:
        model = (point.model.name, point.model.revision)
        if model not in self._sizes:
            self._sizes[model] = read_dimensions(point.model)
            check_files(point.model)
        return self._sizes[model]

    def _fitted(self, point: Config, model: Dimensions) -> Config:
        """The point with sequences that the model supports, if `model.fit_context` asks for that."""
        length, longest = point.data.context_length, model.max_context
        if not point.model.fit_context or longest is None or length <= longest:
            return point
        note = f"data.context_length={longest} instead of {length}: the longest of {point.model.name}"
        self.notes += [note] if note not in self.notes else []
        return replace(point, data=replace(point.data, context_length=longest))


def _requested_cell(point: Config) -> str:
    """The requested cell of the grid, as keys and values."""
    parts = {
        "layer.index": point.layer.index,
        "layer.every": point.layer.every,
        "layer.first": point.layer.first,
        "layer.hook": point.layer.hook and point.layer.hook.name,
        "sae.width": point.sae.width,
        "sae.l0": point.sae.l0 and f"{point.sae.l0:g}",
    }
    return " ".join(f"{name}={value}" for name, value in parts.items() if value is not None)


def _pinned_to_start(config: Config, folder: RunFolder) -> Config:
    """The config; if the run has a checkpoint, with the model, SAEs and text that it started with."""
    if folder.is_finished or not folder.checkpoints.exists() or damage(folder) is not None:
        return config
    started = load(folder.config.read_text())
    return pinned(config, started.model.commit, started.sae.used, started.data.version)


def pinned(config: Config, commit: str | None, used: list[SAEChoice], version: str | None) -> Config:
    """The config with a commit of the model, SAEs and a version of the text."""
    return replace(
        config,
        model=replace(config.model, commit=commit),
        sae=replace(config.sae, used=used),
        data=replace(config.data, version=version),
    )


def unpinned(config: Config) -> Config:
    """The config without commits and without a version of the text."""
    return pinned(config, None, [replace(choice, commit=None) for choice in config.sae.used], None)


def _check_fits(config: Config, used: Sequence[SAEChoice], model: Dimensions) -> None:
    """Refuse blocks that the model does not have, and sequences that are too long for it."""
    if config.method.kind in ADAPTING:
        first = min(choice.block for choice in used)
        adapted_blocks(canonical_blocks(config.lora.blocks), first, model.n_blocks)
    longest = model.max_context
    if longest is not None and config.data.context_length > longest:
        raise ConfigError(
            "data.context_length",
            config.data.context_length,
            f"at most {longest}, the longest sequence that {config.model.name} supports",
            nearest=longest,
        )
