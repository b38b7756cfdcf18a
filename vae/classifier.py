"""A small classifier of binary 14×14 digits, trained on real ones, to judge the samples of a model.

Three 3×3 convolutions with batch normalisation, two poolings, one hidden layer; AdamW with a one-cycle learning rate.
Every training image is distorted a little, differently each time it is seen: else longer training gains nothing.
Shapes: N images, B batch, K classes; images of 0 and 1, (N, 196), (N, 14, 14) or (N, 1, 14, 14).
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils.data import minibatches
from vae.inputs import SIDE

BATCH, PEAK = 50, 1e-2  # images per update, highest learning rate


def bent(x: Tensor, rng: np.random.Generator, amount: float = 0.09, shift: float = 0.5) -> Tensor:
    """Each image of x (B, 1, H, W) under its own random linear map, moved by up to `shift` pixels, binarised again.

    The map is I + `amount` ε, ε ~ N(0, 1) in each of its four entries: it rotates, scales and shears at once.
    """
    maps = np.zeros((len(x), 2, 3), dtype=np.float32)  # from an output's position, in [−1, 1]², to the input's
    maps[:, :, :2] = np.eye(2) + amount * rng.standard_normal((len(x), 2, 2))
    maps[:, :, 2] = rng.uniform(-shift, shift, (len(x), 2)) * 2 / SIDE
    grid = F.affine_grid(torch.from_numpy(maps).to(x.device), list(x.shape), align_corners=False)  # (B, H, W, 2)
    return (F.grid_sample(x, grid, align_corners=False) > 0.5).float()


def build_network(n_classes: int) -> nn.Sequential:
    """(B, 1, 14, 14) → logits (B, K)."""

    def block(channels_in, channels_out):
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)  # the normalisation has a bias
        return convolution, nn.BatchNorm2d(channels_out), nn.ReLU()

    return nn.Sequential(
        *block(1, 16),  # (B, 16, 14, 14)
        *block(16, 32),
        nn.MaxPool2d(2),  # (B, 32, 7, 7)
        *block(32, 64),
        nn.MaxPool2d(2),  # (B, 64, 3, 3)
        nn.Flatten(),
        nn.Linear(64 * 9, 128),
        nn.ReLU(),
        nn.Linear(128, n_classes),
    )


def train_classifier(
    x: np.ndarray, y: np.ndarray, n_classes: int, epochs: int, device: torch.device | str, rng: np.random.Generator
) -> nn.Module:
    """Train on images x (of 0 and 1) and labels y (N,), whole numbers below n_classes; returns it in evaluation mode.

    The order of the images and how they are bent come from rng, the initial weights from PyTorch's generator.
    Errors: `ValueError` when the images are not binary or not 14×14.
    """
    x, y = _images(x).to(device), torch.as_tensor(y).to(device)
    # Channels last: the same numbers, and the convolutions take three quarters of the time on a CPU.
    model = build_network(n_classes).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, total_steps=epochs * -(-len(x) // BATCH))
    for _ in range(epochs):
        for batch in minibatches(len(x), BATCH, rng):
            batch = torch.from_numpy(batch).to(device)
            logits = model(bent(x[batch], rng).to(memory_format=torch.channels_last))  # (B, K)
            optimizer.zero_grad()
            F.cross_entropy(logits, y[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def class_probabilities(model: nn.Module, x: np.ndarray) -> np.ndarray:
    """p(class|image) of each image in x: float32 (N, K), rows that sum to 1. Errors: as `train_classifier`."""
    model.eval()
    device = next(model.parameters()).device
    parts = [model(part.to(device)).softmax(1) for part in _images(x).split(1000)]  # (≤ 1000, K) each
    return torch.cat(parts).cpu().numpy()


def _images(x: np.ndarray) -> Tensor:
    """float32 (N, 1, 14, 14) on the CPU."""
    x = torch.as_tensor(np.asarray(x))
    if x.ndim < 2 or x[0].numel() != SIDE * SIDE:
        raise ValueError(f"the classifier needs images of {SIDE}×{SIDE} pixels, got the shape {tuple(x.shape)}")
    if not ((x == 0) | (x == 1)).all():
        raise ValueError("the classifier needs binary images (0 or 1), as it was trained on")
    return x.float().reshape(-1, 1, SIDE, SIDE)
