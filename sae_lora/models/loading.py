"""Loading of language models and tokenizers through transformers."""

import os
import warnings
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import logging as transformers_logging
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora.common import hub
from sae_lora.common.console import count
from sae_lora.common.errors import ConfigError, listed
from sae_lora.config.enums import Device, DType
from sae_lora.config.schema import Config, ModelConfig
from sae_lora.models import config_faults
from sae_lora.models.attention.choice import choose_attention
from sae_lora.models.dimensions import (
    config_values,
    reading,
    source,
    unstated_sizes,
    unusable,
)
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.model_folder import (
    check_tokenizer,
    check_weights,
    files_of_tokenizer,
    files_of_weights,
)
from sae_lora.models.part_check import check_parts


def _load(kind: Any, model: ModelConfig, part: str, **options: Any) -> Any:
    """`kind.from_pretrained` at the model's revision. Code in the repository is never run.

    `part` names what is read, for messages.
    """
    with reading(model, part):
        return kind.from_pretrained(
            source(model), revision=model.pinned_revision, trust_remote_code=False, **options
        )


def _load_config(config: ModelConfig) -> PreTrainedConfig:
    """The config of a causal language model.

    Raises:
        UserError: If it cannot be found or fetched, or transformers has no causal language model for it.
    """
    values = config_values(config)
    model_type = values["model_type"]
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in values:
            raise unusable(config, "it needs code from its repository, which is never run")
        version = f"transformers {transformers.__version__}"
        raise unusable(config, f"{version} does not know its architecture ({model_type})")
    with config_faults.explained(config, config_faults.parsed):
        loaded = AutoConfig.from_pretrained(
            source(config), revision=config.pinned_revision, trust_remote_code=False
        )
    if type(loaded) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise unusable(config, f"{model_type} is not a causal language model")
    return loaded


def _load_causal_lm(config: ModelConfig, **options: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model with the weights in its files, and the names of those that it does not use.

    Raises:
        UserError: If transformers would draw a weight at random, or load an adapter with the model.
    """
    check_weights(config)
    model_config = _load_config(config)
    options |= {"config": model_config, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = _load(AutoModelForCausalLM, config, files_of_weights(config), **options)
    if missing := sorted(report["missing_keys"]):
        because = f"its files lack {len(missing)} of its weights: {listed(missing, 3)}"
        if unstated := unstated_sizes(config):
            because += f"; config.json does not state {listed(unstated)}, so that a default is taken"
        raise unusable(config, because)
    for name, stored, expected in sorted(report["mismatched_keys"]):
        shapes = f"{list(stored)} in its files and {list(expected)} by its config"
        raise unusable(config, f"its weight {name} has the shape {shapes}")
    if getattr(model, "peft_config", None):
        raise unusable(config, "it comes with an adapter of peft; save it after merge_and_unload()")
    return model, sorted(report["unexpected_keys"])


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model.

    Raises:
        UserError: If it cannot be found or fetched.
    """
    check_tokenizer(config)
    files = files_of_tokenizer(config)
    tokenizer = _load(AutoTokenizer, config, files)
    with reading(config, files):
        tokenizer("a \u0416\u4e2d\U0001f642")  # some files can be read, and encode no text
    return tokenizer


def fetch_model(config: ModelConfig) -> str | None:
    """Download all files of the model that a run reads. Return their commit, if they are from the hub.

    Raises:
        UserError: If it cannot be found or fetched.
    """
    _checked_shapes(config, _load_config(config))
    _load_causal_lm(config, device_map="meta")
    return config.commit or hub.cached_commit(config.name, config.revision)


def load_shapes(config: ModelConfig) -> LanguageModel:
    """The model without weights (on torch's meta device), to count parameters before loading.

    Raises:
        UserError: If its config cannot be found or fetched.
    """
    return LanguageModel(_checked_shapes(config, _load_config(config)))


def _checked_shapes(config: ModelConfig, model_config: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights.

    Raises:
        UserError: If it cannot be built from its config, or its code cannot run with it.
    """

    def build_and_run(values: config_faults.Values) -> None:
        config_faults.run(config_faults.built(config_faults.parsed(values)))

    with config_faults.explained(config, build_and_run):
        model = config_faults.built(model_config)
        config_faults.run(model)
    return model


def load_model(
    config: ModelConfig, compute: DType, device: torch.device, divided_by: int = 1
) -> LanguageModel:
    """The frozen model on the device, in evaluation mode.

    Args:
        config: The model, and the precision to which its weights are rounded.
        compute: Precision of the weights in memory and of the computation.
        device: The device.
        divided_by: Number of processes that divide the weights of the blocks among them; all of them
            must call this.

    Raises:
        UserError: If it cannot be found, fetched or used.
    """
    model: Any
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype.name)}
    if (
        device.type != "cpu" and divided_by == 1
    ):  # weight by weight: the whole may not fit into main memory
        options["device_map"] = {"": device}
    model, unused = _load_causal_lm(config, **options)
    # Only weights: rotary frequencies are buffers and stay float32, or positions become inexact.
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, compute.name))
    if divided_by == 1:
        model = model.to(device)  # pyright: ignore[reportArgumentType]
    with config_faults.with_unusual_numbers(config):
        _check_finite(config, model)
    language_model = LanguageModel(model)
    if divided_by > 1:
        language_model.divide(device, divided_by)
    if unused:
        language_model.notes.append(
            f"the files of {config.name} hold {count(len(unused), 'weight')} that "
            f"{type(model).__name__} does not use with this config: {listed(unused, 3)}"
        )
    with config_faults.with_unusual_numbers(config):
        check_parts(language_model)
        choose_attention(model, config.attention, device)
    return language_model


def _check_finite(config: ModelConfig, model: PreTrainedModel) -> None:
    weights = model.state_dict()
    # Also buffers that are no part of the files: rotary frequencies come from numbers of the config.
    for name, weight in (weights | dict(model.named_buffers())).items():
        if not weight.is_floating_point():
            continue
        # The two extremes are NaN if one element is: no mask as large as the weight is needed.
        if weight.numel() and not torch.stack(torch.aminmax(weight)).isfinite().all():
            kind = "weight" if name in weights else "buffer"
            raise unusable(config, f"its {kind} {name} holds NaN or infinity")


def silence_transformers() -> None:
    """Silence transformers' progress bars and warnings."""
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def device_of(config: Config) -> torch.device:
    """The device of a run. On a GPU, also set the precision of float32 matrix products, and whether only
    deterministic algorithms are used.

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
    if config.train.deterministic:
        # Before the first product. Source: torch's notes on reproducibility.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.train.deterministic)
    return torch.device("cuda", torch.cuda.current_device())
