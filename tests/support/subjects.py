"""Subjects of evaluation: built from given parts, or points whose runs are fast."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sae_lora.common.console import no_report
from sae_lora.config.schema import Config, LoRAConfig
from sae_lora.evaluation.subject import Subject
from sae_lora.models import lora
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.trunk import Splices
from tests.support.families import random_tokens
from tests.support.points import Point, points_in
from tests.support.trainings import fill


class Made(Subject):
    """A subject like one that is loaded from a run.

    Args:
        model: The plain model.
        splices: The SAEs.
        adapters: The adapters; `None` for a run without adapters.
        filled: True if the adapters change the output, as if trained.
        tokens: Held-out tokens `[sequence, pos]`.
    """

    def __init__(
        self,
        model: LanguageModel,
        splices: Splices,
        adapters: LoRAConfig | None = None,
        *,
        filled: bool = True,
        tokens: torch.Tensor | None = None,
    ) -> None:
        self.report_to(no_report)
        self.config = Config()
        self.tokens = random_tokens(batch=6, length=12, seed=3) if tokens is None else tokens
        self.config.train.eval_batch_tokens = 2 * self.tokens.shape[1]  # several batches
        self.model = self.with_adapters = model
        self.device = model.device
        self.special_ids = ()
        self.before = self.after = splices
        peft: Any = None
        if adapters is not None:
            self.with_adapters = model.view()
            torch.manual_seed(0)
            peft = lora.attach(self.with_adapters, adapters, splices[0].block).eval()
            if filled:
                fill(lora.trainable_weights(self.with_adapters))
        self.adapted = SimpleNamespace(peft=peft)  # pyright: ignore[reportAttributeAccessIssue]


def copy_few_texts(to: Path) -> None:
    """Create the folder `to` with forty texts of the kind that the embedded model was trained on."""
    to.mkdir()
    for file in sorted(Path(os.__file__).parent.glob("*.py"))[:40]:
        shutil.copy(file, to)


def quick_points_in(home: Path) -> Point:
    """Points with only a few texts, which are faster to read."""
    texts = home / "texts"
    copy_few_texts(texts)
    point = points_in(home)
    text = f"data=text_files data.files={texts}/*.py data.validation_share=0.5 data.context_length=128"

    def compose(*overrides: str) -> Config:
        return point(*text.split(), *overrides)

    return compose
