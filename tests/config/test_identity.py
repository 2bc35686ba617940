"""Configs with equal results have equal hashes, for every method; names show the method."""

from dataclasses import replace
from functools import cache

import pytest

from sae_lora.config.enums import Method
from sae_lora.config.identity import identity
from sae_lora.config.schema import Config
from sae_lora.launcher.plan import plan
from tests.support.composing import composed

KINDS = [kind.name for kind in Method]
UNUSED: dict[str, list[str]] = {
    "lora": [
        *("method.rank=3", "method.mse=false", "method.epsilon=1", "method.buffer_tokens=512"),
        "train.checkpoint_every_min=1",
    ],
    "mezo": ["method.rank=3", "train.loraplus_ratio=4", "method.dead_after_tokens=5"],
    "linear_adapter": ["lora.rank=3", "method.epsilon=1", "train.loraplus_ratio=4"],
    "mlp_adapter": ["lora.alpha=1", "lora.blocks=all", "method.buffer_tokens=512"],
    "sae_finetune": ["lora.rank=3", "method.epsilon=1", "method.buffer_tokens=512"],
    "lora_sae": ["method.rank=3", "method.epsilon=1", "method.buffer_tokens=512"],
    "e2e": ["lora.rank=3", "lora.targets=qv", "method.rank=3", "method.mse=false"],
    "sae": [
        *("lora.rank=3", "method.rank=3", "method.mse=false", "method.epsilon=1"),
        *("train.grad_clip=3", "train.weight_decay=0.1", "train.micro_batch_size=1"),
        *("train.kl_reduction=sequence_sum", "train.loraplus_ratio=4"),
    ],
}
USED: dict[str, list[str]] = {
    "lora": ["lora.rank=3", "train.loraplus_ratio=4"],
    "mezo": ["lora.rank=3", "method.epsilon=1", "train.micro_batch_size=1"],
    "linear_adapter": ["method.rank=3"],
    "mlp_adapter": ["method.rank=3"],
    "sae_finetune": ["method.rank=3", "method.mse=false", "method.dead_after_tokens=5"],
    "lora_sae": ["lora.rank=3", "method.lora_lr=1e-3", "method.mse=false", "train.loraplus_ratio=4"],
    "e2e": ["method.dead_after_tokens=5", "method.checkpoints=[0.5]"],
    "sae": ["method.dead_after_tokens=5", "method.buffer_tokens=512", "sae.architecture=gated"],
}


@cache
def known(*overrides: str) -> Config:
    """A config, composed once; tests do not change it."""
    return composed(*overrides)


def name_of(*overrides: str) -> str:
    return plan([known(*overrides)]).runs[0].name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_a_method_does_not_read_change_no_hash(kind: str) -> None:
    plain = identity(known(f"method={kind}"))
    for override in UNUSED[kind]:
        assert identity(known(f"method={kind}", override)) == plain, override


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_a_method_reads_change_the_hash(kind: str) -> None:
    hashes = {identity(known(f"method={kind}", override)) for override in USED[kind]}
    hashes.add(identity(known(f"method={kind}")))
    assert len(hashes) == 1 + len(USED[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_keys_that_a_method_does_not_read_change_no_folder_name(kind: str) -> None:
    """Otherwise the same run would be executed twice."""
    names = {name_of(f"method={kind}", override) for override in UNUSED[kind]}
    assert names == {name_of(f"method={kind}")}


def test_lora_hashes_are_those_of_versions_without_methods() -> None:
    """The group `method` and the keys that were added with it do not change the hash."""
    plain = known()
    method = replace(known("method=e2e", "method.rank=3").method, kind=plain.method.kind, mse=False)
    assert method != plain.method
    assert identity(replace(plain, method=method)) == identity(plain)
    assert identity(replace(plain, init="elsewhere")) == identity(plain)


def test_another_selection_of_matrices_is_another_run_of_adapters_only() -> None:
    """Null, for models in which both versions of the rule select the same, is not hashed."""
    for method in ("lora", "mezo", "e2e"):
        plain = known(f"method={method}")
        other = replace(plain, lora=replace(plain.lora, selection=2))
        assert (identity(other) == identity(plain)) == (method == "e2e")


def test_methods_have_different_hashes() -> None:
    common = ["sae=new", "train.lr=1e-3", "train.batch_size=4"]
    assert identity(known("method=e2e", *common)) != identity(known("method=sae", *common))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lora"])
def test_names_show_method_and_architecture(kind: str) -> None:
    assert f"-{kind}-" in name_of(f"method={kind}")
    if kind in ("e2e", "sae"):
        name = name_of(f"method={kind}", "sae.architecture=gated")
        assert f"-{kind}-gated-" in name
        assert "topk" not in name_of(f"method={kind}")


def test_names_show_the_rank_if_the_method_has_one() -> None:
    assert "-mezo-r3-after-" in name_of("method=mezo", "lora.rank=3")
    assert "-linear_adapter-r3-" in name_of("method=linear_adapter", "method.rank=3")
    assert "-r16" not in name_of("method=linear_adapter")
