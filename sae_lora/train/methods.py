"""What each method trains: from a run's config to its student, and to what is kept of it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sae_lora.config.enums import Method, SAEFamily, Schedule
from sae_lora.config.identity import dead_after_steps, step_tokens
from sae_lora.config.schema import Config, SAEChoice, SAEConfig
from sae_lora.models import adapter_files
from sae_lora.models.dimensions import source
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes import output_adapter
from sae_lora.saes.loading import LoadedSAE, describe, keeps_special_tokens
from sae_lora.saes.output_adapter import AdaptedCoder, OutputAdapter
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.activation_buffer import activations
from sae_lora.saes.training.sae_trainer import SteppedSAETrainer
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.hooks import Coder
from sae_lora.splice.student import LoRAStudent, Student
from sae_lora.splice.trunk import Splices
from sae_lora.train.optim import GradientState, MeZOState
from sae_lora.train.reconstruct import ReconstructState, sources_of
from sae_lora.train.sae_optim import SAEGradientState
from sae_lora.train.train_state import TrainState


class Sample(NamedTuple):
    """Some of the text that a run is trained on.

    Args:
        tokens: `[batch, pos]`.
        special_ids: Ids `[n]` whose positions some SAEs leave as they are.
    """

    tokens: Tensor
    special_ids: Tensor


class Artifact(NamedTuple):
    """What is kept of a training.

    Args:
        name: Of the folder among those of a run.
        save: Writes it into such a folder, which is there and empty.
    """

    name: str
    save: Callable[[Path], None]


def build(
    config: Config, model: LanguageModel, splices: Splices, steps: int
) -> tuple[TrainState, Artifact]:
    """What a run trains, before its first step. Initial values come from torch's global random state.

    Args:
        config: Of the run.
        model: The plain model; it is not changed.
        splices: The SAEs, by block, as they were loaded, or as new ones are before training.
        steps: Number of steps in all.

    Raises:
        ConfigError: Where the method cannot train this model or these SAEs.
    """
    match config.method.kind:
        case Method.lora | Method.mezo:
            return _lora(config, model, splices, steps)
        case Method.linear_adapter | Method.mlp_adapter:
            return _output_adapters(config, model, splices, steps)
        case Method.sae_finetune | Method.e2e:
            return _through_the_model(config, model, splices, steps)
        case Method.sae:
            return _reconstructing(config, model, splices, steps)
        case _:
            raise NotImplementedError(config.method.kind)


def _lora(
    config: Config, model: LanguageModel, splices: Splices, steps: int
) -> tuple[TrainState, Artifact]:
    student = LoRAStudent(model, splices, config.lora)
    if config.lora.begun is not None:
        adapter_files.begin_with(student.adapters, Path(config.lora.begun.path))
    if config.method.kind is Method.mezo:
        training = MeZOState(student, config.train, steps, config.method.epsilon)
    else:
        training = GradientState(student, config.train, steps)
    base = source(config.model)
    return training, Artifact(
        "adapter", lambda folder: adapter_files.save(student.adapters, folder, base)
    )


def _output_adapters(
    config: Config, model: LanguageModel, splices: Splices, steps: int
) -> tuple[TrainState, Artifact]:
    d_model, device = model.config.hidden_size, model.device
    made = {
        splice.hookpoint: OutputAdapter(config.method.kind, d_model, config.method.rank).to(device)
        for splice in splices
    }
    adapted = tuple(
        splice._replace(sae=AdaptedCoder(splice.sae, made[splice.hookpoint])) for splice in splices
    )
    student = _around(model, adapted, splices, made)

    def save(folder: Path) -> None:
        for hookpoint, adapter in made.items():
            (folder / hookpoint).mkdir()
            output_adapter.save(adapter, folder / hookpoint)

    return GradientState(student, config.train, steps), Artifact("output_adapter", save)


def _through_the_model(
    config: Config, model: LanguageModel, splices: Splices, steps: int
) -> tuple[TrainState, Artifact]:
    student, made = _training_saes(config, model, splices)
    mse = config.method.kind is Method.sae_finetune and config.method.mse
    return SAEGradientState(student, config.train, steps, mse=mse), _artifact(made)


def _reconstructing(
    config: Config, model: LanguageModel, splices: Splices, steps: int
) -> tuple[TrainState, Artifact]:
    student, made = _training_saes(config, model, splices)
    sources = sources_of(student)
    warm_up = round(config.train.warmup_share * steps)
    falls = config.train.schedule is Schedule.linear
    trainers = {}
    for name, (sae, _) in sources.items():
        trainers[name] = SteppedSAETrainer(
            sae.sae,
            steps=steps,
            batch_tokens=step_tokens(config),
            lr=config.train.lr,
            warm_up_steps=warm_up,
            decay_steps=steps - warm_up if falls else 0,
            dead_window_steps=dead_after_steps(config),
            sampling_window_steps=max(2, steps // 4),
        )
        trainers[name].begin(float(sae.scale))
    return ReconstructState(student, config.train, steps, trainers), _artifact(made)


def _training_saes(
    config: Config, model: LanguageModel, splices: Splices
) -> tuple[Student, dict[str, SplicedSAE]]:
    """A student of which SAEs are trained, and these by hookpoint; of several for one, by the first."""
    made: dict[str, SplicedSAE] = {}
    by_given: dict[int, SplicedSAE] = {}
    for splice in splices:
        if id(splice.sae) not in by_given:
            by_given[id(splice.sae)] = made[splice.hookpoint] = _in_training(config, splice.sae)
    own = tuple(splice._replace(sae=by_given[id(splice.sae)]) for splice in splices)
    is_new = config.sae.family is SAEFamily.new
    before = splices
    if is_new:
        frozen = {given: sae.frozen for given, sae in by_given.items()}
        before = tuple(splice._replace(sae=frozen[id(splice.sae)]) for splice in splices)
    return _around(model, own, before, made, is_new=is_new), made


def _artifact(saes: Mapping[str, SplicedSAE]) -> Artifact:
    def save(folder: Path) -> None:
        for hookpoint, sae in saes.items():
            sae.save(folder / hookpoint)

    return Artifact("sae", save)


def _in_training(config: Config, sae: Coder) -> SplicedSAE:
    if isinstance(sae, SplicedSAE):
        return sae
    rank = config.method.rank if config.method.kind is Method.sae_finetune else None
    copied = training_sae.trainable(sae, config.sae.sparsity_coefficient)
    return SplicedSAE(copied, dead_after_steps(config), rank)


def _around(
    model: LanguageModel,
    splices: Splices,
    before: Splices,
    modules: Mapping[str, nn.Module],
    *,
    is_new: bool = False,
) -> Student:
    """A student of which nothing is trained but modules in the place of its SAEs."""
    model.check_additions(splice.block for splice in splices if splice.place.is_inside)
    weights = {
        f"{name}/{own}": weight
        for name, module in modules.items()
        for own, weight in module.named_parameters()
        if weight.requires_grad
    }
    return Student(
        model.view(),
        splices,
        first=splices[0].place.begins,
        live=len(splices),
        weights=weights,
        before=before,
        modules=modules,
        is_new=is_new,
    )


def new_saes(config: Config, model: LanguageModel, sample: Sample) -> list[LoadedSAE]:
    """The new SAEs of a run, untrained. Initial values come from torch's global random state.

    Args:
        config: Of the run.
        model: The plain model.
        sample: They will read residuals at the mean length of those there.
    """
    about = {
        "model_name": config.model.name,
        "dataset_path": config.data.name or config.data.source.name,
        "context_size": config.data.context_length,
    }
    tokens, special_ids = (part.to(model.device) for part in sample)
    keeps = keeps_special_tokens(config.sae, [])
    hookpoints = [str(Place.of(choice)) for choice in config.sae.used]
    read = next(activations(model, hookpoints, [tokens], special_ids if keeps else None))
    found: list[LoadedSAE] = []
    shared: dict[int, SplicedSAE] = {}
    for choice in config.sae.used:
        one = untrained(config.sae, choice, model.config.hidden_size, model.device, about)
        group = choice.group or [choice.block]
        if group[0] not in shared:
            sae = SplicedSAE(one.sae, dead_after_steps(config))  # pyright: ignore[reportArgumentType]
            sae.fit_scale(torch.cat([read[str(Place(block, choice.hook))] for block in group]))
            shared[group[0]] = sae
        found.append(replace(one, sae=shared[group[0]]))
    return found


def untrained(
    config: SAEConfig, choice: SAEChoice, d_model: int, device: torch.device, metadata: dict[str, Any]
) -> LoadedSAE:
    """A new SAE in sae-lens's training class. Values come from torch's global random state.

    Args:
        config: What it is to be.
        choice: Where, how wide and how sparse.
        d_model: Width of what it reads.
        device: Where it is to be.
        metadata: What its own config is to say of model and data.
    """
    request = training_sae.SAERequest(
        str(Place.of(choice)),
        config.architecture,
        d_model,
        choice.width or 0,
        choice.l0,
        config.sparsity_coefficient,
    )
    keeps = keeps_special_tokens(config, [])
    shared = {"group_blocks": choice.group} if choice.group else {}
    sae = training_sae.new(request, device, metadata | {"exclude_special_tokens": keeps} | shared)
    return LoadedSAE(
        hookpoint=str(Place.of(choice)),
        sae=sae,
        description=describe(config, choice, config.architecture.name, choice.width) | {"sha256": None},
        excludes_special_tokens=keeps,
    )
