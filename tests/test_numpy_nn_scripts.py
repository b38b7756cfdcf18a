"""numpy_nn's scripts: what they compute beside the layers, and what a wrong flag or file gets.

Their files and figures are covered by test_scripts.py, the layers by test_numpy_nn.py.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from numpy_nn import compare_optimizers, evaluate_mlp, pooling_comparison, train_mlp, visualize_filters
from numpy_nn.activations import ReLU
from numpy_nn.compare_optimizers import OPTIMIZERS, SURFACES, TOYS, choose, descend
from numpy_nn.conv import AvgPool2d, Conv2d
from numpy_nn.inputs import load_inputs
from numpy_nn.layers import Flatten, Linear
from numpy_nn.mlp import build_mlp
from numpy_nn.network import Sequential
from numpy_nn.train_mlp import shifted
from shared_utils.cli import UserError
from shared_utils.runs import ROOT

REAL = ROOT / "data"
needs_mnist = pytest.mark.skipif(not (REAL / "MNIST/raw").is_dir(), reason="data/ holds no MNIST")


def rng(seed=0):
    return np.random.default_rng(seed)


# --- surfaces and toy data sets -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SURFACES)
def test_surface_gradients_by_finite_differences(name):
    surface, h = SURFACES[name], 1e-6
    points = [surface.start, *rng().uniform(-2, 2, (20, 2))]
    for x, y in points:
        numeric = np.array(
            [
                (surface.value(x + h, y) - surface.value(x - h, y)) / (2 * h),
                (surface.value(x, y + h) - surface.value(x, y - h)) / (2 * h),
            ]
        )
        np.testing.assert_allclose(surface.gradient(x, y), numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SURFACES)
def test_surfaces_are_zero_at_the_minimum_and_above_elsewhere(name):
    surface = SURFACES[name]
    assert surface.value(*surface.minimum) == 0
    assert np.abs(surface.gradient(*surface.minimum)).max() == 0
    left, right, bottom, top = surface.window
    x, y = np.meshgrid(np.linspace(left, right, 40), np.linspace(bottom, top, 40))
    assert surface.value(x, y).min() >= 0
    for x, y in (surface.start, surface.minimum):
        assert left < x < right
        assert bottom < y < top


def test_gradient_descent_on_the_quadratic_is_its_formula():
    path, values = descend(SURFACES["quadratic"], OPTIMIZERS["SGD"], 0.01, 20)
    t = np.arange(21)
    np.testing.assert_allclose(path[:, 0], -4 * 0.99**t, rtol=1e-12)
    np.testing.assert_allclose(path[:, 1], np.where(t == 0, 1, 0), atol=1e-12)  # 1 − 0.01 · 100 = 0
    np.testing.assert_allclose(values, (path[:, 0] ** 2 + 100 * path[:, 1] ** 2) / 2, rtol=1e-12)


@pytest.mark.parametrize("lr", [0.021, 5.0, 1e200])
def test_a_rate_that_climbs_is_out(lr):
    assert descend(SURFACES["quadratic"], OPTIMIZERS["SGD"], lr, 200) is None
    assert descend(SURFACES["quadratic"], OPTIMIZERS["SGD"], 0.019, 200) is not None
    # Thrown across Rosenbrock's hill, above the start, and by luck down beside the minimum.
    assert descend(SURFACES["Rosenbrock"], OPTIMIZERS["SGD"], 0.002, 500) is None


@pytest.mark.parametrize("name", TOYS)
def test_toy_sets_are_balanced_repeatable_and_separable(name):
    x, y = TOYS[name](300, rng(3))
    assert (x.shape, x.dtype) == ((300, 2), np.float32)
    assert np.bincount(y).tolist() == [150, 150]
    again = TOYS[name](300, rng(3))
    assert np.array_equal(x, again[0])
    assert np.array_equal(y, again[1])
    assert not np.array_equal(x, TOYS[name](300, rng(4))[0])
    # No straight line tells the classes apart, yet a point's nearest neighbour nearly always is of its class.
    line = np.linalg.lstsq(np.c_[x, np.ones(300)], 2 * y - 1, rcond=None)[0]
    assert ((np.c_[x, np.ones(300)] @ line > 0) == y).mean() < 0.92
    distance = ((x[:, None] - x[None]) ** 2).sum(-1) + np.diag(np.full(300, np.inf))
    assert (y[distance.argmin(1)] == y).mean() > 0.9


def test_the_choice_takes_the_lowest_and_marks_the_edge():
    assert choose({0.1: 2.0, 0.2: 1.0, 0.3: np.inf}, "x")["lr"] == 0.2
    assert not choose({0.1: 2.0, 0.2: 1.0, 0.3: np.inf}, "x")["at_edge"]
    assert choose({0.1: 0.5, 0.2: 1.0}, "x")["at_edge"]
    assert choose({0.1: 0.5, 0.2: np.inf}, "x")["grid"] == [{"lr": 0.1, "score": 0.5}, {"lr": 0.2, "score": None}]
    with pytest.raises(UserError, match=r"^SGD on moons: .*not finite.*--lrs"):
        choose({0.1: np.inf}, "SGD on moons")


# --- MLP ----------------------------------------------------------------------------------------------------------


def test_variants_start_from_the_same_weights():
    relu, tanh = (build_mlp([5, 4], name, 9, 3, "xavier", rng()) for name in ("relu", "tanh"))
    for (name, a), (other, b) in zip(relu.parameters().items(), tanh.parameters().items(), strict=True):
        assert name == other
        assert np.array_equal(a, b)
    assert [a.shape for a in relu.parameters().values()] == [(9, 5), (5,), (5, 4), (4,), (4, 3), (3,)]
    assert isinstance(relu.layers[-1], Linear)  # no activation on the logits


def test_shifts_move_each_image_by_whole_pixels_and_repeat_the_edge():
    x = rng().standard_normal((40, 1, 6, 5)).astype(np.float32)
    assert shifted(x, 0, rng()) is x
    moved = shifted(x, 1, rng())
    assert moved.shape == x.shape
    seen = set()
    for before, after in zip(x[:, 0], moved[:, 0], strict=True):
        padded = np.pad(before, 1, mode="edge")
        fits = [(r, c) for r in range(3) for c in range(3) if np.array_equal(padded[r : r + 6, c : c + 5], after)]
        assert len(fits) == 1
        seen.add(fits[0])
    assert len(seen) == 9


def test_evaluate_mlp_on_wrong_files(tmp_path, fails):
    out, weights, about = tmp_path / "out", tmp_path / "model.npz", tmp_path / "model.json"
    flags = ["--dataset", "digits", "--ckpt", weights, "--out", out]
    right = {"hidden": [6], "activation": "relu", "inputs": 784, "classes": list("0123456789")}
    assert "model.json" in fails(evaluate_mlp, flags, out)
    about.write_text(json.dumps(right))
    assert "no such file" in fails(evaluate_mlp, flags, out)
    weights.write_bytes(b"nothing of the kind")
    assert "no .npz file" in fails(evaluate_mlp, flags, out)
    build_mlp([7], "relu", 784, 10).save(weights)
    assert "another network" in fails(evaluate_mlp, flags, out)
    for wrong in ({"hidden": 6}, {"activation": "softplus"}, {"hidden": ["6"]}, {"hidden": [-6]}):
        about.write_text(json.dumps({**right, **wrong}))
        assert "describes no network" in fails(evaluate_mlp, flags, out), wrong
    about.write_text("[1, 2]")
    assert "describes no network" in fails(evaluate_mlp, flags, out)
    about.write_text(json.dumps({**right, "hidden": [7], "classes": list("abcdefghij")}))
    assert "not on those of this --dataset" in fails(evaluate_mlp, flags, out)
    missing = ["--runs-dir", tmp_path, "--quick"]
    assert "`python numpy_nn/train_mlp.py --quick" in fails(evaluate_mlp, missing)


def test_evaluate_mlp_finds_the_surest_mistakes(tmp_path):
    build_mlp([], "relu", 784, 10, rng=rng()).save(tmp_path / "model.npz")  # untrained: mistakes enough
    about = {"hidden": [], "activation": "relu", "inputs": 784, "classes": list("0123456789")}
    (tmp_path / "model.json").write_text(json.dumps(about))
    flags = ["--dataset", "digits", "--ckpt", tmp_path / "model.npz", "--worst", 5, "--out", tmp_path / "out"]
    metrics = evaluate_mlp.main([str(flag) for flag in flags])
    matrix = np.array(metrics["confusion_matrix"])
    assert matrix.sum() - np.trace(matrix) == metrics["test_errors"]
    confidence = [row["confidence"] for row in metrics["worst"]]
    assert len(confidence) == 5
    assert confidence == sorted(confidence, reverse=True)
    assert all(row["true"] != row["predicted"] for row in metrics["worst"])
    low, high = metrics["interval"]
    assert low < metrics["test_accuracy"] < high


# --- pooling ------------------------------------------------------------------------------------------------------


def test_pooling_variants_share_their_first_weights_and_their_shapes():
    networks = {v: pooling_comparison.build_network(v, 10, [0, 1]) for v in pooling_comparison.VARIANTS}
    x = rng().standard_normal((2, 1, 28, 28)).astype(np.float32)
    for network in networks.values():
        assert network.forward(x).shape == (2, 10)
        for i in (0, 3, 7):
            assert np.array_equal(network.layers[i].params["W"], networks["max"].layers[i].params["W"])
    sizes = {v: sum(a.size for a in network.parameters().values()) for v, network in networks.items()}
    assert sizes["max"] == sizes["average"] == 80 + 1168 + 7850
    assert sizes["strided"] - sizes["max"] == (8 * 8 * 4 + 8) + (16 * 16 * 4 + 16)
    assert not np.array_equal(
        pooling_comparison.build_network("max", 10, [0, 2]).layers[0].params["W"], networks["max"].layers[0].params["W"]
    )


def test_the_average_is_one_strided_convolution():
    layer, x = pooling_comparison.halving("strided", 3, rng()), rng(1).standard_normal((2, 3, 6, 4)).astype(np.float32)
    layer.params["W"][...] = np.eye(3)[:, :, None, None] / 4
    np.testing.assert_allclose(layer.forward(x), AvgPool2d(2).forward(x), rtol=1e-5, atol=1e-6)


# --- filters ------------------------------------------------------------------------------------------------------


def test_dead_and_active_maps_are_counted():
    network = Sequential(Conv2d(1, 3, 1), ReLU(), Flatten(), Linear(12, 2))
    network.layers[0].params["W"][:, 0, 0, 0] = [1, -1, 0]
    network.layers[0].params["b"][:] = [0, 0, -1]
    x = np.ones((5, 1, 2, 2), dtype=np.float32)
    x[0] = 0
    conv, relu = visualize_filters.layer_statistics(network, x)
    assert (conv["layer"], conv["channels"], conv["pixels"]) == ("1 Conv2d", 3, 2)
    assert conv["mean_activation"] == pytest.approx((0.8 - 0.8 - 1) / 3)
    assert relu["dead_fraction"] == pytest.approx(2 / 3)
    assert relu["active_fraction"] == pytest.approx(0.8 / 3)


def test_neighbouring_weights_of_smooth_filters_correlate():
    smooth = np.add.outer(np.arange(5.0), np.arange(5.0))[None, None]
    assert visualize_filters.neighbour_correlation(smooth) > 0.8
    assert abs(visualize_filters.neighbour_correlation(rng().standard_normal((500, 1, 5, 5)))) < 0.03


def test_visualize_filters_on_wrong_files(tmp_path, fails):
    out, weights, about = tmp_path / "out", tmp_path / "model.npz", tmp_path / "model.json"
    flags = ["--dataset", "digits", "--ckpt", weights, "--out", out]
    assert "model.json" in fails(visualize_filters, flags, out)
    for wrong in (
        [1],
        {"hidden": [6]},
        {"recipe": "secret"},
        {"recipe": ["plain"]},
        {"recipe": "plain", "n_classes": 0},
    ):
        about.write_text(json.dumps(wrong))
        assert "names no recipe" in fails(visualize_filters, flags, out), wrong
    about.write_text(json.dumps({"recipe": "plain"}))
    assert "no such file" in fails(visualize_filters, flags, out)
    visualize_filters.build_network("strong", rng()).save(weights)
    assert "another network" in fails(visualize_filters, flags, out)
    visualize_filters.build_network("plain", rng()).save(weights)
    assert "has the classes 0 to 9" in fails(visualize_filters, [*flags, "--digits", "3", "12"], out)
    missing = ["--runs-dir", tmp_path]
    assert "`python numpy_nn/train_mnist_numpy.py" in fails(visualize_filters, missing)


def test_a_class_without_a_validation_image_is_no_class_to_show(tmp_path, fails, monkeypatch):
    def without_threes(args):
        data = load_inputs(args)
        kept = data.y_val != 3
        return replace(data, x_val=data.x_val[kept], y_val=data.y_val[kept])

    monkeypatch.setattr(visualize_filters, "load_inputs", without_threes)
    visualize_filters.build_network("plain", rng()).save(tmp_path / "model.npz")
    (tmp_path / "model.json").write_text(json.dumps({"recipe": "plain"}))
    flags = ["--dataset", "digits", "--ckpt", tmp_path / "model.npz", "--digits", 1, 3, "--out", tmp_path / "out"]
    said = fails(visualize_filters, flags, tmp_path / "out")
    assert "--digits 3: none of the validation images is of the class 3" in said


# --- flags --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (train_mlp, ["--activations", "relu", "gelu"], "invalid choice: 'gelu'"),
        (train_mlp, ["--hidden", "0"], "1 or more"),
        (train_mlp, ["--lr", "nan"], "finite number above 0"),
        (train_mlp, ["--dataset", "imagenet"], "neither a known set"),
        (train_mlp, ["--shift", "-1"], "0 or more"),
        (evaluate_mlp, ["--worst", "0"], "1 or more"),
        (compare_optimizers, ["--lrs", "0.1", "-1"], "finite number above 0"),
        (compare_optimizers, ["--steps", "0"], "1 or more"),
        (pooling_comparison, ["--train-size", "1000000", "--dataset", "digits"], "digits has 1198 beside validation"),
        (pooling_comparison, ["--seeds", "-1"], "from 0 to"),
        (visualize_filters, ["--digits", "x"], "0 or more"),
    ],
)
def test_wrong_flags(module, flags, message, fails, tmp_path):
    out = tmp_path / "out"
    assert message in fails(module, [*flags, "--out", out], out)


@pytest.mark.parametrize(("module", "flag"), [(train_mlp, "--lr"), (pooling_comparison, "--lrs")])
def test_a_loss_that_is_not_finite_names_the_update_and_the_rate(module, flag, fails, tmp_path):
    flags = ["--quick", "--seeds", 0, flag, 1e30, "--out", tmp_path / "out"]
    said = fails(module, flags)  # one line: no warning of an overflow before it
    assert re.search(r"error: (relu|max): update [1-9]\d*, learning rate [\d.]+e\+\d+: ", said), said
    assert f"try {flag} 1e+29" in said


def test_a_rate_that_diverges_is_out_of_the_comparison_of_poolings(tmp_path):
    flags = ["--quick", "--seeds", "0", "--epochs", "1", "--train-size", "200", "--out", str(tmp_path)]
    found = pooling_comparison.main([*flags, "--lrs", "1e30", "0.01"])["variants"]
    for row in found.values():
        assert (row["lr"], row["lr_grid"]) == (0.01, [0.01, 1e30])
        assert row["lr_val_losses"][0] == pytest.approx(1.2, abs=1.1)
        assert row["lr_val_losses"][1] is None


@needs_mnist
@pytest.mark.slow
def test_the_mlp_reaches_its_bar_on_mnist(tmp_path):
    flags = ["--activations", "relu", "--seeds", "0", "--data-dir", str(REAL), "--out", str(tmp_path / "run")]
    assert train_mlp.main(flags)["test_accuracy"] >= 0.983
