"""Steps on a GPU, counted without one: waits for the device, and memory against the estimate."""

import pytest

from sae_lora.config.schema import TrainConfig
from tests.support.fake_cuda import Case, Counted, compiler, count

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(compiler() is None, reason="the stand-in for CUDA needs a C++ compiler"),
]
WIDE = 524_288
ONE_BATCH = {"data.validation_tokens": TrainConfig().eval_batch_tokens}
UNCOMPILED = {"train.compile": "off", **ONE_BATCH}
CASES = {
    "Gemma-2, a pack around two wide SAEs": Case(
        "small-gemma-2", (1, 256), saes=2, width=WIDE, overrides=UNCOMPILED
    ),
    "Gemma-2, a wide SAE is live": Case(
        "small-gemma-2", (16,), width=WIDE, overrides={"lora.blocks": "all", **UNCOMPILED}
    ),
    "Llama, blocks computed again, four sequences": Case(
        "small-llama", (16,), batch=4, overrides={"train.activation_checkpointing": True, **ONE_BATCH}
    ),
    "Llama, compiled": Case("small-llama", (16,), overrides=ONE_BATCH),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Counted]:
    return dict(zip(CASES, count(list(CASES.values()), tmp_path_factory.mktemp("counts")), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_at_most_once_for_each_sparse_sae(name: str, counted: dict[str, Counted]) -> None:
    case, waits = CASES[name], counted[name].waits
    assert sum(waits.values()) == (case.saes if case.width == WIDE else 0), waits


@pytest.mark.parametrize("name", CASES)
def test_memory_is_as_estimated(name: str, counted: dict[str, Counted]) -> None:
    assert counted[name].estimated == pytest.approx(counted[name].peak, rel=0.1)


@pytest.mark.parametrize("name", CASES)
def test_a_machine_without_a_gpu_plans_as_one_with_it(name: str, counted: dict[str, Counted]) -> None:
    assert counted[name].planned == counted[name].estimated
