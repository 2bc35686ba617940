"""Mistakes on the command line and in a user's YAML files: one message, with file and line."""

from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from sae_lora.common.errors import UserError
from sae_lora.config.compose import CONF, points, with_quoted_text
from sae_lora.config.mistakes.files import ChosenFiles

HEADER = "# @package _global_\n"


def written(folder: Path, name: str, content: str | bytes) -> Path:
    """A file of a config group: `experiment/mine`."""
    file = folder / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def refusal(folder: Path, *words: str) -> str:
    with pytest.raises(UserError) as error:
        points(["--config-dir", str(folder), *words])
    return str(error.value)


FAULTS = {
    "tab": ("lora:\n\trank: 4\n", "line 3: a tab"),
    "binary": (b"\x89PNG\xff", "line 2: this is not text in UTF-8"),
    "bracket": ("lora: [\n", "line 3: "),
    "misspelt": ("lora:\n  rnk: 4\n", "line 3: there is no key lora.rnk"),
    "list": ("- lora\n", "it holds no keys and values"),
    "scalar": ("5\n", "it holds no keys and values"),
    "number as section": ("lora: 5\n", "line 2: `lora` is a section"),
    "empty section": ("train:\n  lr: 1e-3\nlora:\n", "line 4: `lora` is a section"),
    "twice": ("lora:\n  rank: 4\n  rank: 8\n", "line 4: lora.rank is set twice"),
    "two sections": ("lora:\n  rank: 4\nlora:\n  alpha: 8\n", "line 4: a second section `lora`"),
    "dotted": ("lora.rank: 4\n", "line 2: write `lora:`, and `rank:` below it"),
    "truth value for a text": ("sweep: yes\n", 'YAML reads True: write sweep: "yes"'),
    "number for a text": ("model:\n  revision: 12e4\n", 'YAML reads 120000.0: write revision: "12e4"'),
    "wrong type": ("lora:\n  rank: four\n", "line 3: lora.rank = 'four' cannot be used"),
    "wrong value": ("lora:\n  rank: -4\n", "line 3: lora.rank = -4 cannot be used"),
    "no value": ("lora:\n  rank: ???\n", "line 3: lora.rank has no value: give it on the command line"),
    "no varied value": (
        "hydra:\n  sweeper:\n    params:\n      lora.rank: ???\n",
        "line 5: lora.rank has no value",
    ),
    "interpolation": ("lora:\n  rank: ${lora.rnk}\n", "line 3: lora.rank = ${lora.rnk} cannot be used"),
    "variable": ("lora:\n  rank: ${oc.env:NOT_SET}\n", "line 3: lora.rank cannot be used: Environment"),
    "hydra": ("hydra: 5\n", "line 2: `hydra` is a section"),
    "mode": ("hydra:\n  mode: MANY\n", "line 3: hydra.mode: Invalid value 'MANY', expected one of [RUN"),
    "params": ("hydra:\n  sweeper:\n    params: 5\n", "line 4: `params` is a section"),
    "varied": (
        "hydra:\n  sweeper:\n    params:\n      lora.rnk: 1,2\n",
        "line 5: there is no key lora.rnk",
    ),
    "defaults": ("defaults: 5\n", "line 2: `defaults` is a list"),
    "own default": ("defaults:\n  - nothing\n", "line 3: experiment has no option nothing"),
    "group": ("defaults:\n  - override /modle: tiny\n", "line 3: there is no config group modle"),
    "option": ("defaults:\n  - override /model: tinny\n", "nearest valid: tiny"),
    "old group": (
        "defaults:\n  - override /arm: a\n",
        "line 3: the config group `arm` is called `variant`",
    ),
    "no override": ("defaults:\n  - /model: gpt2\n", "line 3: write `- override /model: gpt2`"),
    "no slash": ("defaults:\n  - model: gpt2\n", "line 3: write `- override /model: gpt2`"),
    "path": ("defaults:\n  - /model/gpt2\n", "line 3: write `- override /model: gpt2`"),
    "itself": ("defaults:\n  - mine\n", "line 3: mine leads back to this file"),
}


@pytest.mark.parametrize("through", ["chosen", "by its defaults"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.case("B9")
def test_a_faulty_file_is_named_with_its_line(fault: str, through: str, tmp_path: Path) -> None:
    content, cause = FAULTS[fault]
    header = HEADER.encode() if isinstance(content, bytes) else HEADER
    file = written(tmp_path, "experiment/mine", header + content)  # type: ignore[operator]
    written(tmp_path, "experiment/other", HEADER + "defaults:\n  - mine\n  - _self_\n")
    chosen = "mine" if through == "chosen" else "other"
    message = refusal(tmp_path, f"experiment={chosen}")
    assert message.startswith(str(file)) and cause in message
    assert len(points(["--config-dir", str(tmp_path), "lora.rank=2"])) == 1


@pytest.mark.parametrize("content", ["lora:\n  rank: 4\n", ""])
@pytest.mark.case("B9")
def test_a_file_without_its_first_line(content: str, tmp_path: Path) -> None:
    file = written(tmp_path, "experiment/mine", content)
    message = refusal(tmp_path, "experiment=mine")
    assert message.startswith(f"{file}, line 1: ") and "must begin with `# @package _global_`" in message


@pytest.mark.case("B9")
def test_a_byte_order_mark(tmp_path: Path) -> None:
    file = written(tmp_path, "experiment/mine", b"\xef\xbb\xbf" + HEADER.encode())
    assert refusal(tmp_path, "experiment=mine").startswith(f"{file}: it begins with a byte order mark")


def test_files_that_lead_to_each_other(tmp_path: Path) -> None:
    written(tmp_path, "experiment/a", HEADER + "defaults:\n  - b\n")
    file = written(tmp_path, "experiment/b", HEADER + "defaults:\n  - a\n")
    assert refusal(tmp_path, "experiment=a") == f"{file}, line 3: a leads back to this file"


def test_a_file_of_a_group_has_its_keys_only(tmp_path: Path) -> None:
    file = written(tmp_path, "lora/mine", "rank: 4\nrnk: 5\n")
    assert refusal(tmp_path, "lora=mine").startswith(f"{file}, line 2: there is no key lora.rnk")


def test_a_file_with_the_name_of_a_shipped_one(tmp_path: Path) -> None:
    """Hydra reads the shipped one, without a word."""
    file = written(tmp_path, "lora/paper", "rank: 4\n")
    assert refusal(tmp_path, "lora=paper").startswith(f"{file}: sae_lora has an option of this name")
    file.write_bytes((CONF / "lora/paper.yaml").read_bytes())
    assert points(["--config-dir", str(tmp_path), "lora=paper"])


def test_a_value_of_the_command_line_has_no_line(tmp_path: Path) -> None:
    written(tmp_path, "experiment/mine", HEADER + "lora:\n  rank: 4\n")
    assert refusal(tmp_path, "experiment=mine", "lora.rank=-4").startswith(
        "lora.rank = -4 cannot be used"
    )


def test_a_value_that_a_file_leaves_to_the_user_may_be_given_elsewhere(tmp_path: Path) -> None:
    written(tmp_path, "experiment/mine", HEADER + "lora:\n  rank: ???\n")
    child = "defaults:\n  - mine\n  - _self_\nlora:\n  rank: 4\n"
    written(tmp_path, "experiment/other", HEADER + child)
    for words in (["experiment=mine", "lora.rank=4"], ["experiment=other"]):
        (point,) = points(["--config-dir", str(tmp_path), *words])
        assert point.lora.rank == 4


def test_no_shipped_file_has_a_fault() -> None:
    for file in sorted(CONF.rglob("*.yaml")):
        group, _, option = file.relative_to(CONF).with_suffix("").as_posix().partition("/")
        if option:
            ChosenFiles([f"{group}={option}"], CONF, None)


def test_the_values_of_a_sweep_in_a_command_of_one_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    written(
        tmp_path, "experiment/mine", HEADER + "hydra:\n  sweeper:\n    params:\n      lora.rank: 1,2\n"
    )
    message = refusal(tmp_path, "experiment=mine")
    assert "a sweep over lora.rank" in message and "mode: MULTIRUN" in message
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("--resolve", "write --cfg job --resolve"),
        ("--package lora", "write --cfg job --package lora"),
        ("--experimental-rerun x.pickle", "repeat the command"),
        ("hydra.foo=1", "Hydra has no key hydra.foo"),
        ("launcher.time=5", "nearest valid: launcher.timeout_min"),
        ("modle=tiny", "nearest valid: model"),
        ("lora.width=64", "nearest valid: sae.width"),
        ("model@other=tiny", "model=tiny"),
        ("-m lora.rank=range(1,9,0)", "lora.rank=range(1,9,0) cannot be read"),
    ],
)
def test_words_with_advice(words: str, advice: str) -> None:
    with pytest.raises(UserError) as error:
        points(words.split())
    assert advice in str(error.value)


def test_a_key_that_is_given_twice_is_noted(capsys: pytest.CaptureFixture[str]) -> None:
    (point,) = points(["lora.rank=4", "lora.rank=8"])
    assert point.lora.rank == 8
    assert "lora.rank is given 2 times; lora.rank=8 is used" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["true", "12e4", "nan", "1", "a,12e4"])
def test_a_text_that_looks_like_a_number_stays_as_it_is(text: str) -> None:
    """`12e4` is the beginning of a commit's hash, and a number to Hydra."""
    composed = points(["-m", f"model.revision={text}"])
    assert [point.model.revision for point in composed] == text.split(",")
    quoted = with_quoted_text(f"model.revision={text}")
    assert with_quoted_text(quoted) == quoted


def test_a_sweeper_that_is_not_installed_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also Optuna's, an extra of this package which the tests have."""
    points([])  # Hydra has now searched for plug-ins
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["sweeper"], "optuna.yaml", raising=False)
    with pytest.raises(UserError, match=r"after `pip install 'sae_lora\[optuna\]'`"):
        points(["-m", "hydra/sweeper=optuna", "lora.rank=1,2"])
