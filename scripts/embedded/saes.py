"""SAEs of our own, through sae-lens's trainer, on activations of a Hugging Face model.

Several SAEs train in lockstep on one pass of the model, whatever their blocks, widths and k.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

from sae_lora.models.hookpoints import resid_post
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.training.activation_buffer import activations


class TopKRequest(NamedTuple):
    """One TopK SAE to train.

    Args:
        block: Block whose output it reconstructs.
        width: Number of latents.
        k: Latents active per token.
    """

    block: int
    width: int
    k: int


def train_topk(
    requests: Mapping[str, TopKRequest],
    model: LanguageModel,
    batches: Iterable[Tensor],
    *,
    tokens: int,
    batch_tokens: int,
    buffer_tokens: int,
    lr: float,
    metadata: Mapping[str, Any],
    special_ids: Tensor | None = None,
) -> dict[str, TrainingSAE[Any]]:
    """Trains the SAEs together. Initial values and shuffling come from torch's global random state.

    Args:
        requests: What to train, by name.
        model: The model whose activations they learn.
        batches: Tokens `[batch, pos]`; must not end before `tokens` and the buffer are filled.
        tokens: Tokens each SAE is trained on.
        batch_tokens: Tokens per step.
        buffer_tokens: Tokens that activations are shuffled among.
        lr: Adam's learning rate, falling linearly to zero over the last third.
        metadata: What to record about model and data in each SAE's own config.
        special_ids: Ids `[n]` whose positions the SAEs never see; recorded in their configs.
    """
    hookpoints = {name: resid_post(request.block) for name, request in requests.items()}
    saes: dict[str, TrainingSAE[Any]] = {
        name: TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=model.config.hidden_size,
                d_sae=request.width,
                k=request.k,
                device=str(model.device),
                normalize_activations="expected_average_only_in",
                metadata=SAEMetadata(
                    hook_name=hookpoints[name],
                    exclude_special_tokens=special_ids is not None,
                    **metadata,
                ),
            )
        )
        for name, request in requests.items()
    }
    distinct = sorted(set(hookpoints.values()))
    steps = tokens // batch_tokens
    trainer = MultiSAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * batch_tokens,
            train_batch_size_samples=batch_tokens,
            lr=lr,
            lr_end=0.0,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 3,
            device=str(model.device),
            n_batches_for_norm_estimate=8,
            dead_feature_window=max(1, steps // 10),
            feature_sampling_window=max(2, steps // 4),
        ),
        saes,  # pyright: ignore[reportArgumentType]
        hookpoints,
        multi_hook_concat_split_iter(
            buffer_tokens, batch_tokens, activations(model, distinct, batches, special_ids), distinct
        ),
    )
    return trainer.fit()


def save(sae: TrainingSAE[Any], folder: Path, dtype: torch.dtype) -> None:
    """Writes the SAE for inference, in sae-lens's format."""
    sae.to("cpu", dtype).save_inference_model(folder)
