"""The launch of a command line: of a single run, a sweep, or the batches of an adaptive sweeper."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sae_lora.common.errors import EXIT_STOPPED, UserError
from sae_lora.config.batches import Directions
from sae_lora.config.compose import dispatch
from sae_lora.config.schema import Config
from sae_lora.launcher import halving
from sae_lora.launcher.launch import launch
from sae_lora.launcher.objective import (
    check_directions,
    check_objective,
    objective_of,
    show_best,
)


def launch_command(arguments: Sequence[str]) -> tuple[int, list[Config]]:
    """Launch what a command line asks for; return the exit code and all points.

    Args:
        arguments: Overrides and options of Hydra: `["-m", "lora.rank=1,4"]`.

    Raises:
        UserError: If a point cannot work, before anything of its batch runs.
    """
    every: list[Config] = []
    trials: list[Config] = []
    codes = [0]

    def launch_batch(points: list[Config], directions: Directions | None) -> Sequence[Any] | None:
        every.extend(points)
        if directions is None:
            codes.append(launch(points))
            return [None] * len(points)
        trials.extend(points)
        code, objectives = launch_trials(points, directions)
        codes.append(code)
        return objectives or None  # of a dry run, and after a stop: the end of the sweep

    try:
        dispatch(arguments, launch_batch)
    except UserError:  # such as a failed trial, which ends the sweep
        show_best(trials)
        raise
    show_best(trials)
    return max(codes), every


def launch_trials(points: Sequence[Config], directions: Directions) -> tuple[int, list[Any]]:
    """Launch a batch of an adaptive sweeper, as `launch`, and wait for it.

    Args:
        points: The trials.
        directions: What the sweeper does with each objective.

    Returns:
        The exit code, and the objective of each point, or why its run has none; of a dry run, and after
        a stop, only the code.

    Raises:
        UserError: As `launch`.
    """
    for point in points:
        check_objective(point)
    check_directions(points[0], directions)
    halving.refuse(points, "an adaptive sweeper needs the objective of each run at its end")
    points = [replace(point, launcher=replace(point.launcher, wait=True)) for point in points]
    code = launch(points)
    is_over = points[0].launcher.dry_run or code == EXIT_STOPPED
    return code, [] if is_over else [objective_of(point) for point in points]
