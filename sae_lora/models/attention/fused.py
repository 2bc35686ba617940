"""Fused causal attention on a GPU: no matrix of scores, and no mask that waits for the device.

Windows, soft-capped scores and keys that several heads share go through torch's `flex_attention`; plain
causal attention goes through its `scaled_dot_product_attention`. Both keep only queries, keys, values,
outputs and one number per query for the backward pass. Texts with padding, short texts, and kernels that
do not give the results of blockwise attention go through the latter.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sae_lora.common.errors import listed
from sae_lora.common.fast_path import PROOF_TOKENS, FastPath
from sae_lora.models.attention import blockwise

NAME = "fused"
"""The name of this attention in transformers, after `register`."""
CHECKED = "fused_checked"
"""The same with a check, at every call, that this attention computes what the module asks for."""
_SHORT = 128
"""Texts of at most so many tokens are computed as on a CPU: a kernel would be compiled for nothing."""
_PROOF_WINDOW = 100
"""The largest window when a kernel proves itself."""
_KINDS = 64
"""The number of kinds of attention (window or not, soft-cap, gradient or not, shapes) for which torch
may compile a kernel; with its own limit of 8 it would go on without one."""
_PATH = FastPath("fused attention (model.attention)", "blockwise attention")


def register() -> None:
    """Register this attention with transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)
    AttentionInterface.register(CHECKED, _attend_checked)
    AttentionMaskInterface.register(CHECKED, _Visible)


def mask(*, q_length: int, kv_length: int, **options: Any) -> Tensor | None:
    """The mask `[batch, 1, query, pos]`, or `None` if `attend` knows it from the module alone.

    transformers prescribes the arguments; they are those of its `sdpa_mask`.
    """
    plain = options.get("attention_mask") is None and options.get("allow_is_causal_skip", True)
    if plain and q_length == kv_length:
        return None
    options["allow_is_causal_skip"] = False
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **options)


def attend(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention `[batch, query, head, d_value]`.

    transformers prescribes the signature. Dropout must be 0, because the model is frozen.

    Args:
        query: `[batch, head, pos, d_head]`.
        key: `[batch, kv_head, pos, d_head]`; an equal number of heads shares each of them.
        value: `[batch, kv_head, pos, d_value]`.
        attention_mask: The result of `mask`.
        scaling: Factor of the scores; `None`: 1 / √d_head.
        softcap: Scores become `softcap · tanh(score / softcap)`; `None`: no soft-cap.
        sliding_window: Number of positions that a query sees, its own included; `None`: all before it.
    """
    if dropout:
        raise NotImplementedError("dropout in fused attention")
    length = query.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = None if sliding_window is None or sliding_window >= length else sliding_window
    how = _How(scale, softcap, window)
    if attention_mask is not None or (length <= _SHORT and not query.is_meta):
        output = _plain(query, key, value, how, attention_mask)
    elif query.is_meta:  # shapes only; the memory is that of every fused kernel
        output = _causal(query, key, value, how)
    else:
        kernel = _causal if softcap is None and window is None else _flexible
        output = _PATH.take(
            (how, query.dtype, query.device, query.shape[1], key.shape[1], query.shape[3]),
            lambda: kernel(query, key, value, how),
            lambda: _plain(query, key, value, how),
            lambda: _difference(kernel, query, key, value, how),
            max(1e-3, 4 * torch.finfo(query.dtype).eps),
        )
    return output.transpose(1, 2).contiguous(), None


class _How(NamedTuple):
    """The function of queries, keys and values to compute."""

    scale: float
    softcap: float | None
    window: int | None
    """As `sliding_window`; `None` if all positions before a query are in it."""


_Kernel = Callable[[Tensor, Tensor, Tensor, _How], Tensor]


def _plain(
    query: Tensor, key: Tensor, value: Tensor, how: _How, visible: Tensor | None = None
) -> Tensor:
    """The plain path, for every device. `visible` is the mask, if `how` does not say all."""
    if visible is None and how.window is not None:
        positions = torch.arange(query.shape[2], device=query.device)
        visible = _sees(positions[:, None], positions, how.window)[None, None]
    options = {"scaling": how.scale, "softcap": how.softcap}
    return blockwise.attend(None, query, key, value, visible, **options)[0].transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, how: _How) -> Tensor:
    """Plain causal attention, without window and soft-cap."""
    shared = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=how.scale, enable_gqa=shared
    )


def _flexible(query: Tensor, key: Tensor, value: Tensor, how: _How) -> Tensor:
    """Causal attention with a window or soft-capped scores."""
    shared_by = query.shape[1] // key.shape[1]
    if shared_by & (shared_by - 1):  # the kernel serves powers of two
        key, value = (part.repeat_interleave(shared_by, 1) for part in (key, value))
    options: dict[str, Any] = {
        "score_mod": None if how.softcap is None else _capping(how.softcap),
        "block_mask": _block_mask(query.shape[2], how.window, query.device),
        "scale": how.scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    # On a CPU not compiled, because the compiled form has no gradient there.
    if query.device.type == "cpu" or torch.compiler.is_compiling():  # with the block around it
        output = flex_attention(query, key, value, **options)
    else:
        from torch._dynamo import config  # takes a second, and most processes need it not

        with config.patch(recompile_limit=_KINDS):
            output = _kernel()(query, key, value, **options)
    assert isinstance(output, Tensor)
    return output


@cache
def _kernel() -> Callable[..., Any]:
    return torch.compile(flex_attention)


_CAPPING: dict[float, Callable[..., Tensor]] = {}


def _capping(softcap: float) -> Callable[..., Tensor]:
    """The same function for equal soft-caps: another one would be compiled again."""

    def capped(score: Tensor, *_: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return _CAPPING.setdefault(softcap, capped)


def _sees(query: Tensor, position: Tensor, window: int | None) -> Tensor:
    """True where a query sees a position."""
    causal = position <= query
    return causal if window is None else causal & (position > query - window)


_MASKS: dict[tuple[int, int | None, torch.device], BlockMask] = {}
"""Masks by length, window and device: those of training and evaluation."""


def _block_mask(length: int, window: int | None, device: torch.device) -> BlockMask:
    if (length, window, device) not in _MASKS:  # not a cache of functools, which torch does not compile
        _MASKS[length, window, device] = _new_mask(length, window, device)
    return _MASKS[length, window, device]


def _new_mask(length: int, window: int | None, device: torch.device) -> BlockMask:
    def sees(_: Tensor, __: Tensor, query: Tensor, position: Tensor) -> Tensor:
        return _sees(query, position, window)

    return create_block_mask(sees, None, None, length, length, device=device)


@torch.enable_grad()
def _difference(
    kernel: _Kernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: _How,
) -> float:
    """The largest relative difference between a kernel and the plain path, in output and gradients.

    It computes the first positions of the first sequence.
    """
    if how.window is not None:
        how = how._replace(window=min(how.window, _PROOF_WINDOW))
    query, key, value = (
        part[:1, :, :PROOF_TOKENS].detach().requires_grad_() for part in (query, key, value)
    )

    def results(attention: _Kernel) -> list[Tensor]:
        output = attention(query, key, value, how)
        towards = output.detach().flip(2)  # any direction that all positions share
        return [output.detach(), *torch.autograd.grad(output, (query, key, value), towards)]

    return max(
        float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        for ours, theirs in zip(results(kernel), results(_plain), strict=True)
    )


# ---- what a module asks for ----------------------------------------------------------------------


class UnknownAttentionError(Exception):
    """A module asks for an attention that this one does not compute."""


class _Visible:
    """The mask that transformers would make, as a function of positions; in place of the mask itself.

    transformers prescribes the arguments; they are those of its `sdpa_mask`.
    """

    def __init__(self, *, mask_function: Callable[..., Tensor], **_: Any) -> None:
        self._function = mask_function

    def differs(self, window: int | None) -> bool:
        """True if it is not the mask of a causal attention with this window."""
        near = [0, 1, 7, 100] if window is None else [0, window - 1, window, window + 1]
        queries = torch.tensor(sorted({*near, 2**12 + 5, 2**17 + 5}), device="cpu")[:, None]
        steps = torch.tensor([0, 1, -1, *near, 10**6], device="cpu")
        positions = (queries - steps).clamp(min=0)
        zero = torch.zeros((), dtype=torch.long, device="cpu")
        theirs = self._function(zero, zero, queries, positions)
        return not torch.equal(theirs.expand(positions.shape), _sees(queries, positions, window))


_OF_NO_EFFECT = (
    *("position_ids", "position_embeddings", "cache", "cache_position", "use_cache"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    *("is_causal", "layer_idx"),
)
"""Arguments that modules pass on, and that change nothing here."""


def _attend_checked(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`attend`, after a check that it computes what the module asks for.

    Raises:
        UnknownAttentionError: If it does not.
    """
    unknown = [
        name
        for name, given in others.items()
        if name not in _OF_NO_EFFECT and given is not None and given is not False
    ]
    is_causal = others.get("is_causal", getattr(module, "is_causal", True))
    if unknown:
        raise UnknownAttentionError(f"its attention has {listed(unknown)}")
    if not isinstance(attention_mask, _Visible):
        raise UnknownAttentionError("its attention gets another mask than transformers' causal ones")
    if is_causal is False or attention_mask.differs(sliding_window):
        raise UnknownAttentionError("its attention sees other positions than those in a causal window")
    return attend(module, query, key, value, None, dropout, scaling, softcap, sliding_window)
