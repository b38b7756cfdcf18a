"""Optimisers in the forms of `torch.optim`, so that trajectories can be compared step by step.

Each takes a list of layers, objects with dicts `params` and `grads` of the same keys. `step()` updates every parameter
in place from its current gradient. weight_decay λ adds λ·w to the gradient (L2, not decoupled).
"""

from collections.abc import Sequence

import numpy as np

from numpy_nn.layers import Layer


class Optimizer:
    """Walks over all parameters; a subclass says what one step does to one of them."""

    def __init__(self, layers: Sequence[Layer], lr: float, weight_decay: float = 0.0):
        if not lr > 0 or weight_decay < 0:
            raise ValueError(f"lr must be above 0 and weight_decay 0 or more, got {lr} and {weight_decay}")
        self.layers, self.lr, self.weight_decay, self.t = layers, lr, weight_decay, 0
        self.state: dict[tuple[int, str], dict[str, np.ndarray]] = {}

    def step(self) -> None:
        """Update every parameter."""
        self.t += 1
        for i, layer in enumerate(self.layers):
            for name, w in layer.params.items():
                if name not in layer.grads:
                    raise ValueError(f"{layer!r} has no gradient of {name}: call backward before step")
                g = layer.grads[name]
                if self.weight_decay:
                    g = g + self.weight_decay * w
                self.update(w, g, self.state.setdefault((i, name), {}))

    def update(self, w: np.ndarray, g: np.ndarray, state: dict[str, np.ndarray]) -> None:
        """Change w in place by its gradient g; `state` is this parameter's own memory, empty at first."""
        raise NotImplementedError


class SGD(Optimizer):
    """v ← μ v + g,  w ← w − lr v;  with Nesterov's look-ahead  w ← w − lr (g + μ v).

    Source: Sutskever et al. 2013, in PyTorch's form.
    """

    def __init__(self, layers, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0):
        super().__init__(layers, lr, weight_decay)
        if not 0 <= momentum < 1 or (nesterov and momentum == 0):
            raise ValueError(f"momentum must be in [0, 1), and above 0 for Nesterov's; got {momentum}")
        self.momentum, self.nesterov = momentum, nesterov

    def update(self, w, g, state):
        if self.momentum:
            state["v"] = self.momentum * state.get("v", 0.0) + g
            g = g + self.momentum * state["v"] if self.nesterov else state["v"]
        w -= self.lr * g


class RMSprop(Optimizer):
    """s ← α s + (1 − α) g²,  w ← w − lr g / (sqrt(s) + ε)  (Hinton 2012)."""

    def __init__(self, layers, lr: float = 0.01, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(layers, lr, weight_decay)
        self.alpha, self.eps = alpha, eps

    def update(self, w, g, state):
        state["s"] = self.alpha * state.get("s", 0) + (1 - self.alpha) * g**2
        w -= self.lr * g / (np.sqrt(state["s"]) + self.eps)


class Adam(Optimizer):
    """m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,  w ← w − lr m̂ / (sqrt(v̂) + ε)  (Kingma and Ba 2015).

    m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ) make up for both starting at zero.
    """

    def __init__(self, layers, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0):
        super().__init__(layers, lr, weight_decay)
        self.betas, self.eps = betas, eps

    def update(self, w, g, state):
        beta1, beta2 = self.betas
        state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * g
        state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * g**2
        m_hat, v_hat = state["m"] / (1 - beta1**self.t), state["v"] / (1 - beta2**self.t)
        w -= self.lr * m_hat / (np.sqrt(v_hat) + self.eps)
