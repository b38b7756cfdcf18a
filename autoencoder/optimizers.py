"""SGD and AdamW in the forms of `torch.optim`, so that trajectories can be compared step by step.

Each takes a list of layers, objects with dicts `params` and `grads` of the same keys. `step()` updates every parameter
in place from the layers' current gradients; `lr` may be changed between steps. Weight decay applies to the weights `W`
alone, not to biases and not to BatchNorm's scale and shift.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from autoencoder.layers import Layer


class Optimizer:
    """Walks over all parameters; a subclass says what one step does to one of them."""

    def __init__(self, layers: Sequence[Layer], lr: float, weight_decay: float = 0.0):
        if not lr > 0 or weight_decay < 0:
            raise ValueError(f"lr must be above 0 and weight_decay 0 or more, got {lr} and {weight_decay}")
        self.layers, self.lr, self.weight_decay, self.t = layers, lr, weight_decay, 0
        self.state: dict[tuple[int, str], dict[str, Tensor]] = {}

    def step(self) -> None:
        """Update every parameter."""
        self.t += 1
        for i, layer in enumerate(self.layers):
            for name, w in layer.params.items():
                if name not in layer.grads:
                    raise ValueError(f"{layer!r} has no gradient of {name}: call backward before step")
                decay = self.weight_decay if name == "W" else 0.0
                self.update(w, layer.grads[name], decay, self.state.setdefault((i, name), {}))

    def update(self, w: Tensor, g: Tensor, decay: float, state: dict[str, Tensor]) -> None:
        """Change w in place by its gradient g, which it may overwrite; `state` is this parameter's memory."""
        raise NotImplementedError


class SGD(Optimizer):
    """g ← g + λ w,  v ← μ v + g,  w ← w − lr v: momentum μ, and weight decay λ as the gradient of λ/2 · |w|² (L2)."""

    def __init__(self, layers: Sequence[Layer], lr: float, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(layers, lr, weight_decay)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.momentum = momentum

    def update(self, w, g, decay, state):
        if decay:
            g = g.add_(w, alpha=decay)
        if self.momentum:
            v = state["v"].mul_(self.momentum).add_(g) if "v" in state else state.setdefault("v", g.clone())
        else:
            v = g
        w.sub_(v, alpha=self.lr)


class AdamW(Optimizer):
    """m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,  w ← w − lr λ w − lr m̂ / (√v̂ + ε).

    m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ) correct for both starting at zero. The decay is decoupled from the
    gradient, and so not divided by √v̂. Sources: Kingma and Ba 2015; Loshchilov and Hutter 2019.
    """

    def __init__(self, layers: Sequence[Layer], lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay: float = 0.0):
        super().__init__(layers, lr, weight_decay)
        self.betas, self.eps = betas, eps

    def update(self, w, g, decay, state):
        beta1, beta2 = self.betas
        if not state:
            state |= {"m": torch.zeros_like(w), "v": torch.zeros_like(w)}
        # m ← m + (1 − β₁)(g − m);  v ← β₂ v + (1 − β₂) g · g, in place: the optimiser's cost is memory traffic
        m, v = state["m"].lerp_(g, 1 - beta1), state["v"].mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if decay:
            w.mul_(1 - self.lr * decay)
        # w ← w − lr √c₂ / c₁ · m / (√v + ε √c₂),  c = 1 − βᵗ: the docstring's step, its fraction multiplied by √c₂
        c1, root = 1 - beta1**self.t, (1 - beta2**self.t) ** 0.5
        w.addcdiv_(m, v.sqrt().add_(self.eps * root), value=-self.lr * root / c1)
