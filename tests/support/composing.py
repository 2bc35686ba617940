"""Configs as the command line composes them."""

import copy
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from sae_lora.config.compose import checked, with_quoted_text
from sae_lora.config.schema import Config

CONF = Path(__file__).parents[2] / "conf"


def composed(*overrides: str) -> Config:
    """The config that `python launch.py *overrides` composes, typed and checked; a fresh copy."""
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return checked(compose("config", overrides=list(map(with_quoted_text, overrides))))


def with_values(*overrides: str) -> Config:
    """The config with these values, in a third of the time; it cannot choose config groups."""
    return checked(OmegaConf.merge(_default(), OmegaConf.from_dotlist(list(overrides))))


@functools.cache
def _default() -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config")


def combinations(experiment: str) -> list[tuple[str, ...]]:
    """The overrides of every point of the sweep `python launch.py experiment=…`."""
    file = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())
    swept = file["hydra"]["sweeper"]["params"].items()
    keys = [[f"{key}={value}" for value in str(values).split(",")] for key, values in swept]
    return [(f"experiment={experiment}", *combination) for combination in itertools.product(*keys)]


def each_composed(points: Iterable[Sequence[str]], *overrides: str) -> list[Config]:
    """The config of each point, with the overrides."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return [checked(compose("config", overrides=[*point, *overrides])) for point in points]
