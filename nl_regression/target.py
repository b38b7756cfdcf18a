"""The target, its samples, and the two errors that the sweeps measure.

    f*(x) = sin(10 π x⁴)

Its phase is 10πx⁴, so that its local frequency is phase′ / 2π = 20x³ cycles per unit: none at 0, 20 at x = 1. A network
sees n points drawn uniformly from [0, 1] without noise. What it has learned is measured by the largest error

    δ_in = max |f − f*| on [0, 1],      δ_out = max |f − f*| on [0, 1.5],

over a grid whose step is a fiftieth of the shortest period on [0, 1].
Shapes: M networks, n points, G grid points.
"""

import numpy as np

IN_POINTS = 1001  # of the grid on [0, 1]; it goes on with the same step
GRID = np.linspace(0, 1.5, IN_POINTS + (IN_POINTS - 1) // 2)  # (G,)


def target(x: np.ndarray) -> np.ndarray:
    """f*(x) = sin(10 π x⁴), shaped like x."""
    return np.sin(10 * np.pi * x**4)


def local_frequency(x: np.ndarray) -> np.ndarray:
    """Cycles per unit of f* at x: 20x³."""
    return 20 * x**3


def sample_points(n: int, rng: np.random.Generator) -> np.ndarray:
    """n points drawn uniformly from [0, 1], in the order drawn: float64 (n,)."""
    return rng.uniform(0, 1, n)


def deltas(fits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """δ_in and δ_out, (M,) each, of networks whose values on `GRID` are fits (M, G)."""
    errors = np.abs(fits - target(GRID))
    return errors[:, :IN_POINTS].max(1), errors.max(1)
