"""Images as rows of pixels, the same ones in every script of this folder.

Shapes: N images, D pixels (784 = 28 × 28).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared_utils.cli import ExperimentParser, positive_int
from shared_utils.data import Images, load_images, split_positions

SIDE = 28


@dataclass(frozen=True)
class Inputs:
    """Pixels, uint8 (N, 784), and labels, int64 (N,), of the three parts, in the data set's own order."""

    x_train: Tensor
    y_train: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    title: str


def add_data_flags(parser: ExperimentParser) -> None:
    """The flag that `load_pixels` reads beside those of every script."""
    parser.add_argument("--val-size", type=positive_int, default=5000, help="training images held out for validation")


def load_pixels(args, device: torch.device | str = "cpu") -> Inputs:
    """Training, validation (`--val-size` of the training images, the same whatever the seed) and test images.

    Errors: `UserError` when the set is missing or its images are not of 28×28 pixels.
    """
    images = load_images(args.dataset, "train", args.data_dir, shape=(1, SIDE, SIDE))
    test = load_images(args.dataset, "test", args.data_dir, shape=(1, SIDE, SIDE))
    train, val = split_positions(images.y, args.val_size)
    parts = [part for found in (images[train], images[val], test) for part in _tensors(found, device)]
    return Inputs(*parts, images.classes, images.title)


def _tensors(images: Images, device) -> tuple[Tensor, Tensor]:
    x = np.ascontiguousarray(images.x).reshape(len(images), -1)
    return torch.from_numpy(x).to(device), torch.from_numpy(images.y).to(device)


def pixels(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (N, D) → values in [0, 1] of `dtype`."""
    return x.to(dtype).div_(255)


def first_of_each(y: Tensor, n: int, classes: int) -> Tensor:
    """Positions in y of the first n images of each class, class by class: int64 (≤ n · classes,)."""
    return torch.cat([torch.nonzero(y == label)[:n, 0] for label in range(classes)])
