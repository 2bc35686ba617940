"""Fused attention gives the results of ordinary attention, or blockwise attention serves."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from sae_lora.common.errors import ConfigError
from sae_lora.common.fast_path import FastPath
from sae_lora.config.enums import Attention
from sae_lora.models.attention import choice, fused
from sae_lora.models.language_model import LanguageModel
from tests.models.test_blockwise_attention import check_padding, whole_attention
from tests.support.families import random_tokens
from tests.support.tiny_models import small_causal_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process. Short texts also go through the kernels, and these have a gradient on a CPU:
    torch has its definition with the whole matrix of scores there, and only forbids to use it."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(fused, "_PATH", FastPath("the kernel", "the plain path"))
    monkeypatch.setattr(fused, "_SHORT", 8)
    fused.register()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The kernels that are called, by name; those by which a kernel proves itself are left out."""
    called: list[str] = []
    difference = fused._difference

    def proven(kernel: Any, *arguments: Any) -> float:
        result = difference(kernel, *arguments)
        called.clear()
        return result

    def noted(name: str, kernel: Any) -> Any:
        return lambda *given: (called.append(name), kernel(*given))[1]

    for name in ("_causal", "_flexible"):
        monkeypatch.setattr(fused, name, noted(name, getattr(fused, name)))
    monkeypatch.setattr(fused, "_difference", proven)
    return called


def inputs(length: int, dtype: torch.dtype = torch.float64, heads: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, heads, length, 16), (2, 2, length, 16), (2, 2, length, 16)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def results(output: Tensor, given: list[Tensor]) -> list[Tensor]:
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, given, weight)]


WAYS = [
    (None, None, "_causal"),
    (5.0, None, "_flexible"),
    (5.0, 50, "_flexible"),
    (None, 50, "_flexible"),
]


@pytest.mark.parametrize(
    ("length", "softcap", "window", "kernel"),
    [(length, *way) for length in (16, 100, 512) for way in WAYS]
    + [(4096, None, None, "_causal"), (4096, 5.0, 50, "_flexible")],
)
def test_it_equals_ordinary_attention(
    length: int, softcap: float | None, window: int | None, kernel: str, calls: list[str]
) -> None:
    """Output and gradients, in float64; soft-capped scores, windows, keys that heads share."""
    given = [part[:1] for part in inputs(length, heads=2 if length > 512 else 4)]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if window is not None:
        visible = visible.triu(1 - window)
    output, _ = fused.attend(None, *given, None, scaling=0.3, softcap=softcap, sliding_window=window)
    whole = whole_attention(*given, visible, 0.3, softcap)
    for actual, expected in zip(
        results(output.transpose(1, 2), given), results(whole, given), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert calls == ["_causal" if softcap is None and (window or length) >= length else kernel]


def test_six_heads_that_share_two_keys() -> None:
    """The kernel serves powers of two."""
    given = inputs(40, heads=6)
    output, _ = fused.attend(None, *given, None, scaling=0.3, softcap=5.0)
    whole = whole_attention(*given, torch.ones(40, 40, dtype=torch.bool).tril(), 0.3, 5.0)
    for actual, expected in zip(
        results(output.transpose(1, 2), given), results(whole, given), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_bfloat16_is_as_exact_as_eager_attention() -> None:
    exact = inputs(300)
    rounded = [part.detach().bfloat16().requires_grad_() for part in exact]
    exact = [part.detach().double().requires_grad_() for part in rounded]
    visible = torch.ones(300, 300, dtype=torch.bool).tril()
    expected = results(whole_attention(*exact, visible, 0.3, 5.0), exact)
    eager = results(whole_attention(*rounded, visible, 0.3, 5.0), rounded)
    output, _ = fused.attend(None, *rounded, None, scaling=0.3, softcap=5.0)
    for ours, theirs, true in zip(
        results(output.transpose(1, 2), rounded), eager, expected, strict=True
    ):
        error, usual = ((part.double() - true).norm() / true.norm() for part in (ours, theirs))
        assert error < 1.5 * usual


@pytest.mark.parametrize("fault", ["another scale", "another gradient", "an error"])
def test_a_kernel_that_fails_is_not_used(
    fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line says so, and the results are those of the plain path, now and later."""
    kernel = fused._flexible

    def wrong(query: Tensor, key: Tensor, value: Tensor, how: Any) -> Tensor:
        if fault == "an error":
            raise RuntimeError("no kernel image is available\nfor execution on the device")
        if fault == "another scale":
            return kernel(query, key, value, how._replace(scale=1.01 * how.scale))
        output = kernel(query, key, value, how)
        return output + (query - query.detach()).sum()

    monkeypatch.setattr(fused, "_flexible", wrong)
    given = inputs(200)
    expected = results(fused._plain(*given, fused._How(0.3, 5.0, None)), given)
    for _ in range(2):
        output, _ = fused.attend(None, *given, None, scaling=0.3, softcap=5.0)
        for actual, plain in zip(results(output.transpose(1, 2), given), expected, strict=True):
            assert torch.equal(actual, plain)
    printed = capsys.readouterr().err
    assert printed.count("the plain path serves in place of the kernel") == 1
    assert ("no kernel image" if fault == "an error" else "the results differ by") in printed


def test_a_kernel_that_fails_later_is_given_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A shape can be too large for a kernel that served a smaller one."""
    kernel = fused._flexible

    def limited(query: Tensor, *others: Any) -> Tensor:
        if query.shape[2] > 256:
            raise RuntimeError("out of resource: shared memory")
        return kernel(query, *others)

    monkeypatch.setattr(fused, "_flexible", limited)
    given = inputs(300)
    output, _ = fused.attend(None, *given, None, scaling=0.3, softcap=5.0)
    assert torch.equal(output.transpose(1, 2), fused._plain(*given, fused._How(0.3, 5.0, None)))
    assert "out of resource" in capsys.readouterr().err


def test_too_little_memory_is_no_fault_of_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused, "_flexible", full)
    with pytest.raises(torch.OutOfMemoryError):
        fused.attend(None, *inputs(300), None, softcap=5.0)


def test_every_family_gives_the_results_of_eager_attention(model: LanguageModel) -> None:
    """Including windows shorter than the text, soft-capped scores and shared keys."""
    tokens = random_tokens(length=48)
    weight = next(weight for weight in model.blocks[0].parameters() if weight.ndim == 2)
    weight.requires_grad_()

    def computed() -> tuple[Tensor, Tensor]:
        hidden = model.hidden(tokens)
        return hidden, torch.autograd.grad(hidden.square().mean(), weight)[0]

    model.model.set_attn_implementation("eager")
    expected = computed()
    choice._set(model.model, Attention.fused)
    for result, usual in zip(computed(), expected, strict=True):
        torch.testing.assert_close(result, usual, rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(model: LanguageModel) -> None:
    choice._set(model.model, Attention.fused)
    check_padding(model)


def test_a_cache_changes_nothing(model: LanguageModel) -> None:
    """Text that is read in parts, the last ones token by token."""
    tokens = random_tokens(batch=2, length=30)
    choice._set(model.model, Attention.fused)
    with torch.no_grad():
        whole = model.model(tokens, use_cache=False).logits
        cache, logits = None, []
        for part in tokens.split([12, 15, 1, 1, 1], dim=1):
            output = model.model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "because"),
    [
        ("gpt_oss", "its attention has s_aux"),  # attention sinks
        ("llama4_text", "sees other positions"),  # chunks, longer than the probe
        ("phimoe", "sees other positions"),
        ("bloom", "has only its own attention"),
        ("doge", "_Visible"),  # a mask that the model changes
    ],
)
def test_a_model_that_asks_for_more_is_refused(model_type: str, because: str) -> None:
    """And keeps the attention that it had."""
    model = small_causal_model(model_type)
    usual = model.config._attn_implementation
    with pytest.raises(choice._UnfitError, match=because):
        choice._set(model, Attention.fused)
    assert model.config._attn_implementation == usual


def test_rows_are_searched_for_packed_sequences_once(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import masking_utils

    searches: list[torch.Size] = []
    search = masking_utils.find_packed_sequence_indices

    def counted(position_ids: Tensor) -> Tensor | None:
        searches.append(position_ids.shape)
        return search(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", counted)
    tokens = random_tokens(batch=2, length=16)
    expected = model.hidden(tokens)
    known = len(searches)
    assert torch.equal(model.hidden(tokens), expected)
    assert len(searches) == known
    assert masking_utils.find_packed_sequence_indices is counted


def test_a_cpu_has_no_fused_attention() -> None:
    with pytest.raises(ConfigError, match="its kernels are for GPUs") as refusal:
        choice.choose_attention(small_causal_model("llama"), Attention.fused, CPU)
    assert refusal.value.nearest == "auto"
