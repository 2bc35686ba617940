"""SAEs that compute with their active latents only: a few dozen out of tens of thousands."""

from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from sae_lora.common.errors import ConfigError, listed
from sae_lora.saes.places import TRANSCODERS

_WIDE = {"cpu": 16_384, "cuda": 131_072}
"""Number of latents from which a `SparseSAE` is faster or smaller, by kind of device. On an H200, the
sum over active latents at 1,024 tokens took 26 ms (docs/performance.md), and a dense product with 131k
latents should take 13 ms in float32; from there on, memory for latents decides."""
_AFFINE = ("standard", "topk", "jumprelu", *TRANSCODERS)
"""sae-lens's architectures whose active latents are affine in the SAE's input."""


def multiplied(sae: nn.Module, sparse: bool | None) -> nn.Module:
    """The frozen SAE; as a `SparseSAE` if `sae.sparse` is true, or if it is null and the SAE is wide.

    Raises:
        ConfigError: If `sae.sparse` is true for an SAE that cannot be a `SparseSAE`.
    """
    config: Any = getattr(sae, "cfg", None)
    if config is not None and config.architecture() in _AFFINE and config.reshape_activations == "none":
        device = next(sae.parameters()).device.type
        return SparseSAE(sae).eval() if is_sparse(sparse, config.d_sae, device) else sae
    if sparse:
        raise ConfigError(
            "sae.sparse",
            sparse,
            f"false or null; true only for an SAE of architecture {listed(_AFFINE)}",
            because="the active latents of this SAE are no affine function of its input",
        )
    return sae


def is_sparse(sparse: bool | None, d_sae: int, device: str) -> bool:
    """True if `sae.sparse` means a `SparseSAE`; if it is null, SAEs that are wide for the device are."""
    return d_sae >= _WIDE.get(device, _WIDE["cpu"]) if sparse is None else sparse


class SparseSAE(nn.Module):
    """An SAE of sae-lens in less time and memory; its results are equal apart from rounding.

    sae-lens computes the latents. Reconstruction and gradients use only the active latents: of four
    dense products with the SAE's matrices one remains, and no autograd graph holds latents.

    Args:
        sae: A frozen SAE whose active latents are affine in its input. The memory of its encoder is
            reordered, one row per latent.
    """

    def __init__(self, sae: nn.Module) -> None:
        super().__init__()
        self.sae: Any = sae
        self.sae.W_enc.data = self.sae.W_enc.data.T.contiguous().T
        rescaled = getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False)
        self._norms: Tensor | None = self.sae.W_dec.norm(dim=-1) if rescaled else None
        """Norms of the decoder's rows, `[d_sae]`, if the latents are multiplied by them."""
        self._last: _Searched | None = None

    def encode(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            latents = self.sae.encode(x)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return latents
        active = _Active.of(latents)
        latents = _Encoded.apply(
            self.sae.process_sae_in(x), latents, active, self.sae.W_enc.T, self._norms
        )
        self._last = _Searched(ref(latents), latents._version, active)
        return latents

    def decode(self, feature_acts: Tensor) -> Tensor:
        sae, active = self.sae, self._active_in(feature_acts)
        values = feature_acts.flatten().index_select(0, active.positions)
        if self._norms is not None:
            values = values / self._norms[active.latents]
        recon = active.sum_of_rows(sae.W_dec, values).unflatten(0, feature_acts.shape[:-1])
        recon = sae.hook_sae_recons(recon + sae.b_dec)
        return sae.reshape_fn_out(sae.run_time_activation_norm_fn_out(recon), sae.d_head)

    def _active_in(self, latents: Tensor) -> "_Active":
        """The active latents; those of the last `encode` if these latents are its result, unchanged."""
        last, self._last = self._last, None
        if last is not None and last.latents() is latents and last.version == latents._version:
            return last.active
        return _Active.of(latents)


def divide(coder: nn.Module, device: torch.device, processes: int) -> None:
    """Divide the matrices of a frozen SAE among processes; all of them must call this.

    Each is whole only while the SAE encodes or decodes. An SAE whose encoder reads its decoder stays
    whole.
    """
    from torch.distributed.device_mesh import init_device_mesh

    from sae_lora.models.sharding import shard_of  # torch's FSDP takes a second to import

    sae: Any = coder.sae if isinstance(coder, SparseSAE) else coder
    config = getattr(sae, "cfg", None)
    if config is None or config.architecture() not in _AFFINE:
        return
    if getattr(config, "rescale_acts_by_decoder_norm", False):
        return
    mesh = init_device_mesh(device.type, (processes,))
    for name, call in (("W_enc", "encode"), ("W_dec", "decode")):
        matrix = getattr(sae, name)
        if matrix.is_contiguous():
            shard = shard_of([matrix], mesh)
            (sae._parameters[name],) = shard.whole
        else:  # the encoder of a `SparseSAE`; only while the whole matrix is there, it has a view
            shard = shard_of([_frozen(matrix.data.T)], mesh)
            sae._parameters[name] = shard(lambda shard=shard: _frozen(shard.whole[0].data.T))
        setattr(coder, call, partial(shard, getattr(coder, call)))


def _frozen(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=False)


class _Active(NamedTuple):
    """Active latents.

    Args:
        positions: Their indices in the flattened latents of all tokens, `[active]`.
        first: The index in `positions` at which each token begins, `[token]`.
        d_sae: Number of latents per token.
    """

    positions: Tensor
    first: Tensor
    d_sae: int

    @classmethod
    def of(cls, latents: Tensor) -> "_Active":
        """The active latents in `[..., d_sae]`. Waits for the device, because their number is needed."""
        d_sae = latents.shape[-1]
        positions = latents.detach().flatten().nonzero()[:, 0]
        tokens = torch.arange(latents.numel() // d_sae, device=latents.device)
        return cls(positions, torch.searchsorted(positions, tokens * d_sae), d_sae)

    @property
    def latents(self) -> Tensor:
        """The index of each in its token, `[active]`."""
        return self.positions % self.d_sae

    def sum_of_rows(self, matrix: Tensor, values: Tensor) -> Tensor:
        """For each token, the sum over its active latents of `values` times rows of the matrix.

        Args:
            matrix: `[d_sae, d]`.
            values: `[active]`.

        Returns:
            The sums, `[token, d]`.
        """
        return embedding_bag(self.latents, matrix, self.first, mode="sum", per_sample_weights=values)


class _Searched(NamedTuple):
    """Latents that were searched for active ones."""

    latents: "ref[Tensor]"
    version: int
    """torch's count of the changes of these latents in place."""
    active: _Active


class _Encoded(torch.autograd.Function):
    """Computed latents as a function of the encoder's input, for the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        latents: Tensor,
        active: _Active,
        by_latent: Tensor,
        norms: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(active.positions, active.first, by_latent, norms)
        return latents.view_as(latents)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        positions, first, by_latent, norms = ctx.saved_tensors
        (gradient,) = outputs
        active = _Active(positions, first, gradient.shape[-1])
        values = gradient.flatten().index_select(0, positions)
        if norms is not None:
            values = values * norms[active.latents]
        to_inputs = active.sum_of_rows(by_latent, values).unflatten(0, gradient.shape[:-1])
        return to_inputs, None, None, None, None
