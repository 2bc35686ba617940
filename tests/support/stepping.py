"""Single steps of every method on small models, with special tokens and micro-batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from sae_lens import StandardSAE
from torch import Tensor
from torch.nn.functional import log_softmax

from sae_lora.config.enums import Hook, Method, SAEFamily
from sae_lora.config.schema import (
    Config,
    DataConfig,
    LoRAConfig,
    MethodConfig,
    ModelConfig,
    SAEConfig,
    TrainConfig,
)
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.training import training_sae
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.hooks import Coder, Splice, spliced
from sae_lora.splice.positions import NOT_SPECIAL, Special
from sae_lora.train import methods
from sae_lora.train.methods import Artifact
from sae_lora.train.train_state import TrainState
from tests.support.families import random_tokens
from tests.support.learners import in_training
from tests.support.trainings import CONFIG, pack

TOKENS = random_tokens(batch=4, length=16, seed=21)
SPECIAL = Special(tuple(range(6)))
"""Tokens that occur in `TOKENS`, with different counts per sequence."""
STEPS = 6


class BuiltTraining(NamedTuple):
    """A training as a run builds it."""

    training: TrainState
    artifacts: list[Artifact]
    """Its results on disk."""

    @property
    def artifact(self) -> Artifact:
        """The only result."""
        (artifact,) = self.artifacts
        return artifact

    @property
    def weights(self) -> dict[str, Tensor]:
        """A copy of the present trained weights."""
        return {name: weight.detach().clone() for name, weight in self.training.student.weights.items()}


def build_training(
    model: LanguageModel,
    kind: Method,
    *saes: Coder,
    train: TrainConfig = CONFIG,
    lora: LoRAConfig | None = None,
    block: int = 1,
    special: Special = NOT_SPECIAL,
    hook: Hook = Hook.resid_post,
    steps: int = STEPS,
    **method: Any,
) -> BuiltTraining:
    """A training by this method, from the config's seed, with the SAEs at `block`, `block` + 1, …"""
    is_new = isinstance(saes[0], SplicedSAE)
    config = Config(
        model=ModelConfig(name="small"),
        sae=SAEConfig(family=SAEFamily.new if is_new else SAEFamily.disk),
        method=MethodConfig(kind=kind, **method),
        lora=lora or LoRAConfig(rank=2),
        data=DataConfig(context_length=TOKENS.shape[1]),
        train=train,
    )
    torch.manual_seed(train.seed)
    splices = tuple(Splice(block + offset, sae, hook, special) for offset, sae in enumerate(saes))
    return BuiltTraining(*methods.build(config, model, splices, steps))


def spliced_sae(
    architecture: str, *, scale: float = 1.0, dead_after: int = 100, **changes: Any
) -> SplicedSAE:
    """An SAE in training without zero weights, as methods build it for a new SAE."""
    sae = SplicedSAE(in_training(architecture, **changes), dead_after)
    sae.scale.fill_(scale)
    return sae


def frozen_standard(seed: int = 3) -> StandardSAE:
    """A frozen SAE with ReLU latents."""
    sae = training_sae.inference(in_training("standard", seed))
    assert isinstance(sae, StandardSAE)
    return sae


def step(
    model: LanguageModel,
    *trainings: TrainState,
    tokens: Tensor = TOKENS,
    micro_batch: int | None = None,
) -> None:
    """Take one step of each training."""
    trainer = pack(model, *trainings, micro_batch=micro_batch)
    trainer._take_step(trainings, tokens)


def gradients(model: LanguageModel, training: TrainState, **options: Any) -> dict[str, Tensor]:
    """The gradients that the optimiser gets in one step; the step changes no weights."""
    result: dict[str, Tensor] = {}
    weights = training.student.weights.items()
    training._optimizer.step = lambda: result.update(
        {name: weight.grad.clone() for name, weight in weights}
    )
    step(model, training, **options)
    return result


def whole_kl(
    model: LanguageModel,
    student: LanguageModel,
    saes: Sequence[Splice],
    tokens: Tensor = TOKENS,
) -> Tensor:
    """KL(teacher ‖ student) of whole logits, mean over tokens, from one plain pass of each model."""
    with torch.no_grad():
        teacher = log_softmax(model.model(tokens, use_cache=False).logits, -1)
    with spliced(student, saes, tokens):
        learner = log_softmax(student.model(tokens, use_cache=False).logits, -1)
    return (teacher.exp() * (teacher - learner)).sum(-1).mean()
