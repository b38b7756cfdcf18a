"""Images → features → projection → SVM: the whole classifier, its protocol and its file.

The protocol, the same for every kind of features: whitening, C and gamma are chosen on validation images that the fit
has not seen; then projection and SVM are fitted once more to training and validation images together.

Shapes: N images, D features of an image, K classes.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mnist_svm_gabor.features import Preparation, Projection, fit_projection
from mnist_svm_gabor.svm import SVM, choose_svm, fit_svm
from shared_utils.checkpoint import load_arrays, save_arrays
from shared_utils.cli import UserError
from shared_utils.stats import wilson_interval

SEARCH_SIZE = 10_000  # training images of the search: what is best for them is best for 60,000, or within a few errors


@dataclass(frozen=True)
class Grid:
    """What is tried on the validation images. Cs and gammas as in `fit_svm`, whitenings as in `fit_projection`."""

    Cs: Sequence[float]
    gammas: Sequence[float]
    whitenings: Sequence[float] = (0.0, 0.5)
    components: int = 100


def default_grid(kernel: str, components: int = 100) -> Grid:
    """The grid for a kernel. A linear machine's C matters over decades, a curved one's hardly above 3."""
    if kernel.startswith("linear"):
        return Grid((0.01, 0.03, 0.1, 0.3, 1.0), (1.0,), components=components)
    return Grid((3.0, 10.0), (0.5, 0.8, 1.25, 2.0), components=components)


@dataclass(frozen=True)
class Fitted:
    """Projection and SVM after the protocol; trials: a row per point of the grid, the best first."""

    projection: Projection
    svm: SVM
    trials: list[dict]
    search_seconds: float
    fit_seconds: float

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Labels, int64 (N,), of feature vectors x (N, D)."""
        return self.svm.predict(self.projection(x))


def search(x: np.ndarray, y: np.ndarray, x_val: np.ndarray, y_val: np.ndarray, kernel: str, grid: Grid) -> list[dict]:
    """Try the whole grid: fit to vectors x (N, D) and labels y (N,), count validation errors; the best row comes first.

    Each row has whitening, C, gamma, val_errors, val_accuracy, seconds.
    """
    rows = []
    for whitening in grid.whitenings:
        projection = fit_projection(x, grid.components, whitening)
        trials = choose_svm(projection(x), y, projection(x_val), y_val, kernel, grid.Cs, grid.gammas)
        rows += [{"whitening": whitening, **row} for row in trials]
    return sorted(rows, key=lambda row: (row["val_errors"], row["C"], row["gamma"], row["whitening"]))


def fit(x: np.ndarray, y: np.ndarray, kernel: str, chosen: dict, components: int) -> tuple[Projection, SVM]:
    """Fit projection and SVM to vectors x (N, D) and labels y (N,) with the row `chosen` of a search."""
    projection = fit_projection(x, components, chosen["whitening"])
    return projection, fit_svm(projection(x), y, kernel, chosen["C"], chosen["gamma"])


def choose_and_fit(
    x: np.ndarray, y: np.ndarray, train_at: np.ndarray, val_at: np.ndarray, kernel: str, grid: Grid
) -> Fitted:
    """The protocol. x: vectors (N, D), y: labels (N,), train_at and val_at: positions of the split in them.

    The search fits to the first SEARCH_SIZE of `train_at`; the refit takes all N.
    """
    started = time.perf_counter()
    some = train_at[:SEARCH_SIZE]
    trials = search(x[some], y[some], x[val_at], y[val_at], kernel, grid)
    searched = time.perf_counter()
    projection, svm = fit(x, y, kernel, trials[0], grid.components)
    return Fitted(projection, svm, trials, searched - started, time.perf_counter() - searched)


@dataclass(frozen=True)
class Classifier:
    """A fitted classifier of images."""

    preparation: Preparation
    projection: Projection
    svm: SVM
    classes: tuple[str, ...]

    def scores(self, x: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
        """A score per class (N, K) of images uint8 (N, 1, 28, 28); the largest is the prediction."""
        return self.svm.scores(self.projection(self.preparation(x, device)))

    def predict(self, x: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
        """Labels, int64 (N,), of images uint8 (N, 1, 28, 28)."""
        return self.scores(x, device).argmax(1)

    def save(self, path: str | Path) -> None:
        """Write all of it as arrays to an `.npz`."""
        projection = {"mean": self.projection.mean, "matrix": self.projection.matrix}
        arrays = {**self.preparation.arrays(), **projection, **self.svm.arrays()}
        save_arrays(path, classes=list(self.classes), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> "Classifier":
        """Read what `save` wrote. Errors: `UserError` when the file is missing, damaged, or something else."""
        found = load_arrays(path, required=("resolution", "mean", "matrix", "kernel", "weights", "bias", "classes"))
        try:
            preparation, svm = Preparation.from_arrays(found), SVM.from_arrays(found)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no classifier of this version: {error}") from None
        projection = Projection(found["mean"], found["matrix"])
        return cls(preparation, projection, svm, tuple(map(str, found["classes"])))


def accuracy_metrics(predicted: np.ndarray, y: np.ndarray) -> dict:
    """Errors and accuracy on the test images, with the 95 % Wilson interval of the accuracy."""
    correct = int((predicted == y).sum())
    return {
        "test_errors": len(y) - correct,
        "test_accuracy": correct / len(y),
        "interval": wilson_interval(correct, len(y)),
    }
