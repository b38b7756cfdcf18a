"""Layers without a window: fully connected, patch embedding, normalisation, dropout.

Each has `forward(x, training=False)`, which keeps what the backward pass needs, and `backward(dy)`, which fills `grads`
(the keys of `params`) and returns dx; neither updates a parameter. The mathematics stands in pure functions, which take
complex numbers too, so that the complex-step check can run through them.

The loss is a mean over the batch, and its gradient brings the 1/N: no layer divides by N again.
Shapes: N batch, D features in, M features out, C channels, H W pixels.
"""

import math

import numpy as np


class Layer:
    """What all layers share. `params` and `grads` have the same keys; a layer without parameters has none.

    `buffers` are stored with the parameters but not trained (BatchNorm's running statistics).
    """

    def __init__(self):
        self.params: dict[str, np.ndarray] = {}
        self.grads: dict[str, np.ndarray] = {}
        self.buffers: dict[str, np.ndarray] = {}

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        raise NotImplementedError

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        """Fill `grads` and return dx, shaped like the input; None with need_dx=False, for a first layer."""
        raise NotImplementedError

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in self.params.items())
        return f"{type(self).__name__}({shapes})"


def initial_weights(
    shape: tuple[int, ...], fan_in: int, fan_out: int, init: str, rng: np.random.Generator | None, dtype
) -> np.ndarray:
    """Normal weights of variance 2 / fan_in (`he`: He et al. 2015) or 2 / (fan_in + fan_out) (`xavier`: Glorot 2010).

    He's keeps the variance through a ReLU, which sets half of it to zero; Xavier's through a linear or tanh layer, in
    both directions. rng None draws from a generator seeded with 0.
    """
    if min(shape) < 1:
        raise ValueError(f"sizes must be 1 or more, got weights of shape {shape}")
    variances = {"he": 2 / fan_in, "xavier": 2 / (fan_in + fan_out)}
    if init not in variances:
        raise ValueError(f"init must be he or xavier, got {init!r}")
    rng = np.random.default_rng(0) if rng is None else rng
    return (rng.standard_normal(shape) * math.sqrt(variances[init])).astype(dtype)


def check_shape(layer: Layer, x: np.ndarray, wanted: tuple) -> None:
    """Compare x.shape with `wanted`, where a string stands for any size. `ValueError` names both and the layer."""
    fits = x.ndim == len(wanted) and all(isinstance(w, str) or s == w for s, w in zip(x.shape, wanted, strict=True))
    if not fits:
        shape = "(" + ", ".join(map(str, wanted)) + ")"
        raise ValueError(f"{layer!r} takes an input of shape {shape}, got {x.shape}")


class Linear(Layer):
    """y = x W + b.  x: (N, D), W: (D, M), b: (M,), y: (N, M)."""

    def __init__(self, in_features: int, out_features: int, init="he", rng=None, dtype=np.float32):
        super().__init__()
        W = initial_weights((in_features, out_features), in_features, out_features, init, rng, dtype)
        self.params = {"W": W, "b": np.zeros(out_features, dtype)}

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        check_shape(self, x, ("N", self.params["W"].shape[0]))
        self._x = x
        return x @ self.params["W"] + self.params["b"]  # (N, M)

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        self.grads = {"W": self._x.T @ dy, "b": dy.sum(0)}
        return dy @ self.params["W"].T if need_dx else None  # (N, D)


class PatchEmbedding(Layer):
    """A Linear layer on each patch of p × p pixels, p = patch_size: (N, 1, H, W) → (N, H/p, W/p, dim).

    28×28 with p = 4 gives 7×7 patches. It is a convolution whose stride equals its kernel (Dosovitskiy et al. 2021).
    W: (p², dim), rows in the order of the patch's pixels, row by row; b: (dim,).
    """

    def __init__(self, patch_size: int = 4, dim: int = 8, init="he", rng=None, dtype=np.float32):
        super().__init__()
        self.patch_size = patch_size
        W = initial_weights((patch_size**2, dim), patch_size**2, dim, init, rng, dtype)
        self.params = {"W": W, "b": np.zeros(dim, dtype)}

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        check_shape(self, x, ("N", 1, "H", "W"))
        p, (n, _, height, width) = self.patch_size, x.shape
        if height % p or width % p:
            raise ValueError(f"{self!r}: {height}×{width} pixels cannot be cut into patches of {p}×{p}")
        rows, columns = height // p, width // p
        patches = x.reshape(n, rows, p, columns, p).transpose(0, 1, 3, 2, 4)  # (N, rows, columns, p, p)
        self._x, self._shape = patches.reshape(-1, p * p), x.shape  # (N·rows·columns, p²)
        y = self._x @ self.params["W"] + self.params["b"]  # (N·rows·columns, dim)
        return y.reshape(n, rows, columns, -1)

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        flat = dy.reshape(-1, dy.shape[-1])  # (N·rows·columns, dim)
        ones = np.ones(len(flat), flat.dtype)  # as a product: several times as fast as sum(0) on so thin an array
        self.grads = {"W": self._x.T @ flat, "b": ones @ flat}
        if not need_dx:
            return None
        p = self.patch_size
        patches = (flat @ self.params["W"].T).reshape(*dy.shape[:3], p, p)  # (N, rows, columns, p, p)
        return patches.transpose(0, 1, 3, 2, 4).reshape(self._shape)  # (N, 1, H, W)


class Flatten(Layer):
    """(N, …) → (N, D)."""

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        self._shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        return dy.reshape(self._shape) if need_dx else None


class Dropout(Layer):
    """In training each number is zero with probability p, the others are divided by 1 − p; otherwise y = x.

    The division keeps the mean, so that nothing needs scaling afterwards (Srivastava et al. 2014, "inverted" form).
    """

    def __init__(self, p: float = 0.5, rng=None, dtype=np.float32):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"the probability of dropping must be in [0, 1), got {p}")
        self.p, self._rng = p, np.random.default_rng(0) if rng is None else rng
        self.dtype = np.dtype(dtype)

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        if not training or self.p == 0:
            self._mask = None
            return x
        kept = self._rng.random(x.shape, dtype=np.float32) >= self.p
        self._mask = kept * np.asarray(1 / (1 - self.p), self.dtype)
        return x * self._mask

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        return dy if self._mask is None else dy * self._mask


def batch_norm(x, gamma, beta, mean, var, eps):
    """y = γ x̂ + β with x̂ = (x − mean) / sqrt(var + eps); returns (y, x̂, 1 / sqrt(var + eps)). All broadcast."""
    inverse = 1 / np.sqrt(var + eps)
    x_hat = (x - mean) * inverse
    return gamma * x_hat + beta, x_hat, inverse


class _BatchNorm(Layer):
    """Batch normalisation (Ioffe and Szegedy 2015) over all axes but the channel's.

    In training, mean and biased variance come from the batch; the running ones are moved by `momentum` towards them,
    the variance in its unbiased form, as PyTorch does. In evaluation the running ones are used.
    """

    axes: tuple[int, ...]

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, dtype=np.float32):
        super().__init__()
        self.eps, self.momentum, self.dtype = eps, momentum, np.dtype(dtype)
        self.params = {"gamma": np.ones(num_features, dtype), "beta": np.zeros(num_features, dtype)}
        self.buffers = {"mean": np.zeros(num_features, dtype), "var": np.ones(num_features, dtype)}

    def _wide(self, a: np.ndarray) -> np.ndarray:
        return a if self.axes == (0,) else a[:, None, None]  # (C,) or (C, 1, 1)

    def forward(self, x: np.ndarray, training: bool = False) -> np.ndarray:
        channels = len(self.params["gamma"])
        check_shape(self, x, ("N", channels) if self.axes == (0,) else ("N", channels, "H", "W"))
        n = x.size // channels
        if training and n < 2:
            raise ValueError(
                f"{self!r} needs at least two values a channel in training, got a batch of shape {x.shape}"
            )
        if training:
            mean = x.mean(self.axes)
            var = ((x - self._wide(mean)) ** 2).mean(self.axes)  # no abs: a complex step must pass through
            for name, batch in (("mean", mean), ("var", var * (n / (n - 1)))):
                self.buffers[name] = ((1 - self.momentum) * self.buffers[name] + self.momentum * batch.real).astype(
                    self.dtype
                )
        else:
            mean, var = self.buffers["mean"], self.buffers["var"]
        gamma, beta = self._wide(self.params["gamma"]), self._wide(self.params["beta"])
        y, self._x_hat, self._inverse = batch_norm(x, gamma, beta, self._wide(mean), self._wide(var), self.eps)
        self._batch = n if training else None
        return y

    def backward(self, dy: np.ndarray, need_dx: bool = True) -> np.ndarray | None:
        self.grads = {"gamma": (dy * self._x_hat).sum(self.axes), "beta": dy.sum(self.axes)}
        if not need_dx:
            return None
        scale = self._wide(self.params["gamma"]) * self._inverse
        if self._batch is None:
            return dy * scale
        # Mean and variance depend on every x of the batch: both their paths subtract a term.
        of_mean = self._wide(self.grads["beta"]) / self._batch
        of_var = self._x_hat * self._wide(self.grads["gamma"]) / self._batch
        return scale * (dy - of_mean - of_var)


class BatchNorm1d(_BatchNorm):
    """Normalises each feature of (N, C). gamma, beta: (C,)."""

    axes = (0,)


class BatchNorm2d(_BatchNorm):
    """Normalises each channel of (N, C, H, W). gamma, beta: (C,)."""

    axes = (0, 2, 3)
