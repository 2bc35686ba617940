"""Configs as the command line composes them."""

from pathlib import Path

from hydra import compose, initialize_config_dir

from sae_lora.composition import checked
from sae_lora.config import Config

CONF = Path(__file__).parent.parent / "conf"


def composed(*overrides: str) -> Config:
    """What `python launch.py *overrides` composes, typed and checked."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(compose("config", overrides=list(overrides)))
