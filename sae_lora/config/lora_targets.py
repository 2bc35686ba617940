"""The words of `lora`: which matrices of which blocks, and the scale."""

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
"""Names a user may give in `lora.targets`, and the matrices each stands for."""


def target_matrices(targets: Any) -> tuple[str, ...]:
    """The matrices that `lora.targets` names, in their usual order.

    Raises:
        ConfigError: For a name that is not known.
    """
    names = [str(name) for name in as_list(targets)]
    allowed = f"one of {listed(TARGET_SETS, 20)}, or a list of these"
    if not names:
        raise ConfigError("lora.targets", targets, allowed, "all")
    if not set(names) <= set(TARGET_SETS):
        near = [nearest_name(name, TARGET_SETS) for name in names]
        nearest = ",".join(name for name in near if name is not None)
        raise ConfigError("lora.targets", targets, allowed, f"[{nearest}]" if len(near) > 1 else near[0])
    return tuple(matrix for matrix in MATRICES if any(matrix in TARGET_SETS[name] for name in names))


def canonical_alpha(lora: LoRAConfig) -> float:
    """The number that `lora.alpha` stands for.

    Raises:
        ConfigError: When it is neither a number nor a multiple of the rank.
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
    """The same request in the one form that is hashed and shown: a word, or a sorted list."""
    return blocks if isinstance(blocks, str) else sorted(as_list(blocks))


def adapted_blocks(blocks: Any, first_sae: int, n_blocks: int) -> list[int]:
    """The indices that `lora.blocks` stands for.

    Raises:
        ConfigError: For blocks that the model does not have, and where none is left.
    """
    if blocks == "all":
        return list(range(n_blocks))
    if blocks == "after":
        after = list(range(first_sae + 1, n_blocks))
        if not after:
            because = f"the SAE is at block {first_sae}, the last one"
            raise ConfigError("lora.blocks", blocks, "all or a list of indices", "all", because)
        return after
    wanted = as_list(blocks)
    inside = [block for block in wanted if block < n_blocks]
    if len(inside) < len(wanted):
        nearest = inside or [n_blocks - 1]
        raise ConfigError("lora.blocks", blocks, f"blocks from 0 to {n_blocks - 1}", nearest)
    return sorted(wanted)


def listed_matrices(matrices: set[str]) -> str:
    """The names for `lora.targets` that need these matrices alone."""
    return listed(name for name, needed in TARGET_SETS.items() if matrices.issuperset(needed))
