"""A run's command composes its config once more."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sae_lora.config.overrides import command, written
from sae_lora.config.serialize import as_dict
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
def test_it_composes_the_same_config(overrides: str) -> None:
    config = composed(*shlex.split(overrides))
    words = shlex.split(command(as_dict(config)))
    assert words[:2] == ["sae-lora", "launch"]
    again, expected = as_dict(composed(*words[2:])), as_dict(config)
    for where in ("launcher", "evaluation", "tracking"):
        del again[where], expected[where]
    assert again == expected


def test_the_default_needs_no_word_more() -> None:
    assert command(as_dict(composed())) == "sae-lora launch"
    assert command(as_dict(composed("lora.rank=4"))) == "sae-lora launch lora.rank=4"


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 3, -0.5, 4.5e-3, 1e-12, "plain", "null", "True", "1e5", "12", "", "a b", "a,b=c"),
        *('say "so"', "it's", "C:\\", 'a\\"b', "$x", "${y}", "é {x} [1]", "inf", "a:b", "#no", "off"),
        *([1, "2", None], {"exclude": "node7", "n": 2}),
    ],
)
def test_hydra_reads_what_is_written(value: object) -> None:
    found = OverridesParser.create().parse_override(f"key={written(value)}").value()
    assert plain(found) == value


def plain(found: object) -> object:
    """Without Hydra's marks of what was quoted."""
    match found:
        case list():
            return [plain(one) for one in found]
        case dict():
            return {key: plain(one) for key, one in found.items()}
        case _:
            return getattr(found, "text", found)
