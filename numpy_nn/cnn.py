"""The convolutional networks of this folder, and the augmentation of both recipes.

Shapes: N images, C channels, H W pixels.
"""

import numpy as np

from numpy_nn.activations import ReLU
from numpy_nn.conv import Conv2d, MaxPool2d
from numpy_nn.layers import BatchNorm2d, Dropout, Flatten, Linear
from numpy_nn.network import Sequential

RECIPES = ("plain", "strong")


def build_network(recipe: str, rng: np.random.Generator, n_classes: int = 10) -> Sequential:
    """Conv → Pool → FC for images (N, 1, 28, 28); `strong` has BatchNorm after each convolution and more channels.

    Channels and pixels: 28×28 → 24×24 → 12×12 → 8×8 → 4×4, so that the last layers see whole strokes.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    c1, c2 = (16, 32) if recipe == "plain" else (24, 48)
    layers = []
    for c_in, c_out in ((1, c1), (c1, c2)):
        layers.append(Conv2d(c_in, c_out, 5, rng=rng))
        if recipe == "strong":
            layers.append(BatchNorm2d(c_out))
        layers += [ReLU(), MaxPool2d(2)]
    layers += [Flatten(), Linear(c2 * 16, 128, rng=rng), ReLU(), Dropout(0.2, rng=rng), Linear(128, n_classes, rng=rng)]
    return Sequential(*layers)


def random_shift(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The batch (N, 1, H, W) moved by up to one pixel each way, all its images alike: next to nothing to compute.

    What leaves on one side comes in on the other; MNIST's rim is empty.
    """
    return np.roll(x, rng.integers(-1, 2, 2), axis=(2, 3))


def random_affine(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each image (N, 1, H, W) turned by up to 12°, scaled by up to 12 %, sheared a little, moved by up to 2 pixels.

    An output pixel reads the input at A (p − middle) + middle + t, between four pixels; beyond the edge it reads the
    edge. One gather for the whole batch, with each image's own A and t.
    """
    n, _, height, width = x.shape
    angle = np.radians(rng.uniform(-12, 12, n))
    scale, shear = rng.uniform(0.88, 1.12, (n, 2)), rng.uniform(-0.15, 0.15, n)
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=1).reshape(n, 2, 2)
    stretch = np.zeros((n, 2, 2))
    stretch[:, 0, 0], stretch[:, 1, 1], stretch[:, 1, 0] = scale[:, 0], scale[:, 1], shear
    A = (turn @ stretch).astype(np.float32)  # (N, 2, 2), on (row, column)
    t = rng.uniform(-2, 2, (n, 2, 1)).astype(np.float32)
    middle = np.array([[(height - 1) / 2], [(width - 1) / 2]], dtype=np.float32)
    grid = np.indices((height, width), dtype=np.float32).reshape(2, -1) - middle  # (2, H·W)
    read = A @ grid + middle + t  # (N, 2, H·W)
    rows, columns = np.clip(read[:, 0], 0, height - 1.001), np.clip(read[:, 1], 0, width - 1.001)
    top, left = rows.astype(np.int32), columns.astype(np.int32)
    down, right = rows - top.astype(np.float32), columns - left.astype(np.float32)  # in [0, 1)
    flat, corner = x.reshape(n, -1), top * width + left  # (N, H·W) each
    upper = (1 - right) * np.take_along_axis(flat, corner, 1) + right * np.take_along_axis(flat, corner + 1, 1)
    corner += width
    lower = (1 - right) * np.take_along_axis(flat, corner, 1) + right * np.take_along_axis(flat, corner + 1, 1)
    return ((1 - down) * upper + down * lower).reshape(x.shape)
