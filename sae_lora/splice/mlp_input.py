"""The activations around an MLP that transcoders read."""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Reads
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel, observed
from sae_lora.models.stand_ins import first_argument

_NORMS = (
    *("pre_feedforward_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "ln_2"),
    *("layernorm_2", "norm_2", "final_layer_norm", "input_layernorm", "ln_1"),
)
"""Names in transformers of the norm before an MLP. The first that a block has counts: Gemma has its
`post_attention_layernorm` elsewhere, and a block with parallel attention may have one norm for both."""
_PLAIN: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()
"""For norms, copies that only normalise."""


class Stream(NamedTuple):
    """Activations that an SAE or a transcoder is trained on."""

    hookpoint: str
    """The activation that it replaces."""
    reads: Reads | None = None
    """The activation that a transcoder reads; `None` for an SAE."""

    def __str__(self) -> str:
        return self.hookpoint if self.reads is None else f"{self.hookpoint} from {self.reads.name}"

    def inputs(self, activations: Tensor) -> Tensor:
        """The part of the stream's activations that the SAE or the transcoder reads."""
        return activations if self.reads is None else activations.tensor_split(2, dim=-1)[0]


@contextmanager
def streamed(
    model: LanguageModel, streams: Collection[Stream], take: Callable[[Stream, Tensor], None]
) -> Iterator[None]:
    """Inside the `with` block, call `take` with each stream and its activations when the model runs.

    Activations are `[batch, pos, d_model]`; for a transcoder its input and its target side by side,
    `[batch, pos, 2 · d_model]`.
    """
    with ExitStack() as hooks:
        reads = {
            stream: hooks.enter_context(reading(model, _block(stream), stream.reads))
            for stream in streams
            if stream.reads is not None
        }

        def pair(stream: Stream, value: Tensor) -> None:
            take(stream, torch.cat([reads[stream](), value], -1) if stream in reads else value)

        modules = {stream: model.module_at(stream.hookpoint) for stream in streams}
        hooks.enter_context(observed(modules, pair))
        yield


def _block(stream: Stream) -> int:
    place = Place.named(stream.hookpoint)
    assert place is not None  # a transcoder is at an MLP
    return place.block


@contextmanager
def reading(model: LanguageModel, block: int, reads: Reads) -> Iterator[Callable[[], Tensor]]:
    """A function for the activation `[batch, pos, d_model]` that a block of the last forward pass had.

    Args:
        model: The model.
        block: The block.
        reads: The activation.

    Raises:
        ConfigError: If the block has no such activation.
    """
    module = module_read(model, block, reads)
    last: list[Tensor] = []

    def take(_: object, positional: tuple[Any, ...], named: dict[str, Any], __: object) -> None:
        value = first_argument(positional, named)
        last[:] = [without_gain(module, value) if reads is Reads.mlp_normalized else value]

    # A hook after the module, which activation checkpointing runs again.
    handle = module.register_forward_hook(take, with_kwargs=True)
    try:
        yield lambda: last[0]
    finally:
        handle.remove()


def module_read(model: LanguageModel, block: int, reads: Reads) -> nn.Module:
    """The module whose input contains the activation: the MLP of a block, or the norm before it.

    Raises:
        ConfigError: If the block has no such module.
    """
    return mlp_of(model, block) if reads is Reads.mlp_in else norm_before_mlp(model, block)


def code_of_reading(model: LanguageModel, block: int, reads: Reads) -> str:
    """Python code of the activation, from `x`, the input of `module_read`."""
    if reads is not Reads.mlp_normalized:
        return "x"
    norm = norm_before_mlp(model, block)
    eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
    if isinstance(norm, nn.LayerNorm):
        return f"torch.nn.functional.layer_norm(x, x.shape[-1:], eps={eps})"
    mean_square = "x.float().square().mean(-1, keepdim=True)"
    return f"(x.float() * torch.rsqrt({mean_square} + {eps})).to(x.dtype)"


def norm_before_mlp(model: LanguageModel, block: int) -> nn.Module:
    """The norm whose output the MLP of a block reads, by its usual names.

    Raises:
        ConfigError: If the block has none.
    """
    for name in _NORMS:
        if isinstance(module := getattr(model.blocks[block], name, None), nn.Module):
            return module
    raise _no_input(model, block, f"no norm named {' or '.join(_NORMS[:4])}")


def without_gain(norm: nn.Module, x: Tensor) -> Tensor:
    """The output of a norm `[..., d_model]` without its weight and its bias."""
    plain = _PLAIN.get(norm)
    if plain is None or any(weight.device != x.device for weight in plain.parameters()):
        plain = _PLAIN[norm] = _plain(norm, x)
    return plain.forward(x)  # without hooks


def _plain(norm: nn.Module, x: Tensor) -> nn.Module:
    """A copy of a norm with weights that have no effect.

    In some models the weight is a factor, in others, as Gemma, what is added to a factor of 1.
    """
    plain = copy.copy(norm)
    zeros = {name: torch.zeros_like(weight) for name, weight in norm.named_parameters()}
    plain._parameters = {name: _frozen(weight) for name, weight in zeros.items()}
    probe = torch.linspace(1, 2, x.shape[-1], device=x.device, dtype=x.dtype)[None]
    with torch.no_grad():
        is_factor = not plain.forward(probe).any()
    if is_factor:
        plain._parameters["weight"] = _frozen(torch.ones_like(zeros["weight"]))
    return plain


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


@torch.no_grad()
def check_inputs(model: LanguageModel, blocks: Iterable[int]) -> None:
    """Check that the MLPs of these blocks read the output of the norm before them.

    Raises:
        ConfigError: If one reads something else.
    """
    for block in blocks:
        norm, mlp = norm_before_mlp(model, block), mlp_of(model, block)
        taken: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            hooks.enter_context(observed({"norm": norm}, taken.__setitem__))
            read = hooks.enter_context(reading(model, block, Reads.mlp_in))
            model.resid_entering(block + 1, torch.arange(4, device=model.device)[None])
            same = taken["norm"].shape == read().shape and bool((taken["norm"] == read()).all())
        if not same:
            because = f"whose {type(mlp).__name__} reads another activation than the output of its norm"
            raise _no_input(model, block, because)


def mlp_of(model: LanguageModel, block: int) -> nn.Module:
    """The MLP of a block.

    Raises:
        ConfigError: If the block has none.
    """
    if isinstance(module := getattr(model.blocks[block], "mlp", None), nn.Module):
        return module
    raise _no_input(model, block, "no module named mlp")


def _no_input(model: LanguageModel, block: int, because: str) -> ConfigError:
    kind = type(model.model).__name__
    return ConfigError(
        "sae",
        f"a transcoder at block {block}",
        "an SAE, in this model",
        because=f"block {block} of {kind} has {because}",
    )
