"""Hydra's launcher for this package: it composes each batch of a sweeper, and hands it over as a whole.

So the points of any sweeper are planned together, share packs and go to SLURM.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, open_dict

from sae_lora.common.errors import UserError
from sae_lora.common.locks import HeldError, held

Directions = list[str]
"""`minimize` or `maximize`, for each objective of an adaptive sweeper; empty if its config does not say
so."""
Batch = Callable[[Iterable[DictConfig], Directions | None], Sequence[Any]]
"""Launches composed points, and returns the result of each: a value, or the error of its run. It also
gets the directions of an adaptive sweeper, which needs the results for its next batch; else `None`."""
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
        sweeper = config.hydra.sweeper
        is_basic = str(sweeper._target_).startswith(_BASIC_SWEEPER)
        self._directions = None if is_basic else _directions(sweeper)
        study: ExitStack | None = task_function.study  # pyright: ignore[reportFunctionMemberAccess]
        if study is not None and sweeper.storage is not None:
            study.enter_context(_new_study(str(sweeper.storage), str(sweeper.study_name)))

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        setup_globals()
        points = self._composed(job_overrides, initial_job_idx)
        results = self._batch(points, self._directions)
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


@contextmanager
def _new_study(storage: str, name: str) -> Iterator[None]:
    """Remove an earlier study from Optuna's storage; inside the block, no other command writes it.

    Raises:
        UserError: If another command writes it, or the file cannot be used.
    """
    file = Path(storage.removeprefix("sqlite:///"))
    with ExitStack() as stack:
        try:
            stack.enter_context(held(file.parent / f".{file.stem}-{name}"))
            if file.exists():
                import optuna

                with suppress(KeyError):
                    optuna.delete_study(study_name=name, storage=storage)
        except HeldError as error:
            cause = f"this search is running already ({error.process}); wait for its end"
            raise UserError(cause) from error
        except Exception as error:  # of optuna's, of many types
            cause = str(error).partition("\n")[0]
            raise UserError(f"{file} cannot be used for the trials: {cause}; move it away") from error
        yield


def _directions(sweeper: DictConfig) -> Directions:
    direction = sweeper.get("direction")
    several = direction if isinstance(direction, ListConfig) else [direction] if direction else []
    return [str(getattr(each, "name", each)) for each in several]


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
