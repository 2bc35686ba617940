"""Small points of the embedded default, and runs of them."""

from collections.abc import Callable
from pathlib import Path

from sae_lora.config.schema import Config
from sae_lora.launcher.plan import plan
from sae_lora.records.folder import RunFolder
from sae_lora.run import execute
from tests.support.composing import composed

SMALL = (
    "train.train_tokens=1024",
    "train.batch_size=4",
    "train.eval_every_tokens=512",
    "data.validation_tokens=1024",
    "lora.rank=2",
    "tracking=disabled",
)

Point = Callable[..., Config]
"""Composes a small point with overrides; its run is written into the folder of the test."""


def points_in(home: Path) -> Point:
    """Points whose runs are written into this folder."""

    def compose(*overrides: str) -> Config:
        # The folder is inserted afterwards, so that `composed` can cache the config.
        config = composed(*SMALL, "output_dir=/HOME", "data.cache_dir=/HOME/cache", *overrides)
        config.output_dir = config.output_dir.replace("/HOME", str(home))
        config.data.cache_dir = config.data.cache_dir.replace("/HOME", str(home))
        return config

    return compose


def run_here(*points: Config) -> list[RunFolder]:
    """Run the points together in this process and return their folders."""
    runs = plan(points).runs
    for planned in runs:
        planned.freeze()
    folders = [planned.folder for planned in runs]
    assert execute.attempt(folders) == 0
    return folders


def folders_in(home: Path) -> list[RunFolder]:
    """The run folders of the sweep `main`."""
    return [RunFolder(path.parent) for path in sorted(home.glob("main/*/config.yaml"))]
