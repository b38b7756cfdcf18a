"""Noise is added to an image step by step, and a network learns to take it away again.

    forward    q(x_t | x_{t−1}) = N(√(1 − β_t) x_{t−1}, β_t I),   so that   x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε,   ε ~ N(0, I)
    posterior  q(x_{t−1} | x_t, x_0) = N(μ̃_t, β̃_t I),   β̃_t = β_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t),
               μ̃_t = √ᾱ_{t−1} β_t / (1 − ᾱ_t) · x_0  +  √α_t (1 − ᾱ_{t−1}) / (1 − ᾱ_t) · x_t
    loss       E ‖ε − ε_θ(x_t, t)‖²,  the mean over pixels, t and ε    (for v: the same of v = √ᾱ_t ε − √(1 − ᾱ_t) x_0)

with α_t = 1 − β_t and ᾱ_t = α_1 … α_t. A network that knows ε knows x_0, which is what the samplers below use:

    x̂_0 = (x_t − √(1 − ᾱ_t) ε_θ) / √ᾱ_t  =  √ᾱ_t x_t − √(1 − ᾱ_t) v_θ,      clipped to [−1, 1]

DDPM draws x_{t−1} from the posterior at x̂_0, all T steps. DDIM takes any subset of the steps and may add less noise
(none at η = 0, where it solves an ODE to first order; at η = 1 with all steps it is DDPM). DPM-Solver++(2M) solves the
same ODE to second order: it also uses the x̂_0 of the step before.

Sources: Sohl-Dickstein et al. 2015; Ho, Jain and Abbeel 2020; Nichol and Dhariwal 2021 (cosine); Salimans and Ho 2022
(v); Song, Meng and Ermon 2021 (DDIM); Lu et al. 2022, arXiv 2211.01095 (DPM-Solver++).
Shapes: B images of a batch, T steps; images (B, C, H, W) in [−1, 1], t int64 (B,) in 0 … T − 1, where step t of the
equations is index t − 1 of the arrays.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from shared_utils.cli import UserError

SCHEDULES, PREDICTIONS = ("linear", "cosine"), ("eps", "v")
FEWEST_STEPS = 50
FIRST_LAMBDA = -5.1  # a signal of 0.6 % of the noise: about where the linear schedule ends
Model = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) → ε or v, as the images


def make_betas(timesteps: int, schedule: str) -> np.ndarray:
    """β of every step, float64 (T,), in (0, 1).

    linear: 1e-4 … 0.02 at T = 1000, as Ho et al.; scaled by 1000 / T for other T, to add as much noise in all.
    cosine: ᾱ_t ∝ cos²(π/2 · (t/T + s) / (1 + s)), s = 0.008, and no β above 0.999.
    Errors: `UserError` for another schedule, or fewer steps than `FEWEST_STEPS`.
    """
    if timesteps < FEWEST_STEPS:
        raise UserError(f"a diffusion has {FEWEST_STEPS} steps or more, got {timesteps}")
    if schedule == "linear":
        return np.linspace(1e-4, 0.02, timesteps) * 1000 / timesteps
    if schedule != "cosine":
        raise UserError(f"the schedule is one of {', '.join(SCHEDULES)}, got {schedule}")
    at = (np.arange(timesteps + 1) / timesteps + 0.008) / 1.008
    alpha_bars = np.cos(np.pi / 2 * at) ** 2
    return np.minimum(1 - alpha_bars[1:] / alpha_bars[:-1], 0.999)


class GaussianDiffusion:
    """The process with T steps. `betas`, `alphas`, `alpha_bars`: float64 (T,).

    prediction: what the model returns, "eps" or "v". Errors: `UserError` as `make_betas`, and for another prediction.
    """

    def __init__(self, timesteps: int = 1000, schedule: str = "linear", prediction: str = "eps"):
        if prediction not in PREDICTIONS:
            raise UserError(f"the prediction is one of {', '.join(PREDICTIONS)}, got {prediction}")
        self.timesteps, self.schedule, self.prediction = timesteps, schedule, prediction
        self.betas = make_betas(timesteps, schedule)
        self.alphas = 1 - self.betas
        self.alpha_bars = np.cumprod(self.alphas)

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t) for images `like`, (B, 1, 1, 1) each."""
        return _at(np.sqrt(self.alpha_bars), t, like), _at(np.sqrt(1 - self.alpha_bars), t, like)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of images x0 after t + 1 steps at once, with this noise ε."""
        signal, sigma = self.signal_and_noise(t, x0)
        return signal * x0 + sigma * noise

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean μ̃ (B, C, H, W) and variance β̃ (B, 1, 1, 1) of q(x_{t−1} | x_t, x_0); at t = 0 they are x0 and 0."""
        before = np.append(1.0, self.alpha_bars[:-1])  # ᾱ_{t−1}; nothing is added before the first step
        of_x0 = np.sqrt(before) * self.betas / (1 - self.alpha_bars)
        of_xt = np.sqrt(self.alphas) * (1 - before) / (1 - self.alpha_bars)
        variance = self.betas * (1 - before) / (1 - self.alpha_bars)
        return _at(of_x0, t, x0) * x0 + _at(of_xt, t, x0) * x_t, _at(variance, t, x0)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the model should return for x_t: ε or v."""
        if self.prediction == "eps":
            return noise
        signal, sigma = self.signal_and_noise(t, x0)
        return signal * noise - sigma * x0

    def denoised(self, model: Model, x_t: Tensor, t: Tensor) -> Tensor:
        """x̂_0: the model's estimate of the image without its noise, clipped to [−1, 1]."""
        found, (signal, sigma) = model(x_t, t).to(x_t.dtype), self.signal_and_noise(t, x_t)
        x0 = (x_t - sigma * found) / signal if self.prediction == "eps" else signal * x_t - sigma * found
        return x0.clamp(-1, 1)

    def losses(self, model: Model, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Mean squared error of each image, (B,), in float32."""
        found = model(self.q_sample(x0, t, noise), t).float()
        return (found - self.target(x0, t, noise).float()).square().flatten(1).mean(1)

    def loss(self, model: Model, x0: Tensor) -> Tensor:
        """The mean over images x0, each at a step and with a noise drawn from torch's global generator."""
        t = torch.randint(self.timesteps, (len(x0),), device=x0.device)
        return self.losses(model, x0, t, torch.randn_like(x0)).mean()

    def p_sample(self, model: Model, x_t: Tensor, t: Tensor) -> Tensor:
        """x_{t−1} drawn from the posterior at x̂_0; at t = 0 x̂_0 itself, without noise."""
        mean, variance = self.posterior(self.denoised(model, x_t, t), x_t, t)
        return mean + variance.sqrt() * torch.randn_like(x_t)

    @torch.no_grad()
    def ddpm_sample(self, model: Model, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Images of a shape (B, C, H, W) out of noise, by all T steps."""
        x = torch.randn(*shape, device=device)
        for t in reversed(range(self.timesteps)):
            x = self.p_sample(model, x, torch.full((shape[0],), t, device=device))
        return x

    def steps_of(self, steps: int) -> list[int]:
        """The indices of `steps` steps, evenly spaced from T − 1 down to 0. Errors: `UserError` for more than T."""
        if not 1 <= steps <= self.timesteps:
            raise UserError(f"--steps {steps}: the diffusion has 1 to {self.timesteps}")
        return np.linspace(self.timesteps - 1, 0, steps).round().astype(int).tolist()

    def _lambdas(self) -> np.ndarray:
        """Half the logarithm of the signal-to-noise ratio at every step, (T,), falling."""
        return 0.5 * np.log(self.alpha_bars / (1 - self.alpha_bars))

    def steps_even_in_lambda(self, steps: int) -> list[int]:
        """As `steps_of`, but evenly spaced in λ, as nearly as distinct whole steps allow.

        Between the first step and `FIRST_LAMBDA` there is nothing but noise, which needs no steps of its own; the
        cosine schedule's last λ lie far below it, and would use up a third of the steps.
        """
        self.steps_of(steps)  # refuses an impossible number of steps
        lambdas = self._lambdas()
        wanted = np.linspace(max(lambdas[-1], FIRST_LAMBDA), lambdas[0], steps)
        wanted[0] = lambdas[-1]
        order = [int(np.abs(lambdas - each).argmin()) for each in wanted]
        for i in range(1, steps):
            order[i] = min(order[i], order[i - 1] - 1)
        for left, i in enumerate(reversed(range(1, steps))):
            order[i] = max(order[i], left)
        return order

    @torch.no_grad()
    def ddim_sample(
        self, model: Model, shape: Sequence[int], steps: int, eta: float = 0.0, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Images of a shape (B, C, H, W) out of noise, by `steps` of the T steps; η: the noise each adds, 0 … 1."""
        x, order = torch.randn(*shape, device=device), self.steps_of(steps)
        for i, t in enumerate(order):
            alpha_bar = self.alpha_bars[t]
            before = self.alpha_bars[order[i + 1]] if i + 1 < steps else 1.0
            x0 = self.denoised(model, x, torch.full((shape[0],), t, device=device))
            eps = (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
            variance = eta**2 * (1 - before) / (1 - alpha_bar) * (1 - alpha_bar / before)
            x = before**0.5 * x0 + (1 - before - variance) ** 0.5 * eps
            if variance:
                x = x + variance**0.5 * torch.randn_like(x)
        return x

    @torch.no_grad()
    def dpm_solver_sample(
        self, model: Model, shape: Sequence[int], steps: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Images of a shape (B, C, H, W) out of noise, by DPM-Solver++(2M) over `steps` of the T steps; it ends at x̂_0.

        With λ = log(√ᾱ / √(1 − ᾱ)) and h = λ_t − λ_s from step s to the next, t, r = the h before / h:
        x_t = √((1 − ᾱ_t) / (1 − ᾱ_s)) x_s + √ᾱ_t (1 − e^−h) D,   D = (1 + 1 / 2r) x̂_0(s) − 1 / 2r · x̂_0(before s).
        Its steps are evenly spaced in λ: evenly in t the last h would be many times the others, and D inaccurate.
        """
        x, order = torch.randn(*shape, device=device), self.steps_even_in_lambda(steps)
        lambdas = self._lambdas()
        x0_before, h_before = None, 0.0
        for i, s in enumerate(order):
            x0 = self.denoised(model, x, torch.full((shape[0],), s, device=device))
            if i + 1 == steps:
                return x0
            t = order[i + 1]
            h = lambdas[t] - lambdas[s]
            ratio = h / h_before if x0_before is not None else 0.0  # 1 / r; the first step is of first order
            slope = x0 if x0_before is None else (1 + ratio / 2) * x0 - ratio / 2 * x0_before
            shrink = ((1 - self.alpha_bars[t]) / (1 - self.alpha_bars[s])) ** 0.5
            x = shrink * x + self.alpha_bars[t] ** 0.5 * (1 - np.exp(-h)) * slope
            x0_before, h_before = x0, h
        raise AssertionError("the last step returns")


def _at(values: np.ndarray, t: Tensor, like: Tensor) -> Tensor:
    """values[t] for images `like`: (B, 1, 1, 1) in their type; computed in float64 up to here."""
    return torch.from_numpy(values).to(like)[t][:, None, None, None]
