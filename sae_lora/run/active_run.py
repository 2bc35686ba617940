"""One run of a pack: its folder, its training, its outcome."""

import copy
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import set_seed

from sae_lora.common.console import complain, say
from sae_lora.common.errors import UserError, is_out_of_memory
from sae_lora.common.files import new_folder
from sae_lora.common.locks import LostError
from sae_lora.config.identity import identity, readable_name, train_steps
from sae_lora.config.schema import Config
from sae_lora.config.serialize import load
from sae_lora.models.language_model import LanguageModel
from sae_lora.records.damage import files_of, weights_of
from sae_lora.records.folder import RunFolder
from sae_lora.records.halving import Standing
from sae_lora.records.schema import CurvePoint, Summary
from sae_lora.run.summary import l0_notes, summarise
from sae_lora.saes.loading import LoadedSAE, splices
from sae_lora.tracking.tracker import Tracker
from sae_lora.train import checkpoint, methods
from sae_lora.train.checkpoint import Snapshot
from sae_lora.train.cost.estimate import estimate
from sae_lora.train.cost.runs import left_out
from sae_lora.train.evaluator import Contribution
from sae_lora.train.train_state import TrainState


class ActiveRun:
    """One run, from its folder to its summary.

    The methods are called in the order in which they are defined.

    Args:
        folder: A run folder whose config is checked and has resolved SAEs.
        check: Called before each write of a checkpoint or a result; raises if the run is lost.
        release: Called after the last write.
    """

    config: Config
    training: TrainState
    _tracker: Tracker

    def __init__(
        self,
        folder: RunFolder,
        check: Callable[[], None] = lambda: None,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder = folder
        self.outcome: Summary | Standing | Exception | None = None
        """The summary, the place if others are ahead, or the error; `None` while it is unfinished."""
        self.checkpoint_step: int | None = None
        """Step of the newest checkpoint."""
        self.noticed: list[str] = []
        """Notes about the model, and positions that hold most of the variance of an SAE's input."""
        self._check = check
        self._release = release
        self._saved: Snapshot | None = None
        self._saes: list[LoadedSAE] = []
        self._has_started = False

    def read(self) -> None:
        """Read the config and the newest checkpoint; write nothing.

        Raises:
            UserError: If there are checkpoints, but none can be used.
        """
        self.config = load(self.folder.config.read_text())
        self.name = readable_name(self.config)
        self._hash = identity(self.config)
        self._steps = train_steps(self.config)
        self._saved = checkpoint.newest(
            self.folder.checkpoints, self._hash, lambda text: complain("damaged", text)
        )
        self.seconds_before = self._saved.values["total_seconds"] if self._saved else 0.0
        """Seconds of earlier attempts, up to the checkpoint."""

    def move_aside(self) -> None:
        """Move unfinished files of an earlier attempt into a subfolder."""
        self.folder.set_aside(curve=self._saved is None)

    def build(
        self,
        model: LanguageModel,
        saes: list[LoadedSAE],
        special_ids: Sequence[int],
        sample: Tensor | None = None,
    ) -> None:
        """Build the student and the training, new or from the checkpoint.

        Args:
            model: The plain model.
            saes: The SAEs of the config; if empty, new SAEs are made.
            special_ids: BOS and EOS.
            sample: Training tokens `[batch, pos]`, needed for new SAEs.

        Raises:
            ConfigError: If the trained weights do not fit the model.
        """
        set_seed(self.config.train.seed)
        if not saes:
            assert sample is not None
            saes = methods.new_saes(self.config, model, sample, special_ids)
        self._saes = saes
        spliced = splices(self.config.sae, saes, special_ids)
        self._special = [splice.special for splice in spliced]
        self.training, self._artifacts = methods.build(self.config, model, spliced, self._steps)
        self.trainable = sum(weight.numel() for weight in self.training.student.weights.values())
        """Number of trainable parameters."""
        as_loaded = copy.deepcopy(self.config)
        for choice, loaded in zip(as_loaded.sae.used, saes, strict=True):
            choice.width = loaded.description["width"]
        self._flops_per_step = estimate([as_loaded]).flops / self._steps
        self.left_out = left_out(self.config)
        """Weights in the adapted blocks that stay frozen, as in `Summary.lora`."""
        if self._saved is not None:
            self.training.restore(self._saved)
            self.checkpoint_step = self.training.step

    def begin(self, environment: dict[str, Any]) -> None:
        """Cut the curve to the checkpoint, and open the W&B run.

        Raises:
            UserError: If the curve does not belong to the checkpoint.
        """
        points = self._saved.values["points"] if self._saved else 0
        self.folder.cut_curve(points)
        self._tracker = Tracker(self.config, self.folder, environment)
        self._has_started = True
        self._tracker.show(points)

    def take(self, point: CurvePoint) -> None:
        """Append a point to the curve. Before training, also say where an L0 is not as stated."""
        for note in l0_notes(self._saes, point) if point.step == 0 else ():
            say(f"note: {self.name}: {note}")
        self.folder.append_point(replace(point, train_flops=self._flops_per_step * point.step))

    def save(self, total_seconds: float) -> None:
        """Write a checkpoint. Its points are final, so W&B may show them."""
        self._check()
        self.keep_if_due()  # a run that stops after this step resumes after it
        state = self.training.state()
        state.values["total_seconds"] = total_seconds
        checkpoint.save(self.folder.checkpoints, self._hash, state)
        self.checkpoint_step = self.training.step
        self._tracker.show(state.values["points"])

    def keep_if_due(self) -> None:
        """Save the trained SAEs if the step is at a share of training in `method.checkpoints`."""
        for share in self.config.method.checkpoints:
            folder = self.folder.sae_at / f"{share:g}"
            if self.training.step == max(1, round(share * self._steps)) and not folder.exists():
                self.folder.sae_at.mkdir(exist_ok=True)
                (saes,) = self._artifacts
                with new_folder(folder) as new:
                    saes.save(new)

    def finish(
        self,
        total_seconds: float,
        contributions: Mapping[str, Contribution],
        data: dict[str, Any],
        **common: Any,
    ) -> None:
        """Write the results. The run is then finished.

        Args:
            total_seconds: Seconds of all attempts.
            contributions: Contribution of each SAE by hookpoint, if there are several.
            data: Description of the text.
            common: Further fields of the summary.
        """
        self._check()
        for artifact in self._artifacts:
            with new_folder(self.folder.path / artifact.name) as new:
                artifact.save(new)
        summary = summarise(
            self.config,
            self.folder.read_curve(),
            self._saes,
            contributions,
            left_out=self.left_out,
            name=self.name,
            hash=self._hash,
            trainable_parameters=self.trainable,
            total_seconds=total_seconds,
            data=data
            | {
                "special_tokens_kept": any(special.ids for special in self._special),
                "first_position_kept": any(special.first for special in self._special),
            },
            tracked_at=self._tracker.place,
            special=self._special,
            noticed=self.noticed,
            weights=weights_of(self.folder),
            files=files_of(self.folder),
            **common,
        )
        self.folder.write_summary(summary)
        self.outcome = summary
        shutil.rmtree(self.folder.checkpoints, ignore_errors=True)
        self.folder.progress.unlink(missing_ok=True)
        self._release()

    def leave(self, standing: Standing) -> None:
        """Stop here, after `save`, because others are ahead. The run can be taken up again."""
        say(f"{self.name}: {standing}")
        self.folder.write_stop(str(standing), outranked=True)
        self.outcome = standing
        self.end()  # before another process may take the run up, and open the same W&B run
        self._release()

    def fail(self, error: Exception) -> None:
        """Record the error as the outcome, and write it into the folder."""
        self.outcome = error
        if isinstance(error, LostError):
            complain("skipped", f"{self.folder.path.name}: {error}")
        else:
            write_failure(self.folder, error)
        traceback.clear_frames(
            error.__traceback__
        )  # otherwise they keep the tensors of the run on the device
        self._release()

    def end(self) -> None:
        """End the W&B run, once."""
        if not self._has_started:
            return
        self._has_started = False
        will_resume = self.outcome is None or isinstance(self.outcome, LostError)
        if not will_resume:
            self._tracker.show(None)
        summary = self.outcome if isinstance(self.outcome, Summary) else None
        self._tracker.finish(summary, will_resume=will_resume)


def write_failure(folder: RunFolder, error: Exception) -> None:
    """Write the error of a run into its folder: a message and the traceback."""
    try:
        folder.write_failure(_cause(error), "".join(traceback.format_exception(error)))
    except OSError as write_error:  # a full disk, or a deleted folder
        message = (
            f"{_cause(error)}\n  (this failure could not be written to the run folder: {write_error})"
        )
        if not folder.path.exists():
            message = "the folder of this run has been deleted; it stops here"
        complain("failed", f"{folder.path.name}: {message}")


def _cause(error: Exception) -> str:
    """Describe the cause of a failure."""
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return (
            f"out of memory: {error}\n  reduce train.batch_size, train.kl_chunk_tokens (logits) or "
            "train.eval_batch_tokens (the last two do not change results)"
        )
    return f"{type(error).__name__}: {error}"
