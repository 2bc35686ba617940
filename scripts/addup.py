"""Do the gains of LoRA and of finetuning the SAE add up?

    python -m scripts.addup outputs --to docs/results/real_model/addup_tiny.json

LoRA, finetuning, both at once, and one after the other in both orders with half of the tokens each:
after the same tokens and after the same FLOPs, on the embedded model with three seeds. Finished runs are
not run again. Prints a table.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import sae_lora
from sae_lora.report.fits import mean_and_margin
from sae_lora.report.sweep import Sweep

SEEDS = (0, 1, 2)
WAYS = {
    "LoRA": ("lora",),
    "finetuning": ("finetune",),
    "both at once": ("both",),
    "LoRA, then finetuning": ("lora", "finetune_after"),
    "finetuning, then LoRA": ("finetune", "lora_after"),
}
"""The variants that each way trains one after the other."""

Launch = Callable[..., Sweep]
"""Launches an experiment with overrides, and returns its runs when they have finished."""
Row = dict[str, Any]


def rows(launch: Launch, tokens: int, step: int, budgets: Sequence[str]) -> Iterator[Row]:
    """Train every way with every seed, and yield the results of each.

    Args:
        launch: For `experiment=addup`, or one like it.
        tokens: Training tokens.
        step: Tokens of a step.
        budgets: Of `tokens` and `FLOPs`. For the latter, a way trains on as many tokens as have the
            FLOPs of LoRA on `tokens`, but for less than a step.
    """
    for seed in SEEDS:
        flops: dict[str, float] = {}
        for budget in budgets:
            for way, variants in WAYS.items():
                if budget == "FLOPs" and way == "LoRA":
                    continue  # the same run
                share = flops["LoRA"] / flops[way] if budget == "FLOPs" else 1
                each = int(tokens * share / len(variants)) // step * step
                names = ",".join(f"addup/{variant}" for variant in variants)
                overrides = (f"train.seed={seed}", f"train.train_tokens={each}")
                runs = launch(f"variant={names}", *overrides)
                row = _row(runs) | {"budget": budget, "way": way, "seed": seed}
                flops.setdefault(way, row["flops"])
                yield row


def _row(runs: Sweep) -> Row:
    """The results of a way: what its last run reaches, compared with the SAE before the first."""
    first, *_ = summaries = [run.summary for run in runs]
    last = summaries[-1]
    return {
        "tokens": sum(summary["train_tokens"] for summary in summaries),
        "flops": sum(summary["train_flops"] for summary in summaries),
        "gap_before": first["initial_gap"],
        "gap_after": last["ce_gap"],
        "gap_closed": 1 - last["ce_gap"] / first["initial_gap"],
        "kl_before": first["initial_kl"],
        "kl_after": last["kl"],
        "fvu": last["fvu"],
    }


def table(results: Sequence[Row]) -> str:
    """A row for each way and budget: shares in percent, means over seeds with 95% intervals.

    Behind a way stands what it has as much of as LoRA. `more` is the difference in points from LoRA with
    the same seed.
    """
    lines = [
        "| way | tokens | FLOPs | gap closed | more | KL closed | more |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lora = {row["seed"]: row for row in results if row["way"] == "LoRA"}
    for way, budget in dict.fromkeys((row["way"], row["budget"]) for row in results):
        group = [row for row in results if (row["way"], row["budget"]) == (way, budget)]
        measures: list[str] = []
        for closed in (_gap_closed, _kl_closed):
            value, margin = mean_and_margin(map(closed, group))
            more, more_margin = mean_and_margin(closed(row) - closed(lora[row["seed"]]) for row in group)
            measures.append(f"{value:.1f}\u00a0±\u00a0{margin:.1f}")
            measures.append(f"{more:+.1f}\u00a0±\u00a0{more_margin:.1f}" if way != "LoRA" else "")
        cells = (
            way if way == "LoRA" else f"{way} ({budget})",
            f"{group[0]['tokens']:,}",
            f"{mean(row['flops'] for row in group):.3g}",
            *measures,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _gap_closed(row: Row) -> float:
    return 100 * row["gap_closed"]


def _kl_closed(row: Row) -> float:
    return 100 * (1 - row["kl_after"] / row["kl_before"])


def main() -> None:
    """Run all, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("outputs", type=Path)
    parser.add_argument("--to", type=Path, help="JSON file for the results")
    given = parser.parse_args()

    def launch(*overrides: str) -> Sweep:
        common = ("experiment=addup", f"output_dir={given.outputs.absolute()}", "tracking=disabled")
        return sae_lora.launch([*common, *overrides])

    results = list(rows(launch, tokens=200_192, step=512, budgets=("tokens", "FLOPs")))
    if given.to:
        given.to.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
