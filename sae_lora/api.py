"""Runs from Python: `sae_lora.launch([...])` does what `sae-lora launch` does in a terminal."""

from collections.abc import Sequence

from sae_lora.common.errors import ConfigError
from sae_lora.common.lazy_imports import import_quickly
from sae_lora.report.sweep import Sweep


def launch(overrides: Sequence[str] = ()) -> Sweep:
    """Plan, pack and run, and return the runs.

    Finished runs are not run again, and interrupted runs resume, as in a terminal. A run that fails does
    not stop the others; its `state` is failed, and its `summary` raises an error with the cause.

    Args:
        overrides: Groups and keys, such as `["sae=tiny", "lora.rank=1,4"]`; commas make a sweep.

    Returns:
        The runs, in the order of the plan.

    Raises:
        UserError: If a point cannot work, before anything runs.
        KeyboardInterrupt: After a request to stop, when the runs have saved their state.
    """
    if isinstance(overrides, str):
        raise ConfigError("overrides", overrides, "a list of overrides", f'["{overrides}"]')
    for override in overrides:
        if override.startswith("-"):
            raise ConfigError("overrides", override, "group=option or key=value", override.lstrip("-"))
    import_quickly()
    from sae_lora.launcher.command import launch_command
    from sae_lora.launcher.plan import plan

    _, points = launch_command(["--multirun", *overrides])
    return Sweep([run.folder for run in plan(points).runs])
