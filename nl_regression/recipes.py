"""The two ways in which the scripts train, and the flags that change them.

`reference` is the configuration of the student project whose claims are tested here. With `interpolating` every network
meets its points: the input as Fourier features (which suffices), and Adam with a learning rate that falls to 0 (which
fits faster and more closely). Width, depth, batches and the absence of weight decay are the same.
Shapes: M networks, n points.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nl_regression.fitting import OPTIMIZERS, SCHEDULES, Fit, fit
from nl_regression.model import EnsembleMLP
from nl_regression.target import sample_points
from shared_utils.cli import ExperimentParser, non_negative_int, positive_float, positive_int
from shared_utils.device import cpu_threads

RECIPES = {
    "interpolating": {
        "features": 64,
        "sigma": 10.0,
        "optimizer": "adam",
        "lr": 2e-3,
        "schedule": "cosine",
        "epochs": 100,
    },
    "reference": {
        "features": 0,
        "sigma": 10.0,
        "optimizer": "sgd",
        "lr": 1e-2,
        "schedule": "constant",
        "epochs": 500,
    },
}
HOW = ("epochs", "lr", "optimizer", "schedule", "batch_size", "beta2")  # of a recipe, for `fit`


def add_recipe_flags(parser: ExperimentParser) -> None:
    """`--recipe`, and a flag for everything in it, which overrides it."""
    parser.add_argument(
        "--recipe", choices=RECIPES, default="interpolating", help="sets the flags below that are not given"
    )
    parser.add_argument("--epochs", type=positive_int, help="of 16 updates each, whatever n")
    parser.add_argument("--lr", type=positive_float, help="learning rate")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, help="sgd has momentum 0.9")
    parser.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate")
    parser.add_argument("--features", type=non_negative_int, help="Fourier frequencies; 0: the input is x itself")
    parser.add_argument("--sigma", type=positive_float, help="deviation of the Fourier frequencies, cycles per unit")
    parser.add_argument("--width", type=positive_int, default=256, help="units of a hidden layer")
    parser.add_argument("--depth", type=positive_int, default=3, help="hidden layers")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="points per update and network")


@dataclass(frozen=True)
class Recipe:
    """How networks are built and trained; `epochs` of 16 updates each."""

    features: int
    sigma: float
    optimizer: str
    lr: float
    schedule: str
    epochs: int
    width: int = 256
    depth: int = 3
    batch_size: int = 64
    beta2: float = 0.999  # of Adam

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Recipe":
        """The recipe that `args` names, with what its other flags override."""
        changed = {key: getattr(args, key) for key in RECIPES[args.recipe] if getattr(args, key) is not None}
        same = {key: getattr(args, key) for key in ("width", "depth", "batch_size")}
        return cls(**{**RECIPES[args.recipe], **changed, **same})

    def __str__(self) -> str:
        inputs = f"{self.features} Fourier features, σ = {self.sigma:g}" if self.features else "raw input"
        return f"{inputs}, {self.optimizer}, learning rate {self.lr:g} ({self.schedule}), {self.epochs} epochs"

    def model(self, rngs: Sequence[np.random.Generator]) -> EnsembleMLP:
        """The networks as they start, one for each generator, on the CPU."""
        return EnsembleMLP(len(rngs), self.width, self.depth, self.features, sigma=self.sigma, rngs=rngs)

    @cpu_threads(1)
    def train(
        self, sizes: Sequence[int], trials: Sequence[int], seed: int, device: torch.device, after_epoch=None
    ) -> tuple[EnsembleMLP, Fit]:
        """One network for each of the M pairs (sizes[i], trials[i]), all at once: the model and the outcome.

        Points, frequencies, weights and batches of a network are drawn from a generator of its own: it is the same
        network whichever others are trained beside it. after_epoch(epoch, model) is called after each epoch.
        """
        rngs, points = zip(*(points_of(n, trial, seed) for n, trial in zip(sizes, trials, strict=True)), strict=True)
        model = self.model(rngs).to(device)
        return model, fit(model, points, rngs, **{key: getattr(self, key) for key in HOW}, after_epoch=after_epoch)


def points_of(n: int, trial: int, seed: int) -> tuple[np.random.Generator, np.ndarray]:
    """A network's generator, seeded by (seed, n, trial), and the points (n,) that it draws first."""
    rng = np.random.default_rng([seed, int(n), int(trial)])
    return rng, sample_points(n, rng)
