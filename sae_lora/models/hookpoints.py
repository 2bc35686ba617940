"""Places of SAEs in a model, and their names. Imports no torch."""

import re
from dataclasses import dataclass

from sae_lora.common.errors import ConfigError
from sae_lora.config.enums import Hook, Reads
from sae_lora.config.schema import SAEChoice

PLACES = "hook_resid_post, hook_resid_pre (except of block 0), hook_attn_out or hook_mlp_out"
"""Possible places of an SAE, for messages."""


def canonical_hook(hook: Hook | None) -> Hook:
    """The hook of the `Place` that `layer.hook` names."""
    return Hook.resid_post if hook in (None, Hook.resid_pre) else hook


@dataclass(frozen=True)
class Place:
    """The place of an SAE in a model.

    `resid_pre` of block `l` is the same activation as `resid_post` of block `l − 1`. A `Place` has the
    second form.
    """

    block: int
    hook: Hook = Hook.resid_post
    """attn_out, mlp_out or resid_post."""

    @classmethod
    def of(cls, choice: SAEChoice) -> "Place":
        """The place of a resolved SAE."""
        return cls(choice.block, choice.hook)

    @classmethod
    def asked(cls, index: int, hook: Hook | None) -> "Place":
        """The place that `layer.index` and `layer.hook` name.

        Raises:
            ConfigError: For the input of the first block.
        """
        if index == 0 and hook is Hook.resid_pre:
            raise ConfigError(
                "layer.index",
                index,
                "a block from 1 on, with layer.hook=resid_pre",
                nearest=1,
                because="the input of block 0 is the embedding, which is not the output of a block",
            )
        return cls(index - (hook is Hook.resid_pre), canonical_hook(hook))

    @classmethod
    def named(cls, hookpoint: str) -> "Place | None":
        """The place of a hookpoint such as `blocks.3.hook_mlp_out`; `None` for other names."""
        hooks = "|".join(hook.name for hook in Hook)
        match = re.fullmatch(rf"blocks\.(\d+)\.hook_({hooks})", hookpoint)
        if match is None or hookpoint == f"blocks.0.hook_{Hook.resid_pre.name}":
            return None
        return cls.asked(int(match[1]), Hook[match[2]])

    @property
    def is_inside(self) -> bool:
        """True inside the block (attn_out, mlp_out), false at its output (resid_post)."""
        return self.hook is not Hook.resid_post

    @property
    def begins(self) -> int:
        """The first block whose computation a change at this place affects."""
        return self.block if self.is_inside else self.block + 1

    def index(self, hook: Hook | None) -> int:
        """The `layer.index` of this place with this `layer.hook`: with resid_pre, the next block."""
        return self.block + (hook is Hook.resid_pre)

    def __str__(self) -> str:
        return f"blocks.{self.block}.hook_{self.hook.name}"


def resid_post(block: int) -> str:
    """The hookpoint of a block's output: `blocks.{block}.hook_resid_post`."""
    return str(Place(block))


_PARENTS = "model|base_model|language_model|text_model|transformer|gpt_neox|decoder|backbone"
"""Modules of transformers that contain the blocks of a language model, and not those of an encoder."""
_OUTPUT_OF_BLOCK = re.compile(
    rf"(?:(?:{_PARENTS})\.)*(?:layers|h|blocks)\.(\d+)(?:\.output|\.hook_out)?"
)
"""Names of a block's output: its module in transformers, and TransformerLens's name since version 3."""
_INPUT_OF_BLOCK = re.compile(r"blocks\.(\d+)\.hook_in")


def known_place(hookpoint: str) -> Place | None:
    """The place of an SAE's hookpoint; `None` if no SAE can be spliced in there."""
    if match := _OUTPUT_OF_BLOCK.fullmatch(hookpoint):
        return Place(int(match[1]))
    if match := _INPUT_OF_BLOCK.fullmatch(hookpoint):
        hookpoint = f"blocks.{match[1]}.hook_{Hook.resid_pre.name}"
    return Place.named(hookpoint)


_LAYER = rf"(?:(?:{_PARENTS})\.)*(?:layers|h)\.(\d+)\."
_INPUTS_OF_MLP = {
    Reads.mlp_in: r"blocks\.(\d+)\.(?:mlp\.hook_in|ln2\.hook_out)",
    Reads.mlp_normalized: r"blocks\.(\d+)\.ln2\.hook_normalized",
    # TransformerLens's hook_mlp_in comes before the norm.
    Reads.resid_mid: r"blocks\.(\d+)\.(?:hook_resid_mid|hook_mlp_in)",
}
_MODULES_BEFORE_MLP = (
    rf"{_LAYER}(?:mlp\.input|(?:pre_feedforward_layernorm|post_attention_layernorm|ln_2)\.output)"
)
_OUTPUT_OF_MLP = (
    rf"(?:blocks\.(\d+)\.(?:hook_mlp_out|mlp\.hook_out))|{_LAYER}(?:mlp|post_feedforward_layernorm)"
    r"(?:\.output)?"
)
READINGS = "blocks.{l}.mlp.hook_in, ln2.hook_normalized or hook_resid_mid"
"""Usual names of the activations that a transcoder may read, for messages."""


def known_reading(hookpoint: str) -> tuple[int, Reads] | None:
    """The block and the activation that a transcoder reads there; `None` if no transcoder can."""
    for reads, name in _INPUTS_OF_MLP.items():
        if match := re.fullmatch(name, hookpoint):
            return int(match[1]), reads
    match = re.fullmatch(_MODULES_BEFORE_MLP, hookpoint)
    return None if match is None else (int(match[1]), Reads.mlp_in)


def output_of_mlp(hookpoint: str) -> Place | None:
    """The place of a transcoder that writes there; `None` if it is not the output of an MLP."""
    match = re.fullmatch(_OUTPUT_OF_MLP, hookpoint)
    return None if match is None else Place(int(match[1] or match[2]), Hook.mlp_out)
