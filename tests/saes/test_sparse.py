"""Sparse SAEs equal dense SAEs: values and gradients, at less cost."""

import copy
from typing import Any

import pytest
import torch
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Architecture
from sae_lora.saes import sparse as sparse_module
from sae_lora.saes.loading import IdentitySAE
from sae_lora.saes.sparse import SparseSAE, is_sparse, multiplied
from sae_lora.train.cost.memory import PeakMemory
from sae_lora.train.cost.runs import COPIES
from tests.support.coders import topk_sae
from tests.support.families import D_MODEL

KINDS = ["topk", "rescaled", "jumprelu", "standard"]
NORMS = ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]


def random_sae(kind: str, width: int = 64, **options: Any) -> nn.Module:
    """An SAE with non-zero biases and thresholds: at zero, code that forgets them would pass."""
    torch.manual_seed(9)
    sizes = {"d_in": D_MODEL, "d_sae": width, **options}
    match kind:
        case "topk":
            sae = TopKSAE(TopKSAEConfig(k=5, **sizes))
        case "rescaled":
            sae = TopKSAE(TopKSAEConfig(k=5, rescale_acts_by_decoder_norm=True, **sizes))
            sae.W_dec.data *= torch.rand(width, 1) + 0.5
        case "jumprelu":
            sae = JumpReLUSAE(JumpReLUSAEConfig(**sizes))
            sae.threshold.data.uniform_(0.1, 0.5)
        case "standard":
            sae = StandardSAE(StandardSAEConfig(**sizes))
        case _:
            sae = GatedSAE(GatedSAEConfig(**sizes))
    for name in ("b_enc", "b_dec"):
        if (bias := getattr(sae, name, None)) is not None:
            bias.data.normal_(std=0.2)
    return sae.requires_grad_(False).eval()


def reconstruction(sae: Any, resid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, reconstruction, and the gradient of a random projection of it for the input."""
    inputs = resid.clone().requires_grad_()
    latents = sae.encode(inputs * 1.0)
    recon = sae.decode(latents)
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad(recon, inputs, torch.randn_like(recon))
    return latents.detach(), recon.detach(), gradient


@pytest.mark.parametrize("normalised", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_results_equal_those_of_the_dense_sae(kind: str, normalised: str) -> None:
    dense = random_sae(kind, normalize_activations=normalised)
    sparse = SparseSAE(copy.deepcopy(dense))
    resid = torch.randn(3, 7, D_MODEL)
    (latents, recon, gradient), (our_latents, our_recon, our_gradient) = (
        reconstruction(sae, resid) for sae in (dense, sparse)
    )
    assert (latents != 0).any()
    torch.testing.assert_close(our_latents, latents, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(our_recon, recon, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(our_gradient, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_active_latent(kind: str) -> None:
    dense: Any = random_sae(kind)
    dense.b_enc.data.fill_(-1e3)
    sparse = SparseSAE(copy.deepcopy(dense))
    for sae in (dense, sparse):
        latents, recon, gradient = reconstruction(sae, torch.randn(2, 3, D_MODEL))
        assert not latents.any()
        torch.testing.assert_close(recon, dense.b_dec.expand_as(recon))
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_is_that_of_the_sae(dtype: torch.dtype) -> None:
    dense = random_sae("jumprelu").to(dtype)
    sparse = SparseSAE(copy.deepcopy(dense))
    resid = torch.randn(2, 3, D_MODEL)
    results, expected = (reconstruction(sae, resid) for sae in (sparse, dense))
    for result, reference in zip(results, expected, strict=True):
        assert result.dtype == reference.dtype
        tolerance = 1e-5 if dtype is torch.float32 else 5e-2
        torch.testing.assert_close(result, reference, rtol=tolerance, atol=tolerance)


def test_latents_have_a_gradient_outside_the_reconstruction() -> None:
    """A loss may also read latents directly, as a sparsity penalty does."""
    dense = random_sae("jumprelu")
    gradients = []
    for sae in (dense, SparseSAE(copy.deepcopy(dense))):
        inputs = torch.randn(2, 3, D_MODEL, generator=torch.Generator().manual_seed(3)).requires_grad_()
        latents = sae.encode(inputs)  # pyright: ignore[reportCallIssue]
        loss = latents.square().sum() + sae.decode(latents).sum()  # pyright: ignore[reportCallIssue]
        gradients.append(torch.autograd.grad(loss, inputs)[0])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_one_product_remains_and_no_latents_are_stored() -> None:
    tokens, width = 16, 4096
    dense: Any = random_sae("jumprelu", width)
    dense.threshold.data.fill_(2.5)
    sparse = SparseSAE(copy.deepcopy(dense))
    resid = torch.randn(tokens, D_MODEL)
    product = 2 * tokens * width * D_MODEL
    for sae, products in ((dense, 4), (sparse, 1)):
        with FlopCounterMode(display=False) as counter:
            reconstruction(sae, resid)
        assert counter.get_total_flops() == products * product
        inputs = resid.clone().requires_grad_()
        with PeakMemory() as memory:
            recon = sae.decode(sae.encode(inputs * 1.0))  # pyright: ignore[reportCallIssue]
        share = memory.now / (4 * tokens * width)
        assert share > 1 if products == 4 else share < 0.5
        del recon


def test_wide_saes_are_sparse_unless_configured_otherwise() -> None:
    narrow = topk_sae()
    assert multiplied(narrow, None) is narrow
    assert isinstance(multiplied(topk_sae(), True), SparseSAE)
    wide = random_sae("standard", 16_384)
    assert multiplied(wide, False) is wide
    assert isinstance(multiplied(wide, None), SparseSAE)


@pytest.mark.parametrize(
    "sae",
    [
        random_sae("gated", 16_384),
        IdentitySAE(),
    ],
)
def test_an_sae_that_cannot_be_sparse_stays_dense_or_is_refused(sae: nn.Module) -> None:
    assert multiplied(sae, None) is sae
    with pytest.raises(ConfigError, match=r"sae\.sparse = True"):
        multiplied(sae, True)


def test_a_gpu_has_sparse_saes_from_another_width_on() -> None:
    assert is_sparse(None, 16_384, "cpu") and not is_sparse(None, 16_384, "cuda")
    assert is_sparse(None, 131_072, "cuda") and is_sparse(True, 64, "cuda")


def test_encoding_and_decoding_share_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the latents have changed in between, as in steering."""
    searches: list[Tensor] = []
    search = sparse_module._Active.of

    def counted(latents: Tensor) -> Any:
        searches.append(latents)
        return search(latents)

    monkeypatch.setattr(sparse_module._Active, "of", counted)
    sae = SparseSAE(random_sae("topk"))
    inputs = torch.randn(2, 3, D_MODEL).requires_grad_()
    latents = sae.encode(inputs * 1.0)
    recon = sae.decode(latents)
    assert len(searches) == 1
    torch.testing.assert_close(recon, sae.decode(latents.clone()))
    assert len(searches) == 2
    with torch.no_grad():
        latents = sae.encode(inputs)
        latents[..., 0] = 7.0
        changed = sae.decode(latents)
    torch.testing.assert_close(changed, sae.sae.decode(latents))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "rescaled"])
def test_the_estimate_knows_the_copies_of_latents(kind: str) -> None:
    """While a dense SAE encodes, between the passes, and at the peak of the backward pass."""
    width, tokens = 8192, 64
    sae: Any = random_sae(kind, width)
    unit = 4 * tokens * width
    with torch.no_grad(), PeakMemory() as memory:
        sae.encode(torch.randn(tokens, D_MODEL))
    encoding = memory.peak / unit
    inputs = torch.randn(tokens, D_MODEL).requires_grad_()
    with PeakMemory() as memory:
        recon = sae.decode(sae.encode(inputs * 1.0))
        kept = memory.now / unit
        memory.peak = memory.now
        recon.sum().backward()
    counted = COPIES[Architecture[kind]]
    assert (encoding, kept, memory.peak / unit) == pytest.approx(tuple(counted), abs=0.1)
