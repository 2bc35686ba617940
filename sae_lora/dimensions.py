"""What is known of a model before its weights are loaded. Imports no torch, so that a plan is quick."""

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from sae_lora.common import hub
from sae_lora.common.errors import ConfigError, UserError
from sae_lora.common.lazy_imports import quick_imports
from sae_lora.config.enums import Hook
from sae_lora.config.schema import ModelConfig, SAEChoice
from sae_lora.embedded import MODEL as EMBEDDED_MODEL

EMBEDDED_NAME = "tiny"


@dataclass(frozen=True)
class Dimensions:
    """A model's size, from its config file."""

    d_model: int
    n_blocks: int
    d_vocab: int
    max_context: int | None
    """Longest sequence the model was made for; `None` where its config does not say."""


def source(config: ModelConfig) -> str:
    """What transformers can load: the repository, or the folder of a local or embedded model."""
    return str(EMBEDDED_MODEL) if config.name == EMBEDDED_NAME else config.name


_NAMES = {
    "d_model": ("hidden_size", "n_embd"),
    "n_blocks": ("num_hidden_layers", "n_layer"),
    "d_vocab": ("vocab_size",),
    "max_context": ("max_position_embeddings", "n_positions"),
}
"""What config files call a dimension: most of them, and GPT-2's."""


def read_dimensions(config: ModelConfig) -> Dimensions:
    """The model's dimensions, from its config file.

    Raises:
        UserError: Where the config cannot be found or fetched.
    """
    with hub.explained("model.name", config.name):
        values = _config_file(config)
        found: dict[str, Any] = {
            name: next((values[key] for key in keys if key in values), None)
            for name, keys in _NAMES.items()
        }
        if None in found.values():  # left to a default that transformers knows
            found = _through_transformers(config)
    return Dimensions(**found)


def _config_file(config: ModelConfig) -> dict[str, Any]:
    folder, revision = Path(source(config)), config.pinned_revision
    if folder.is_dir():
        path = folder / "config.json"
        if not path.exists():
            raise UserError(f"model.name = {config.name!r} cannot be used: {folder} has no config.json")
    else:
        path = Path(hf_hub_download(config.name, "config.json", revision=revision))
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"model.name = {config.name!r} cannot be used: {path}: {error}") from error
    return values.get("text_config", values)


def _through_transformers(config: ModelConfig) -> dict[str, Any]:
    with quick_imports():
        from transformers import AutoConfig  # brings torch in

    text = AutoConfig.from_pretrained(
        source(config), revision=config.pinned_revision, trust_remote_code=False
    ).get_text_config()
    return {
        "d_model": text.hidden_size,
        "n_blocks": text.num_hidden_layers,
        "d_vocab": text.vocab_size,
        "max_context": getattr(text, "max_position_embeddings", None),
    }


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
