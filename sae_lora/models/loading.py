"""Loading of language models and tokenizers through transformers."""

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
    """`kind.from_pretrained` at the config's revision. Code in the repository is never run."""
    with hub.explained("model.name", config.name):
        return kind.from_pretrained(
            source(config), revision=config.pinned_revision, trust_remote_code=False, **options
        )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model.

    Raises:
        UserError: If it cannot be found or fetched.
    """
    return _load(AutoTokenizer, config)


def fetch_model(config: ModelConfig) -> str | None:
    """Download all files of the model that a run reads. Return their commit, if they are from the hub.

    Raises:
        UserError: If it cannot be found or fetched.
    """
    _load(AutoModelForCausalLM, config, device_map="meta")
    return config.commit or hub.cached_commit(config.name, config.revision)


def load_shapes(config: ModelConfig) -> LanguageModel:
    """The model without weights (on torch's meta device), to count parameters before loading.

    Raises:
        UserError: If its config cannot be found or fetched.
    """
    with torch.device("meta"):
        model_config = _load(AutoConfig, config)
        return LanguageModel(AutoModelForCausalLM.from_config(model_config, trust_remote_code=False))


def load_model(config: ModelConfig, compute: DType, device: torch.device) -> LanguageModel:
    """The frozen model on the device, in evaluation mode.

    Args:
        config: The model, and the precision to which its weights are rounded.
        compute: Precision of the weights in memory and of the computation.
        device: The device.

    Raises:
        UserError: If it cannot be found, fetched or used.
    """
    model = _load(AutoModelForCausalLM, config, dtype=getattr(torch, config.dtype.name))
    # Only weights: rotary frequencies are buffers and stay float32, or positions become inexact.
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, compute.name))
    model = model.to(device)
    choose_attention(model, config.attention, device)
    language_model = LanguageModel(model)
    language_model.check_parts()
    return language_model


def choose_attention(model: PreTrainedModel, attention: Attention, device: torch.device) -> None:
    """Set the attention implementation of the model.

    Raises:
        ConfigError: If this model or this machine does not support it.
    """
    soft_capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None
    if attention is Attention.auto:
        if not (soft_capped and device.type == "cpu"):
            return
        attention = Attention.blockwise
    blockwise_attention.register()
    try:
        model.set_attn_implementation(attention.name)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            "model.attention",
            attention.name,
            f"an implementation that {type(model).__name__} supports on this machine",
            nearest="auto",
            because=str(error).splitlines()[0],
        ) from error


def silence_transformers() -> None:
    """Silence transformers' progress bars and warnings."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def device_of(config: Config) -> torch.device:
    """The device of a run. On a GPU, also set the precision of float32 matrix products.

    Raises:
        ConfigError: If the config requires a GPU and there is none.
    """
    requested = config.train.device
    if requested is Device.cuda and not torch.cuda.is_available():
        raise ConfigError(
            "train.device", "cuda", "auto or cpu, because torch finds no GPU", nearest="auto"
        )
    if requested is Device.cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
    return torch.device("cuda", torch.cuda.current_device())
