"""Is a difference real? Intervals for a proportion, a test for two classifiers, mean and spread over seeds."""

import math
from collections.abc import Sequence

import numpy as np


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927); z = 1.96 covers 95 %.

    It stays inside [0, 1] and is right near 0 and 1, where p ± z·sqrt(p(1−p)/n) is not.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} of {trials} is no proportion")
    p, shrink = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / shrink
    half = z * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials)) / shrink
    # At 0 and at n successes the bound is exactly 0 or 1; the formula misses it by a rounding error.
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == trials else centre + half)


def mcnemar(correct_a: np.ndarray, correct_b: np.ndarray) -> tuple[int, int, float]:
    """McNemar's exact test of two classifiers on the same images (McNemar 1947; Dietterich 1998).

    correct_a, correct_b: bool (N,). Returns (only a right, only b right, two-sided p). Under the null hypothesis each
    image on which they differ is a fair coin, so p is twice a binomial tail.
    """
    a, b = np.asarray(correct_a, dtype=bool), np.asarray(correct_b, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"needs two vectors of one length, got shapes {a.shape} and {b.shape}")
    only_a, only_b = int((a & ~b).sum()), int((~a & b).sum())
    n = only_a + only_b
    tail = ways = 1  # the ways in which 0 of n images fall to the rarer side; then 1, 2, …
    for k in range(min(only_a, only_b)):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return only_a, only_b, min(1.0, 2 * tail / 2**n)  # whole numbers until the division: no underflow


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n − 1); the deviation of a single value is 0."""
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no values")
    return float(values.mean()), float(values.std(ddof=1)) if values.size > 1 else 0.0


def half_width(values: Sequence[float], confidence: float = 0.95) -> float | None:
    """Half of the confidence interval of the mean of `values` (Student 1908): the mean ± this. None for one value.

    For a comparison give it the paired differences, one for each seed.
    """
    from scipy.stats import t  # takes a second to import

    n = len(values)
    if n < 2:
        return None
    return float(t.ppf((1 + confidence) / 2, n - 1)) * mean_std(values)[1] / math.sqrt(n)
