"""Causal attention in blocks of queries, because torch has none for soft-capped scores on a CPU.

Each block of queries is multiplied only with the keys that it may see, and its scores fit into the
cache. The whole matrix of scores never exists. The backward pass computes the scores again.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "blockwise"
"""The name of this attention in transformers, after `register`."""
LARGEST_EXPONENT = 60.0
"""A sum of exponentials is finite in float32 if no exponent exceeds this."""
_ROWS = 128
"""Queries per block."""


def register() -> None:
    """Register this attention with transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)  # makes no mask if plain causal attention is enough


def attend(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention `[batch, query, head, d_value]`; the queries are at the last positions.

    transformers prescribes the signature. Dropout must be 0, because the model is frozen.

    Args:
        query: `[batch, head, query, d_head]`.
        key: `[batch, kv_head, pos, d_head]`; an equal number of heads shares each of them.
        value: `[batch, kv_head, pos, d_value]`; latent attention has other widths here.
        attention_mask: `[batch, 1, query, pos]`, true for visible positions; `None`: a query sees its
            own position and all before it.
        scaling: Factor of the scores; `None`: 1 / √d_head.
        softcap: Scores become `softcap · tanh(score / softcap)`; `None`: no soft-cap.
    """
    if dropout:
        raise NotImplementedError("dropout in blockwise attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _Blockwise.apply(query, key, value, attention_mask, scale, softcap)
    return output.transpose(1, 2).contiguous(), None


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        blocks = _Blocks(query, key, mask, scale, softcap)
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        shape = *query.shape[:-1], 1
        sums, peaks = (query.new_empty(shape, dtype=blocks.precise) for _ in range(2))
        for rows, n_visible in blocks:
            scores = blocks.scores(rows, n_visible)
            peak = blocks.peaks(scores, rows)
            weights = blocks.exponentials(scores, peak, rows, into=scores)
            summed = weights.sum(-1, keepdim=True)
            summed.masked_fill_(summed == 0, 1)  # a query at padding, which sees no position
            mixed = (weights.to(value.dtype) @ value[:, :, :n_visible]).div_(summed)
            output[:, :, rows] = blocks.ungrouped(mixed)
            sums[:, :, rows] = blocks.ungrouped(summed)
            if peak is not None:
                peaks[:, :, rows] = blocks.ungrouped(peak)
        ctx.save_for_backward(query, key, value, mask, output, sums, peaks)
        ctx.scale, ctx.softcap = scale, softcap
        return output

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, sums, peaks = ctx.saved_tensors
        (gradient,) = outputs
        blocks = _Blocks(query, key, mask, ctx.scale, ctx.softcap)
        for_query = torch.empty_like(query)
        for_key, for_value = torch.zeros_like(key), torch.zeros_like(value)
        for rows, n_visible in blocks:
            scores = blocks.scores(rows, n_visible)
            peak = None if blocks.are_bounded else blocks.grouped(peaks[:, :, rows])
            weights = blocks.exponentials(scores, peak, rows, into=torch.empty_like(scores))
            # The weights are not normalised, so the gradient is divided by their sums instead.
            for_output = blocks.grouped((gradient[:, :, rows] / sums[:, :, rows]).to(query.dtype))
            for_value[:, :, :n_visible] += weights.to(value.dtype).transpose(-1, -2) @ for_output
            along = (for_output * blocks.grouped(output[:, :, rows])).sum(-1, keepdim=True)
            slope = (for_output @ value[:, :, :n_visible].transpose(-1, -2)).sub_(along).mul_(weights)
            if ctx.softcap is not None:
                slope.addcmul_(torch.mul(slope, scores, out=weights), scores, value=-1)
            slope = slope.to(query.dtype)
            for_query[:, :, rows] = blocks.ungrouped(slope @ key[:, :, :n_visible]).mul_(ctx.scale)
            scaled_query = blocks.grouped(query[:, :, rows]) * ctx.scale
            for_key[:, :, :n_visible] += slope.transpose(-1, -2) @ scaled_query
        return for_query, for_key, for_value, None, None, None


class _Blocks:
    """The blocks of queries, and the scores of each.

    The heads that share a key are concatenated along the query axis, so that one product computes all
    their scores. Soft-capped scores are in units of the cap.
    """

    def __init__(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, softcap: float | None
    ) -> None:
        self._query, self._key, self._mask = query, key, mask
        self._factor, self._softcap = scale if softcap is None else scale / softcap, softcap
        self._shared_by = query.shape[1] // key.shape[1]
        self._n_before = key.shape[2] - query.shape[2]
        self.precise = torch.promote_types(query.dtype, torch.float32)
        """The dtype of scores and sums."""
        self.are_bounded = softcap is not None and softcap <= LARGEST_EXPONENT
        """True if the exponential of every score is finite."""

    def __iter__(self) -> Iterator[tuple[slice, int]]:
        """The queries of each block, and the number of positions that they see."""
        n_queries = self._query.shape[2]
        for start in range(0, n_queries, _ROWS):
            end = min(start + _ROWS, n_queries)
            yield slice(start, end), self._n_before + end

    def scores(self, rows: slice, n_visible: int) -> Tensor:
        """Scores `[batch, kv_head, share · query, pos]`, also of hidden positions."""
        query = self.grouped(self._query[:, :, rows]) * self._factor
        scores = (query @ self._key[:, :, :n_visible].transpose(-1, -2)).to(self.precise)
        return scores if self._softcap is None else scores.tanh_()

    def peaks(self, scores: Tensor, rows: slice) -> Tensor | None:
        """Maxima to subtract from the scores, `[…, share · query, 1]`; `None` if they are bounded.

        If it returns maxima, it overwrites the scores of hidden positions with the lowest number.
        """
        if self.are_bounded:
            return None
        self._hide(scores, rows, torch.finfo(scores.dtype).min)
        return scores.amax(-1, keepdim=True)

    def exponentials(self, scores: Tensor, peaks: Tensor | None, rows: slice, into: Tensor) -> Tensor:
        """Write the exponentials of the scores into `into`, and zero at hidden positions."""
        if self._softcap is not None:
            scores = torch.mul(scores, self._softcap, out=into)
        if peaks is not None:
            scores = torch.sub(scores, peaks, out=into)
        # Hide after exp: the exponential of a very negative number takes ten times as long.
        self._hide(torch.exp(scores, out=into), rows, 0)
        return into

    def _hide(self, scores: Tensor, rows: slice, value: float) -> None:
        """Write the value at hidden positions."""
        shares = scores.unflatten(2, (self._shared_by, -1))
        if self._mask is None:
            length = rows.stop - rows.start
            later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu_(1)
            shares[..., scores.shape[-1] - length :].masked_fill_(later, value)
        else:
            shares.masked_fill_(~self._mask[:, :, None, rows, : scores.shape[-1]], value)

    def grouped(self, heads: Tensor) -> Tensor:
        """`[batch, head, query, …]` as `[batch, kv_head, share · query, …]`."""
        return heads.unflatten(1, (-1, self._shared_by)).flatten(2, 3)

    def ungrouped(self, grouped: Tensor) -> Tensor:
        """The inverse of `grouped`."""
        return grouped.unflatten(2, (self._shared_by, -1)).flatten(1, 2)
