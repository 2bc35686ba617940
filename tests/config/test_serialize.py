"""Configs as plain values: the same as OmegaConf gives them."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from sae_lora.config.serialize import as_dict
from tests.support.commands import REPOSITORY
from tests.support.composing import composed

EXPERIMENTS = sorted(Path(REPOSITORY / "conf/experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", [path.stem for path in EXPERIMENTS])
def test_plain_values_are_those_of_omegaconf(name: str) -> None:
    """Whole numbers of keys that take fractions, enums, lists and groups included."""
    config = composed(f"experiment={name}", "lora.alpha=3", "lora.targets=[q,v]", "train.warmup_share=0")
    config.lora.alpha = 3  # code may set a whole number
    expected = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    plain = as_dict(config)
    assert plain == expected
    assert OmegaConf.to_yaml(plain) == OmegaConf.to_yaml(expected)
