"""The README's commands work and its links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

from sae_lora.cli import main
from scripts import metrics_page
from tests.support.composing import composed

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()
CODE = "\n".join(re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line.split("#")[0].strip() for line in CODE.splitlines() if line.split("#")[0].strip()]


def launches() -> list[str]:
    return [command for command in COMMANDS if "python launch.py" in command]


def test_there_are_commands() -> None:
    assert len(launches()) >= 6


@pytest.mark.parametrize("command", launches())
def test_launch_commands_compose(command: str) -> None:
    """Every point that the command names composes and passes all checks."""
    words = shlex.split(command.split("python launch.py", 1)[1])
    overrides = [word for word in words if word != "-m"]
    options = [
        [f"{key}={value}" for value in values.split(",")]
        if "-m" in words and "[" not in values
        else [one]
        for one in overrides
        for key, _, values in [one.partition("=")]
    ]
    for number in range(max(map(len, options), default=1)):
        composed(*(choices[min(number, len(choices) - 1)] for choices in options))


@pytest.mark.parametrize("command", [one for one in COMMANDS if "python launch.py" not in one])
def test_other_commands_are_known(command: str) -> None:
    """What is no launch is an install, the tests, or a module with a help page of its own."""
    if module := re.match(r"python -m (sae_lora[.\w]*)", command):
        path = REPOSITORY / module[1].replace(".", "/")
        assert path.exists()
        if module[1] == "sae_lora":
            with pytest.raises(SystemExit) as ended:
                main([command.split()[3], "--help"])
            assert ended.value.code == 0
    else:
        assert re.match(r"(pip install|pytest|cd|git clone|ruff|pyright)\b", command), command


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert (REPOSITORY / link).exists(), link


def test_the_page_of_metrics_is_written_from_their_table() -> None:
    assert metrics_page.FILE.read_text() == metrics_page.page()


def test_the_map_names_every_room_and_config_group() -> None:
    for path in (REPOSITORY / "sae_lora").glob("*/__init__.py"):
        assert f"{path.parent.name}/" in README, path
    for path in (REPOSITORY / "conf").iterdir():
        assert path.name.removesuffix(".yaml") in README, path.name
