"""The adapters: their places, their initial values and scale, saving and loading."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import Initialisation
from sae_lora.config.lora_targets import adapted_blocks
from sae_lora.config.schema import LoRAConfig
from sae_lora.models import adapter_files, lora
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.matrices import BlockWeight, select
from tests.support.families import N_BLOCKS, random_tokens, small_model
from tests.support.trainings import fill, same


def matrices_of(family: str, targets: object) -> list[BlockWeight]:
    return select(small_model(family), [1], targets).adapted


@pytest.mark.parametrize("blocks", ["after", "all", [2]])
def test_new_adapters_change_nothing(model: LanguageModel, blocks) -> None:
    tokens = random_tokens()
    plain = model.hidden(tokens)
    view = model.view()
    lora.attach(view, LoRAConfig(rank=2, blocks=blocks), first_sae=1)
    assert torch.equal(view.hidden(tokens), plain)
    fill(lora.trainable_weights(view))
    assert not torch.allclose(view.hidden(tokens), plain)
    assert torch.equal(model.hidden(tokens), plain)


@pytest.mark.parametrize(
    ("blocks", "expected"), [("after", {2, 3}), ("all", {0, 1, 2, 3}), ([0, 3], {0, 3})]
)
def test_blocks(model: LanguageModel, blocks, expected: set[int]) -> None:
    lora.attach(model, LoRAConfig(rank=2, blocks=blocks), first_sae=1)
    adapted = {
        block
        for block in range(N_BLOCKS)
        if any(weight.requires_grad for weight in model.blocks[block].parameters())
    }
    assert adapted == expected
    n_trainable = sum(weight.requires_grad for block in model.blocks for weight in block.parameters())
    assert n_trainable == len(lora.trainable_weights(model))


def test_all_adapts_every_matrix_of_a_block(model: LanguageModel) -> None:
    """The number of parameters is rank × (inputs + outputs), summed over the matrices of the blocks."""
    sizes = [
        sum(weight.shape)
        for block in model.blocks
        for name, weight in block.named_parameters()
        if weight.ndim == 2 and "norm" not in name
    ]
    lora.attach(model, LoRAConfig(rank=3, blocks="all"), first_sae=1)
    assert sum(weight.numel() for weight in lora.trainable_weights(model).values()) == 3 * sum(sizes)


def test_targets_by_name() -> None:
    def matrices(targets) -> set[str]:
        weights = matrices_of("llama", targets)
        return {weight.path.rsplit(".", 1)[1].removesuffix("_proj") for weight in weights}

    assert matrices("qv") == {"q", "v"}
    assert matrices("attn") == {"q", "k", "v", "o"}
    assert matrices("mlp") == {"gate", "up", "down"}
    assert matrices(["gate", "o"]) == {"gate", "o"}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_fused_matrices_are_adapted_as_a_whole(family: str) -> None:
    assert len(matrices_of(family, "qkv")) == 1
    assert len(matrices_of(family, "attn")) == 2
    with pytest.raises(ConfigError, match="qkv in one matrix") as error:
        matrices_of(family, "qv")
    assert error.value.nearest == "qkv"
    with pytest.raises(ConfigError, match="no such matrix"):
        matrices_of(family, "gate")
    with pytest.raises(ConfigError, match=r"no such matrix \(gate\)"):
        matrices_of(family, ["gate", "o"])


def test_impossible_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="the last one") as error:
        adapted_blocks("after", first_sae=3, n_blocks=4)
    assert error.value.nearest == "all"
    with pytest.raises(ConfigError) as error:
        adapted_blocks([2, 7], first_sae=1, n_blocks=4)
    assert error.value.nearest == [2]


def test_peft_can_load_saved_adapters(family: str, tmp_path: Path) -> None:
    model, tokens = small_model(family), random_tokens()
    adapters = lora.attach(model, LoRAConfig(rank=2, alpha=3.5, targets="all"), first_sae=0)
    fill(lora.trainable_weights(model))
    adapter_files.save(adapters, tmp_path, "org/base")
    loaded = PeftModel.from_pretrained(small_model(family).model, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(tokens).logits, model.model(tokens).logits)


@pytest.mark.parametrize("stabilised", [False, True])
def test_scale(stabilised: bool) -> None:
    """An adapter adds (alpha / r) · B · A, or (alpha / √r) · B · A if rank-stabilised."""
    model = small_model("llama")
    config = LoRAConfig(rank=4, alpha=6.0, targets="o", blocks=[1], rank_stabilised=stabilised)
    lora.attach(model, config, first_sae=0)
    fill(lora.trainable_weights(model))
    layer = model.blocks[1].self_attn.o_proj
    x = torch.randn(5, layer.in_features)
    scale = 6.0 / (2.0 if stabilised else 4.0)
    added = x @ layer.lora_A.default.weight.T @ layer.lora_B.default.weight.T * scale
    torch.testing.assert_close(layer(x), layer.base_layer(x) + added)


@pytest.mark.parametrize("rank", [3, 100])
def test_adapters_can_begin_with_singular_vectors(model: LanguageModel, rank: int) -> None:
    """The rows of A are then right-singular vectors; rows beyond their number stay random."""
    lora.attach(model, LoRAConfig(rank=rank, init=Initialisation.svd, blocks=[1]), first_sae=0)
    layers = [module for module in model.blocks[1].modules() if isinstance(module, LoraLayer)]
    assert layers
    for layer in layers:
        base = layer.get_base_layer()
        weight = base.weight.detach() if isinstance(base, torch.nn.Linear) else base.weight.detach().T
        rows = layer.lora_A["default"].weight.detach()
        known = min(rank, *weight.shape)
        torch.testing.assert_close(rows[:known] @ rows[:known].T, torch.eye(known) / 3)
        stretched = (weight @ rows[:known].T).norm(dim=0) * 3**0.5
        largest = torch.linalg.svdvals(weight)[:known]
        torch.testing.assert_close(stretched, largest, rtol=1e-2, atol=1e-4)
        assert not layer.lora_B["default"].weight.any()
        assert rows[known:].norm(dim=1).gt(0).all()


def test_initial_values_depend_only_on_the_seed(model: LanguageModel) -> None:
    weights = []
    for seed in (1, 1):
        view = model.view()
        torch.manual_seed(seed)
        lora.attach(view, LoRAConfig(rank=2, init=Initialisation.svd), first_sae=1)
        weights.append({name: weight.detach() for name, weight in lora.trainable_weights(view).items()})
    assert same(*weights)


def test_dora_trains_lengths_separately_from_directions(family: str, tmp_path: Path) -> None:
    """W' = m · (W + s·B·A) / ‖W + s·B·A‖ per output, which is W for new adapters. peft can load it."""
    model, tokens = small_model(family), random_tokens()
    plain = model.model(tokens).logits
    adapters = lora.attach(model, LoRAConfig(rank=2, targets="all", dora=True), first_sae=0)
    torch.testing.assert_close(model.model(tokens).logits, plain, rtol=1e-4, atol=1e-4)
    lengths = [name for name in lora.trainable_weights(model) if "magnitude" in name]
    assert len(lengths) == sum(isinstance(module, LoraLayer) for module in model.model.modules())
    fill(lora.trainable_weights(model))
    changed = model.model(tokens).logits
    assert not torch.allclose(changed, plain)
    adapter_files.save(adapters, tmp_path, "org/base")
    loaded = PeftModel.from_pretrained(small_model(family).model, str(tmp_path)).eval()
    torch.testing.assert_close(loaded(tokens).logits, changed)


def test_adapters_begin_with_saved_ones(tmp_path: Path) -> None:
    model, tokens = small_model("llama"), random_tokens()
    adapters = lora.attach(model, LoRAConfig(rank=2), first_sae=0)
    fill(lora.trainable_weights(model))
    adapter_files.save(adapters, tmp_path, "org/base")
    second = small_model("llama")
    adapter_files.begin_with(lora.attach(second, LoRAConfig(rank=2), first_sae=0), tmp_path)
    assert torch.equal(second.model(tokens).logits, model.model(tokens).logits)
    fewer = lora.attach(small_model("llama"), LoRAConfig(rank=2, targets="qv"), first_sae=0)
    with pytest.raises(UserError, match="other matrices"):
        adapter_files.begin_with(fewer, tmp_path)
    with pytest.raises(UserError, match="cannot be loaded"):
        adapter_files.begin_with(fewer, tmp_path / "nowhere")
