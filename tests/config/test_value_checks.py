"""Values that cannot be together are refused, with the field to change."""

import pytest

from sae_lora.common.errors import ConfigError
from tests.support.composing import with_values

IN_BFLOAT16 = "train.adapter_products=bfloat16", "train.dtype=bfloat16"
DIVIDED = "launcher.gpus_per_node=2", "launcher.shard=on", "train.batch_size=4"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ((*DIVIDED, "train.stack=on"), "train.stack"),
        ((*DIVIDED, "train.compile=on"), "train.compile"),
        (("train.compile=perhaps",), "train.compile"),
        (("train.compile=on", "train.activation_checkpointing=true"), "train.compile"),
        (("train.compile=on", "method.kind=sae", "sae.family=new", "init=null"), "train.compile"),
        (("train.adapter_products=int8",), "train.adapter_products"),
        (("train.adapter_products=bfloat16",), "train.adapter_products"),
        ((*IN_BFLOAT16, "lora.dora=true"), "train.adapter_products"),
        ((*IN_BFLOAT16, "method.kind=mezo"), "train.adapter_products"),
        ((*IN_BFLOAT16, "train.stack=off"), "train.adapter_products"),
    ],
)
def test_ways_through_the_model_that_cannot_be(values: tuple[str, ...], field: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        with_values(*values)
    assert refusal.value.field == field
    with_values(*values, f"{field}={refusal.value.nearest}")


@pytest.mark.parametrize(
    ("values", "gpu", "expected"),
    [
        ((), True, (True, True, "float32")),
        (("train.dtype=bfloat16",), True, (True, True, "bfloat16")),
        (("train.dtype=bfloat16",), False, (False, False, "float32")),
        (IN_BFLOAT16, False, (True, False, "bfloat16")),
        (("train.deterministic=true",), True, (False, False, "float32")),
        (("train.activation_checkpointing=true",), True, (False, False, "float32")),
        (("train.compile=on",), False, (False, True, "float32")),
    ],
)
def test_the_way_by_default(
    values: tuple[str, ...], gpu: bool, expected: tuple[bool, bool, str]
) -> None:
    train = with_values(*values).train
    chosen = train.stacks_on(gpu=gpu), train.compiles_on(gpu=gpu), train.products_on(gpu=gpu).name
    assert chosen == expected
