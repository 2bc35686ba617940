"""The report: complete in one folder, equal to the run folders, and working in a real browser."""

import gzip
import json
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import pandas
import pytest
from playwright.sync_api import Page, Request, sync_playwright
from plotly.offline import get_plotlyjs_version

from sae_lora.cli import main
from sae_lora.common.errors import UserError
from sae_lora.config.serialize import as_dict
from sae_lora.evaluation import latents
from sae_lora.report.page import Report, page, write
from sae_lora.report.sweep import load_sweep
from tests.support.browser import BROWSER, in_a_browser
from tests.support.composing import composed
from tests.support.sweeps import MadeUp


def half_finished(home: Path) -> Path:
    """A grid with an unfinished and a failed run."""
    sweep = MadeUp(home / "grid")
    sweep.grid(ranks=(1, 4, 16, 64), blocks=(1, 3))
    sweep.begun(3, rank=256, block=1)
    sweep.begun(2, rank=256, block=3).write_failure("out of memory: </script><b id='evil'>", "…")
    return sweep.home


def test_the_report_is_complete_and_equals_the_sweep(tmp_path: Path) -> None:
    home = half_finished(tmp_path)
    sweep = load_sweep(home)
    assert main(["report", str(home), "--no-pictures"]) == 0
    to = home / "report"
    frame = sweep.frame()
    for table in (pandas.read_csv(to / "runs.csv"), pandas.read_parquet(to / "runs.parquet")):
        assert list(table["run"]) == list(frame["run"])
        assert list(table["gap_closed"]) == pytest.approx(list(frame["gap_closed"]))
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(to / "curves.parquet"), sweep.curves(), check_dtype=False
    )
    summary = json.loads((to / "summary.json").read_text())
    assert summary["states"] == {"done": 8, "new": 1, "failed": 1}
    done = frame[frame["state"] == "done"]
    assert summary["best"]["run"] == done.loc[done["gap_closed"].idxmax(), "run"]
    (fitted,) = summary["fits"]
    assert fitted["factor"] == "rank"
    assert fitted["low"] <= fitted["per_doubling"] <= fitted["high"]
    assert "1 of 10 runs: failed" in summary["missing"]
    # An older report is replaced.
    assert main(["report", str(home), "--no-pictures"]) == 0


def test_the_page_has_the_command_of_each_run(tmp_path: Path) -> None:
    home = half_finished(tmp_path)
    frame = load_sweep(home).frame()
    text = page(report := Report(load_sweep(home)), report.views(), home / "report")
    for run in frame.to_dict("records"):
        assert run["command"] in text
        config = as_dict(composed(*shlex.split(run["command"])[2:]))
        assert config["lora"]["rank"] == run["rank"] and config["layer"]["index"] == run["block"]


def test_notes_and_settings_stand_beside_their_runs(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    curve = sweep.begun().read_curve()
    noticed = {"notes": ["position 0 holds 99% of the variance"], "fvu_without_outliers": 0.5}
    sweep.told("kept", curve, {"sae.keep_first": True}, **noticed)
    sweep.told("left", curve, {"sae.keep_first": False})
    report = Report(load_sweep(tmp_path / "sweep"))
    assert report.notes == {noticed["notes"][0]: ["kept"]}
    text = page(report, [], tmp_path / "report")
    row = text[text.index('data-run="kept"') :].partition("</tr>")[0]
    assert 'href="#notes"' in row and ">True</td>" in row and ">0.500</td>" in row
    section = text[text.index('id="notes"') :]
    assert section.index(noticed["notes"][0]) < section.index('href="#run-kept"')


def test_a_run_with_pages_about_its_latents_has_a_link(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    with_pages, without = sweep.finished(rank=1), sweep.finished(rank=4)
    file = with_pages.evaluation / latents.PAGE
    file.parent.mkdir(parents=True)
    file.write_text("")
    text = page(Report(load_sweep(tmp_path / "sweep")), [], tmp_path / "report")
    (link,) = re.findall(r'href="([^"]*)">its latents', text)
    assert (tmp_path / "report" / link).resolve() == file.resolve()
    assert without.path.name not in link


def test_nothing_finished_yet(tmp_path: Path) -> None:
    MadeUp(tmp_path / "sweep").folder()
    report = Report(sweep := load_sweep(tmp_path / "sweep"))
    assert report.views() == [] and report.best is None
    assert report.missing == ["1 of 1 runs: new"]
    write(sweep, tmp_path / "report", pictures=False)
    assert "There are no figures yet" in (tmp_path / "report" / "index.html").read_text()


def test_no_gap_to_close(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    sweep.finished(rank=1, closed=None)
    sweep.finished(rank=4, closed=None)
    report = Report(load_sweep(tmp_path / "sweep"))
    reason = "gap closed is undefined for 2 runs: the SAE opens no gap above rounding errors, or is new"
    assert reason in report.missing
    axes = ("tokens", "train_seconds", "train_flops")
    assert [view.name for view in report.views()] == [f"gap_over_{axis}" for axis in axes]


def test_a_folder_with_other_files_is_not_overwritten(tmp_path: Path) -> None:
    home = half_finished(tmp_path)
    with pytest.raises(UserError, match="contains files that are not part of a report"):
        write(load_sweep(home), home)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        write(load_sweep(home), tmp_path / "file")
    assert main(["report", str(tmp_path / "none")]) == 1


def test_only_an_older_report_is_replaced(tmp_path: Path) -> None:
    """Files of others may have the names of a report's, and lie beside its figures."""
    runs = load_sweep(half_finished(tmp_path))
    for name in ("index.html", "figures/mine.png"):
        site = tmp_path / name.partition(".")[0].replace("/", "_")
        (site / name).parent.mkdir(parents=True)
        (site / name).write_text("mine")
        with pytest.raises(UserError, match="contains files that are not part of a report"):
            write(runs, site, pictures=False)
        assert (site / name).read_text() == "mine"
    report = tmp_path / "report"
    for unfinished in (False, True):
        write(runs, report, pictures=False)
        if unfinished:
            (report / "summary.json").unlink()
    (report / "figures/mine.png").write_text("mine")
    (report / "figures/gap_over_tokens.svg").write_text("old")
    write(runs, report, pictures=False)
    write(runs, report, pictures=False)
    assert [path.name for path in (report / "figures").iterdir()] == ["mine.png"]


@pytest.mark.slow
@in_a_browser
def test_pictures_for_papers(tmp_path: Path) -> None:
    home = half_finished(tmp_path)
    assert write(load_sweep(home), home / "report") == []
    names = {view.name for view in Report(load_sweep(home)).views()}
    for kind, start in (("svg", b"<svg"), ("png", b"\x89PNG")):
        files = {path.stem: path for path in (home / "report" / "figures").glob(f"*.{kind}")}
        assert set(files) == names
        assert all(path.read_bytes().startswith(start) for path in files.values())


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Page]:
    """The page of a report in a browser. Console messages and requests to a network fail the test."""
    with opened(half_finished(tmp_path), tmp_path / "report") as page:
        yield page


@contextmanager
def opened(sweep: Path, to: Path) -> Iterator[Page]:
    """The page of a sweep's report, as `browser`."""
    write(load_sweep(sweep), to, pictures=False)
    with sync_playwright() as playwright:
        options: dict[str, Any] = {"executable_path": BROWSER, "args": ["--no-sandbox", "--disable-gpu"]}
        browser = playwright.chromium.launch(**options)
        shown = browser.new_page()
        complaints: list[str] = []

        def on_request(request: Request) -> None:
            if "://" in request.url[5:]:  # the page itself is at file://
                complaints.append(request.url)

        shown.on("console", lambda line: complaints.append(line.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("request", on_request)
        shown.goto((to / "index.html").as_uri())
        shown.wait_for_selector("body[data-drawn]")
        yield shown
        assert complaints == []
        browser.close()


@pytest.mark.slow
@in_a_browser
def test_in_a_browser(browser: Page, tmp_path: Path) -> None:
    report = Report(load_sweep(tmp_path / "grid"))
    for view in report.views():
        if view.name in ("gap_over_train_seconds", "gap_over_train_flops"):
            continue
        traces = browser.evaluate("name => document.getElementById(name).data.length", view.name)
        assert traces == len(view.figure.data)
        kind = ".heatmaplayer" if view.name == "heat_map" else ".scatterlayer .trace"
        assert browser.locator(f"#{view.name} {kind}").count() >= 1
    assert browser.locator("#evil").count() == 0  # error messages are escaped

    def axis() -> tuple[str, float]:
        figure = "document.getElementById('gap_over_tokens')"
        title = browser.evaluate(f"{figure}.layout.xaxis.title.text")
        return title, browser.evaluate(f"{figure}.data[0].x.at(-1)")

    seconds, tokens, flops = (
        report.curves.groupby("run")[over].max()[report.frame["run"][0]]
        for over in ("train_seconds", "tokens", "train_flops")
    )
    assert axis() == ("training tokens", tokens)
    browser.get_by_role("button", name="seconds").click()
    assert axis() == ("seconds of training", pytest.approx(seconds))
    browser.get_by_role("button", name="training FLOPs").click()
    assert axis() == ("training FLOPs", pytest.approx(flops))
    browser.get_by_role("button", name="tokens").click()
    assert axis() == ("training tokens", tokens)

    def shown() -> list[str]:
        rows = browser.locator("#runs tbody tr:not([hidden])").all()
        return [row.get_attribute("data-run") or "" for row in rows]

    def sort_by(heading: str) -> None:
        browser.locator(f"th button:text-is('{heading}')").click()

    by_closed = report.frame.sort_values("gap_closed")
    sort_by("gap closed")
    assert shown() == list(by_closed["run"])
    sort_by("gap closed")
    assert shown() == list(by_closed["run"])[::-1]
    sort_by("rank")
    assert [name.split("-r")[1] for name in shown()][:3] == ["1-s0", "1-s0", "4-s0"]
    browser.locator("#filter").fill("failed")
    (failed,) = shown()
    assert failed in set(report.frame[report.frame["state"] == "failed"]["run"])
    browser.locator("#filter").fill("done r64")
    assert len(shown()) == 2

    browser.locator("#runs tbody tr:not([hidden]) td a").first.click()
    assert browser.locator("details[open]").count() == 1
    browser.set_viewport_size({"width": 390, "height": 800})
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def check_tables_fit(page: Page) -> None:
    page.set_viewport_size({"width": 1280, "height": 900})
    within = "element => element.scrollWidth <= element.clientWidth"
    assert page.evaluate(f"[...document.querySelectorAll('.wide')].every({within})")


@pytest.mark.slow
@in_a_browser
def test_tables_with_many_factors_fit(tmp_path: Path) -> None:
    """The least important measures are shown on request."""
    sweep = MadeUp(tmp_path / "sweep")
    for number, (seed, a, b, c) in enumerate(product((0, 1), repeat=4)):
        factors = {  # no factor determines another
            "train.seed": seed,
            "lora.rank": 4**a,
            "lora.dropout": 0.1 + 0.05 * b,
            "train.lr": 1.234e-3 * (1 + c),
            "train.warmup_share": 0.15 / (1 + (a ^ b)),
            "train.loraplus_ratio": 1.0 + (b ^ c),
            "data.context_length": 64 * (1 + (a ^ c)),
            "train.grad_clip": 1.0 + (a ^ b ^ c),
        }
        points = MadeUp.points_of(5, rank=4**a, block=number, seed=seed)
        sweep.told(f"run-{number}", points, factors)
    with opened(sweep.home, tmp_path / "report") as page:
        check_tables_fit(page)
        assert page.locator("#runs th.extra").first.is_hidden()
        assert page.locator("#runs th:not(.extra) button:text-is('gap closed')").is_visible()
        left_out = page.locator("p:has-text('left out for lack of room')")
        assert left_out.count() == 1


@pytest.mark.slow
@in_a_browser
def test_the_page_on_several_widths(browser: Page, tmp_path: Path) -> None:
    """The table fits 1280 px without scrolling; on a phone, figures are within the screen."""
    check_tables_fit(browser)
    assert browser.locator("#runs th.extra").first.is_hidden()
    browser.get_by_label("all measures").check()
    assert browser.locator("#runs th.extra").first.is_visible()
    browser.set_viewport_size({"width": 390, "height": 800})
    browser.reload()
    browser.wait_for_selector("body[data-drawn]")
    right = browser.evaluate(
        "Math.max(...[...document.querySelectorAll('.figure text')]"
        ".map(element => element.getBoundingClientRect().right))"
    )
    assert right <= 390
    axes = "Object.keys(document.getElementById('efficiency').layout)"
    places = browser.evaluate(f"{axes}.filter(key => key.startsWith('yaxis')).length")
    assert places == 3
    top = browser.evaluate("document.getElementById('efficiency').layout.yaxis.domain[0]")
    assert top > 0.5  # the first part is above the others


@pytest.mark.slow
@in_a_browser
def test_a_click_on_a_point_shows_its_run(browser: Page, tmp_path: Path) -> None:
    name = "gap_closed_rank"
    run = browser.evaluate(f"document.getElementById('{name}').data[0].customdata[0]")
    browser.locator(f"#{name}").scroll_into_view_if_needed()
    point = browser.locator(f"#{name} .scatterlayer .trace .points path").first
    box = point.bounding_box()
    assert box is not None
    browser.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    browser.wait_for_timeout(300)
    browser.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    browser.wait_for_selector("details[open]")
    assert browser.locator("details[open] summary").inner_text() == run


def test_the_page_is_small(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "grid")
    sweep.grid(ranks=(1, 4, 16, 64), blocks=(1, 3, 5), l0s=(4.0, 8.0, 16.0))
    write(load_sweep(sweep.home), tmp_path / "report", pictures=False)
    assert (tmp_path / "report/index.html").stat().st_size < 2e6


def test_the_library_of_the_page_is_of_the_version_that_makes_the_figures() -> None:
    library = files("sae_lora.report").joinpath("plotly-cartesian.min.js.gz").read_bytes()
    version = re.search(r"plotly\.js \(cartesian - minified\) v(\S+)", gzip.decompress(library).decode())
    assert version is not None
    assert version[1].split(".")[0] == get_plotlyjs_version().split(".")[0]


def test_seeds_are_means_on_the_page(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "seeds")
    for rank in (1, 4):
        for seed in (0, 1):
            sweep.finished(rank=rank, seed=seed)
    report = Report(load_sweep(sweep.home))
    text = page(report, [], tmp_path / "report")
    means = text[text.index("Means over seeds") : text.index("<h2>Runs</h2>")]
    assert means.count("<tr") == 3 and "±" in means and "2 seeds" in means


def test_damaged_runs_stand_beside_the_others(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path / "sweep")
    sweep.grid(ranks=(1, 4), blocks=(3,))
    (sweep.home / "tiny-l3-l0_4-r4-s0/config.yaml").unlink()
    report = Report(load_sweep(sweep.home))
    assert report.states == {"done": 1, "damaged": 1}
    text = page(report, report.views(), tmp_path / "report")
    assert "state-damaged" in text and "config.yaml is missing" in text
