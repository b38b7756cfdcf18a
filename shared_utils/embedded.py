"""Data sets that need no download: real digits, drawn shapes, and the text inside every CPython.

Each image function returns (x uint8 (N, C, H, W), y int64 (N,), class names, title).
"""

import numpy as np

SHAPES = ("circle", "ring", "triangle", "square", "star", "cross", "crescent", "bar", "dumbbell", "half disc")


def digits(split: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], str]:
    """scikit-learn's 1,797 handwritten digits, enlarged from 8×8 to 20×20 and centred in 28×28 as MNIST's are.

    The first 1,437 are for training, the last 360 for the test: the file is in the order of collection, so that
    the split keeps most writers apart. Source: Alpaydin and Kaynak, UCI optical recognition of handwritten digits.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    part = slice(None, 1437) if split == "train" else slice(1437, None)
    enlarge = _bilinear(8, 20)  # (20, 8)
    large = enlarge @ pixels[part].reshape(-1, 8, 8) @ enlarge.T  # (N, 20, 20), 0–16
    x = np.zeros((len(large), 1, 28, 28), dtype=np.uint8)
    x[:, 0, 4:24, 4:24] = np.rint(large * (255 / 16))
    return x, labels[part].astype(np.int64), tuple("0123456789"), "scikit-learn's digits (stand-in)"


def shapes(split: str, seed: int = 0, n: int | None = None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], str]:
    """n coloured 32×32 shapes of ten classes (by default 5,000 for training, 1,000 for the test), drawn from `seed`.

    Place, size, angle, both colours, a background gradient, three discs of clutter and the noise are random, so that no
    single pixel tells the class: a linear classifier stays below 60 %, a small CNN passes 95 %. Classes are balanced.
    """
    rng = np.random.default_rng([seed, split == "test"])
    n = n or (5000 if split == "train" else 1000)
    y = rng.permutation(np.arange(n) % len(SHAPES))
    rows, columns = np.mgrid[0:32, 0:32].astype(np.float32)  # (32, 32) each

    def draw(low, high, *size):
        return rng.uniform(low, high, (n, *size)).astype(np.float32)

    # Background: one colour with a gradient, then discs of clutter in other colours.
    background = draw(30, 225, 3)  # (N, 3)
    slope = draw(-1.5, 1.5, 2, 3)  # (N, 2, 3), grey levels a pixel
    x = background[:, :, None, None] + (
        slope[:, 0, :, None, None] * (rows - 15.5) + slope[:, 1, :, None, None] * (columns - 15.5)
    )  # (N, 3, 32, 32)
    for _ in range(3):
        centre, radius, colour = draw(0, 32, 2), draw(1, 2.5), draw(0, 255, 3)
        distance = np.hypot(rows - centre[:, 0, None, None], columns - centre[:, 1, None, None])  # (N, 32, 32)
        x = _paint(x, distance - radius[:, None, None], colour)

    # The shape: its own coordinates (u, v), in which it fills the unit disc.
    centre, radius, angle = draw(12, 20, 2), draw(8, 11.5), draw(-0.4, 0.4)[:, None, None]
    dy = (rows - centre[:, 0, None, None]) / radius[:, None, None]
    dx = (columns - centre[:, 1, None, None]) / radius[:, None, None]
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    outside = np.empty((n, 32, 32), dtype=np.float32)
    for label, name in enumerate(SHAPES):
        chosen = y == label
        outside[chosen] = _outside(name, u[chosen], v[chosen]) * radius[chosen, None, None]
    # At least 70 grey levels from the background in each channel, up or down.
    step = draw(70, 120, 3) * np.where(background > 127.5, -1, 1)
    x = _paint(x, outside, background + step)
    x += rng.standard_normal(x.shape, dtype=np.float32) * 12
    return np.rint(np.clip(x, 0, 255)).astype(np.uint8), y.astype(np.int64), SHAPES, "drawn shapes (stand-in)"


def pydocs() -> str:
    """The English reference text that comes with CPython (`pydoc_data.topics`), about half a million characters."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"


def _bilinear(size: int, target: int) -> np.ndarray:
    """The matrix (target, size) that interpolates linearly between pixel centres."""
    position = np.clip((np.arange(target) + 0.5) * size / target - 0.5, 0, size - 1)  # (target,)
    return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(size)))


def _paint(x: np.ndarray, outside: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Put `colour` (N, 3) where `outside` (N, 32, 32), a distance in pixels, is negative, with a soft edge."""
    cover = np.clip(0.5 - outside, 0, 1)[:, None]  # (N, 1, 32, 32)
    return x + cover * (colour[:, :, None, None] - x)


def _outside(name: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """About the distance from the shape's outline, negative inside, in units of its radius; shaped like u and v."""
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    if name == "circle":
        return r - 0.9
    if name == "ring":
        return np.abs(r - 0.72) - 0.22
    if name == "triangle":
        return np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.5
    if name == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.75
    if name == "star":
        return r - (0.68 + 0.32 * np.cos(5 * theta))
    if name == "cross":
        return np.maximum(np.minimum(np.abs(u), np.abs(v)) - 0.25, np.maximum(np.abs(u), np.abs(v)) - 0.95)
    if name == "crescent":
        return np.maximum(r - 0.95, 0.75 - np.hypot(u - 0.5, v))
    if name == "bar":
        return np.maximum(np.abs(u) - 0.95, np.abs(v) - 0.25)
    if name == "dumbbell":
        return np.hypot(np.abs(u) - 0.55, v) - 0.4
    return np.maximum(r - 0.95, -v - 0.1)  # half disc
