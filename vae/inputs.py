"""Binarised 14×14 images, the same ones in every script of this folder.

28×28 → the mean of each 2×2 block → 1 where it is above 128, else 0: 196 pixels of 0 and 1.
Shapes: N images.
"""

from dataclasses import dataclass

import numpy as np

from shared_utils.cli import ExperimentParser, UserError, positive_int
from shared_utils.data import Images, binarize, downsample, load_images, per_class, stratified_order, train_val_split

SIDE = 14
STAND_IN = "digits"


@dataclass(frozen=True)
class Inputs:
    """Images of 0 and 1, float32 (N, 196), and labels, int64 (N,), of the three parts."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    classes: tuple[str, ...]
    title: str


def add_data_flags(parser: ExperimentParser) -> None:
    """The flags that `load_binary` reads."""
    parser.add_argument("--per-class", type=positive_int, default=1000, help="training images of each class")
    parser.add_argument("--val-size", type=positive_int, default=1000, help="images held out for validation")


def load_binary(args) -> Inputs:
    """Exactly `--per-class` training images of each class, `--val-size` others for validation, all test images.

    Which ones does not depend on `--seed`. A stand-in that has fewer gives what it has, and says so in its title.
    Errors: `UserError` when another set has fewer of a class.
    """
    images = load_images(args.dataset, "train", args.data_dir, shape=(1, 28, 28))
    test = load_images(args.dataset, "test", args.data_dir, shape=(1, 28, 28))
    # A folder's images come class by class: in this order the first n are a stratified sample.
    test = test[stratified_order(test.y, np.random.default_rng(0))]
    train, val = train_val_split(images, args.val_size)
    fewest = int(np.bincount(train.y, minlength=len(train.classes)).min())
    wanted, title = args.per_class, images.title
    if fewest < wanted and args.dataset == STAND_IN:
        wanted = fewest
        title = f"{title}, {wanted} a class"
    try:
        train = per_class(train, wanted, np.random.default_rng(0))
    except UserError as error:
        hint = f"; try --per-class {fewest}" if fewest else ""
        raise UserError(f"{error} (beside {args.val_size} for validation){hint}") from None
    return Inputs(
        binary_vectors(train), train.y, binary_vectors(val), binary_vectors(test), test.y, train.classes, title
    )


def binary_vectors(images: Images) -> np.ndarray:
    """Images of 28×28 → float32 (N, 196) of 0 and 1."""
    return binarize(downsample(images.x)).reshape(len(images), -1).astype(np.float32)
