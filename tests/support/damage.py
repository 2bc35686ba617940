"""Kinds of damage to the folder of a finished run of LoRA with rank 16, and the cause that is shown."""

import json
import os
from collections.abc import Callable

from sae_lora.records.folder import RunFolder


def edited(name: str, old: str, new: str) -> Callable[[RunFolder], None]:
    """Damage by replacing text in a file."""

    def edit(folder: RunFolder) -> None:
        text = (folder.path / name).read_text()
        assert old in text
        (folder.path / name).write_text(text.replace(old, new, 1))

    return edit


def written(name: str, content: str | bytes) -> Callable[[RunFolder], None]:
    """Damage by replacing a file."""
    data = content if isinstance(content, bytes) else content.encode()

    def write(folder: RunFolder) -> None:
        (folder.path / name).write_bytes(data)

    return write


def deleted(name: str) -> Callable[[RunFolder], None]:
    """Damage by deleting a file."""
    return lambda folder: (folder.path / name).unlink()


def fifo(name: str) -> Callable[[RunFolder], None]:
    """Damage by a FIFO in place of a file: reading it would wait for ever."""

    def replace(folder: RunFolder) -> None:
        (folder.path / name).unlink()
        os.mkfifo(folder.path / name)

    return replace


def folder_for(name: str) -> Callable[[RunFolder], None]:
    """Damage by a folder in place of a file."""

    def replace(folder: RunFolder) -> None:
        (folder.path / name).unlink()
        (folder.path / name).mkdir()

    return replace


def failed_and_without_summary(folder: RunFolder) -> None:
    """Damage by the failure of an attempt that is not of this run, and no summary."""
    folder.write_failure("boom", "boom")
    folder.summary.unlink()


def summary_with(**values: object) -> Callable[[RunFolder], None]:
    """Damage by other values in the summary; `None` removes a key."""

    def write(folder: RunFolder) -> None:
        summary = folder.read_summary() | values
        kept = {key: value for key, value in summary.items() if value is not None or key not in values}
        folder.summary.write_text(json.dumps(kept))

    return write


def cut_off(name: str) -> Callable[[RunFolder], None]:
    """Damage by cutting the last byte of a file."""
    return lambda folder: written(name, (folder.path / name).read_bytes()[:-1])(folder)


def without_line(text: str, number: int) -> str:
    """The text without a line, counted from 0."""
    lines = text.splitlines(keepends=True)
    return "".join(lines[:number] + lines[number + 1 :])


def with_last_twice(text: str) -> str:
    """The text with its last line twice."""
    return text + text.splitlines(keepends=True)[-1]


ADAPTER = "adapter/adapter_model.safetensors"
DAMAGE: dict[str, tuple[Callable[[RunFolder], None], str]] = {
    "no config": (deleted("config.yaml"), "config.yaml is missing"),
    "another rank": (edited("config.yaml", "rank: 16", "rank: 99"), "config.yaml has changed"),
    "a tab": (edited("config.yaml", "  rank: 16", "\trank: 16"), "config.yaml cannot be read"),
    "bytes": (written("config.yaml", b"\x89PNG\xff\xfe"), "config.yaml cannot be read"),
    "a list": (written("config.yaml", "- 1\n"), "config.yaml cannot be read: it holds no keys"),
    "an unknown key": (edited("config.yaml", "lora:\n", "lora:\n  ranks: 3\n"), "no key lora.ranks"),
    "an unknown method": (edited("config.yaml", "kind: lora", "kind: foo"), "KeyError 'foo'"),
    "empty summary": (written("summary.json", ""), "summary.json is empty"),
    "half a summary": (written("summary.json", '{"version": 1, "base'), "summary.json cannot be read"),
    "no summary": (deleted("summary.json"), "summary.json is missing"),
    "another base CE": (
        lambda folder: summary_with(base_ce=folder.read_summary()["base_ce"] + 1)(folder),
        "summary.json has changed since the run wrote it",
    ),
    "no digests": (summary_with(files={}), "summary.json has changed since the run wrote it"),
    "no digest": (summary_with(digest=None), "summary.json has changed since the run wrote it"),
    "no version": (summary_with(version=None), "summary.json lacks version"),
    "a text for the version": (summary_with(version="1"), "summary.json: version is '1'"),
    "newer summary": (summary_with(version=999), "has version 999; this sae_lora reads version 1"),
    "summary without a key": (summary_with(fvu=None), "summary.json lacks fvu"),
    "garbage in the curve": (
        edited("curve.jsonl", "\n{", "\n{{"),
        "curve.jsonl cannot be read: line 2",
    ),
    "a field of the curve": (edited("curve.jsonl", '"kl"', '"lk"'), "missing 1 required positional"),
    "a point left out": (
        lambda folder: written("curve.jsonl", without_line(folder.curve.read_text(), 2))(folder),
        "curve.jsonl has changed since the run wrote it",
    ),
    "a point twice": (
        lambda folder: written("curve.jsonl", with_last_twice(folder.curve.read_text()))(folder),
        "curve.jsonl cannot be read: line 6: step 400 follows step 400",
    ),
    "half a curve": (cut_off("curve.jsonl"), "curve.jsonl ends at step"),
    "no curve": (deleted("curve.jsonl"), "curve.jsonl is missing"),
    "no adapters": (deleted(ADAPTER), f"{ADAPTER} is missing"),
    "half the adapters": (cut_off(ADAPTER), f"{ADAPTER} is cut off"),
    "no settings of adapters": (
        deleted("adapter/adapter_config.json"),
        "adapter_config.json is missing",
    ),
    "failure": (written("failure.json", "{}"), "failure.json lacks 'message'"),
    "another run's adapters": (
        edited("adapter/adapter_config.json", '"r": 16', '"r": 8'),
        "is of rank 8, the run of rank 16",
    ),
    "another alpha": (
        edited("adapter/adapter_config.json", '"r": 16', '"r": 16, "lora_alpha": 600'),
        "adapter/adapter_config.json has changed since the run wrote it",
    ),
    "no weights": (written(ADAPTER, b"\x02\0\0\0\0\0\0\0{}"), "is cut off, or holds no weights"),
    "a text for a number": (summary_with(gap_closed="0.5"), "summary.json: gap_closed is '0.5'"),
    "not a number": (summary_with(kl=float("nan")), "summary.json: kl is 'nan'"),
    "another gap": (summary_with(ce_gap=0.25), "ce_gap of curve.jsonl is not that of summary.json"),
    "nested": (written("summary.json", "[" * 100_000), "summary.json cannot be read: it is nested"),
    "a file for a folder": (written("checkpoints", ""), "checkpoints is a file, not a folder"),
    "an empty curve": (written("curve.jsonl", ""), "curve.jsonl is empty, summary.json at"),
    "a FIFO": (fifo("summary.json"), "summary.json cannot be read: it is no file"),
    "a folder for a file": (folder_for("curve.jsonl"), "curve.jsonl cannot be read: it is no file"),
    "a failure and no summary": (failed_and_without_summary, "summary.json is missing"),
    "halving": (written("halving.json", '{"bracket": 1}'), "halving.json cannot be read: bracket is"),
    "half a bracket": (written("halving.json", '{"bracket": "a"}'), "halving.json cannot be read"),
    "job": (written("job.json", "[]"), "job.json cannot be read"),
    "another job": (written("job.json", '{"id": [1]}'), "job.json cannot be read: '[1]' is no job"),
}
"""Kinds of damage to a finished run, and a part of the cause that is shown."""
