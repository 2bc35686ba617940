"""An adaptive sweeper of Hydra's for tests."""

import os
from pathlib import Path

_SWEEPER = """
from dataclasses import dataclass
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


class Halving(Sweeper):
    '''Tries two learning rates, and then the mean of the better one and its half.'''

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        def gaps(rates, first):
            points = [[*arguments, f"train.lr={rate}"] for rate in rates]
            jobs = self.launcher.launch(points, initial_job_idx=first)
            return [job.return_value for job in jobs]

        rates = [1e-4, 2e-3]
        results = gaps(rates, 0)
        best = rates[results.index(min(results))]
        print("best of two", best, "then", 0.75 * best, gaps([0.75 * best], 2))


@dataclass
class HalvingConf:
    _target_: str = "hydra_plugins.halving.Halving"


ConfigStore.instance().store(group="hydra/sweeper", name="halving", node=HalvingConf, provider="test")
"""


def with_sweeper(folder: Path) -> dict[str, str]:
    """Install `hydra/sweeper=halving` in a folder; return the environment variables that find it.

    It launches two trials, and then a third that depends on their results.
    """
    (folder / "hydra_plugins").mkdir(parents=True)
    (folder / "hydra_plugins/halving.py").write_text(_SWEEPER)
    return {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
