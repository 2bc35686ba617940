"""Language models and tokenizers, loaded through transformers."""

import warnings

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


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        UserError: Where it cannot be found or fetched.
    """
    with hub.explained("model.name", config.name):
        return AutoTokenizer.from_pretrained(
            source(config), revision=config.pinned_revision, trust_remote_code=False
        )


def fetch_model(config: ModelConfig) -> str | None:
    """Downloads all of the model that a run reads; its weights are not held in memory.

    Returns:
        The commit that was fetched; `None` for a model that is not from the hub.

    Raises:
        UserError: Where it cannot be found or fetched.
    """
    with hub.explained("model.name", config.name):
        AutoModelForCausalLM.from_pretrained(
            source(config),
            revision=config.pinned_revision,
            device_map="meta",
            trust_remote_code=False,
        )
    return config.commit or hub.cached_commit(config.name, config.revision)


def load_shapes(config: ModelConfig) -> "LanguageModel":
    """The model without its weights (on torch's meta device): what can be counted before loading.

    Raises:
        UserError: Where its config cannot be found or fetched.
    """
    with hub.explained("model.name", config.name), torch.device("meta"):
        found = AutoConfig.from_pretrained(
            source(config), revision=config.pinned_revision, trust_remote_code=False
        )
        return LanguageModel(AutoModelForCausalLM.from_config(found, trust_remote_code=False))


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of a config's dtype."""
    return {DType.float32: torch.float32, DType.bfloat16: torch.bfloat16}[dtype]


def load_model(config: ModelConfig, compute: DType, device: torch.device) -> "LanguageModel":
    """The frozen model on the device, in evaluation mode.

    Args:
        config: Which model, and the precision its weights are rounded to.
        compute: Precision the weights are then held in and computed with.
        device: Where.

    Raises:
        UserError: Where it cannot be found, fetched or used.
    """
    with hub.explained("model.name", config.name):
        model = AutoModelForCausalLM.from_pretrained(
            source(config),
            revision=config.pinned_revision,
            dtype=torch_dtype(config.dtype),
            trust_remote_code=False,
        )
    # The weights alone: rotary frequencies are buffers that must stay float32, or positions blur.
    for weight in model.parameters():
        weight.data = weight.data.to(torch_dtype(compute))
    model = model.to(device)  # pyright: ignore[reportArgumentType]
    choose_attention(model, config.attention, device)
    found = LanguageModel(model)
    found.check_parts()
    return found


def choose_attention(model: PreTrainedModel, wanted: Attention, device: torch.device) -> None:
    """Sets how the model's attention is computed.

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


def quieten() -> None:
    """Keeps transformers from saying what nobody has asked."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def device_of(config: Config) -> torch.device:
    """Where a run computes; sets what torch is to do there.

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
