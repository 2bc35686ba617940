"""Benchmarks through lm-evaluation-harness: what SAEs and adapters do to what a model can do."""

import contextlib
import copy
import functools
import io
import logging
import math
import random
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sae_lora.common import hub
from sae_lora.common.console import say
from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.config.evaluation import EvaluationConfig
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.evaluation.tasks import FOLDER

_FIELD = "evaluation.tasks"


HEEDS = ("resamples", "tasks", "task_limit", "few_shot")
"""The keys of `evaluation` that it depends on."""


@dataclass(frozen=True)
class Score:
    """One metric of one model."""

    value: float
    stderr: float | None
    """Standard error; `None` where the harness knows none."""
    over_base: float | None = None
    """How much more it is than the plain model's, whose own has none."""
    over_base_stderr: float | None = None
    """Of that: the documents are the same, and are compared one by one. `None` where the metric is no
    mean over documents."""


@dataclass(frozen=True)
class TaskScores:
    """A task, or a group of tasks."""

    documents: int
    few_shot: int | None
    """Examples before each document; `None` where a group's tasks differ."""
    version: str | None
    """The harness's own, of the task."""
    subtasks: list[str]
    """Of a group, which have scores of their own."""
    higher_is_better: dict[str, bool]
    """By metric."""
    cells: dict[str, dict[str, Score]]
    """By cell and metric, a filter's name behind a comma where it is not `none`."""


@dataclass(frozen=True)
class Tasks:
    """What the run's models reach in tasks of lm-evaluation-harness."""

    harness: str
    """Version of lm-evaluation-harness."""
    scores: dict[str, TaskScores]
    """By task."""


def check(config: EvaluationConfig) -> None:
    """Refuses tasks that cannot be taken, before a model is loaded.

    Args:
        config: Which tasks.

    Raises:
        ConfigError: For one that there is not, or that runs code or needs more than text.
        UserError: Where the harness, or the data set of a task, is missing.
    """
    if not config.tasks:
        raise ConfigError(_FIELD, [], "at least one task", "[tiny_continuation]")
    _check(tuple(config.tasks))


@functools.lru_cache(maxsize=2)
def _check(names: tuple[str, ...]) -> None:
    manager = _manager(names)
    for name in names:
        if name not in manager.all_tasks:
            allowed = f"one of {len(manager.all_tasks):,} tasks and groups (lm-eval ls tasks)"
            raise ConfigError(_FIELD, name, allowed, nearest_name(name, manager.all_tasks))
    missing: dict[str, UserError] = {}
    owners: dict[str, str] = {}
    for name in names:
        try:
            with _unheard(), hub.explained(_FIELD, name):
                loaded = manager.load([name])
        except UserError as error:
            missing[name] = error
        except ImportError as error:
            raise UserError(f"{_FIELD} = {name!r} needs another package: {error}") from error
        else:
            for task in loaded["tasks"].values():
                _check_task(name, task, owners)
    if missing:
        sets = sorted({one for name in missing for one in _data_sets(manager, name)})
        raise UserError(
            "\n".join(map(str, missing.values()))
            + f"\n  data sets: {listed(sets)}"
            + "\n  where there is a network, this puts them into the Hugging Face cache (HF_HOME): "
            + f'python -c "from lm_eval.tasks import TaskManager; TaskManager().load({list(missing)})"'
        )


def score(subject: Subject, config: EvaluationConfig) -> Tasks:
    """Takes the tasks with each of the run's models.

    Args:
        subject: The run.
        config: Which tasks, and how many documents of each.

    Raises:
        UserError: As `check` does, before a model has read anything.
    """
    check(config)
    found = {}
    for cell in subject.cells:
        say(f"  {listed(config.tasks)}: {cell}")
        with subject.in_place(cell) as model:
            found[cell] = _taken(model, subject.adapted.tokenizer, config)
    base = found[Cell.base]
    scores = {name: _scores(name, base, found) for name in base["results"]}
    return Tasks(harness=metadata.version("lm_eval"), scores=scores)


def _manager(names: Collection[str]) -> Any:
    """What knows these tasks: those that ship with this package, and where need be all others."""
    own = _manager_of(all_tasks=False)
    return own if set(names) <= set(own.all_tasks) else _manager_of(all_tasks=True)


@functools.cache
def _manager_of(*, all_tasks: bool) -> Any:
    """Reads some ten thousand files for all tasks."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"{_FIELD} needs lm-evaluation-harness, which cannot be imported ({error}): "
            "pip install 'sae_lora[downstream]', or pip install 'lm-eval[hf]'"
        ) from error
    return TaskManager(include_path=str(FOLDER), include_defaults=all_tasks)


def _check_task(name: str, task: Any, owners: dict[str, str]) -> None:
    """Refuses one that is no task of text alone, or that another name stands for as well."""
    leaf = task.task_name
    unfit = {"UNSAFE_CODE": "runs code that a model writes", "MULTIMODAL": "needs more than text"}
    for kind, because in unfit.items():
        if getattr(task, kind, False):
            raise ConfigError(_FIELD, name, "tasks of text alone", because=f"{leaf} {because}")
    if leaf in owners:
        raise ConfigError(_FIELD, name, "each task once", because=f"{leaf} is of {owners[leaf]} already")
    owners[leaf] = name


def _data_sets(manager: Any, name: str) -> Iterator[str]:
    """Names of the data sets that a task, or those of a group or under a tag, are about."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    if "dataset_path" in config:
        yield config["dataset_path"]
    elif entry.kind.name == "TAG":  # a task's own are those that it is under
        for member in sorted(entry.tags):
            yield from _data_sets(manager, member)
    else:
        members = config.get("task")
        for member in members if isinstance(members, list) else []:
            inner = member if isinstance(member, str) else member.get("task") or member.get("group")
            yield from _data_sets(manager, str(inner))


def _taken(model: PreTrainedModel, tokenizer: Any, config: EvaluationConfig) -> Mapping[str, Any]:
    """The harness's own results, document by document too."""
    import lm_eval
    from lm_eval.models import huggingface

    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
    wrapped: Any = huggingface.HFLM
    with _unheard(), _own_randomness():
        return evaluate(
            model=wrapped(
                pretrained=model,
                tokenizer=copy.deepcopy(tokenizer),  # it is given a token for padding
                batch_size=config.task_batch_size,
            ),
            tasks=list(config.tasks),
            task_manager=_manager(config.tasks),
            num_fewshot=config.few_shot,
            limit=config.task_limit,
            bootstrap_iters=config.resamples,
        )


def _scores(name: str, base: Mapping[str, Any], found: Mapping[Cell, Mapping[str, Any]]) -> TaskScores:
    """What one task, or group, came to."""
    leaves = _leaves(name, base["group_subtasks"])
    plain = _Metrics(name, leaves, base)
    return TaskScores(
        documents=sum(base["n-samples"][leaf]["effective"] for leaf in leaves),
        few_shot=base["n-shot"].get(name),
        version=None if (version := base["versions"].get(name)) is None else str(version),
        subtasks=list(base["group_subtasks"].get(name, [])),
        higher_is_better={
            metric: bool(value)
            for metric, value in base["higher_is_better"].get(name, {}).items()
            if value is not None
        },
        cells={
            cell.value: _Metrics(name, leaves, results).over(None if cell is Cell.base else plain)
            for cell, results in found.items()
        },
    )


def _leaves(name: str, children: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks that a group is made of; of a task, itself."""
    if name not in children:
        return [name]
    return [leaf for child in children[name] for leaf in _leaves(child, children)]


class _Metrics:
    """A task's metrics of one model, and what each document contributes to them."""

    def __init__(self, name: str, leaves: Sequence[str], results: Mapping[str, Any]) -> None:
        self._values = results["results"][name]
        self._samples = [sample for leaf in leaves for sample in results["samples"][leaf]]

    def over(self, base: "_Metrics | None") -> dict[str, Score]:
        """Each of them, beside the plain model's where that is another."""
        found = {}
        for key, value in self._values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = self._values.get(f"{metric}_stderr,{filtered}")
            difference = None if base is None else float(value - base._values[key])
            found[metric if filtered == "none" else key] = Score(
                value=float(value),
                stderr=float(stderr) if _is_number(stderr) else None,
                over_base=difference,
                over_base_stderr=None if base is None else self._paired_error(base, metric, filtered),
            )
        return found

    def _paired_error(self, base: "_Metrics", metric: str, filtered: str) -> float | None:
        ours, theirs = self._contributions(metric, filtered), base._contributions(metric, filtered)
        if ours is None or theirs is None:
            return None
        return paired_error(ours, theirs)

    def _contributions(self, metric: str, filtered: str) -> list[float] | None:
        """By document; `None` where their mean is not what the harness reports."""
        found = [one.get(metric) for one in self._samples if one["filter"] == filtered]
        if not found or not all(map(_is_number, found)):
            return None
        is_mean = math.isclose(
            sum(found) / len(found), self._values[f"{metric},{filtered}"], abs_tol=1e-9
        )
        return [float(one) for one in found] if is_mean else None


def paired_error(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Standard error of the mean difference between two measures of the same documents.

    Args:
        one: By document.
        other: Of the same documents, in the same order.

    Returns:
        `None` for fewer than two documents.
    """
    if len(one) != len(other) or len(one) < 2:
        return None
    differences = np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    return float(differences.std(ddof=1) / math.sqrt(len(differences)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Inside the block, the harness says nothing but what is wrong, and draws no bar into a log."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    bars = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with bars:
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """Inside the block, seeds may be set that do not outlast it."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 what the harness seeds
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
