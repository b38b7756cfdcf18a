"""How many bits a pixel costs: the variational bound on −log p(x_0).

    L = KL(q(x_T | x_0) ‖ N(0, I))  +  Σ_{t>1} KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t))  −  log p(x_0 | x_1)

p(x_{t−1} | x_t) is the posterior at x̂_0, with the same variance β̃_t, so that the terms of the sum are
|μ̃(x_0) − μ̃(x̂_0)|² / 2β̃_t. The last takes the probability that N(x̂_0, β̃_2) gives the pixel's own shade of 256 (the
tails beyond the darkest and the brightest count as theirs).
Sources: Ho, Jain and Abbeel 2020, section 3.3; Nichol and Dhariwal 2021 (β̃_2 in place of β̃_1 = 0).
Shapes: B images (B, C, H, W), D = C H W pixels.
"""

import math

import torch
from torch import Tensor

from ddpm.diffusion import GaussianDiffusion, Model


def prior_term(diffusion: GaussianDiffusion, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) ‖ N(0, I)) of each image, (B,), nats."""
    alpha_bar = diffusion.alpha_bars[-1]
    variance = 1 - alpha_bar
    return 0.5 * (alpha_bar * x0.square() + variance - 1 - math.log(variance)).flatten(1).sum(1)


def step_term(diffusion: GaussianDiffusion, model: Model, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """KL of the step t ≥ 1 (index) of each image, (B,), nats, for one noise."""
    x_t = diffusion.q_sample(x0, t, noise)
    mean, variance = diffusion.posterior(x0, x_t, t)
    found, _ = diffusion.posterior(diffusion.denoised(model, x_t, t), x_t, t)
    return ((mean - found).square() / (2 * variance)).flatten(1).sum(1)


def last_term(diffusion: GaussianDiffusion, model: Model, x0: Tensor, noise: Tensor) -> Tensor:
    """−log p(x_0 | x_1) of each image, (B,), nats, for one noise."""
    t = torch.zeros(len(x0), dtype=torch.int64, device=x0.device)
    mean = diffusion.denoised(model, diffusion.q_sample(x0, t, noise), t)
    _, variance = diffusion.posterior(x0, x0, t + 1)
    off, sigma = ((x0 - mean).cpu().double(), variance.cpu().double().sqrt())  # float64 is not on every device
    # Mirrored so that the shade lies below the mean: in the lower tail float64 keeps its digits.
    side, shade = torch.where(off > 0, -1.0, 1.0), x0.cpu()
    low, high = ((side * off + end / 255) / sigma for end in (-1, 1))
    low = low.masked_fill((side * shade).lt(-0.999), -torch.inf)
    high = high.masked_fill((side * shade).gt(0.999), torch.inf)
    probability = (torch.erfc(-high / 2**0.5) - torch.erfc(-low / 2**0.5)) / 2
    return -probability.clamp(min=1e-300).log().flatten(1).sum(1).to(x0)


@torch.no_grad()
def bits_per_dimension(diffusion: GaussianDiffusion, model: Model, x0: Tensor, strata: int = 50) -> dict[str, float]:
    """The bound's parts, their sum and its standard error, bits per pixel: images x0, noise from torch's generator.

    Of the steps above the first, each image draws one in each of `strata` equal ranges, which stands for all in it.
    """
    steps, edges = torch.zeros(len(x0), device=x0.device), torch.linspace(1, diffusion.timesteps, strata + 1)
    for low, high in zip(edges[:-1].round().long().tolist(), edges[1:].round().long().tolist(), strict=True):
        if high > low:
            t = torch.randint(low, high, (len(x0),), device=x0.device)
            steps += (high - low) * step_term(diffusion, model, x0, t, torch.randn_like(x0))
    parts = {
        "prior": prior_term(diffusion, x0),
        "steps": steps,
        "last": last_term(diffusion, model, x0, torch.randn_like(x0)),
    }
    per_pixel = 1 / (x0[0].numel() * math.log(2))
    bits = {name: value.mean().item() * per_pixel for name, value in parts.items()}
    error = sum(parts.values()).std().item() * per_pixel / len(x0) ** 0.5
    return {**bits, "sum": sum(bits.values()), "standard_error": error}
