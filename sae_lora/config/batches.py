"""Hydra's launcher for this package: it composes each batch of a sweeper, and hands it over as a whole.

So the points of any sweeper are planned together, share packs and go to SLURM.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

Batch = Callable[[Iterable[DictConfig], bool], Sequence[Any]]
"""Launches composed points, and returns the result of each: a value, or the error of its run. It is also
told whether the sweeper is an adaptive one, which needs the results for its next batch."""
_NAME = "batches"
_BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper."


class BatchLauncher(Launcher):
    """Composes each batch of a sweeper and gives it to the attribute `batch` of the task."""

    __module__ = "hydra_plugins.sae_lora"  # see `register`

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self._loader = hydra_context.config_loader
        self._batch: Batch = task_function.batch  # pyright: ignore[reportFunctionMemberAccess]
        self._config = config
        self._is_adaptive = not str(config.hydra.sweeper._target_).startswith(_BASIC_SWEEPER)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        setup_globals()
        points = self._composed(job_overrides, initial_job_idx)
        results = self._batch(points, self._is_adaptive)
        return [
            JobReturn(
                overrides=list(overrides),
                status=JobStatus.FAILED if isinstance(result, Exception) else JobStatus.COMPLETED,
                _return_value=result,
            )
            for overrides, result in zip(job_overrides, results, strict=True)
        ]

    def _composed(self, points: Sequence[Sequence[str]], first: int) -> Iterator[DictConfig]:
        for number, overrides in enumerate(points, first):
            config = self._loader.load_sweep_config(self._config, list(overrides))
            with open_dict(config):
                config.hydra.job.id = config.hydra.job.num = number
            HydraConfig.instance().set_config(config)  # for values such as ${hydra:job.num}
            yield config


@dataclass
class _Conf:
    _target_: str = f"{BatchLauncher.__module__}.{BatchLauncher.__name__}"


ConfigStore.instance().store(group="hydra/launcher", name=_NAME, node=_Conf, provider="sae_lora")


def register() -> None:
    """Make Hydra know the launcher.

    Hydra takes plug-ins from the package `hydra_plugins` only. So this module gets a second name in it,
    and needs no installed package of that name.
    """
    plugins = Plugins.instance()  # first: it searches the installed package
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    name = BatchLauncher.__module__
    sys.modules[name] = sys.modules[__name__]
    setattr(package, name.rpartition(".")[2], sys.modules[__name__])
    plugins.register(BatchLauncher)
