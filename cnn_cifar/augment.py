"""Augmentations of a whole batch at once, each image with random parameters of its own.

    generator = torch.Generator(x.device).manual_seed(0)
    x = random_crop(random_flip(x, generator), generator)        # uint8 (N, 3, H, W) in, the same out

Each comes as a pure function of images and per-image parameters and as a `random_…` one that draws the parameters.
`flip`, `crop` and `cutout` (an erased square) equal torchvision's image by image, `color_jitter` up to its order and
rounding, `rotate` except for what fills the corners. `random_rand_augment` applies each of torchvision's operations to
the images that drew it. Parameters are drawn on the generator's device: a generator on the CPU gives the same ones
everywhere, one on the images' device needs no copy.

Sources: Krizhevsky et al. 2012 (flip, crop); DeVries and Taylor 2017 (Cutout); Cubuk et al. 2020 (RandAugment);
Zhang et al. 2018 (Mixup); Jordan 2024, arXiv 2404.00498 (alternating flip). Shapes: N images, H W pixels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.transforms.v2 import functional as tv

from cnn_cifar.models import CIFAR10_MEAN
from shared_utils.cli import UserError

GRAY = (0.2989, 0.587, 0.114)  # of red, green and blue, as ITU-R BT.601 and torchvision weigh them


# --- flip ---------------------------------------------------------------------------------------------------------


def flip(x: Tensor, mask: Tensor) -> Tensor:
    """Mirror the images where mask (N,) is true, left to right."""
    return torch.where(mask[:, None, None, None], x.flip(-1), x)


def random_flip(x: Tensor, generator: Generator) -> Tensor:
    """Mirror each image with probability ½."""
    _check_images(x)
    return flip(x, flip_coins(len(x), generator).to(x.device))


def flip_coins(n: int, generator: Generator) -> Tensor:
    """A fair coin for each of n images: bool (n,), on the generator's device."""
    return torch.rand(n, generator=generator, device=generator.device) < 0.5


def alternating_flip(x: Tensor, coins: Tensor, epoch: int) -> Tensor:
    """Mirror each image in every other epoch; its coin says in which: two epochs show every image both ways.

    coins: bool (N,), the batch's part of one toss of `flip_coins` for the whole training set. With `random_flip` half
    of the images would look the same in the second epoch as in the first.
    """
    _check_images(x)
    return flip(x, coins ^ (epoch % 2 == 1))


# --- crop ---------------------------------------------------------------------------------------------------------


def crop(x: Tensor, top: Tensor, left: Tensor, padding: int) -> Tensor:
    """The H×W window of each image, padded by reflection, that begins at row top and column left, int64 (N,) each.

    Both run from 0 to 2 padding; `padding` itself gives the image back.
    """
    h, w = x.shape[2:]
    rows, columns = (_reflected(side, padding, x.device) for side in (h, w))
    padded = x[:, :, rows[:, None], columns]  # (N, 3, H + 2p, W + 2p)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (N, 3, 2p + 1, 2p + 1, H, W), a view: nothing is copied
    return windows[torch.arange(len(x), device=x.device), :, top, left]  # (N, 3, H, W)


def random_crop(x: Tensor, generator: Generator, padding: int = 4) -> Tensor:
    """Shift each image by up to `padding` pixels in both directions; the border is filled by reflection.

    Errors: `UserError` when the padding is negative, or not below the image's side: there is nothing left to reflect.
    """
    _check_images(x)
    if not 0 <= padding < min(x.shape[2:]):
        raise UserError(f"images of {x.shape[2]}×{x.shape[3]} cannot be padded with {padding} reflected pixels")
    shape = (2, len(x))
    top, left = torch.randint(2 * padding + 1, shape, generator=generator, device=generator.device).to(x.device)
    return crop(x, top, left, padding)


def _reflected(side: int, padding: int, device: torch.device) -> Tensor:
    """The source of each position of a padded row: p, …, 1, 0, 1, …, side − 1, side − 2, …: int64 (side + 2p,)."""
    position = torch.arange(-padding, side + padding, device=device).abs()
    return (side - 1) - (side - 1 - position).abs()


# --- colour jitter ------------------------------------------------------------------------------------------------


def adjust_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """x · factor: float images of [0, 1] (N, 3, H, W), factor (N,) ≥ 0; the next two take the same."""
    return (x * _per_image(factor)).clamp(0, 1)


def adjust_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """The blend of each image with the mean of its grey values: 0 is that grey, 1 the image, 2 twice as far from it."""
    return _blend(x, _gray(x).mean((1, 2, 3), keepdim=True), factor)


def adjust_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """The blend of each image with its grey version: 0 is grey, 1 the image."""
    return _blend(x, _gray(x), factor)


def adjust_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn each image's hue by shift (N,) of the colour circle, from −½ to ½; value and saturation stay.

    In HSV: value V = max, chroma C = max − min, hue in sixths of the circle from red. Each channel is a function of the
    hue alone, V − C · clamp(min(k, 4 − k), 0, 1) with k = (n + hue) mod 6 and n = 5, 3, 1 for red, green and blue.
    """
    r, g, b = x.unbind(1)  # (N, H, W) each
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    divisor = chroma.masked_fill(chroma == 0, 1)  # grey has no hue, and any will do
    blue_or_green = torch.where(value == g, 2 + (b - r) / divisor, 4 + (r - g) / divisor)
    hue = torch.where(value == r, (g - b) / divisor, blue_or_green)[:, None] + 6 * _per_image(shift)  # (N, 1, H, W)
    n = 5 - 2 * torch.arange(3, device=x.device)[:, None, None]  # made on the device: a copy would make a GPU wait
    k = (hue + n) % 6  # (N, 3, H, W)
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def color_jitter(x: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue in this order, by factors (N,) each; uint8 in, uint8 out.

    torchvision's `ColorJitter` draws the order anew each time and rounds down after each step; here the order is fixed
    and the one rounding at the end is to the nearest.
    """
    y = adjust_contrast(adjust_brightness(x / 255, brightness), contrast)
    y = adjust_hue(adjust_saturation(y, saturation), hue)
    return (255 * y).round().to(torch.uint8)


def random_color_jitter(
    x: Tensor,
    generator: Generator,
    brightness: float = 0.2,
    contrast: float = 0.2,
    saturation: float = 0.2,
    hue: float = 0.05,
) -> Tensor:
    """`color_jitter` with each image's factors uniform in [1 − s, 1 + s] (from 0 on), its hue's shift in [−hue, hue].

    Errors: `UserError` when a strength is negative or that of the hue above ½.
    """
    _check_images(x)
    if min(brightness, contrast, saturation, hue) < 0 or hue > 0.5:
        strengths = f"{brightness:g}, {contrast:g}, {saturation:g}, {hue:g}"
        raise UserError(f"colour jitter: strengths are 0 or more, that of the hue at most 0.5, got {strengths}")
    ranges = [(max(0, 1 - s), 1 + s) for s in (brightness, contrast, saturation)] + [(-hue, hue)]
    uniform = torch.rand(len(x), 4, generator=generator, device=generator.device).to(x.device).unbind(1)
    return color_jitter(x, *(low + (high - low) * u for (low, high), u in zip(ranges, uniform, strict=True)))


def _per_image(factor: Tensor) -> Tensor:
    return factor[:, None, None, None]  # (N, 1, 1, 1)


def _gray(x: Tensor) -> Tensor:
    return sum(weight * x[:, channel, None] for channel, weight in enumerate(GRAY))  # (N, 1, H, W)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    factor = _per_image(factor)
    return (factor * x + (1 - factor) * other).clamp(0, 1)


# --- Cutout -------------------------------------------------------------------------------------------------------


def cutout(x: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Paint a size×size square with CIFAR-10's mean colour, which the network's normalisation makes 0.

    top, left: int64 (N,), the square's first row and column; what lies outside the image is cut off.
    """
    row, column = (torch.arange(side, device=x.device) for side in x.shape[2:])
    in_rows = (row >= top[:, None]) & (row < top[:, None] + size)  # (N, H)
    in_columns = (column >= left[:, None]) & (column < left[:, None] + size)  # (N, W)
    inside = in_rows[:, :, None] & in_columns[:, None]  # (N, H, W)
    channels = [x[:, c].masked_fill(inside, round(255 * mean)) for c, mean in enumerate(CIFAR10_MEAN)]
    return torch.stack(channels, dim=1)


def random_cutout(x: Tensor, generator: Generator, size: int = 8) -> Tensor:
    """`cutout` of a square centred on a pixel that is drawn uniformly from the image.

    Errors: `UserError` when the size is below 1.
    """
    _check_images(x)
    if size < 1:
        raise UserError(f"Cutout: the square's side is at least 1 pixel, got {size}")
    uniform = torch.rand(2, len(x), generator=generator, device=generator.device).to(x.device)
    row, column = ((u * side).long() for u, side in zip(uniform, x.shape[2:], strict=True))  # (N,) each
    return cutout(x, row - size // 2, column - size // 2, size)


# --- rotation -----------------------------------------------------------------------------------------------------


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Turn each image about its middle, counterclockwise by degrees (N,); bilinear, corners filled by reflection."""
    angle = degrees.float() * (math.pi / 180)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    h, w = x.shape[2:]
    # where a pixel of the turned image comes from, in units of half a side
    source = torch.stack([cos, -sin * (h / w), zero, sin * (w / h), cos, zero], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(source, list(x.shape), align_corners=False)  # (N, H, W, 2)
    turned = F.grid_sample(x.float(), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return turned.round().clamp(0, 255).to(torch.uint8)


def random_rotation(x: Tensor, generator: Generator, degrees: float = 15.0) -> Tensor:
    """`rotate` by an angle uniform in ±degrees. Errors: `UserError` when degrees is not from 0 to 180."""
    _check_images(x)
    if not 0 <= degrees <= 180:
        raise UserError(f"rotation: an angle from 0 to 180 degrees, got {degrees:g}")
    uniform = torch.rand(len(x), generator=generator, device=generator.device).to(x.device)
    return rotate(x, degrees * (2 * uniform - 1))


# --- RandAugment --------------------------------------------------------------------------------------------------


def rand_augment_operations(magnitude: float, side: int) -> list[Callable[[Tensor], Tensor]]:
    """The paper's 14 operations at a strength from 0 to 1; those with two directions stand in the list once for each.

    The others stand in it twice, so that all 14 are equally likely. Strengths are torchvision's `RandAugment`'s:
    at 1 a shear by 0.3, a shift by 150 of 331 of the side, a turn by 30°, a blend by ±0.9, 4 bits of 8, all inverted.
    """
    shear, shift, turn = math.degrees(math.atan(0.3 * magnitude)), int(150 / 331 * side * magnitude), 30 * magnitude
    blend, bits, threshold = 0.9 * magnitude, 8 - round(4 * magnitude), 255 * (1 - magnitude)
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    operations = []
    for sign in (-1, 1):
        moves = {"translate": [sign * shift, 0]}, {"translate": [0, sign * shift]}, {"angle": sign * turn}
        shears = {"shear": [sign * shear, 0.0], "center": [0, 0]}, {"shear": [0.0, sign * shear], "center": [0, 0]}
        for change in (*moves, *shears):
            operations.append(lambda x, change=change: tv.affine(x, **{**still, **change}))
        for blended in (tv.adjust_brightness, tv.adjust_saturation, tv.adjust_contrast, tv.adjust_sharpness):
            operations.append(lambda x, blended=blended, factor=1 + sign * blend: blended(x, factor))
        operations.append(lambda x: tv.posterize(x, bits))
        operations.append(lambda x: tv.solarize(x, threshold))
        operations += [tv.autocontrast, tv.equalize, lambda x: x]
    return operations


def random_rand_augment(x: Tensor, generator: Generator, count: int = 2, magnitude: float = 0.3) -> Tensor:
    """RandAugment: `count` operations one after the other, drawn independently for each image.

    Errors: `UserError` when count is below 1 or the strength not from 0 to 1.
    """
    _check_images(x)
    if count < 1 or not 0 <= magnitude <= 1:
        raise UserError(f"RandAugment: operations from 1, strength from 0 to 1, got {count} and {magnitude:g}")
    operations = rand_augment_operations(magnitude, min(x.shape[2:]))
    shape = (count, len(x))
    for chosen in torch.randint(len(operations), shape, generator=generator, device=generator.device).to(x.device):
        result = x.clone()
        sizes = torch.bincount(chosen, minlength=len(operations)).tolist()
        for operation, group in zip(operations, chosen.argsort().split(sizes), strict=True):  # who gets it
            if len(group):
                result[group] = operation(x[group])
        x = result
    return x


# --- Mixup --------------------------------------------------------------------------------------------------------


def mixup(x: Tensor, partner: Tensor, share: Tensor) -> Tensor:
    """λ x + (1 − λ) x[partner] for float images x (N, 3, H, W), partner int64 (N,), λ = share (N,) of [0, 1].

    The loss is mixed alike: λ L(f(x'), y) + (1 − λ) L(f(x'), y[partner]).
    """
    share = _per_image(share)
    return share * x + (1 - share) * x[partner]


def _check_images(x: Tensor) -> None:
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"augmentations take uint8 images (N, 3, H, W), got {x.dtype} {tuple(x.shape)}")
