"""Made-up sweeps: run folders like those of finished runs, with invented numbers."""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from sae_lora.config.enums import Method
from sae_lora.config.identity import ADAPTING, TRAINING_SAES, identity_of
from sae_lora.config.serialize import as_dict, completed
from sae_lora.launcher.plan import plan
from sae_lora.models.hookpoints import resid_post
from sae_lora.records.damage import files_of
from sae_lora.records.folder import RunFolder, summary_digest
from sae_lora.records.schema import SUMMARY_VERSION, CurvePoint
from tests.support.composing import composed

_NAMES = "base_ce student_ce spliced_ce ce_gap gap_closed kl top1_agreement fvu l0 train_seconds".split()


@functools.cache
def _default() -> dict[str, Any]:
    """The config of the only run of the embedded default."""
    (planned,) = plan([composed()]).runs
    return as_dict(planned.config)


class MadeUp:
    """Made-up runs of the embedded default.

    Args:
        home: The sweep's folder.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._config: dict[str, Any] = copy.deepcopy(_default()) | {"output_dir": str(home)}

    def folder(
        self, rank: int = 16, block: int = 3, l0: float = 4.0, seed: int = 0, **train: Any
    ) -> RunFolder:
        """A run with only a config."""
        config = copy.deepcopy(self._config)
        config["lora"]["rank"], config["train"]["seed"] = rank, seed
        config["sae"]["l0"], config["layer"]["index"] = l0, block
        config["train"] |= train
        config["sae"]["used"][0] |= {"block": block, "l0": l0}
        folder = RunFolder(self.home / f"tiny-l{block}-l0_{l0:g}-r{rank}-s{seed}")
        folder.write_config(yaml.safe_dump(config))
        return folder

    def begun(self, points: int = 5, **factors: Any) -> RunFolder:
        """An unfinished run with a curve, in place of an earlier one."""
        folder = self.folder(**factors)
        folder.curve.unlink(missing_ok=True)
        for point in self.points_of(points, **factors):
            folder.append_point(point)
        return folder

    def finished(self, points: int = 5, *, closed: float | None = math.nan, **factors: Any) -> RunFolder:
        """A finished run; `closed` replaces the share of the gap that follows from the factors."""
        folder = self.begun(points, **factors)
        summary: dict[str, Any] = {"trainable_parameters": 10_240 * factors.get("rank", 16)}
        if closed is None or not math.isnan(closed):
            summary["gap_closed"] = closed
        return summed_up(folder, **summary)

    def told(
        self, name: str, curve: Sequence[CurvePoint], config: Mapping[str, Any], **summary: Any
    ) -> RunFolder:
        """A finished run with the given curve, config and summary.

        Args:
            name: Name of its folder.
            curve: Its points; without points the run is not finished.
            config: Values that differ from the embedded default, by dotted key.
            summary: Values of its summary besides those of the last point.
        """
        values = copy.deepcopy(self._config)
        for key, value in config.items():
            group, _, field = key.rpartition(".")
            (values[group] if group else values)[field] = value
        folder = RunFolder(self.home / name)
        folder.write_config(yaml.safe_dump(values))
        for point in curve:
            folder.append_point(point)
        return summed_up(folder, **summary) if curve else folder

    def saes_at(
        self, *blocks: int, group: Mapping[int, list[int]] | None = None
    ) -> list[dict[str, Any]]:
        """The entries of `sae.used` for SAEs at these blocks.

        Args:
            blocks: The blocks.
            group: The blocks that share the SAE of a block, by block.
        """
        (template,) = self._config["sae"]["used"]
        return [template | {"block": block, "group": (group or {}).get(block, [])} for block in blocks]

    def grid(self, ranks: Sequence[int], blocks: Sequence[int], l0s: Sequence[float] = (4.0,)) -> None:
        """A finished run for every combination."""
        for rank in ranks:
            for block in blocks:
                for l0 in l0s:
                    self.finished(rank=rank, block=block, l0=l0)

    @staticmethod
    def points_of(
        points: int, rank: int = 16, block: int = 3, l0: float = 4.0, seed: int = 0, **_: Any
    ) -> list[CurvePoint]:
        end = 0.06 * math.log2(2 * rank) + 0.01 * block - 0.02 * math.log2(l0) + 0.005 * seed
        gap = 1.4 / math.sqrt(l0)
        curve = []
        for step in range(points):
            share = step / max(1, points - 1)
            closed = end * (1 - math.exp(-3 * share))
            ce_gap = gap * (1 - closed)
            curve.append(
                CurvePoint(
                    step=100 * step,
                    tokens=51_200 * step,
                    train_seconds=11.0 * step * (1 + rank / 256),
                    base_ce=2.7,
                    spliced_ce=2.7 + gap,
                    student_ce=2.7 + ce_gap,
                    ce_gap=ce_gap,
                    gap_closed=closed,
                    kl=ce_gap * 1.1,
                    top1_agreement=0.6,
                    fvu=0.3,
                    l0=l0,
                    train_flops=2.5e12 * step,
                )
            )
        return curve


def summed_up(folder: RunFolder, **values: Any) -> RunFolder:
    """Make the folder of a run with a config that of a finished one; return it.

    The summary follows from the config and the last point (one of step 0, without a curve), then from an
    earlier summary, then from `values`.
    """
    if not folder.curve.exists():
        folder.append_point(curve_point(0))
    last, config = folder.read_curve()[-1], completed(folder.read_config())
    kind = config["method"]["kind"]
    earlier = folder.read_summary() if folder.summary.exists() else {}
    summary = {name: getattr(last, name) for name in _NAMES} | {
        "name": folder.path.name,
        "initial_gap": last.spliced_ce - last.base_ce,
        "initial_kl": 0.8,
        "best_gap_closed": last.gap_closed,
        "trainable_parameters": 10_240,
        "train_tokens": last.tokens,
        "train_flops": 1e13,
        "total_seconds": 80.0,
        "trained_together": 1,
        "tracked_at": None,
        "model": {"name": config["model"]["name"]},
        "sae": [
            {"block": sae["block"], "hookpoint": resid_post(sae["block"]), "width": sae["width"]}
            for sae in config["sae"]["used"]
        ],
        "lora": config["lora"] if kind == "lora" else {},
        "method": {"kind": kind, "rank": config["method"]["rank"], "init": config["init"]},
        "seed": config["train"]["seed"],
        "validation_tokens": 32_768,
        "data": {},
        "environment": {},
        "version": SUMMARY_VERSION,
    }
    fitting = {"hash": identity_of(config), "train_steps": last.step}
    summary |= earlier | fitting | values
    shared = {name: summary[name] for name in ("student_ce", "ce_gap", "gap_closed", "kl")}
    ended = dataclasses.replace(last, **shared)
    if ended != last:  # a tracker's thread may be reading the curve
        points = [*folder.read_curve()[:-1], ended]
        folder.curve.unlink()
        for point in points:
            folder.append_point(point)
    _write_weights(folder, config)
    write_summary(folder, summary)
    return folder


def write_summary(folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """Write a summary that fits the other files of the folder."""
    values = {**summary, "files": files_of(folder)}
    folder.summary.write_text(json.dumps(values | {"digest": summary_digest(values)}))


def _write_weights(folder: RunFolder, config: Mapping[str, Any]) -> None:
    """Write empty files in place of the weights that a finished run with this config leaves."""
    kind = Method[config["method"]["kind"]]
    weights = [(folder.adapter, "adapter_model", "adapter_config")] if kind in ADAPTING else []
    for sae in config["sae"]["used"]:
        place = f"blocks.{min([sae['block'], *sae['group']])}.hook_{sae['hook']}"
        if kind in TRAINING_SAES:
            weights.append((folder.sae / place, "sae_weights", "cfg"))
        elif kind not in ADAPTING:
            weights.append((folder.output_adapter / place, "output_adapter", "output_adapter"))
    for path, tensors, settings in weights:
        path.mkdir(parents=True, exist_ok=True)
        if not (path / f"{tensors}.safetensors").exists():
            save_file({"weight": torch.zeros(1)}, path / f"{tensors}.safetensors")
        if not (path / f"{settings}.json").exists():
            (path / f"{settings}.json").write_text(json.dumps({"r": config["lora"]["rank"]}))


def finished(home: Path, name: str, rank: int, block: int, closed: float | None) -> RunFolder:
    """A finished run with this name; every cross-entropy in it is 1."""
    folder = MadeUp(home).finished(rank=rank, block=block, l0=8.0, closed=closed)
    folder.path.rename(home / name)
    folder = RunFolder(home / name)
    numbers = dict.fromkeys(
        ("base_ce", "spliced_ce", "student_ce", "initial_gap", "ce_gap", "kl", "fvu"), 1.0
    )
    return summed_up(folder, **numbers, name=name, train_seconds=63.0)


def curve_point(step: int) -> CurvePoint:
    """A point of a made-up curve with ten tokens per step."""
    return CurvePoint(step, step * 10, 1.0, 2.0, 3.0, 2.5, 0.5, 0.5, 0.1, 0.9, 0.2, 8.0)
