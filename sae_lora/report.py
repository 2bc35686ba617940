"""What people look at: tables made from the run folders alone. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from sae_lora.records import RunFolder


def percent(share: float | None) -> str:
    """A share as per cent; where it is undefined, says so."""
    return "undefined (no gap)" if share is None else f"{share:.1%}"


def duration(seconds: float) -> str:
    """Seconds as people write them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


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
        ("gap closed", percent(summary["gap_closed"]), ""),
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


def comparison_table(folders: Sequence[RunFolder]) -> Table:
    """Finished runs side by side, a row each.

    Args:
        folders: Runs; those that are not finished are left out.
    """
    table = Table(title="gap closed, held-out text (CE and KL in nats/token)", title_justify="left")
    for name in ("run", "rank", "block", "width", "L0"):
        table.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
    for name in ("base CE", "spliced CE", "student CE", "gap before", "gap after"):
        table.add_column(name, justify="right")
    for name in ("gap closed", "KL", "parameters", "training"):
        table.add_column(name, justify="right")
    for folder in folders:
        if folder.is_finished:
            table.add_row(*_row(folder.read_summary()))
    return table


def _row(summary: dict[str, Any]) -> list[str]:
    saes = summary["sae"]
    return [
        summary["name"],
        str(summary["lora"]["rank"]),
        "+".join(str(sae["block"]) for sae in saes),
        "+".join(sorted({str(sae["width"]) for sae in saes})),
        f"{summary['l0']:.1f}",
        *(f"{summary[key]:.3f}" for key in ("base_ce", "spliced_ce", "student_ce")),
        *(f"{summary[key]:+.3f}" for key in ("initial_gap", "ce_gap")),
        percent(summary["gap_closed"]),
        f"{summary['kl']:.3f}",
        f"{summary['trainable_parameters']:,}",
        duration(summary["train_seconds"]),
    ]
