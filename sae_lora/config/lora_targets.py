"""Meaning of the values of `lora`: adapted matrices, adapted blocks, and alpha."""

import math
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from sae_lora.common.errors import ConfigError, listed, nearest_name
from sae_lora.config.schema import LoRAConfig, as_list

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
ATTENTION, MLP = "attn", "mlp"
"""The parts of a block. Attention stands for all that mixes positions, such as a state space model; all
other weights act on each position alone and belong to the MLP."""

PARTS: dict[str, tuple[str, ...]] = {
    "all": (ATTENTION, MLP),
    "attn": (ATTENTION,),
    "mlp": (MLP,),
}
"""Names for `lora.targets` that stand for all matrices of some parts."""
TARGET_SETS: dict[str, tuple[str, ...]] = {
    "all": MATRICES,
    "attn": ("q", "k", "v", "o"),
    "qkv": ("q", "k", "v"),
    "qv": ("q", "v"),
    "mlp": ("gate", "up", "down"),
    **{matrix: (matrix,) for matrix in MATRICES},
}
"""Names for `lora.targets`, with the roles of the matrices that each stands for in most models."""
_PATTERN = re.compile(r"(?=.*[*._])[\w.*?]+")
"""A pattern: letters and digits, and at least one of `*`, `.` and `_`."""
SELECTION = 2
"""Version of the rule by which `lora.targets` selects matrices: 1 by their names, 2 by structure."""
SAME_IN_VERSION_1 = frozenset(
    (
        *("apertus", "apertus1p5_text", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "cwm"),
        *("diffllama", "emu3", "ernie4_5", "exaone", "exaone4", "gemma", "gemma2", "gemma3"),
        *("gemma3_text", "gemma4_unified_text", "glm", "glm4", "gpt-sw3", "gpt2", "gpt_bigcode"),
        *("gpt_neo", "gpt_neox", "gpt_neox_japanese", "granite", "granite_swa", "helium"),
        *("hyperclovax", "internlm3", "iquestcoder", "jais2", "llama", "ministral", "ministral3"),
        *("mistral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "openai-gpt", "opt", "phi3"),
        *("phi4_multimodal", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2"),
        *("vaultgemma", "xglm"),
    )
)
"""Model types of transformers in which both versions select the same matrices."""


def selection_version(model_type: str | None) -> int | None:
    """The value of `lora.selection`; null where runs of version 1 have the same results."""
    return None if model_type in SAME_IN_VERSION_1 else SELECTION


def is_pattern(target: str) -> bool:
    """True if this word of `lora.targets` is a pattern of paths, not a name."""
    return target not in TARGET_SETS


def matches(path: str, pattern: str) -> bool:
    """True if the pattern describes this path inside a block, or its end after a dot.

    `*` stands for any characters, `?` for one.
    """
    return fnmatchcase(path, pattern) or fnmatchcase(path, f"*.{pattern}")


def target_words(targets: Any) -> list[str]:
    """The words of `lora.targets`: names of `TARGET_SETS`, and patterns of paths inside a block.

    Raises:
        ConfigError: For a word that is neither.
    """
    words = [str(word) for word in as_list(targets)]
    allowed = (
        f"one of {listed(TARGET_SETS, 20)}, a pattern of paths inside a block such as self_attn.*_proj, "
        "or a list of these"
    )
    if not words:
        raise ConfigError("lora.targets", targets, allowed, "all")
    unknown = [word for word in words if word not in TARGET_SETS and not _PATTERN.fullmatch(word)]
    if unknown:
        nearest = [nearest_name(word, TARGET_SETS) if word in unknown else word for word in words]
        joined = ",".join(name for name in nearest if name is not None)
        raise ConfigError(
            "lora.targets", targets, allowed, f"[{joined}]" if len(words) > 1 else nearest[0]
        )
    return words


def canonical_alpha(lora: LoRAConfig) -> float:
    """The number that `lora.alpha` stands for.

    Raises:
        ConfigError: If it is neither a positive number nor a multiple of the rank.
    """
    text = str(lora.alpha).strip().lower()
    unit = lora.rank if text.endswith("r") else 1
    try:
        alpha = float(text.removesuffix("r") or 1) * unit
    except ValueError:
        alpha = math.nan
    if not 0 < alpha < math.inf:
        raise ConfigError("lora.alpha", lora.alpha, "a number above 0, or a multiple of the rank: 2r")
    return alpha


def canonical_blocks(blocks: Any) -> Any:
    """`lora.blocks` in the form that is hashed and shown: a word, or a sorted list."""
    return blocks if isinstance(blocks, str) else sorted(as_list(blocks))


def adapted_blocks(blocks: Any, first_sae: int, n_blocks: int) -> list[int]:
    """The block indices that `lora.blocks` stands for, sorted.

    Raises:
        ConfigError: For blocks that the model does not have, and for `after` if no block follows.
    """
    if blocks == "all":
        return list(range(n_blocks))
    if blocks == "after":
        following = list(range(first_sae + 1, n_blocks))
        if not following:
            because = f"the SAE is at block {first_sae}, the last one"
            raise ConfigError("lora.blocks", blocks, "all or a list of indices", "all", because)
        return following
    indices = as_list(blocks)
    existing = [block for block in indices if block < n_blocks]
    if len(existing) < len(indices):
        nearest = existing or [n_blocks - 1]
        raise ConfigError("lora.blocks", blocks, f"blocks from 0 to {n_blocks - 1}", nearest)
    return sorted(indices)


def listed_matrices(matrices: set[str]) -> str:
    """The names for `lora.targets` that need only these matrices."""
    return listed(name for name, needed in TARGET_SETS.items() if matrices.issuperset(needed))


def in_words(left_out: Mapping[str, int]) -> str:
    """Paths and numbers of weights that stay frozen, in one line: `mlp.gate (4), mamba.conv1d (2)`."""
    return ", ".join(f"{path} ({number})" for path, number in left_out.items())
