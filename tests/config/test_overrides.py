"""The command of a run composes the same config."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sae_lora.config.overrides import command
from sae_lora.config.serialize import as_dict, written
from tests.support.composing import composed


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "lora.rank=4 lora.blocks=[3,5] layer.index=[1,4] sae.l0=8 train.seed=3",
        "model=gemma2_2b sae=gemma_scope sae.width=16k sae.l0=82 layer.index=12 data=pile",
        "train=paper lora=paper lora.alpha=2r train.grad_clip=null sweep=mine",
        "data=text_files 'data.files=\"books/*, 1.txt\"' model=gpt2 sae=registry sae.release=a sae.id=b",
        "experiment=ranks launcher=slurm",
    ],
)
def test_the_command_composes_the_same_config(overrides: str) -> None:
    config = composed(*shlex.split(overrides))
    words = shlex.split(command(as_dict(config)))
    assert words[:2] == ["sae-lora", "launch"]
    again, expected = as_dict(composed(*words[2:])), as_dict(config)
    for group in ("launcher", "evaluation", "tracking"):
        del again[group], expected[group]
    assert again == expected


def test_the_default_needs_no_overrides() -> None:
    assert command(as_dict(composed())) == "sae-lora launch"
    assert command(as_dict(composed("lora.rank=4"))) == "sae-lora launch lora.rank=4"


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -0.5, 4.5e-3, 1e-12, "plain", "null", "True", "1e5", "12", "", "a b", "a,b=c"),
        *('say "so"', "it's", "C:\\", 'a\\"b', "$x", "${y}", "é {x} [1]", "inf", "a:b", "#no", "off"),
        *("odd/ä日", "größe"),
        *([1, "2", None], {"exclude": "node7", "n": 2}),
    ],
)
def test_hydra_reads_written_values(value: object) -> None:
    parsed = OverridesParser.create().parse_override(f"key={written(value)}").value()
    assert plain(parsed) == value


def plain(parsed: object) -> object:
    """A parsed value with plain text instead of Hydra's quoted strings."""
    match parsed:
        case list():
            return [plain(entry) for entry in parsed]
        case dict():
            return {key: plain(value) for key, value in parsed.items()}
        case _:
            return getattr(parsed, "text", parsed)
