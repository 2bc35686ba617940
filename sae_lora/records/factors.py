"""The factors in which runs of a sweep may differ: how each is read, named and plotted.

Tables, data frames, figures, comparisons and W&B use this list. A new factor is one entry.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from sae_lora.config.enums import Method
from sae_lora.config.identity import NOT_HASHED_KEYS, trains_adapters
from sae_lora.config.overrides import flat
from sae_lora.records.damage import damage
from sae_lora.records.folder import RunFolder

Values = Mapping[str, Any]
"""The content of `config.yaml`, or measures as in `summary.json`."""


@dataclass(frozen=True)
class Factor:
    """A factor in which runs may differ."""

    name: str
    """The column in a data frame."""
    read: Callable[[Values, Values], Any]
    """The value, from the config and the measures of a run; `None` if the run has none."""
    label: str = ""
    """The name in tables, if it differs from `name`."""
    axis: str = ""
    """The title of an axis, if it differs from the label."""
    keys: tuple[str, ...] = ()
    """Config keys that the factor replaces; W&B shows the value at the first of them."""
    tag: str = ""
    """The first part of a W&B tag that shows the value."""
    is_logarithmic: bool = False
    """True for a logarithmic axis."""


def text(value: object) -> str:
    """The value of a factor as text; a dash if the run has none (`None`; in data frames, NaN)."""
    if value is None or value != value:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _joined(values: Sequence[Any]) -> str:
    return "+".join(map(str, values))


def _one_or_all(values: Sequence[Any]) -> Any:
    """The common value, if all are equal; else all values as text."""
    return values[0] if len(set(values)) == 1 else _joined(values)


def _of_saes(config: Values, name: str, default: Any = None) -> list[Any]:
    return [choice.get(name, default) for choice in config["sae"]["used"]]


def _method(config: Values) -> Values:
    """The method of a run; configs of versions without methods mean lora."""
    return config.get("method", {"kind": Method.lora.name, "rank": None})


def _of_lora(config: Values, name: str) -> Any:
    """A setting of the adapters; `None` if the method trains no adapters."""
    value = config["lora"][name] if trains_adapters(config) else None
    return _joined(value) if isinstance(value, list) else value


def _l0(config: Values, measured: Values) -> Any:
    """The L0 that was published with the SAEs, or else the measured one."""
    published, l0 = _of_saes(config, "l0"), measured.get("l0")
    if None in published and l0 is not None:
        return float(f"{l0:.3g}")
    return _one_or_all(published)


SEEDS = ("seed", "data.seed")
"""The factors in which repetitions of a run differ: `train.seed`, and the seed of the text's order."""
_ALL = (
    Factor("model", lambda config, _: config["model"]["name"], keys=("model.name",), tag="model"),
    Factor("method", lambda config, _: _method(config)["kind"], keys=("method.kind",), tag="method"),
    Factor("init_at", lambda config, _: config["init_at"] if config.get("init") is not None else None),
    Factor(
        "block",
        lambda config, _: _one_or_all(_of_saes(config, "block")),
        label="SAE at block",
        axis="block of the SAE",
        keys=("layer.index", "layer.every", "layer.first"),
        tag="layer",
    ),
    Factor(
        "hook",
        lambda config, _: _one_or_all(_of_saes(config, "hook", "resid_post")),
        axis="activation that the SAE replaces",
        keys=("layer.hook",),
        tag="hook",
    ),
    Factor(
        "width",
        lambda config, _: _one_or_all(_of_saes(config, "width")),
        label="latents",
        axis="latents of the SAE",
        keys=("sae.width",),
        tag="width",
        is_logarithmic=True,
    ),
    Factor(
        "l0",
        _l0,
        label="L0",
        axis="L0 (active latents per token)",
        keys=("sae.l0",),
        tag="l0",
        is_logarithmic=True,
    ),
    Factor(
        "rank",
        lambda config, _: (config["lora"] if trains_adapters(config) else _method(config))["rank"],
        axis="LoRA rank",
        keys=("lora.rank", "method.rank"),
        tag="rank",
        is_logarithmic=True,
    ),
    Factor("alpha", lambda config, _: _of_lora(config, "alpha"), keys=("lora.alpha",)),
    Factor("targets", lambda config, _: _of_lora(config, "targets"), keys=("lora.targets",)),
    Factor("blocks", lambda config, _: _of_lora(config, "blocks"), keys=("lora.blocks",)),
    Factor(
        "tokens",
        lambda config, _: config["train"]["train_tokens"],
        axis="training tokens",
        keys=("train.train_tokens",),
        is_logarithmic=True,
    ),
    Factor(SEEDS[0], lambda config, _: config["train"]["seed"], keys=("train.seed",)),
)
FACTORS: dict[str, Factor] = {factor.name: factor for factor in _ALL}
"""The factors by name, in the order of display."""
_NAMED_KEYS = {"sweep", *(key for factor in _ALL for key in factor.keys)}
ORIGINS = ("sae.release", "sae.id", "sae.path", "init")
"""Config keys that name an SAE or a run. They differ between most runs whose factors differ, so they are
factors only if other factors do not tell the runs apart."""


def label(name: str) -> str:
    """The name of a factor in tables; for another config key, the key."""
    return (FACTORS[name].label if name in FACTORS else "") or name


def title(name: str) -> str:
    """The title of the axis of a factor."""
    return (FACTORS[name].axis if name in FACTORS else "") or label(name)


def values_of(config: Values, measured: Values) -> dict[str, Any]:
    """The factors of a run by name, then all other settings that may change a result, by dotted key.

    `measured` contains the measures of the summary or of the last point; it may be empty.
    """
    named = {name: factor.read(config, measured) for name, factor in FACTORS.items()}
    return named | {
        key: value
        for key, value in flat(dict(config)).items()
        if key in ORIGINS or (key not in _NAMED_KEYS and key not in NOT_HASHED_KEYS)
    }


def varying(rows: Sequence[Values], *, with_followers: bool = False) -> list[str]:
    """The factors in which runs differ, in the order of display; the seeds are last.

    A follower, a factor whose values an earlier one determines (alpha, if it is twice the rank), is left
    out; `with_followers` keeps it if it is one of `FACTORS` with several values. One of `ORIGINS` is
    left out if the others together determine it. Each row contains the values of a run, from
    `values_of`. An empty row is of a damaged run, and does not count.
    """
    rows = [row for row in rows if row]
    special = {*FACTORS, *ORIGINS, *SEEDS}
    other_keys = dict.fromkeys(key for row in rows for key in row if key not in special)
    leaders: dict[str, list[str]] = {}
    for name in (*(name for name in FACTORS if name not in SEEDS), *other_keys, *SEEDS):
        values = [repr(row.get(name)) for row in rows]
        follows = any(
            len({*zip(leader, values, strict=True)}) == len({*leader}) for leader in leaders.values()
        )
        several = len({*values} - {repr(None)}) > 1  # else it only repeats which runs have the factor
        is_kept = name == SEEDS[0] or (with_followers and name in FACTORS and several)
        if len(set(values)) > 1 and (is_kept or not follows):
            leaders[name] = values
    for name in ORIGINS:
        values = [repr(row.get(name)) for row in rows]
        others = list(zip(*leaders.values(), strict=True)) or [()] * len(rows)
        if len({*zip(others, values, strict=True)}) > len({*others}):
            leaders[name] = values
    return sorted(leaders, key=lambda name: name in SEEDS)


def differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The factors in which runs differ, without the seeds. Each row has the factors of a run."""
    return [name for name in varying(rows) if name not in SEEDS]


def differences(rows: Sequence[Values]) -> dict[str, list[str]]:
    """Factors that vary among runs: their values as text, by a short name of the factor.

    The short name is the last part of a config key (`lr` of `train.lr`), unless it is ambiguous. Each
    row contains the values of a run, from `values_of`.
    """
    names = varying(rows)
    parts = [name.rpartition(".")[2] for name in names]
    columns = {}
    for name, part in zip(names, parts, strict=True):
        is_clear = parts.count(part) == 1 and part not in FACTORS
        values = [text(row.get(name)) for row in rows]
        columns[part if is_clear else name] = _without_common_folders(values)
    return columns


def differences_of(folders: Sequence[RunFolder]) -> dict[str, list[str]]:
    """Factors that vary among runs in any state, as `differences`, from their configs."""
    return differences([_values_in(folder) for folder in folders])


def ordered(folders: Sequence[RunFolder]) -> list[RunFolder]:
    """Runs in any state, ordered by the factors in which they differ; damaged runs come last."""
    rows = {folder: _values_in(folder) for folder in folders}
    names = varying(list(rows.values()))

    def key(folder: RunFolder) -> tuple[bool, list[Any]]:
        row = rows[folder]
        return not row, [by_value(row.get(name)) for name in names]

    return sorted(folders, key=key)


def _values_in(folder: RunFolder) -> dict[str, Any]:
    """The factors of a run, from its config; empty if that is damaged, or not written yet."""
    is_readable = damage(folder) is None and folder.config.exists()
    return values_of(folder.read_config(), {}) if is_readable else {}


def labels(columns: Mapping[str, Sequence[str]], runs: int) -> list[str]:
    """The text that tells each of the runs apart (`rank=4 lr=0.001`), from `differences`."""
    return [
        " ".join(f"{name}={values[number]}" for name, values in columns.items())
        for number in range(runs)
    ]


def _without_common_folders(values: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them are in; other texts stay."""
    folders = zip(*(value.split("/")[:-1] for value in values), strict=False)
    common = len(list(takewhile(lambda names: len({*names}) == 1, folders)))
    return ["/".join(value.split("/")[common:]) for value in values]


def finished_runs(folders: Sequence[RunFolder]) -> list["FinishedRun"]:
    """The finished runs, ordered by the factors in which they differ. Copies of a run count once."""
    runs = [
        FinishedRun(folder, summary, values_of(folder.read_config(), summary))
        for folder in folders
        if folder.is_finished
        for summary in [folder.read_summary()]
    ]
    once: dict[str, FinishedRun] = {}
    for run in runs:  # of copies, the one with the run's own name counts, else the first
        run_hash = run.summary["hash"]
        if run_hash not in once or run.folder.path.name.endswith(f"-{run_hash}"):
            once[run_hash] = run
    runs = [run for run in runs if once[run.summary["hash"]] is run]
    names = varying([run.factors for run in runs], with_followers=True)
    return sorted(runs, key=lambda run: [by_value(run.factors.get(name)) for name in names])


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, its summary and its factors."""

    folder: RunFolder
    summary: dict[str, Any]
    factors: dict[str, Any]
    """Factors and their values, from `values_of`."""


def by_value(value: Any) -> tuple[int, float, str]:
    """Sort key of a factor's value: numbers first, by value, then words, by letters."""
    if isinstance(value, int | float):
        return 0, value, ""
    return 1, 0, str(value)
