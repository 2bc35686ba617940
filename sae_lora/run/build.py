"""What the processes that train a pack have in common: device, SAEs, and the pack itself."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sae_lora.config.enums import Method
from sae_lora.config.identity import step_tokens, train_steps
from sae_lora.config.schema import Config
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.training.activation_buffer import ActivationBuffer
from sae_lora.splice.head import Comparison, Head
from sae_lora.splice.kl import kl_of
from sae_lora.train.distill import Pack
from sae_lora.train.distributed import Workers
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.reconstruct import SAEPack, sources_of
from sae_lora.train.train_state import Training


def assemble(
    config: Config,
    model: LanguageModel,
    trainings: Iterable[Training[Any]],
    special_ids: Tensor,
    validation_tokens: Tensor,
    workers: Workers,
    own: Callable[[Training[Any]], AbstractContextManager[None]] = lambda training: nullcontext(),
) -> Pack | SAEPack:
    """The pack of these trainings, as one of its processes has it.

    Args:
        config: Of any of its runs.
        model: The plain model of them all.
        trainings: Of students of this model.
        special_ids: Ids `[n]` whose positions some SAEs leave as they are.
        validation_tokens: Held-out tokens `[sequence, pos]`.
        workers: The processes.
        own: As `Pack` takes it.
    """
    comparison = Comparison(Head.of(model), config.train.kl_chunk_tokens)
    evaluate = Evaluator(
        model,
        validation_tokens,
        special_ids,
        max(1, config.train.eval_batch_tokens // config.data.context_length),
        comparison,
        1e9 * config.train.eval_cache_gb,
        workers,
    )
    if config.method.kind is Method.sae:
        return _reconstructing(config, model, trainings, special_ids, evaluate, own)
    return Pack(
        model,
        trainings,
        evaluate,
        special_ids,
        kl_of(comparison, config.train.kl),
        config.train.micro_batch_size,
        own,
        workers,
    )


def _reconstructing(
    config: Config,
    model: LanguageModel,
    trainings: Iterable[Training[Any]],
    special_ids: Tensor,
    evaluate: Evaluator,
    own: Callable[[Training[Any]], AbstractContextManager[None]],
) -> SAEPack:
    """The pack of SAEs that learn to reconstruct."""
    trainings = list(trainings)
    students = [training.student for training in trainings]
    buffer = ActivationBuffer(
        model,
        {name: one.hookpoints for student in students for name, one in sources_of(student).items()},
        special_ids if students[0].splices[0].keeps else None,
        config.data.seed,
        max(1, min(train_steps(config), config.method.buffer_tokens // step_tokens(config))),
    )
    batch = torch.Size([config.train.batch_size, config.data.context_length])
    return SAEPack(buffer, batch, model.device, trainings, evaluate, own)
