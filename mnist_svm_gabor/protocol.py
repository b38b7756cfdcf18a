"""How every SVM of this folder is chosen, fitted and tested, whatever its features.

Components, whitening, C and gamma are chosen on validation images that the fit has not seen; then projection and SVM
are fitted once more to training and validation images together, and tested once.

Shapes: N images, D features of an image.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mnist_svm_gabor.features import Projection, principal_axes
from mnist_svm_gabor.svm import SVM, choose_svm, fit_svm
from shared_utils.cli import UserError
from shared_utils.data import Images, load_images, split_positions, stratified_order, subset
from shared_utils.stats import wilson_interval

SEARCH_SIZE = 10_000  # training images of the search, so that it takes seconds
FEW = 1000  # below this many images a single sixth is too few to choose by: five folds

Fold = tuple[np.ndarray, np.ndarray]  # positions to fit to and to count errors on


@dataclass(frozen=True)
class Grid:
    """What is tried. Cs and gammas as in `fit_svm`, components and whitenings as in `PrincipalAxes`."""

    Cs: Sequence[float]
    gammas: Sequence[float]
    whitenings: Sequence[float] = (0.0, 0.5)
    components: Sequence[int] = (50, 100)


def default_grid(kernel: str) -> Grid:
    """The grid for a kernel. A linear SVM's C matters over decades, a non-linear one's hardly above 3."""
    if kernel.startswith("linear"):
        return Grid((0.01, 0.03, 0.1, 0.3, 1.0), (1.0,))
    return Grid((3.0, 10.0), (0.5, 0.8, 1.25, 2.0))


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


def load(args, rng: np.random.Generator) -> tuple[Images, Images]:
    """Training images (`--train-size` of them, or all) and test images. Errors: `UserError` when there are too few."""
    train = load_images(args.dataset, "train", args.data_dir, shape=(1, 28, 28))
    if args.train_size is not None:
        if args.train_size > len(train):
            raise UserError(f"--train-size {args.train_size}: {args.dataset} has {len(train)} training images")
        train = subset(train, args.train_size, rng)
    if len(train) < 5 * len(train.classes):
        raise UserError(
            f"{len(train)} training images are too few: at least five for each of {len(train.classes)} classes"
        )
    return train, load_images(args.dataset, "test", args.data_dir, shape=(1, 28, 28))


def folds(y: np.ndarray, rng: np.random.Generator, n_classes: int) -> list[Fold]:
    """What the search fits to and counts on: the fixed split (a sixth held out), or five folds if images are few.

    y: labels (N,) in 0 … n_classes − 1. The positions to fit to come in a stratified random order.
    Errors: `UserError` when one of the classes is missing in a fold.
    """
    if len(y) >= FEW:
        train_at, val_at = split_positions(y)
        found = [(train_at[stratified_order(y[train_at], rng)], val_at)]
    else:
        order = stratified_order(y, rng)
        found = [(np.delete(order, np.s_[i::5]), order[i::5]) for i in range(5)]
    if any(len(np.unique(y[train_at])) < n_classes for train_at, _ in found):
        raise UserError(f"{len(y)} training images are too few for every class to occur in each fold")
    return found


def search(x: np.ndarray, y: np.ndarray, parts: list[Fold], kernel: str, grid: Grid) -> list[dict]:
    """Try the whole grid on each fold of vectors x (N, D) and labels y (N,); a row per point, the best first.

    Each row has components, whitening, C, gamma, val_errors (over all folds), val_accuracy, seconds.
    """
    totals: dict[tuple, dict] = {}
    for train_at, val_at in parts:
        train_at = train_at[:SEARCH_SIZE]
        axes = principal_axes(x[train_at])
        for components in grid.components:
            for whitening in grid.whitenings:
                project = axes.projection(components, whitening)
                fit_to, count_on = (project(x[train_at]), y[train_at]), (project(x[val_at]), y[val_at])
                for trial in choose_svm(*fit_to, *count_on, kernel, grid.Cs, grid.gammas):
                    key = (components, whitening, trial["C"], trial["gamma"])
                    total = totals.setdefault(key, {"val_errors": 0, "seconds": 0.0})
                    total["val_errors"] += trial["val_errors"]
                    total["seconds"] += trial["seconds"]
    counted = sum(len(val_at) for _, val_at in parts)
    rows = [
        dict(zip(("components", "whitening", "C", "gamma"), key, strict=True))
        | {"val_errors": total["val_errors"], "val_accuracy": 1 - total["val_errors"] / counted}
        | {"seconds": total["seconds"]}
        for key, total in totals.items()
    ]
    return sorted(rows, key=lambda row: (row["val_errors"], row["C"], row["gamma"], row["components"]))


def choose_and_fit(x: np.ndarray, y: np.ndarray, parts: list[Fold], kernel: str, grid: Grid) -> Fitted:
    """The protocol: search on the folds `parts`, then one fit to all of x (N, D) and y (N,)."""
    started = time.perf_counter()
    trials = search(x, y, parts, kernel, grid)
    searched, best = time.perf_counter(), trials[0]
    projection = principal_axes(x).projection(best["components"], best["whitening"])
    svm = fit_svm(projection(x), y, kernel, best["C"], best["gamma"])
    return Fitted(projection, svm, trials, searched - started, time.perf_counter() - searched)


def accuracy_metrics(predicted: np.ndarray, y: np.ndarray) -> dict:
    """Errors and accuracy on the test images, with the 95 % Wilson interval of the accuracy."""
    correct = int((predicted == y).sum())
    return {
        "test_errors": len(y) - correct,
        "test_accuracy": correct / len(y),
        "interval": wilson_interval(correct, len(y)),
    }
