"""The multilayer perceptron of train_mlp.py and evaluate_mlp.py: built in one place, so that a checkpoint fits it.

Shapes: N images, D inputs, K classes.
"""

import itertools

from numpy_nn.activations import ReLU, Sigmoid, Tanh
from numpy_nn.layers import Flatten, Linear
from numpy_nn.network import Sequential

ACTIVATIONS = {"relu": ReLU, "sigmoid": Sigmoid, "tanh": Tanh}


def build_mlp(hidden: list[int], activation: str, inputs: int, classes: int, init: str = "he", rng=None) -> Sequential:
    """Flatten → (Linear → φ) for each width in `hidden` → Linear: (B, 1, H, W) → logits (B, K)."""
    widths = [inputs, *hidden, classes]
    layers = [Flatten()]
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [Linear(fan_in, fan_out, init, rng), ACTIVATIONS[activation]()]
    return Sequential(*layers[:-1])  # the logits stay as they are
