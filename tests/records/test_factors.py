"""Factors that vary among runs, by short names."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_lora.config.serialize import as_dict
from sae_lora.records.factors import differences, differences_of, finished_runs, labels, values_of
from sae_lora.records.folder import runs_of
from tests.support.composing import with_values
from tests.support.sweeps import MadeUp


def rows(*points: str) -> list[dict[str, Any]]:
    """The factors of points, each given as its overrides."""
    return [values_of(as_dict(with_values(*point.split())), {}) for point in points]


@pytest.mark.parametrize(
    ("points", "varying"),
    [
        (["train.lr=1e-3", "train.lr=2e-3"], {"lr": ["0.001", "0.002"]}),
        (
            ["lora.rank=1 train.seed=0", "lora.rank=1 train.seed=1", "lora.rank=4 train.seed=0"],
            {"rank": ["1", "1", "4"], "seed": ["0", "1", "0"]},
        ),
        (["data.seed=1", "data.seed=2"], {"data.seed": ["1", "2"]}),  # `seed` is another factor
        (["sae.dtype=float32", "sae.dtype=bfloat16"], {"dtype": ["float32", "bfloat16"]}),
        (["train.lr=1e-3", "train.lr=1e-3"], {}),
        (["launcher.pack=off", "launcher.pack=2"], {}),  # changes no result
    ],
)
@pytest.mark.case("C5")
def test_what_varies_has_the_shortest_clear_name(
    points: list[str], varying: dict[str, list[str]]
) -> None:
    assert differences(rows(*points)) == varying


def test_saes_of_equal_size_are_told_apart_by_their_folders() -> None:
    sae = "sae.family=disk sae.width=null sae.l0=null sae.path=/data/saes"
    points = rows(f"{sae}/first/sae", f"{sae}/second/sae", f"{sae}/second/other")
    assert differences(points) == {"path": ["first/sae", "second/sae", "second/other"]}


def test_a_folder_that_follows_from_other_factors_is_left_out() -> None:
    """Each combination of rank and seed begins with the result of its own run."""
    points = rows(
        *(
            f"lora.rank={rank} train.seed={seed} init=outputs/r{rank}-s{seed}"
            for rank in (1, 2)
            for seed in (0, 1)
        )
    )
    assert list(differences(points)) == ["rank", "seed"]
    assert list(differences(rows("init=outputs/a", "init=outputs/b"))) == ["init"]


def test_each_run_has_a_label(tmp_path: Path) -> None:
    sweep = MadeUp(tmp_path)
    folders = [sweep.folder(rank=rank, seed=seed) for rank in (1, 4) for seed in (0, 1)]
    assert labels(differences_of(folders), 4) == [
        "rank=1 seed=0",
        "rank=1 seed=1",
        "rank=4 seed=0",
        "rank=4 seed=1",
    ]
    assert labels(differences_of(folders[:1]), 1) == [""]


def test_of_copies_the_one_with_the_name_of_the_run_counts(tmp_path: Path) -> None:
    folder = MadeUp(tmp_path).finished()
    run_hash = folder.read_summary()["hash"]
    named = tmp_path / f"tiny-{run_hash}"
    for copy in ("another", named.name, "zzz"):
        shutil.copytree(folder.path, tmp_path / copy)
    (run,) = finished_runs(runs_of(tmp_path))
    assert run.folder.path == named


def test_a_config_without_newer_keys_is_read(tmp_path: Path) -> None:
    """As runs of older versions have it."""
    folders = [MadeUp(tmp_path).folder(rank=rank) for rank in (1, 2)]
    config = folders[0].read_config()
    del config["train"]["checkpoint_every_min"], config["init"]
    folders[0].write_config(yaml.safe_dump(config))
    assert differences_of(folders) == {"rank": ["1", "2"]}
