"""The methods: from a run's config to the training of its student, and to its result on disk."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_lora.config.enums import Method, SAEFamily
from sae_lora.config.identity import dead_after_steps
from sae_lora.config.schema import Config
from sae_lora.models import adapter_files, lora
from sae_lora.models.dimensions import source
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes import output_adapter
from sae_lora.saes.loading import LoadedSAE, describe, special_of
from sae_lora.saes.metadata import EXCLUDES_FIRST
from sae_lora.saes.output_adapter import AdaptedCoder, OutputAdapter
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.activation_buffer import activations
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.hooks import Coder
from sae_lora.splice.mlp_input import Stream
from sae_lora.splice.student import LoRAStudent, Student, named_weights
from sae_lora.splice.trunk import Splices
from sae_lora.train.optim import GradientState, MeZOState, SAEGradientState
from sae_lora.train.reconstruct import ReconstructState
from sae_lora.train.train_state import TrainState


class Artifact(NamedTuple):
    """The result of a training on disk."""

    name: str
    """Name of its folder in the run folder."""
    save: Callable[[Path], None]
    """Writes its files into an empty folder."""


Built = tuple[TrainState, list[Artifact]]
"""A training before its first step, and its results on disk."""


def build(config: Config, model: LanguageModel, splices: Splices, steps: int) -> Built:
    """The training of a run before its first step, and its results on disk.

    Initial values come from torch's global random state.

    Args:
        config, steps: The run, and its total number of steps.
        model: The plain model; it is not changed.
        splices: The SAEs in the order of their places: loaded SAEs, or new SAEs before training.

    Raises:
        ConfigError: If the method cannot train this model or these SAEs.
    """
    match config.method.kind:
        case Method.lora | Method.mezo | Method.lora_sae:
            return _lora(config, model, splices, steps)
        case Method.linear_adapter | Method.mlp_adapter:
            return _output_adapters(config, model, splices, steps)
        case Method.sae_finetune | Method.e2e | Method.sae:
            return _trained_saes(config, model, splices, steps)
        case _:
            raise NotImplementedError(config.method.kind)


def _lora(config: Config, model: LanguageModel, splices: Splices, steps: int) -> Built:
    method, trained = config.method, None
    if method.kind is Method.lora_sae:
        trained = _trainable(config, splices)
        in_training = _with(splices, trained.at_places)
        student = LoRAStudent(model, in_training, config.lora, splices, trained.by_hookpoint)
    else:
        student = LoRAStudent(model, splices, config.lora)
    if config.lora.begun is not None:
        adapter_files.begin_with(student.adapters, Path(config.lora.begun.path))
    if method.lora_lr == 0:
        lora.freeze(student.model)
        student.weights = named_weights(student.modules)
    base = source(config.model)
    adapter = Artifact("adapter", lambda folder: adapter_files.save(student.adapters, folder, base))
    if trained is not None:
        training = SAEGradientState(student, config.train, steps, mse=method.mse, lora_lr=method.lora_lr)
        return training, [adapter, trained.artifact]
    if method.kind is Method.mezo:
        return MeZOState(student, config.train, steps, method.epsilon), [adapter]
    return GradientState(student, config.train, steps), [adapter]


def _output_adapters(config: Config, model: LanguageModel, splices: Splices, steps: int) -> Built:
    d_model, device = model.config.hidden_size, model.device
    adapters = {
        splice.hookpoint: OutputAdapter(config.method.kind, d_model, config.method.rank).to(device)
        for splice in splices
    }
    coders = (AdaptedCoder(splice.sae, adapters[splice.hookpoint]) for splice in splices)
    adapted = _with(splices, coders)
    student = _student(model, adapted, splices, adapters)

    def save(folder: Path) -> None:
        for hookpoint, adapter in adapters.items():
            (folder / hookpoint).mkdir()
            output_adapter.save(adapter, folder / hookpoint)

    return GradientState(student, config.train, steps), [Artifact("output_adapter", save)]


class _Trainable(NamedTuple):
    """SAEs that a run trains."""

    at_places: list[SplicedSAE]
    """The SAEs in the order of their places; several blocks may share one."""
    by_hookpoint: dict[str, SplicedSAE]
    """The same SAEs; a shared one is listed under its first block."""

    @property
    def artifact(self) -> Artifact:
        def save(folder: Path) -> None:
            for hookpoint, sae in self.by_hookpoint.items():
                sae.save(folder / hookpoint)

        return Artifact("sae", save)


def _trainable(config: Config, splices: Splices) -> _Trainable:
    """The SAEs of the run, as modules that can be trained."""
    rank = config.method.rank if config.method.kind is Method.sae_finetune else None
    by_hookpoint: dict[str, SplicedSAE] = {}
    by_original: dict[int, SplicedSAE] = {}
    for splice in splices:
        sae = splice.sae
        if id(sae) in by_original:
            continue
        if not isinstance(sae, SplicedSAE):
            copied = training_sae.trainable(sae, config.sae.sparsity_coefficient)
            sae = SplicedSAE(copied, dead_after_steps(config), rank)
        by_original[id(splice.sae)] = by_hookpoint[splice.hookpoint] = sae
    return _Trainable([by_original[id(splice.sae)] for splice in splices], by_hookpoint)


def _with(splices: Splices, saes: Iterable[Coder]) -> Splices:
    """The same places with other SAEs."""
    return tuple(splice._replace(sae=sae) for splice, sae in zip(splices, saes, strict=True))


def _trained_saes(config: Config, model: LanguageModel, splices: Splices, steps: int) -> Built:
    trained = _trainable(config, splices)
    untrained, is_new = splices, config.sae.family is SAEFamily.new
    if is_new:
        untrained = _with(splices, (sae.frozen for sae in trained.at_places))
    splices = _with(splices, trained.at_places)
    student = _student(model, splices, untrained, trained.by_hookpoint, is_new=is_new)
    if config.method.kind is Method.sae:
        training = ReconstructState(student, config, steps)
    else:
        mse = config.method.kind is Method.sae_finetune and config.method.mse
        training = SAEGradientState(student, config.train, steps, mse=mse)
    return training, [trained.artifact]


def _student(
    model: LanguageModel,
    splices: Splices,
    untrained: Splices,
    modules: Mapping[str, nn.Module],
    *,
    is_new: bool = False,
) -> Student:
    """A student that trains only modules at the places of its SAEs, and no weights of the model."""
    model.check_additions(splice.place for splice in splices if splice.place.is_inside)
    weights = named_weights(modules)
    first = splices[0].place.begins
    return Student(model.view(), (), splices, first, weights, untrained, modules, is_new)


def new_saes(
    config: Config, model: LanguageModel, tokens: Tensor, special_ids: Sequence[int]
) -> list[LoadedSAE]:
    """The new SAEs of a run, untrained. Initial values come from torch's global random state.

    Args:
        config, model: The run, and the plain model.
        tokens: Text `[batch, pos]` that the scale of the SAEs' input is fitted on.
        special_ids: BOS and EOS.
    """
    special = special_of(config.sae, None, special_ids)
    metadata = {
        "model_name": config.model.name,
        "dataset_path": config.data.name or config.data.source.name,
        "context_size": config.data.context_length,
        "exclude_special_tokens": bool(special.ids),
        EXCLUDES_FIRST: special.first,
    }
    streams = [Stream(str(Place.of(choice)), choice.reads) for choice in config.sae.used]
    resids = next(activations(model, streams, [tokens], special))
    architecture = config.sae.architecture.name
    saes: list[LoadedSAE] = []
    shared: dict[int, SplicedSAE] = {}
    for choice in config.sae.used:
        sae = training_sae.new(config.sae, choice, model.config.hidden_size, model.device, metadata)
        group = choice.group or [choice.block]
        if group[0] not in shared:
            spliced = SplicedSAE(sae, dead_after_steps(config))
            spliced.fit_scale(torch.cat([resids[str(Place(block, choice.hook))] for block in group]))
            shared[group[0]] = spliced
        description = describe(config.sae, choice, architecture, choice.width)
        saes.append(LoadedSAE(shared[group[0]], description, bool(special.ids), special.first))
    return saes
