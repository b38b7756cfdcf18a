"""The two small problems of train_mlp.py: three spirals to tell apart, and a sine of rising frequency to fit.

Shapes: N points, D numbers in.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from autoencoder.models import Classifier, ManualMLP, Regressor

SIZES = {"train": 300, "val": 300, "test": 1000}  # points
CLASSES = 3
NOISE = 0.5  # standard deviation around the sine, in the units of y


class Problem:
    """Points `drawn` by part (train, val, test), and the same as standardised tensors in `x` and `y`.

    Inputs (N, D), and targets that are values (N, 1), get the training part's mean 0 and deviation 1; labels (N,) stay.
    """

    def __init__(self, draw: Callable, seed: int, device: torch.device):
        rng = np.random.default_rng(seed)
        self.device, self.drawn = device, {part: draw(n, rng) for part, n in SIZES.items()}
        x, y = self.drawn["train"]
        self.classifies = y.ndim == 1
        self.centre, self.spread = x.mean(0), x.std(0)
        self.y_mean, self.y_std = (0.0, 1.0) if self.classifies else (float(y.mean()), float(y.std()))
        self.x = {part: self.inputs(x) for part, (x, _) in self.drawn.items()}
        self.y = {part: self.targets(y) for part, (_, y) in self.drawn.items()}

    def inputs(self, x: np.ndarray) -> Tensor:
        """Inputs (N, D), as drawn, as the network takes them."""
        return torch.from_numpy((x - self.centre) / self.spread).float().to(self.device)

    def targets(self, y: np.ndarray) -> Tensor:
        """Labels, or values as drawn, as the loss takes them."""
        scaled = y if self.classifies else ((y - self.y_mean) / self.y_std).astype(np.float32)
        return torch.from_numpy(scaled).to(self.device)

    def build(self, hidden: list[int], use_batchnorm: bool, init: str) -> ManualMLP:
        """A network for the problem, with weights drawn from PyTorch's generator."""
        head, sizes = (Classifier, (2, hidden, CLASSES)) if self.classifies else (Regressor, (1, hidden, 1))
        return head(*sizes, init=init, use_batchnorm=use_batchnorm)

    def measure(self, network: ManualMLP, part: str) -> tuple[float, float]:
        """Data term of the loss, and score: accuracy (from 0 to 1), or mean squared error in (units of y)²."""
        output, y = network.predict(self.x[part]), self.y[part]
        loss = network.loss(output, y)[0].item()
        return loss, (output.argmax(1) == y).sum().item() / len(y) if self.classifies else loss * self.y_std**2


def spirals(n: int, rng: np.random.Generator, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """n points (n, 2) on three arms, r in [0.05, 1] at the angle 5 r + 2π/3 · class + noise; labels int64 (n,)."""
    y = np.arange(n) % CLASSES
    r = rng.uniform(0.05, 1, n)
    angle = 5 * r + 2 * np.pi / CLASSES * y + noise * rng.standard_normal(n)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1), y


def chirp(x: np.ndarray) -> np.ndarray:
    """5 sin(2π (0.2 x + 0.2 x²)): on [0, 3] its frequency rises from 0.2 to 1.4."""
    return 5 * np.sin(2 * np.pi * (0.2 * x + 0.2 * x**2))


def noisy_chirp(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """x uniform in [0, 3] and y = chirp(x) + noise, (n, 1) each."""
    x = rng.uniform(0, 3, (n, 1))
    return x, chirp(x) + NOISE * rng.standard_normal((n, 1))
