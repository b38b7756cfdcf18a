"""autoencoder: which images may be seen by what, and which images and points a published number is measured on.

Weights, PCA and the classifier's standardisation see training images alone; early stopping, learning rates, recipes and
seeds are chosen on validation images; the vote of neighbours is among training and validation images. Errors and
accuracies called "test" are of all test images, which nothing else sees. The same numbers are computed anew here, from
the networks and with scikit-learn. Figures are left out, and so is UMAP: what it is given is looked at instead.
"""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import sem
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness
from sklearn.metrics import silhouette_score
from sklearn.model_selection import LeaveOneOut, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from autoencoder import ae_experiments, ae_run_compare, ae_umap, pca_baseline, train_mlp
from autoencoder import ft_compare_raw_vs_ae as compare
from autoencoder.embedding import vote_accuracy
from autoencoder.fitting import Recipe, fit
from autoencoder.inputs import load_pixels, pixels
from autoencoder.models import Autoencoder
from autoencoder.pca import fit_pca
from autoencoder.trained import Trained, load_trained, save_trained
from shared_utils.checkpoint import save_arrays

DATA = ["--dataset", "digits", "--val-size", "200", "--device", "cpu"]
SMALL = Recipe((16, 4), "relu", "he", False, lr=1e-2, epochs=2, batch_size=200)
VOTE = KNeighborsClassifier(5, algorithm="brute")


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def args():
    return ae_experiments.build_parser().parse_args(DATA)


@pytest.fixture(scope="module")
def data(args):
    return load_pixels(args)


def without_figures(monkeypatch, module):
    for name in vars(module).copy():
        if name == "save_figure" or name.startswith("draw_"):
            monkeypatch.setattr(module, name, lambda *args, **options: None)


def error(model, x):
    """The mean squared error of the images x."""
    return ((model.forward(pixels(x)) - pixels(x)) ** 2).mean().item()


def pca_codes_and_error(k, data):
    """scikit-learn's PCA of the training images: a function images → codes, and the error of the test images."""
    pca, x = PCA(k, svd_solver="full").fit(data.x_train.numpy() / 255.0), data.x_test.numpy() / 255.0
    return lambda x: pca.transform(x.numpy() / 255.0), ((pca.inverse_transform(pca.transform(x)) - x) ** 2).mean()


def vote(code, data):
    """5-NN accuracy of the test images among training and validation images."""
    x, y = (torch.cat(parts) for parts in ((data.x_train, data.x_val), (data.y_train, data.y_val)))
    return VOTE.fit(code(x), y).score(code(data.x_test), data.y_test)


# --- layers, training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_batchnorm", [False, True])
def test_gradients_pass_through_the_noise(use_batchnorm):
    torch.manual_seed(0)
    shape = {"activation": "gelu", "use_batchnorm": use_batchnorm, "in_features": 8}
    model = Autoencoder((6, 3), noise=0.3, code_noise=0.2, **shape).to(torch.float64)
    x = torch.rand(9, 8, dtype=torch.float64)
    torch.manual_seed(7)
    loss, gradient = model.loss(model.forward(x, training=True), x)
    dx = model.backward(gradient, need_dx=True)
    grads = [layer.grads[name] for layer in model.layers for name in layer.params]

    with torch.enable_grad():
        leaves = [value.clone().requires_grad_() for value in model.parameters().values()]
        given, at = x.clone().requires_grad_(), iter(leaves)

        def linear(h, normed=False):
            h = h @ next(at) + next(at)
            return F.batch_norm(h, None, None, next(at), next(at), training=True) if normed else h

        torch.manual_seed(7)
        h = given + 0.3 * torch.randn(9, 8, dtype=torch.float64)
        h = F.batch_norm(linear(F.gelu(linear(h, use_batchnorm))), None, None, training=True)
        h = h + 0.2 * torch.randn(9, 3, dtype=torch.float64)
        expected = F.mse_loss(torch.sigmoid(linear(F.gelu(linear(h, use_batchnorm)))), x)
        found = torch.autograd.grad(expected, [given, *leaves])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip([dx, *grads], found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    assert min(grads[0].norm(), dx.norm()) > 1e-6  # of the encoder's first weights


def test_the_seed_of_fit_shuffles_the_images(data):
    found = []
    for seed in (1, 1, 2):
        model = SMALL.build(0, 784)  # the same weights
        fit(model, SMALL, data.x_train, data.x_val, seed)
        found.append(model.parameters()["0.W"])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- what is measured on what -------------------------------------------------------------------------------------


def test_neighbours_are_training_and_validation_images(data):
    plane = torch.randn(784, 3, generator=torch.manual_seed(0))

    def code(x):
        return pixels(x) @ plane

    assert vote_accuracy(code, data) == pytest.approx(vote(code, data), abs=1e-6)
    less = VOTE.fit(code(data.x_train), data.y_train).score(code(data.x_test), data.y_test)
    assert abs(less - vote(code, data)) > 1e-3


def test_the_comparison_with_pca_stops_on_validation_and_measures_on_test_images(data, monkeypatch):
    given = []
    monkeypatch.setattr(pca_baseline, "fit", lambda *args: given.append(args) or fit(*args))
    row = pca_baseline.compare(4, SMALL, data, fit_pca(data.x_train, 8), 3)
    model, recipe, x_train, x_val, seed = given[0]
    assert torch.equal(x_train, data.x_train)
    assert torch.equal(x_val, data.x_val)
    assert (len(given), recipe, seed) == (1, SMALL, 3)
    project, pca_mse = pca_codes_and_error(4, data)
    expected = {"k": 4, "ae_mse": error(model, data.x_test), "val_mse": error(model, data.x_val), "pca_mse": pca_mse}
    expected |= {"ae_knn": vote(lambda x: model.encoder.forward(pixels(x)), data), "pca_knn": vote(project, data)}
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert expected["ae_mse"] != pytest.approx(expected["val_mse"], rel=1e-3)


@pytest.mark.parametrize("shifted", ["y_val", "y_test"])
def test_test_accuracy_is_of_test_images_and_curves_are_of_validation_images(shifted, data):
    flags = ["--quick", "--labels", "600", "--seeds", "0", "--epochs", "6", "--updates", "100"]
    args = compare.build_parser().parse_args([*flags, "--linear-lr", "0.01"])
    spoilt = replace(data, **{shifted: (getattr(data, shifted) + 1) % 10})
    features = {"raw": tuple(map(pixels, (data.x_train, data.x_val, data.x_test)))}
    accuracies, curves, right = compare.study(args, spoilt, features, lambda **row: None)
    found = [value for by_labels in accuracies.values() for of in by_labels.values() for value in of["raw"]]
    assert len(found) == 4  # two classifiers, 600 labels and all
    assert len(right["raw"]) == len(data.y_test)
    assert right["raw"].mean() == pytest.approx(accuracies["MLP"][len(data.y_train)]["raw"][0])
    if shifted == "y_test":
        assert max(found) < 0.1
        assert curves["raw"][0][-1] > 0.85
    else:
        assert min(found) > 0.75
        assert curves["raw"][0][-1] < 0.1


def test_the_small_networks_are_scored_on_points_of_their_own(tmp_path, monkeypatch):
    without_figures(monkeypatch, train_mlp)
    scores, train = {}, train_mlp.train

    def watched(problem, use_batchnorm, init, seed, lr, args, first_layer=None):
        network, curves = train(problem, use_batchnorm, init, seed, lr, args, first_layer)
        points = np.concatenate([problem.drawn[part][0] for part in ("train", "val", "test")])
        assert len(points) == len(np.unique(points, axis=0)) == 1600  # none in two parts
        for part, (x, y) in problem.drawn.items():
            output = network.predict(problem.inputs(x)).double().numpy()
            if problem.classifies:
                label, score = f"clf_{part}_accuracy", (output.argmax(1) == y).mean()
            else:
                label, score = f"reg_{part}_mse", ((output * problem.y_std + problem.y_mean - y) ** 2).mean()
            label, variant = (label + "_swapped", init) if first_layer else (label, (use_batchnorm, init))
            scores.setdefault((label, variant), []).append(score)
        return network, curves

    monkeypatch.setattr(train_mlp, "train", watched)
    metrics = train_mlp.main(["--quick", "--epochs", "3", "--depth-probe", "2", "--out", str(tmp_path)])
    for label in ("clf_val_accuracy", "clf_test_accuracy", "reg_val_mse", "reg_test_mse", "reg_test_mse_swapped"):
        expected = [np.mean(of) for (name, _), of in scores.items() if name == label]  # in the order of training
        assert len(expected) == (2 if "swapped" in label else 4)
        assert [of["mean"] for of in metrics[label].values()] == pytest.approx(expected, rel=1e-4), label


# --- the scripts that train and compare autoencoders --------------------------------------------------------------


def test_grid_and_seeds_are_chosen_on_validation_images_and_kept_in_order(tmp_path, args, data, monkeypatch):
    """Two jobs, the first of which always ends last; the seed that validation prefers is the worst on test."""
    recipes = [replace(SMALL, activation=name, epochs=1, optimizer="adamw") for name in ("relu", "gelu")]
    grid = [fit(recipe.build(1, 784), recipe, data.x_train, data.x_val, 1).val_recon for recipe in recipes]
    final, models = replace(recipes[int(np.argmin(grid))], epochs=2), {}
    for seed in (4, 7, 9):
        models[seed] = final.build(seed, 784)
        fit(models[seed], final, data.x_train, data.x_val, seed)
    test = {seed: error(model, data.x_test) for seed, model in models.items()}
    best_on_test, between, preferred = sorted(test, key=test.get)
    said = {best_on_test: 0.02, preferred: 0.01, between: 0.03}

    without_figures(monkeypatch, ae_experiments)
    lock, second_is_done, train = threading.Lock(), {1: threading.Event(), 2: threading.Event()}, ae_experiments.train

    def first_ends_last(x_train, x_val, device, recipe, seed):
        with lock:  # PyTorch's generator is one for all threads
            found, weights = train(x_train, x_val, device, recipe, seed)
        if (recipe.epochs, recipe.activation, seed) in ((1, "relu", 1), (2, final.activation, best_on_test)):
            second_is_done[recipe.epochs].wait(10)
            time.sleep(0.2)
        second_is_done[recipe.epochs].set()
        return replace(found, val_recon=said[seed]) if recipe.epochs == 2 and seed in said else found, weights

    monkeypatch.setattr(ae_experiments, "train", first_ends_last)
    flags = [*DATA, "--seed", "1", "--jobs", "2", "--seeds", *map(str, said), "--epochs", "1", "--final-epochs", "2"]
    flags += ["--enc-dims", "16,4", "--init", "he", "--batchnorm", "off", "--lr", "0.01", "--batch-size", "200"]
    with ae_experiments.joblib.parallel_config(backend="threading"):
        metrics = ae_experiments.main([*flags, "--no-amp", "--out", str(tmp_path)])

    assert [row["activation"] for row in metrics["grid"]] == ["relu", "gelu"]
    assert [row["val_recon"] for row in metrics["grid"]] == pytest.approx(grid, rel=1e-6)
    assert metrics["best"] == str(final)
    assert metrics["val_recon_of_seeds"] == list(said.values())
    assert metrics["test_recon_of_seeds"] == pytest.approx([test[seed] for seed in said], rel=1e-6)
    assert (metrics["val_recon"], metrics["test_recon"]) == pytest.approx((0.01, test[preferred]), rel=1e-6)
    kept = load_trained(tmp_path / "best.pth", args, 784)
    assert kept.val_recon == 0.01
    torch.testing.assert_close(kept.model.parameters(), models[preferred].parameters())
    assert metrics["pca_test_recon"] == pytest.approx(pca_codes_and_error(4, data)[1], rel=1e-5)


def test_standard_errors_are_of_the_mean_over_test_images(tmp_path, args, data, monkeypatch):
    models, flags = [SMALL.build(seed, 784) for seed in (0, 1)], [*DATA, "--n", "100", "--out", str(tmp_path / "out")]
    for tag, model in zip(("base", "reg"), models, strict=True):
        save_trained(tmp_path / tag, Trained(model, SMALL, 0.1), args)
        flags += [f"--ckpt-{tag}", str(tmp_path / tag)]
    errors = [((model.forward(pixels(data.x_test)) - pixels(data.x_test)) ** 2).mean(1).numpy() for model in models]
    difference = errors[1].astype(np.float64) - errors[0]
    found = {tag: {"mse": mse, "y": data.y_test.numpy()} for tag, mse in zip(("base", "reg"), errors, strict=True)}
    bars = ae_run_compare.draw_errors(found, data, "").axes[1].collections[0].get_segments()
    halves = [np.ptp(segment[:, 0]) / 2 * 1e-4 for segment in bars]  # drawn in units of 0.0001
    assert halves == pytest.approx([sem(difference[data.y_test == label]) for label in range(10)], rel=1e-4)

    without_figures(monkeypatch, ae_run_compare)
    metrics = ae_run_compare.main(flags)
    assert metrics["mse_difference"] == pytest.approx(difference.mean(), rel=1e-4)
    assert metrics["mse_difference_standard_error"] == pytest.approx(sem(difference), rel=1e-4)
    for row, model, mse in zip(metrics["variants"], models, errors, strict=True):
        assert row["test_recon"] == pytest.approx(mse.mean(), rel=1e-5)
        assert row["knn_accuracy"] == pytest.approx(vote(lambda x, m=model: m.encoder.forward(pixels(x)), data))


# --- ae_umap ------------------------------------------------------------------------------------------------------


def test_spaces_and_maps_are_measured_against_the_pixels(tmp_path, data, monkeypatch):
    kept = ae_umap.chosen(data.y_test.numpy(), 150, 0)
    x, y = pixels(data.x_test[kept]).numpy(), data.y_test[kept].numpy()
    codes = SMALL.build(0, 784).encoder.forward(pixels(data.x_test)).numpy()
    pca = pca_codes_and_error(4, data)[0](data.x_test[kept])
    spaces = {"codes": codes[kept], "pixels": x, "PCA-4": pca, "PCA-2": pca[:, :2]}
    mapped = []

    def umap_map(z, neighbours, seed, min_dist, init):
        mapped.append((z.numpy(), neighbours[0].numpy(), len(neighbours[1][0])))
        rng = np.random.default_rng([seed, init == "random", z.shape[1]])
        return (z[:, :2].numpy() + rng.standard_normal((len(z), 2))).astype(np.float32)

    without_figures(monkeypatch, ae_umap)
    monkeypatch.setattr(ae_umap, "umap_map", umap_map)
    zeros = np.zeros(len(codes))
    save_arrays(tmp_path / "z.npz", Z=codes, Yhat=zeros, mse=zeros, y=data.y_test.numpy(), dataset="digits")
    flags = [*DATA, "--seeds", "0", "1", "--neighbors", "8", "--n", "150", "--npz", str(tmp_path / "z.npz")]
    metrics = ae_umap.main([*flags, "--out", str(tmp_path / "out")])

    for z, distances, k in mapped:  # each map is of its space's own neighbours
        expected = NearestNeighbors(n_neighbors=7, algorithm="brute").fit(z).kneighbors()[0]
        np.testing.assert_allclose(distances, expected, rtol=1e-3, atol=1e-4)
        assert k == 7
    rows = {row["space"]: row for row in metrics["spaces"] if row["start"] != "random"}
    drawn = {}
    for name in ("codes", "pixels", "PCA-4"):
        z = torch.from_numpy(spaces[name]).float()
        drawn[f"UMAP of {name}"] = umap_map(z, (z, z), 1, 0, "spectral")  # the last seed's
    for name, z in {**spaces, **drawn}.items():
        values = [rows[name][f"{measure}_values"][-1] for measure in ae_umap.MEASURES]
        expected = [trustworthiness(a, b, n_neighbors=15) for a, b in ((x, z), (z, x))]
        expected += [cross_val_score(VOTE, z, y, cv=LeaveOneOut()).mean(), silhouette_score(z, y)]
        assert values == pytest.approx(expected, abs=2e-3), name
    assert len(mapped) == 3 + 2 * 5
    ours, theirs = rows["UMAP of codes"], rows["UMAP of pixels"]
    assert metrics["codes_against_pixels"] == {name: ae_umap.verdict(ours, theirs, name) for name in ae_umap.MEASURES}
    assert {"better", "worse"} & set(metrics["codes_against_pixels"].values())  # else the order would not count
