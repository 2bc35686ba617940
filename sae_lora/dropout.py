"""Dropout whose masks cost little on a CPU.

torch draws them there one by one, from 64 random bits each: 9 ns an element, which is a tenth of a
training step. Sixteen bits are enough.
"""

import torch
from torch import Tensor, nn

_LEVELS = 2**16


class Dropout(nn.Module):
    """`nn.Dropout`, with the share rounded to 1 / 65,536 and masks drawn four at a time.

    What is expected of the output is the input, exactly: the scale follows the rounded share. Masks come
    from torch's global random state.

    Args:
        p: Share of the elements that become zero while training.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = round(p * _LEVELS) / _LEVELS

    def forward(self, inputs: Tensor) -> Tensor:
        """Of any shape."""
        if not self.training or self.p == 0:
            return inputs
        words = torch.empty(-(-inputs.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        levels = words.view(torch.int16)[: inputs.numel()].view(inputs.shape)
        kept = levels >= round(self.p * _LEVELS) - _LEVELS // 2
        return inputs * kept.to(inputs.dtype).mul_(1 / (1 - self.p))
