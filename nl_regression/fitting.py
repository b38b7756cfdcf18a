"""Training all networks of an ensemble at once, each on its own points in its own order.

Every network takes the same number of updates. An epoch is `UPDATES_PER_EPOCH` of them whatever a network's n: one pass
over 1,000 points in batches of 64, many passes over fewer. A network of n ≤ B points sees all of them in every update.
Shapes: M networks, B points of a batch, G grid points.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nl_regression.model import EnsembleMLP
from nl_regression.target import GRID, target
from shared_utils.schedules import half_cosine

UPDATES_PER_EPOCH = 16
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("constant", "cosine")


@dataclass(frozen=True)
class Fit:
    """The outcome for M networks: mean squared error on their points and values on `GRID`, (M,) and (M, G), float64.

    diverged_at: the update (from 1) at which a network's loss was no longer finite, 0 where it always was: (M,).
    """

    train_mse: np.ndarray
    values: np.ndarray
    diverged_at: np.ndarray


def epoch_batches(sizes: Sequence[int], batch_size: int, rngs: Sequence[np.random.Generator]) -> tuple[Tensor, Tensor]:
    """The batches of one epoch: positions (U, M, B), int64, and weights (M, B) that make a sum a mean.

    A network of more than B points draws permutations of them, one after another; one of fewer sees all, padded with
    positions of weight 0. B is `batch_size`, or the largest n where that is smaller.
    """
    b = min(batch_size, max(sizes))
    at = np.zeros((UPDATES_PER_EPOCH, len(sizes), b), dtype=np.int64)
    weights = np.zeros((len(sizes), b))
    for i, (n, rng) in enumerate(zip(sizes, rngs, strict=True)):
        seen = min(n, b)
        weights[i, :seen] = 1 / seen
        if n <= b:
            at[:, i, :n] = np.arange(n)
        else:
            passes = [rng.permutation(n) for _ in range(math.ceil(UPDATES_PER_EPOCH * b / n))]
            at[:, i] = np.concatenate(passes)[: UPDATES_PER_EPOCH * b].reshape(UPDATES_PER_EPOCH, b)
    return torch.from_numpy(at), torch.from_numpy(weights)


def fit(
    model: EnsembleMLP,
    points: Sequence[np.ndarray],
    rngs: Sequence[np.random.Generator],
    *,
    epochs: int,
    lr: float,
    optimizer: str = "adam",
    schedule: str = "cosine",
    batch_size: int = 64,
    beta2: float = 0.999,
    after_epoch: Callable[[int, EnsembleMLP], None] | None = None,
) -> Fit:
    """Minimise every network's mean squared error on its own points: M arrays (n_i,) → the outcome.

    optimizer: `sgd` has momentum 0.9; neither decays weights. schedule: `cosine` lets the learning rate fall to 0.
    A network whose loss is no longer finite is noted and left as it is; the others are not affected.
    """
    parameter = model.weights[0]
    sizes = [len(x) for x in points]
    x = torch.zeros(len(sizes), max(sizes), dtype=torch.float64)
    for row, own in zip(x, points, strict=True):
        row[: len(own)] = torch.from_numpy(own)
    y = torch.from_numpy(target(x.numpy())).to(parameter)
    x = x.to(parameter)  # (M, N), padded
    if optimizer == "sgd":
        steps = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, fused=True)
    else:
        steps = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, beta2), fused=True)
    updates, step = epochs * UPDATES_PER_EPOCH, 0
    diverged_at = np.zeros(len(sizes), dtype=np.int64)
    for epoch in range(1, epochs + 1):
        batches, weights = epoch_batches(sizes, batch_size, rngs)
        batches, weights = batches.to(parameter.device), weights.to(parameter)
        losses = []
        for at in batches:  # (M, B)
            if schedule == "cosine":
                steps.param_groups[0]["lr"] = half_cosine(step, updates, lr)
            error = model(x.gather(1, at)) - y.gather(1, at)  # (M, B)
            loss = (weights * error**2).sum(1)  # (M,)
            steps.zero_grad()
            loss.sum().backward()  # each network's gradient is that of its own loss
            steps.step()
            losses.append(loss.detach())
            step += 1
        bad = ~torch.isfinite(torch.stack(losses)).cpu().numpy()  # (U, M)
        first = step - UPDATES_PER_EPOCH + 1 + bad.argmax(0)
        diverged_at = np.where((diverged_at == 0) & bad.any(0), first, diverged_at)
        if after_epoch is not None:
            after_epoch(epoch, model)
    train_mse, values = evaluate(model, points)
    diverged_at[(diverged_at == 0) & ~np.isfinite(train_mse)] = updates  # the last update ruined it
    return Fit(train_mse, values, diverged_at)


@torch.no_grad()
def evaluate(model: EnsembleMLP, points: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Every network's mean squared error on its own points (M,) and its values on `GRID` (M, G), both float64."""
    parameter = model.weights[0]
    grid = torch.from_numpy(GRID).to(parameter).expand(model.n_models, -1)  # (M, G)
    values = model(grid).cpu().double().numpy()
    longest = max(map(len, points))
    x = np.stack([np.pad(own, (0, longest - len(own)), mode="edge") for own in points])  # (M, N)
    errors = (model(torch.from_numpy(x).to(parameter)).cpu().double().numpy() - target(x)) ** 2
    mse = np.array([row[: len(own)].mean() for row, own in zip(errors, points, strict=True)])
    return mse, values
