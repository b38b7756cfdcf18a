"""Losses, each with its gradient. Both are means over the batch: this is the one place where 1/N enters.

Shapes: N images of a batch, K classes, M outputs.
"""

import torch
from torch import Tensor


def softmax_cross_entropy(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """−mean log p_y, p = softmax(logits), and its gradient (p − onehot(y)) / N.

    logits: (N, K), y: int64 (N,) of labels; returns the loss (a scalar tensor) and (N, K). The largest logit is
    subtracted from each row first, so that nothing overflows. Errors: `ValueError` when the shapes do not fit.
    """
    n = len(logits)
    if logits.ndim != 2 or y.shape != (n,):
        raise ValueError(f"cross-entropy takes logits (N, K) and labels (N,), got {logits.shape} and {y.shape}")
    shifted = logits - logits.amax(1, keepdim=True)  # (N, K)
    log_p = shifted - shifted.exp().sum(1, keepdim=True).log()
    rows = torch.arange(n, device=logits.device)
    gradient = log_p.exp()
    gradient[rows, y] -= 1
    return -log_p[rows, y].mean(), gradient / n


def mean_squared_error(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of (output − target)² over images and outputs, and its gradient 2 (output − target) / (N M).

    Both (N, M); returns the loss (a scalar tensor) and (N, M). Errors: `ValueError` when the shapes differ, which
    broadcasting would otherwise hide.
    """
    if output.shape != target.shape:
        raise ValueError(f"output and target differ in shape: {tuple(output.shape)} and {tuple(target.shape)}")
    difference = output - target
    return difference.square().mean(), difference.mul_(2 / difference.numel())
