"""What an update learns from: paragraphs, padded to the longest, or windows of the text, which need no padding.

Shapes: B sequences, T positions, N tokens of the text.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils.device import autocast
from shared_utils.modes import evaluating
from transformer_lm.corpus import Part

IGNORED = -100  # a target that carries no loss; PyTorch's own number


@dataclass(frozen=True)
class Batch:
    """tokens int64 (B, T), the targets that follow them, IGNORED at padding, and padding bool (B, T) or None."""

    tokens: Tensor
    targets: Tensor
    padding: Tensor | None = None

    @property
    def count(self) -> Tensor:
        """How many targets carry loss: int64 ()."""
        return (self.targets != IGNORED).sum()


class Text:
    """A part's token ids on a device, to draw batches of at most `length` positions from.

    Errors: `ValueError` when there are fewer than `length` tokens.
    """

    def __init__(self, part: Part, length: int, start: int, device: torch.device):
        if len(part.ids) < length:
            raise ValueError(f"{len(part.ids)} tokens, fewer than the {length} of a window")
        self.length, self.start = length, start
        self.ids = torch.from_numpy(part.ids).to(device)  # (N,)
        self.before = torch.cat([self.ids.new_tensor([start]), self.ids[:-1]])  # what stands before each token
        begins = np.concatenate([[0], part.ends[:-1]])
        pieces = [
            (at, min(at + length, end))
            for begin, end in zip(begins, part.ends, strict=True)
            for at in range(begin, end, length)
        ]
        self.pieces = torch.tensor(pieces, device=device)  # (P, 2): a paragraph, or so much of a long one
        self.begins = torch.from_numpy(np.isin(self.pieces[:, 0].cpu().numpy(), begins)).to(device)

    def padded(self, n: int, rng: np.random.Generator) -> Batch:
        """n paragraphs, or parts of `length` tokens of long ones, padded to the longest of them."""
        chosen = torch.from_numpy(rng.integers(len(self.pieces), size=n)).to(self.ids.device)
        first, end = self.pieces[chosen].unbind(1)
        at = first[:, None] + torch.arange(int((end - first).max()), device=self.ids.device)  # (B, T)
        padding = at >= end[:, None]
        at = at.clamp(max=len(self.ids) - 1)
        tokens = self.before[at]
        tokens[:, 0] = torch.where(self.begins[chosen], self.start, tokens[:, 0])  # not the last of another paragraph
        return Batch(tokens.masked_fill(padding, 0), self.ids[at].masked_fill(padding, IGNORED), padding)

    def packed(self, n: int, rng: np.random.Generator) -> Batch:
        """n windows of `length` positions from anywhere in the text: every position carries loss."""
        first = torch.from_numpy(rng.integers(len(self.ids) - self.length + 1, size=n)).to(self.ids.device)
        at = first[:, None] + torch.arange(self.length, device=self.ids.device)  # (B, T)
        return Batch(self.before[at], self.ids[at])

    def windows(self, n: int) -> list[Batch]:
        """All of the text in windows that do not overlap, n at a time; each token is a target once."""
        full = len(self.ids) // self.length * self.length
        found = [
            Batch(tokens, targets)
            for tokens, targets in zip(
                self.before[:full].view(-1, self.length).split(n),
                self.ids[:full].view(-1, self.length).split(n),
                strict=True,
            )
        ]
        if full < len(self.ids):
            found.append(Batch(self.before[None, full:], self.ids[None, full:]))
        return found


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy of the targets that carry loss, nats per token."""
    logits = model(batch.tokens, batch.padding).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)


@torch.no_grad()
def losses_of_text(model: nn.Module, text: Text, amp: bool = False, together: int = 32) -> Tensor:
    """The loss of every token of a text, in windows that do not overlap: float32 (N,), nats."""
    found = []
    with evaluating(model), autocast(text.ids.device, amp):
        for batch in text.windows(together):
            logits = model(batch.tokens).float().flatten(0, 1)
            found.append(F.cross_entropy(logits, batch.targets.flatten(), reduction="none"))
    return torch.cat(found)
