"""ddpm's process: the schedules, the closed forms against the steps, and samplers that know the answer."""

import math

import numpy as np
import pytest
import torch

from ddpm.diffusion import PREDICTIONS, SCHEDULES, GaussianDiffusion, make_betas
from shared_utils.cli import UserError


def images(b=3, seed=0):
    return torch.rand(b, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def knowing(diffusion, x0):
    """A model that knows the image in every noisy one: what it returns leads back to x0."""

    def model(x_t, t):
        alpha_bar = torch.from_numpy(diffusion.alpha_bars)[t][:, None, None, None]
        eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        return eps if diffusion.prediction == "eps" else alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0

    return model


# --- the schedules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [50, 51, 100, 200, 400, 1000, 4000])
def test_every_number_of_steps_ends_in_noise(schedule, timesteps):
    diffusion = GaussianDiffusion(timesteps, schedule)
    assert diffusion.betas.dtype == np.float64
    assert len(diffusion.betas) == len(diffusion.alphas) == len(diffusion.alpha_bars) == timesteps
    assert ((diffusion.betas > 0) & (diffusion.betas < 1)).all()
    assert (np.diff(diffusion.alpha_bars) < 0).all()
    assert diffusion.alpha_bars[-1] < 0.01
    assert diffusion.alpha_bars[0] > 0.95
    np.testing.assert_allclose(diffusion.alpha_bars, np.cumprod(1 - diffusion.betas), rtol=1e-12)


def test_the_schedules_are_the_papers():
    betas = make_betas(1000, "linear")
    assert (betas[0], betas[-1]) == pytest.approx((1e-4, 0.02))
    assert betas[500] == pytest.approx(1e-4 + 500 / 999 * (0.02 - 1e-4))
    cosine = GaussianDiffusion(1000, "cosine")
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]  # Nichol and Dhariwal 2021
    np.testing.assert_allclose(cosine.alpha_bars[:998], np.array(f[1:999]) / f[0], rtol=1e-9)
    assert cosine.betas.max() == 0.999


def test_what_is_no_process_gets_one_line():
    for call, said in (
        (lambda: GaussianDiffusion(49), "50 steps or more"),
        (lambda: GaussianDiffusion(100, "sigmoid"), "one of linear, cosine"),
        (lambda: GaussianDiffusion(100, "linear", "x0"), "one of eps, v"),
        (lambda: GaussianDiffusion(100).steps_of(101), "--steps 101: the diffusion has 1 to 100"),
        (lambda: GaussianDiffusion(100).steps_of(0), "--steps 0"),
    ):
        with pytest.raises(UserError, match=said):
            call()


# --- the closed forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_steps_at_once_are_the_steps_one_by_one(schedule):
    """The mean and variance of x_t by induction over q(x_t | x_{t−1}) = N(√(1 − β) x, β)."""
    diffusion, x0 = GaussianDiffusion(60, schedule), images()
    factor, variance = 1.0, 0.0
    for step, beta in enumerate(diffusion.betas):
        factor, variance = math.sqrt(1 - beta) * factor, (1 - beta) * variance + beta
        t = torch.full((3,), step)
        zero, one = (diffusion.q_sample(x0, t, noise) for noise in (torch.zeros_like(x0), torch.ones_like(x0)))
        torch.testing.assert_close(zero, factor * x0, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(one - zero, torch.full_like(x0, math.sqrt(variance)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_posterior_is_bayes(schedule):
    """q(x_{t−1} | x_t, x_0) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x_0): precisions add, means are weighted by them."""
    diffusion, x0, x_t = GaussianDiffusion(80, schedule), images(1), 3 * images(1, seed=5)
    for step in (1, 2, 40, 78, 79):
        beta, before = diffusion.betas[step], diffusion.alpha_bars[step - 1]
        precision = (1 - beta) / beta + 1 / (1 - before)
        mean = (math.sqrt(1 - beta) / beta * x_t + math.sqrt(before) / (1 - before) * x0) / precision
        found, variance = diffusion.posterior(x0, x_t, torch.tensor([step]))
        torch.testing.assert_close(found, mean, rtol=1e-9, atol=1e-10)
        assert variance.item() == pytest.approx(1 / precision, rel=1e-9)
        assert variance.shape == (1, 1, 1, 1)
    found, variance = diffusion.posterior(x0, x_t, torch.tensor([0]))
    torch.testing.assert_close(found, x0)
    assert variance.item() == 0


def test_each_image_has_its_own_step():
    diffusion, x0, noise = GaussianDiffusion(50), images(), images(seed=1)
    t = torch.tensor([0, 20, 49])
    together = diffusion.q_sample(x0, t, noise)
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], diffusion.q_sample(x0[i : i + 1], t[i : i + 1], noise[i : i + 1])
        )


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_who_knows_the_answer_has_no_loss_and_gets_the_image_back(schedule, prediction):
    diffusion, x0 = GaussianDiffusion(100, schedule, prediction), images()
    model, noise = knowing(diffusion, x0), torch.randn(3, 1, 4, 4, dtype=torch.float64)
    for step in (0, 50, 98):
        t = torch.full((3,), step)
        assert diffusion.losses(model, x0, t, noise).max() < 1e-10
        torch.testing.assert_close(
            diffusion.denoised(model, diffusion.q_sample(x0, t, noise), t), x0, rtol=0, atol=1e-6
        )
    torch.manual_seed(0)
    assert diffusion.loss(model, x0).item() < 1e-10


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_who_says_nothing_has_the_loss_of_what_was_asked(prediction):
    diffusion, x0 = GaussianDiffusion(100, "cosine", prediction), images()
    noise, t = torch.randn(3, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 50, 99])
    alpha_bar = torch.from_numpy(diffusion.alpha_bars)[t][:, None, None, None]
    wanted = noise if prediction == "eps" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    found = diffusion.losses(lambda x, t: torch.zeros_like(x), x0, t, noise)
    torch.testing.assert_close(found, wanted.float().square().flatten(1).mean(1), rtol=1e-5, atol=0)


def test_the_loss_draws_every_step(monkeypatch):
    diffusion, seen = GaussianDiffusion(50), set()

    def model(x_t, t):
        seen.update(t.tolist())
        assert t.dtype == torch.int64
        return torch.zeros_like(x_t)

    torch.manual_seed(0)
    diffusion.loss(model, images(1).expand(1000, 1, 4, 4))
    assert seen == set(range(50))


# --- the samplers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samplers_end_at_the_image_of_a_model_that_knows_it(schedule, prediction):
    diffusion, x0 = GaussianDiffusion(100, schedule, prediction), images()
    model, shape = knowing(diffusion, x0), (3, 1, 4, 4)
    torch.manual_seed(0)
    for found in (
        diffusion.ddpm_sample(model, shape),
        diffusion.ddim_sample(model, shape, 10),
        diffusion.ddim_sample(model, shape, 100, eta=1.0),
        diffusion.dpm_solver_sample(model, shape, 10),
    ):
        torch.testing.assert_close(found.double(), x0, rtol=0, atol=1e-5)
    rounding = 1e-6 / math.sqrt(diffusion.alpha_bars[-1]) if prediction == "eps" else 1e-5  # x̂_0 out of pure noise
    for found in (diffusion.ddim_sample(model, shape, 1), diffusion.dpm_solver_sample(model, shape, 1)):
        torch.testing.assert_close(found.double(), x0, rtol=0, atol=rounding)


def linear(diffusion, std=0.5):
    """The best model of pixels ~ N(0, std²): E[x0 | x_t] is a multiple of x_t."""

    def model(x_t, t):
        alpha_bar = torch.from_numpy(diffusion.alpha_bars)[t][:, None, None, None].to(x_t)
        x0 = alpha_bar.sqrt() * std**2 / (alpha_bar * std**2 + 1 - alpha_bar) * x_t
        return (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    return model


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_samplers_draw_the_distribution_that_their_model_knows(schedule):
    """Pixels ~ N(0, 0.2²): the standard deviation of many samples, for which x̂_0 is hardly ever cut."""
    diffusion, shape, std = GaussianDiffusion(1000, schedule), (3000, 1, 2, 2), 0.2
    model = linear(diffusion, std)
    torch.manual_seed(0)
    ways = {
        "ddpm": diffusion.ddpm_sample(model, shape),
        "ddim": diffusion.ddim_sample(model, shape, 500),
        "ddim, noise": diffusion.ddim_sample(model, shape, 1000, eta=1.0),
        "dpm": diffusion.dpm_solver_sample(model, shape, 20),
    }
    for found in ways.values():
        assert abs(found.mean().item()) < 0.01
        assert found.std().item() == pytest.approx(std, rel=0.04)


def test_ddim_with_all_noise_and_all_steps_is_ddpm():
    diffusion, shape = GaussianDiffusion(60, "linear"), (5, 1, 3, 3)
    model = linear(diffusion)
    torch.manual_seed(3)
    one = diffusion.ddpm_sample(model, shape)
    torch.manual_seed(3)
    other = diffusion.ddim_sample(model, shape, 60, eta=1.0)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_solvers_formula(schedule):
    """One step of second order, computed from λ alone: Lu et al. 2022, algorithm 2 (2M)."""
    diffusion, seen = GaussianDiffusion(100, schedule), []
    order = diffusion.steps_even_in_lambda(4)
    model, denoised = linear(diffusion), diffusion.denoised
    diffusion.denoised = lambda model, x, t: seen.append((x, denoised(model, x, t))) or seen[-1][1]
    torch.manual_seed(0)
    diffusion.dpm_solver_sample(model, (2, 1, 3, 3), 4)
    alpha, sigma = np.sqrt(diffusion.alpha_bars[order]), np.sqrt(1 - diffusion.alpha_bars[order])
    lam = np.log(alpha / sigma)
    h = np.diff(lam)
    r = h[0] / h[1]
    (x0, y0), (x1, y1), (x2, _), _ = seen
    torch.testing.assert_close(x1, (sigma[1] / sigma[0]) * x0 - alpha[1] * math.expm1(-h[0]) * y0, rtol=1e-4, atol=1e-4)
    slope = (1 + 1 / (2 * r)) * y1 - 1 / (2 * r) * y0
    torch.testing.assert_close(
        x2, (sigma[2] / sigma[1]) * x1 - alpha[2] * math.expm1(-h[1]) * slope, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 10, 57, 99, 100])
def test_steps_even_in_lambda(schedule, steps):
    diffusion = GaussianDiffusion(100, schedule)
    order = diffusion.steps_even_in_lambda(steps)
    assert len(order) == len(set(order)) == steps
    assert order == sorted(order, reverse=True)
    assert (order[0], order[-1]) == (99, 0 if steps > 1 else 99)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [10, 20, 40])
def test_no_steps_are_lost_where_there_is_only_noise(schedule, steps):
    """Below λ = −5.1, where the cosine schedule goes down to −9.9, the first step is enough."""
    diffusion = GaussianDiffusion(1000, schedule)
    lam = 0.5 * np.log(diffusion.alpha_bars / (1 - diffusion.alpha_bars))
    order = diffusion.steps_even_in_lambda(steps)
    assert lam[order[1]] > -5.1
    h = np.diff(lam[order[1:]])
    wanted = (lam[0] - max(lam[-1], -5.1)) / (steps - 1)
    assert h[: 2 * steps // 3] == pytest.approx([wanted] * (2 * steps // 3), rel=0.4)  # at the end steps are few
    assert h.max() < 2 * wanted


def test_without_noise_the_same_start_gives_the_same_image_and_the_second_order_is_nearer():
    """The exact solution of the equation for Gaussian pixels is x · std / √(ᾱ std² + 1 − ᾱ); errors fall with steps."""
    diffusion, shape, std = GaussianDiffusion(1000, "cosine"), (50, 1, 3, 3), 0.2
    model = linear(diffusion, std)
    torch.manual_seed(0)
    start = torch.randn(*shape)
    exact = start * std / math.sqrt(diffusion.alpha_bars[-1] * std**2 + 1 - diffusion.alpha_bars[-1])

    def error(sampler, steps):
        torch.manual_seed(0)
        return (sampler(model, shape, steps) - exact).square().mean().sqrt().item()

    ddim, dpm = (
        [error(sampler, n) for n in (10, 20, 40)] for sampler in (diffusion.ddim_sample, diffusion.dpm_solver_sample)
    )
    assert ddim[0] > ddim[1] > ddim[2]
    assert dpm[2] < dpm[0]
    assert all(5 * second < first for second, first in zip(dpm, ddim, strict=True))


def test_at_the_first_step_no_noise_is_added():
    diffusion, x = GaussianDiffusion(50), images().float()
    model = lambda x_t, t: torch.zeros_like(x_t)  # noqa: E731
    found = {diffusion.p_sample(model, x, torch.zeros(3, dtype=torch.int64)).sum().item() for _ in range(3)}
    assert len(found) == 1
    torch.testing.assert_close(
        diffusion.p_sample(model, x, torch.zeros(3, dtype=torch.int64)),
        diffusion.denoised(model, x, torch.zeros(3, dtype=torch.int64)),
    )
    found = {diffusion.p_sample(model, x, torch.full((3,), 30)).sum().item() for _ in range(3)}
    assert len(found) == 3


def test_what_the_model_says_beyond_white_and_black_is_cut():
    diffusion = GaussianDiffusion(50)
    x0 = diffusion.denoised(lambda x, t: -100 * torch.ones_like(x), images(), torch.full((3,), 25))
    assert (x0 == 1).all()


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_the_steps_go_from_noise_to_image(steps):
    order = GaussianDiffusion(50).steps_of(steps)
    assert len(order) == steps == len(set(order))
    assert order[0] == 49
    assert order == sorted(order, reverse=True)
    if steps > 1:
        assert order[-1] == 0
