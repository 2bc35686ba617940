"""Distillation: students learn the teacher's distribution on the same batches."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from sae_lora.common.isolation import Isolation
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.kl import KL
from sae_lora.splice.student import cuts
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.passes import EACH_ALONE, Passes, Passing
from sae_lora.train.train_state import DistillState
from sae_lora.train.trainer import TRAINING, Task, Trainer

Run = TypeVar("Run")
COMPILING = "compiling"
"""The stage of a first step that compiles blocks."""
AT_ONCE = 8
"""Number of students of a pack whose activations are held at once. For every further group the teacher's
logits are computed again, at a third of the cost of one student's logits and their gradient."""


class DistillTrainer(Trainer[DistillState]):
    """Students that learn the teacher's distribution together, each as if it were trained alone.

    Args:
        model: The plain model.
        trainings, evaluate: As in `Trainer`.
        kl: The KL of several students at once.
        micro_batch: Sequences per forward and backward pass; `None` for all sequences of the step.
        passing: The way of the trainings through the model.
    """

    def __init__(
        self,
        model: LanguageModel,
        trainings: Isolation[DistillState],
        evaluate: Evaluator,
        kl: KL,
        micro_batch: int | None = None,
        passing: Passing = EACH_ALONE,
    ) -> None:
        super().__init__(model.device, trainings, evaluate)
        self._model = model
        self._kl = kl
        self._micro_batch = micro_batch
        self._passes = Passes(model, trainings, passing)
        self._compiles = passing.compiled
        """True if the next step compiles blocks."""

    def follow(self, task: Task) -> None:
        trainings = [self._trainings.runs[number] for number in task.numbers]
        if task.contributions:
            for training in trainings:
                self._evaluate.contributions(training.student)
            return
        if task.tokens is None:
            self._evaluate([training.student for training in trainings])
            return
        for training in trainings:
            training.seed_rank(self._processes.rank)
        self._take_step(trainings, self._on_device(task.tokens))

    def _step(self, step: int, batches: Iterator[Tensor], trained: Sequence[DistillState]) -> None:
        tokens = next(batches)
        if trained:
            compiles, self._compiles = self._compiles, False
            if compiles:
                self.pace.is_unusual = True
                self._evaluate.report(COMPILING, 0, 0)
            self._broadcast(trained, tokens)
            self._take_step(trained, self._on_device(tokens))
            if compiles:
                self._evaluate.report(TRAINING, 0, 0)

    def _on_device(self, tokens: Tensor) -> Tensor:
        """The tokens on the model's device; a GPU copies them from pinned memory while it computes."""
        device = self._model.device
        return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens

    def _take_step(self, trained: Sequence[DistillState], tokens: Tensor) -> None:
        """Take one step of each training on the tokens `[batch, pos]`."""
        shard = self._processes.shard(tokens)

        # ---- the step -------------------------------------------------------------------------
        for part in shard.split(self._micro_batch or len(shard)):
            trunk = self._passes.trunk(part, cuts(state.student for state in trained))
            teacher = trunk.hidden()
            for turn in turns(self._still_active(trained)):
                passes = self._passes.of(turn)
                hidden = {
                    training: states
                    for each in passes
                    for training, states in each.hidden(trunk).items()
                }
                weights = [
                    training.weight(tokens.shape) if training.needs_gradient else None
                    for training, of_student in hidden.items()
                    for _ in of_student
                ]
                states = [states for of_student in hidden.values() for states in of_student]
                summed = iter(self._kl(teacher, states, weights))
                kl = {training: [next(summed) for _ in states] for training, states in hidden.items()}
                del hidden, states
                for each in passes:
                    each.backward(kl)
        self._processes.all_reduce([part for training in trained for part in training.sums])
        for training in self._still_active(trained):
            with self._trainings.only(training):
                training.take_step(tokens.shape)
        # ---------------------------------------------------------------------------------------


def turns(runs: Sequence[Run]) -> list[Sequence[Run]]:
    """The runs of a pack, in groups that process a batch at the same time."""
    return [runs[start : start + AT_ONCE] for start in range(0, len(runs), AT_ONCE)]
