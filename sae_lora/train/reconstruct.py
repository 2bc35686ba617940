"""SAEs that learn to reconstruct: the loop that has one pass of the model serve them all."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lora.saes.training.activation_buffer import ActivationBuffer
from sae_lora.saes.training.sae_trainer import SAELearner
from sae_lora.saes.training.spliced_sae import TrainedSAE
from sae_lora.splice.student import Student
from sae_lora.train.checkpoint import State
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.optim import Moved
from sae_lora.train.train_state import Training
from sae_lora.train.trainer import Loop


class Source(NamedTuple):
    """Where an SAE in training takes its activations from.

    Args:
        sae: The SAE.
        hookpoints: Of several, each token takes one at random.
    """

    sae: TrainedSAE
    hookpoints: list[str]


def sources_of(student: Student) -> dict[str, Source]:
    """Where each SAE of a student takes its activations from, by a name that says it."""
    by_sae: dict[int, Source] = {}
    for splice in student.splices:
        assert isinstance(splice.sae, TrainedSAE)
        by_sae.setdefault(id(splice.sae), Source(splice.sae, [])).hookpoints.append(splice.hookpoint)
    return {"+".join(source.hookpoints): source for source in by_sae.values()}


class Reconstruction:
    """SAEs of one run that learn to reconstruct, by sae-lens's trainer.

    Args:
        student: The model with the SAEs in place.
        learners: By the names of `sources_of`.
    """

    def __init__(self, student: Student, learners: Mapping[str, SAELearner]) -> None:
        self.student = student
        self._learners = learners
        self._saes = {name: source.sae for name, source in sources_of(student).items()}
        self._given: Mapping[str, Tensor] = {}
        self._tokens = 0
        self._device = student.model.device
        self.forget_step()

    def read(self, activations: Mapping[str, Tensor], tokens: int) -> None:
        """Takes what the step will be on.

        Args:
            activations: `[token, d_model]` by name.
            tokens: That the step counts as; at some of them there may be no activation.
        """
        self._given = activations
        self._tokens = tokens

    def learn(self, lr: float, weight: float) -> Moved:
        # sae-lens's schedule rises a little otherwise than ours.
        lr = next(iter(self._learners.values())).lr
        for name, learner in self._learners.items():
            found = learner.step(self._given[name])
            # In the residuals' own units; a mean over SAEs.
            mse = found.mse.double() / learner.scale**2
            self.total += self._tokens * mse / len(self._learners)
            self._saes[name].has_moved()
        return Moved(lr, None)

    def forget_step(self) -> None:
        self._given = {}
        self.total = torch.zeros((), dtype=torch.float64, device=self._device)

    def state(self) -> State:
        tensors, values = {}, {}
        for name, learner in self._learners.items():
            own, values[name] = learner.state()
            tensors |= {f"{name}/{key}": tensor for key, tensor in own.items()}
            tensors[f"{name}/scale"] = self._saes[name].scale
        return State(tensors, values)

    def restore(self, state: State) -> None:
        for name, learner in self._learners.items():
            own = {
                key.removeprefix(f"{name}/"): tensor
                for key, tensor in state.tensors.items()
                if key.startswith(f"{name}/")
            }
            learner.restore(own, state.values[name])
            self._saes[name].scale.copy_(own["scale"])
            self._saes[name].has_moved()


class SAEPack(Loop[Reconstruction]):
    """SAEs that learn to reconstruct the same model's activations, whatever their blocks and widths.

    Args:
        buffer: Serves the activations of all of them.
        batch: Shape of a step's tokens, `[batch, pos]`.
        device: Where they are.
        trainings: With equal numbers of steps.
        evaluate: Measures them on held-out tokens.
        own: As `Loop` takes it.
    """

    def __init__(
        self,
        buffer: ActivationBuffer,
        batch: torch.Size,
        device: torch.device,
        trainings: Iterable[Training[Reconstruction]],
        evaluate: Evaluator,
        own: Callable[[Training[Any]], AbstractContextManager[None]] = lambda one: nullcontext(),
    ) -> None:
        super().__init__(device, trainings, evaluate, own)
        self._buffer = buffer
        self._batch = batch

    @property
    def first_batch(self) -> int:
        return self._buffer.first_batch_of(self.step)

    def _step(
        self, step: int, batches: Iterator[Tensor], trained: Sequence[Training[Reconstruction]]
    ) -> None:
        activations = self._buffer.serve(step, batches)
        for training in trained:
            with self._own(training):
                training.learner.read(activations, self._batch.numel())
                training.learn(self._batch)
