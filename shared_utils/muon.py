"""Muon: momentum whose matrices are made orthogonal before the step.

    M ← μ M + G,   O ≈ U Vᵀ with G + μ M = U Σ Vᵀ (Nesterov),   W ← √rows · W / ‖W‖_F − η O,  or  W ← W − η O

A gradient of a layer's weights has a few large singular values; U Vᵀ has them all equal to 1, so that directions which
the gradient hardly shows are learned as fast as the others. No singular value decomposition is needed: an odd
polynomial, applied a few times, drives all singular values into the neighbourhood of 1.
Sources: Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024 (the polynomial, and the norm of
the weights held at √rows in its CIFAR-10 record); Bernstein and Newhouse, arXiv 2409.20325.
Shapes: a convolution's weights (K, C, k, k) are the matrix (K, C k k).
"""

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0: small singular values grow 3.4 times a step, large stay near 1


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """About U Vᵀ of the matrix U Σ Vᵀ, or of each of a batch: (…, m, n) → the same shape, in bfloat16's precision.

    After 3 steps singular values from 0.02 of the matrix's Frobenius norm on lie between 0.68 and 1.2, smaller ones lag
    (0.01 comes to 0.4), which serves training as well. A zero matrix stays zero.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT  # the products below are of the short side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value exceeds the Frobenius norm
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x  # a σ + b σ³ + c σ⁵
    return (x if wide else x.mT).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for the weights of convolutions and of hidden linear layers; the rest is for another optimizer.

    lr: how far a step goes, in units of the weights' singular values. momentum: μ. hold_norm: put ‖W‖_F at √rows before
    each step; without it weights may begin at 0.
    """

    def __init__(self, params, lr: float, momentum: float = 0.6, hold_norm: bool = True):
        super().__init__(params, {"lr": lr, "momentum": momentum, "hold_norm": hold_norm})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].mul_(group["momentum"]).add_(weight.grad)
                ahead = weight.grad.add(momentum, alpha=group["momentum"])  # Nesterov
                update = orthogonalize(ahead.flatten(1)).view_as(weight)
                if group["hold_norm"]:
                    weight.mul_(len(weight) ** 0.5 / weight.norm())
                weight.add_(update, alpha=-group["lr"])
