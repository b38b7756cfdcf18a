"""Activations, elementwise; complex numbers compare by their real part. Shapes: any; the output has the input's."""

import numpy as np

from numpy_nn.layers import Layer


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^−x) = (1 + tanh(x/2)) / 2, which overflows for no x."""
    return (1 + np.tanh(x / 2)) / 2


class ReLU(Layer):
    """y = max(x, 0). Its derivative at 0 is taken as 0."""

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        self._positive = x.real > 0
        return x * self._positive

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        return dy * self._positive


class Sigmoid(Layer):
    """y = σ(x), dy/dx = y (1 − y)."""

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        self._y = sigmoid(x)
        return self._y

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        return dy * self._y * (1 - self._y)


class Tanh(Layer):
    """y = tanh x, dy/dx = 1 − y²."""

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        self._y = np.tanh(x)
        return self._y

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        return dy * (1 - self._y**2)
