"""Layers one after another, and their file."""

from pathlib import Path

import numpy as np

from numpy_nn.layers import Layer
from numpy_nn.losses import NotFinite
from shared_utils.checkpoint import load_arrays, save_arrays
from shared_utils.cli import UserError


class Sequential:
    """The composition of `layers`, first to last."""

    def __init__(self, *layers: Layer):
        self.layers = list(layers)

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        """x: what the first layer takes; returns what the last one gives. Errors: `NotFinite` for NaN in x."""
        if not np.isfinite(x).all():
            raise NotFinite(f"the input of shape {x.shape} has NaN or infinity in it")
        for layer in self.layers:
            x = layer.forward(x, training)
        return x

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        """Fill every layer's `grads`; dy is the loss's gradient. Returns dx, or None without need_dx."""
        for layer in reversed(self.layers[1:]):
            dy = layer.backward(dy)
        return self.layers[0].backward(dy, need_dx)

    def parameters(self) -> dict[str, np.ndarray]:
        """Name (`0.W`: the layer's number and the parameter's key) → array."""
        return {f"{i}.{name}": array for i, layer in enumerate(self.layers) for name, array in layer.params.items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """Parameters and buffers by name: all that makes up the trained network."""
        buffers = {f"{i}.{name}": array for i, layer in enumerate(self.layers) for name, array in layer.buffers.items()}
        return {**self.parameters(), **buffers}

    def restore(self, arrays: dict[str, np.ndarray], source: str | Path = "the arrays") -> None:
        """Take over `arrays` of the same architecture; nothing changes when one does not fit (`UserError`)."""
        own = self.arrays()
        theirs, ours = ({name: array.shape for name, array in found.items()} for found in (arrays, own))
        if theirs != ours:
            odd = min(set(theirs.items()) ^ set(ours.items()))[0]
            raise UserError(f"{source} is of another network: {odd} is {theirs.get(odd)} there, {ours.get(odd)} here")
        if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
            raise UserError(f"{source}: {bad[0]} has NaN or infinity in it")
        for name, array in own.items():
            array[...] = arrays[name]

    def save(self, path: str | Path) -> None:
        """Write parameters and buffers to an `.npz`."""
        save_arrays(path, **self.arrays())

    def load(self, path: str | Path) -> None:
        """Read what `save` of the same architecture wrote.

        Errors: `UserError`, a ValueError, when the file is missing, damaged, or of another architecture.
        """
        self.restore(load_arrays(path), path)
