"""Meaning of the values of `lora`: adapted matrices, adapted blocks, and alpha."""

import math
from typing import Any

from sae_lora.common.errors import ConfigError, listed, nearest_name
from sae_lora.config.schema import LoRAConfig, as_list

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")

TARGET_SETS: dict[str, tuple[str, ...]] = {
    "all": MATRICES,
    "attn": ("q", "k", "v", "o"),
    "qkv": ("q", "k", "v"),
    "qv": ("q", "v"),
    "mlp": ("gate", "up", "down"),
    **{matrix: (matrix,) for matrix in MATRICES},
}
"""Names for `lora.targets`, with the matrices that each stands for."""


def target_matrices(targets: Any) -> tuple[str, ...]:
    """The matrices that `lora.targets` names, in the order of `MATRICES`.

    Raises:
        ConfigError: For an unknown name.
    """
    names = [str(name) for name in as_list(targets)]
    allowed = f"one of {listed(TARGET_SETS, 20)}, or a list of these"
    if not names:
        raise ConfigError("lora.targets", targets, allowed, "all")
    if not set(names) <= set(TARGET_SETS):
        matches = [nearest_name(name, TARGET_SETS) for name in names]
        joined = ",".join(name for name in matches if name is not None)
        nearest = f"[{joined}]" if len(matches) > 1 else matches[0]
        raise ConfigError("lora.targets", targets, allowed, nearest)
    return tuple(matrix for matrix in MATRICES if any(matrix in TARGET_SETS[name] for name in names))


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
