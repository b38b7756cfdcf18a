"""numpy_nn's scripts: what they choose by, compare and say of it, where the answer is known beforehand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from numpy_nn import (
    benchmark,
    compare_optimizers,
    evaluate_mlp,
    failure_modes,
    mlp_regression,
    pooling_comparison,
    train_mlp,
    train_mnist_numpy,
    train_numpy_vs_torch,
    visualize_filters,
)
from numpy_nn.activations import ReLU
from numpy_nn.cnn import build_network
from numpy_nn.inputs import evaluate, load_inputs, predict_logits
from numpy_nn.losses import NotFinite, log_softmax
from numpy_nn.mlp import build_mlp
from numpy_nn.optimizers import Adam

DIGITS = ["--dataset", "digits"]


@pytest.fixture
def drawn(monkeypatch):
    """File name → figure, of all that a script draws; nothing is saved."""
    found = {}
    modules = (compare_optimizers, failure_modes, mlp_regression, pooling_comparison, train_mlp, train_mnist_numpy)
    for module in (*modules, train_numpy_vs_torch, visualize_filters):
        monkeypatch.setattr(module, "save_figure", lambda figure, path, dpi=0: found.update({path.name: figure}))
    monkeypatch.setattr(evaluate_mlp.plotting, "save_figure", lambda figure, path: found.update({path.name: figure}))
    return found


class Rates(Adam):
    """Adam that remembers its learning rates."""

    seen: list

    def step(self):
        self.seen.append(self.lr)
        super().step()


@pytest.fixture(scope="module")
def data():
    return load_inputs(SimpleNamespace(dataset="digits", data_dir="data"))


# --- regression ---------------------------------------------------------------------------------------------------


def test_regression_counts_the_seeds_at_which_the_network_is_nearer(drawn, tmp_path, monkeypatch):
    given = []

    def train(points, args, rng):
        given.append(points)
        history = {"training": [3.0, 2.0, 1.0], "validation": [2.0, 1.0, 1.5]}
        return SimpleNamespace(forward=lambda x: points.y_test + 0.1), history

    off = iter([0.2, 0.3, 0.05, 0.2, 0.02, 0.01])  # of the polynomial: the network wins twice on the line, once in 2-D
    monkeypatch.setattr(mlp_regression, "train", train)
    monkeypatch.setattr(mlp_regression, "fit_polynomial", lambda points: (4, points.y_test + next(off)))
    flags = ["--seeds", "3", "4", "5", "--train-points", "20", "--noise", "0.2", "--out", str(tmp_path)]
    metrics = mlp_regression.main(flags)
    line, surface = metrics["line"], metrics["surface"]
    assert (line["mlp_wins"], surface["mlp_wins"]) == (2, 1)
    assert (line["noise"], surface["noise"], line["points"], surface["points"]) == (0.2, 0.1, 20, 40)
    assert line["polynomial_rmse"] == pytest.approx(0.55 / 3)
    assert [row["best_epoch"] for row in line["rows"]] == [2, 2, 2]
    assert "the MLP is nearer with 2 of 3 seeds" in drawn["regression_1d.png"].get_suptitle()
    for a, b in ((0, 1), (1, 2), (3, 4)):
        assert not np.array_equal(given[a].x_train, given[b].x_train)  # each seed draws its own
    assert not np.isin(given[0].x_val, given[0].x_train).any()
    picture = drawn["regression_2d.png"].axes[0].images[0].get_array()
    axis = np.linspace(-1, 1, mlp_regression.GRID)
    assert picture[10, 50] == pytest.approx(mlp_regression.franke(np.array([[axis[50], axis[10]]]))[0, 0])


def test_the_polynomials_degree_is_chosen_on_validation_points():
    points = mlp_regression.draw_points(1, 40, 0.0, np.random.default_rng(0))
    noise = 0.3 * np.random.default_rng(1).standard_normal(points.y_train.shape)
    line = mlp_regression.Points(
        points.x_train, points.x_train + noise, points.x_val, points.x_val, points.x_test, points.x_test
    )
    degree, prediction = mlp_regression.fit_polynomial(line)
    assert degree < 4
    assert mlp_regression.rmse(prediction, points.x_test) < 0.2


# --- twins and faults ---------------------------------------------------------------------------------------------


def test_the_twins_are_compared_in_both_precisions_and_by_their_own_seconds(drawn, tmp_path, data):
    flags = [*DIGITS, "--updates", "60", "--every", "30", "--parity-updates", "30", "--batch-size", "20"]
    metrics = train_numpy_vs_torch.main([*flags, "--out", str(tmp_path)])
    assert metrics["largest_loss_gap"]["float64"] < 1e-12 < metrics["largest_loss_gap"]["float32"]
    assert metrics["torch_over_numpy_seconds"] == metrics["torch_seconds"] / metrics["numpy_seconds"]
    last = drawn["val_error_vs_updates.png"].axes[0].lines[0].get_ydata()[-1]
    assert 1 - metrics["test_accuracy"]["numpy"] == pytest.approx(last, abs=0.15)
    assert f"NumPy {metrics['test_accuracy']['numpy']:.2%}, PyTorch" in drawn["val_loss_vs_updates.png"].get_suptitle()
    means = drawn["train_error.png"].axes[0].lines[0].get_ydata()
    assert len(means) == 60 - 50 + 1
    assert means.max() <= 1
    gaps = {"float32": np.array([1e-7, 3e-6]), "float64": np.array([1e-16, 2e-15])}
    said = train_numpy_vs_torch.draw_divergence(gaps).get_suptitle()
    assert said.endswith("at most 2e-15 in float64, 3e-06 in float32")


def test_the_twins_see_batches_of_the_size_asked_for(drawn, tmp_path, monkeypatch):
    sizes, order = set(), train_numpy_vs_torch.batch_order
    monkeypatch.setattr(
        train_numpy_vs_torch, "batch_order", lambda *given: [sizes.add(len(b)) or b for b in order(*given)]
    )
    flags = [*DIGITS, "--updates", "2", "--parity-updates", "2", "--every", "1", "--batch-size", "7"]
    train_numpy_vs_torch.main([*flags, "--out", str(tmp_path)])
    assert sizes == {7}


def test_each_faulty_network_has_the_fault_of_its_name():
    found = failure_modes.networks(10, 3)
    kinds = {name: [type(layer) is ReLU for layer in network.layers] for name, (network, _) in found.items()}
    for name in found:
        on_logits = name.startswith(("ReLU", "both"))
        assert kinds[name] == ([False] * 3 + [True] if on_logits else [False, True, False, False]), name
        sigma = {"w": 1.0 if name.endswith("1") and "alone" not in name else 0.5, "b": 0.5}.get(name[0])
        if sigma:
            assert found[name][0].layers[-2 if on_logits else -1].params["W"].std() == pytest.approx(sigma, rel=0.05)
    draws = [found[f"both, σ = 0.5, draw {draw}"][0].layers[0].params["W"] for draw in (1, 2)]
    assert not np.array_equal(*draws)
    assert [factor for _, factor in found.values()] == [1.0] * 7 + [80.0]


def test_faulty_networks_are_judged_on_images_scaled_like_those_they_learned(drawn, tmp_path, monkeypatch, data):
    judged, step = [], iter(range(100))
    logits_of = failure_modes.logits_of

    def watched(network, x):
        judged.append((len(x), float(np.abs(x).max())))
        return logits_of(network, x)

    def stepper(network, x, y, lr):
        def blown(batch):
            if next(step) == 3:  # in the second network, at its second update
                raise NotFinite

        return blown

    monkeypatch.setattr(failure_modes, "logits_of", watched)
    monkeypatch.setattr(failure_modes, "stepper", stepper)
    flags = [*DIGITS, "--updates", "2", "--every", "1", "--out", str(tmp_path)]
    rows = failure_modes.main(flags)["networks"]
    for split, size in ((data.x_val, len(data.y_val)), (data.x_test, len(data.y_test))):
        largest = np.abs(split).max()
        seen = [top for n, top in judged if n == size]
        assert seen[0] == pytest.approx(largest)
        assert seen[-1] == pytest.approx(80 * largest)
    assert [row["diverged_at"] for row in rows] == [None, 2] + [None] * 6
    logits = logits_of(failure_modes.networks(10, 0)["ReLU on the logits"][0], data.x_test)
    assert rows[1]["classes_never_above_zero"] == (logits.max(0) <= 0).sum()


# --- perceptrons --------------------------------------------------------------------------------------------------


def test_validation_chooses_activation_and_seed(drawn, tmp_path, monkeypatch):
    scores = {"relu": [0.5, 0.7], "sigmoid": [0.8, 0.9], "tanh": [0.6, 0.6]}  # on validation; in the test ReLU is best
    saved = []

    def train(activation, seed, data, args, run):
        value = scores[activation][seed]
        network = SimpleNamespace(activation=activation, save=lambda path: saved.append((activation, seed)))
        norms = np.array([[1.0, 4.0], [1.0, 2.0], [3.0, 2.0]]) / (1 + (activation == "tanh") * np.array([9, 0]))
        row = {"train_loss": value, "val_loss": 0.0, "val_accuracy": value}
        return {"network": network, "seed": seed, "rows": [row] * 3, "norms": norms, "steps": [0, 1, 2], "seconds": 6.0}

    test = {"relu": 0.9, "sigmoid": 0.3, "tanh": 0.2}
    monkeypatch.setattr(train_mlp, "train", train)
    monkeypatch.setattr(train_mlp, "evaluate", lambda network, x, y: (0.0, test[network.activation]))
    metrics = train_mlp.main([*DIGITS, "--seeds", "0", "1", "--epochs", "3", "--out", str(tmp_path)])
    assert (metrics["best"], metrics["test_accuracy"], saved) == ("sigmoid", 0.3, [("sigmoid", 1)])
    assert json.loads((tmp_path / "best.json").read_text())["seed"] == 1
    relu = metrics["activations"]["relu"]
    assert (relu["first_to_last_gradient"], relu["first_to_last_gradient_at_start"]) == (0.5, 0.25)
    assert relu["epoch_seconds"] == 2
    said = drawn["gradient_norms.png"].get_suptitle()
    assert "gradient is 0.025 of the last one's with tanh (0.25 with relu" in said


def test_the_perceptrons_rate_rises_and_falls_and_each_seed_has_its_own_weights(data, monkeypatch):
    flags = [*DIGITS, "--epochs", "2", "--batch-size", "30", "--hidden", "4", "--lr", "0.01"]
    log, weights = SimpleNamespace(log=lambda **row: None), {}
    monkeypatch.setattr(train_mlp, "Adam", Rates)
    for seed, init in ((0, "xavier"), (1, "xavier"), (0, "he")):
        Rates.seen, args = [], train_mlp.build_parser().parse_args([*flags, "--init", init])
        first = []
        monkeypatch.setattr(
            train_mlp, "build_mlp", lambda *given, first=first: first.append(build_mlp(*given)) or first[0]
        )
        monkeypatch.setattr(train_mlp, "evaluate", lambda *given: (0.0, 0.0))
        step = Rates.step
        monkeypatch.setattr(Rates, "step", lambda self: self.seen.append(self.lr))
        train_mlp.train("relu", seed, data, args, log)
        monkeypatch.setattr(Rates, "step", step)
        weights[seed, init] = first[0].layers[1].params["W"]
    updates = 2 * 40
    t = np.arange(updates)
    expected = 0.01 * np.minimum((t + 1) / (0.05 * updates), 1) * (1 + np.cos(np.pi * t / updates)) / 2
    np.testing.assert_allclose(Rates.seen, expected)
    assert not np.array_equal(weights[0, "xavier"], weights[1, "xavier"])
    assert weights[0, "he"].std() / weights[0, "xavier"].std() == pytest.approx(((784 + 4) / 784) ** 0.5, rel=1e-3)


def test_the_confusion_matrix_has_the_true_class_in_its_row(drawn, tmp_path, data):
    network = build_mlp([], "relu", 784, 10, rng=np.random.default_rng(0))
    network.save(tmp_path / "model.npz")
    about = {"hidden": [], "activation": "relu", "inputs": 784, "classes": list("0123456789")}
    (tmp_path / "model.json").write_text(json.dumps(about))
    flags = [*DIGITS, "--ckpt", str(tmp_path / "model.npz"), "--out", str(tmp_path / "out")]
    metrics = evaluate_mlp.main(flags)
    matrix = np.array(metrics["confusion_matrix"])
    assert np.array_equal(matrix.sum(1), np.bincount(data.y_test))
    np.fill_diagonal(matrix, 0)
    a, b = np.unravel_index(matrix.argmax(), matrix.shape)
    title = drawn["confusion_matrix.png"].axes[0].get_title()
    assert title == f"most frequent: {a} read as {b} ({matrix[a, b]} times)"
    p = np.exp(log_softmax(predict_logits(network, data.x_test)))
    wrong = p.argmax(1) != data.y_test
    assert metrics["mean_confidence_wrong"] == pytest.approx(p.max(1)[wrong].mean(), rel=1e-5)
    assert metrics["mean_confidence_right"] == pytest.approx(p.max(1)[~wrong].mean(), rel=1e-5)


# --- pooling, optimizers ------------------------------------------------------------------------------------------


def test_each_pooling_has_the_rate_of_its_lowest_validation_loss(drawn, tmp_path, monkeypatch, data):
    losses = {("max", 0.01): 1.0, ("max", 0.1): 2.0, ("average", 0.01): 2.0, ("average", 0.1): 1.0}
    losses |= {("strided", 0.01): 3.0, ("strided", 0.1): 2.5}
    wrong = {"max": (10, 14), "average": (30, 40), "strided": (20, 24)}  # test images, of the seeds 3 and 4

    def train(variant, lr, seed, data, args, run):
        network = pooling_comparison.build_network(variant, 10, [0])
        network.wrong = wrong[variant][seed - 3]
        row = {"train_loss": 9 - losses[variant, lr], "val_loss": losses[variant, lr], "val_accuracy": 0.5}
        return {"network": network, "rows": [row], "epoch_seconds": 1.0, "updates": 5}

    def logits(network, x):
        assert len(x) == len(data.y_test)
        return np.eye(10)[(data.y_test + (np.arange(len(x)) < network.wrong)) % 10]

    watched = []
    monkeypatch.setattr(pooling_comparison, "train", train)
    monkeypatch.setattr(pooling_comparison, "predict_logits", logits)
    monkeypatch.setattr(pooling_comparison, "active_fractions", lambda network, x: watched.append(x) or [0.5, 0.5])
    flags = [*DIGITS, "--train-size", "100", "--seeds", "3", "4", "--lrs", "0.1", "0.01", "--out", str(tmp_path)]
    metrics = pooling_comparison.main(flags)
    assert {v: row["lr"] for v, row in metrics["variants"].items()} == {"max": 0.01, "average": 0.1, "strided": 0.1}
    assert (metrics["best"], metrics["worst"]) == ("max", "average")
    assert metrics["gap_points"] == pytest.approx(100 * 23 / 360)
    assert metrics["mcnemar"][0] | {"p": 0} == {
        "a": "max",
        "b": "average",
        "only_a_right": 20,
        "only_b_right": 0,
        "p": 0,
    }
    assert all(np.array_equal(x, data.x_val) for x in watched)
    said = drawn["curves.png"].get_suptitle()
    assert said.endswith("max 6.39 points ahead of average, more than the seeds' spread (1.96)")


def test_the_poolings_rate_falls_and_each_seed_has_its_own_images(data, monkeypatch):
    args = pooling_comparison.build_parser().parse_args(["--epochs", "1", "--train-size", "64", "--batch-size", "16"])
    log, batches, weights = SimpleNamespace(log=lambda **row: None), [], []
    monkeypatch.setattr(pooling_comparison, "Adam", Rates)
    monkeypatch.setattr(pooling_comparison, "evaluate", lambda *given: (0.0, 0.0))
    order = pooling_comparison.stratified_order
    monkeypatch.setattr(
        pooling_comparison, "stratified_order", lambda y, rng: batches.append(order(y, rng)) or batches[-1]
    )
    for seed in (0, 1):
        Rates.seen = []
        weights.append(pooling_comparison.train("max", 0.1, seed, data, args, log)["network"].layers[7].params["W"])
        np.testing.assert_allclose(Rates.seen, 0.1 * (1 + np.cos(np.pi * np.arange(4) / 4)) / 2)
    assert not np.array_equal(batches[0][:64], batches[1][:64])
    assert not np.array_equal(*weights)


def test_optimizers_are_chosen_by_validation_and_compared_on_points_of_their_own(drawn, tmp_path, monkeypatch):
    fast = {"SGD": 0.5, "momentum": 0.4, "Nesterov": 0.3, "RMSprop": 0.2, "Adam": 0.1}  # final training loss

    def train_toy(toy, make, lr, seed, args):
        name = next(name for name, one in compare_optimizers.OPTIMIZERS.items() if one is make)
        training = np.linspace(2, fast[name], 21) * (1 if lr == 0.1 else 0.5)  # the other rate overfits
        validation = np.full(21, 1.0 if lr == 0.1 else 3.0)
        bend = 9 if name == "SGD" else 0  # SGD's network calls all points class 0
        return training, validation, SimpleNamespace(forward=lambda x: np.eye(2)[(x[:, 0] > bend) * 1])

    def descend(surface, make, lr, steps):
        values = np.geomspace(1, 1e-6, steps + 1) + (lr != 0.01)
        return np.zeros((steps + 1, 2)), values

    monkeypatch.setattr(compare_optimizers, "train_toy", train_toy)
    monkeypatch.setattr(compare_optimizers, "descend", descend)
    flags = ["--epochs", "20", "--steps", "60", "--lrs", "0.01", "0.1", "--seeds", "0", "1", "--out", str(tmp_path)]
    metrics = compare_optimizers.main(flags)
    for toy, rows in metrics["toys"].items():
        points = [
            compare_optimizers.toy_data(toy, seed, compare_optimizers.build_parser().parse_args(flags))
            for seed in (0, 1)
        ]
        right = np.mean([((x[:, 0] > 0) == y).mean() for x, y in (parts[2] for parts in points)])
        assert not np.array_equal(points[0][0][0], points[1][0][0])
        for name, row in rows.items():
            assert (row["lr"], row["test_accuracy"]) == (0.1, 0.5 if name == "SGD" else pytest.approx(right))
            assert row["train_loss_median"] == pytest.approx(np.linspace(2, fast[name], 21)[-2:].mean())
    assert metrics["surfaces"]["Beale"]["Adam"]["lr"] == 0.01
    assert metrics["surfaces"]["Beale"]["Adam"]["steps_to_0.001"] == 31
    assert "epochs): Adam on moons, Adam on spirals" in drawn["toy_losses.png"].get_suptitle()
    assert "mean of 2 seeds: momentum on moons (" in drawn["decision_regions.png"].get_suptitle()
    assert compare_optimizers.OPTIMIZERS["Nesterov"]([], 0.1).nesterov
    assert compare_optimizers.choose({0.1: 1.0, 0.2: 2.0}, "x")["at_edge"]
    assert compare_optimizers.choose({0.1: 3.0, 0.2: 2.0}, "x")["at_edge"]


# --- CNN, filters, speed ------------------------------------------------------------------------------------------


def test_the_cnn_is_tested_with_the_weights_of_its_best_epoch(drawn, tmp_path, monkeypatch, data):
    scores, minibatches = iter([0.2, 0.6, 0.4]), train_mnist_numpy.minibatches
    monkeypatch.setattr(train_mnist_numpy, "minibatches", lambda *given: list(minibatches(*given))[-2:])
    monkeypatch.setattr(train_mnist_numpy, "evaluate", lambda *given: (1.0, next(scores)))
    metrics = train_mnist_numpy.main([*DIGITS, "--epochs", "3", "--out", str(tmp_path)])
    network = build_network("plain", np.random.default_rng(0))
    network.load(tmp_path / "best.npz")
    _, accuracy = evaluate(network, data.x_test, data.y_test)
    assert (metrics["best_val_accuracy"], metrics["test_accuracy"]) == (0.6, accuracy)
    assert metrics["test_errors"] == round(360 * (1 - accuracy))
    assert json.loads((tmp_path / "best.json").read_text())["epoch"] == 2
    errors = drawn["curves.png"].axes[1].lines[1].get_ydata()
    np.testing.assert_allclose(errors, [80, 40, 60])
    assert train_mnist_numpy.build_optimizer("sgd", network, 0.1, 0.0).momentum == 0


def test_what_is_shown_of_the_filters(drawn, tmp_path, monkeypatch, data):
    build_network("plain", np.random.default_rng(0)).save(tmp_path / "model.npz")
    (tmp_path / "model.json").write_text(json.dumps({"recipe": "plain"}))
    statistics, shown = visualize_filters.layer_statistics, []

    def known(network, x):
        rows = statistics(network, x)
        for row, active, dead in zip([r for r in rows if "dead_fraction" in r], (0.5, 0.1), (0.25, 0.5), strict=True):
            row |= {"active_fraction": active, "dead_fraction": dead}
        return rows

    maps = visualize_filters.feature_maps
    monkeypatch.setattr(visualize_filters, "layer_statistics", known)
    monkeypatch.setattr(visualize_filters, "feature_maps", lambda network, x: shown.append(x) or maps(network, x))
    flags = [*DIGITS, "--ckpt", str(tmp_path / "model.npz"), "--digits", "7", "2", "--out", str(tmp_path / "out")]
    metrics = visualize_filters.main(flags)
    assert (metrics["maps_after_relu"], metrics["dead_maps"]) == (16 + 32, 4 + 16)
    assert (metrics["active_fraction_first_relu"], metrics["active_fraction_last_relu"]) == (0.5, 0.1)
    first = [np.flatnonzero(data.y_val == digit)[0] for digit in (7, 2)]
    assert np.array_equal(shown[-1], data.x_val[first])


def test_the_benchmarks_ratios_and_rates(monkeypatch):
    monkeypatch.setattr(benchmark, "in_turns", lambda *given: {"numpy": [1.0, 2.0, 8.0], "torch": [2.0, 4.0, 2.0]})
    monkeypatch.setattr(benchmark, "traced_peak_mb", lambda call: 1.0)
    assert [row["numpy_over_torch"] for row in benchmark.compare_steps(np.random.default_rng(0), 3)] == [0.5, 0.5]
    clock = iter([10.0, 16.0])
    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        assert benchmark.timed(lambda: None, 3) == 2
    monkeypatch.setattr(benchmark, "timed", lambda call, times: 0.5 if times == 1 else 0.1)
    ways = benchmark.compare_convolutions(np.random.default_rng(0), 5)
    assert [row["faster_than_loops"] for row in ways] == [1, 5, 5]
    first = benchmark.roofline(np.random.default_rng(0), 1)[0]
    assert first["forward_gflops"] == pytest.approx(2 * 64 * 16 * 9 * 26**2 / 0.1 / 1e9)
    assert first["backward_gflops"] == pytest.approx(2 * first["forward_gflops"])
