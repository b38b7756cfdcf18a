"""What vae's scripts that read a trained model say of it: on which images, with which error, and in which words."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shared_utils import checkpoint
from vae import evaluate, inference_gap, latent_space, reconstruct, sample
from vae.inputs import load_binary
from vae.latent_space import Plane, knn_accuracy
from vae.model import VAE, kl_to_prior, log_bernoulli

SAME = ["--dataset", "digits", "--per-class", "20", "--val-size", "100", "--device", "cpu"]


@pytest.fixture
def titles(monkeypatch):
    """The titles of the figures that the scripts save, none of which is drawn."""
    found = []
    for module in (evaluate, inference_gap, latent_space, reconstruct, sample):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: found.append(figure.get_suptitle()))
    return found


@pytest.fixture(scope="module")
def data():
    return load_binary(evaluate.build_parser().parse_args(SAME))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of three latents, of which one is the same for all images; and the flag that names its file."""
    torch.manual_seed(0)
    model = VAE(z_dim=3)
    with torch.no_grad():
        model.encoder[2].weight[:3] *= torch.tensor([3.0, 1e-3, 3.0])[:, None]
    path = tmp_path_factory.mktemp("model") / "best.pth"
    checkpoint.save(path, config=model.config, model=model.state_dict(), title="digits")
    return model, ["--ckpt", str(path)]


# --- evaluate -----------------------------------------------------------------------------------------------------


def test_the_mixtures_size_is_chosen_on_images_that_it_was_not_fitted_to(monkeypatch):
    seen = []

    class Mixture:
        def __init__(self, size):
            self.size = size

        def fit(self, x, rng):
            seen.append(("fit", self.size, x))
            return self

        def log_likelihood(self, x):
            seen.append(("held", self.size, x))
            return np.full(len(x), {2: -30.0, 5: -10.0, 9: -20.0}[self.size])

    monkeypatch.setattr(evaluate, "BernoulliMixture", Mixture)
    x = ((np.arange(50)[:, None] >> np.arange(6)) & 1).astype(np.float32)  # no two alike
    parts = SimpleNamespace(x_train=x, y_train=np.arange(50) % 5)
    assert "mixture of 5 Bernoullis" in evaluate.fit_baselines(parts, [2, 5, 9], np.random.default_rng(0))
    for (_, fitted, some), (_, size, held) in zip(seen[:6:2], seen[1:6:2], strict=True):
        assert fitted == size
        assert len(held) == 10
        assert len(np.unique(np.concatenate([some, held]), axis=0)) == 50
    assert [(size, len(some)) for _, size, some in seen[6:]] == [(5, 50)]


def test_a_likelihoods_error_is_that_of_a_mean_over_images():
    row = evaluate.likelihood_row("m", np.array([-1.0, -3.0, -5.0, -7.0]), 9)
    assert row["test_log_likelihood"] == -4
    assert row["standard_error"] == pytest.approx(np.std([1, 3, 5, 7], ddof=1) / 2)
    assert row["bits_per_pixel"] == pytest.approx(4 / (196 * math.log(2)))


def test_samples_are_read_beside_the_test_images(monkeypatch):
    """The classifier is sure of an image by its first pixel, and sees class 1 where the second is on."""

    def probabilities(classifier, x):
        one = np.where(x[:, 0] > 0, 0.95, 0.6)
        return np.stack([np.where(x[:, 1] > 0, 1 - one, one), np.where(x[:, 1] > 0, one, 1 - one)], axis=1)

    monkeypatch.setattr(evaluate, "train_classifier", lambda *_: None)
    monkeypatch.setattr(evaluate, "class_probabilities", probabilities)
    test, train = np.zeros((4, 196)), np.zeros((5, 196))
    test[:3, 0] = test[:1, 1] = 1
    parts = SimpleNamespace(x_train=train, y_train=np.ones(5), x_test=test, y_test=np.array([1, 0, 0, 1]), classes="ab")
    device = torch.device("cpu")
    rows, accuracy, shown = evaluate.read_samples(VAE(), {}, parts, 20, np.random.default_rng(0), device)
    assert accuracy == 0.75
    assert rows[0]["source"] == "test images"
    assert rows[0]["mean_confidence"] == pytest.approx((3 * 0.95 + 0.6) / 4)
    assert rows[0]["above_90_percent"] == 0.75
    assert rows[0]["class_shares"].tolist() == [0.75, 0.25]
    sure = [{**row, "mean_confidence": at} for row, at in zip(rows, (0.9, 0.7, 0.5), strict=True)]
    parts.title = "x"
    said = evaluate.draw_quality(shown, sure, parts, accuracy, "8 latents").get_suptitle()
    assert "(75.0% right) is 90% sure on real digits, 70% on the autoencoder's, cut at ½" in said


def test_the_likelihoods_are_of_test_images_and_the_bound_is_the_tightest(trained, titles, data, monkeypatch, tmp_path):
    seen, model = [], trained[0]

    def measured(model, x, ks):
        seen.append(x.numpy())
        iwae = np.linspace(-40, -30, len(ks))[:, None] + np.array([-1.0, 1.0])
        found = {"reconstruction": -32.0, "kl": 13.0, "elbo": -45.0, "exact": -29.0, "coarse": -29.0}
        return {name: value + np.array([-1.0, 1.0]) for name, value in found.items()} | {
            "iwae": iwae,
            "coarse": np.array([-30.5, -27.0]),
        }

    class Baseline:
        parameters = 3

        def __init__(self, nats):
            self.nats = nats

        def log_likelihood(self, x):
            seen.append(x)
            return np.array([self.nats - 2, self.nats + 2])

    row = {"mean_confidence": 0.9, "above_90_percent": 0.5, "effective_classes": 8.0, "class_shares": np.full(10, 0.1)}
    quality = [{"source": name, **row} for name in ("test images", "VAE, cut at ½", "VAE")]
    shown = {row["source"]: np.zeros((12, 196)) for row in quality}
    monkeypatch.setattr(evaluate, "measure", measured)
    monkeypatch.setattr(evaluate, "fit_baselines", lambda *_: {"tree": Baseline(-41.0), "pixels": Baseline(-49.0)})
    monkeypatch.setattr(evaluate, "read_samples", lambda *_: (quality, 0.8, shown))
    flags = ["--k", "50", "--images", "30", "--mixture-sizes", "5", "--out", str(tmp_path)]
    metrics = evaluate.main([*SAME, *trained[1], *flags])
    assert all(np.array_equal(x, data.x_test[:30]) for x in seen)
    assert len(seen) == 3
    assert (metrics["test_elbo"], metrics["test_iwae"], metrics["gap"]) == (-45, -30, 15)
    assert metrics["bits_per_pixel"] == pytest.approx(30 / (196 * math.log(2)))
    assert metrics["quadrature_change_at_half_the_points"] == 1
    assert metrics["likelihoods"][-1]["parameters"] == sum(p.numel() for p in model.decoder.parameters())
    assert "an image costs 29.0 nats, 41.0 with the best model without a network" in titles[0]
    assert "IWAE-50 is 1.000 nats below the exact likelihood, the ELBO 16.00" in titles[1]
    ax = evaluate.draw_likelihoods(metrics["likelihoods"], "x").axes[0]
    low, high = ax.collections[0].get_segments()[0][:, 0]  # the line on the first bar, 95 %
    assert high - low == pytest.approx(2 * 1.96 * metrics["likelihoods"][0]["standard_error"])


# --- the latent space ---------------------------------------------------------------------------------------------


def test_the_majority_of_five_neighbours_tells_the_class():
    train, labels = np.array([[0.0], [0.1], [0.2], [0.3], [0.4], [9.0]]), np.array([0, 1, 1, 1, 0, 0])
    parts = SimpleNamespace(y_train=labels, y_test=np.array([1, 1]))
    assert knn_accuracy(train, np.array([[0.0], [0.05]]), parts) == 1


def test_the_plane_is_that_of_the_largest_variance():
    rng = np.random.default_rng(0)
    z = torch.from_numpy(rng.standard_normal((500, 3)) * [1.0, 4.0, 2.0] + [5.0, 6.0, 7.0])
    plane = Plane.of(z)
    variances = np.linalg.eigvalsh(np.cov(z.numpy().T))
    assert plane.share == pytest.approx(variances[1:].sum() / variances.sum())
    assert np.abs(plane.coordinates(z).mean(0)).max() < 1e-9
    at = rng.standard_normal((9, 2))
    np.testing.assert_allclose(plane.coordinates(plane.points(at)), at, atol=1e-12)


@pytest.fixture
def grids(monkeypatch):
    """The images of every grid that latent_space draws."""
    found, draw = [], latent_space.image_grid
    monkeypatch.setattr(latent_space, "image_grid", lambda ax, x, *a, **k: found.append(x) or draw(ax, x, *a, **k))
    return found


class Linear:
    """A decoder that shows its latents: pixel i has the logit z_i, the pixels beyond them 9."""

    def __init__(self, z_dim):
        self.z_dim = z_dim

    def decode(self, z):
        return torch.cat([z, torch.full((*z.shape[:-1], 196 - self.z_dim), 9.0)], dim=-1)

    def encode(self, x):
        return x[:, : self.z_dim] * 0 + 9.0, None


def logits(images):
    """The first pixels' logits: (N, 3)."""
    p = images.reshape(len(images), -1)[:, :3].astype(np.float64)
    return np.log(p / (1 - p))


def test_the_manifold_rises_with_its_axes(grids):
    plane = Plane(torch.zeros(2), torch.eye(2), 1.0, ("a", "b"))
    latent_space.draw_manifold(Linear(2), plane, 4, "x")
    z = logits(grids[0])[:, :2].reshape(4, 4, 2)  # row by row from the top
    assert (np.diff(z[..., 0], axis=1) > 0.1).all()
    assert (np.diff(z[..., 1], axis=0) < -0.1).all()


def test_halfway_through_the_pixels_is_undecided(grids):
    pair = torch.stack([torch.zeros(196), torch.ones(196)])[None]
    figure = latent_space.draw_interpolation(Linear(2), pair, "x")
    said = "halfway 0% of the pixels are undecided through the latents, 100% through the pixels"
    assert figure.get_suptitle() == f"x\n{said}"


def test_a_traversal_moves_one_latent_the_costliest_first(grids):
    mu = torch.tensor([[0.5, -0.5, 0.25], [0.5, -0.5, 0.25]])
    units = {"kl": np.array([1.0, 3.0, 2.0]), "active": np.array([True, True, False]), "variance": np.zeros(3)}
    figure = latent_space.draw_traversals(Linear(3), mu, units, "x")
    rows = logits(grids[0]).reshape(3, latent_space.STEPS, 3)
    for row, unit in zip(rows, (1, 2, 0), strict=True):
        np.testing.assert_allclose(row[:, unit], np.linspace(-3, 3, latent_space.STEPS), atol=1e-4)
        others = [i for i in range(3) if i != unit]
        np.testing.assert_allclose(row[:, others], mu[:1, others].repeat(latent_space.STEPS, 1), atol=1e-4)
    assert figure.get_suptitle().startswith("x: 2 of 3 latents are active")


def test_the_latents_are_measured_on_the_test_images(trained, titles, data, tmp_path):
    model, flags = trained
    metrics = latent_space.main([*SAME, *flags, "--side", "3", "--out", str(tmp_path)])
    with torch.no_grad():
        mu, log_var = model.encode(torch.from_numpy(data.x_test))
    variance = mu.double().var(0, correction=0)
    assert metrics["variance_of_means"] == pytest.approx(variance.tolist(), rel=1e-4)
    assert metrics["active_units"] == (variance > 0.01).sum() == 2
    each = [kl_to_prior(mu[:, [u]], log_var[:, [u]]).mean().item() for u in range(3)]
    assert metrics["kl_of_units"] == pytest.approx(each, rel=1e-4)


# --- reconstructions, samples, the gap ----------------------------------------------------------------------------


def test_what_comes_back_wrong_is_counted(trained, titles, data, tmp_path, monkeypatch):
    model, flags = trained
    monkeypatch.setattr(VAE, "elbo_terms", lambda model, x, n: (-x.sum(1).square(), x[:, 0]))
    metrics = reconstruct.main([*SAME, *flags, "--out", str(tmp_path)])
    x = torch.from_numpy(data.x_test)
    with torch.no_grad():
        p = model.decode(model.encode(x)[0]).sigmoid()
    wrong = ((p > 0.5).float() - x).abs().sum(1)
    assert metrics["wrong_pixels"] == pytest.approx(wrong.mean().item())
    assert metrics["images_without_a_wrong_pixel"] == pytest.approx((wrong == 0).float().mean().item())
    assert metrics["test_elbo"] == pytest.approx((-x.sum(1).square() - x[:, 0]).mean().item())
    assert f"{wrong.mean():.1f} of 196 pixels of a test image come back wrong" in titles[0]


def test_pixels_are_left_open_where_the_probability_is_neither_low_nor_high(trained, titles, tmp_path):
    flags = [*trained[1], "--n", "50", "--out", str(tmp_path), "--device", "cpu"]
    metrics = sample.main(flags)
    model = trained[0]
    with torch.no_grad():
        p = model.decode(torch.from_numpy(np.load(tmp_path / "samples.npz")["z"])).sigmoid().numpy()
    open_ = ((p > 0.1) & (p < 0.9)).mean()
    assert metrics["pixels_left_open"] == pytest.approx(open_)
    assert metrics["mean_pixel"] == pytest.approx(p.mean(), rel=1e-5)
    assert f"{open_:.0%} of their pixels are left open" in titles[0]


def test_the_gaps_errors_are_of_means_over_images():
    best = np.array([-1.5, -2.1, -4.0, -3.0])
    row = inference_gap.gap_row(
        "some", {"likelihood": best + np.arange(4), "best_elbo": best, "elbo": best - np.array([5, 5, 9, 5])}
    )
    assert row["approximation_gap_se"] == pytest.approx(np.std([0, 1, 2, 3], ddof=1) / 2)
    assert row["amortisation_gap_se"] == pytest.approx(np.std([5, 5, 9, 5], ddof=1) / 2)


@pytest.mark.parametrize("draws", [3, 16, 40])
def test_a_gaussians_bound_is_a_mean_over_all_its_draws(draws):
    """A decoder that ignores the latents gives every draw the same reconstruction."""
    torch.manual_seed(0)
    model, x = VAE(6, 4, 2), (torch.rand(5, 6) < 0.5).float()
    with torch.no_grad():
        model.decoder[2].weight.zero_()
        mu, log_var = torch.randn(5, 2), torch.randn(5, 2)
        found = inference_gap.gaussian_elbo(model, x, mu, log_var, draws)
        wanted = log_bernoulli(x, model.decoder[2].bias) - kl_to_prior(mu, log_var)
    torch.testing.assert_close(found, wanted)


def test_with_many_latents_the_likelihood_is_drawn_from_the_best_gaussian(monkeypatch):
    torch.manual_seed(0)
    model, x, given = VAE(6, 4, 3), torch.ones(5, 6), []
    best = torch.full((5, 3), 0.3), torch.full((5, 3), -0.7)
    monkeypatch.setattr(inference_gap, "best_gaussian", lambda *_: best)
    monkeypatch.setattr(VAE, "iwae_bound", lambda model, x, k, q=None: given.append((k, q)) or x[:, 0])
    inference_gap.gaps(model, x, 1, 7)
    ((k, q),) = given
    assert k == 7
    assert all(torch.equal(one, other) for one, other in zip(q, best, strict=True))


def test_the_gap_is_split_on_learned_and_on_other_images(trained, titles, data, monkeypatch, tmp_path):
    seen = []

    def made_up(model, x, steps, k):
        seen.append(x.numpy())
        elbo, loss = np.full(len(x), -40.0), 1.0 if len(seen) == 1 else 3.0
        return {"elbo": elbo, "best_elbo": elbo + loss, "likelihood": elbo + loss + 0.5}

    monkeypatch.setattr(inference_gap, "gaps", made_up)
    metrics = inference_gap.main([*SAME, *trained[1], "--images", "20", "--out", str(tmp_path)])
    assert [row["images"] for row in metrics["gaps"]] == ["training images", "test images"]
    assert np.array_equal(seen[0], data.x_train[:20])
    assert np.array_equal(seen[1], data.x_test[:20])
    assert "the encoder loses 1.00 nats on images it has learned, 3.00 on others" in titles[0]
