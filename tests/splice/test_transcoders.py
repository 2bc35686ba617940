"""Transcoders: identities that hold for every model, and the place that they read."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Hook, Reads
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel, outputs_of
from sae_lora.saes.places import TRANSCODERS
from sae_lora.saes.transcoders import check_readings
from sae_lora.splice.hooks import Splice, spliced
from sae_lora.splice.mlp_input import (
    Stream,
    code_of_reading,
    mlp_of,
    module_read,
    norm_before_mlp,
    reading,
    streamed,
    without_gain,
)
from sae_lora.splice.positions import Special
from tests.support.coders import topk_sae, transcoder
from tests.support.families import FAMILIES, N_BLOCKS, random_tokens, small_model
from tests.support.trunks import check_trunk

TOKENS = random_tokens(length=24)
MLP = Hook.mlp_out


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    model = small_model(request.param)
    with torch.no_grad():  # norms of new models have no effect of their own
        for module in model.model.modules():
            if "norm" in type(module).__name__.lower():
                for weight in module.parameters():
                    weight.add_(0.3 * torch.randn_like(weight))
    return model


class Exact(nn.Module):
    """A coder that computes a function of what it reads."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.eval()

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.function(feature_acts)


def exact(model: LanguageModel, block: int, reads: Reads) -> Splice:
    """A transcoder that computes what the MLP does."""
    mlp, norm = mlp_of(model, block), norm_before_mlp(model, block)
    after = model.module_at(str(Place(block, MLP)))

    def function(x: Tensor) -> Tensor:
        output = mlp.forward(norm.forward(x) if reads is Reads.resid_mid else x)
        return output if after is mlp else after.forward(output)

    return Splice(block, Exact(function), MLP, reads=reads)


@pytest.mark.parametrize("reads", [Reads.mlp_in, Reads.resid_mid])
def test_exact_transcoders_change_no_bit(model: LanguageModel, reads: Reads) -> None:
    plain = model.hidden(TOKENS)
    splices = [exact(model, block, reads) for block in range(N_BLOCKS)]
    with spliced(model, splices):
        assert torch.equal(model.hidden(TOKENS), plain)
    with spliced(model, [Splice(1, transcoder(), MLP, reads=reads)]):
        assert not torch.allclose(model.hidden(TOKENS), plain)
    assert torch.equal(model.hidden(TOKENS), plain)


def test_the_three_activations_around_a_norm(model: LanguageModel) -> None:
    norm = norm_before_mlp(model, 2)
    with (
        reading(model, 2, Reads.mlp_in) as mlp_in,
        reading(model, 2, Reads.mlp_normalized) as normalized,
        reading(model, 2, Reads.resid_mid) as resid_mid,
    ):
        model.hidden(TOKENS)
    read, plain, before = mlp_in(), normalized(), resid_mid()
    assert torch.equal(norm(before), read)
    assert torch.equal(without_gain(norm, before), plain)
    squares = plain.square().mean(-1)
    torch.testing.assert_close(squares, torch.ones_like(squares), rtol=1e-3, atol=0)
    bias = norm(torch.zeros_like(read))
    weight = ((read - bias) * plain).sum((0, 1)) / plain.square().sum((0, 1))
    torch.testing.assert_close(weight * plain + bias, read, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(read, plain)


@pytest.mark.parametrize("reads", Reads)
def test_the_code_of_an_activation_computes_it(model: LanguageModel, reads: Reads) -> None:
    inputs: list[Tensor] = []
    module = module_read(model, 1, reads)
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with reading(model, 1, reads) as read:
        model.hidden(TOKENS)
        computed = eval(code_of_reading(model, 1, reads), {"torch": torch, "x": inputs[0]})
        assert torch.allclose(computed, read(), atol=1e-6)
    handle.remove()


def test_a_skip_transcoder_with_its_skip_alone_is_the_linear_map(model: LanguageModel) -> None:
    coder = transcoder("skip_transcoder")
    with torch.no_grad():
        coder.sae.W_dec.zero_()
        coder.sae.b_dec.zero_()
    splice = Splice(1, coder, MLP, reads=Reads.mlp_in)
    with (
        reading(model, 1, Reads.mlp_in) as read,
        spliced(model, [splice]),
        outputs_of([model.module_at(splice.hookpoint)]) as outputs,
    ):
        model.hidden(TOKENS)
    torch.testing.assert_close(outputs[0], read() @ coder.sae.W_skip.T)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_it_reads_one_activation_and_replaces_the_other(model: LanguageModel, architecture: str) -> None:
    coder, special = transcoder(architecture), Special((3,))
    keep = torch.isin(TOKENS, torch.tensor(special.ids))
    with outputs_of([model.module_at(str(Place(1, MLP)))]) as plain:
        model.hidden(TOKENS)
    splice = Splice(1, coder, MLP, special, reads=Reads.mlp_in)
    with (
        reading(model, 1, Reads.mlp_in) as read,
        spliced(model, [splice], TOKENS),
        outputs_of([model.module_at(splice.hookpoint)]) as outputs,
    ):
        model.hidden(TOKENS)
    original = getattr(coder, "sae", coder) if "skip" in architecture else coder
    expected = torch.where(keep[..., None], plain[0], original(read()))
    torch.testing.assert_close(outputs[0], expected)


def test_a_trunk_with_transcoders_and_saes_equals_splicing(model: LanguageModel) -> None:
    first, second = (Splice(block, transcoder(seed=block), MLP, reads=Reads.mlp_in) for block in (0, 2))
    sae = Splice(2, topk_sae(), Hook.resid_post)
    check_trunk(model, TOKENS, [(first,), (first, second), (first, second, sae), ()], {1, 2, 3})


def test_gradients_pass_through(model: LanguageModel) -> None:
    splice = Splice(2, transcoder(), MLP, reads=Reads.mlp_in)
    resid = model.resid_entering(2, TOKENS)[:, :8].clone().requires_grad_()
    with spliced(model, [splice]), reading(model, 2, Reads.mlp_in) as read:
        hidden = model.hidden(TOKENS[:, :8], 2, resid)
        (through,) = torch.autograd.grad(hidden.square().sum(), read())
    assert (through.norm(dim=-1) > 0).all()


def test_a_stream_has_input_and_target_side_by_side(model: LanguageModel) -> None:
    stream, taken = Stream(str(Place(1, MLP)), Reads.mlp_in), []
    with (
        streamed(model, [stream], lambda _, pairs: taken.append(pairs)),
        reading(model, 1, Reads.mlp_in) as read,
        outputs_of([model.module_at(stream.hookpoint)]) as outputs,
    ):
        model.hidden(TOKENS)
    assert torch.equal(taken[0], torch.cat([read(), outputs[0]], -1))
    assert torch.equal(stream.inputs(taken[0]), read())


def test_a_transcoder_that_reads_something_else_is_refused(model: LanguageModel) -> None:
    right = exact(model, 1, Reads.mlp_in)
    check_readings(model, [right], TOKENS)
    for wrong in (Reads.mlp_normalized, Reads.resid_mid):
        with pytest.raises(ConfigError, match="FVU") as error:
            check_readings(model, [right._replace(reads=wrong)], TOKENS)
        assert (error.value.field, error.value.nearest) == ("layer.reads", "mlp_in")


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_the_output_before_the_norm_after_an_mlp_is_refused(family: str) -> None:
    model = small_model(family)
    with torch.no_grad():
        model.module_at(str(Place(1, MLP))).get_parameter("weight").add_(3.0)
    raw = Splice(1, Exact(mlp_of(model, 1).forward), MLP, reads=Reads.mlp_in)
    with pytest.raises(ConfigError, match="before the norm after it"):
        check_readings(model, [raw], TOKENS)
