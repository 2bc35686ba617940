"""Students of a pack that go through the same blocks in one pass, each with its rows of the batch."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sae_lora.models import lora
from sae_lora.models.language_model import LanguageModel
from sae_lora.models.lora import PlainAdapter
from sae_lora.splice.compiled import CompiledBlocks
from sae_lora.splice.stacked_lora import Draw, StackedModel, padded_rank
from sae_lora.splice.student import LoRAStudent, Student, cuts, hidden_from
from sae_lora.splice.trunk import Trunk


class Stack:
    """Students with adapters at the same matrices, which compute a batch together.

    Args:
        model: The plain model.
        students: The students, all of one kind; see `kind_of`.
        products: The precision in which their adapters are multiplied.
    """

    def __init__(
        self,
        model: LanguageModel,
        students: Iterable[Student],
        products: torch.dtype = torch.float32,
    ) -> None:
        self.students = sorted(students, key=_rank)
        """The students, in the order of their rows."""
        self._model = model
        self._stacked = StackedModel(model, [_adapters(student) for student in self.students], products)
        self._compiled: CompiledBlocks | None = None

    def hidden(self, trunk: Trunk, draw: Draw | None = None, *, compiled: bool = False) -> Tensor:
        """The states that the head reads, `[student, batch, pos, d_model]`.

        Args:
            trunk: The trunk of the batch.
            draw: The random words of dropout; `None`: no dropout.
            compiled: True if the blocks are compiled.
        """
        self._stacked.begin(draw)
        if compiled and self._compiled is None:
            self._compiled = CompiledBlocks(self._stacked.view)
        first = self.students[0]
        entering = [trunk.resid_entering(first.first, student.frozen) for student in self.students]
        # All are `None` if the students begin at block 0.
        states = [state for state in entering if state is not None]
        resid = torch.cat(states) if states else None
        tokens = trunk.tokens.repeat(len(self.students), 1)
        with self._compiled.in_use() if compiled and self._compiled else nullcontext():
            hidden = hidden_from(self._stacked.view, first.first, first.live, tokens, resid)
        return hidden.view(len(self.students), *trunk.tokens.shape, -1)

    def backward(self, hidden: Tensor, gradients: Tensor) -> None:
        """Add to the gradients of all students' weights.

        Args:
            hidden: The result of `hidden`.
            gradients: The gradient of it, in the same shape.
        """
        hidden.backward(gradients)
        self._stacked.give_gradients()

    def compiled_difference(self, trunk: Trunk) -> float:
        """The largest relative difference of compiled blocks from plain ones, in states and gradients.

        It computes the whole batch with dropout, so that the code for training is compiled. B is as in
        `difference`.
        """
        device = trunk.tokens.device

        def results(*, compiled: bool) -> tuple[Tensor, list[Tensor]]:
            generator = torch.Generator(device).manual_seed(1)

            def draw(_: int, words: Tensor) -> None:
                words.random_(-(2**63), None, generator=generator)

            hidden = self.hidden(trunk, draw, compiled=compiled)
            towards = torch.randn(hidden.shape, generator=generator, device=device).to(hidden)
            self.backward(hidden, towards)
            gradients = [weight.grad for weight in self._weights() if weight.grad is not None]
            self._forget_gradients()
            return hidden.detach(), gradients

        with self._comparable(torch.Generator(device).manual_seed(0)):
            states, gradients = results(compiled=False)
            compiled_states, compiled_gradients = results(compiled=True)
        error = torch.stack(
            [(ours - theirs).norm() for ours, theirs in zip(compiled_gradients, gradients, strict=True)]
        ).norm()
        size = torch.stack([gradient.norm() for gradient in gradients]).norm()
        return max(float(relative(compiled_states, states)), float(error / size))

    def difference(self, tokens: Tensor) -> float:
        """The largest relative difference from each student alone, in states and gradients.

        There is no dropout meanwhile. Before the first step B is zero, which hides the gradient of A: it
        is random meanwhile.

        Args:
            tokens: A few tokens, `[batch, pos]`.
        """
        generator = torch.Generator(tokens.device).manual_seed(0)
        trunk = Trunk(self._model, tokens, cuts(self.students))
        with self._comparable(generator):
            together = self.hidden(trunk)
            towards = torch.randn(together.shape, generator=generator, device=tokens.device).to(together)
            self.backward(together, towards)
            joint = [_gradient(student) for student in self.students]
            differences = []
            for number, student in enumerate(self.students):
                self._forget_gradients()
                alone = student.hidden(trunk)
                alone.backward(towards[number])
                of_gradient = relative(joint[number], _gradient(student))
                differences += [relative(together[number].detach(), alone.detach()), of_gradient]
        return max(float(each) for each in differences)

    @contextmanager
    def _comparable(self, generator: torch.Generator) -> Iterator[None]:
        """Inside the block, students have no dropout, no B that is zero, and no gradients of earlier
        parts of the batch.
        """
        weights = self._weights()
        blank = [weight.data for weight in weights if not weight.any()]
        gradients = [weight.grad for weight in weights]
        try:
            self._forget_gradients()
            for weight in blank:
                weight.normal_(0, 0.02, generator=generator)
            for student in self.students:
                lora.set_adapter_dropout(student.model, False)
            yield
        finally:
            for weight in blank:
                weight.zero_()
            for student in self.students:
                lora.set_adapter_dropout(student.model, True)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient

    def _weights(self) -> list[nn.Parameter]:
        return [weight for student in self.students for weight in student.weights.values()]

    def _forget_gradients(self) -> None:
        for weight in self._weights():
            weight.grad = None


def kind_of(student: Student) -> tuple[object, ...] | None:
    """Students with equal kinds can be in one stack; `None`: in none.

    They begin at the same block, have the same SAEs from there on, and adapters at the same matrices.
    """
    is_plain = isinstance(student, LoRAStudent) and not student.modules
    if not is_plain or lora.plain_adapters(student.model) is None:
        return None
    return student.first, student.live, frozenset(student.weights)


def _adapters(student: Student) -> dict[str, PlainAdapter]:
    adapters = lora.plain_adapters(student.model)
    assert adapters is not None  # see `kind_of`
    return adapters


def _rank(student: Student) -> int:
    return padded_rank(next(iter(_adapters(student).values())).rank)


def _gradient(student: Student) -> Tensor:
    """All gradients of a student as one vector."""
    return torch.cat(
        [weight.grad.flatten() for weight in student.weights.values() if weight.grad is not None]
    )


def relative(ours: Tensor, theirs: Tensor) -> Tensor:
    """The norm of the difference, relative to the norm of the second."""
    return (ours.float() - theirs.float()).norm() / theirs.float().norm()
