"""Images on the device as one uint8 tensor each for training, validation and test; evaluating a network on them.

Shapes: N images, B batch, H W pixels, K classes.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared_utils.cli import UserError, at_least, positive_int
from shared_utils.data import load_images, subset, train_val_split
from shared_utils.device import autocast
from shared_utils.modes import evaluating

SHAPE = (3, 32, 32)
EVALUATED_TOGETHER = 500  # images
SMALLEST = 32  # pixels: five halvings leave one


@dataclass(frozen=True)
class Split:
    """Images x uint8 (N, C, H, W), or features x float (N, F) made of them, and labels y int64 (N,), on one device."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Data:
    """The three splits, the classes' names, the set's title. `val` is None where nothing is held out."""

    train: Split
    val: Split | None
    test: Split
    classes: tuple[str, ...]
    title: str


def add_data_flags(parser: argparse.ArgumentParser, batch_size: int, val_size: int) -> None:
    """The flags that `load` reads beside those of `make_parser`; with a default `val_size` above 0, 0 is refused."""
    parser.add_argument("--batch-size", type=positive_int, default=batch_size, help="images per update")
    held_out = "training images held out for validation" + ("" if val_size else "; 0 trains on all of them")
    parser.add_argument("--val-size", type=at_least(min(val_size, 1)), default=val_size, help=held_out)


def load(
    args: argparse.Namespace,
    device: torch.device,
    train_size: int | None = None,
    shape: tuple[int, int, int] | None = SHAPE,
) -> Data:
    """`load_splits` as the flags say. Errors: also `UserError` for a batch larger than the training set."""
    data = load_splits(args.dataset, args.data_dir, device, args.val_size, train_size, shape)
    if args.batch_size > len(data.train):
        raise UserError(f"--batch-size {args.batch_size}: there are {len(data.train)} images to train on")
    return data


def load_splits(
    dataset: str,
    data_dir: str,
    device: torch.device,
    val_size: int = 0,
    train_size: int | None = None,
    shape: tuple[int, int, int] | None = SHAPE,
) -> Data:
    """A data set's splits on `device`.

    train_size: train on so many of the images, stratified. shape: None takes images of any size.
    Errors: `UserError` as `load_images`, `train_val_split`, `subset`.
    """
    train, test = (load_images(dataset, split, data_dir, shape=shape) for split in ("train", "test"))
    train, val = train_val_split(train, val_size) if val_size else (train, None)
    if train_size:
        train = subset(train, train_size, np.random.default_rng(0))
    splits = (
        images and Split(*(torch.from_numpy(part).to(device) for part in (images.x, images.y)))
        for images in (train, val, test)
    )
    return Data(*splits, test.classes, test.title)


def pixels(x: Tensor) -> Tensor:
    """uint8 images as floats of [0, 1] in the channels-last layout: (B, C, H, W) → (B, C, H, W)."""
    return (x / 255).contiguous(memory_format=torch.channels_last)


def resized(x: Tensor, side: int) -> Tensor:
    """Float images (B, 3, H, W) at side×side pixels, bilinear; as they are where they have that size."""
    if x.shape[-2:] == (side, side):
        return x
    shrinks = side < max(x.shape[-2:])  # then a pixel is a mean over those that it replaces
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False, antialias=shrinks)


@torch.no_grad()
def logits_of(network: nn.Module, x: Tensor, amp: bool | None = False) -> Tensor:
    """The network's logits for uint8 images x (N, 3, H, W), in evaluation mode: float32 (N, K)."""
    with evaluating(network), autocast(x.device, amp):
        return torch.cat([network(pixels(batch)).float() for batch in x.split(EVALUATED_TOGETHER)])


def share(mask: Tensor) -> float:
    """The fraction of a bool (N,) that is true."""
    return mask.sum().item() / len(mask)


def loss_and_accuracy(network: nn.Module, split: Split, amp: bool | None = False) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy."""
    logits = logits_of(network, split.x, amp)
    return F.cross_entropy(logits, split.y).item(), share(logits.argmax(1) == split.y)
