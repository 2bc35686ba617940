"""A report of sweeps: one page that needs no network, its figures for papers, its tables for programs.

<folder>/
    index.html                 the page
    figures/*.svg, *.png       the same figures
    runs.csv, runs.parquet     a row per run
    curves.parquet             a row per evaluation
    summary.json               the content of the page, for programs; written last

It is made only from run folders and can be made again. Imports no torch.
"""

import base64
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from sae_lora.common import plots
from sae_lora.common.console import count
from sae_lora.common.errors import UserError
from sae_lora.common.files import as_json, write_atomically
from sae_lora.config.schema import as_list
from sae_lora.evaluation import latents, suite_figures, suite_records
from sae_lora.evaluation.lora import similarity_figures, similarity_results
from sae_lora.records.damage import damage
from sae_lora.records.factors import SEEDS, label
from sae_lora.records.folder import RunFolder, hash_of
from sae_lora.records.metrics import METRICS, NO_GAP
from sae_lora.report import figures
from sae_lora.report.fits import Fit, Frame, fit, group_of
from sae_lora.report.frames import factors
from sae_lora.report.importance import importances
from sae_lora.report.page_table import ROOM, cell, columns
from sae_lora.report.results import BEST_NOTE, fitted, results
from sae_lora.report.sweep import CURVE_AXES, Sweep

VERSION = 1
_KIND = "sae_lora report"
_MARK = f'<meta name="generator" content="{_KIND}">'
"""A line of `report.html`, by which a page is known."""
_FITTED = ("rank", "l0", "width")
"""Factors over which the gap closed is fitted."""
_CURVES = "gap_over_"
"""Prefix of the names of the figures of curves."""
_MOST_MAPPED = 3
"""Largest number of factors in a heat map."""
_BREAKS = re.compile(r"(?<=[._])")
"""Places at which the name of a key may break: after `train.` and `warmup_`."""
_LIBRARY = "plotly-cartesian.min.js.gz"
"""The part of plotly.js for lines, points and maps: the package plotly.js-cartesian-dist-min."""


@dataclass(frozen=True)
class View:
    """One figure of a report."""

    name: str
    """Name of the figure's files."""
    heading: str
    figure: Any
    """A plotly figure."""
    note: str = ""
    """A sentence below the figure."""


class Report:
    """Results of sweeps, for the page and for programs.

    Args:
        sweep: The runs. Their folders are read once.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.frame = sweep.frame()
        self.curves = sweep.curves()
        self.done: Frame = self.frame[self.frame["state"] == "done"]
        self.states = dict(Counter(self.frame["state"]))
        """The number of runs in each state."""
        self.varying = [name for name in figures.by_prominence(factors(self.frame)) if name not in SEEDS]
        """The factors in which runs differ, without the seeds."""
        fits = [
            fit(self.done, name, [factor for factor in self.varying if factor != name])
            for name in _FITTED
            if name in self.varying
        ]
        sound = [folder for folder in sweep.folders if damage(folder) is None]
        table = fitted(results(sound), ROOM)
        self.measure = _objective(self.done)
        """The measure that an adaptive sweeper, or halving, went by."""
        self.importances = importances(self.done, self.varying, self.measure)
        self.means = table if any(len(row.runs) > 1 for row in table.rows) else None
        """Means over seeds; `None` if no runs differ only in seeds."""
        self.stacked: dict[str, Any] = {}
        """Figures with several parts, with one below the other, by name; `views` fills it."""
        self.fits = [fitted for fitted in fits if isinstance(fitted, Fit)]
        self._refusals = [reason for reason in fits if isinstance(reason, str)]

    @property
    def best(self) -> dict[str, Any] | None:
        """The run that closes the largest share of the gap."""
        closed = self.done["gap_closed"].astype(float)
        return None if closed.isna().all() else _json_row(self.done.loc[closed.idxmax()].to_dict())

    @property
    def methods(self) -> list[str]:
        """The methods of all runs."""
        return list(self.frame["method"].dropna().unique())

    @property
    def missing(self) -> list[str]:
        """Reasons for missing runs, values and fits."""
        missing = [
            f"{number} of {len(self.frame)} runs: {state}"
            for state, number in self.states.items()
            if state != "done"
        ]
        no_gap = int(self.done["gap_closed"].isna().sum())
        if no_gap:
            missing.append(f"gap closed is undefined for {count(no_gap, 'run')}: {NO_GAP}, or is new")
        no_flops = int(self.done["train_flops"].isna().sum())
        if no_flops:
            missing.append(f"training FLOPs are unknown for {no_flops} runs of an older version")
        return missing + self._refusals

    @property
    def notes(self) -> dict[str, list[str]]:
        """The notes of runs, each with the names of the runs that have it."""
        runs: defaultdict[str, list[str]] = defaultdict(list)
        for run, notes in zip(self.frame["run"], self.frame["sae_notes"], strict=True):
            for note in notes.splitlines():
                runs[note].append(run)
        return dict(runs)

    def views(self) -> list[View]:
        """The figures: curves, evaluation suites, and the gap closed over the factors."""
        views = [
            View(f"{_CURVES}{over}", f"CE gap over {METRICS[over].title}", curves)
            for over in CURVE_AXES
            if self.curves[over].notna().any()
            and (curves := figures.gap_curves(self.frame, self.curves, over)).data
        ]
        views += [*self._suite_views(), *self._similarity_views()]
        done = self.done[self.done["gap_closed"].notna()]
        if done.empty:
            return views
        fits = {fitted.factor: fitted for fitted in self.fits}
        for name in self.varying:
            others = [factor for factor in self.varying if factor != name]
            fitted = fits.get(name)
            figure = figures.gap_closed_against(done, name, others, fitted)
            note = f"Grey: {fitted}." if fitted else ""
            file = f"gap_closed_{name.replace('.', '_')}"
            views.append(View(file, f"Gap closed against {label(name)}", figure, note))
        if 2 <= len(self.varying) <= _MOST_MAPPED:
            heading = f"Gap closed over {' and '.join(map(label, self.varying))}"
            views.append(View("heat_map", heading, figures.heat_map(done, self.varying)))
            self.stacked["heat_map"] = figures.heat_map(done, self.varying, stacked=True)
        figure = figures.efficiency(done, self.varying)
        self.stacked["efficiency"] = figures.efficiency(done, self.varying, stacked=True)
        return [*views, View("efficiency", "Gap closed against cost", figure)]

    def _suite_views(self) -> list[View]:
        """Figures of suites, each with at most `MOST_RUNS` runs."""
        names = [", ".join(group) or "run" for group in group_of(self.done, self.varying)]
        folders = {
            name if names.count(name) == 1 else f"{name}, seed {seed}": RunFolder(Path(path))
            for name, seed, path in zip(names, self.done["seed"], self.done["folder"], strict=True)
        }
        views = []
        for figure in suite_figures.FIGURES:
            records = (
                (name, suite_records.read(folder, figure.suite)) for name, folder in folders.items()
            )
            results = ((name, record.results) for name, record in records if record is not None)
            if shown := dict(islice(results, suite_figures.MOST_RUNS)):
                views.append(View(figure.name, figure.heading, figure.draw(shown), figure.note))
        for view in views:
            view.figure.update_layout(legend_title_text=", ".join(map(label, self.varying)))
        return views

    def _similarity_views(self) -> list[View]:
        """Figures of the similarity between the adapters of two runs."""
        sweeps = dict.fromkeys(Path(path).parent for path in self.done["folder"])
        pairs = [pair for sweep in sweeps for pair in similarity_results.read(sweep)]
        return [
            View(
                f"similarity_{number}",
                "Similarity of adapters' directions",
                similarity_figures.similarity_map(pair),
                f"{pair['first']} and {pair['second']}.",
            )
            for number, pair in enumerate(pairs[: similarity_figures.MOST_PAIRS], 1)
        ]

    def summary(self) -> dict[str, Any]:
        """The results for programs: the content of the report's `summary.json`."""
        return {
            "kind": _KIND,
            "version": VERSION,
            "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "sweeps": sorted(set(self.frame["sweep"])),
            "states": self.states,
            "varying": self.varying,
            "best": self.best,
            "importances": {
                self.measure: {each.factor: each.share for each in self.importances},
            },
            "fits": [asdict(fitted) | {"intercepts": _intercepts(fitted)} for fitted in self.fits],
            "missing": self.missing,
            "runs": [_json_row(row) for row in self.frame.to_dict("records")],
        }


def write(sweep: Sweep, to: Path, *, pictures: bool = True) -> list[str]:
    """Write a report; return notes on pictures that could not be written.

    Args:
        sweep: The runs.
        to: Folder of the report. An older report in it is replaced.
        pictures: True to also write the figures as SVG and PNG.

    Raises:
        UserError: If the folder contains other files, or cannot be written.
    """
    earlier = _earlier_figures(to)
    report = Report(sweep)
    views = report.views()
    notes = []
    try:
        (to / "figures").mkdir(parents=True, exist_ok=True)
        write_atomically(to / "index.html", page(report, views, to))
        write_atomically(to / "runs.csv", report.frame.to_csv(index=False))
        for name, table in (("runs", report.frame), ("curves", report.curves)):
            unfinished = to / f".{name}.parquet"
            _uniform(table).to_parquet(unfinished, index=False)
            unfinished.replace(to / f"{name}.parquet")
        for name in earlier:
            (to / "figures" / name).unlink(missing_ok=True)
        possible = {f"{view.name}.{kind}": view.figure for view in views for kind in ("svg", "png")}
        if pictures:
            files = [(figure, to / "figures" / name) for name, figure in possible.items()]
            notes = plots.try_pictures(files)
        drawn = sorted(path.name for path in (to / "figures").iterdir() if path.name in possible)
        write_atomically(to / "summary.json", as_json(report.summary() | {"figures": drawn}))
    except OSError as error:
        raise UserError(f"--to: cannot write {to}: {error.strerror}") from error
    return notes


def page(report: Report, views: Sequence[View], to: Path) -> str:
    """The complete page as HTML.

    Args:
        report: The results.
        views: The report's figures.
        to: Folder of the page; links to run folders are relative to it.
    """
    loader = PackageLoader("sae_lora.report.page", ".")
    templates = Environment(loader=loader, autoescape=True, trim_blocks=True)
    templates.filters["cell"] = cell
    templates.filters["named"] = label
    templates.filters["breakable"] = lambda heading: Markup("<wbr>").join(_BREAKS.split(heading))
    templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
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
        _json_row(row)
        | {
            "hash": hash_of(row["run"]),
            "href": os.path.relpath(row["folder"], to),
            "config": _config_text(Path(row["folder"])),
            "latents": (RunFolder(Path(row["folder"])).evaluation / latents.PAGE).is_file(),
        }
        for row in report.frame.to_dict("records")
    ]
    return templates.get_template("report.html").render(
        report=report,
        measure=METRICS[report.measure].name,
        sweeps=sorted(set(report.frame["sweep"])),
        created=time.strftime("%Y-%m-%d %H:%M"),
        methods=["LoRA" if name == "lora" else name for name in report.methods],
        columns=columns(report.frame),
        runs=runs,
        best=report.best,
        views=shown,
        figures={view.name: json.loads(str(view.figure.to_json())) for view in shown},
        stacked={name: json.loads(str(each.to_json())) for name, each in report.stacked.items()},
        axes=axes,
        means=report.means,
        best_note=BEST_NOTE,
        mark=lambda text: f"{text} *",
        latents=latents.PAGE,
        plotly=base64.b64encode(files("sae_lora.report").joinpath(_LIBRARY).read_bytes()).decode(),
    )


def _config_text(run: Path) -> str:
    """The config of a run as text; of a damaged run, its damage."""
    folder = RunFolder(run)
    return damage(folder) or folder.config.read_text()


def _earlier_figures(to: Path) -> list[str]:
    """The files of the figures of an older report in the folder, which may be replaced.

    Raises:
        UserError: If the folder contains anything but an older report.
    """
    ours = {"index.html", "figures", "runs.csv", "runs.parquet", "curves.parquet", "summary.json"}
    try:
        if not to.exists():
            return []
        names = sorted(path.name for path in to.iterdir() if path.name != "figures")
        figures_before = {path.name for path in (to / "figures").glob("*")}
        earlier = _earlier(to)
        foreign = [name for name in names if earlier is None or name.lstrip(".") not in ours]
        if earlier is None and figures_before:
            foreign.append("figures")
    except NotADirectoryError as error:
        raise UserError(f"--to: {to} is a file, not a folder") from error
    except OSError as error:
        raise UserError(f"--to: {to} cannot be used: {error.strerror}") from error
    if foreign:
        raise UserError(
            f"--to: {to} contains files that are not part of a report ({', '.join(foreign[:3])}); "
            "choose another folder"
        )
    return sorted(figures_before & set(earlier or ()))


def _earlier(to: Path) -> list[str] | None:
    """The figures that an older report in this folder has written; `None` if it has no report."""
    try:
        summary = json.loads((to / "summary.json").read_text())
        if summary["kind"] == _KIND:
            return [str(name) for name in summary.get("figures", [])]
    except (OSError, ValueError, LookupError, TypeError):
        pass  # a report whose writing was stopped has no summary yet
    index = to / "index.html"
    return [] if index.is_file() and _MARK in index.read_text(errors="replace") else None


def _objective(done: Frame) -> str:
    """The first objective of finished runs, if the frame has it; else the gap."""
    for path in done["folder"]:
        (name, *_) = as_list(RunFolder(Path(path)).read_config().get("objective", "ce_gap"))
        if name in done:
            return name
    return "ce_gap"


def _intercepts(fitted: Fit) -> list[dict[str, Any]]:
    """The intercepts of a fit for JSON, whose keys cannot be tuples."""
    return [{"group": list(group), "at_1": value} for group, value in fitted.intercepts.items()]


def _json_row(row: dict[Any, Any]) -> dict[str, Any]:
    """A row of a frame for JSON, with `None` instead of NaN."""
    return {
        name: None if isinstance(value, float) and value != value else value
        for name, value in row.items()
    }


def _uniform(table: Frame) -> Frame:
    """The table with one type per column: columns that mix numbers and text become text."""
    mixed = [
        name
        for name in table.columns
        if table[name].dtype == object and len({type(value) for value in table[name].dropna()}) > 1
    ]
    return table.astype(dict.fromkeys(mixed, str))
