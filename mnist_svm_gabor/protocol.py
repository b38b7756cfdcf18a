"""How every SVM of this folder is chosen, fitted and tested, whatever its features.

Components, whitening, C and gamma are chosen on validation images that the fit has not seen; then projection and SVM
are fitted once more to training and validation images together, and tested once.

Shapes: N images, D features of an image.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mnist_svm_gabor.features import PrincipalAxes, Projection, principal_axes
from mnist_svm_gabor.svm import SVM, choose_svm, fit_svm
from shared_utils.cli import UserError
from shared_utils.data import Images, load_images, split_positions, stratified_order, subset
from shared_utils.stats import wilson_interval

SEARCH_SIZE = 10_000  # training images of the search, so that it takes seconds
FEW = 1000  # below this many images a single sixth is too few to choose by: five folds

Fold = tuple[np.ndarray, np.ndarray]  # positions to fit to and to count errors on


@dataclass(frozen=True)
class Grid:
    """What is tried, each rising. Cs and gammas as in `fit_svm`, components and whitenings as in `PrincipalAxes`."""

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

    Then the best point's neighbours beyond the ends of the grid are tried, one value changed at a time, as long as
    one of them makes fewer errors: no choice is due to where the grid happens to end.
    Each row has components, whitening, C, gamma, val_errors (over all folds), val_accuracy, seconds.
    """
    parts = [(train_at[:SEARCH_SIZE], val_at) for train_at, val_at in parts]
    axes = [principal_axes(x[train_at]) for train_at, _ in parts]
    rows = try_all(x, y, parts, axes, kernel, grid)
    rows.sort(key=lambda row: (row["val_errors"], row["C"], row["gamma"], row["components"]))
    while True:
        best = rows[0]
        for neighbour in beyond(best, grid):
            rows += try_all(x, y, parts, axes, kernel, neighbour)
        rows.sort(key=lambda row: row["val_errors"])  # a stable sort: with as many errors the earlier point stays first
        if rows[0] is best:
            return rows
        chosen = {"Cs": rows[0]["C"], "gammas": rows[0]["gamma"], "components": rows[0]["components"]}
        grid = replace(grid, **{name: sorted({*getattr(grid, name), value}) for name, value in chosen.items()})


def beyond(best: dict, grid: Grid) -> list[Grid]:
    """For each of C, gamma and components whose best value is the grid's first or last: the next one, as a grid.

    The others keep their best value. The step is the ratio of the last two values; what has one value stays.
    """
    point = {"Cs": best["C"], "gammas": best["gamma"], "components": best["components"]}
    alone = replace(grid, whitenings=[best["whitening"]], **{name: [value] for name, value in point.items()})
    found = []
    for name, value in point.items():
        values = getattr(grid, name)
        if len(values) < 2:
            continue
        for end, inner in ((values[0], values[1]), (values[-1], values[-2])):
            if value == end:
                following = end * end / inner
                found.append(replace(alone, **{name: [round(following) if name == "components" else following]}))
    return found


def try_all(
    x: np.ndarray, y: np.ndarray, parts: list[Fold], axes: list[PrincipalAxes], kernel: str, grid: Grid
) -> list[dict]:
    """A row, as `search` describes it, per point of the grid; axes: those of the vectors that a fold is fitted to."""
    totals: dict[tuple, dict] = {}
    for (train_at, val_at), principal in zip(parts, axes, strict=True):
        for components in grid.components:
            for whitening in grid.whitenings:
                project = principal.projection(components, whitening)
                fit_to, count_on = (project(x[train_at]), y[train_at]), (project(x[val_at]), y[val_at])
                for trial in choose_svm(*fit_to, *count_on, kernel, grid.Cs, grid.gammas):
                    key = (components, whitening, trial["C"], trial["gamma"])
                    total = totals.setdefault(key, {"val_errors": 0, "seconds": 0.0})
                    total["val_errors"] += trial["val_errors"]
                    total["seconds"] += trial["seconds"]
    counted = sum(len(val_at) for _, val_at in parts)
    return [
        dict(zip(("components", "whitening", "C", "gamma"), key, strict=True))
        | {"val_errors": total["val_errors"], "val_accuracy": 1 - total["val_errors"] / counted}
        | {"seconds": total["seconds"]}
        for key, total in totals.items()
    ]


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
