"""PCA, the angles between subspaces, and the linear autoencoder that must find PCA's."""

import math

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA

from autoencoder import pca_baseline
from autoencoder.fitting import Recipe, codes, fit
from autoencoder.inputs import load_pixels, pixels
from autoencoder.layers import Linear
from autoencoder.losses import mean_squared_error
from autoencoder.models import Autoencoder
from autoencoder.pca import fit_pca, moments, pca_of, principal_angles
from autoencoder.pca_baseline import fit_linear, pseudo_images, reached
from shared_utils.cli import UserError
from shared_utils.runs import ROOT

REAL = ROOT / "data"
needs_fashion = pytest.mark.skipif(not (REAL / "FashionMNIST/raw").is_dir(), reason="data/ holds no Fashion-MNIST")
QUICK = ["--quick", "--latents", "8", "2", "8", "--epochs", "2", "--linear-updates", "20", "--linear-latent", "3"]


@pytest.fixture(scope="module")
def data():
    return load_pixels(pca_baseline.build_parser().parse_args(["--quick"]))


@pytest.fixture(scope="module")
def statistics(data):
    return moments(data.x_train)


def images(n, d, rank, seed=0):
    """uint8 (n, d) around a `rank`-dimensional subspace."""
    rng = np.random.default_rng(seed)
    x = 128 + 25 * rng.standard_normal((n, rank)) @ rng.standard_normal((rank, d))
    return torch.from_numpy((x + rng.standard_normal((n, d))).clip(0, 255).astype(np.uint8))


# --- PCA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "d", "k"), [(300, 20, 5), (40, 60, 7), (5200, 6, 3)])  # one of several parts
def test_pca_is_that_of_scikit_learn(n, d, k):
    x, other = images(n, d, 4), images(50, d, 4, seed=1)
    pca, oracle = fit_pca(x, k), SklearnPCA(k, svd_solver="full").fit(x.numpy() / 255)
    np.testing.assert_allclose(pca.mean, oracle.mean_, rtol=1e-12)
    np.testing.assert_allclose(pca.variances[:k] * n / (n - 1), oracle.explained_variance_, rtol=1e-8)
    np.testing.assert_allclose((pca.components.T.numpy() * oracle.components_).sum(1).__abs__(), 1, rtol=1e-9)
    codes = oracle.transform(other.numpy() / 255)
    np.testing.assert_allclose(pca.project(other).abs(), np.abs(codes), atol=1e-5)
    error = ((oracle.inverse_transform(codes) - other.numpy() / 255) ** 2).mean(1)
    np.testing.assert_allclose(pca.errors(other), error, rtol=1e-4)


def test_errors_on_the_training_images_are_the_variances_left_out():
    x = images(400, 12, 5)
    pca = fit_pca(x, 9)
    for k in (1, 4, 9):
        assert pca.first(k).components.shape == (12, k)
        assert pca.first(k).errors(x).mean().item() == pytest.approx(pca.first(k).training_error, rel=1e-4)
        assert torch.equal(pca.first(k).project(x), fit_pca(x, k).project(x))
    assert pca.reconstruct(pca.project(x)).dtype == torch.float32
    everything = fit_pca(x, 12)
    torch.testing.assert_close(everything.reconstruct(everything.project(x)), pixels(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "d", "k"), [(100, 9, 10), (6, 9, 7), (100, 9, 0)])
def test_more_components_than_there_can_be_are_refused(n, d, k):
    with pytest.raises(UserError, match=rf"from 1 to {min(n, d)} components of {n} images of {d}, not {k}$"):
        fit_pca(images(n, d, 3), k)


# --- angles -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("angle", [1e-12, 1e-8, 1e-3, 0.7, math.pi / 2])
def test_principal_angles_are_exact_however_small(angle):
    basis = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64, generator=torch.manual_seed(0))).Q
    a, b = basis[:, :3], basis[:, :3].clone()
    b[:, 1] = math.cos(angle) * basis[:, 1] + math.sin(angle) * basis[:, 5]
    mix = torch.tensor([[1.0, 2, 0], [0, 1, 3], [1, 0, 5]], dtype=torch.float64)  # another basis of the same space
    angles = principal_angles(a @ mix, b)
    assert angles.shape == (3,)
    assert angles[0].item() == pytest.approx(angle, rel=1e-3, abs=1e-15)
    assert angles[1].item() < 1e-14
    assert principal_angles(a[:, :1], b).shape == (1,)


# --- the linear autoencoder ---------------------------------------------------------------------------------------


def test_pseudo_images_have_the_mean_and_the_covariance(statistics):
    torch.manual_seed(0)
    x = pseudo_images(statistics[1])
    rank = int(torch.linalg.matrix_rank(statistics[1], rtol=1e-10, hermitian=True))
    assert x.shape == (rank + 1, 784)
    torch.testing.assert_close(x.mean(0), torch.zeros(784, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(x.T @ x / len(x), statistics[1], rtol=0, atol=1e-8)


def test_pseudo_images_give_the_gradient_of_all_images():
    real = images(500, 16, 5)
    mean, covariance = moments(real)
    real = pixels(real, torch.float64) - mean
    torch.manual_seed(0)
    model = Autoencoder((3,), (), "linear", use_batchnorm=False, in_features=16).to(torch.float64)
    gradients, losses = [], []
    for x in (real, pseudo_images(covariance)):
        loss, gradient = mean_squared_error(model.forward(x, training=True), x)
        model.backward(gradient)
        losses.append(loss.item())
        gradients.append([layer.grads[key] for layer in model.layers for key in ("W", "b")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def linear_run(statistics):
    return fit_linear(statistics[1], k=4, updates=250, lr=0.05, seed=0)


@torch.no_grad()
def test_a_linear_autoencoder_finds_pcas_subspace(data, statistics):
    model, rows = linear_run(statistics)
    assert rows[0]["updates"] == 0
    assert not reached(rows[0])
    assert rows[-1]["updates"] == 250
    # Measured anew, with PCA from elsewhere and on the images themselves.
    x = pixels(data.x_train, torch.float64) - statistics[0]
    oracle = SklearnPCA(4, svd_solver="full").fit(x.numpy())
    basis = torch.from_numpy(oracle.components_).T  # (D, K)
    encoder, decoder = (layer.params["W"] for layer in model.layers)
    for found in (decoder.T, x.T @ (x @ encoder)):
        assert principal_angles(found, basis)[0] < 1e-3
    best = ((oracle.inverse_transform(oracle.transform(x.numpy())) - x.numpy()) ** 2).mean()
    excess = (model.predict(x) - x).square().mean().item() / best - 1
    assert -1e-9 < excess < 1e-3
    assert rows[-1]["excess"] == pytest.approx(excess, abs=1e-6)
    assert reached(rows[-1])
    cosines = (decoder / decoder.norm(dim=1, keepdim=True) @ basis).abs()
    assert cosines.max(1).values.min() < 0.95  # the subspace, not the axes
    assert linear_run(statistics)[1] == rows


def no_gradient_for_the_encoder(layer, dy, right):
    return 0 * right


def wrong_sign(layer, dy, right):
    return -right


def forgets_the_weights(layer, dy, right):
    return dy @ torch.ones_like(layer.params["W"]).T


def of_another_image(layer, dy, right):
    return right.roll(1, 0)


@pytest.mark.parametrize("wrong", [no_gradient_for_the_encoder, wrong_sign, forgets_the_weights, of_another_image])
def test_a_wrong_backward_pass_does_not_get_there(wrong, statistics, monkeypatch):
    sound = Linear.backward

    def backward(self, dy, need_dx=True):
        dx = sound(self, dy, need_dx)
        return wrong(self, dy, dx) if need_dx else None

    monkeypatch.setattr(Linear, "backward", backward)
    try:
        rows = linear_run(statistics)[1]
    except UserError:  # not finite any more
        return
    assert not reached(rows[-1])
    assert rows[-1]["decoder_angle"] > 0.01


def test_the_linear_autoencoder_stops_where_the_loss_is_not_finite(statistics):
    with pytest.raises(UserError, match=r"the loss is .* at step .* try a lower --linear-lr"):
        fit_linear(statistics[1], k=4, updates=200, lr=1e200, seed=0)


@needs_fashion
@pytest.mark.slow
def test_the_linear_autoencoder_reaches_pca_on_fashion():
    args = pca_baseline.build_parser().parse_args(["--data-dir", str(REAL)])
    data = load_pixels(args)
    mean, covariance = moments(data.x_train)
    metrics = pca_baseline.linear_study(args, data, covariance, pca_of(mean, covariance, args.linear_latent))[2]
    assert metrics["reached"]
    assert abs(metrics["test_excess"]) < 1e-3


# --- the script ---------------------------------------------------------------------------------------------------


def test_rows_of_the_comparison(tmp_path, data):
    metrics = pca_baseline.main([*QUICK, "--out", str(tmp_path)])
    assert [row["k"] for row in metrics["rows"]] == [2, 8]
    for row in metrics["rows"]:
        pca = fit_pca(data.x_train, row["k"])
        assert row["pca_mse"] == pytest.approx(pca.errors(data.x_test).mean().item(), rel=1e-5)
        assert row["pca_clipped_mse"] < row["pca_mse"]
        assert row["below_pca"] == pytest.approx(1 - row["ae_mse"] / row["pca_mse"])
    assert not metrics["linear"]["reached"]
    assert metrics["linear"]["updates"] == 20
    # The rival of the linear autoencoder is PCA of the training images, and both are measured on the test images.
    oracle, x = SklearnPCA(3).fit(pixels(data.x_train, torch.float64)), pixels(data.x_test, torch.float64).numpy()
    expected = ((oracle.inverse_transform(oracle.transform(x)) - x) ** 2).mean()
    assert metrics["linear"]["pca_test_mse"] == pytest.approx(expected)
    assert metrics["linear"]["test_mse"] > expected
    assert metrics["linear"]["test_excess"] == pytest.approx(metrics["linear"]["test_mse"] / expected - 1)


@torch.no_grad()
def test_the_codes_of_each_are_looked_up(data, monkeypatch):
    monkeypatch.setattr(pca_baseline, "vote_accuracy", lambda code, data: code(data.x_train).square().mean().item())
    given = []
    monkeypatch.setattr(pca_baseline, "fit", lambda *args: given.append(args) or fit(*args))
    recipe, pca = Recipe((16, 4), epochs=1, batch_size=64), fit_pca(data.x_train, 8)
    row, x = pca_baseline.compare(4, recipe, data, pca, 0), data.x_train
    assert row["pca_knn"] == pytest.approx(pca.first(4).project(x).square().mean().item())
    ((model, used, train, val, seed),) = given  # a second training may differ in the last bits
    assert (used, seed) == (recipe, 0)
    assert train is data.x_train
    assert val is data.x_val
    assert row["ae_knn"] == pytest.approx(codes(model, x).square().mean().item())


@torch.no_grad()
def test_each_size_is_trained_by_its_recipe(data):
    rows = [
        pca_baseline.compare(4, Recipe((16, 4), epochs=e, batch_size=64), data, fit_pca(data.x_train, 8), seed)
        for e, seed in ((1, 0), (1, 0), (6, 0), (1, 1))
    ]
    first, again, longer, other = (row["ae_mse"] for row in rows)
    assert first == again
    assert longer < 0.9 * first
    assert other != first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--latents", "8", "785"], "PCA gives from 1 to 784 components of 1237 images of 784, not 785"),
        (["--val-size", "1400"], "PCA gives from 1 to 37 components of 37 images"),
        (["--linear-latent", "784"], "--linear-latent 784: PCA leaves no error"),
        (["--linear-latent", "500"], "PCA leaves no error"),
        (["--latents", "0"], "1 or more"),
        (["--jobs", "0"], "1 or more"),
        (["--dataset", "imagenet"], "neither a known set"),
    ],
)
def test_wrong_flags(flags, message, fails, tmp_path):
    quick = ["--quick", "--latents", 64, "--out", tmp_path / "out"]
    assert message in fails(pca_baseline, [*quick, *flags], tmp_path / "out")
