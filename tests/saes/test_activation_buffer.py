"""The activation buffer serves each activation once, shuffled, and the same after a resume."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.models.language_model import LanguageModel
from sae_lora.saes.training.activation_buffer import ActivationBuffer
from sae_lora.splice.mlp_input import Stream
from sae_lora.splice.positions import NOT_SPECIAL, Special
from tests.support.families import D_MODEL, N_BLOCKS, random_tokens, small_model

BATCH, LENGTH, PER_FILL = 3, 16, 5
SPECIAL = Special((3, 5, 60))
POST = [f"blocks.{block}.hook_resid_post" for block in range(N_BLOCKS)]


def batches(first: int = 0) -> Iterator[Tensor]:
    """Endless text, from the batch with this number on."""
    while True:
        yield random_tokens(BATCH, LENGTH, seed=1000 + first)
        first += 1


def buffer(
    model: LanguageModel,
    sources: Mapping[str, Sequence[str]] | None = None,
    special: Special = NOT_SPECIAL,
    seed: int = 0,
) -> ActivationBuffer:
    sources = sources or {"sae": [POST[1]]}
    streams = {name: [Stream(hookpoint) for hookpoint in each] for name, each in sources.items()}
    return ActivationBuffer(model, streams, special, seed, PER_FILL)


def served(buffer: ActivationBuffer, first: int, last: int, name: str = "sae") -> list[Tensor]:
    """The parts of the steps from `first` to before `last`."""
    text = batches(buffer.first_batch_of(first))
    return [buffer.serve(step, text)[name] for step in range(first, last)]


def takes(parts: Sequence[Tensor], at_block: Tensor) -> list[bool]:
    """For each of a block's activations `[token, d]`: true if it was served."""
    served_rows = bag(torch.cat([*parts]))
    return [row.numpy().tobytes() in served_rows for row in at_block]


def bytes_held(buffer: ActivationBuffer) -> int:
    return sum(held.nbytes for held in buffer._held.values())


def bag(rows: Tensor) -> Counter[bytes]:
    """Activations `[token, d]` with the number of times that each occurs."""
    return Counter(row.numpy().tobytes() for row in rows)


def direct(model: LanguageModel, block: int, fill: int, special: Special = NOT_SPECIAL) -> Tensor:
    """The output of a block in the model's forward pass, over the batches of a fill, `[token, d]`."""
    resids = []
    for tokens in islice(batches(fill * PER_FILL), PER_FILL):
        outputs: list[Tensor] = []

        def take(
            module: object, arguments: object, output: Any, outputs: list[Tensor] = outputs
        ) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handle = model.blocks[block].register_forward_hook(take)
        with torch.no_grad():
            model.model(input_ids=tokens)
        handle.remove()
        resids.append(outputs[0][~special.positions(tokens, outputs[0])])
    return torch.cat(resids)


@pytest.mark.parametrize("block", range(N_BLOCKS))
def test_each_activation_of_a_fill_is_served_once(model: LanguageModel, block: int) -> None:
    activations = buffer(model, {"sae": [POST[block]]})
    text = batches()
    for fill in range(2):
        parts = [activations.serve(PER_FILL * fill + part, text)["sae"] for part in range(PER_FILL)]
        assert {part.shape for part in parts} == {(BATCH * LENGTH, D_MODEL)}
        assert bag(torch.cat(parts)) == bag(direct(model, block, fill))


def test_special_positions_are_left_out_and_the_remainder_is_dropped() -> None:
    model = small_model("gpt2")
    activations = buffer(model, special=SPECIAL)
    dropped = []
    for fill in range(3):
        expected = direct(model, 1, fill, SPECIAL)
        assert len(expected) < PER_FILL * BATCH * LENGTH
        parts = served(activations, PER_FILL * fill, PER_FILL * (fill + 1))
        assert {len(part) for part in parts} == {len(expected) // PER_FILL}
        served_rows = bag(torch.cat(parts))
        assert served_rows <= bag(expected)
        dropped.append(len(expected) - served_rows.total())
        assert dropped[-1] == len(expected) % PER_FILL
    assert any(dropped)


def test_each_fill_has_another_order_that_follows_the_seed() -> None:
    model = small_model("llama")
    same_text = [random_tokens(BATCH, LENGTH, seed=1000 + number) for number in range(PER_FILL)]

    def fills(seed: int) -> tuple[Tensor, Tensor]:
        activations, text = buffer(model, seed=seed), chain(same_text, same_text)
        parts = [activations.serve(step, text)["sae"] for step in range(2 * PER_FILL)]
        return torch.cat(parts[:PER_FILL]), torch.cat(parts[PER_FILL:])

    first, second = fills(0)
    unshuffled = direct(model, 1, 0)
    assert bag(first) == bag(second) == bag(unshuffled)
    orders = [unshuffled, first, second, fills(1)[0]]
    for index, order in enumerate(orders):
        assert not any(torch.equal(order, earlier) for earlier in orders[:index])
    assert torch.equal(fills(0)[1], second)
    # Every part has activations of every batch.
    of_batch = [bag(rows) for rows in unshuffled.split(BATCH * LENGTH)]
    assert all(
        (bag(part) & activations) for part in first.split(BATCH * LENGTH) for activations in of_batch
    )


@pytest.mark.parametrize("special", [NOT_SPECIAL, SPECIAL])
@pytest.mark.parametrize("step", [0, 3, PER_FILL, 2 * PER_FILL - 1])
def test_a_buffer_resumed_at_any_step_serves_the_same(special: Special, step: int) -> None:
    model = small_model("llama")
    sources = {"sae": [POST[2]], "mixed": POST[:3]}
    for name in sources:
        expected = served(buffer(model, sources, special), 0, 3 * PER_FILL, name)
        resumed = buffer(model, sources, special)
        assert resumed.first_batch_of(step) == PER_FILL * (step // PER_FILL)
        parts = served(resumed, step, 3 * PER_FILL, name)
        for ours, theirs in zip(parts, expected[step:], strict=True):
            assert torch.equal(ours, theirs)


def test_it_never_holds_more_than_one_fill() -> None:
    model = small_model("llama")
    activations = buffer(model, {"sae": [POST[1]], "the same": [POST[1]], "mixed": POST[1:3]})
    assert bytes_held(activations) == 0
    text = batches()
    addresses = set()
    for step in range(3 * PER_FILL):
        parts = activations.serve(step, text)
        assert bytes_held(activations) == 2 * PER_FILL * BATCH * LENGTH * D_MODEL * 4
        addresses.add(tuple(held.data_ptr() for held in activations._held.values()))
        assert parts["sae"] is parts["the same"]
    assert len(addresses) == 1  # each fill overwrites the last one


def test_it_holds_the_models_precision() -> None:
    model = LanguageModel(small_model("llama").model.to(torch.bfloat16))  # pyright: ignore
    activations = buffer(model)
    (part,) = served(activations, 0, 1)
    assert part.dtype == torch.bfloat16
    assert bytes_held(activations) == PER_FILL * BATCH * LENGTH * D_MODEL * 2


def test_it_reads_one_fill_at_a_time_and_only_the_blocks_it_needs() -> None:
    model = small_model("llama")
    passes: Counter[int] = Counter()
    for block, module in enumerate(model.blocks):
        module.register_forward_hook(lambda *_, block=block: passes.update([block]))
    activations = buffer(model, {"sae": [POST[0]], "mixed": [POST[1], POST[2]]})
    text = batches()
    for step in range(PER_FILL + 1):
        activations.serve(step, text)
        fills = 1 + step // PER_FILL
        assert passes == dict.fromkeys(range(3), PER_FILL * fills)
    assert [len(module._forward_hooks) for module in model.blocks] == [1] * N_BLOCKS


@pytest.mark.parametrize("special", [NOT_SPECIAL, SPECIAL])
def test_each_token_takes_one_of_several_blocks(special: Special) -> None:
    model = small_model("llama")
    sources = {"early": POST[:3], "late": POST[2:], "early too": POST[:3]}
    activations = buffer(model, sources, special)
    text = batches()
    parts = [activations.serve(step, text) for step in range(PER_FILL)]
    at_block = [direct(model, block, 0, special) for block in range(N_BLOCKS)]
    for name, blocks in (("early", (0, 1, 2)), ("late", (2, 3))):
        served_rows = bag(torch.cat([part[name] for part in parts]))
        share = len(at_block[0]) // len(blocks)
        counts = [(served_rows & bag(at_block[block])).total() for block in blocks]
        assert sum(counts) == served_rows.total()
        assert all(0.7 * share < count < 1.3 * share for count in counts)
        # Each token occurs once: its activations at two blocks are never both served.
        taken = [takes([part[name] for part in parts], at_block[block]) for block in blocks]
        dropped = len(at_block[0]) % PER_FILL
        repeated = len(at_block[0]) - len(bag(at_block[0]))  # a token that begins two sequences
        assert sum(sum(of_token) != 1 for of_token in zip(*taken, strict=True)) <= dropped + 2 * repeated
    assert all(torch.equal(part["early"], part["early too"]) for part in parts)


def test_the_block_of_a_token_is_drawn_for_each_fill_and_group() -> None:
    model = small_model("llama")
    activations = buffer(model, {"early": POST[:2], "late": POST[2:]})
    text = [random_tokens(BATCH, LENGTH, seed=1000 + number) for number in range(PER_FILL)]
    batches_twice = chain(text, text)
    parts = [activations.serve(step, batches_twice) for step in range(2 * PER_FILL)]
    choices = [
        takes([part["early"] for part in parts[:PER_FILL]], direct(model, 0, 0)),
        takes([part["early"] for part in parts[PER_FILL:]], direct(model, 0, 0)),
        takes([part["late"] for part in parts[:PER_FILL]], direct(model, 2, 0)),
    ]
    for index, choice in enumerate(choices):
        for earlier in choices[:index]:
            equal = sum(ours == theirs for ours, theirs in zip(choice, earlier, strict=True))
            assert 0.35 < equal / len(choice) < 0.65


def test_the_activations_of_a_group_do_not_depend_on_other_groups() -> None:
    model = small_model("llama")
    expected = served(buffer(model, {"sae": POST[:3]}), 0, PER_FILL)
    sources = {"a": [POST[3]], "sae": POST[:3], "z": POST[1:]}
    parts = served(buffer(model, sources), 0, PER_FILL)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(expected, parts, strict=True))


def test_module_names_and_resid_pre_are_hookpoints() -> None:
    model = small_model("gpt_neox")
    module = f"{model.name_at(POST[2])}.mlp"
    activations = buffer(model, {"sae": [module], "before": ["blocks.2.hook_resid_pre"]})
    parts = [activations.serve(step, text)["before"] for text in [batches()] for step in range(PER_FILL)]
    assert bag(torch.cat(parts)) == bag(direct(model, 1, 0))
    shapes = {group[0].hookpoint: held.shape for group, held in activations._held.items()}
    assert shapes[module] == shapes["blocks.2.hook_resid_pre"]


def test_impossible_requests_are_refused() -> None:
    model = small_model("llama")
    with pytest.raises(ConfigError, match="a block from 0 to 3"):
        buffer(model, {"sae": [POST[0], "blocks.4.hook_resid_post"]})
    everything = Special(tuple(range(96)))
    with pytest.raises(UserError, match="too few for 5 steps"):
        served(buffer(model, special=everything), 0, 1)
    activations = buffer(model)
    served(activations, 0, 1)
    with pytest.raises(ValueError, match="fill 2, but the buffer is at 0"):
        activations.serve(2 * PER_FILL, batches())
    uneven = iter([random_tokens(3, 16), random_tokens(2, 16)])
    with pytest.raises(ValueError, match=r"shape \[2, 16\], expected \[3, 16\]"):
        buffer(model).serve(0, uneven)
