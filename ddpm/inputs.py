"""Images as the diffusion sees them: of all shades, in [−1, 1].

The first images of the training set are trained on, the last `--val-size` are held out. Shapes: N images (N, C, H, W).
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared_utils.cli import UserError, positive_int
from shared_utils.data import Images, load_images

FEWEST = 10  # images in a part, at least


@dataclass(frozen=True)
class Data:
    """The three parts, the classes' names and the set's title."""

    train: Images
    val: Images
    test: Images
    classes: tuple[str, ...]
    title: str


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The flag that `load` reads beside those of `make_parser`."""
    parser.add_argument(
        "--val-size", type=positive_int, help="how many of the last training images are held out (default: a sixth)"
    )


def load(args: argparse.Namespace) -> Data:
    """The parts that the flags ask for.

    Errors: `UserError` as `load_images`, and when fewer than `FEWEST` are held out, or left to train on.
    """
    train, test = (load_images(args.dataset, split, args.data_dir) for split in ("train", "test"))
    held_out = len(train) // 6 if args.val_size is None else args.val_size
    cut = len(train) - held_out
    if min(held_out, cut) < FEWEST:
        raise UserError(
            f"--val-size {held_out}: of {train.title}'s {len(train)} images hold out {FEWEST} or more, leave {FEWEST}"
        )
    return Data(train[:cut], train[cut:], test, train.classes, train.title)


def scaled(x: Tensor) -> Tensor:
    """uint8 0 … 255 → float32 −1 … 1."""
    return x.float() / 127.5 - 1


def shades(x: Tensor) -> np.ndarray:
    """−1 … 1 → uint8 0 … 255, on the CPU."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu().numpy()
