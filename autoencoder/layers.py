"""Layers on PyTorch tensors, each with its backward pass written out; only the tests use autograd, to compare with.

Each layer has `forward(x, training=False)`, which keeps what the backward pass needs, and `backward(dy)`, which fills
`grads` (the keys of `params`) and returns dx; neither updates a parameter. The loss is a mean over the batch, and its
gradient brings the 1/N: no layer divides by N again.

Tensors are float32 (float64 in the gradient checks) on any device. Under `shared_utils.device.autocast` the matrix
products alone run in bfloat16; sums, statistics and parameters keep the parameters' type.
Shapes: N images of a batch, D features in, M features out.
"""

import math

import torch
from torch import Tensor

from shared_utils.cli import UserError

INITS = ("he", "xavier")


class Layer:
    """What all layers share. `params` and `grads` have the same keys; a layer without parameters has none.

    `buffers` are stored with the parameters but not trained (BatchNorm's running statistics).
    """

    def __init__(self):
        self.params: dict[str, Tensor] = {}
        self.grads: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        raise NotImplementedError

    def backward(self, dy: Tensor, need_dx: bool = True) -> Tensor | None:
        """Fill `grads` and return dx, shaped like the input; None with need_dx=False, for a first layer."""
        raise NotImplementedError

    def to(self, *args) -> None:
        """Move parameters and buffers to a device or a dtype, as `Tensor.to`."""
        self.params = {name: value.to(*args) for name, value in self.params.items()}
        self.buffers = {name: value.to(*args) for name, value in self.buffers.items()}
        self.grads = {}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.params.items())
        return f"{type(self).__name__}({shapes})"


def initial_weights(in_features: int, out_features: int, init: str) -> Tensor:
    """Normal weights (D, M) of variance 2 / D (`he`: He et al. 2015) or 2 / (D + M) (`xavier`: Glorot and Bengio 2010).

    He's keeps the signal's size through a ReLU, which sets half of its inputs to zero; Xavier's through a linear layer,
    a compromise between both directions. Drawn from PyTorch's global generator, on the CPU: the same on every device.
    """
    if min(in_features, out_features) < 1:
        raise UserError(f"a layer needs at least one feature on both sides, got {in_features} → {out_features}")
    variances = {"he": 2 / in_features, "xavier": 2 / (in_features + out_features)}
    if init not in variances:
        raise UserError(f"init must be {' or '.join(INITS)}, got {init!r}")
    return torch.randn(in_features, out_features) * math.sqrt(variances[init])


def operand(x: Tensor) -> Tensor:
    """x as a matrix product takes it: in bfloat16 under autocast. Converted here, once, and not in each product."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class Linear(Layer):
    """y = x W + b.  x: (N, D), W: (D, M), b: (M,), y: (N, M)."""

    def __init__(self, in_features: int, out_features: int, init: str = "he"):
        super().__init__()
        self.params = {"W": initial_weights(in_features, out_features, init), "b": torch.zeros(out_features)}

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        if x.ndim != 2 or x.shape[1] != len(self.params["W"]):
            raise ValueError(f"{self!r} takes an input of shape (N, {len(self.params['W'])}), got {tuple(x.shape)}")
        self._x, self._W = operand(x), operand(self.params["W"])
        return (self._x @ self._W).to(x.dtype).add_(self.params["b"])  # (N, M)

    def backward(self, dy: Tensor, need_dx: bool = True) -> Tensor | None:
        low = operand(dy)
        self.grads = {"W": (self._x.T @ low).to(dy.dtype), "b": dy.sum(0)}
        return (low @ self._W.T).to(dy.dtype) if need_dx else None  # (N, D)


class BatchNorm1d(Layer):
    """y = γ x̂ + β,  x̂ = (x − μ) / √(σ² + ε), column by column.  x, y: (N, D); γ, β: (D,); affine=False: y = x̂.

    In training μ and σ² are the batch's own mean and biased variance, and depend on x: the gradient runs through them.
    In evaluation they are running averages: after each batch running ← (1 − momentum) running + momentum · batch's,
    of the mean and of the unbiased variance.
    Errors: `UserError` for a batch of one in training, which has no variance. Source: Ioffe and Szegedy 2015.
    """

    def __init__(self, features: int, momentum: float = 0.1, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        if affine:
            self.params = {"gamma": torch.ones(features), "beta": torch.zeros(features)}
        self.buffers = {"running_mean": torch.zeros(features), "running_var": torch.ones(features)}

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        mean, var = self.buffers["running_mean"], self.buffers["running_var"]
        if training:
            n = len(x)
            if n < 2:
                raise UserError("BatchNorm cannot be trained on a batch of one image: it has no variance")
            mean = x.mean(0)
        centred = x - mean  # (N, D)
        if training:
            var = centred.square().mean(0)  # torch.var_mean takes twenty times as long on a CPU, down the columns
            self.buffers["running_mean"].lerp_(mean, self.momentum)
            self.buffers["running_var"].lerp_(var * (n / (n - 1)), self.momentum)
        self._training = training
        self._inverse = (var + self.eps).rsqrt()  # (D,)
        self._x_hat = centred.mul_(self._inverse)
        if not self.params:
            return self._x_hat
        return torch.addcmul(self.params["beta"], self.params["gamma"], self._x_hat)

    def backward(self, dy: Tensor, need_dx: bool = True) -> Tensor | None:
        """In training dx = γ/√(σ² + ε) · (dy − mean(dy) − x̂ · mean(dy · x̂)), the means over the batch."""
        dgamma, dbeta = (dy * self._x_hat).sum(0), dy.sum(0)
        self.grads = {"gamma": dgamma, "beta": dbeta} if self.params else {}
        if not need_dx:
            return None
        scale = self.params.get("gamma", 1) * self._inverse  # (D,)
        if not self._training:
            return dy * scale
        # The docstring's dx, multiplied out: −scale · mean(dy) − x̂ · scale · mean(dy x̂), then + scale · dy.
        part = scale / len(dy)
        return torch.addcmul(-part * dbeta, self._x_hat, -part * dgamma).addcmul_(dy, scale)  # (N, D)

    def scale(self) -> Tensor:
        """What the layer multiplies its input by in evaluation, γ/√(σ² + ε): (D,)."""
        return self.params.get("gamma", 1) * (self.buffers["running_var"] + self.eps).rsqrt()


class ReLU(Layer):
    """y = max(x, 0); its derivative at 0 is taken as 0. Any shape."""

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        self._y = x.clamp(min=0)
        return self._y

    def backward(self, dy: Tensor, need_dx: bool = True) -> Tensor | None:
        return dy * (self._y > 0)


class GELU(Layer):
    """y = x Φ(x), Φ the normal distribution function; dy/dx = Φ(x) + x φ(x). Source: Hendrycks and Gimpel 2016."""

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        self._x = x
        # Φ(x); torch.special.ndtr gives the same and takes seven times as long.
        self._cdf = (x * math.sqrt(0.5)).erf_().mul_(0.5).add_(0.5)
        return x * self._cdf

    def backward(self, dy: Tensor, need_dx: bool = True) -> Tensor | None:
        density = (self._x.square() * -0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))  # φ(x)
        return torch.addcmul(self._cdf, self._x, density).mul_(dy)


class Sigmoid(Layer):
    """y = 1 / (1 + e⁻ˣ); dy/dx = y (1 − y)."""

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        self._y = torch.sigmoid(x)
        return self._y

    def backward(self, dy: Tensor, need_dx: bool = True) -> Tensor | None:
        return (1 - self._y).mul_(self._y).mul_(dy)


class Dropout(Layer):
    """In training each number is set to 0 with probability p, else divided by 1 − p; in evaluation nothing happens.

    The mask is drawn from PyTorch's global generator. Source: Srivastava et al. 2014, in its inverted form.
    """

    def __init__(self, p: float = 0.5):
        super().__init__()
        if not 0 <= p < 1:
            raise UserError(f"a dropout probability is 0 or more and below 1, got {p}")
        self.p = p

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        self._mask = (torch.rand_like(x) >= self.p).to(x.dtype).div_(1 - self.p) if training and self.p else None
        return x if self._mask is None else x * self._mask

    def backward(self, dy: Tensor, need_dx: bool = True) -> Tensor | None:
        return dy if self._mask is None else dy * self._mask


class GaussianNoise(Layer):
    """In training y = x + σ ε, ε ~ N(0, 1) from PyTorch's global generator; in evaluation nothing happens."""

    def __init__(self, sigma: float):
        super().__init__()
        if not sigma >= 0:
            raise UserError(f"the standard deviation of noise is 0 or more, got {sigma}")
        self.sigma = sigma

    def forward(self, x: Tensor, training: bool = False) -> Tensor:
        return torch.add(x, torch.randn_like(x), alpha=self.sigma) if training and self.sigma else x

    def backward(self, dy: Tensor, need_dx: bool = True) -> Tensor | None:
        return dy


ACTIVATIONS = {"relu": ReLU, "gelu": GELU, "linear": None}  # linear: no layer at all
