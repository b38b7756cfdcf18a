"""Images as the networks of this folder see them, and what a network makes of them.

Shapes: N images, K classes.
"""

from dataclasses import dataclass

import numpy as np

from numpy_nn.losses import SoftmaxCrossEntropy
from numpy_nn.network import Sequential
from shared_utils.data import channel_statistics, load_images, split_positions

CHUNK = 1000  # images evaluated at once


@dataclass(frozen=True)
class Inputs:
    """Standardised images, float32 (N, 1, 28, 28), and labels, int64 (N,), of the three parts."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    title: str


def load_inputs(args) -> Inputs:
    """The data set of `args` (`--dataset`, `--data-dir`), a sixth of its training images held out for validation.

    Mean and standard deviation, one number each, come from the training part alone.
    """
    train = load_images(args.dataset, "train", args.data_dir, shape=(1, 28, 28))
    test = load_images(args.dataset, "test", args.data_dir, shape=(1, 28, 28))
    fit_at, val_at = split_positions(train.y)
    mean, std = (float(value[0]) for value in channel_statistics(train.x[fit_at]))

    def standardised(x: np.ndarray) -> np.ndarray:
        return ((x.astype(np.float32) / 255 - mean) / std).astype(np.float32)

    return Inputs(
        standardised(train.x[fit_at]),
        train.y[fit_at],
        standardised(train.x[val_at]),
        train.y[val_at],
        standardised(test.x),
        test.y,
        train.classes,
        train.title,
    )


def predict_logits(network: Sequential, x: np.ndarray) -> np.ndarray:
    """The network's output (N, K) for x, in evaluation mode and by chunks."""
    return np.concatenate([network.forward(x[i : i + CHUNK]) for i in range(0, len(x), CHUNK)])


def evaluate(network: Sequential, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(mean cross-entropy in nats, accuracy) of the network on x, y, in evaluation mode."""
    logits = predict_logits(network, x)
    return float(SoftmaxCrossEntropy().forward(logits, y)), float((logits.argmax(1) == y).mean())
