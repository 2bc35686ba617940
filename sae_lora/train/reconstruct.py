"""Training of SAEs to reconstruct activations; one forward pass of the model serves all of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_lora.common.isolation import Isolation
from sae_lora.config.enums import Schedule
from sae_lora.config.identity import dead_after_steps, step_tokens
from sae_lora.config.schema import Config
from sae_lora.saes.training.activation_buffer import ActivationBuffer
from sae_lora.saes.training.sae_trainer import SteppedSAETrainer
from sae_lora.saes.training.spliced_sae import SplicedSAE
from sae_lora.splice.mlp_input import Stream
from sae_lora.splice.student import Student
from sae_lora.train.checkpoint import Snapshot
from sae_lora.train.evaluator import Evaluator
from sae_lora.train.train_state import TrainState, zero
from sae_lora.train.trainer import Trainer


class Source(NamedTuple):
    """An SAE in training and the streams it reads; each token takes one of them at random."""

    sae: SplicedSAE
    streams: list[Stream]


def sources_of(student: Student) -> dict[str, Source]:
    """The SAEs of a student and their streams, by the names of the hookpoints joined with `+`."""
    by_sae: dict[int, Source] = {}
    for splice in student.splices:
        assert isinstance(splice.sae, SplicedSAE)
        source = by_sae.setdefault(id(splice.sae), Source(splice.sae, []))
        source.streams.append(Stream(splice.hookpoint, splice.reads))
    return {
        "+".join(stream.hookpoint for stream in source.streams): source for source in by_sae.values()
    }


class ReconstructState(TrainState):
    """The SAEs of one run that learn to reconstruct, with sae-lens's trainer.

    Args:
        student, steps: As in `TrainState`.
        config: Config of the run.
    """

    def __init__(self, student: Student, config: Config, steps: int) -> None:
        super().__init__(student, config.train, steps)
        self._saes = {name: source.sae for name, source in sources_of(student).items()}
        warm_up = round(config.train.warmup_share * steps)
        falls = config.train.schedule is Schedule.linear
        self._trainers = {
            name: SteppedSAETrainer(
                sae.sae,
                steps=steps,
                batch_tokens=step_tokens(config),
                lr=config.train.lr,
                scale=float(sae.scale),
                warm_up_steps=warm_up,
                decay_steps=steps - warm_up if falls else 0,
                dead_window_steps=dead_after_steps(config),
                sampling_window_steps=max(2, steps // 4),
            )
            for name, sae in self._saes.items()
        }
        self._activations: Mapping[str, Tensor] = {}

    def read(self, activations: Mapping[str, Tensor]) -> None:
        """Take the activations of the next step, `[token, d_model]`, by name.

        There are fewer activations than tokens in the step if special tokens are left out.
        """
        self._activations = activations

    def _update(self, lr: float, batch: torch.Size) -> None:
        # sae-lens's warm-up differs a little from `lr_factor`.
        self.lr = next(iter(self._trainers.values())).lr
        for name, trainer in self._trainers.items():
            # In the units of unscaled residuals; mean over SAEs.
            mse = trainer.step(self._activations[name]).double() / trainer.scale**2
            self.total += batch.numel() * mse / len(self._trainers)
            self._saes[name].drop_frozen()

    def reset(self) -> None:
        self._activations = {}
        self.total = zero(self._device)

    def _method_state(self) -> Snapshot:
        tensors, values = {}, {}
        for name, trainer in self._trainers.items():
            of_trainer, values[name] = trainer.state()
            tensors |= {f"{name}/{key}": tensor for key, tensor in of_trainer.items()}
            tensors[f"{name}/scale"] = self._saes[name].scale
        return Snapshot(tensors, values)

    def _restore_method(self, snapshot: Snapshot) -> None:
        for name, trainer in self._trainers.items():
            tensors = {
                key.removeprefix(f"{name}/"): tensor
                for key, tensor in snapshot.tensors.items()
                if key.startswith(f"{name}/")
            }
            trainer.restore(tensors, snapshot.values[name])
            self._saes[name].scale.copy_(tensors["scale"])
            self._saes[name].drop_frozen()


class ReconstructTrainer(Trainer[ReconstructState]):
    """SAEs of several runs that learn to reconstruct activations of the same model, at any blocks.

    Args:
        buffer: The activations for all SAEs.
        batch: Shape of a step's tokens, `[batch, pos]`.
        device, trainings, evaluate: As in `Trainer`.
    """

    def __init__(
        self,
        buffer: ActivationBuffer,
        batch: torch.Size,
        device: torch.device,
        trainings: Isolation[ReconstructState],
        evaluate: Evaluator,
    ) -> None:
        super().__init__(device, trainings, evaluate, buffer.batches_per_fill)
        self._buffer = buffer
        self._batch = batch

    @property
    def first_batch(self) -> int:
        return self._buffer.first_batch_of(self.step)

    def _prepare(self, step: int, batches: Iterator[Tensor]) -> bool:
        return self._buffer.prepare(step, batches)

    def _step(self, step: int, batches: Iterator[Tensor], trained: Sequence[ReconstructState]) -> None:
        activations = self._buffer.serve(step, batches)
        for training in trained:
            with self._trainings.only(training):
                training.read(activations)
                training.take_step(self._batch)
