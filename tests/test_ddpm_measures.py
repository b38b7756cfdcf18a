"""ddpm's measures: the Fréchet distance, precision and recall, neighbours, the memoriser, the bound."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch

from ddpm.diffusion import PREDICTIONS, GaussianDiffusion
from ddpm.features import Classifier, covered, frechet_distance, frechet_error, nearest, seen, trained
from ddpm.inputs import scaled
from ddpm.likelihood import bits_per_dimension, last_term, prior_term, step_term
from ddpm.memoriser import memoriser
from shared_utils.data import load_images

CPU = torch.device("cpu")


def cloud(n=500, d=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


def test_the_distance_is_the_papers_formula():
    a, b = cloud(), cloud(seed=1)
    root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + 3) == pytest.approx(5 * 9)
    flat = np.concatenate([a, np.zeros((500, 1))], axis=1)  # a feature that is never on
    assert frechet_distance(flat, flat + 1) == pytest.approx(6)
    with pytest.raises(ValueError, match="two images or more"):
        frechet_distance(a[:1], b)


def test_precision_and_recall_by_hand():
    balls = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])  # radii for k = 1: all 1
    points = np.array([[-0.5], [3.5], [5.0], [9.0], [100.0]])
    assert covered(points, balls, k=1) == 2 / 5
    assert covered(balls, balls, k=1) == 1
    a, b = cloud(), cloud(seed=1)
    distances = np.sqrt(((b[:, None] - b[None]) ** 2).sum(2))
    radii = np.sort(distances, axis=1)[:, 3]
    wanted = (np.sqrt(((a[:, None] - b[None]) ** 2).sum(2)) <= radii).any(1).mean()
    assert covered(a, b) == pytest.approx(wanted, abs=0.005)
    with pytest.raises(ValueError, match="no 3-th neighbour"):
        covered(a, b[:3])


def test_the_nearest_image_is_found():
    rng = np.random.default_rng(0)
    others = rng.integers(0, 256, (700, 1, 4, 4), dtype=np.uint8)
    x = others[[3, 650]].copy()
    x[1, 0, 0, 0] ^= 255
    distance, which = nearest(x, others)
    assert which.tolist() == [3, 650]
    assert distance[0] == pytest.approx(0, abs=2e-3)
    assert distance[1] == pytest.approx(abs(int(x[1, 0, 0, 0]) - int(others[650, 0, 0, 0])) / 255, abs=2e-3)


def test_the_classifier_learns_and_its_output_follows_from_its_features():
    images = load_images("digits", "train")
    model = trained(images[:1000], 10, 4, 0, CPU)
    features, probabilities = seen(model, images.x[1000:])
    assert features.shape == (len(images.x) - 1000, 128)
    assert (probabilities.argmax(1) == images.y[1000:]).mean() > 0.8
    logits = features.astype(np.float32) @ model.output.weight.detach().numpy().T + model.output.bias.detach().numpy()
    assert np.array_equal(logits.argmax(1), probabilities.argmax(1))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert Classifier(3, 4)(torch.zeros(2, 3, 14, 14)).shape == (2, 4)


# --- the memoriser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_memoriser_is_bayes_rule(prediction):
    diffusion = GaussianDiffusion(100, "cosine", prediction)
    x = np.random.default_rng(0).integers(0, 256, (7, 1, 2, 2), dtype=np.uint8)
    known = scaled(torch.from_numpy(x)).double()
    x_t, t = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 50, 90])
    found = diffusion.denoised(memoriser(diffusion, x), x_t, t)
    for i in range(3):
        alpha_bar = diffusion.alpha_bars[t[i]]
        density = [
            math.exp(-((x_t[i].double() - math.sqrt(alpha_bar) * one).square().sum().item()) / (2 * (1 - alpha_bar)))
            for one in known
        ]
        wanted = sum(weight * one for weight, one in zip(density, known, strict=True)) / sum(density)
        torch.testing.assert_close(found[i].double(), wanted, rtol=0, atol=2e-3)


def test_the_memoriser_draws_what_it_knows():
    diffusion = GaussianDiffusion(100, "cosine", "v")
    x = load_images("digits", "train").x[:50]
    torch.manual_seed(0)
    found = diffusion.ddim_sample(memoriser(diffusion, x), (20, 1, 28, 28), 100)
    distances = (found[:, None] - scaled(torch.from_numpy(x))[None]).square().flatten(2).mean(2).min(1).values
    assert (distances < 1e-3).all()


def test_no_model_has_a_smaller_loss_on_what_the_memoriser_knows():
    diffusion, x = GaussianDiffusion(100), load_images("digits", "train").x[:40]
    known, x0 = memoriser(diffusion, x), scaled(torch.from_numpy(x))
    torch.manual_seed(0)
    for step in (10, 60, 95):
        t, noise = torch.full((40,), step), torch.randn(40, 1, 28, 28)
        best = diffusion.losses(known, x0, t, noise).mean()
        for change in (0.9, 1.1):
            other = diffusion.losses(lambda x_t, t, change=change: change * known(x_t, t), x0, t, noise).mean()
            assert best < other


# --- the bound ------------------------------------------------------------------------------------------------------


def knowing(diffusion, x0):
    def model(x_t, t):
        signal, sigma = diffusion.signal_and_noise(t, x_t)
        return (x_t - signal * x0) / sigma

    return model


def test_the_steps_of_a_model_that_knows_cost_nothing():
    diffusion, x0 = GaussianDiffusion(100), torch.tensor([-1.0, 0.0, 1 / 255, 1.0]).view(1, 1, 2, 2)
    for step in (1, 50, 99):
        term = step_term(diffusion, knowing(diffusion, x0), x0, torch.tensor([step]), torch.randn(1, 1, 2, 2))
        assert term.item() < 1e-3
    alpha_bar = diffusion.alpha_bars[-1]
    kl = [0.5 * (alpha_bar * v**2 + (1 - alpha_bar) - 1 - math.log(1 - alpha_bar)) for v in x0.flatten().tolist()]
    assert prior_term(diffusion, x0).item() == pytest.approx(sum(kl), rel=1e-3)
    sigma = math.sqrt(diffusion.posterior(x0, x0, torch.tensor([1]))[1].item())
    half = 0.5 * (1 + math.erf(1 / 255 / sigma / math.sqrt(2)))  # of a Gaussian below mean + 1/255
    wanted = -(2 * math.log(half) + 2 * math.log(2 * half - 1))  # the two at the ends have one side for free
    assert last_term(diffusion, knowing(diffusion, x0), x0, torch.zeros(1, 1, 2, 2)).item() == pytest.approx(
        wanted, rel=1e-3
    )


def test_the_bounds_error_is_that_of_a_mean_over_images(monkeypatch):
    costs = torch.tensor([1.0, 5.0, 2.0, 8.0, 3.0])
    monkeypatch.setattr("ddpm.likelihood.prior_term", lambda diffusion, x0: costs)
    monkeypatch.setattr("ddpm.likelihood.step_term", lambda *given: torch.zeros(5))
    monkeypatch.setattr("ddpm.likelihood.last_term", lambda *given: costs)
    found = bits_per_dimension(GaussianDiffusion(50), None, torch.zeros(5, 1, 2, 2))
    assert found["sum"] == pytest.approx(2 * costs.mean().item() / (4 * math.log(2)))  # the prior's part too
    wanted = 2 * np.std(costs.numpy(), ddof=1) / 5**0.5 / (4 * math.log(2))
    assert found["standard_error"] == pytest.approx(wanted, rel=1e-5)


def test_a_pixel_far_from_where_it_was_expected_costs_what_its_tail_says():
    """Far above the mean: 1 − Φ is 0 there in float64, Φ on the other side is not."""
    diffusion = GaussianDiffusion(1000, "cosine")
    sigma = math.sqrt(diffusion.posterior(*[torch.zeros(1, 1, 1, 1, dtype=torch.float64)] * 2, torch.tensor([1]))[1])
    for off in (-20 * sigma, -0.5 * sigma, 0.5 * sigma, 20 * sigma, 36 * sigma):
        x0 = torch.full((1, 1, 1, 1), off, dtype=torch.float64)
        found = last_term(diffusion, knowing(diffusion, torch.zeros_like(x0)), x0, torch.zeros_like(x0)).item()
        low, high = sorted(scipy.stats.norm.logcdf(-(abs(off) + end / 255) / sigma) for end in (-1, 1))
        assert found == pytest.approx(-(high + math.log1p(-math.exp(low - high))), rel=1e-4)


def test_the_distances_error_is_its_spread_from_draw_to_draw():
    rng, b = np.random.default_rng(0), np.random.default_rng(9).standard_normal((4000, 3))
    draws = [rng.standard_normal((600, 3)) * 1.3 + 0.2 for _ in range(200)]
    spread = np.std([frechet_distance(a, b) for a in draws])
    assert np.mean([frechet_error(a, b) for a in draws[:20]]) == pytest.approx(spread, rel=0.2)


def test_a_step_costs_the_kl_of_two_gaussians():
    diffusion, x0 = GaussianDiffusion(100, "cosine"), torch.rand(2, 1, 2, 2) * 2 - 1
    t, noise = torch.tensor([1, 70]), torch.randn(2, 1, 2, 2)
    model = lambda x_t, t: torch.zeros_like(x_t)  # noqa: E731
    found = step_term(diffusion, model, x0, t, noise)
    for i in range(2):
        x_t = diffusion.q_sample(x0[i : i + 1], t[i : i + 1], noise[i : i + 1])
        mean, variance = diffusion.posterior(x0[i : i + 1], x_t, t[i : i + 1])
        guess, _ = diffusion.posterior(diffusion.denoised(model, x_t, t[i : i + 1]), x_t, t[i : i + 1])
        normal = torch.distributions.Normal
        kl = torch.distributions.kl_divergence(normal(mean, variance.sqrt()), normal(guess, variance.sqrt())).sum()
        assert found[i].item() == pytest.approx(kl.item(), rel=1e-4)


@pytest.mark.parametrize("strata", [1, 7, 99, 200])
def test_the_strata_stand_for_all_steps(strata, monkeypatch):
    """A cost of 1 for every step adds up to T − 1, however many of them are looked at."""
    diffusion, x0 = GaussianDiffusion(100), torch.zeros(3, 1, 4, 4)
    seen_steps = []

    def one(diffusion, model, x0, t, noise):
        seen_steps.extend(t.tolist())
        return torch.ones(len(x0))

    monkeypatch.setattr("ddpm.likelihood.step_term", one)
    bits = bits_per_dimension(diffusion, lambda x_t, t: torch.zeros_like(x_t), x0, strata)
    assert bits["steps"] == pytest.approx(99 / (16 * math.log(2)))
    assert min(seen_steps) >= 1
    assert max(seen_steps) <= 99
    assert bits["sum"] == pytest.approx(bits["prior"] + bits["steps"] + bits["last"])
