"""Losses: the mean over the batch, and its gradient, in which the 1/N enters once for the whole network.

Shapes: N batch, K classes, M outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from shared_utils.runs import Diverged


class NotFinite(ValueError):
    """NaN or infinity, mostly from too high a learning rate; its own class, so as not to catch a bug's ValueError."""


@contextmanager
def stopping(update: int, lr: float, highest: float, flag: str = "--lr", name: str = "") -> Iterator[None]:
    """Around an update, or what is measured after it: a loss that is not finite ends the run in one line.

    update: which one, from 1. lr: its learning rate. highest: the value of `flag`, of which a tenth is proposed. name:
    the network's, where there are several. NumPy does not warn of the overflow that leads there.
    Errors: `Diverged`, a `UserError`, for a `NotFinite`.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    except NotFinite as error:
        where = f"{name}: update {update}" if name else f"update {update}"
        raise Diverged(f"{where}, learning rate {lr:.3g}: {error}; try {flag} {highest / 10:g}") from None


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log softmax over the last axis, without overflow: the maximum (of the real part) is taken off first."""
    shifted = logits - logits.real.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class SoftmaxCrossEntropy:
    """−(1/N) Σ_n log softmax(logits_n)[label_n], in nats. Its gradient is (softmax − one-hot) / N."""

    def forward(self, logits: np.ndarray, labels: np.ndarray) -> float:
        """logits: (N, K), labels: whole numbers (N,) in 0 … K − 1.

        Errors: `ValueError` for others, `NotFinite` for NaN.
        """
        labels = np.asarray(labels)
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"SoftmaxCrossEntropy needs logits (N, K) and labels (N,), got {logits.shape} and {labels.shape}"
            )
        if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= logits.shape[1]:
            raise ValueError(
                f"SoftmaxCrossEntropy: labels must be whole numbers from 0 to {logits.shape[1] - 1}, "
                f"got {labels.dtype} from {labels.min()} to {labels.max()}"
            )
        log_p = log_softmax(logits)
        self._labels, self._p = labels, np.exp(log_p)
        loss = -log_p[np.arange(len(labels)), labels].mean()
        if not np.isfinite(loss):
            raise NotFinite("the loss is not finite: NaN in the data, or a learning rate that is too high")
        return loss

    def backward(self) -> np.ndarray:
        """dlogits, (N, K)."""
        d = self._p.copy()
        d[np.arange(len(d)), self._labels] -= 1
        return d / np.asarray(len(d), d.dtype)


class MSE:
    """(1 / NM) Σ (prediction − target)²: the mean over all numbers, as PyTorch's."""

    def forward(self, prediction: np.ndarray, target: np.ndarray) -> float:
        """prediction, target: (N, M). Errors: `ValueError` for other shapes, `NotFinite` for NaN."""
        if prediction.shape != target.shape:
            raise ValueError(
                f"MSE: prediction and target must have one shape, got {prediction.shape} and {target.shape}"
            )
        self._difference = prediction - target
        loss = (self._difference**2).mean()
        if not np.isfinite(loss):
            raise NotFinite("the loss is not finite: NaN in the data, or a learning rate that is too high")
        return loss

    def backward(self) -> np.ndarray:
        """dprediction, (N, M)."""
        return 2 * self._difference / np.asarray(self._difference.size, self._difference.dtype)
