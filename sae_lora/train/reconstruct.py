"""SAEs that learn to reconstruct: the loop that has one pass of the model serve them all."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.common.isolation import Isolation
from sae_lora.config.schema import TrainConfig
from sae_lora.saes.training.activation_buffer import ActivationBuffer
from sae_lora.saes.training.sae_trainer import SteppedSAETrainer
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.student import Student
from sae_lora.train.checkpoint import Snapshot
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.train_state import StepInfo, TrainState
from sae_lora.train.trainer import Trainer


class Source(NamedTuple):
    """Where an SAE in training takes its activations from.

    Args:
        sae: The SAE.
        hookpoints: Of several, each token takes one at random.
    """

    sae: SplicedSAE
    hookpoints: list[str]


def sources_of(student: Student) -> dict[str, Source]:
    """Where each SAE of a student takes its activations from, by a name that says it."""
    by_sae: dict[int, Source] = {}
    for splice in student.splices:
        assert isinstance(splice.sae, SplicedSAE)
        by_sae.setdefault(id(splice.sae), Source(splice.sae, [])).hookpoints.append(splice.hookpoint)
    return {"+".join(source.hookpoints): source for source in by_sae.values()}


class ReconstructState(TrainState):
    """SAEs of one run that learn to reconstruct, by sae-lens's trainer.

    Args:
        student: The model with the SAEs in place.
        config: The optimisation.
        steps: Number of steps in all.
        trainers: By the names of `sources_of`.
    """

    def __init__(
        self,
        student: Student,
        config: TrainConfig,
        steps: int,
        trainers: Mapping[str, SteppedSAETrainer],
    ) -> None:
        super().__init__(student, config, steps)
        self._trainers = trainers
        self._saes = {name: source.sae for name, source in sources_of(student).items()}
        self._given: Mapping[str, Tensor] = {}
        self._step_tokens = 0
        self.reset()

    @property
    def total(self) -> Tensor:
        return self._total

    def read(self, activations: Mapping[str, Tensor], tokens: int) -> None:
        """Takes what the step will be on.

        Args:
            activations: `[token, d_model]` by name.
            tokens: That the step counts as; at some of them there may be no activation.
        """
        self._given = activations
        self._step_tokens = tokens

    def _update(self, lr: float, weight: float) -> StepInfo:
        # sae-lens's schedule rises a little otherwise than ours.
        lr = next(iter(self._trainers.values())).lr
        for name, trainer in self._trainers.items():
            # In the residuals' own units; a mean over SAEs.
            mse = trainer.step(self._given[name]).double() / trainer.scale**2
            self._total += self._step_tokens * mse / len(self._trainers)
            self._saes[name].has_moved()
        return StepInfo(lr, None)

    def reset(self) -> None:
        self._given = {}
        self._total = torch.zeros((), dtype=torch.float64, device=self._device)

    def _own_state(self) -> Snapshot:
        tensors, values = {}, {}
        for name, trainer in self._trainers.items():
            own, values[name] = trainer.state()
            tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
            tensors[f"{name}/scale"] = self._saes[name].scale
        return Snapshot(tensors, values)

    def _restore_own(self, kept: Snapshot) -> None:
        for name, trainer in self._trainers.items():
            own = {
                key.removeprefix(f"{name}/"): tensor
                for key, tensor in kept.tensors.items()
                if key.startswith(f"{name}/")
            }
            trainer.restore(own, kept.values[name])
            self._saes[name].scale.copy_(own["scale"])
            self._saes[name].has_moved()


class ReconstructTrainer(Trainer[ReconstructState]):
    """SAEs that learn to reconstruct the same model's activations, whatever their blocks and widths.

    Args:
        buffer: Serves the activations of all of them.
        batch: Shape of a step's tokens, `[batch, pos]`.
        device: Where they are.
        trainings: With equal numbers of steps.
        evaluate: Measures them on held-out tokens.
    """

    def __init__(
        self,
        buffer: ActivationBuffer,
        batch: torch.Size,
        device: torch.device,
        trainings: Isolation[ReconstructState],
        evaluate: Evaluator,
    ) -> None:
        super().__init__(device, trainings, evaluate)
        self._buffer = buffer
        self._batch = batch

    @property
    def first_batch(self) -> int:
        return self._buffer.first_batch_of(self.step)

    def _step(self, step: int, batches: Iterator[Tensor], trained: Sequence[ReconstructState]) -> None:
        activations = self._buffer.serve(step, batches)
        for training in trained:
            with self._trainings.only(training):
                training.read(activations, self._batch.numel())
                training.take_step(self._batch)
