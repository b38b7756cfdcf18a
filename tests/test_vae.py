"""vae's model: the two terms, their gradients, the bounds and the exact likelihood that they must stay below."""

import itertools
import math

import numpy as np
import pytest
import torch

from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.data import Images
from shared_utils.gradcheck import check_gradients
from vae import evaluate, inference_gap, inputs
from vae.exact import exact_log_likelihood
from vae.model import VAE, kl_to_prior, load_model, log_bernoulli, log_normal, mean_terms


def small(z_dim=2, x_dim=12, hidden=10, seed=0, scale=2.0):
    """A model in float64 whose weights are large enough that the posterior is not the prior."""
    torch.manual_seed(seed)
    model = VAE(x_dim, hidden, z_dim).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def binary(n, x_dim=12, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (n, x_dim))).double()


# --- the two terms ------------------------------------------------------------------------------------------------


def test_shapes_and_parameter_count():
    model = VAE()
    mu, log_var = model.encode(torch.zeros(3, 196))
    assert mu.shape == log_var.shape == (3, 8)
    assert model.decode(torch.zeros(5, 3, 8)).shape == (5, 3, 196)
    reconstruction, kl = model.elbo_terms(torch.zeros(3, 196))
    assert reconstruction.shape == kl.shape == (3,)
    count = (196 * 128 + 128) + (128 * 16 + 16) + (8 * 128 + 128) + (128 * 196 + 196)
    assert sum(p.numel() for p in model.parameters()) == count


def test_kl_is_zero_for_the_prior_and_the_hand_computed_value_elsewhere():
    zero = torch.zeros(1, 3)
    assert kl_to_prior(zero, zero).item() == 0
    mu, log_var = torch.tensor([[1.0, -2.0]]), torch.tensor([[math.log(4.0), 0.0]])
    assert kl_to_prior(mu, log_var).item() == pytest.approx(0.5 * (1 + 4 - 1 - math.log(4)) + 0.5 * 4)


def test_kl_agrees_with_a_monte_carlo_estimate():
    model, x = small(z_dim=3), binary(20)
    with torch.no_grad():
        mu, log_var = model.encode(x)
        z = model.reparameterize(mu, log_var, 20_000)  # (S, B, d)
        draws = log_normal(z, mu, log_var) - log_normal(z, torch.zeros_like(mu), torch.zeros_like(mu))  # (S, B)
        error = draws.std(0) / math.sqrt(len(draws))
        exact = kl_to_prior(mu, log_var)
    off = ((draws.mean(0) - exact) / error).abs()
    assert off.max() < 4  # the largest of 20
    assert abs(draws.mean() - exact.mean()) < 3 * (error**2).sum().sqrt() / len(x)


def test_reconstruction_is_the_log_probability_of_every_pixel_summed():
    x, logits = binary(4), torch.randn(7, 4, 12, dtype=torch.float64)
    p = logits.sigmoid()
    expected = (x * p.log() + (1 - x) * (1 - p).log()).sum(-1)
    torch.testing.assert_close(log_bernoulli(x, logits), expected)


def test_reparameterized_draws_have_the_posteriors_mean_and_variance():
    mu, log_var = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.0, -2.0]])
    torch.manual_seed(0)
    z = VAE(4, 4, 2).reparameterize(mu, log_var, 200_000)  # (S, 1, 2)
    torch.testing.assert_close(z.mean(0), mu, atol=0.01, rtol=0)
    torch.testing.assert_close(z.var(0), log_var.exp(), atol=0.01, rtol=0)


@pytest.mark.parametrize("term", ["reconstruction", "kl"])
def test_gradients_of_both_terms_by_finite_differences(term):
    model, x = small(x_dim=7, hidden=5), binary(4, 7)
    parameters = dict(model.named_parameters())
    if term == "kl":
        parameters = {name: p for name, p in parameters.items() if name.startswith("encoder")}

    def value():
        torch.manual_seed(3)  # the same noise in every pass
        reconstruction, kl = model.elbo_terms(x, 3)
        return kl if term == "kl" else reconstruction

    def forward():
        with torch.no_grad():
            return value().numpy()

    def backward(dy):
        gradients = torch.autograd.grad(value(), parameters.values(), torch.from_numpy(dy))
        return {name: g.numpy() for name, g in zip(parameters, gradients, strict=True)}

    arrays = {name: p.detach().numpy() for name, p in parameters.items()}
    errors = check_gradients(forward, backward, arrays, np.random.default_rng(0))
    assert max(errors.values()) < 1e-7, errors


def test_mean_terms_does_not_depend_on_how_the_images_are_split():
    model, x = small(), binary(2300)
    reconstruction, kl = mean_terms(model, x, 50)
    with torch.no_grad():
        expected, expected_kl = (t.mean().item() for t in model.elbo_terms(x, 50))
    assert kl == pytest.approx(expected_kl, rel=1e-12)
    assert reconstruction == pytest.approx(expected, abs=0.05)


# --- the bounds ---------------------------------------------------------------------------------------------------


def test_iwae_is_at_least_the_elbo_of_the_same_samples_on_every_image():
    model, x = small(), binary(200)
    with torch.no_grad():
        for k in (2, 5, 50):
            torch.manual_seed(k)
            weights = model.log_weights(x, k)  # (k, B)
            torch.manual_seed(k)
            at_once = model.iwae_bound(x[:, :], k)
            elbo, iwae = weights.mean(0), weights.logsumexp(0) - math.log(k)
            assert (iwae >= elbo - 1e-12).all()
            if k * len(x) <= 2000:  # one part: the same draws in the same order
                torch.testing.assert_close(at_once, iwae)


def test_iwae_with_one_sample_is_the_elbo_in_the_mean():
    model, x = small(), binary(1)
    x = x.repeat(50_000, 1)
    with torch.no_grad():
        reconstruction, kl = model.elbo_terms(x, 1)
        one = model.iwae_bound(x, 1)
    error = math.hypot(one.std().item(), reconstruction.std().item()) / math.sqrt(len(x))
    assert abs((one - reconstruction + kl).mean().item()) < 3 * error


def draws_from(noise):
    """In place of `reparameterize`: the given noise, one after another."""
    return lambda mu, log_var, n: mu + (log_var / 2).exp() * torch.stack([noise.pop() for _ in range(n)])


def test_iwae_by_parts_is_the_iwae_of_all_samples(monkeypatch):
    model, x, k = small(), binary(7), 33
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((k, 7, 2)))
    with torch.no_grad():
        means = []
        for rows in (7, 50, 10**6):
            monkeypatch.setattr(model, "reparameterize", draws_from(left := list(noise)))
            monkeypatch.setattr("vae.model.ROWS", rows)
            means.append(model.iwae_bound(x, k))
            assert not left
    for found in means[1:]:
        torch.testing.assert_close(found, means[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("z_dim", [1, 2])
def test_elbo_iwae_exact_are_in_this_order_and_meet(z_dim):
    model, x = small(z_dim), binary(1000)
    exact = exact_log_likelihood(model, x).numpy()
    torch.manual_seed(0)
    with torch.no_grad():
        reconstruction, kl = model.elbo_terms(x, 200)
        bounds = (
            [(reconstruction - kl).numpy()] + [model.iwae_bound(x, k).numpy() for k in (2, 10, 100, 5000)] + [exact]
        )
    for lower, upper in itertools.pairwise(bounds):
        difference = upper - lower
        assert difference.mean() > -3 * difference.std() / math.sqrt(len(x))
    assert bounds[-1].mean() - bounds[0].mean() > 0.05  # otherwise the order would prove nothing
    assert abs((bounds[-2] - exact).mean()) < 0.02


def test_the_exact_likelihood_sums_to_one_over_all_images():
    model = small(2, x_dim=8)
    x = torch.from_numpy((np.arange(256)[:, None] >> np.arange(8)) & 1).double()
    assert exact_log_likelihood(model, x, 201).exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_the_exact_likelihood_does_not_depend_on_the_grid():
    model, x = small(), binary(50)
    found = [exact_log_likelihood(model, x, points, at_once) for points, at_once in ((101, 999), (201, 7), (401, 5000))]
    torch.testing.assert_close(found[0], found[1], atol=1e-9, rtol=0)
    torch.testing.assert_close(found[1], found[2], atol=1e-9, rtol=0)


def test_the_exact_likelihood_of_a_decoder_that_ignores_the_latents():
    model, x = small(), binary(5)
    with torch.no_grad():
        model.decoder[2].weight.zero_()
    expected = log_bernoulli(x, model.decoder[2].bias)
    torch.testing.assert_close(exact_log_likelihood(model, x), expected.detach())


def test_bounds_by_k_use_all_samples_for_every_k(monkeypatch):
    model, x = small(), binary(3)
    drawn = torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    monkeypatch.setattr(model, "log_weights", lambda batch, size: drawn[:size])
    found = evaluate.bounds(model, x, [1, 7, 100])  # (3, 3)
    groups = [drawn[start : start + 7].exp().mean(0).log() for start in range(0, 98, 7)]
    expected = torch.stack([drawn.mean(0), torch.stack(groups).mean(0), drawn.exp().mean(0).log()])
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-12)


def test_bounds_tighten_with_k():
    torch.manual_seed(0)
    found = evaluate.bounds(small(), binary(150), [1, 7, 100])
    assert found.shape == (3, 150)
    assert (np.diff(found.mean(1)) > 0).all()


def test_the_best_gaussian_is_between_the_encoders_and_the_likelihood():
    model, x = small(), binary(40)
    torch.manual_seed(0)
    nats = inference_gap.gaps(model, x, steps=150, k=100)
    assert (nats["best_elbo"] >= nats["elbo"] - 0.1).all()
    assert (nats["likelihood"] >= nats["best_elbo"] - 0.05).all()
    assert (nats["best_elbo"] - nats["elbo"]).mean() > 0.3  # the encoder is untrained


# --- inputs and bad input -----------------------------------------------------------------------------------------


def test_images_become_196_pixels_of_zero_and_one():
    x = np.zeros((2, 1, 28, 28), np.uint8)
    x[0, 0, :2, :2], x[0, 0, 2:4, 2:4], x[1, 0, -1, -1] = 129, 128, 255
    vectors = inputs.binary_vectors(Images(x, np.zeros(2, np.int64), ("0",)))
    assert vectors.shape == (2, 196)
    assert vectors.dtype == np.float32
    assert vectors[0, 0] == 1
    assert vectors.sum() == 1  # a mean of 128 is not above it, nor is a fourth of 255


@pytest.mark.parametrize("method", ["elbo_terms", "log_weights", "iwae_bound"])
def test_grey_or_wrongly_sized_images_are_refused(method):
    model = VAE()
    call = getattr(model, method)
    grey, odd, undefined = torch.full((2, 196), 0.5), torch.zeros(2, 195), torch.full((2, 196), torch.nan)
    for bad, message in ((grey, "binary"), (odd, "196"), (undefined, "binary")):
        with pytest.raises(ValueError, match=message) as error:
            call(bad, 2)
        assert error.type is ValueError


def test_bounds_need_a_sample_and_the_grid_two_latents():
    with pytest.raises(UserError, match="at least one"):
        VAE().iwae_bound(torch.zeros(1, 196), 0)
    with pytest.raises(UserError, match="8"):
        exact_log_likelihood(VAE(), torch.zeros(1, 196))


class Args:
    quick, runs_dir, experiment = False, "runs", "vae"

    def __init__(self, ckpt):
        self.ckpt = str(ckpt)


def test_checkpoints_of_another_kind_are_refused_in_one_line(tmp_path):
    model = VAE(z_dim=3)
    checkpoint.save(tmp_path / "good.pth", config=model.config, model=model.state_dict(), title="MNIST")
    loaded = load_model(Args(tmp_path / "good.pth"), torch.device("cpu"))
    assert (loaded.z_dim, loaded.trained_on, loaded.training) == (3, "MNIST", False)
    wrong = {
        "other_latents": {"config": {**model.config, "z_dim": 4}, "model": model.state_dict()},
        "other_pixels": {"config": {**model.config, "x_dim": 784}, "model": model.state_dict()},
        "no_model": {"config": model.config},
        "no_config": {"model": model.state_dict()},
    }
    for name, state in wrong.items():
        checkpoint.save(tmp_path / f"{name}.pth", **state)
        with pytest.raises(UserError) as error:
            load_model(Args(tmp_path / f"{name}.pth"), torch.device("cpu"))
        assert len(str(error.value).splitlines()) == 1
        assert name in str(error.value)
    with pytest.raises(UserError, match="no checkpoint"):
        load_model(Args(tmp_path / "missing.pth"), torch.device("cpu"))
