"""The network that sees a noisy image and the step it is at, and predicts the noise in it, or v.

    image ─ 2×2 pixels to 4 channels ─ conv ─ block ─┬───────────────────────────── block ─ conv ─ back to pixels
            (28×28 → 14×14)                          └ conv, stride 2 ─ block ─┬ … ┬─ block ─ twice as large ┘
                                                       (→ 7×7)                 └ attention ┘

    block      x ↦ skip(x) + conv(silu(norm(conv(silu(norm(x))) + W · time)))
    time       sines and cosines of t, then two layers; the class's embedding is added to it

Rearranging 2×2 pixels as channels first makes the largest feature maps a quarter as large, and the same weights cost a
quarter of the time. On the way up a block also sees the output of the block of the same size on the way down. The last
convolution of each block and of the network starts at 0: each block starts as its skip(x), the network's output as 0.

Sources: Ronneberger et al. 2015; Ho, Jain and Abbeel 2020; Shi et al. 2016 (pixel shuffle); Hoogeboom et al. 2023 (as
the first layer of a diffusion); Ho and Salimans 2022 (the class that is none).
Shapes: B images (B, C, H, W), t int64 (B,), labels int64 (B,); E width of the time embedding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils.cli import UserError

GROUPS = 8  # of GroupNorm


def time_embedding(t: Tensor, width: int) -> Tensor:
    """sin(t / 10000^(2i/width)) and the cosines, of t int64 (B,): float32 (B, width); width is even."""
    frequency = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=t.device) / (width // 2))
    angle = t[:, None].float() * frequency  # (B, width / 2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


class Norm(nn.GroupNorm):
    """GroupNorm in float32, also under autocast: (B, c, H, W) → the same, float32.

    In bfloat16 PyTorch's takes nine times as long on a CPU, channels last.
    """

    def __init__(self, channels: int):
        super().__init__(GROUPS, channels)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return super().forward(x.float())


class Block(nn.Module):
    """Two convolutions that keep the size, the time added between them: (B, c_in, H, W) → (B, c_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, width: int):
        super().__init__()
        self.norm1, self.conv1 = Norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(width, c_out)
        self.norm2, self.conv2 = Norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """time: (B, E)."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SelfAttention(nn.Module):
    """Every position of a small image attends to all others: (B, c, H, W) → the same."""

    def __init__(self, channels: int, head_width: int = 32):
        super().__init__()
        self.norm, self.heads = Norm(channels), channels // head_width
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1)  # (B, H, W, 3 c)
        q, k, v = qkv.flatten(1, 2).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, H W, width)
        # Two products: on a CPU PyTorch's fused kernel takes longer for the gradients of so few positions.
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)  # (B, heads, H W, H W)
        seen = (weights @ v).transpose(1, 2).flatten(2)  # (B, H W, c)
        return x + self.out(seen.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))


class UNet(nn.Module):
    """Noisy images (B, C, S, S), steps (B,), and labels if it knows classes → ε, or v, as the images.

    channels: at half and at a quarter of the image's size, multiples of 32. n_classes: None for no classes; else the
    label n_classes stands for none, as does labels=None. Errors: `UserError` for an image that cannot be halved twice.
    """

    def __init__(
        self,
        size: int = 28,
        image_channels: int = 1,
        channels: tuple[int, int] = (64, 96),
        n_classes: int | None = None,
    ):
        super().__init__()
        if size % 4:
            raise UserError(f"the UNet halves an image twice: its side must be a multiple of 4, got {size}")
        if any(c % 32 for c in channels):
            raise UserError(f"the UNet's channels are multiples of 32, got {' and '.join(map(str, channels))}")
        self.config = {"size": size, "image_channels": image_channels}
        self.config |= {"channels": list(channels), "n_classes": n_classes}
        (large, small), width = channels, 4 * channels[0]
        self.embedded, self.n_classes = channels[0], n_classes
        self.time = nn.Sequential(nn.Linear(self.embedded, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        if n_classes is not None:
            self.classes = nn.Embedding(n_classes + 1, width)
        self.first = nn.Conv2d(4 * image_channels, large, 3, padding=1)
        self.down_large = Block(large, large, width)
        self.smaller = nn.Conv2d(large, small, 3, stride=2, padding=1)
        self.down_small = Block(small, small, width)
        self.middle1, self.attention, self.middle2 = (
            Block(small, small, width),
            SelfAttention(small),
            Block(small, small, width),
        )
        self.up_small = Block(2 * small, small, width)
        self.larger = nn.Conv2d(small, large, 1)
        self.up_large = Block(2 * large, large, width)
        self.norm, self.last = Norm(large), nn.Conv2d(large, 4 * image_channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """See the class."""
        time = self.time(time_embedding(t, self.embedded))  # (B, E)
        if self.n_classes is not None:
            if labels is None:
                labels = torch.full_like(t, self.n_classes)
            time = time + self.classes(labels)
        x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)  # (B, 4 C, S / 2, S / 2)
        large = self.down_large(self.first(x), time)
        small = self.down_small(self.smaller(large), time)  # (B, c, S / 4, S / 4)
        h = self.middle2(self.attention(self.middle1(small, time)), time)
        h = self.up_small(torch.cat([h, small], dim=1), time)
        h = F.interpolate(self.larger(h), scale_factor=2.0)  # (B, c, S / 2, S / 2)
        h = self.up_large(torch.cat([h, large], dim=1), time)
        return F.pixel_shuffle(self.last(F.silu(self.norm(h))), 2)
