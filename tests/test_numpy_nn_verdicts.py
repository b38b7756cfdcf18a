"""numpy_nn's scripts: what is counted of checks, fields and fits, and what each seed and each flag changes."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest

from numpy_nn import (
    compare_optimizers,
    gradient_checking,
    pooling_comparison,
    receptive_field,
    train_mnist_numpy,
    universal_approximation,
)
from numpy_nn.cnn import build_network, random_shift
from numpy_nn.compare_optimizers import TOYS, toy_data
from numpy_nn.embedding import batch_order
from numpy_nn.inputs import load_inputs
from shared_utils.runs import read_json


def rng(seed=0):
    return np.random.default_rng(seed)


def test_images_have_mean_0_and_deviation_1_over_the_training_part_alone():
    data = load_inputs(SimpleNamespace(dataset="digits", data_dir="data"))
    assert abs(data.x_train.mean(dtype=np.float64)) < 1e-6
    assert data.x_train.std(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert (len(data.x_train), len(data.x_val), len(data.x_test)) == (1198, 239, 360)


def test_each_seed_has_its_own_batches_points_and_dropout():
    assert not np.array_equal(batch_order(100, 3, 20, 0), batch_order(100, 3, 20, 1))
    for toy in TOYS:
        parts = [toy_data(toy, seed, SimpleNamespace(seed=0)) for seed in (0, 1)]
        assert not any(np.array_equal(one[0], other[0]) for one, other in zip(*parts, strict=True))
    masks = []
    for seed in (0, 1):
        dropout = build_network("plain", rng(seed)).layers[-2]
        masks.append(dropout.forward(np.ones((2, 50), np.float32), training=True))
    assert not np.array_equal(*masks)


def test_batches_are_shifted_by_a_pixel_either_way():
    x, draws = np.zeros((1, 1, 5, 5)), rng(1)
    x[0, 0, 2, 2] = 1
    places = {tuple(np.argwhere(random_shift(x, draws)[0, 0])[0]) for _ in range(200)}
    assert places == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}


def test_the_plain_recipe_trains_on_shifted_batches(tmp_path, monkeypatch):
    class Seen(Exception):
        pass

    def shifted(x, rng):
        raise Seen

    monkeypatch.setattr(train_mnist_numpy, "random_shift", shifted)
    with pytest.raises(Seen):
        train_mnist_numpy.main(["--dataset", "digits", "--epochs", "1", "--out", str(tmp_path)])


def test_the_cnns_training_loss_is_a_mean_over_images_and_a_resumed_run_keeps_its_best(tmp_path, monkeypatch):
    seen, scores, minibatches = [], iter([0.2, 0.6]), train_mnist_numpy.minibatches

    class Watched(train_mnist_numpy.SoftmaxCrossEntropy):
        def forward(self, logits, labels):
            seen.append((super().forward(logits, labels), len(labels)))
            return seen[-1][0]

    monkeypatch.setattr(train_mnist_numpy, "SoftmaxCrossEntropy", Watched)
    monkeypatch.setattr(train_mnist_numpy, "minibatches", lambda *given: list(minibatches(*given))[-2:])
    monkeypatch.setattr(train_mnist_numpy, "evaluate", lambda *given: (1.0, next(scores)))
    flags = ["--dataset", "digits", "--epochs", "3", "--out", str(tmp_path)]
    with pytest.raises(StopIteration):  # stopped in the third epoch
        train_mnist_numpy.main(flags)
    gc.collect()  # the stopped run's frames, which hold its lock
    header, first, _ = (line.split(",") for line in (tmp_path / "history.csv").read_text().splitlines())
    assert [n for _, n in seen[:2]] == [64, 1198 % 64]
    expected = sum(value * n for value, n in seen[:2]) / 1198
    assert float(first[header.index("train_loss")]) == pytest.approx(expected, rel=1e-6)
    monkeypatch.setattr(train_mnist_numpy, "evaluate", lambda *given: (1.0, 0.3))
    monkeypatch.setattr(train_mnist_numpy, "save_figure", lambda figure, path: None)
    assert train_mnist_numpy.main([*flags, "--resume"])["best_val_accuracy"] == 0.6
    assert read_json(tmp_path / "best.json")["epoch"] == 2


def test_toy_batches_are_shuffled_and_poolings_begin_from_weights_of_their_seed(monkeypatch):
    class Seen(Exception):
        pass

    def watched(*given):
        raise Seen(*given)

    monkeypatch.setattr(compare_optimizers, "minibatches", watched)
    args = compare_optimizers.build_parser().parse_args([])
    with pytest.raises(Seen) as seen:
        compare_optimizers.train_toy("moons", compare_optimizers.OPTIMIZERS["SGD"], 0.1, 0, args)
    assert isinstance(seen.value.args[2], np.random.Generator)
    monkeypatch.setattr(pooling_comparison, "build_network", watched)
    args = pooling_comparison.build_parser().parse_args(["--seed", "4"])
    with pytest.raises(Seen) as seen:
        pooling_comparison.train("max", 0.1, 7, SimpleNamespace(classes="ab"), args, None)
    assert seen.value.args == ("max", 2, [4, 7])


# --- gradients ----------------------------------------------------------------------------------------------------


def test_bugs_are_counted_by_who_catches_them(tmp_path, monkeypatch):
    bug = SimpleNamespace(subject="Linear", name="a bug")
    caught, passes, none = False, True, None
    judged = [
        (bug, [caught, passes, passes, none, passes, passes, passes]),  # by one check alone
        (bug, [caught, caught, passes, none, passes, passes, caught]),
        (bug, [passes, none, none, none, none, none, passes]),  # by none
    ]
    drawn = {}
    monkeypatch.setattr(gradient_checking, "judge", lambda args: (judged, ["ReLU: a check"]))
    row = {"case": "c", "numbers": 1, "central_differences": 1e-9, "complex_step": 1e-15}
    monkeypatch.setattr(gradient_checking, "table_of_errors", lambda *given: [row])
    monkeypatch.setattr(gradient_checking, "sweep_h", lambda *given: {})
    monkeypatch.setattr(gradient_checking, "draw_sweeps", lambda sweeps: None)
    monkeypatch.setattr(gradient_checking, "save_figure", lambda figure, path, dpi=0: drawn.update({path.name: figure}))
    metrics = gradient_checking.main(["--quick", "--out", str(tmp_path)])
    assert (metrics["mutations"], metrics["caught"], metrics["false_alarms"]) == (3, 2, 1)
    assert list(metrics["caught_by"].values()) == [2, 1, 0, 0, 0, 0, 1]
    assert list(metrics["applicable"].values()) == [3, 2, 2, 0, 2, 2, 3]
    said = drawn["mutation_table.png"].get_suptitle()
    assert said.startswith("2 of 3 planted bugs are caught; central differences alone catch 2,\nand 2 networks learn")


# --- receptive fields ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("moved", "equal"), [(0, 3), (1, 0)])
def test_a_field_of_the_right_size_in_the_wrong_place_is_not_equal(moved, equal, tmp_path, monkeypatch):
    support = receptive_field.support
    monkeypatch.setattr(receptive_field, "support", lambda image: tuple(end + moved for end in support(image)))
    monkeypatch.setattr(receptive_field, "save_figure", lambda figure, path: None)
    flags = ["--architecture", "three", "--draws", "2", "--images", "2", "--channels", "3", "--out", str(tmp_path)]
    metrics = receptive_field.main(flags)
    assert (metrics["layers"], metrics["equal"], metrics["largest_theoretical"]) == (3, equal, 7)
    assert metrics["used"] == {"three": metrics["rows"][-1]["effective"] / 7}
    assert metrics["least_used"] < 1


def test_growth_is_the_slope_in_logarithms():
    rows = [{"architecture": "deep", "depth": depth, "effective": 3 * depth**0.5} for depth in range(1, 17)]
    assert receptive_field.growth(rows) == pytest.approx(0.5)


# --- approximation ------------------------------------------------------------------------------------------------


def test_fits_are_judged_between_the_points_they_learned(tmp_path, monkeypatch):
    drawn, weights = {}, []

    def train(network, x, y, x_test, name, args, rng):
        weights.append(network.layers[0].params["W"].copy())
        return network.forward(x_test)

    def solved(network, x, y, x_test):
        assert len(x_test) == universal_approximation.TEST_POINTS
        return np.full((len(x_test), 1), 5.0)

    monkeypatch.setattr(universal_approximation, "train", train)
    monkeypatch.setattr(universal_approximation, "least_squares", solved)
    monkeypatch.setattr(universal_approximation, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    metrics = universal_approximation.main(["--widths", "2", "4", "--seeds", "0", "1", "--out", str(tmp_path)])
    assert not np.array_equal(weights[0], weights[1])  # two seeds
    x = np.linspace(-1, 1, universal_approximation.TEST_POINTS, dtype=np.float32)[:, None]
    for row in metrics["rows"]:
        truth = universal_approximation.TARGETS[row["target"]](x)
        assert row["rmse_least_squares"] == pytest.approx(np.sqrt(np.mean((5 - truth) ** 2)), rel=1e-5)
        assert row["largest_error"] >= row["rmse"]
    widest = {name: row["rmse"] for name, row in metrics["widest"].items()}
    easiest, hardest = min(widest, key=widest.get), max(widest, key=widest.get)
    assert (
        f"“{easiest}” is the easiest of the five, “{hardest}” the hardest"
        in drawn["fitted_functions.png"].get_suptitle()
    )
    mean = {width: np.mean([row["rmse"] for row in metrics["rows"] if row["width"] == width]) for width in (2, 4)}
    assert f"from {mean[2]:.2f} to {mean[4]:.3f}" in drawn["approximation_error.png"].get_suptitle()


def test_the_slope_is_the_exponent_and_the_largest_error_has_no_sign(tmp_path, monkeypatch):
    widths = [1, 4, 16]
    assert universal_approximation.slope(np.array([[2.0, 1.0, 0.5]]), widths) == pytest.approx(-0.5)
    monkeypatch.setattr(
        universal_approximation, "train", lambda network, x, y, x_test, *given: np.full(x_test.shape, -3.0)
    )
    monkeypatch.setattr(universal_approximation, "save_figure", lambda figure, path: None)
    monkeypatch.setattr(universal_approximation, "least_squares", lambda network, x, y, x_test: np.zeros(x_test.shape))
    metrics = universal_approximation.main(["--widths", "2", "4", "--seeds", "0", "--out", str(tmp_path)])
    assert metrics["widest"]["sine"]["largest_error"] == pytest.approx(4, abs=1e-3)
