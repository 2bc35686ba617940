"""Stand-ins for parts of a model: a forward pass with them runs only the other parts."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast


def first_argument(positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The first argument of a block: the residual stream."""
    return positional[0] if positional else named["hidden_states"]


class _StandIn(nn.Module):
    """Stand-in for a module, with the attributes of that module: some models read them."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        self.__dict__["replaced"] = replaced  # not a submodule: hooks and weights are not found in it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["replaced"], name)


class Passing(_StandIn):
    """Stand-in for a block: returns its input or the given states, in a tuple if the block does so."""

    def __init__(self, block: nn.Module, length: int | None, given: Tensor | None) -> None:
        super().__init__(block)
        self.length = length
        self.given = given

    def forward(self, *positional: Any, **named: Any) -> Any:
        states = first_argument(positional, named) if self.given is None else self.given
        return states if self.length is None else (states, *[None] * (self.length - 1))


class Given(_StandIn):
    """Stand-in for a backbone: returns the given hidden states."""

    def __init__(self, backbone: nn.Module, hidden: Tensor) -> None:
        super().__init__(backbone)
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> "_GivenOutput":
        return _GivenOutput(last_hidden_state=self.hidden)  # pyright: ignore[reportArgumentType]


class _GivenOutput(BaseModelOutputWithPast):
    """Output of a backbone that contains only the hidden states."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
