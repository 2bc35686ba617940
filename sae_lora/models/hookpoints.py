"""Where in a model an SAE sits. Imports no torch."""

import functools
import re
from dataclasses import dataclass

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Hook
from sae_lora.config.schema import SAEChoice

PLACES = "hook_resid_post, hook_resid_pre (but of block 0), hook_attn_out or hook_mlp_out"
"""Where an SAE may sit, for messages."""


_INSIDE_OUT = (Hook.attn_out, Hook.mlp_out, Hook.resid_post)
"""What there is of a block, in the order of the forward pass."""


def canonical_hook(hook: Hook | None) -> Hook:
    """What `layer.hook` means, in the terms of `Place`."""
    return Hook.resid_post if hook in (None, Hook.resid_pre) else hook


@functools.total_ordering
@dataclass(frozen=True)
class Place:
    """Where in a model an SAE sits. The smaller is the one that the forward pass comes to sooner.

    What a block reads is what the one before puts out: `resid_pre` of block `l` is `resid_post` of
    block `l − 1`, and goes by that name here.
    """

    block: int
    hook: Hook = Hook.resid_post
    """attn_out, mlp_out or resid_post."""

    @classmethod
    def of(cls, choice: SAEChoice) -> "Place":
        """That of an SAE that is used."""
        return cls(choice.block, choice.hook)

    @classmethod
    def asked(cls, index: int, hook: Hook | None) -> "Place":
        """The one that `layer.index` and `layer.hook` mean.

        Raises:
            ConfigError: For what the first block reads.
        """
        if index == 0 and hook is Hook.resid_pre:
            raise ConfigError(
                "layer.index",
                index,
                "a block from 1 on, with layer.hook=resid_pre",
                nearest=1,
                because="what block 0 reads is the embedding, which no block puts out",
            )
        return cls(index - (hook is Hook.resid_pre), canonical_hook(hook))

    @classmethod
    def named(cls, hookpoint: str) -> "Place | None":
        """The one that `blocks.{l}.hook_mlp_out` or the like names; `None` for any other name."""
        hooks = "|".join(hook.name for hook in Hook)
        match = re.fullmatch(rf"blocks\.(\d+)\.hook_({hooks})", hookpoint)
        if match is None or hookpoint == f"blocks.0.hook_{Hook.resid_pre.name}":
            return None
        return cls.asked(int(match[1]), Hook[match[2]])

    @property
    def is_inside(self) -> bool:
        """Whether it lies inside of its block, rather than behind it."""
        return self.hook is not Hook.resid_post

    @property
    def begins(self) -> int:
        """The first block that sees what is done here, or in which it is done."""
        return self.block if self.is_inside else self.block + 1

    def index(self, hook: Hook | None) -> int:
        """Of the block in terms of a `layer.hook`: what is asked for with resid_pre is one further."""
        return self.block + (hook is Hook.resid_pre)

    def __str__(self) -> str:
        return f"blocks.{self.block}.hook_{self.hook.name}"

    def __lt__(self, other: "Place") -> bool:
        return self._order < other._order

    @property
    def _order(self) -> tuple[int, int]:
        return self.block, _INSIDE_OUT.index(self.hook)


def resid_post(block: int) -> str:
    """The hookpoint of a block's output, in the field's words."""
    return str(Place(block))
