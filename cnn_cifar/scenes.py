"""Scenes to find digits in: digits of several sizes, turned, at random places, among shreds (cut-outs) of other digits.

A scene is the pixelwise maximum of its layers: each digit and each shred is one layer, its image put there by an affine
map. A digit's box is the tightest one around what its own layer shows, so it is exact even where digits overlap.
Everything is drawn from a generator: the same seed and digits give the same scenes.
Source: Mnih et al. 2014, Recurrent Models of Visual Attention (MNIST among shreds of digits).
Shapes: N scenes uint8 (N, 1, 128, 128), L layers of a kind, boxes (left, top, right, bottom) in pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cnn_cifar.inputs import pixels

SIDE = 128  # pixels of a scene
CELLS = 3  # in each direction; a digit stands near the middle of one, no two in the same
MOST = 6  # digits of a scene; the fewest are 2
SIZES = 22.0, 44.0  # pixels of a side of the digit's image, whose strokes fill about two thirds of it
DEGREES, JITTER = 15.0, 9.0  # the largest turn; the largest offset from the cell's middle, in pixels
SHREDS, SHRED = 10, 8  # how many, none of them to be found, and their side in pixels
NOISE = 0.08  # standard deviation of what is added to every pixel
INK = 0.3  # a pixel this bright belongs to a digit
TOGETHER = 64  # scenes


def laid(images: Tensor, x: Tensor, y: Tensor, size: Tensor, turn: Tensor) -> Tensor:
    """Each image of (n, 1, h, h) with its middle at (x, y) pixels, `size` pixels large, turned by `turn` rad.

    Black elsewhere: (n, SIDE, SIDE).
    """
    grow = SIDE / size
    cos, sin = grow * turn.cos(), grow * turn.sin()
    right, down = 2 * x / SIDE - 1, 2 * y / SIDE - 1  # in units of half a side, from the middle
    rows = [cos, -sin, -cos * right + sin * down, sin, cos, -sin * right - cos * down]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), [len(images), 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]


def boxes_of(layers: Tensor) -> Tensor:
    """The tightest box around each layer's bright pixels: (n, H, W) → (n, 4), zeros where nothing is bright."""
    ink = layers > INK
    found = []
    for axis in (1, 2):  # over rows: which columns; over columns: which rows
        some = ink.any(axis).float()  # (n, W) or (n, H)
        found.append((some.argmax(1), some.shape[1] - some.flip(1).argmax(1)))
    (left, right), (top, bottom) = found
    return torch.stack([left, top, right, bottom], 1).float() * ink.flatten(1).any(1, keepdim=True)


def draw_scenes(x: Tensor, y: Tensor, n: int, generator: Generator) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """n scenes of the digits x uint8 (M, 1, 28, 28) with labels y (M,), on the CPU.

    Returns the scenes and, for each, what torchvision's detectors learn from: `boxes` float32 (D, 4) and `labels` int64
    (D,), 1 + the class, as 0 is the background.
    """
    scenes, targets = [], []
    for start in range(0, n, TOGETHER):
        some, found = _draw(x, y, min(TOGETHER, n - start), generator)
        scenes.append(some)
        targets += found
    return torch.cat(scenes), targets


def _draw(x: Tensor, y: Tensor, n: int, generator: Generator) -> tuple[Tensor, list[dict[str, Tensor]]]:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    # Digits. Each scene's cells in a random order; the first ones get a digit.
    cell = torch.rand(n, CELLS**2, generator=generator).argsort(1)[:, :MOST]  # (n, L)
    count = torch.randint(2, MOST + 1, (n,), generator=generator)
    there = torch.arange(MOST) < count[:, None]  # (n, L)
    chosen = torch.randint(len(x), (n * MOST,), generator=generator)
    size, turn = uniform(*SIZES, n * MOST), math.radians(DEGREES) * uniform(-1, 1, n * MOST)
    middles = (torch.stack([cell % CELLS, cell // CELLS]).flatten(1) + 0.5) * SIDE / CELLS  # (2, n L): x and y
    at = middles + JITTER * uniform(-1, 1, 2, n * MOST)
    at = torch.minimum(torch.maximum(at, size / 2), SIDE - size / 2)  # all of it within the scene
    layers = laid(pixels(x[chosen]), *at, size, turn) * there.view(-1, 1, 1)
    boxes, labels = boxes_of(layers).view(n, MOST, 4), y[chosen].view(n, MOST) + 1
    there &= boxes[..., 2] > 0  # an image too dark to be seen is not to be found
    # Shreds: a square cut out of a digit anywhere.
    many = n * SHREDS
    corners = torch.randint(x.shape[-1] - SHRED + 1, (2, many, 1), generator=generator) + torch.arange(SHRED)
    torn = pixels(x[torch.randint(len(x), (many,), generator=generator)])[:, 0]
    rows, columns = corners[0][:, :, None], corners[1][:, None]
    torn = torn[torch.arange(many)[:, None, None], rows, columns]  # (many, SHRED, SHRED)
    places, sizes = uniform(SHRED, SIDE - SHRED, 2, many), uniform(0.8 * SHRED, 1.6 * SHRED, many)
    shreds = laid(torn[:, None], *places, sizes, math.pi * uniform(-1, 1, many))

    scene = torch.cat([layers.view(n, MOST, SIDE, SIDE), shreds.view(n, SHREDS, SIDE, SIDE)], 1).amax(1, keepdim=True)
    scene = scene + NOISE * torch.randn(scene.shape, generator=generator)
    targets = [{"boxes": boxes[i][there[i]], "labels": labels[i][there[i]]} for i in range(n)]
    return (255 * scene.clamp(0, 1)).round().byte(), targets
