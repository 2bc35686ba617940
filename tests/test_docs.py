"""README and pages: commands work, links have targets, generated pages are up to date."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override

import sae_lora
from sae_lora.cli import app
from sae_lora.config.compose import with_quoted_text
from scripts import reference_pages
from tests.support.composing import composed

REPOSITORY = Path(__file__).parent.parent
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").rglob("*.md")]
README = PAGES[0].read_text()
LAUNCH = re.compile(r"(sae-lora launch|python launch\.py)\b")
FOREIGN = re.compile(
    r"(pip install|pytest|cd|git clone|make|mkdocs|ruff|pyright|pre-commit|apt-get install|"
    r"hf auth login|wandb (login|sweep|agent)|trackio show|python -m scripts\.\w+|export \w+=|"
    r"\w+=\S+ (sae-lora|python))\b"
)
"""Commands of other programs."""


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in a language, without its indentation inside lists and notes."""
    matches = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in matches]


def commands() -> list[str]:
    """The different commands on all pages, without comments; `a && b` counts as two commands."""
    code = "\n".join(block for page in PAGES for block in blocks(page, "bash")).replace("\\\n", " ")
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for line in code.splitlines()]
    return sorted({part.strip() for line in lines if line for part in line.split(" && ")})


COMMANDS = commands()
LAUNCHES = [command for command in COMMANDS if LAUNCH.match(command)]


def test_there_are_commands() -> None:
    assert len(LAUNCHES) >= 40 and len(COMMANDS) >= 80


@pytest.mark.slow
@pytest.mark.parametrize("command", LAUNCHES)
def test_launch_commands_compose(command: str) -> None:
    """Every point that the command names composes and passes all checks."""
    words = shlex.split(LAUNCH.sub("", command, count=1))
    if {"--help", "--cfg", "--hydra-help", "--config-dir"} & set(words):
        return  # tests of the command line run these
    # A sweeper may be of a package that the tests do not install; its points have the same keys.
    left_out = re.compile(r"(-m|--multirun)$|hydra/sweeper|hydra\.sweeper")
    overrides = [with_quoted_text(word) for word in words if not left_out.match(word)]
    parsed = OverridesParser.create().parse_overrides(overrides)
    options = [
        [f"{override.key_or_group}={value}" for value in _values(override)]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in parsed
    ]
    for number in range(max(map(len, options), default=1)):
        composed(*(choices[min(number, len(choices) - 1)] for choices in options))


def _values(override: Override) -> list[object]:
    """The values of a sweep; of an interval, its ends."""
    if override.is_interval_sweep():
        interval = override.value()
        assert isinstance(interval, IntervalSweep)
        return [interval.start, interval.end]
    return list(override.sweep_string_iterator())


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in LAUNCHES])
def test_other_commands_exist(command: str) -> None:
    """Commands of `sae-lora` have these arguments; commands of other programs are on a list."""
    words = shlex.split(command)
    if words[0] != "sae-lora":
        assert FOREIGN.match(command), command
        return
    program, name, arguments = typer.main.get_command(app), "sae-lora", words[1:]
    while True:
        if {"--help", "--version", "--install-completion"} & set(arguments):
            return
        context = program.make_context(name, list(arguments))  # refuses unknown and missing arguments
        if not hasattr(program, "resolve_command"):
            return
        name, program, arguments = program.resolve_command(context, arguments)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_python_on_pages_is_valid(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")
        for name in re.findall(r"\bsae_lora\.(\w+)\(", code):
            assert hasattr(sae_lora, name), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_have_targets(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("name", reference_pages.PAGES)
def test_generated_pages_are_up_to_date(name: str) -> None:
    page = reference_pages.PAGES[name]
    assert (reference_pages.DOCS / name).read_text() == page(), "python -m scripts.reference_pages"


def test_the_readme_is_short_and_names_every_room() -> None:
    assert len(README.splitlines()) <= 180
    for path in (REPOSITORY / "sae_lora").glob("*/__init__.py"):
        assert f"{path.parent.name}/" in README, path


def test_every_page_is_in_the_navigation() -> None:
    navigation = (REPOSITORY / "mkdocs.yml").read_text()
    for page in PAGES[2:]:
        assert f": {page.relative_to(REPOSITORY / 'docs')}\n" in navigation, page
