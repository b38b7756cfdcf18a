"""Many multilayer perceptrons of one shape run as one: every weight has a leading axis over the M networks.

    h_0 = features(x),      h_l = max(0, h_{l−1} W_l + b_l)  for l = 1 … depth,      f(x) = h_depth w + c

Layer l of all networks is one batched matrix product, (M, B, d) × (M, d, d′). No network sees another: the gradient of
the sum of their losses with respect to network i's weights is the gradient of loss i. Each draws its weights from a
generator of its own, so that it is the same network whichever others are trained beside it.

Raw features are x itself. Fourier features (Tancik et al. 2020) are cos(2π b x), sin(2π b x) at `features` frequencies
b drawn from N(0, σ²): what is a fast oscillation in x is a smooth function of them.
Shapes: M networks, B points, F features, d = width.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn


class EnsembleMLP(nn.Module):
    """n_models perceptrons of `depth` hidden ReLU layers of `width` units, on x or on Fourier features of it.

    features: 0 for x itself, otherwise the number of frequencies (2·features inputs). sigma: their standard deviation,
    in cycles per unit. rngs: one generator a network (default: seeds 0, 1, …).
    """

    def __init__(
        self,
        n_models: int,
        width: int = 256,
        depth: int = 3,
        features: int = 0,
        *,
        sigma: float = 10.0,
        rngs: Sequence[np.random.Generator] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        rngs = [np.random.default_rng(i) for i in range(n_models)] if rngs is None else rngs
        if len(rngs) != n_models:
            raise ValueError(f"{n_models} networks need as many generators, got {len(rngs)}")
        self.n_models, self.features = n_models, features
        if features:
            frequencies = np.stack([rng.normal(0, sigma, features) for rng in rngs])  # (M, F)
            self.register_buffer("frequencies", torch.from_numpy(frequencies).to(dtype))
        sizes = [2 * features or 1, *[width] * depth, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in pairwise(sizes):
            bound = 1 / math.sqrt(fan_in)  # PyTorch's default for nn.Linear, weights and biases alike
            draws = [rng.uniform(-bound, bound, (fan_in + 1, fan_out)) for rng in rngs]
            stacked = torch.from_numpy(np.stack(draws)).to(dtype)  # (M, fan_in + 1, fan_out)
            self.weights.append(nn.Parameter(stacked[:, :-1].contiguous()))
            self.biases.append(nn.Parameter(stacked[:, -1:].contiguous()))  # (M, 1, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        """x (M, B), each network's own points → f(x) (M, B)."""
        h = x.unsqueeze(-1)  # (M, B, 1)
        if self.features:
            phase = 2 * math.pi * h * self.frequencies.unsqueeze(1)  # (M, B, F)
            h = torch.cat([phase.cos(), phase.sin()], dim=-1)  # (M, B, 2F)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = torch.baddbmm(bias, h, weight).relu()  # (M, B, d)
        return torch.baddbmm(self.biases[-1], h, self.weights[-1]).squeeze(-1)  # (M, B)
