"""The patch-embedding network of train_numpy_vs_torch.py, failure_modes.py and benchmark.py: its shape and its update.

Shapes: N images, B batch, K classes.
"""

from collections.abc import Callable
from itertools import islice

import numpy as np

from numpy_nn.activations import ReLU
from numpy_nn.layers import Flatten, Linear, PatchEmbedding
from numpy_nn.losses import SoftmaxCrossEntropy
from numpy_nn.network import Sequential
from numpy_nn.optimizers import SGD
from shared_utils.data import endless_minibatches

PATCH, DIM = 4, 8


def embedding_network(rng: np.random.Generator, n_classes: int, dtype=np.float32) -> Sequential:
    """(N, 1, 28, 28) → (N, 7, 7, 8) → (N, 392) → (N, K)."""
    embedding = PatchEmbedding(PATCH, DIM, rng=rng, dtype=dtype)
    return Sequential(embedding, ReLU(), Flatten(), Linear(49 * DIM, n_classes, rng=rng, dtype=dtype))


def batch_order(n: int, updates: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """The index arrays of `updates` batches, epoch after epoch."""
    return list(islice(endless_minibatches(n, batch_size, np.random.default_rng(seed)), updates))


def stepper(network: Sequential, x: np.ndarray, y: np.ndarray, lr: float) -> Callable:
    """A function of a batch's positions that makes one update and returns (loss, error)."""
    optimizer, loss = SGD(network.layers, lr), SoftmaxCrossEntropy()

    def step(batch: np.ndarray) -> tuple[float, float]:
        logits = network.forward(x[batch], training=True)  # (B, K)
        value = loss.forward(logits, y[batch])
        network.backward(loss.backward(), need_dx=False)
        optimizer.step()
        return float(value), float((logits.argmax(1) != y[batch]).mean())

    return step
