"""One seed for every source of randomness."""

import random
import sys

import numpy as np


def seed_everything(seed: int) -> np.random.Generator:
    """Seed Python, NumPy's legacy generator and (where the script imported it) PyTorch; return a NumPy generator.

    Whatever is random takes the returned generator, or draws from PyTorch's global one after this call.
    PyTorch is seeded on every device. It is not imported here: a NumPy script stays free of it.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
    return np.random.default_rng(seed)


def derived_seed(*parts: int) -> int:
    """A seed below 2**32 that follows from all `parts`, say seed and epoch; other parts give an unrelated one."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])
