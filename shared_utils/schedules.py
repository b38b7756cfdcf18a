"""The learning rate of an update."""

import math


def half_cosine(step: int, updates: int, peak: float) -> float:
    """The learning rate of update `step` (from 0) of `updates`: from `peak` down along half a cosine; 0 at `updates`.

    Source: Loshchilov and Hutter 2017.
    """
    return peak * (1 + math.cos(math.pi * step / updates)) / 2


def one_cycle(step: int, updates: int, peak: float, rise: float = 0.25) -> float:
    """The learning rate of update `step` (from 0) of `updates`: up to `peak` along half a cosine, down to 0 again.

    rise: the fraction of all updates in which it goes up. Source: Smith 2018.
    """
    rise = max(1.0, rise * updates)
    at = min(1, (step + 1) / rise) if step < rise else 1 + (step - rise) / (updates - rise)  # 0 … 1 up, 1 … 2 down
    return peak * (1 - math.cos(math.pi * at)) / 2
