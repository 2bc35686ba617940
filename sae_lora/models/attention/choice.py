"""The choice of the implementation of a model's attention."""

from contextlib import suppress
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_lora.common.errors import ConfigError, UserError, is_out_of_memory
from sae_lora.config.enums import Attention
from sae_lora.models import config_faults
from sae_lora.models.attention import blockwise, fused
from sae_lora.models.dimensions import short_cause
from sae_lora.models.part_check import agree


def check_attention(attention: Attention, device: torch.device | None = None) -> None:
    """Refuse an implementation that no model can use here.

    Args:
        attention: The implementation.
        device: The device of the runs; `None` if it is not known yet.

    Raises:
        ConfigError: If its package is not installed, or it does not run on the device.
    """
    on_cpu = device is not None and device.type == "cpu"
    if attention is Attention.flex_attention and on_cpu:
        because = "its backward pass does not run on a CPU"
        raise ConfigError("model.attention", attention.name, "another one on a CPU", "sdpa", because)
    if attention is Attention.fused and on_cpu:
        because = "its kernels are for GPUs"
        raise ConfigError("model.attention", attention.name, "another one on a CPU", "auto", because)
    installed = find_spec("flash_attn") or find_spec("kernels")
    if attention is Attention.flash_attention_2 and not installed:
        because = "the package flash_attn is not installed"
        raise ConfigError("model.attention", attention.name, "an installed one", "auto", because)


def choose_attention(model: PreTrainedModel, attention: Attention, device: torch.device) -> None:
    """Set the attention implementation of the model.

    `auto` is the fused one on a GPU if it computes what the model asks for, blockwise for soft-capped
    scores on a CPU, and else transformers' choice. With `train.deterministic`, a GPU is as a CPU.

    Raises:
        ConfigError: If this model or this machine does not support it, or the model computes something
            else with it: an implementation ignores what it does not know, such as attention sinks.
        UserError: The same, for an implementation that `auto` takes.
    """
    blockwise.register()
    fused.register()
    if attention is Attention.auto:
        _choose_automatically(model, device)
        return
    check_attention(attention, device)
    try:
        _set(model, attention)
    except _UnfitError as error:
        allowed = f"an implementation that {type(model).__name__} supports on this machine"
        raise ConfigError("model.attention", attention.name, allowed, "auto", str(error)) from error


def _choose_automatically(model: PreTrainedModel, device: torch.device) -> None:
    if device.type == "cuda" and not torch.are_deterministic_algorithms_enabled():
        with suppress(_UnfitError):  # the usual attention stays
            _set(model, Attention.fused)
        return
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is None:
        return
    try:
        _set(model, Attention.blockwise)
    except _UnfitError as error:
        raise UserError(
            f"{type(model).__name__} is not supported with the attention blockwise, which "
            f"model.attention=auto takes for soft-capped scores on a CPU: {error}"
        ) from error


class _UnfitError(Exception):
    """An implementation does not fit the model or the machine."""


def _set(model: PreTrainedModel, attention: Attention) -> None:
    """Set an implementation.

    Raises:
        _UnfitError: If it does not fit; the model then has the implementation that it had.
    """
    usual = model.config._attn_implementation
    assert usual is not None
    expected = _probe_logits(model)
    try:
        if attention is Attention.fused:
            _use(model, fused.CHECKED)
            _probe_logits(model)
        _use(model, attention.name)
        if not agree(_probe_logits(model), expected, 1e-3):
            raise _UnfitError("the model's logits with it differ from those with its usual attention")
    except Exception as error:  # an implementation may come from any library, with errors of its own
        if is_out_of_memory(error):
            raise
        model.set_attn_implementation(usual)
        if isinstance(error, _UnfitError):
            raise
        raise _UnfitError(short_cause(error)) from error


def _use(model: PreTrainedModel, name: str) -> None:
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise _UnfitError(f"{type(model).__name__} has only its own attention")


@torch.no_grad()
def _probe_logits(model: PreTrainedModel) -> Tensor:
    if model.device.type == "meta":
        config_faults.run(model)
        return torch.zeros(1)  # shapes have no numbers to compare
    tokens = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    return model(input_ids=tokens, use_cache=False).logits
