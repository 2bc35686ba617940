"""Kinds of damage to the folder of a finished run of LoRA with rank 16, and the cause that is shown."""

import json
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
    "newer summary": (summary_with(version=999), "has version 999; this sae_lora reads version 1"),
    "summary without a key": (summary_with(fvu=None), "summary.json lacks fvu"),
    "garbage in the curve": (
        edited("curve.jsonl", "\n{", "\n{{"),
        "curve.jsonl cannot be read: line 2",
    ),
    "a field of the curve": (edited("curve.jsonl", '"kl"', '"lk"'), "missing 1 required positional"),
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
    "no weights": (written(ADAPTER, b"\x02\0\0\0\0\0\0\0{}"), "is cut off, or holds no weights"),
    "a text for a number": (summary_with(gap_closed="0.5"), "summary.json: gap_closed is '0.5'"),
    "not a number": (summary_with(kl=float("nan")), "summary.json: kl is 'nan'"),
    "another gap": (summary_with(ce_gap=0.25), "ce_gap of curve.jsonl is not that of summary.json"),
    "nested": (written("summary.json", "[" * 100_000), "summary.json cannot be read: it is nested"),
    "job": (written("job.json", "[]"), "job.json cannot be read"),
    "another job": (written("job.json", '{"id": [1]}'), "job.json cannot be read: '[1]' is no job"),
}
"""Kinds of damage to a finished run, and a part of the cause that is shown."""
