"""Train SAEs with sae-lens's trainer on activations of a Hugging Face model.

Several SAEs, of any block, width and k, are trained together on the same forward passes.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.training.mixing_buffer import multi_hook_concat_split_iter
from sae_lens.training.multi_sae_trainer import MultiSAETrainer
from torch import Tensor

from sae_lora.models.hookpoints import resid_post
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.training.activation_buffer import activations
from sae_lora.splice.mlp_input import Stream
from sae_lora.splice.positions import Special


class TopKRequest(NamedTuple):
    """One TopK SAE to train.

    Args:
        block: Block whose output the SAE reconstructs.
        width: Number of latents.
        k: Number of active latents per token.
    """

    block: int
    width: int
    k: int


class SAEBudget(NamedTuple):
    """Length and speed of the SAEs' training.

    Args:
        tokens: Training tokens of each SAE.
        batch_tokens: Tokens per step.
        buffer_tokens: Number of tokens whose activations are buffered and shuffled.
        lr: Learning rate of Adam. It falls linearly to zero over the last third.
    """

    tokens: int = 1_000_000
    batch_tokens: int = 2_048
    buffer_tokens: int = 65_536
    lr: float = 2e-3


def train_topk(
    requests: Mapping[str, TopKRequest],
    model: LanguageModel,
    batches: Iterable[Tensor],
    budget: SAEBudget,
    *,
    metadata: Mapping[str, Any],
    special: Special,
) -> dict[str, TrainingSAE[Any]]:
    """Train SAEs together. Initial values and shuffling use torch's global random state.

    Args:
        requests: The SAEs, by name.
        model: The model whose activations they reconstruct.
        batches: Tokens `[batch, pos]`, enough for the budget and the buffer.
        budget: Length and speed of training.
        metadata: Facts about model and data for the config of each SAE.
        special: Positions that SAEs are not trained on.
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
                    exclude_special_tokens=True,
                    **metadata,
                ),
            )
        )
        for name, request in requests.items()
    }
    distinct = sorted(set(hookpoints.values()))
    steps = budget.tokens // budget.batch_tokens
    trainer = MultiSAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * budget.batch_tokens,
            train_batch_size_samples=budget.batch_tokens,
            lr=budget.lr,
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
            budget.buffer_tokens,
            budget.batch_tokens,
            activations(model, map(Stream, distinct), batches, special),
            distinct,
        ),
    )
    return trainer.fit()
