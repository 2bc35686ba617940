"""Compose runs with Hydra, and launch them all.

python launch.py                          the main job on the embedded default
python launch.py -m lora.rank=1,4,16,64   a sweep
python launch.py --help                   the config groups and every key
"""

import sys

import hydra
from omegaconf import DictConfig

from sae_lora.config.compose import checked, is_dispatched_by_hydra, main
from sae_lora.launch import launcher

points: list[DictConfig] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def compose(composed: DictConfig) -> float | None:
    """Collect the point; for another Hydra launcher or sweeper, run it at once."""
    if is_dispatched_by_hydra():
        return launcher.run_now(checked(composed))
    points.append(composed)
    return None


if __name__ == "__main__":
    sys.exit(main(compose, lambda: launcher.launch([checked(point) for point in points])))
