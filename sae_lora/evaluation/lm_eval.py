"""The suite `tasks`: benchmarks through lm-evaluation-harness, for each of a run's models."""

import contextlib
import functools
import io
import logging
import math
import random
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sae_lora.common import hub
from sae_lora.common.console import say
from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.config.execution import EvaluationConfig
from sae_lora.evaluation.subject import Cell, Subject
from sae_lora.evaluation.tasks import FOLDER

_FIELD = "evaluation.tasks"


@dataclass(frozen=True)
class Score:
    """One metric of one model."""

    value: float
    stderr: float | None
    """Standard error; `None` if the harness gives none."""
    over_base: float | None = None
    """Value minus the plain model's; `None` for the plain model."""
    over_base_stderr: float | None = None
    """Standard error of `over_base`, paired by document. `None` if the metric is not a mean over
    documents."""


@dataclass(frozen=True)
class TaskScores:
    """A task, or a group of tasks."""

    documents: int
    few_shot: int | None
    """Number of examples before each document; `None` if the tasks of a group differ in it."""
    version: str | None
    """The harness's version of the task."""
    subtasks: list[str]
    """Tasks of a group. They have their own scores."""
    higher_is_better: dict[str, bool]
    """By metric."""
    cells: dict[str, dict[str, Score]]
    """Scores by cell and metric; by `metric,filter` if the filter's name is not `none`."""


@dataclass(frozen=True)
class Tasks:
    """The suite `tasks`: scores of a run's models in tasks of lm-evaluation-harness."""

    harness: str
    """Version of lm-evaluation-harness."""
    scores: dict[str, TaskScores]
    """Scores by task or group."""


def check(config: EvaluationConfig) -> None:
    """Refuse tasks that cannot be run, before a model is loaded.

    Raises:
        ConfigError: For an unknown task, or a task that runs code or needs more than text.
        UserError: If the harness, or the data set of a task, is missing.
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
            with _silenced(), hub.explained(_FIELD, name):
                loaded = manager.load([name])
        except UserError as error:
            missing[name] = error
        except ImportError as error:
            raise UserError(f"{_FIELD} = {name!r} needs another package: {error}") from error
        else:
            for task in loaded["tasks"].values():
                _check_task(name, task, owners)
    if missing:
        sets = sorted({data_set for name in missing for data_set in _data_sets(manager, name)})
        raise UserError(
            "\n".join(map(str, missing.values()))
            + f"\n  data sets: {listed(sets)}"
            + "\n  on a machine with a network, this command downloads them into the Hugging Face cache "
            + "(HF_HOME): "
            + f'python -c "from lm_eval.tasks import TaskManager; TaskManager().load({list(missing)})"'
        )


def score(subject: Subject, config: EvaluationConfig) -> Tasks:
    """Run tasks that `check` has accepted with each of a run's models."""
    results = {}
    for cell in subject.cells:
        say(f"  {listed(config.tasks)}: {cell}")
        with subject.in_place(cell) as model:
            results[cell] = _results(model, subject.padding_tokenizer(), config)
    scores = {name: _scores(name, results) for name in results[Cell.base]["results"]}
    return Tasks(harness=metadata.version("lm_eval"), scores=scores)


def _manager(names: Collection[str]) -> Any:
    """The task manager of the tasks that ship with this package, or of all tasks if needed."""
    shipped = _manager_of(all_tasks=False)
    return shipped if set(names) <= set(shipped.all_tasks) else _manager_of(all_tasks=True)


@functools.cache
def _manager_of(*, all_tasks: bool) -> Any:
    # Cached, because all tasks together are some ten thousand files.
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"{_FIELD} needs lm-evaluation-harness, which cannot be imported ({error}): "
            "pip install 'sae_lora[downstream]', or pip install 'lm-eval[hf]'"
        ) from error
    return TaskManager(include_path=str(FOLDER), include_defaults=all_tasks)


def _check_task(name: str, task: Any, owners: dict[str, str]) -> None:
    """Refuse a task that needs more than text, runs code, or is also part of another name."""
    leaf = task.task_name
    unfit = {"UNSAFE_CODE": "runs code that a model writes", "MULTIMODAL": "needs more than text"}
    for kind, because in unfit.items():
        if getattr(task, kind, False):
            raise ConfigError(_FIELD, name, "tasks that need only text", because=f"{leaf} {because}")
    if leaf in owners:
        because = f"{leaf} is already part of {owners[leaf]}"
        raise ConfigError(_FIELD, name, "each task once", because=because)
    owners[leaf] = name


def _data_sets(manager: Any, name: str) -> Iterator[str]:
    """Names of the data sets of a task, or of all tasks of a group or a tag."""
    entry = manager.task_index.get(name)
    if entry is None:
        return
    config = entry.cfg or {}
    if "dataset_path" in config:
        yield config["dataset_path"]
    elif entry.kind.name == "TAG":  # a task's entry lists its tags here, a tag's entry its members
        for member in sorted(entry.tags):
            yield from _data_sets(manager, member)
    else:
        members = config.get("task")
        for member in members if isinstance(members, list) else []:
            inner = member if isinstance(member, str) else member.get("task") or member.get("group")
            yield from _data_sets(manager, str(inner))


def _results(model: PreTrainedModel, tokenizer: Any, config: EvaluationConfig) -> Mapping[str, Any]:
    """Results of the harness, in total and by document. The tokenizer is changed."""
    import lm_eval
    from lm_eval.models import huggingface

    evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its parameters
    wrapped: Any = huggingface.HFLM
    tokenizer.split_special_tokens = True  # a document that spells a special token is text
    with _silenced(), _random_states_restored():
        return evaluate(
            model=wrapped(
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=config.task_batch_size,
            ),
            tasks=list(config.tasks),
            task_manager=_manager(config.tasks),
            num_fewshot=config.few_shot,
            limit=config.task_limit,
            bootstrap_iters=config.resamples,
        )


def _scores(name: str, results: Mapping[Cell, Mapping[str, Any]]) -> TaskScores:
    """Scores of one task or group."""
    base = results[Cell.base]
    version = base["versions"].get(name)
    return TaskScores(
        documents=sum(base["n-samples"][leaf]["effective"] for leaf in _leaves(name, base)),
        few_shot=base["n-shot"].get(name),
        version=None if version is None else str(version),
        subtasks=list(base["group_subtasks"].get(name, [])),
        higher_is_better={
            metric: bool(value)
            for metric, value in base["higher_is_better"].get(name, {}).items()
            if value is not None
        },
        cells={cell.value: _metrics(name, of_cell, base) for cell, of_cell in results.items()},
    )


def _leaves(name: str, results: Mapping[str, Any]) -> list[str]:
    """The tasks of a group, or a single task itself."""
    children = results["group_subtasks"].get(name)
    if children is None:
        return [name]
    return [leaf for child in children for leaf in _leaves(child, results)]


def _metrics(name: str, results: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Score]:
    """A task's scores by metric, compared to the plain model's results."""
    values = results["results"][name]
    scores: dict[str, Score] = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        stderr = values.get(f"{metric}_stderr,{filtered}")
        score = Score(float(value), float(stderr) if _is_number(stderr) else None)
        if results is not base:
            over_base = float(value - base["results"][name][key])
            documents = (_by_document(name, key, of_cell) for of_cell in (results, base))
            score = replace(score, over_base=over_base, over_base_stderr=paired_error(*documents))
        scores[metric if filtered == "none" else key] = score
    return scores


def _by_document(name: str, key: str, results: Mapping[str, Any]) -> list[float]:
    """Values of a metric by document; empty if their mean is not the value that the harness reports."""
    metric, _, filtered = key.partition(",")
    samples = (sample for leaf in _leaves(name, results) for sample in results["samples"][leaf])
    values = [sample.get(metric) for sample in samples if sample["filter"] == filtered]
    if not values or not all(map(_is_number, values)):
        return []
    is_mean = math.isclose(sum(values) / len(values), results["results"][name][key], abs_tol=1e-9)
    return [float(value) for value in values] if is_mean else []


def paired_error(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Standard error of the mean difference between two measures of the same documents, in order.

    `None` for fewer than two documents.
    """
    if len(first) != len(second) or len(first) < 2:
        return None
    differences = np.subtract(first, second)
    return float(differences.std(ddof=1) / math.sqrt(len(differences)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and math.isfinite(value)


def _silenced() -> contextlib.AbstractContextManager[Any]:
    """Restrict the harness's log to errors; inside the block, keep progress bars out of log files."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    is_terminal = sys.stderr.isatty()
    return contextlib.nullcontext() if is_terminal else contextlib.redirect_stderr(io.StringIO())


@contextlib.contextmanager
def _random_states_restored() -> Iterator[None]:
    """Restore random states after the block: the harness sets seeds."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 what the harness seeds
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
