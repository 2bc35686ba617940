"""Language models through transformers: their dimensions before loading, their blocks after."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from sae_lora import hub
from sae_lora.config import DType, ModelConfig
from sae_lora.embedded import MODEL as EMBEDDED_MODEL
from sae_lora.errors import ConfigError, UserError, nearest_name

EMBEDDED_NAME = "tiny"


@dataclass(frozen=True)
class Dimensions:
    """What is known of a model from its config alone, before its weights are loaded."""

    d_model: int
    n_blocks: int
    d_vocab: int
    max_context: int | None
    """Longest sequence the model was made for; `None` where its config does not say."""


def source(config: ModelConfig) -> str:
    """What transformers can load: the repository, or the folder of a local or embedded model."""
    return str(EMBEDDED_MODEL) if config.name == EMBEDDED_NAME else config.name


def read_dimensions(config: ModelConfig) -> Dimensions:
    """The model's dimensions, from its config file.

    Raises:
        UserError: Where the config cannot be found or fetched.
    """
    with hub.explained("model.name", config.name):
        text = AutoConfig.from_pretrained(
            source(config), revision=config.revision, trust_remote_code=False
        ).get_text_config()
    return Dimensions(
        d_model=text.hidden_size,
        n_blocks=text.num_hidden_layers,
        d_vocab=text.vocab_size,
        max_context=getattr(text, "max_position_embeddings", None),
    )


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        UserError: Where it cannot be found or fetched.
    """
    with hub.explained("model.name", config.name):
        return AutoTokenizer.from_pretrained(
            source(config), revision=config.commit or config.revision, trust_remote_code=False
        )


def fetch(config: ModelConfig) -> str | None:
    """Downloads all of the model that a run reads; its weights are not held in memory.

    Returns:
        The commit that was fetched; `None` for a model that is not from the hub.

    Raises:
        UserError: Where it cannot be found or fetched.
    """
    with hub.explained("model.name", config.name):
        AutoModelForCausalLM.from_pretrained(
            source(config),
            revision=config.commit or config.revision,
            device_map="meta",
            trust_remote_code=False,
        )
    return config.commit or hub.cached_commit(config.name, config.revision)


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
            revision=config.commit or config.revision,
            dtype=torch_dtype(config.dtype),
            trust_remote_code=False,
        )
    # The weights alone: rotary frequencies are buffers that must stay float32, or positions blur.
    for weight in model.parameters():
        weight.data = weight.data.to(torch_dtype(compute))
    return LanguageModel(model.to(device))  # pyright: ignore[reportArgumentType]


class LanguageModel:
    """A causal LM taken apart where this project needs it: backbone, blocks and head.

    Args:
        model: The transformers model. It is frozen and put in evaluation mode.

    Raises:
        UserError: For an architecture whose blocks or head cannot be told apart.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.requires_grad_(False).eval()
        self.config: Any = model.config.get_text_config()
        self.blocks = self._find_blocks()
        self._check_head()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads, `[batch, pos, d_model]`, for tokens `[batch, pos]`."""
        return self._backbone(input_ids=tokens, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits `[..., d_vocab]` of hidden states `[..., d_model]`.

        The model's own forward pass computes them, with its backbone swapped for the given states,
        so that soft-capping and scaling are whatever transformers says they are.
        """
        name = self.model.base_model_prefix
        backbone = self.model._modules[name]
        self.model._modules[name] = _Given(hidden.reshape(1, -1, hidden.shape[-1]))
        try:
            logits = self.model(input_ids=None, use_cache=False).logits
        finally:
            self.model._modules[name] = backbone
        return logits.reshape(*hidden.shape[:-1], -1)

    def module_at(self, hookpoint: str) -> nn.Module:
        """The module whose output the hookpoint names.

        Args:
            hookpoint: `blocks.{l}.hook_resid_post`, `blocks.{l}.hook_resid_pre` (the output of the
                block before), or a dotted module path.

        Raises:
            ConfigError: For a hookpoint that this model does not have; names near ones.
        """
        block = block_of(hookpoint)
        if block is not None:
            if 0 <= block < len(self.blocks):
                return self.blocks[block]
            last = len(self.blocks) - 1
            raise ConfigError(
                "layer.index", block, f"a block from 0 to {last}", nearest=max(0, min(block, last))
            )
        modules = dict(self.model.named_modules())
        if hookpoint in modules:
            return modules[hookpoint]
        raise ConfigError(
            "hookpoint",
            hookpoint,
            "blocks.{l}.hook_resid_post, or a module's dotted path",
            nearest_name(hookpoint, [resid_post(len(self.blocks) - 1), *modules]),
        )

    @property
    def _backbone(self) -> nn.Module:
        return getattr(self.model, self.model.base_model_prefix)

    def _find_blocks(self) -> nn.ModuleList:
        depth = self.config.num_hidden_layers
        for module in self.model.get_decoder().modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return module
        raise UserError(f"{type(self.model).__name__}: found no list of its {depth} blocks")

    def _check_head(self) -> None:
        probe = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        with torch.no_grad():
            whole = self.model(input_ids=probe, use_cache=False).logits
            parts = self.logits(self.hidden(probe))
        if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"{type(self.model).__name__}: its logits depend on more than its last hidden state"
            )


class _Given(nn.Module):
    """Stands in for a backbone: returns the hidden states it was given."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> "_GivenOutput":
        return _GivenOutput(last_hidden_state=self.hidden)  # pyright: ignore[reportArgumentType]


class _GivenOutput(BaseModelOutputWithPast):
    """A backbone's output with nothing but the hidden states in it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def resid_post(block: int) -> str:
    """The hookpoint of a block's output, in the field's words."""
    return f"blocks.{block}.hook_resid_post"


def block_of(hookpoint: str) -> int | None:
    """The block whose output a residual-stream hookpoint names; `None` for any other hookpoint.

    What block `l` reads is what block `l − 1` puts out.
    """
    if match := re.fullmatch(r"blocks\.(\d+)\.hook_resid_(post|pre)", hookpoint):
        return int(match[1]) - (match[2] == "pre")
    return None
