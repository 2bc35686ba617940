"""What people look at: tables made from the run folders alone. Imports no torch."""

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from rich.table import Table

from sae_lora.common.console import duration, percent
from sae_lora.config.enums import Suite
from sae_lora.evaluation.headlines import headlines
from sae_lora.records.folder import RunFolder

_RUN = "run"
"""Heads the column of runs that nothing but their names sets apart."""


def run_table(summary: dict[str, Any]) -> Table:
    """One finished run in full.

    Args:
        summary: What `summary.json` holds.
    """
    table = Table(title=summary["name"], title_justify="left", show_header=False)
    table.add_column("what", style="bold")
    table.add_column("value", justify="right")
    table.add_column("unit", style="dim")
    nats = "nats/token"
    rows = [
        ("base CE", f"{summary['base_ce']:.4f}", nats),
        ("spliced CE", f"{summary['spliced_ce']:.4f}", nats),
        ("student CE", f"{summary['student_ce']:.4f}", nats),
        ("gap before", f"{summary['initial_gap']:+.4f}", nats),
        ("gap after", f"{summary['ce_gap']:+.4f}", nats),
        ("gap closed", percent(summary["gap_closed"]), _why_undefined(summary)),
        ("KL before", f"{summary['initial_kl']:.4f}", nats),
        ("KL", f"{summary['kl']:.4f}", nats),
        ("top-1 agreement", f"{summary['top1_agreement']:.1%}", "with the base model"),
        ("FVU", f"{summary['fvu']:.4f}", "of the SAE's input"),
        ("L0", f"{summary['l0']:.1f}", "latents/token"),
        ("trainable parameters", f"{summary['trainable_parameters']:,}", ""),
        ("training tokens", f"{summary['train_tokens']:,}", ""),
        ("time training", duration(summary["train_seconds"]), ""),
        ("time in all", duration(summary["total_seconds"]), ""),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _why_undefined(summary: dict[str, Any]) -> str:
    if summary["gap_closed"] is not None:
        return ""
    return "there is no gap" if summary["initial_gap"] <= 0 else "the SAE is new"


_NUMBERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "base CE": lambda summary: f"{summary['base_ce']:.3f}",
    "spliced CE": lambda summary: f"{summary['spliced_ce']:.3f}",
    "student CE": lambda summary: f"{summary['student_ce']:.3f}",
    "gap before": lambda summary: f"{summary['initial_gap']:+.3f}",
    "gap after": lambda summary: f"{summary['ce_gap']:+.3f}",
    "gap closed": lambda summary: percent(summary["gap_closed"]),
    "KL": lambda summary: f"{summary['kl']:.3f}",
    "parameters": lambda summary: f"{summary['trainable_parameters']:,}",
    "training": lambda summary: duration(summary["train_seconds"]),
}
FACTORS: dict[str, Callable[[dict[str, Any]], str]] = {
    "model": lambda summary: summary["model"]["name"],
    "SAE at block": lambda summary: _places(summary["sae"]),
    "latents": lambda summary: "+".join(sorted({str(sae["width"]) for sae in summary["sae"]})),
    "L0": lambda summary: f"{summary['l0']:.3g}",
    "method": lambda summary: summary.get("method", {"kind": "lora"})["kind"],
    "rank": lambda summary: _of_what_is_trained(summary, "rank"),
    "alpha": lambda summary: _of_what_is_trained(summary, "alpha"),
    "targets": lambda summary: _of_what_is_trained(summary, "targets"),
    "blocks": lambda summary: _of_what_is_trained(summary, "blocks"),
    "tokens": lambda summary: f"{summary['train_tokens']:,}",
    "seed": lambda summary: str(summary["seed"]),
}
"""What runs of a sweep may differ in, as a reader names it."""


def _of_what_is_trained(summary: dict[str, Any], name: str) -> str:
    """A property of LoRA adapters, or of what a method trains instead."""
    value = (summary["lora"] or summary["method"]).get(name)
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, int | float) else joined(value)


def _places(saes: Sequence[dict[str, Any]]) -> str:
    """Their blocks, and what of them they replace where that is not the output."""
    hooks = dict.fromkeys(sae["hookpoint"].rpartition("hook_")[2] for sae in saes)
    named = "" if list(hooks) == ["resid_post"] else f" ({'+'.join(hooks)})"
    return "+".join(str(sae["block"]) for sae in saes) + named


def spread(ratios: Sequence[float]) -> str:
    """Their median, and in brackets the least and the most."""
    return f"{statistics.median(ratios):.1f} ({min(ratios):.1f}–{max(ratios):.1f})"


def in_whole_words(table: Table, but: str | None = None) -> Table:
    """The table, made so that a narrow terminal breaks its cells between words alone.

    Args:
        table: Complete.
        but: Heading of a column that may be broken anywhere.
    """
    for column in table.columns:
        if column.header != but:
            words = " ".join([str(column.header), *map(str, column.cells)]).split()
            column.min_width = max(map(len, words))
    return table


def joined(value: str | list[Any]) -> str:
    """One word, or several as one."""
    return value if isinstance(value, str) else "+".join(map(str, value))


def varying_factors(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the factors in which the runs differ, in their usual order."""
    return [name for name, read in FACTORS.items() if len({read(one) for one in summaries}) > 1]


def finished_summaries(folders: Sequence[RunFolder]) -> list[tuple[RunFolder, dict[str, Any]]]:
    """The finished runs with their summaries, ordered by the factors in which they differ."""
    pairs = [(folder, folder.read_summary()) for folder in folders if folder.is_finished]
    varying = varying_factors([summary for _, summary in pairs])
    return sorted(pairs, key=lambda pair: [_natural(FACTORS[name](pair[1])) for name in varying])


def _natural(text: str) -> tuple[float, str]:
    """Numbers by their value, before words by their letters."""
    try:
        return float(text.replace(",", "")), ""
    except ValueError:
        return float("inf"), text


def comparison_table(folders: Sequence[RunFolder]) -> Table:
    """Finished runs side by side, a row each; what is the same in all of them stands in the title.

    Args:
        folders: Runs; those that are not finished are left out.
    """
    pairs = finished_summaries(folders)
    summaries = [summary for _, summary in pairs]
    same = {
        name: read(summaries[0])
        for name, read in (FACTORS | _NUMBERS).items()
        if name
        in ("model", "SAE at block", "latents", "L0", "rank", "base CE", "spliced CE", "gap before")
        and len({read(one) for one in summaries}) == 1
    }
    table = Table(
        title=", ".join(f"{name} {value}" for name, value in same.items()), title_justify="left"
    )
    numbers = {name: read for name, read in _NUMBERS.items() if name not in same}
    _fill(
        table, _told_apart(pairs) | {name: list(map(read, summaries)) for name, read in numbers.items()}
    )
    return table


def evaluation_tables(folders: Sequence[RunFolder], suites: Iterable[Suite]) -> Iterator[Table]:
    """What suites have found of finished runs, a row each: the few numbers that stand for a suite.

    Args:
        folders: Runs; those that are not finished are left out.
        suites: The suites, each for a table; where one has found nothing there is none. Of a run that it
            has not measured there are dashes.
    """
    pairs = finished_summaries(folders)
    apart = _told_apart(pairs)
    found = [headlines(folder) for folder, _ in pairs]
    names = dict.fromkeys(chain(*found))
    for suite in suites:
        values = {
            name.partition("/")[2].replace(", ", "\n"): [
                f"{one[name]:.3g}" if name in one else "–" for one in found
            ]
            for name in names
            if name.startswith(f"{suite.name}/")
        }
        if values:
            table = Table(title=suite.name, title_justify="left")
            _fill(table, apart | values)
            yield in_whole_words(table)


def _told_apart(pairs: Sequence[tuple[RunFolder, dict[str, Any]]]) -> dict[str, list[str]]:
    """By column, what sets finished runs apart; their names where nothing does."""
    summaries = [summary for _, summary in pairs]
    varying = varying_factors(summaries)
    named = [tuple(FACTORS[name](summary) for name in varying) for summary in summaries]
    found = _other_differences([folder for folder, _ in pairs], named)
    found |= {name: [FACTORS[name](summary) for summary in summaries] for name in varying}
    return found or {_RUN: [summary["name"] for summary in summaries]}


def _fill(table: Table, columns: Mapping[str, Sequence[str]]) -> None:
    for name in columns:
        table.add_column(name, justify="left" if name == _RUN else "right", no_wrap=name != _RUN)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)


_TOLD_BY_FACTORS = {"model", "sae", "layer", "lora", "launcher", "tracking"}
"""Groups of the config that say nothing of a result that the factors do not say."""


def _other_differences(
    folders: Sequence[RunFolder], named: Sequence[tuple[str, ...]]
) -> dict[str, list[str]]:
    """By its key, what else the configs of runs say that the factors `named` do not tell apart."""
    if len(set(named)) == len(named):
        return {}
    values = [_settings(folder) for folder in folders]
    alike = [
        [one for one, name in zip(values, named, strict=True) if name == which] for which in set(named)
    ]
    there = dict.fromkeys(key for one in values for key in one)
    keys = [key for key in there if any(len({one.get(key) for one in those}) > 1 for those in alike)]
    return {key: [one.get(key, "–") for one in values] for key in keys}


def _settings(folder: RunFolder) -> dict[str, str]:
    config = folder.read_config()
    begins = config.get("init") is not None
    found = {"init_at": str(config["init_at"])} if begins else {}
    for group, values in config.items():
        if isinstance(values, dict) and group not in _TOLD_BY_FACTORS:
            found |= {f"{group}.{name}": str(value) for name, value in values.items()}
    return found
