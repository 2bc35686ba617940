"""A report of sweeps: one page that needs no network, its figures for papers, its tables for programs.

<folder>/
    index.html                 the page
    figures/*.svg, *.png       the same figures
    runs.csv, runs.parquet     a row per run
    curves.parquet             a row per evaluation
    summary.json               what the page says, for programs; written last

All of it is made from run folders alone, and can be made again. Imports no torch.
"""

import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from sae_lora.common import plots
from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.enums import Suite
from sae_lora.evaluation import suite_figures, suite_records
from sae_lora.evaluation.lora import similarity_figures, similarity_results
from sae_lora.records.factors import SEED, label
from sae_lora.records.folder import RunFolder
from sae_lora.records.metrics import METRICS
from sae_lora.report import figures
from sae_lora.report.fits import Fit, Frame, NoFit, fit, group_of
from sae_lora.report.frames import Sweep, factors

VERSION = 1
_KIND = "sae_lora report"
_FITTED = ("rank", "l0", "width")
_CURVES = "gap_over_"
"""How the names of the curves' figures begin."""
_OVER = ("tokens", "train_seconds", "train_flops")
"""What the curves are drawn over."""
_DOWNSTREAM = {
    Suite.tasks: ("What the models can do", suite_figures.tasks, "Bars: 1.96 standard errors."),
    Suite.steering: ("How well latents steer", suite_figures.steering, "Bars: 95% intervals."),
    Suite.saebench: ("SAEBench", suite_figures.saebench, "Of the plain model and of the adapted one."),
}
"""Suites of what a run is worth downstream: a heading, the figure, and what it says."""
_MOST_MAPPED = 3
"""Factors that a heat map shows."""


@dataclass(frozen=True)
class View:
    """One figure of a report."""

    name: str
    """Of its files."""
    heading: str
    figure: Any
    """plotly's."""
    note: str = ""
    """What it says, in a sentence."""


@dataclass(frozen=True)
class Report:
    """What was found out about sweeps, before any of it is drawn."""

    frame: Frame
    curves: Frame
    varying: list[str]
    """The factors in which runs differ, the seed left out."""
    fits: list[Fit | NoFit]

    @classmethod
    def of(cls, sweep: Sweep) -> "Report":
        """That of these runs as they are now."""
        frame = sweep.frame()
        varying = [name for name in figures.by_prominence(factors(frame)) if name != SEED]
        done = frame[frame["state"] == "done"]
        fits = [
            fit(done, name, [other for other in varying if other != name])
            for name in _FITTED
            if name in varying
        ]
        return cls(frame, sweep.curves(), varying, fits)

    @property
    def done(self) -> Frame:
        """The finished runs."""
        return self.frame[self.frame["state"] == "done"]

    @property
    def states(self) -> dict[str, int]:
        """How many runs are in which state."""
        return dict(Counter(self.frame["state"]))

    @property
    def methods(self) -> list[str]:
        """What is trained in them."""
        return ["LoRA" if name == "lora" else name for name in dict.fromkeys(self.frame["method"])]

    @property
    def best(self) -> dict[str, Any] | None:
        """The run that closes the most."""
        closed = self.done["gap_closed"].astype(float)
        return None if closed.isna().all() else _plain(self.done.loc[closed.idxmax()].to_dict())

    @property
    def missing(self) -> list[str]:
        """What cannot be shown, and why."""
        found = [
            f"{number} of {len(self.frame)} runs: {state}"
            for state, number in self.states.items()
            if state != "done"
        ]
        no_gap = int(self.done["gap_closed"].isna().sum())
        if no_gap:
            found.append(f"gap closed is undefined in {no_gap} runs, whose SAE opens no gap or is new")
        no_flops = int(self.done["train_flops"].isna().sum())
        if no_flops:
            found.append(f"training FLOPs are not known of {no_flops} runs, made by an older version")
        return found + [str(one) for one in self.fits if isinstance(one, NoFit)]

    def views(self) -> list[View]:
        """Its figures. The curves come first, over each of what they are drawn over."""
        found = [
            View(f"{_CURVES}{over}", f"CE gap over {METRICS[over].title}", curves)
            for over in _OVER
            if self.curves[over].notna().any()
            and (curves := figures.gap_curves(self.frame, self.curves, over)).data
        ]
        found += self._evaluated()
        done = self.done[self.done["gap_closed"].notna()]
        if done.empty:
            return found
        fitted = {one.factor: one for one in self.fits if isinstance(one, Fit)}
        for name in self.varying:
            others = [other for other in self.varying if other != name]
            one = fitted.get(name)
            figure = figures.gap_closed_against(done, name, others, one)
            note = f"Grey: {one}." if one else ""
            heading = f"Gap closed against {label(name)}"
            found.append(View(f"gap_closed_{_file(name)}", heading, figure, note))
        if 2 <= len(self.varying) <= _MOST_MAPPED:
            heading = f"Gap closed over {' and '.join(map(label, self.varying))}"
            found.append(View("heat_map", heading, figures.heat_map(done, self.varying)))
        found.append(
            View("efficiency", "Gap closed against what it cost", figures.efficiency(done, self.varying))
        )
        return found

    def _evaluated(self) -> list[View]:
        """Figures of what suites have found of the runs, as far as they are few enough to tell apart."""
        names = [", ".join(group) or "run" for group in group_of(self.done, self.varying)]
        runs = zip(names, self.done["seed"], self.done["folder"], strict=True)
        named = {
            name if names.count(name) == 1 else f"{name}, seed {seed}": folder
            for name, seed, folder in runs
        }

        def found(suite: Suite) -> dict[str, Any]:
            there = {
                name: suite_records.read(RunFolder(Path(path)), suite) for name, path in named.items()
            }
            results = {name: one.results for name, one in there.items() if one is not None}
            return dict(list(results.items())[: suite_figures.MOST_RUNS])

        views = []
        if core := found(Suite.core):
            note = "Held-out tokens; left of zero are those that training makes likelier."
            heading = "What training does to single tokens"
            views.append(View("loss_change", heading, suite_figures.loss_change(core), note))
            note = "Dotted: before training."
            views.append(
                View("by_position", "CE gap over the position", suite_figures.by_position(core), note)
            )
        if mechanism := found(Suite.mechanism):
            heading = "Distance of the residual stream to the plain model's"
            note = "Dotted: before training. Bars: 90% intervals."
            views.append(View("distances", heading, suite_figures.distances(mechanism), note))
        for suite, (heading, draw, note) in _DOWNSTREAM.items():
            if results := found(suite):
                views.append(View(suite.name, heading, draw(results), note))
        for view in views:
            view.figure.update_layout(legend_title_text=", ".join(map(label, self.varying)))
        sweeps = dict.fromkeys(Path(path).parent for path in self.done["folder"])
        alike = [pair for sweep in sweeps for pair in similarity_results.read(sweep)][
            : similarity_figures.MOST_PAIRS
        ]
        for number, pair in enumerate(alike, 1):
            heading = "Directions that adapters have in common"
            note = f"{pair.first} and {pair.second}."
            views.append(
                View(f"similarity_{number}", heading, similarity_figures.similarity_map(pair), note)
            )
        return views

    def summary(self) -> dict[str, Any]:
        """What it says, for programs: the schema of the report's `summary.json`."""
        return {
            "kind": _KIND,
            "version": VERSION,
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "sweeps": sorted(set(self.frame["sweep"])),
            "states": self.states,
            "varying": self.varying,
            "best": self.best,
            "fits": [
                asdict(one) | {"intercepts": _named(one)} for one in self.fits if isinstance(one, Fit)
            ],
            "missing": self.missing,
            "runs": [_plain(row) for row in self.frame.to_dict("records")],
        }


def write(sweep: Sweep, to: Path, *, pictures: bool = True) -> list[str]:
    """Writes a report.

    Args:
        sweep: The runs.
        to: Its folder; an older report there is replaced.
        pictures: Whether the figures are written as files of their own too.

    Returns:
        Lines on what could not be made.

    Raises:
        UserError: Where the folder holds something else, or cannot be written.
    """
    _check_free(to)
    report = Report.of(sweep)
    views = report.views()
    try:
        (to / "figures").mkdir(parents=True, exist_ok=True)
        write_atomically(to / "index.html", page(report, views, to))
        write_atomically(to / "runs.csv", report.frame.to_csv(index=False))
        for name, table in (("runs", report.frame), ("curves", report.curves)):
            beside = to / f".{name}.parquet"
            _uniform(table).to_parquet(beside, index=False)
            beside.replace(to / f"{name}.parquet")
        notes = _write_pictures(views, to / "figures") if pictures else []
        write_atomically(to / "summary.json", as_json(report.summary()))
    except OSError as error:
        raise UserError(f"--to: cannot write {to}: {error.strerror}") from error
    return notes


def page(report: Report, views: Sequence[View], to: Path) -> str:
    """The page, complete.

    Args:
        report: What it says.
        views: Its figures.
        to: The folder it will lie in, which links to run folders begin at.
    """
    templates = Environment(
        loader=PackageLoader("sae_lora.report.page", "."),
        autoescape=select_autoescape(),
        trim_blocks=True,
    )
    templates.filters |= {"cell": _cell, "script": _for_script}
    curves = [view for view in views if view.name.startswith(_CURVES)]
    shown = [view for view in views if view not in curves[1:]]
    axes = [
        {
            "name": METRICS[view.name.removeprefix(_CURVES)].title,
            "x": [trace.x for trace in view.figure.data],
            "title": view.figure.layout.xaxis.title.text,
        }
        for view in curves
    ]
    runs = [
        _plain(row)
        | {"href": os.path.relpath(row["folder"], to), "config": _config(Path(row["folder"]))}
        for row in report.frame.to_dict("records")
    ]
    return templates.get_template("report.html").render(
        report=report,
        sweeps=sorted(set(report.frame["sweep"])),
        made=time.strftime("%Y-%m-%d %H:%M"),
        columns=_columns(report),
        runs=runs,
        best=report.best,
        fits=[str(one) for one in report.fits if isinstance(one, Fit)],
        views=shown,
        figures={view.name: json.loads(str(view.figure.to_json())) for view in shown},
        axes=axes,
        plotly=get_plotlyjs(),
    )


def _write_pictures(views: Sequence[View], folder: Path) -> list[str]:
    """Writes the figures as SVG and PNG; says so where that cannot be done here."""
    kinds = ("svg", "png")
    return plots.try_pictures(
        [(view.figure, folder / f"{view.name}.{kind}") for view in views for kind in kinds]
    )


def _check_free(to: Path) -> None:
    """Makes sure that nothing but an older report is replaced.

    Raises:
        UserError: Where there is something else.
    """
    if not to.exists():
        return
    if not to.is_dir():
        raise UserError(f"--to: {to} is a file, not a folder")
    ours = {"index.html", "figures", "runs.csv", "runs.parquet", "curves.parquet", "summary.json"}
    others = sorted(one.name for one in to.iterdir() if one.name.lstrip(".") not in ours)
    if others:
        raise UserError(f"--to: {to} holds something else than a report: {', '.join(others[:3])}")


def _columns(report: Report) -> list[tuple[str, str]]:
    """Of the page's table: a column of the frame, and its heading."""
    names = [(name, label(name)) for name in factors(report.frame)]
    if len(set(report.frame["sweep"])) > 1:
        names = [("sweep", "sweep"), *names]
    measured = [(name, name.partition("/")[2]) for name in report.frame.columns if "/" in name]
    found = [(key, METRICS[key].column) for key in _SHOWN]
    at = [key for key, _ in found].index("trainable_parameters")
    found.insert(at, ("measured_l0", "L0 measured"))
    return [*names, *found, *measured]


_SHOWN = (
    *("base_ce", "student_ce", "initial_gap", "ce_gap", "gap_closed", "kl", "top1_agreement", "fvu"),
    *("trainable_parameters", "train_flops", "train_seconds"),
    *("closed_per_million_parameters", "closed_per_petaflop", "closed_per_minute"),
)
"""Metrics in the page's table."""


def _cell(value: Any, column: str) -> str:
    """A value as the table shows it."""
    if value is None:
        return "–"
    if column in METRICS:
        return METRICS[column].written(value)
    if isinstance(value, float):
        return f"{value:.3f}" if "/" in column else f"{value:,.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _for_script(value: Any) -> str:
    """JSON that may stand in a script element."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))


def _config(folder: Path) -> str:
    return (folder / "config.yaml").read_text()


def _named(found: Fit) -> list[dict[str, Any]]:
    """The intercepts as JSON can hold them."""
    return [{"group": list(group), "at_1": value} for group, value in found.intercepts.items()]


def _plain(row: dict[Any, Any]) -> dict[str, Any]:
    """Values as JSON knows them."""
    return {str(name): _plain_value(value) for name, value in row.items()}


def _plain_value(value: Any) -> Any:
    if hasattr(value, "item"):  # numpy's
        value = value.item()
    return None if isinstance(value, float) and value != value else value


def _uniform(table: Frame) -> Frame:
    """Columns of one type each: one that holds numbers and words holds words."""
    mixed = [
        name
        for name in table.columns
        if table[name].dtype == object and len({type(one) for one in table[name].dropna()}) > 1
    ]
    return table.astype(dict.fromkeys(mixed, str))


def _file(name: str) -> str:
    """A factor as part of a file's name."""
    return name.replace(".", "_")
