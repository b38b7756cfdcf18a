"""Images → features → projection → SVM: the whole classifier, its protocol and its file.

The protocol, the same for every kind of features: whitening, C and gamma are chosen on validation images that the fit
has not seen; then projection and SVM are fitted once more to training and validation images together.
"""

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

SEARCH_SIZE = 10_000  # training images of the search: C and gamma found here hold for more (README, "Choosing")


@dataclass(frozen=True)
class Grid:
    """What is tried on the validation images. Cs and gammas as in `fit_svm`, whitenings as in `fit_projection`."""

    Cs: Sequence[float] = (3.0, 10.0)
    gammas: Sequence[float] = (0.5, 1.0, 2.0)
    whitenings: Sequence[float] = (0.0, 0.5)
    components: int = 100


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


def accuracy_metrics(predicted: np.ndarray, y: np.ndarray) -> dict:
    """Errors and accuracy on the test images, with the 95 % Wilson interval of the accuracy."""
    correct = int((predicted == y).sum())
    return {
        "test_errors": len(y) - correct,
        "test_accuracy": correct / len(y),
        "interval": wilson_interval(correct, len(y)),
    }
