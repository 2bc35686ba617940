"""Records, figures and tables of docs/results/real_model.md.

    python -m scripts.real_model.tables docs/results/real_model.md --outputs real_model/outputs
    python -m scripts.real_model.tables docs/results/real_model.md

The first command writes the records (`real_model/*.json`) and the figures beside the page, from the
runs of `python -m scripts.real_model`; records of runs that these outputs lack stay. Both write the
tables into the page, from the records: each in place of the table after its comment, `<!-- rates -->`.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas
import plotly.graph_objects as go

import sae_lora
from sae_lora.common.plots import COLOURS, finished, line_and_markers, logarithmic, write_svgs
from sae_lora.evaluation.headlines import headlines
from sae_lora.records.factors import values_of
from sae_lora.records.folder import RunFolder
from sae_lora.report.fits import Frame, mean_and_margin
from sae_lora.report.sweep import Run
from scripts import addup, pages
from scripts.pages import fixed, markdown, percent, whole

_MEASURED = (
    *("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed"),
    *("initial_kl", "kl", "top1_agreement", "fvu", "dead_latents"),
    *("trainable_parameters", "train_tokens", "train_seconds", "total_seconds", "train_flops"),
)
_METHODS = {
    "lora": "LoRA",
    "sae_finetune": "finetuned SAE",
    "linear_adapter": "linear adapter",
    "lora_sae": "LoRA and finetuned SAE at once",
    "sae": "new SAE",
}


Row = dict[str, Any]


def record(run: Run) -> Row:
    """The settings and the results of a finished run."""
    config, summary = run.config, run.summary
    factors = values_of(config, summary)
    lora, train = config["lora"], config["train"]
    curve = run.curve()
    return {
        "sweep": run.folder.parent.name,
        "run": run.name,
        "device": summary["environment"]["device"],
        "method": config["method"]["kind"],
        **{name: factors[name] for name in ("l0", "rank")},
        "alpha": lora["alpha"],
        "recipe": "paper" if train["kl_reduction"] == "sequence_sum" else "default",
        "lr": train["lr"],
        "lora_lr": config["method"]["lora_lr"],
        "schedule": train["schedule"],
        "batch": train["batch_size"],
        "loraplus": train["loraplus_ratio"],
        "seed": train["seed"],
        "model_dtype": config["model"]["dtype"],
        "sae_dtype": config["sae"]["dtype"],
        "held_out": config["data"]["validation_tokens"],
        **{name: summary.get(name) for name in _MEASURED},
        "suites": headlines(RunFolder(run.folder)),
        "curve": [
            [int(tokens), float(gap), float(kl)]
            for tokens, gap, kl in zip(curve["tokens"], curve["ce_gap"], curve["kl"], strict=True)
        ],
    }


def _of(frame: Frame, sweep: str, **values: Any) -> Frame:
    """The runs of a sweep with these settings."""
    part = frame[frame["sweep"] == f"smollm2_{sweep}"]
    for name, value in values.items():
        part = part[part[name] == value]
    return part


def _names(part: Frame) -> list[str]:
    """Method, rank and recipe of each run."""
    return [
        _METHODS[run.method]
        + (f", rank {run.rank:.0f}" if run.rank == run.rank else "")
        + (", paper's recipe" if run.recipe == "paper" else "")
        for run in part.itertuples()
    ]


def _pair(gap_closed: float, kl_closed: float) -> str:
    return f"{100 * gap_closed:.1f}, {100 * kl_closed:.1f}"


def _kl_closed(part: Frame) -> Any:
    return 1 - part["kl"] / part["initial_kl"]


def sae_rates(frame: Frame) -> str:
    """The CE gap of new SAEs by their rate."""
    part = _of(frame, "sae_rates").pivot_table("ce_gap", "l0", "lr")
    return markdown({"L0": whole(part.index)} | {f"rate {lr:g}": fixed(part[lr]) for lr in part.columns})


def saes(frame: Frame) -> str:
    """CE gap, KL and FVU of the SAEs, on all held-out tokens."""
    part = _of(frame, "ranks", method="lora", rank=1, recipe="default").sort_values("l0")
    return markdown(
        {
            "L0": whole(part["l0"]),
            "CE, plain": fixed(part["base_ce"]),
            "CE, spliced": fixed(part["spliced_ce"]),
            "gap": fixed(part["initial_gap"]),
            "KL": fixed(part["initial_kl"]),
            "FVU": fixed(part["fvu"]),
        }
    )


def precision(frame: Frame) -> str:
    """Forward and training in bfloat16 and float32."""
    part = _of(frame, "precision").sort_values(["device", "model_dtype", "sae_dtype"], ascending=False)
    return markdown(
        {
            "model, SAE": [f"{run.model_dtype}, {run.sae_dtype}" for run in part.itertuples()],
            "device": ["CPU" if device == "cpu" else "GPU" for device in part["device"]],
            "CE, plain": fixed(part["base_ce"], 4),
            "CE, spliced": fixed(part["spliced_ce"], 4),
            "gap closed": percent(part["gap_closed"]),
            "KL": fixed(part["kl"], 4),
            "tokens/s": [  # on the GPU, other runs trained at the same time
                f"{run.train_tokens / run.train_seconds:,.0f}" if run.device == "cpu" else ""
                for run in part.itertuples()
            ],
        }
    )


def rates(frame: Frame) -> str:
    """Gap and KL closed by rank, schedule and rate."""
    part = _of(frame, "recipe", batch=4, alpha=6, loraplus=1)
    return _by_rate(part, ["rank", "schedule"], "rank, schedule")


def batches(frame: Frame) -> str:
    """Gap and KL closed by rank, batch size and rate."""
    part = _of(frame, "recipe", alpha=6, loraplus=1, schedule="linear")
    return _by_rate(part, ["rank", "batch"], "rank, sequences per step")


def _by_rate(part: Frame, rows: Sequence[str], title: str) -> str:
    part = part.assign(
        row=[
            ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in key)
            for key in zip(*(part[name] for name in rows), strict=True)
        ]
    )
    return _shares(part.sort_values(list(rows)), "row", "lr", title, "rate {:g}")


def _shares(part: Frame, row: str, column: str, title: str, heading: str) -> str:
    """Gap closed and KL closed in each cell, with a row and a column for each value of two settings."""
    cells = {
        (run[row], run[column]): _pair(run["gap_closed"], run["kl_closed"])
        for _, run in part.assign(kl_closed=_kl_closed(part)).iterrows()
    }
    rows, columns = list(dict.fromkeys(part[row])), sorted(set(part[column]))
    return markdown(
        {title: [f"{value:g}" if isinstance(value, float) else str(value) for value in rows]}
        | {heading.format(value): [cells.get((name, value), "") for name in rows] for value in columns}
    )


def scales(frame: Frame) -> str:
    """Gap and KL closed by alpha and LoRA+."""
    part = _of(frame, "recipe", rank=16, lr=4.5e-3, batch=4, schedule="linear")
    return _shares(part.sort_values("alpha"), "alpha", "loraplus", "alpha", "LoRA+ ratio {:g}")


def other_rates(frame: Frame) -> str:
    """Gap and KL closed by the other methods and rates."""
    part: Frame = pandas.concat([_of(frame, "methods"), _of(frame, "both")])
    part = part.assign(
        name=[
            _METHODS[method] + (f", LoRA at {lora:g}" if method == "lora_sae" else "")
            for method, lora in zip(part["method"], part["lora_lr"], strict=True)
        ]
    )
    return _shares(part, "name", "lr", "method", "rate {:g}")


def budget(frame: Frame) -> str:
    """Gap and KL closed over ten times the tokens."""
    part = _of(frame, "budget").sort_values(["method", "rank", "lr"])
    shares: dict[str, list[str]] = {}
    for curve in part["curve"]:
        (_, first_gap, first_kl), *points = curve
        for tokens, gap, kl in points:
            share = _pair(1 - gap / first_gap, 1 - kl / first_kl)
            shares.setdefault(f"{tokens:,} tokens", []).append(share)
    return markdown({"method": _names(part), "rate": [f"{lr:g}" for lr in part["lr"]]} | shares)


def ranks(frame: Frame) -> str:
    """Ranks, recipes and methods after the same tokens."""
    part = _of(frame, "ranks", seed=0)
    part = part.sort_values(["l0", "recipe", "method", "rank"], ascending=[True, True, False, True])
    return markdown(
        {
            "method": _names(part),
            "L0": whole(part["l0"]),
            "gap after": fixed(part["ce_gap"]),
            "gap closed": percent(part["gap_closed"]),
            "KL closed": percent(_kl_closed(part)),
            "top-1": percent(part["top1_agreement"]),
            "weights": whole(part["trainable_parameters"]),
        }
    )


def seeds(frame: Frame) -> str:
    """Rank 16 on other text in another order."""
    part = _of(frame, "ranks", method="lora", rank=16, recipe="default", l0=16).sort_values("seed")
    closed, margin = mean_and_margin(100 * part["gap_closed"])
    kl, kl_margin = mean_and_margin(100 * _kl_closed(part))
    return markdown(
        {
            "seed": [*whole(part["seed"]), "mean, 95% interval"],
            "CE, plain": [*fixed(part["base_ce"]), ""],
            "CE, spliced": [*fixed(part["spliced_ce"]), ""],
            "gap closed": [*percent(part["gap_closed"]), f"{closed:.1f}% ± {margin:.1f}"],
            "KL closed": [*percent(_kl_closed(part)), f"{kl:.1f}% ± {kl_margin:.1f}"],
        }
    )


def devices(frame: Frame) -> str:
    """The largest difference between the results of runs on two devices, by sweep and dtype."""
    measures = ["base_ce", "spliced_ce", "kl", "gap_closed"]
    on_two = frame[frame.duplicated(["sweep", "run"], keep=False)]
    rows = []
    for (sweep, dtype), part in on_two.groupby(["sweep", "model_dtype"], sort=False):
        apart = part.groupby("run")[measures].agg(lambda values: values.max() - values.min())
        rows.append([f"`{sweep}`, {dtype}", len(apart), *apart.max()])
    names, runs, base, spliced, kl, closed = zip(*rows, strict=True)
    return markdown(
        {
            "sweep, model": names,
            "runs": whole(runs),
            "CE, plain": fixed(base, 4),
            "CE, spliced": fixed(spliced, 4),
            "KL": fixed(kl, 4),
            "gap closed, points": fixed((100 * share for share in closed), 1),
        }
    )


def costs(frame: Frame) -> str:
    """Minutes of each sweep on two cores: measured, or at the mean speed of the measured sweeps."""
    sweeps = preferred(frame).groupby("sweep", sort=False)
    on_cpu = frame[frame["device"] == "cpu"]
    complete = [
        name for name, runs in sweeps if set(runs["run"]) <= set(on_cpu[on_cpu["sweep"] == name]["run"])
    ]
    measured = on_cpu[on_cpu["sweep"].isin(complete)]
    flops_per_minute = 60 * measured["train_flops"].sum() / measured["total_seconds"].sum()
    columns: dict[str, list[str]] = {"sweep": [], "runs": [], "training FLOPs": [], "minutes": []}
    for sweep, runs in sweeps:
        minutes = measured[measured["sweep"] == sweep]["total_seconds"].sum() / 60
        counted = runs["train_flops"].sum() / flops_per_minute
        columns["sweep"].append(f"`{sweep}`")
        columns["runs"].append(str(len(runs)))
        columns["training FLOPs"].append(f"{runs['train_flops'].sum():.2g}")
        columns["minutes"].append(f"{minutes:.0f}" if sweep in complete else f"about {counted:.0f}")
    return markdown(columns)


def suites(frame: Frame) -> str:
    """Headline numbers of the suites, of LoRA and of the finetuned SAE."""
    part = _of(frame, "addup", seed=0)
    part = part[part["suites"].map(bool)]
    names = list(dict.fromkeys(name for numbers in part["suites"] for name in numbers))
    return markdown(
        {"suite and measure": names}
        | {
            _METHODS[run.method]: [
                f"{run.suites[name]:.3g}" if name in run.suites else "" for name in names
            ]
            for run in part.itertuples()
        }
    )


TABLES: dict[str, Callable[[Frame], str]] = {
    table.__name__: table
    for table in (
        *(sae_rates, saes, rates, batches, scales, other_rates, budget),
        *(ranks, seeds, suites, precision, devices, costs),
    )
}
_OF_ALL_DEVICES = {"precision", "devices", "costs", "suites"}


def preferred(frame: Frame) -> Frame:
    """One record for each run: of two devices the GPU's, because it has more of the runs."""
    by_device = frame.sort_values("device", key=lambda device: device == "cpu", kind="stable")
    return by_device.drop_duplicates(["sweep", "run"]).sort_index()


def rate_figure(frame: Frame) -> go.Figure:
    """KL closed over the rate, by rank and schedule; rates that close nothing are left out."""
    part = _of(frame, "recipe", batch=4, alpha=6, loraplus=1).sort_values("lr")
    part = part.assign(kl_closed=_kl_closed(part))
    part = part[part["kl_closed"] > 0]
    figure = go.Figure()
    for number, (rank, of_rank) in enumerate(part.groupby("rank")):
        for place, schedule in enumerate(("linear", "constant")):
            runs = of_rank[of_rank["schedule"] == schedule]
            if runs.empty:
                continue
            figure.add_scatter(
                x=list(runs["lr"]),
                y=list(runs["kl_closed"]),
                name=f"rank {rank:.0f}, {'falls to zero' if schedule == 'linear' else 'constant'}",
                mode="lines+markers",
                **line_and_markers(COLOURS[number], place),
            )
    figure.update_layout(
        xaxis={"title": "learning rate", **logarithmic(list(part["lr"]), ".2~e")},
        yaxis={"title": "KL closed", "tickformat": ".0%"},
    )
    return finished(figure)


def rank_figure(frame: Frame) -> go.Figure:
    """CE gap and KL closed over the rank, around both SAEs."""
    part = _of(frame, "ranks", method="lora", seed=0)
    figure = go.Figure()
    for number, ((l0, recipe), runs) in enumerate(part.groupby(["l0", "recipe"])):
        runs = runs.sort_values("rank")
        for place, (name, values) in enumerate(
            (("CE gap", runs["gap_closed"]), ("KL", _kl_closed(runs)))
        ):
            figure.add_scatter(
                x=list(runs["rank"]),
                y=list(values),
                name=f"L0 {l0:.0f}, {recipe} recipe, {name}",
                mode="lines+markers",
                **line_and_markers(COLOURS[number], place),
            )
    figure.update_layout(
        xaxis={"title": "LoRA rank", "type": "log", "tickvals": [1, 16, 64]},
        yaxis={"title": "share closed", "tickformat": ".0%", "rangemode": "tozero"},
    )
    return finished(figure)


def add_up_figure(frame: Frame) -> go.Figure:
    """The CE gap over the training tokens of LoRA, finetuning and both at once, with a line per seed."""
    part = _of(frame, "addup")
    part = part[part["train_tokens"] == part["train_tokens"].max()]
    figure = go.Figure()
    for number, (method, runs) in enumerate(part.groupby("method", sort=False)):
        for place, run in enumerate(runs.itertuples()):
            tokens, gaps, _ = zip(*run.curve, strict=True)
            figure.add_scatter(
                x=tokens,
                y=[gap / gaps[0] for gap in gaps],
                name=_METHODS[method],
                legendgroup=method,
                showlegend=place == 0,
                mode="lines",
                line={"color": COLOURS[number], "width": 2},
            )
    figure.update_layout(
        xaxis={"title": "training tokens", "rangemode": "tozero"},
        yaxis={"title": "CE gap, share of the gap before", "tickformat": ".0%"},
    )
    return finished(figure)


FIGURES = {"rates": rate_figure, "ranks": rank_figure, "add_up": add_up_figure}


def checked(values: Mapping[str, Mapping[str, float]]) -> str:
    """The numbers of the run and of the independent script."""
    return markdown(
        {
            "measure": list(values),
            "run": [f"{row['run']:.9f}" for row in values.values()],
            "script, float64": [f"{row['script']:.9f}" for row in values.values()],
            "difference": [f"{row['difference']:.0e}" for row in values.values()],
        }
    )


def prompt(texts: Mapping[str, str]) -> str:
    """The continuations of one prompt."""
    rows = [f"| {name} | {' '.join(text.split())} |" for name, text in texts.items()]
    return "\n".join(["| model | prompt and continuation |", "|---|---|", *rows])


OTHERS: dict[str, Callable[[Any], str]] = {
    "addup": addup.table,
    "addup_tiny": addup.table,
    "check": lambda record: checked(record["values"]),
    "prompt": prompt,
}
"""Tables from files of their own, by the name of the file. `scripts.addup` writes addup_tiny."""


def with_tables(page: str, records: Path) -> str:
    """The text of the page with the tables of the records.

    Raises:
        KeyError: If a comment names no table.
    """

    def read(name: str) -> Any:
        return json.loads((records / f"{name}.json").read_text())

    frame: Frame = pandas.DataFrame(read("runs"))
    one_device = preferred(frame)

    def table(name: str) -> str:
        if name in OTHERS:
            return OTHERS[name](read(name))
        return TABLES[name](frame if name in _OF_ALL_DEVICES else one_device)

    return pages.with_tables(page, table)


def with_earlier(rows: Sequence[Row], path: Path) -> list[Row]:
    """The records in the file and these; of two for a run and a device, the new one."""
    earlier = json.loads(path.read_text()) if path.exists() else []
    by_name = {(row["sweep"], row["run"], row["device"]): row for row in [*earlier, *rows]}
    return [by_name[name] for name in sorted(by_name)]


def main() -> None:
    """Write the records, the figures and the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--outputs", type=Path)
    given = parser.parse_args()
    page, records = given.page, given.page.with_suffix("")
    if given.outputs:
        runs = sae_lora.load_sweep(*sorted(given.outputs.glob("smollm2_*")))
        records.mkdir(parents=True, exist_ok=True)
        rows = with_earlier([record(run) for run in runs if run.state == "done"], records / "runs.json")
        (records / "runs.json").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        for name in OTHERS:
            if (made := given.outputs / f"{name}.json").exists():
                shutil.copyfile(made, records / made.name)
        frame = preferred(pandas.DataFrame(rows))
        write_svgs({name: draw(frame) for name, draw in FIGURES.items()}, records)
    page.write_text(with_tables(page.read_text(), records))


if __name__ == "__main__":
    main()
