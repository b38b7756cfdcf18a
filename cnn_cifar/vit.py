"""A vision transformer: an image is cut into patches, and the patches are read like words.

    image ─ patches of 4×4, each by one linear map to d numbers ─ a class token before them ─ + positions ─ blocks
                                                                  the class token, last ─ norm ─ logits
    block:   x ↦ x + attention(norm(x)),   x ↦ x + mlp(norm(x)),   mlp: d → 4 d → d with GELU
    attention, in each head:   softmax(q kᵀ / √d_head) v

Nothing in it knows that an image has two dimensions, or that what is near belongs together: the positions are learned.
With `stem="conv"` two convolutions of stride 2 embed the patches, and see a little beyond each.

Sources: Dosovitskiy et al. 2021 (the network); Xiao et al. 2021, arXiv 2106.14881 (convolutions as the first step);
Abnar and Zuidema 2020 (attention rollout).
Shapes: B images (B, 1, S, S) of [0, 1], d width, T = (S / 4)² + 1 tokens, h heads, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnn_cifar.models import MNIST, Normalize
from shared_utils.cli import UserError
from shared_utils.dropout import Dropout

STEMS = ("patch", "conv")


class Attention(nn.Module):
    """Every token looks at every token: (B, T, d) → (B, T, d)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def weights_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How much each token attends to each (B, h, T, T), 1 in all, and the tokens' values (B, h, T, d/h)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, h, T, d/h) each
        return (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1), v

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        weights, v = self.weights_and_values(x)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then an MLP for each token by itself, each added to its input: (B, T, d) → (B, T, d)."""

    def __init__(self, dim: int, heads: int, ratio: int, dropout: float):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), Attention(dim, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(dim), nn.Linear(dim, ratio * dim), nn.Linear(ratio * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        h = self.dropout(F.gelu(self.up(self.norm2(x))))  # (B, T, ratio · d)
        return x + self.dropout(self.down(h))


class ViT(nn.Module):
    """Images (B, 1, S, S) of [0, 1] → logits (B, K). Normalisation is part of it.

    Errors: `UserError` when the side is no multiple of the patch, or the width none of the heads, or the patch is
    odd and the stem convolutional.
    """

    def __init__(
        self,
        num_classes: int = 10,
        size: int = 28,
        patch: int = 4,
        dim: int = 128,
        depth: int = 6,
        heads: int = 8,
        ratio: int = 4,
        dropout: float = 0.1,
        stem: str = "patch",
    ):
        super().__init__()
        if size % patch or dim % heads or stem not in STEMS or (stem == "conv" and patch % 2):
            raise UserError(f"a ViT of {size} pixels in patches of {patch}, width {dim} in {heads} heads, stem {stem}?")
        self.normalize = Normalize(**MNIST)
        if stem == "patch":
            self.stem = nn.Conv2d(1, dim, patch, stride=patch)  # a linear map of each patch
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(1, dim // 2, 3, stride=2, padding=1),
                nn.BatchNorm2d(dim // 2),
                nn.ReLU(),
                nn.Conv2d(dim // 2, dim, 3, stride=patch // 2, padding=1),
            )
        self.side, self.dropout = size // patch, Dropout(dropout)  # patches in each direction
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, self.side**2 + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, ratio, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def tokens(self, x: Tensor) -> Tensor:
        """The class token and the patches with their positions, (B, T, d)."""
        patches = self.stem(self.normalize(x)).flatten(2).transpose(1, 2)  # (B, T − 1, d), row by row
        x = torch.cat([self.class_token.expand(len(x), -1, -1), patches], dim=1) + self.positions
        return self.dropout(x)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

    @torch.no_grad()
    def attention_weights(self, x: Tensor) -> Tensor:
        """How much each token attends to each, in every block: (depth, B, h, T, T)."""
        x, found = self.tokens(x), []
        for block in self.blocks:
            found.append(block.attention.weights_and_values(block.norm1(x))[0])
            x = block(x)
        return torch.stack(found)


def rollout(weights: Tensor) -> Tensor:
    """How much of each patch reaches the class token in the end: (depth, B, h, T, T) → (B, T − 1), adding up to 1.

    A block is taken to pass on half of the token itself and half of what it attends to, the mean over the heads; the
    blocks' matrices are multiplied. The class token's own share is left out.
    """
    mean = weights.mean(2)  # (depth, B, T, T)
    mixed = (mean + torch.eye(mean.shape[-1], device=mean.device)) / 2
    passed = mixed[0]
    for step in mixed[1:]:
        passed = step @ passed
    to_patches = passed[:, 0, 1:]
    return to_patches / to_patches.sum(1, keepdim=True)


def position_similarity(model: ViT) -> Tensor:
    """The cosine similarity of each patch's position embedding to every other's: (T − 1, T − 1)."""
    positions = F.normalize(model.positions.detach()[0, 1:], dim=1)
    return positions @ positions.T
