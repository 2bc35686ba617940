"""Language models and tokenizers, loaded through transformers."""

import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.common import hub
from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Attention, Device, DType
from sae_lora.config.schema import Config, ModelConfig
from sae_lora.models import blockwise_attention
from sae_lora.models.dimensions import source
from sae_lora.models.language_model import LanguageModel


def _load(kind: Any, config: ModelConfig, **options: Any) -> Any:
    """`kind.from_pretrained`, at the config's revision and without code of the repository."""
    with hub.explained("model.name", config.name):
        return kind.from_pretrained(
            source(config), revision=config.pinned_revision, trust_remote_code=False, **options
        )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        UserError: Where it cannot be found or fetched.
    """
    return _load(AutoTokenizer, config)


def fetch_model(config: ModelConfig) -> str | None:
    """Download all files of the model that a run reads; returns their commit, if from the hub.

    Raises:
        UserError: Where it cannot be found or fetched.
    """
    _load(AutoModelForCausalLM, config, device_map="meta")
    return config.commit or hub.cached_commit(config.name, config.revision)


def load_shapes(config: ModelConfig) -> LanguageModel:
    """The model without its weights (on torch's meta device), to count parameters before loading.

    Raises:
        UserError: Where its config cannot be found or fetched.
    """
    with torch.device("meta"):
        model_config = _load(AutoConfig, config)
        return LanguageModel(AutoModelForCausalLM.from_config(model_config, trust_remote_code=False))


def load_model(config: ModelConfig, compute: DType, device: torch.device) -> LanguageModel:
    """The frozen model on the device, in evaluation mode.

    Args:
        config: The model, and the precision to which its weights are rounded.
        compute: Precision in which the weights are then held and computed with.
        device: The device.

    Raises:
        UserError: Where it cannot be found, fetched or used.
    """
    model = _load(AutoModelForCausalLM, config, dtype=getattr(torch, config.dtype.name))
    # The weights alone: rotary frequencies are buffers that must stay float32, or positions blur.
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, compute.name))
    model = model.to(device)
    choose_attention(model, config.attention, device)
    language_model = LanguageModel(model)
    language_model.check_parts()
    return language_model


def choose_attention(model: PreTrainedModel, wanted: Attention, device: torch.device) -> None:
    """Set the way in which the model computes attention.

    Raises:
        ConfigError: Where this model or this machine does not have it.
    """
    soft_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if wanted is Attention.auto:
        if not (soft_capped and device.type == "cpu"):
            return
        wanted = Attention.blockwise
    blockwise_attention.register()
    try:
        model.set_attn_implementation(wanted.name)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            "model.attention",
            wanted.name,
            f"one that {type(model).__name__} has here",
            nearest="auto",
            because=str(error).splitlines()[0],
        ) from error


def silence_transformers() -> None:
    """Silence transformers' progress bars and warnings."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def device_of(config: Config) -> torch.device:
    """The device of a run; sets the precision of products there.

    Raises:
        ConfigError: Where a GPU is wanted and there is none.
    """
    wanted = config.train.device
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise ConfigError("train.device", "cuda", "auto or cpu: torch finds no GPU here", nearest="auto")
    if wanted is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    return torch.device("cuda", torch.cuda.current_device())
