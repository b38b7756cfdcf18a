"""A network that learns CIFAR-10 fast: wide rather than deep, and its first layer needs no training.

    x ∈ [0, 1] → (x − mean) / std → 2×2 convolution, 3→24, whitening → GELU
      → 3 × [3×3 convolution → max-pool 2 → BatchNorm → GELU → 3×3 convolution → BatchNorm → GELU]
      → max-pool 3 → linear → logits; the three blocks have 64, 256 and 256 channels.

Source: Jordan, 94% on CIFAR-10 in 3.29 Seconds on a Single GPU, 2024, arXiv 2404.00498.
Shapes: B images of 3 channels and 32×32 pixels, K classes, C channels.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn_cifar.models import Normalize

PATCH = 2  # pixels, the side of what the first layer whitens
WHITENED = 2 * 3 * PATCH**2  # its outputs: every whitened direction and its negative


class Block(nn.Module):
    """Two 3×3 convolutions that halve height and width: (B, C_in, H, W) → (B, C_out, H/2, W/2), rounded down.

    BatchNorm shifts and does not scale: every channel keeps its variance of 1 before GELU.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn1, self.bn2 = (nn.BatchNorm2d(out_channels, momentum=0.4) for _ in range(2))
        for bn in (self.bn1, self.bn2):
            bn.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = F.gelu(self.bn1(F.max_pool2d(self.conv1(x), 2)))  # (B, C_out, H/2, W/2)
        return F.gelu(self.bn2(self.conv2(x)))


class FastNet(nn.Module):
    """Images of [0, 1] (B, 3, 32, 32) → logits (B, K)."""

    def __init__(self, widths: Sequence[int] = (64, 256, 256), num_classes: int = 10):
        super().__init__()
        self.config = {"widths": list(widths), "num_classes": num_classes}
        self.normalize = Normalize()
        self.whiten = nn.Conv2d(3, WHITENED, PATCH)
        self.blocks = nn.Sequential(*(Block(a, b) for a, b in pairwise([WHITENED, *widths])))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)
        nn.init.normal_(self.head.weight, std=1 / widths[-1])  # small: the first logits are near 0

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K). Errors: as `Normalize`."""
        x = F.gelu(self.whiten(self.normalize(x)))  # (B, 24, 31, 31)
        x = self.blocks(x)  # (B, C, 3, 3)
        return self.head(F.max_pool2d(x, 3).flatten(1))  # (B, C) → (B, K)


@torch.no_grad()
def whiten_(network: FastNet, x: Tensor, eps: float = 5e-4) -> None:
    """Set the first layer so that its 12 outputs on x are uncorrelated and of mean square 1; x: (N, 3, H, W) of [0, 1].

    With the patches' second moments V Λ Vᵀ the filters are the rows of (Λ + ε)^(−½) Vᵀ, and their negatives, since GELU
    suppresses what is below 0. ε keeps directions of little variance from being amplified. The filters are not trained
    afterwards, their bias is.
    """
    patches = network.normalize(x).unfold(2, PATCH, 1).unfold(3, PATCH, 1)  # (N, 3, H − 1, W − 1, 2, 2)
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2).cpu().double()  # (patches, 12)
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))  # (12,), (12, 12) by column
    filters = (directions / (variances + eps).sqrt()).T.reshape(-1, 3, PATCH, PATCH)  # (12, 3, 2, 2)
    network.whiten.weight.copy_(torch.cat([filters, -filters]))
    network.whiten.bias.zero_()
    network.whiten.weight.requires_grad_(False)


@torch.no_grad()
def start_as_identity_(network: FastNet) -> None:
    """Let the first C_in channels of each trained convolution begin as copies of its input (others stay random)."""
    for block in network.blocks:
        for conv in (block.conv1, block.conv2):
            nn.init.dirac_(conv.weight[: conv.in_channels])
