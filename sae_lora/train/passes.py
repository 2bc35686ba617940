"""Passes of trainings through a part of a batch: each alone, or several in a stack."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sae_lora.common.fast_path import PROOF_TOKENS, FastPath
from sae_lora.common.isolation import Isolation
from sae_lora.config.schema import TrainConfig
from sae_lora.models.language_model import LanguageModel
from sae_lora.splice.compiled import CompiledBlocks
from sae_lora.splice.kl import SummedKL
from sae_lora.splice.stack import Stack, kind_of, relative
from sae_lora.splice.trunk import Trunk
from sae_lora.train.optim import GradientState
from sae_lora.train.train_state import DistillState

Hidden = dict[DistillState, list[Tensor]]
"""For each training, its input to the head in each of its passes, `[batch, pos, d_model]`, detached."""


class Passing(NamedTuple):
    """The way of the trainings of a pack through the model."""

    stacked: bool = False
    """True if those that go through the same blocks do so in a stack."""
    compiled: bool = False
    """True if blocks are compiled. A training that is alone is then a stack of one."""
    products: torch.dtype = torch.float32
    """The precision in which the adapters of stacks are multiplied."""

    @classmethod
    def of(cls, config: TrainConfig, device: torch.device) -> "Passing":
        """The way that a config asks for on this device."""
        on_gpu = device.type == "cuda"
        products = getattr(torch, config.products_on(gpu=on_gpu).name)
        return cls(config.stacks_on(gpu=on_gpu), config.compiles_on(gpu=on_gpu), products)


EACH_ALONE = Passing()


class Pass(Protocol):
    """A pass of one training or several. `hidden` is called first, then `backward`."""

    def hidden(self, trunk: Trunk) -> Hidden:
        """The states that the head reads; without a training that failed."""
        ...

    def backward(self, kl: Mapping[DistillState, Sequence[SummedKL]]) -> None:
        """Add the part of the batch to the step of each training in `kl`."""
        ...


class Alone(Pass):
    """A pass of one training.

    Args:
        training: The training.
        trainings: Those of the pack, for the rule for errors.
    """

    def __init__(self, training: DistillState, trainings: Isolation[DistillState]) -> None:
        self._training = training
        self._trainings = trainings
        self._states: list[Tensor] = []

    def hidden(self, trunk: Trunk) -> Hidden:
        with self._trainings.only(self._training):
            self._states = self._training.hidden(trunk)
            return {self._training: [states.detach() for states in self._states]}
        return {}

    def backward(self, kl: Mapping[DistillState, Sequence[SummedKL]]) -> None:
        states, self._states = self._states, []
        if self._training in kl:
            with self._trainings.only(self._training):
                self._training.backward(states, kl[self._training])


class Together(Pass):
    """A pass of several trainings in a stack.

    Its first pass proves on a few tokens that it gives what the trainings give alone, and the first pass
    of each size that compiled blocks give what others give. If they do not, or fail later, each goes on
    alone, or without compilation.

    Args:
        model: The plain model.
        group: The trainings.
        trainings: Those of the pack, for the rule for errors.
        path: Notes what is proven.
        compiled: Notes for which stacks compiled blocks are proven; `None`: they are not compiled.
        products: As in `Passing`.
    """

    def __init__(
        self,
        model: LanguageModel,
        group: Sequence[GradientState],
        trainings: Isolation[DistillState],
        path: FastPath,
        compiled: FastPath | None,
        products: torch.dtype,
    ) -> None:
        by_student = {training.student: training for training in group}
        self.stack = Stack(model, by_student, products)
        self.trainings = [by_student[student] for student in self.stack.students]
        self._path, self._compiled = path, compiled
        self._tolerance = _tolerance(model.model.dtype)
        self._alone = [Alone(training, trainings) for training in self.trainings]
        self._states: Tensor | None = None

    def hidden(self, trunk: Trunk) -> Hidden:
        some = trunk.tokens[:1, :PROOF_TOKENS]
        return self._path.take(
            self,
            lambda: self._together(trunk),
            lambda: self._each(trunk),
            lambda: self.stack.difference(some),
            self._tolerance,
        )

    def _together(self, trunk: Trunk) -> Hidden:
        if self._compiled is None:
            return self._stacked(trunk)
        return self._compiled.take(
            (self, trunk.tokens.shape),
            lambda: self._stacked(trunk, compiled=True),
            lambda: self._stacked(trunk),
            lambda: self.stack.compiled_difference(trunk),
            self._tolerance,
        )

    def _stacked(self, trunk: Trunk, *, compiled: bool = False) -> Hidden:
        generators = [training.generator() for training in self.trainings]

        def draw(number: int, words: Tensor) -> None:
            words.random_(-(2**63), None, generator=generators[number])

        self._states = self.stack.hidden(trunk, draw, compiled=compiled)
        for training, generator in zip(self.trainings, generators, strict=True):
            training.note_drawn(generator)
        return {
            training: [states.detach()]
            for training, states in zip(self.trainings, self._states, strict=True)
        }

    def _each(self, trunk: Trunk) -> Hidden:
        return {
            training: states for alone in self._alone for training, states in alone.hidden(trunk).items()
        }

    def backward(self, kl: Mapping[DistillState, Sequence[SummedKL]]) -> None:
        states, self._states = self._states, None
        if states is None:
            for alone in self._alone:
                alone.backward(kl)
            return
        gradients = []
        for training in self.trainings:
            (summed,) = kl[training]
            assert summed.gradient is not None
            gradients.append(summed.gradient)
            training.total += summed.total
        self.stack.backward(states, torch.stack(gradients))


class Passes:
    """The passes of a pack.

    Args:
        model: The plain model.
        trainings: The trainings of the pack.
        passing: Their way.
    """

    def __init__(
        self, model: LanguageModel, trainings: Isolation[DistillState], passing: Passing
    ) -> None:
        self._model = model
        self._trainings = trainings
        self._stacked, self._products = passing.stacked, passing.products
        self._compiled = self._blocks = None
        if passing.compiled:
            self._compiled = FastPath("compiled blocks", "the uncompiled model", for_all=True)
            self._blocks = CompiledBlocks(model)
        self._kinds: dict[GradientState, object] = {}
        self._together: list[Together] = []
        self._path = FastPath("runs in a stack", "each run alone")

    def trunk(self, tokens: Tensor, cuts: Collection[int]) -> Trunk:
        """The trunk of a part of a batch, with the teacher's states computed."""

        def computed(running: Callable[[], AbstractContextManager[None]]) -> Trunk:
            trunk = Trunk(self._model, tokens, cuts, running=running)
            trunk.hidden()
            return trunk

        def difference() -> float:
            # The plain one first, because a kernel inside a block may have to prove itself.
            plain = computed(nullcontext).hidden()
            return float(relative(computed(in_use).hidden(), plain))

        if self._blocks is None or self._compiled is None:
            return computed(nullcontext)
        in_use = self._blocks.in_use
        return self._compiled.take(
            tokens.shape,
            lambda: computed(in_use),
            lambda: computed(nullcontext),
            difference,
            _tolerance(self._model.model.dtype),
        )

    def of(self, turn: Sequence[DistillState]) -> list[Pass]:
        """The passes of these trainings."""
        stacks = [self._stack_of(group) for group in self._groups(turn)]
        stacked = {training for stack in stacks for training in stack.trainings}
        alone = [training for training in turn if training not in stacked]
        return [*stacks, *(Alone(training, self._trainings) for training in alone)]

    def _groups(self, turn: Sequence[DistillState]) -> list[list[GradientState]]:
        """The trainings that can be stacked, by what they share."""
        groups: dict[object, list[GradientState]] = {}
        for training in turn if self._stacked or self._compiled else ():
            # Its subclass also has the losses of SAEs.
            if type(training) is not GradientState:
                continue
            if training not in self._kinds:
                self._kinds[training] = kind_of(training.student)
            if (kind := self._kinds[training]) is not None:
                groups.setdefault(kind if self._stacked else training, []).append(training)
        # Only a stack can be compiled, or have adapters in another precision.
        of_one = self._compiled is not None or self._products is not torch.float32
        return [group for group in groups.values() if of_one or len(group) > 1]

    def _stack_of(self, group: Sequence[GradientState]) -> Together:
        for made in self._together:
            if set(made.trainings) == set(group):
                return made
        # A training is in one stack only, of which its weights are views.
        self._together = [made for made in self._together if not set(made.trainings) & set(group)]
        made = Together(self._model, group, self._trainings, self._path, self._compiled, self._products)
        self._together.append(made)
        return made


def _tolerance(dtype: torch.dtype) -> float:
    """The largest relative difference that rounding explains over many blocks.

    Over 15 blocks of SmolLM2, gradients in bfloat16 differ by 2 to 4 eps.
    """
    return max(1e-3, 16 * torch.finfo(dtype).eps)
