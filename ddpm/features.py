"""A small classifier trained here, and its penultimate layer, in whose features images are compared.

    Fréchet distance of two sets with means μ and covariances Σ of their features
        |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½),    (Σ₁ Σ₂)^½ from the eigenvalues of Σ₁^½ Σ₂ Σ₁^½

It is 0 for equal Gaussians, but above 0 for any two finite samples: state the number of images, and the distance of as
many real ones (the floor), beside it. Precision: the fraction of the samples that lie as near to some real image as its
k-th real neighbour; recall: the same with samples and real images exchanged.

Sources: Heusel et al. 2017 (the distance, with another network); Kynkäänniemi et al. 2019 (precision and recall).
Shapes: N images uint8 (N, C, H, W), D features.
"""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.inputs import scaled
from shared_utils.data import Images, minibatches
from shared_utils.device import autocast
from shared_utils.modes import evaluating
from shared_utils.schedules import one_cycle

WIDTH = 128  # features
TOGETHER = 500  # images


class Classifier(nn.Module):
    """Three convolutions with normalisation, pooled: images (B, C, H, W) → features (B, 128) → logits (B, K)."""

    def __init__(self, channels: int, n_classes: int):
        super().__init__()
        sizes = (channels, 32, 64, WIDTH)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(sizes)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:])
        self.output = nn.Linear(WIDTH, n_classes)

    def features(self, x: Tensor) -> Tensor:
        """Images in [−1, 1] → (B, 128)."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(F.max_pool2d(x, 2) if convolution is not self.convolutions[0] else x)))
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Images in [−1, 1] → logits (B, K)."""
        return self.output(self.features(x))


def trained(
    images: Images, n_classes: int, epochs: int, seed: int, device: torch.device, batch_size: int = 128
) -> Classifier:
    """A classifier of the images in evaluation mode; AdamW with a one-cycle learning rate, in bfloat16."""
    torch.manual_seed(seed)
    model = Classifier(images.x.shape[1], n_classes).to(device, memory_format=torch.channels_last).train()
    peak = 5e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, fused=True)
    rng, step = np.random.default_rng(seed), 0
    x, y = torch.from_numpy(images.x).to(device), torch.from_numpy(images.y).to(device)
    updates = epochs * -(-len(x) // batch_size)
    for _ in range(epochs):
        for batch in minibatches(len(x), batch_size, rng):
            at = torch.from_numpy(batch).to(device)
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(step, updates, peak)
            with autocast(device):
                logits = model(scaled(x[at]).contiguous(memory_format=torch.channels_last))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), y[at]).backward()
            optimizer.step()
            step += 1
    return model.eval()


@torch.no_grad()
def seen(model: Classifier, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features float64 (N, 128) and class probabilities float32 (N, K) of images uint8 (N, C, H, W)."""
    features, probabilities = [], []
    device = next(model.parameters()).device
    with evaluating(model):
        for first in range(0, len(x), TOGETHER):
            some = scaled(torch.from_numpy(x[first : first + TOGETHER]).to(device))
            found = model.features(some.contiguous(memory_format=torch.channels_last))
            features.append(found.cpu().double().numpy())
            probabilities.append(model.output(found).softmax(1).cpu().numpy())
    return np.concatenate(features), np.concatenate(probabilities)


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Of the Gaussians with the means and covariances of features a (N, D) and b (M, D).

    Errors: `ValueError` for fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs two images or more, got {len(a)} and {len(b)}")
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # Σ_a^½
    product = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2 * product)


def frechet_error(a: np.ndarray, b: np.ndarray, blocks: int = 10) -> float:
    """The standard error of `frechet_distance(a, b)` from one draw of a (N, D) to the next.

    By the jackknife, which leaves out one of `blocks` blocks of a's rows at a time; N should be 3 `blocks` or more.
    Source: Efron and Stein 1981.
    """
    rows = np.arange(len(a))
    left_out = [frechet_distance(np.delete(a, block, axis=0), b) for block in np.array_split(rows, blocks)]
    return float(np.sqrt((blocks - 1) * np.var(left_out)))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, D), (M, D) → (N, M)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp(min=0)


def covered(points: np.ndarray, balls: np.ndarray, k: int = 3) -> float:
    """The fraction of `points` (N, D) as near to one of `balls` (M, D) as that one's k-th neighbour among `balls`.

    Samples in the balls of real images: precision. Real images in the balls of samples: recall. Errors: `ValueError`
    when there are k balls or fewer.
    """
    if len(balls) <= k:
        raise ValueError(f"{len(balls)} images have no {k}-th neighbour each")
    points, balls = torch.from_numpy(points), torch.from_numpy(balls)
    radii = torch.cat([_squared_distances(some, balls).kthvalue(k + 1, dim=1).values for some in balls.split(TOGETHER)])
    inside = [(_squared_distances(some, balls) <= radii).any(1) for some in points.split(TOGETHER)]
    return torch.cat(inside).double().mean().item()


def nearest(x: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each image of x uint8 (N, …) the distance to the nearest of `others` (M, …), and which it is: (N,) each.

    The distance is that of the pixels, black 0 and white 1.
    """
    a, b = (torch.from_numpy(each.reshape(len(each), -1)).float() / 255 for each in (x, others))
    best = [_squared_distances(some, b).min(1) for some in a.split(TOGETHER)]
    distances = torch.cat([found.values.sqrt() for found in best])
    which = torch.cat([found.indices for found in best])
    return distances.numpy(), which.numpy()
