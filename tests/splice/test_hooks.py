"""SAEs at and inside blocks: at the right place, exact with a shared trunk, and removed afterwards."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import Hook
from sae_lora.config.schema import LoRAConfig
from sae_lora.models.hookpoints import Place
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.loading import IdentitySAE
from sae_lora.splice.hooks import Reading, Splice, spliced
from sae_lora.splice.positions import NOT_SPECIAL, Special
from sae_lora.splice.student import LoRAStudent
from sae_lora.splice.trunk import Splices, Trunk, cuts_around
from sae_lora.train.optim import GradientState
from sae_lora.train.train_state import TrainState
from tests.support.coders import jumprelu_sae, topk_sae
from tests.support.families import FAMILIES, N_BLOCKS, random_tokens, small_model
from tests.support.tiny_models import small_causal_model
from tests.support.trainings import CONFIG, curves, evaluator, fill, pack, whole_pass
from tests.support.trunks import check_trunk

LAST = N_BLOCKS - 1
TOKENS = random_tokens(length=24)  # longer than the sliding windows
ATTENTION, MLP, OUTPUT = Hook.attn_out, Hook.mlp_out, Hook.resid_post
SAES = [topk_sae(seed=1), jumprelu_sae(), topk_sae(seed=2)]

RULE = Special((3, 5))


def read_at(model: LanguageModel, *places: Place) -> list[Tensor]:
    """Activations at these places, `[token, d_model]`, read through splices that change nothing."""
    activations: dict[str, Tensor] = {}
    control = IdentitySAE()
    with (
        torch.no_grad(),
        spliced(
            model,
            [Splice(place.block, control, place.hook) for place in places],
            observe=lambda reading: activations.update({reading.hookpoint: reading.resid}),
        ),
    ):
        model.hidden(TOKENS)
    return [activations[str(place)] for place in places]


def hooks(model: LanguageModel) -> int:
    return sum(len(module._forward_hooks) for module in model.model.modules())


def with_splices(model: LanguageModel, row: Splices) -> Tensor:
    """Hidden states from one forward pass with all SAEs, as the reference."""
    with spliced(model, row, TOKENS):
        return model.hidden(TOKENS)


@pytest.mark.parametrize("block", range(1, N_BLOCKS))
def test_a_block_adds_the_outputs_of_attention_and_mlp(model: LanguageModel, block: int) -> None:
    resid_pre, attention, mlp, resid_post = read_at(
        model, Place(block - 1), Place(block, ATTENTION), Place(block, MLP), Place(block)
    )
    torch.testing.assert_close(resid_post - resid_pre, attention + mlp, rtol=1e-4, atol=1e-4)
    assert attention.abs().mean() > 1e-2 and mlp.abs().mean() > 1e-2


@pytest.mark.parametrize("hook", [ATTENTION, MLP])
@pytest.mark.parametrize("block", [0, 2])
def test_the_reconstruction_is_added_to_the_residual_stream(
    model: LanguageModel, block: int, hook: Hook
) -> None:
    """The block adds the reconstruction instead of the original output, and changes nothing else."""
    place, sae = Place(block, hook), topk_sae()
    added, plain = read_at(model, place, Place(block))
    with spliced(model, [Splice(place.block, sae, place.hook)]):
        attention, mlp, changed = read_at(
            model, Place(block, ATTENTION), Place(block, MLP), Place(block)
        )
    # Of two splices at one place, the second reads the output of the first.
    torch.testing.assert_close(attention if hook is ATTENTION else mlp, sae(added), rtol=1e-4, atol=1e-4)
    if hook is MLP:
        torch.testing.assert_close(changed - plain, sae(added) - added, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(changed, plain)


@pytest.mark.parametrize(
    "place", [*map(Place, range(N_BLOCKS)), Place(1, ATTENTION), Place(1, MLP)], ids=str
)
def test_identity_changes_no_bit_and_hooks_are_removed(model: LanguageModel, place: Place) -> None:
    plain, n_hooks = model.hidden(TOKENS), hooks(model)
    splice = Splice(place.block, topk_sae(), place.hook)
    with spliced(model, [splice._replace(sae=IdentitySAE())]):
        assert torch.equal(model.hidden(TOKENS), plain)
        assert hooks(model) == n_hooks + 1
    with pytest.raises(RuntimeError, match="inside"), spliced(model, [splice]):
        assert not torch.allclose(model.hidden(TOKENS), plain)
        raise RuntimeError("inside")
    with (
        pytest.raises(ConfigError),
        spliced(model, [splice, splice._replace(block=99)]),
    ):
        pass
    assert hooks(model) == n_hooks
    assert torch.equal(model.hidden(TOKENS), plain)


@pytest.mark.parametrize("hook", [MLP, OUTPUT])
def test_an_output_may_be_a_tensor_or_the_first_of_several(hook: Hook) -> None:
    """MLPs with a router return a tuple; its other elements are unchanged."""
    model, splice = small_model("llama"), Splice(1, topk_sae(), hook)
    expected = with_splices(model, (splice,))
    module, outputs = model.module_at(splice.hookpoint), []
    module.register_forward_hook(lambda module, arguments, output: (output, "router"))
    with spliced(model, [splice]):
        module.register_forward_hook(
            lambda module, arguments, output: outputs.append(output) or output[0]
        )
        assert torch.equal(model.hidden(TOKENS), expected)
    (output,) = outputs
    assert isinstance(output, tuple) and output[1] == "router"


@pytest.mark.parametrize("hook", [ATTENTION, MLP, OUTPUT])
def test_kept_positions_keep_their_activation(model: LanguageModel, hook: Hook) -> None:
    keep = torch.isin(TOKENS, torch.tensor(RULE.ids))
    place, sae = Place(2, hook), topk_sae()
    (original,) = read_at(model, place)
    readings: list[Reading] = []
    with spliced(model, [Splice(2, sae, hook, RULE)], TOKENS, readings.append):
        (changed,) = read_at(model, place)
    flat = keep.flatten()
    assert torch.equal(changed[flat], original[flat])
    torch.testing.assert_close(changed[~flat], sae(original)[~flat])
    assert len(readings[0].resid) == int((~keep).sum())


ROWS: list[Splices] = [
    (),
    (Splice(1, SAES[0]),),
    (Splice(1, SAES[1]),),
    (Splice(0, SAES[0], special=RULE), Splice(2, SAES[1], special=RULE)),
    (Splice(1, SAES[0]), Splice(2, SAES[2])),
    (Splice(LAST, SAES[1], special=RULE),),
    (Splice(1, SAES[0], MLP),),
    (Splice(1, SAES[0], ATTENTION),),
    (Splice(0, SAES[1], ATTENTION), Splice(0, SAES[2])),
    (Splice(1, SAES[0], ATTENTION), Splice(1, SAES[1], MLP), Splice(1, SAES[2])),
    (Splice(1, SAES[0], ATTENTION), Splice(1, SAES[2], MLP)),
    (
        Splice(0, SAES[0], special=RULE),
        Splice(2, SAES[1], MLP, RULE),
        Splice(LAST, SAES[2], ATTENTION, RULE),
    ),
    (
        Splice(0, SAES[0], special=RULE),
        Splice(2, SAES[1], special=RULE),
        Splice(LAST, SAES[2], MLP, RULE),
    ),
    (Splice(LAST, SAES[0], MLP), Splice(LAST, SAES[1])),
]


@pytest.mark.parametrize("share", [True, False])
def test_a_trunk_equals_splicing(model: LanguageModel, share: bool) -> None:
    """For rows that mix hooks, also several in one block; with and without storing shared inputs."""
    cuts = set().union(*map(cuts_around, ROWS))
    if not share:
        cuts = {splice.block + 1 for row in ROWS for splice in row}
    n_hooks = hooks(model)
    check_trunk(model, TOKENS, ROWS, cuts)
    assert hooks(model) == n_hooks


def test_shared_computations_run_once() -> None:
    model = small_model("gemma2")
    runs: list[int] = []
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, number=number: runs.append(number))
    rows: list[Splices] = [
        (Splice(2, SAES[0], MLP),),
        (Splice(2, SAES[1], MLP),),
        (Splice(2, SAES[0], MLP), Splice(2, SAES[1])),
    ]
    trunk = Trunk(model, TOKENS, set().union(*map(cuts_around, rows)))
    trunk.hidden()
    for row in rows:
        trunk.hidden(row)
    # The teacher; block 2 with each of the two SAEs inside; block 3 for each of the three rows.
    assert sorted(runs) == [0, 1, 2, 2, 2, 3, 3, 3, 3]


MIXED: Splices = (
    Splice(1, SAES[0], ATTENTION, RULE),
    Splice(1, SAES[1], MLP, RULE),
    Splice(2, SAES[2], special=RULE),
    Splice(LAST, SAES[0], MLP, RULE),
)


@pytest.mark.parametrize("row", [MIXED, (Splice(1, SAES[0], special=RULE),)], ids=["mixed", "alone"])
@pytest.mark.parametrize("blocks", ["after", "all", [0, 3], [1, 3], [2], [LAST]])
def test_a_student_equals_the_whole_model_with_saes_and_adapters(
    model: LanguageModel, row: Splices, blocks: object
) -> None:
    """Also if the blocks are recomputed in the backward pass."""
    student = LoRAStudent(model, row, LoRAConfig(rank=2, blocks=blocks))
    fill(student.weights)
    weights = list(student.weights.values())
    whole = with_splices(student.model, row)
    expected = torch.autograd.grad(whole.square().sum(), weights)
    n_hooks = hooks(student.model)
    for recomputes in (False, True):
        if recomputes:
            student.model.recompute(student.first)
        hidden = student.hidden(Trunk(model, TOKENS, student.cuts))
        assert torch.equal(hidden, whole)
        assert hooks(student.model) == n_hooks
        gradients = torch.autograd.grad(hidden.square().sum(), weights)
        assert all(map(torch.equal, gradients, expected))
        assert hooks(student.model) == n_hooks


def test_adapters_after_an_sae_inside_a_block_begin_with_the_next_block() -> None:
    for hook in (ATTENTION, MLP, OUTPUT):
        row = (Splice(1, SAES[0], hook),)
        student = LoRAStudent(small_model("llama"), row, LoRAConfig(rank=2))
        assert student.first == 2
        assert (len(student.frozen), len(student.live)) == (1, 0)
        assert student.cuts == ({2} if hook is OUTPUT else {1, 2})


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["after", "all"])
def test_runs_in_a_pack_of_hooks_equal_runs_alone(blocks: str) -> None:
    """Their curves (losses, evaluations, measures of the SAEs) are equal, with shared frozen blocks."""
    rows: list[Splices] = [MIXED[:1], MIXED[:2], (Splice(1, SAES[1], MLP, RULE),), MIXED[2:3]]
    steps = 4

    def state_of(model: LanguageModel, row: Splices) -> TrainState:
        torch.manual_seed(0)
        student = LoRAStudent(model, row, LoRAConfig(rank=2, blocks=blocks))
        return GradientState(student, CONFIG, steps)

    model = small_model("gemma2")
    states = [state_of(model, row) for row in rows]
    results = curves(pack(model, *states), steps)
    for row, state in zip(rows, states, strict=True):
        alone = state_of(model, row)
        assert curves(pack(model, alone), steps)[alone] == results[state]
        assert set(results[state][0].per_sae) == {splice.hookpoint for splice in row}


def test_fvu_and_l0_equal_those_of_whole_passes(model: LanguageModel) -> None:
    """FVU and L0 of each SAE, from sums over batches, equal those from all tokens at once."""
    row: Splices = tuple(splice._replace(special=NOT_SPECIAL) for splice in MIXED[:3])
    evaluate = evaluator(model, cache_bytes=1e9)
    shared = LoRAStudent(model, row[:1], LoRAConfig(rank=2)), LoRAStudent(model, row, LoRAConfig(rank=2))
    expected = whole_pass(model, row)
    for _ in range(2):  # the second time from cached states
        measured = evaluate(shared)[1].per_sae
        assert measured.keys() == expected.fvu.keys()
        for hookpoint, figures in measured.items():
            assert figures["fvu"] == pytest.approx(expected.fvu[hookpoint], rel=1e-4)
            assert figures["l0"] == pytest.approx(expected.l0[hookpoint], rel=1e-6)


@pytest.mark.parametrize("hook", [ATTENTION, OUTPUT])
def test_a_student_with_a_frozen_sae_may_join_a_later_evaluation(hook: Hook) -> None:
    """First a student that adapts the SAE's input is evaluated, then also one that does not."""
    model = small_model("llama")
    row: Splices = (Splice(1, SAES[0], hook),)
    reads_changed, reads_same = (
        LoRAStudent(model, row, LoRAConfig(rank=2, blocks=blocks)) for blocks in ("all", "after")
    )
    evaluate = evaluator(model, cache_bytes=1e9)
    evaluate([reads_changed])
    assert evaluate([reads_changed, reads_same])[1] == evaluator(model)([reads_same])[0]


_SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
OTHERS: dict[str, Callable[[], PreTrainedModel]] = {
    # Norms after attention and MLP, but none before the MLP.
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_SMALL, intermediate_size=48, pad_token_id=0)),
    # Attention and MLP add the residual stream themselves.
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)),
    # The outputs of attention and MLP are scaled before they are added.
    "granite": lambda: GraniteForCausalLM(
        GraniteConfig(**_SMALL, intermediate_size=48, residual_multiplier=0.5)
    ),
    # No module computes the whole MLP.
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=64,
            hidden_size=32,
            word_embed_proj_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=48,
        )
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "olmo2"])
def test_additions_are_found_and_checked(family: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = LanguageModel((FAMILIES | OTHERS)[family]().to(dtype=dtype))  # pyright: ignore[reportCallIssue]
    n_hooks = hooks(model)
    model.check_additions(
        Place(block, hook) for block in range(len(model.blocks)) for hook in (ATTENTION, MLP)
    )
    assert hooks(model) == n_hooks


@pytest.mark.parametrize("family", ["bloom", "granite", "opt"])
@pytest.mark.parametrize("hook", [ATTENTION, MLP])
def test_an_architecture_that_adds_something_else_is_refused(family: str, hook: Hook) -> None:
    torch.manual_seed(0)
    model = LanguageModel(OTHERS[family]())
    n_hooks = hooks(model)
    with pytest.raises(UserError, match=type(model.model).__name__):
        LoRAStudent(model, (Splice(0, topk_sae(), hook),), LoRAConfig(rank=2))
    assert hooks(model) == n_hooks


@pytest.mark.parametrize(
    ("family", "hook", "missing"), [("falcon", MLP, ATTENTION), ("lfm2", ATTENTION, MLP)]
)
def test_only_the_place_of_an_sae_must_be_found(family: str, hook: Hook, missing: Hook) -> None:
    """The module of the other place has a name that is not known."""
    model = LanguageModel(small_causal_model(family))
    model.check_additions([Place(0, hook)])
    with pytest.raises(ConfigError, match=f"layer.hook = '{missing.name}'") as refusal:
        model.module_at(str(Place(0, missing)))
    assert refusal.value.nearest == "resid_post"


def test_the_message_for_an_unknown_hookpoint_names_the_known_ones() -> None:
    model = small_model("llama")
    for name in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_mpl_out"):
        with pytest.raises(ConfigError, match="hook_attn_out or hook_mlp_out") as error:
            model.module_at(name)
        assert error.value.got == name
    for hook in (MLP, OUTPUT):
        with pytest.raises(ConfigError) as error:
            model.module_at(str(Place(N_BLOCKS, hook)))
        assert error.value.nearest == LAST
    with pytest.raises(ConfigError) as error:
        model.module_at("model.layers.1.mpl")
    assert error.value.nearest == "model.layers.1.mlp"
    assert model.name_at(str(Place(1, ATTENTION))) == "model.layers.1.self_attn"
    assert small_model("gemma2").name_at(str(Place(1, MLP))) == (
        "model.layers.1.post_feedforward_layernorm"
    )
