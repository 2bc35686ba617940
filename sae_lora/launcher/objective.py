"""The measures that an adaptive sweeper optimises, and the best of its trials."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from sae_lora.common.console import complain, count, say, show
from sae_lora.common.errors import ConfigError, UserError, listed, nearest_name
from sae_lora.config.batches import Directions
from sae_lora.config.enums import Method
from sae_lora.config.overrides import command
from sae_lora.config.schema import Config, as_list
from sae_lora.config.serialize import written
from sae_lora.launcher.plan import plan
from sae_lora.records.folder import RunFolder
from sae_lora.records.metrics import METRICS
from sae_lora.records.schema import Summary
from sae_lora.records.status import is_done
from sae_lora.report.results import as_table, results

_MOST_COMMANDS = 3
_SUMMED_UP = {field.name for field in dataclasses.fields(Summary)}
OBJECTIVES = [name for name, metric in METRICS.items() if metric.better and name in _SUMMED_UP]
"""The measures of a finished run of which less, or more, is better."""


def check_objective(point: Config) -> None:
    """Refuse an objective that is no measure of a run, or that its method does not have.

    Raises:
        ConfigError: For the first one.
    """
    names = as_list(point.objective)
    for name in names:
        if name not in OBJECTIVES:
            allowed = f"one of {listed(OBJECTIVES)}, or a list of them"
            raise ConfigError("objective", name, allowed, nearest_name(str(name), OBJECTIVES))
        if name.endswith("gap_closed") and point.method.kind is Method.sae:
            because = "method=sae closes no gap: its SAE is new"
            raise ConfigError("objective", name, "another measure", "ce_gap", because)
    if not names or len(set(names)) < len(names):
        raise ConfigError("objective", point.objective, "one or more measures, each once", "ce_gap")


def check_directions(point: Config, directions: Directions) -> None:
    """Refuse a sweeper that would look for the worst values.

    Args:
        point: Its first point, with an objective that `check_objective` accepts.
        directions: What the sweeper does with each objective.

    Raises:
        ConfigError: If it does not do with each objective what makes it better.
    """
    verbs = {"lower": "minimize", "higher": "maximize"}
    wanted = [verbs[METRICS[name].better] for name in as_list(point.objective)]
    if directions and directions != wanted:
        asked, right = (
            each[0] if len(each) == 1 else f"[{','.join(each)}]" for each in (directions, wanted)
        )
        allowed = f"{right}, with objective={written(point.objective)}"
        raise ConfigError("hydra.sweeper.direction", asked, allowed, right)


def objective_of(point: Config) -> Any:
    """The objective of the run of a point, a list if the config has a list; or why it has none."""
    folder = _folder(point)
    if not is_done(folder):
        return UserError(folder.failure_message or f"{folder.path.name} did not finish")
    summary = folder.read_summary()
    names = as_list(point.objective)
    if undefined := [name for name in names if summary[name] is None]:
        return UserError(f"{folder.path.name}: {undefined[0]} is undefined")
    values = [summary[name] for name in names]
    return values if isinstance(point.objective, list) else values[0]


def show_best(points: Sequence[Config]) -> None:
    """Print the finished trials of an adaptive sweeper, the best first, and their commands.

    With several objectives, for each of them. The commands are those of the best three.
    """
    every = {folder.path: folder for folder in map(_folder, points)}
    done = [folder for folder in every.values() if is_done(folder)]
    if not done:
        return
    for name in as_list(points[0].objective):
        table = results(done, sort=name, each_seed=True)
        say(f"\n{count(len(done), 'trial')} by {METRICS[name].name}")
        show(as_table(table))
        for number, row in enumerate(table.rows[:_MOST_COMMANDS], 1):
            say(f"{number}. {command(row.runs[0].folder.read_config())}")
    if unfinished := len(every) - len(done):
        complain("not finished", count(unfinished, "trial"))


def _folder(point: Config) -> RunFolder:
    (run,) = plan([point]).runs
    return run.folder
