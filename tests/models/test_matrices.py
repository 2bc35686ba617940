"""The matrices of a block: selected or listed as frozen, and what is adapted is what was selected."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch.nn import functional

from sae_lora.common.errors import ConfigError, UserError
from sae_lora.config.enums import Initialisation
from sae_lora.config.lora_targets import selection_version
from sae_lora.config.schema import LoRAConfig
from sae_lora.models import adapter_files, lora, matrices
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.matrices import select
from tests.support.architectures import ARCHITECTURES, tiny_model, tiny_shapes
from tests.support.families import FAMILIES, random_tokens, small_model
from tests.support.tiny_models import small_causal_model
from tests.support.trainings import fill

BLOCKS = [0, 2, 3]
FROZEN: dict[str, dict[str, int]] = {
    "qwen3_moe": {"mlp.gate": 1},
    "olmoe": {"mlp.gate": 3},
    "mixtral": {"mlp.gate": 3},
    "gpt_oss": {"mlp.router": 3, "mlp.experts.gate_up_proj_bias": 3, "mlp.experts.down_proj_bias": 3},
    "granitemoe": {"block_sparse_moe.router": 3},
    "deepseek_v3": {"mlp.gate": 2},
    "qwen2_moe": {"mlp.gate": 3, "mlp.shared_expert_gate": 3},
    "qwen3_next": {"linear_attn.conv1d": 2, "mlp.gate": 3, "mlp.shared_expert_gate": 3},
    "qwen3_5_text": {"linear_attn.conv1d": 2},
    "lfm2": {"conv.conv": 2},
    "jamba": {
        "mamba.A_log": 2,
        "mamba.conv1d": 2,
        "mamba.dt_proj": 2,
        "feed_forward.router": 1,
    },
    "nemotron_h": {"mixer.conv1d": 1, "mixer.out_proj": 1},
}
"""Weights that `all` leaves out in these blocks, where there are any."""


def model_of(architecture: str) -> LanguageModel:
    return small_model(architecture) if architecture in FAMILIES else tiny_model(architecture)


def paths(architecture: str, targets: object, blocks: Sequence[int] = (0, 1, 2, 3)) -> set[str]:
    return {weight.path for weight in select(tiny_shapes(architecture), blocks, targets).adapted}


@pytest.mark.parametrize("architecture", [*FAMILIES, *ARCHITECTURES])
@pytest.mark.case("A2")
def test_what_is_adapted_is_what_was_planned(architecture: str) -> None:
    """Every weight of two or more dimensions is adapted or listed, none outside of the blocks is."""
    config = LoRAConfig(rank=2, blocks=BLOCKS, init=Initialisation.svd)
    model = model_of(architecture)
    shapes = model if architecture in FAMILIES else tiny_shapes(architecture)
    planned = lora.selection(shapes, config, first_sae=0)
    names = {id(module): name for name, module in model.model.named_modules()}
    of_blocks = {
        f"{names[id(model.blocks[block])]}.{name}"
        for block in BLOCKS
        for name, weight in model.blocks[block].named_parameters()
        if weight.dim() >= 2
    }
    adapted, frozen = ({weight.name for weight in part} for part in planned)
    assert adapted | frozen == of_blocks and not adapted & frozen
    assert planned.left_out == FROZEN.get(architecture, {})

    tokens = random_tokens()
    plain = model.model(tokens).logits
    lora.attach(model, config, first_sae=0)
    torch.testing.assert_close(model.model(tokens).logits, plain, rtol=1e-4, atol=1e-4)
    layers = {
        lora.adapted_weight(name, layer)
        for name, layer in model.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert layers == adapted
    trained = sum(weight.numel() for weight in lora.trainable_weights(model).values())
    assert trained == sum(weight.adapter_weights(2, dora=False) for weight in planned.adapted)
    assert lora.selection(model, config, first_sae=0) == planned  # also of a model with adapters


@pytest.mark.case("A1")
def test_deepseek_with_the_published_recipe_adapts_its_mlps_and_experts_in_two_blocks() -> None:
    """peft has no dropout for experts; without it, dense and shared MLPs are adapted where asked."""
    published = LoRAConfig(rank=2, alpha=32, dropout=0.1, blocks=[1, 3], rank_stabilised=False)
    published.init = Initialisation.kaiming
    with pytest.raises(ConfigError, match="no dropout for the weights of experts") as error:
        lora.selection(tiny_shapes("deepseek_v3"), published, first_sae=0)
    assert (error.value.field, error.value.nearest) == ("lora.dropout", 0)
    published.dropout = 0
    model = tiny_model("deepseek_v3")
    lora.attach(model, published, first_sae=0)
    adapted = {(matrix.block, matrix.kind.partition("[")[0]) for matrix in lora.adapted_matrices(model)}
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    mlp = ("gate_proj", "up_proj", "down_proj")
    assert adapted == {
        *((block, f"self_attn.{name}") for block in (1, 3) for name in attention),
        *((1, f"mlp.{name}") for name in mlp),
        *((3, f"mlp.shared_experts.{name}") for name in mlp),
        *((3, f"mlp.experts.{name}") for name in ("gate_up_proj", "down_proj")),
    }
    published.targets, published.dropout = "attn", 0.1
    lora.attach(tiny_model("deepseek_v3"), published, first_sae=0)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3", "phi"])
def test_dora_is_refused_for_experts_only(architecture: str) -> None:
    config = LoRAConfig(rank=2, dora=True, blocks="all")
    if architecture == "phi":
        lora.attach(tiny_model(architecture), config, first_sae=0)
        return
    with pytest.raises(ConfigError, match="no DoRA") as error:
        lora.attach(tiny_model(architecture), config, first_sae=0)
    assert "mlp.experts.gate_up_proj" in error.value.allowed


@pytest.mark.parametrize(
    ("architecture", "targets", "expected"),
    [
        ("phi", "o", {"self_attn.dense"}),
        ("phi", ["up", "down"], {"mlp.fc1", "mlp.fc2"}),
        ("gptj", "mlp", {"mlp.fc_in", "mlp.fc_out"}),
        ("gptj", "up", {"mlp.fc_in"}),
        ("falcon", "qkv", {"self_attention.query_key_value"}),
        ("lfm2", "gate", {"feed_forward.w1"}),
        ("lfm2", "o", {"conv.out_proj", "self_attn.out_proj"}),
        ("lfm2", "qkv", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        ("deepseek_v3", "q", {"self_attn.q_a_proj", "self_attn.q_b_proj"}),
        ("qwen3_5_text", "qv", None),
        ("qwen3_5_text", ["*.in_proj_qkv", "k"], {"linear_attn.in_proj_qkv", "self_attn.k_proj"}),
        ("qwen3_next", "o", {"linear_attn.out_proj", "self_attn.o_proj"}),
        ("qwen3_moe", "gate", None),
        ("qwen3_moe", ["gate", "up"], {"mlp.gate_proj", "mlp.up_proj", "mlp.experts.gate_up_proj"}),
        ("qwen3_moe", "down", {"mlp.down_proj", "mlp.experts.down_proj"}),
        ("gpt_oss", "mlp", {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
        ("jamba", "o", {"mamba.out_proj", "self_attn.o_proj"}),
        ("nemotron_h", "up", {"mixer.up_proj", "mixer.experts.up_proj", "mixer.shared_experts.up_proj"}),
        # Patterns of paths, and of their ends; they also select routers.
        ("phi", "self_attn.*_proj", {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}),
        ("qwen3_5_text", "*.in_proj_?", {f"linear_attn.in_proj_{letter}" for letter in "zba"}),
        ("qwen3_moe", ["o", "mlp.gate"], {"self_attn.o_proj", "mlp.gate"}),
        ("gpt_oss", "mlp.*", {"mlp.router", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"}),
    ],
)
def test_targets_by_role_and_pattern(
    architecture: str, targets: object, expected: set[str] | None
) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="in one matrix"):
            paths(architecture, targets)
    else:
        assert paths(architecture, targets) == expected


@pytest.mark.parametrize(
    ("architecture", "targets", "because", "nearest"),
    [
        ("phi", "self_atn.q_proj", "no matrix self_atn.q_proj", "self_attn.q_proj"),
        ("phi", ["o", "mlp.fc3"], "no matrix mlp.fc3", "[o,mlp.fc2]"),
        ("phi", "gate", "no such matrix", None),
        ("lfm2", "conv.conv", "no adapter fits conv.conv", "conv.in_proj"),
        ("jamba", "mamba.A_*", "no adapter fits mamba.A_log", None),
        ("nemotron_h", ["all", "mixer.out_proj"], "no adapter fits mixer.out_proj", None),
    ],
)
def test_a_target_that_selects_nothing_is_refused(
    architecture: str, targets: object, because: str, nearest: str | None
) -> None:
    with pytest.raises(ConfigError) as error:
        paths(architecture, targets)
    assert because in str(error.value)
    if nearest is not None:
        assert error.value.nearest == nearest


@pytest.mark.case("A2")
@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("phi", ["mlp.fc3", "foo_bar", "o"]), ("jetmoe", "k"), ("jetmoe", "qv"), ("qwen3_5_text", "qv")],
)
def test_the_nearest_targets_are_accepted(model_type: str, targets: object) -> None:
    model = LanguageModel(small_causal_model(model_type))
    with pytest.raises(ConfigError) as error:
        select(model, range(4), targets)
    nearest = str(error.value.nearest)
    mended = nearest.strip("[]").split(",") if nearest.startswith("[") else nearest
    assert select(model, range(4), mended).adapted


def test_matrices_that_read_the_residual_stream() -> None:
    reading = {
        architecture: {
            weight.path
            for weight in matrices.block_weights(tiny_shapes(architecture), range(4))
            if weight.reads_stream
        }
        for architecture in ("deepseek_v3", "gpt_oss", "qwen3_5_text", "gptj", "jamba")
    }
    assert reading["gptj"] == {"attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"}
    assert reading["gpt_oss"] == {
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *("mlp.router", "mlp.experts.gate_up_proj"),
    }
    assert {path for path in reading["deepseek_v3"] if "self_attn" in path} == {
        *("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    }
    assert {path for path in reading["jamba"] if "mamba" in path} == {"mamba.in_proj"}
    assert "linear_attn.out_proj" not in reading["qwen3_5_text"]
    assert "linear_attn.in_proj_b" in reading["qwen3_5_text"]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_delta_of_experts_is_the_change_of_merged_weights(architecture: str) -> None:
    model, plain = tiny_model(architecture), dict(tiny_model(architecture).model.named_parameters())
    adapters = lora.attach(model, LoRAConfig(rank=2, alpha=3, blocks=[3]), first_sae=0)
    fill(lora.trainable_weights(model))
    # Merging changes the weights in place, of which these are views.
    deltas = {
        matrix.name: matrix._replace(weight=matrix.weight.clone())
        for matrix in lora.adapted_matrices(model)
    }
    assert adapters.merge_and_unload() is model.model  # pyright: ignore[reportCallIssue]
    merged = dict(model.model.named_parameters())
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.3.mlp.experts.{part}"
        for expert in range(4):
            matrix = deltas[f"{name}[{expert}]"]
            changes = merged[name][expert] - plain[name][expert]
            weight = plain[name][expert]
            if architecture == "gpt_oss":
                changes, weight = changes.T, weight.T
            torch.testing.assert_close(matrix.delta, changes, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(matrix.delta, matrix.scale * matrix.b @ matrix.a)
            assert torch.equal(matrix.weight, weight)
            assert matrix.reads_stream == (part == "gate_up_proj")


def test_experts_can_begin_with_singular_vectors() -> None:
    model = tiny_model("gpt_oss")
    lora.attach(model, LoRAConfig(rank=3, init=Initialisation.svd, targets="mlp", blocks=[1]), 0)
    experts = list(lora.adapted_matrices(model))
    assert len(experts) == 8
    for expert in experts:
        torch.testing.assert_close(expert.a @ expert.a.T, torch.eye(3) / 3)
        stretched = (expert.weight @ expert.a.T).norm(dim=0) * 3**0.5
        torch.testing.assert_close(
            stretched, torch.linalg.svdvals(expert.weight)[:3], rtol=1e-2, atol=1e-4
        )


@pytest.mark.parametrize("architecture", ["deepseek_v3", "gpt_oss", "qwen3_next"])
def test_adapters_of_experts_are_saved_and_loaded(architecture: str, tmp_path: Path) -> None:
    """By peft alone, by `load`, and as initial values; files and model name the same matrices."""
    model, tokens = tiny_model(architecture), random_tokens()
    config = LoRAConfig(rank=2, alpha=3, blocks=[1, 3])
    adapters = lora.attach(model, config, first_sae=0)
    fill(lora.trainable_weights(model))
    changed = model.model(tokens).logits
    adapter_files.save(adapters, tmp_path, "org/base")
    by_peft = PeftModel.from_pretrained(tiny_model(architecture).model, str(tmp_path)).eval()
    torch.testing.assert_close(by_peft(tokens).logits, changed)
    loaded, begun = tiny_model(architecture), tiny_model(architecture)
    adapter_files.load(loaded, tmp_path)
    adapter_files.begin_with(lora.attach(begun, config, first_sae=0), tmp_path)
    for other in (loaded, begun):
        assert torch.equal(other.model(tokens).logits, changed)
    in_model = {matrix.name: matrix.a for matrix in lora.adapted_matrices(loaded)}
    assert {name for name, _ in adapter_files.saved_inputs(tmp_path)} == in_model.keys()
    for name, a in in_model.items():
        assert torch.equal(adapter_files.saved_a(tmp_path, name), a), name


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys")
def test_weights_that_peft_adapts_beside_the_selected_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the knowledge that peft renames `gate_proj`, it would adapt experts of every block."""
    monkeypatch.setattr(matrices, "_is_renamed", lambda *_: False)
    with pytest.raises(UserError, match=r"not adapt exactly .* model\.layers\.2\.mlp\.experts"):
        lora.attach(tiny_model("deepseek_v3"), LoRAConfig(rank=2, blocks=[1, 3]), first_sae=0)


def test_a_module_that_the_forward_pass_does_not_call_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a fused kernel does, the MLP of block 2 reads the weight of `up_proj` itself."""
    model = small_model("llama")
    mlp = model.blocks[2].mlp

    def fused(x: torch.Tensor) -> torch.Tensor:
        return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * functional.linear(x, mlp.up_proj.weight))

    monkeypatch.setattr(mlp, "forward", fused)
    with pytest.raises(ConfigError, match="does not call these modules") as error:
        lora.attach(model, LoRAConfig(rank=2, blocks=[1, 2]), first_sae=0)
    assert error.value.allowed == "matrices without model.layers.*.mlp.up_proj"
    lora.attach(small_model("llama"), LoRAConfig(rank=2, blocks=[1, 2]), first_sae=0)


def test_a_module_of_several_blocks_is_adapted_only_with_all_of_them() -> None:
    model = small_model("llama")
    model.blocks[2].mlp = model.blocks[1].mlp
    alone, both = (select(model, blocks, "all") for blocks in ([1], [1, 2]))
    assert alone.left_out == dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), 1)
    assert both.left_out == {}
    assert len(both.adapted) == 4 + 4 + 3


def test_runs_of_models_with_another_selection_have_another_hash() -> None:
    same = {small_model(family).model.config.model_type for family in FAMILIES}
    assert {selection_version(name) for name in same} == {None}
    assert {selection_version(name) for name in ARCHITECTURES} == {2}
