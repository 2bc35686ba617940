"""The expected time of a training, from speeds that earlier trainings have recorded."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sae_lora.config.schema import Config
from sae_lora.train.cost import speed
from tests.support.packs import resolved

THIS = ("a processor", 2)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Call it to be on another machine."""

    def be_on(name: str, threads: int) -> None:
        monkeypatch.setattr(speed, "_this_machine", lambda config: (name, threads))

    be_on(*THIS)
    return be_on


def test_the_time_of_the_recorded_training_is_expected_again(
    tmp_path: Path, machine: Callable[[str, int], None]
) -> None:
    configs = resolved(tmp_path, ("lora.rank=1", "lora.rank=2"))
    assert speed.expected(configs) is None
    speed.record(configs, 100.0)
    (entry,) = speed._read(configs[0])
    time = speed.expected(configs)
    assert time is not None and time.seconds == pytest.approx(100 + entry.startup_s)
    assert time.source.startswith("measured with tiny on a processor, 2 threads, 20")
    twice = [replace(each, train=replace(each.train, train_tokens=2 * 8192)) for each in configs]
    longer = speed.expected(twice)
    assert longer is not None and 100 < longer.seconds - entry.startup_s <= 200
    machine("another", 2)
    assert speed.expected(configs) is None


def test_the_most_similar_training_counts(tmp_path: Path, machine: Callable[[str, int], None]) -> None:
    """First the model, then the method, then the threads; the newest one of a kind."""
    plain, finetuning = resolved(tmp_path, ("", "method=sae_finetune"))
    other = replace(plain, model=replace(plain.model, name="tiny/"))  # the same shapes

    def sources(config: Config) -> float:
        (measured,) = (speed._nearest(config),)
        assert measured is not None
        return measured.flops_per_s

    machine("a processor", 16)
    speed.record([finetuning], 1.0)
    machine(*THIS)
    assert sources(plain) == sources(finetuning)  # better than nothing
    speed.record([plain], 50.0)
    speed.record([plain], 100.0)
    assert len(speed._read(plain)) == 2
    assert sources(plain) < sources(finetuning)
    assert sources(other) in (sources(plain), sources(finetuning))
    half = replace(plain, train=replace(plain.train, dtype=type(plain.train.dtype).bfloat16))
    assert speed.expected([half]) is None


def test_a_damaged_file_counts_as_none_and_is_replaced(
    tmp_path: Path, machine: Callable[[str, int], None]
) -> None:
    (config,) = resolved(tmp_path, ("",))
    file = Path(config.data.cache_dir) / "speeds.json"
    for content in ("", "[{}]", "{", '[{"machine": 3}]'):
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
        assert speed.expected([config]) is None
    speed.record([config], 1.0)
    assert speed.expected([config]) is not None


def test_on_slurm_the_partition_counts(
    tmp_path: Path, machine: Callable[[str, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (config,) = resolved(tmp_path, ("launcher=slurm launcher.partition=gpu",))
    assert speed.expected([config]) is None
    monkeypatch.setenv("SLURM_JOB_PARTITION", "gpu")
    machine("node 17", 8)
    speed.record([config], 10.0)
    monkeypatch.delenv("SLURM_JOB_PARTITION")
    machine("login node", 1)
    time = speed.expected([config])
    assert time is not None and "node 17" in time.source
    elsewhere = replace(config, launcher=replace(config.launcher, partition="other"))
    assert speed.expected([elsewhere]) is None


@pytest.mark.parametrize(
    ("dtype", "options", "text"),
    [
        ("bfloat16", "launcher.partition=h100-long", "20% of the 989 TFLOP/s stated for H100"),
        ("float32", "launcher.partition=x launcher.constraint=rtx4090", "82.6 TFLOP/s stated for RTX"),
    ],
)
def test_the_stated_speed_of_a_known_gpu(tmp_path: Path, dtype: str, options: str, text: str) -> None:
    (config,) = resolved(tmp_path, (f"launcher=slurm train.dtype={dtype} {options}",))
    time = speed.expected([config])
    assert time is not None and text in time.source and "assumed" in time.source


def test_this_machine_has_a_name() -> None:
    name = speed._processor()
    assert name and os.cpu_count()
    assert torch.get_num_threads() >= 1
