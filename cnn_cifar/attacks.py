"""Attacks: images changed by at most ±ε in each pixel, so that a network misclassifies them.

    g = ∇ₓ L(f(x), y)                                              the input gradient; L: cross-entropy
    FGSM            x' = clip(x + ε sign g)
    iterative FGSM  x₀ = x,                     xₜ₊₁ = clip_ε(xₜ + α sign gₜ)
    PGD             x₀ = clip(x + U(−ε, ε)),    xₜ₊₁ = clip_ε(xₜ + α sign gₜ)

clip cuts to [0, 1], clip_ε to [0, 1] and to [x − ε, x + ε]. The networks take pixels in [0, 1] and normalise them
inside, so that ε and α are pixel values; 8/255 is usual on CIFAR-10. A step of α along the sign raises the
linearised loss as much as ‖δ‖∞ ≤ α allows.

The networks run in evaluation mode, and their own modes are restored afterwards; no parameter's `.grad` is touched.
Sources: Goodfellow et al. 2015 (FGSM); Kurakin et al. 2017 (iterative); Madry et al. 2018 (PGD).
Shapes: B images x (B, 3, H, W) of [0, 1], labels y int64 (B,).
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from shared_utils.modes import evaluating


def input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each image's gradient of its own loss, shaped like x; in units of nats per pixel value of 1."""
    with evaluating(model), torch.enable_grad():
        x = x.detach().requires_grad_()
        loss = _losses(model(x), y).sum()  # a mean would divide each image's gradient by B
        return torch.autograd.grad(loss, x)[0]


def fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
    """One step of size eps. Errors: `ValueError` when eps is negative or x leaves [0, 1]."""
    _check(x, eps)
    return (x + eps * input_gradient(model, x, y).sign()).clamp(0, 1)


def iterative_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int) -> Tensor:
    """`steps` steps of size alpha, never further than eps from x. Errors: as `fgsm`; alpha ≤ 0; steps < 1."""
    _check(x, eps, alpha, steps)
    return _last(ascent(model, x, x, y, eps, alpha, steps))


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    alpha: float,
    steps: int,
    restarts: int = 1,
    generator: Generator | None = None,
) -> Tensor:
    """For each image the worst of `restarts` ascents, each from another random start within ±eps.

    A misclassified image is worse than any other; apart from that, the higher loss is worse. generator: it draws the
    starts (None: torch's own). Errors: as `iterative_fgsm`; restarts < 1.
    """
    _check(x, eps, alpha, steps, restarts)
    found = []
    for _ in range(restarts):
        uniform = torch.rand(x.shape, generator=generator, device=generator.device if generator else x.device)
        start = (x + eps * (2 * uniform.to(x.device) - 1)).clamp(0, 1)
        found.append(_last(ascent(model, start, x, y, eps, alpha, steps)))
    if restarts == 1:
        return found[0]
    scores = torch.stack([_badness(model, moved, y) for moved in found])  # (restarts, B)
    return torch.stack(found)[scores.argmax(0), torch.arange(len(x), device=x.device)]


def ascent(
    model: nn.Module, start: Tensor, x: Tensor, y: Tensor, eps: float, alpha: float, steps: int
) -> Iterator[Tensor]:
    """The images after each step of size alpha up the loss, from `start`, never further than eps from x."""
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    moved = start
    for _ in range(steps):
        moved = moved + alpha * input_gradient(model, moved, y).sign()
        moved = torch.minimum(torch.maximum(moved, low), high)
        yield moved


def _last(items: Iterator[Tensor]) -> Tensor:
    *_, last = items
    return last


def _losses(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of each image, (B, K) → (B,), as log(1 + exp(log Σ_{j≠y} exp z_j − z_y)).

    It is the same number; but log-softmax's gradient by z_y, p_y − 1, is rounded to 0 in float32 where z_y
    exceeds the other logits by 17, which would leave an attack without a direction.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    others = logits.scatter(1, y[:, None], -math.inf).logsumexp(1)
    return F.softplus(others - logits.gather(1, y[:, None])[:, 0])


@torch.no_grad()
def _badness(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss of each image, (B,), those of misclassified ones above all others."""
    with evaluating(model):
        logits = model(x)
    loss = _losses(logits, y)  # at most ln K where the right class has the largest logit
    return loss + math.log(logits.shape[1]) * (logits.argmax(1) != y)


def _check(x: Tensor, eps: float, alpha: float = 1.0, steps: int = 1, restarts: int = 1) -> None:
    if not eps >= 0:
        raise ValueError(f"an attack's ε is 0 or more, got {eps:g}")
    if not alpha > 0:
        raise ValueError(f"an attack's step α is above 0, got {alpha:g}")
    if steps < 1 or restarts < 1:
        raise ValueError(f"an attack takes at least one step and one start, got {steps} and {restarts}")
    if x.numel() and (x.min() < 0 or x.max() > 1):
        raise ValueError(f"an attack takes pixels from 0 to 1, got {x.min():g} to {x.max():g}")
