"""`launcher.halving` in a launch: what it refuses, which runs compete, and what was saved."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress

from sae_lora.common.console import count
from sae_lora.common.errors import ConfigError, listed, nearest_name
from sae_lora.common.files import json_digest
from sae_lora.config.identity import NOT_HASHED_KEYS, step_tokens, train_steps
from sae_lora.config.overrides import flat
from sae_lora.config.schema import Config, as_list
from sae_lora.config.serialize import as_dict
from sae_lora.launcher.objective import OBJECTIVES
from sae_lora.launcher.plan import Run
from sae_lora.records import halving
from sae_lora.records.folder import DamagedError
from sae_lora.records.halving import Bracket, rounded_up
from sae_lora.records.metrics import METRICS
from sae_lora.records.schema import CurvePoint
from sae_lora.records.status import RunStatus, State

SHARES = (1 / 8, 1 / 4, 1 / 2)
"""Shares of the training after which the default rungs lie."""
_GROUPS = ("lora", "train", "sae", "layer", "method")
"""The groups whose keys may compete."""
_SEEDS = ("train.seed", "data.seed")
_SCHEDULE = ("train_tokens", "schedule", "warmup_share", "eval_every_tokens")
_REFUSED = dict.fromkeys(
    _SEEDS, "runs that differ only in seeds do not compete: their mean counts"
) | dict.fromkeys(
    (f"train.{name}" for name in _SCHEDULE),
    "runs are compared at the same tokens of the same schedule of the learning rate",
)
"""Keys that may not compete, with the reason."""
_REQUESTS = {
    *("sae.width", "sae.l0", "sae.release", "sae.id", "sae.path"),
    *("model.middle_block", "model.fit_context"),
}
_WITHOUT_EFFECT = NOT_HASHED_KEYS - _REQUESTS
"""Keys that cannot change a result. `NOT_HASHED_KEYS` also has requests that the planner answers."""
_CURVE = [name for name in OBJECTIVES if name in CurvePoint.__dataclass_fields__]


def check_halving(points: Sequence[Config]) -> None:
    """Refuse a rule by which no run can be stopped, or by which runs cannot be compared.

    Raises:
        ConfigError: For the first fault.
    """
    settings = points[0].launcher
    if settings.halving is None:
        return
    names = as_list(settings.halving)
    known = [key for group in _GROUPS for key in flat(as_dict(points[0])) if key.startswith(f"{group}.")]
    allowed = "a config key whose values compete, such as train.lr, or a list of such keys"
    for name in names:
        if isinstance(name, str) and name in _REFUSED:
            raise ConfigError("launcher.halving", name, "another key", "train.lr", _REFUSED[name])
        if not isinstance(name, str) or name not in known:
            because = f"keys of {listed(_GROUPS)} can compete"
            raise ConfigError("launcher.halving", name, allowed, _nearest(name, known), because)
    if not names or len(set(names)) < len(names):
        raise ConfigError("launcher.halving", settings.halving, allowed, "train.lr")
    for point in points:
        (measure, *more) = as_list(point.objective)
        if more or measure not in _CURVE:
            near = measure if measure in _CURVE else "ce_gap"
            allowed = f"with launcher.halving one of {listed(_CURVE)}"
            raise ConfigError("objective", point.objective, allowed, near)
        rungs_of(point)


def _nearest(name: object, known: Sequence[str]) -> str:
    """The value of `launcher.halving` that was probably meant: for `rank`, `lora.rank`."""
    if name in (False, "off"):
        return "null"
    keys = [key for key in known if key not in _REFUSED]
    same = [key for key in keys if key.endswith(f".{name}")]
    return same[0] if same else nearest_name(str(name), keys) or "train.lr"


def refuse(points: Sequence[Config], because: str) -> None:
    """Refuse `launcher.halving` for points whose runs must all finish.

    Raises:
        ConfigError: If one of the points asks for it.
    """
    for point in points:
        if point.launcher.halving is not None:
            raise ConfigError("launcher.halving", point.launcher.halving, "null", "null", because)


def rungs_of(point: Config) -> list[int]:
    """The numbers of the evaluations at which the run of a point is compared; that before training is 0.

    Raises:
        ConfigError: For a rung at which the run is not evaluated before its end.
    """
    every, asked = point.train.eval_every_tokens, point.launcher.rungs
    steps_between = math.ceil(every / step_tokens(point))
    last = (train_steps(point) - 1) // steps_between
    if last == 0:
        tokens = point.train.train_tokens
        because = f"launcher.halving needs an evaluation before the end, at {tokens:,} tokens"
        allowed = "a part of train.train_tokens"
        near = max(1, tokens // 8)
        raise ConfigError("train.eval_every_tokens", every, allowed, near, because)
    if asked is None:
        wanted = [rounded_up(share * train_steps(point) / steps_between) for share in SHARES]
        return sorted({min(number, last) for number in wanted})
    allowed = f"multiples of train.eval_every_tokens, from {every:,} to {last * every:,}"
    for tokens in asked:
        if tokens % every or not every <= tokens <= last * every:
            near = min(last, max(1, round(tokens / every))) * every
            raise ConfigError("launcher.rungs", tokens, allowed, f"[{near}]")
    if not asked:
        raise ConfigError("launcher.rungs", asked, allowed, f"[{every}]")
    return sorted({tokens // every for tokens in asked})


def brackets(runs: Sequence[Run]) -> dict[str, Bracket]:
    """The bracket of each run, by its name; empty without `launcher.halving`."""
    if runs[0].config.launcher.halving is None:
        return {}
    return {run.name: _bracket(run.request) for run in runs}


def _bracket(point: Config) -> Bracket:
    return Bracket(
        bracket=_key(point, [*as_list(point.launcher.halving), *_SEEDS]),
        candidate=_key(point, _SEEDS),
        rungs=rungs_of(point),
        keep=point.launcher.keep,
        measure=as_list(point.objective)[0],
    )


def _key(point: Config, without: Iterable[str]) -> str:
    """A text that is equal for points that ask for the same, but for the values of some keys."""
    left_out = {*without, *_WITHOUT_EFFECT}
    values = flat(dataclasses.asdict(point))  # `as_dict` takes 20 ms, twice for each run of a sweep
    return json_digest({key: repr(value) for key, value in values.items() if key not in left_out})[:8]


def write_brackets(runs: Sequence[tuple[Run, RunStatus]]) -> None:
    """Write the brackets into the folders of runs, also of finished ones.

    Runs that another launch trains keep the rule of that launch.
    """
    of_run = brackets([run for run, _ in runs])
    for run, status in runs:
        if run.name not in of_run or not run.folder.config.exists():
            continue
        is_busy = status.state in (State.running, State.queued)
        with suppress(DamagedError):  # the launch names it
            before = halving.read(run.folder)
            if before != of_run[run.name] and not (is_busy and before is not None):
                halving.write(run.folder, of_run[run.name])


def described(runs: Sequence[Run]) -> str | None:
    """The rule for these runs in a sentence; `None` without `launcher.halving`."""
    of_run = brackets(runs)
    if not of_run:
        return None
    point = runs[0].request
    candidates = Counter(
        bracket for bracket, _ in {(each.bracket, each.candidate) for each in of_run.values()}
    )
    names = listed(as_list(point.launcher.halving))
    if max(candidates.values()) < 2:
        return f"halving: no two of these runs differ only in {names}; runs of other launches count"
    sizes = sorted(set(candidates.values()))
    of_size = " to ".join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))
    groups = count(len(candidates), "group")
    each = of_run[runs[0].name]
    every = point.train.eval_every_tokens
    rungs = listed(f"{number * every:,}" for number in each.rungs)
    return (
        f"halving: {groups} of {of_size} that differ in {names}; at {rungs} tokens, "
        f"the best {each.keep:.0%} by {METRICS[each.measure].name} go on"
    )


def saved(outranked: Sequence[Run], total: int) -> str:
    """A sentence with the number of stopped runs and the tokens saved.

    Args:
        outranked: The runs that were stopped.
        total: Number of all runs of the sweep.
    """
    tokens = sum(
        train_steps(run.config) * step_tokens(run.config) - run.folder.read_curve()[-1].tokens
        for run in outranked
    )
    stopped = f"halving stopped {len(outranked)} of {count(total, 'run')}"
    return f"{stopped} and saved {tokens:,} training tokens; launcher.halving=null takes them up again"
