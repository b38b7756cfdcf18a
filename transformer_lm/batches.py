"""What an update learns from: paragraphs, padded to the longest, or windows of the text, which need no padding.

Shapes: B sequences, T positions, N tokens of the text.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils.device import autocast
from shared_utils.modes import evaluating
from transformer_lm.corpus import Part
from transformer_lm.model import TransformerLM

IGNORED = -100  # a target that carries no loss; PyTorch's own number


@dataclass(frozen=True)
class Batch:
    """tokens int64 (B, T), the targets that follow them, IGNORED at padding, and padding bool (B, T) or None."""

    tokens: Tensor
    targets: Tensor
    padding: Tensor | None = None

    @property
    def count(self) -> Tensor:
        """How many targets carry loss: float32 ()."""
        return (self.targets != IGNORED).sum().float()


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

    def drawn(self, n: int, rng: np.random.Generator, pack: bool) -> np.ndarray:
        """The numbers of n pieces for `padded`, or the first tokens of n windows for `packed`: int64 (n,)."""
        return rng.integers(len(self.ids) - self.length + 1 if pack else len(self.pieces), size=n)

    def padded(self, chosen: np.ndarray) -> Batch:
        """Paragraphs, or parts of `length` tokens of long ones, padded to the longest of them; chosen: (B,)."""
        chosen = torch.from_numpy(chosen).to(self.ids.device)
        first, end = self.pieces[chosen].unbind(1)
        at = first[:, None] + torch.arange(int((end - first).max()), device=self.ids.device)  # (B, T)
        padding = at >= end[:, None]
        at = at.clamp(max=len(self.ids) - 1)
        tokens = self.before[at]
        tokens[:, 0] = torch.where(self.begins[chosen], self.start, tokens[:, 0])  # not the last of another paragraph
        # 0 is padding in all three kinds of tokens
        return Batch(tokens.masked_fill(padding, 0), self.ids[at].masked_fill(padding, IGNORED), padding)

    def packed(self, first: np.ndarray) -> Batch:
        """Windows of `length` positions, from these tokens on: every position carries loss; first: (B,)."""
        first = torch.from_numpy(first).to(self.ids.device)
        at = first[:, None] + torch.arange(self.length, device=self.ids.device)  # (B, T)
        return Batch(self.before[at], self.ids[at])


def _together(model: TransformerLM, length: int) -> int:
    """How many windows to compute at once: 32, fewer where their logits would take more than 64 MB."""
    return max(1, min(32, 2**24 // (length * model.config["vocab_size"])))


def total_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the cross-entropies of the targets that carry loss, nats."""
    logits = model(batch.tokens, batch.padding).float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")


def windows(ids: Tensor, length: int, start: int, together: int) -> Iterator[Batch]:
    """All of a text, ids (N,), in windows that do not overlap: each token is a target once, the last may be shorter.

    start: what stands before the first token. together: windows of a batch.
    """
    before = torch.cat([ids.new_tensor([start]), ids[:-1]])
    full = len(ids) // length * length
    whole = (each[:full].view(-1, length).split(together) for each in (before, ids))
    yield from (Batch(tokens, targets) for tokens, targets in zip(*whole, strict=True))
    if full < len(ids):
        yield Batch(before[None, full:], ids[None, full:])


@torch.no_grad()
def losses_of_text(
    model: TransformerLM, ids: Tensor, start: int, amp: bool = False, together: int | None = None
) -> Tensor:
    """The loss of every token of a text, ids (N,), in windows that do not overlap: (N,), nats."""
    found = []
    with evaluating(model), autocast(ids.device, amp):
        for batch in windows(ids, model.context, start, together or _together(model, model.context)):
            logits = model(batch.tokens).float().flatten(0, 1)
            found.append(F.cross_entropy(logits, batch.targets.flatten(), reduction="none"))
    return torch.cat(found)


@torch.no_grad()
def sliding_losses(
    model: TransformerLM, ids: Tensor, start: int, stride: int, amp: bool = False, together: int | None = None
) -> Tensor:
    """The loss of every token of a text, ids (N,), in windows that move on by `stride` tokens: (N,), nats.

    Of each window only the tokens count that the one before has not seen, so that all but the first window's have at
    least context − stride tokens to go by. Errors: `ValueError` when the windows would leave tokens out.
    """
    length, n = min(model.context, len(ids)), len(ids)
    if not 1 <= stride <= model.context:
        raise ValueError(f"windows of {model.context} tokens cannot move on by {stride}")
    before = torch.cat([ids.new_tensor([start]), ids[:-1]])
    ends = torch.tensor([*range(length, n, stride), n], device=ids.device)  # of the windows
    seen = torch.cat([ends.new_zeros(1), ends[:-1]])  # where the window before ended
    found, together = [], together or _together(model, length)
    with evaluating(model), autocast(ids.device, amp):
        for end, old in zip(ends.split(together), seen.split(together), strict=True):
            at = end[:, None] - length + torch.arange(length, device=ids.device)  # (B, T)
            new = at >= old[:, None]
            logits = model(before[at]).float()  # (B, T, V)
            found.append(F.cross_entropy(logits[new], ids[at][new], reduction="none"))
    return torch.cat(found)
