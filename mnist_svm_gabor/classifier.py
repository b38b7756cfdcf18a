"""A fitted classifier of images, and its file: preparation, projection and SVM as arrays in an `.npz`.

Shapes: N images, K classes.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mnist_svm_gabor.features import Preparation, Projection
from mnist_svm_gabor.svm import SVM
from shared_utils.checkpoint import load_arrays, save_arrays
from shared_utils.cli import UserError
from shared_utils.data import Images


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

    def check_classes(self, images: Images) -> None:
        """Errors: `UserError` when the labels of `images` do not mean what this classifier's do."""
        if self.classes != images.classes:
            theirs, ours = (", ".join(names) for names in (images.classes, self.classes))
            raise UserError(f"the classifier knows the classes {ours}, the data set has {theirs}")
