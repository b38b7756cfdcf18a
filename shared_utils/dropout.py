"""Dropout with a quarter of the random numbers: on a CPU, drawing them may take half of a transformer's training time.

Source: Srivastava et al. 2014.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropped(x: Tensor, p: float) -> Tensor:
    """x with each value 0 with probability p (to 2⁻¹⁷), the rest divided by 1 − p: PyTorch's dropout.

    PyTorch draws a number for every value, and on a CPU one after the other. Here one 64-bit number decides for four
    values. Errors: `ValueError` unless p is from 0 to 1.
    """
    if not 0 < p < 1 or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    order = torch.empty_like(x).stride()  # channels first or last, as they lie in memory: mixed layouts are slow
    kept = bits.as_strided(x.shape, order) >= round(p * 2**16) - 2**15
    return x * kept.to(x.dtype).div_(1 - p)


class Dropout(nn.Module):
    """`nn.Dropout` by `dropped`: in training a value is 0 with probability p, in evaluation mode nothing happens."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Any shape → the same shape."""
        return dropped(x, self.p) if self.training else x
