"""mnist_svm_gabor's scripts: what they choose from, compare and say of it, with answers that are known beforehand."""

from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from mnist_svm_gabor import ablation, benchmark, figures, invariance, learning_curve, predict, protocol, train
from mnist_svm_gabor.features import BANKS, Preparation, principal_axes
from mnist_svm_gabor.gabor import GaborBank
from shared_utils.data import Images, load_images
from shared_utils.stats import mcnemar, wilson_interval

DIGITS = ["--dataset", "digits", "--device", "cpu"]


class Fitted:
    """What `choose_and_fit` returns; it gets wrong the test images at `wrong`."""

    def __init__(self, wrong):
        self.wrong, self.trials = wrong, [{"val_accuracy": 0.5}]
        self.search_seconds, self.fit_seconds = 0.0, 0.0
        self.projection, self.svm = (
            SimpleNamespace(matrix=np.zeros((1, 7))),
            SimpleNamespace(support=None),
        )

    def predict(self, x):
        labels = load_images("digits", "test").y.copy()
        labels[self.wrong] = (labels[self.wrong] + 1) % 10
        return labels


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """A function: runs a script whose machines err where they are told to; its metrics, figures and what was fitted.

    Gabor features, which take seconds, are zeros.
    """
    vectors = Preparation.__call__

    def prepared(self, x, device):
        return np.zeros((len(x), self.bank.n_features)) if self.bank else vectors(self, x, device)

    def run(module, wrong, *flags):
        calls, drawn, wrong = [], {}, iter(wrong)

        def fit(x, y, parts, kernel, grid):
            calls.append((x, y, parts, kernel, grid))
            return Fitted(next(wrong))

        monkeypatch.setattr(Preparation, "__call__", prepared)
        monkeypatch.setattr(module, "choose_and_fit", fit)
        monkeypatch.setattr(module, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
        monkeypatch.setattr(train.Classifier, "save", lambda *given: None)
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        return module.main([*DIGITS, *map(str, flags), "--out", str(out)]), drawn, calls

    return run


# --- protocol -----------------------------------------------------------------------------------------------------


def test_the_last_fit_has_the_whitening_of_the_search_and_all_folds_count(monkeypatch):
    x, y = np.random.default_rng(0).standard_normal((120, 4)) * [4, 3, 2, 1], np.arange(120) % 2
    parts = [(np.arange(100), np.arange(100, 120)), (np.arange(20, 120), np.arange(0, 20))]
    fitted_to = []

    def trial(x_fit, y_fit, x_val, y_val, kernel, Cs, gammas):
        fitted_to.append(len(x_fit))
        return [{"C": 1.0, "gamma": 1.0, "val_errors": 3, "seconds": 0.0}]

    monkeypatch.setattr(protocol, "choose_svm", trial)
    monkeypatch.setattr(protocol, "SEARCH_SIZE", 70)
    fitted = protocol.choose_and_fit(x, y, parts, "rbf", protocol.Grid([1.0], [1.0], [1.0], [3]))
    assert fitted_to == [70, 70]
    np.testing.assert_allclose(fitted.projection(x).var(0), 1, rtol=1e-4)
    np.testing.assert_allclose(fitted.projection.matrix, principal_axes(x).projection(3, 1.0).matrix)
    assert fitted.trials[0]["val_accuracy"] == pytest.approx(1 - 6 / 40)


def test_the_images_of_a_search_are_stratified_however_the_data_set_is_sorted():
    y = np.sort(np.arange(1200) % 10)
    ((train_at, _),) = protocol.folds(y, np.random.default_rng(0), 10)
    assert np.bincount(y[train_at[:100]]).tolist() == [10] * 10
    assert not np.array_equal(train_at, protocol.folds(y, np.random.default_rng(1), 10)[0][0])


def test_the_training_images_asked_for_are_a_stratified_draw():
    args = SimpleNamespace(dataset="digits", data_dir="data", train_size=100)
    one, other = (protocol.load(args, np.random.default_rng(seed))[0] for seed in (0, 1))
    assert np.ptp(np.bincount(one.y)) <= 1
    assert not np.array_equal(one.x, other.x)


# --- ablation -----------------------------------------------------------------------------------------------------


def test_each_rung_changes_one_thing_in_the_one_before():
    rungs = [(preparation, whitening) for _, preparation, whitening in ablation.rungs()]
    assert (asdict(rungs[0][0]), rungs[0][1]) == ({"resolution": 28, "deskewed": False, "bank": None}, 0.0)
    for (before, white), (after, whiter) in pairwise(rungs):
        then, now = asdict(before), asdict(after)
        bank, filters = (found.pop("bank") for found in (then, now))
        changed = [name for name in then if then[name] != now[name]] + ["whitening"] * (white != whiter)
        changed += (
            [name for name in bank if bank[name] != filters[name]] if bank and filters else ["bank"] * bool(filters)
        )
        assert len(changed) == 1, changed
    assert (rungs[-1][0].bank, rungs[-1][1]) == (BANKS[28], 0.5)


def test_the_ablation_compares_each_rung_with_the_one_before(ran):
    wrong = [range(60), range(50), range(20, 60), range(12), range(9), range(5, 16), range(14)]
    metrics, drawn, calls = ran(ablation, wrong, "--train-size", 80)
    right = [~np.isin(np.arange(360), at) for at in wrong]
    assert [row["test_errors"] for row in metrics["steps"]] == [60, 50, 40, 12, 9, 11, 14]
    assert [row["mcnemar_p"] for row in metrics["steps"][1:]] == [mcnemar(b, a)[2] for a, b in pairwise(right)]
    assert metrics["steps"][0]["mcnemar_p"] is None
    assert [(kernel, *grid.whitenings, *grid.components) for *_, kernel, grid in calls] == [
        ("rbf", whitening, 100) for _, _, whitening in ablation.rungs()
    ]
    figure = drawn["ablation.png"]
    assert "from 60 errors on raw pixels to 14" in figure.get_suptitle()
    said = [text.get_text() for text in figure.axes[0].texts if "p = " in text.get_text()]
    assert ["not resolved" in one for one in said] == [row["mcnemar_p"] > 0.05 for row in metrics["steps"][1:]]
    low, high = wilson_interval(300, 360)
    ends = figure.axes[0].collections[0].get_segments()[0][:, 0]
    assert ends == pytest.approx([360 * (1 - high), 360 * (1 - low)])


# --- learning curve -----------------------------------------------------------------------------------------------


def test_the_learning_curve_draws_a_subset_of_its_own_for_each_seed(ran):
    _, _, calls = ran(learning_curve, [range(5)] * 16, "--sizes", 60, 100, "--seeds", 1, 2)
    subsets = [x for x, *_ in calls]
    for size, (one, other) in ((60, (0, 4)), (100, (8, 12))):
        assert len(subsets[one]) == len(subsets[other]) == size
        assert not np.array_equal(subsets[one], subsets[other])
        assert all(np.array_equal(subsets[one], subsets[one + kernel]) for kernel in (0, 1))  # both kernels alike
    _, _, others = ran(learning_curve, [range(5)] * 16, "--sizes", 60, 100, "--seeds", 1, 2, "--seed", 3)
    assert not np.array_equal(subsets[0], others[0][0])


def test_the_learning_curve_says_what_gabor_features_gain(ran):
    # For each size and seed: raw linear, raw RBF, Gabor linear, Gabor RBF.
    few = [range(180), range(90), range(36), range(18), range(144), range(90), range(36), range(36)]
    many = [range(36), range(18), range(18), range(18), range(36), range(18), range(18), range(18)]
    metrics, drawn, _ = ran(learning_curve, few + many, "--sizes", 60, 100, "--seeds", 1, 2)
    linear, rbf = metrics["rows"][:2]
    assert (linear["kernel"], linear["raw"], linear["gabor"]) == ("linear", pytest.approx(55), pytest.approx(90))
    assert (linear["gain"], linear["gain_std"]) == (pytest.approx(35), pytest.approx(50**0.5))
    assert rbf["gain"] == pytest.approx(17.5)
    assert ran(learning_curve, few[:4], "--sizes", 60, "--seeds", 1)[0]["rows"][0]["gain_std"] is None
    said = "+35.0 linear, +17.5 RBF at 60; +5.0 linear, +0.0 RBF at 100"
    assert said in drawn["learning_curve.png"].get_suptitle()


# --- train --------------------------------------------------------------------------------------------------------


def test_training_says_what_gabor_features_mend_and_break(ran):
    raw, gabor = range(30), range(20, 33)
    metrics, drawn, calls = ran(train, [raw, gabor], "--train-size", 80, "--deskew")
    assert metrics["gain_points"] == pytest.approx(100 * 17 / 360)
    assert {k: v for k, v in metrics["mcnemar"].items() if k != "p"} == {"only_gabor_right": 20, "only_raw_right": 3}
    figure = drawn["gabor_vs_baseline_confusion.png"]
    assert "mend 20 images and break 3" in figure.get_suptitle()
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[:3] == ["raw pixels: 30 of 360 wrong", "Gabor features: 13 of 360 wrong", "change: -17 errors in all"]
    assert calls[0][0].shape == (80, 196)
    plain = ran(train, [raw, gabor], "--train-size", 80)[2]
    assert not np.array_equal(calls[0][0], plain[0][0])  # raw pixels are deskewed too


def test_the_flags_of_the_bank_and_of_the_grid_count(ran):
    flags = ["--orientations", 2, "--frequencies", 1, "--kernel-size", 5, "--C", 7, "--gamma", 0.3, "--components", 9]
    metrics, _, calls = ran(train, [range(3)] * 2, "--train-size", 80, *flags)
    assert metrics["gabor"]["features"] == GaborBank(2, 1, 5).n_features == 144
    for *_, grid in calls:
        assert (list(grid.Cs), list(grid.gammas), list(grid.components)) == ([7], [0.3], [9])


def test_a_linear_machine_has_one_per_pair_of_classes_beside_it(ran):
    wrong = [range(3), range(4), range(5), range(6)]
    metrics, _, calls = ran(train, wrong, "--train-size", 80, "--kernel", "linear")
    assert [kernel for *_, kernel, _ in calls] == ["linear", "linear-ovo"] * 2
    errors = [(metrics[name]["test_errors"], metrics[name]["one_vs_one"]["test_errors"]) for name in ("raw", "gabor")]
    assert errors == [(3, 4), (5, 6)]


# --- figures ------------------------------------------------------------------------------------------------------


def test_a_confusion_has_the_true_class_in_its_row():
    test = Images(np.zeros((3, 1, 28, 28), np.uint8), np.array([0, 0, 1]), ("a", "b"), "T")
    figure = figures.draw_comparison(np.array([1, 1, 1]), np.array([0, 1, 1]), test, "T")
    before, after, change = (ax.images[0].get_array() for ax in figure.axes[:3])
    assert [before.tolist(), after.tolist(), change.tolist()] == [[[0, 2], [0, 0]], [[0, 1], [0, 0]], [[0, -1], [0, 0]]]


def test_a_row_of_the_banks_picture_names_its_own_frequency():
    bank = GaborBank(2, 3)
    labels = [ax.get_ylabel() for ax in figures.draw_bank(bank).axes if ax.get_ylabel().endswith("px)")]
    assert [label.split()[0] for label in labels] == ["0.40", "0.30", "0.23"]


def test_the_responses_show_both_signs_and_scale_each_frequency_to_its_own_maximum():
    bank = GaborBank(2, 2)
    image = np.random.default_rng(0).random((14, 14), dtype=np.float32)
    figure = figures.draw_responses(bank, image, "T")
    positive, _, negative, _ = (np.ma.filled(ax.images[0].get_array(), 0) for ax in figure.axes[1:5])
    assert not np.array_equal(positive, negative)
    for mosaic in (positive, negative):  # two rows of maps, 14 pixels each
        assert mosaic[:14].max() == mosaic[15:29].max() == 1


# --- invariance, prediction, benchmark ----------------------------------------------------------------------------


class Reader:
    """A classifier of the digits: the labels of the test images, wrong at the first `wrong` of them."""

    def __init__(self, wrong):
        self.wrong, self.classes = wrong, tuple("0123456789")

    def check_classes(self, images):
        pass

    def predict(self, x, device):
        return Fitted(range(self.wrong)).predict(x)

    def scores(self, x, device):
        labels = Fitted(range(self.wrong)).predict(x)[: len(x)]
        return 2.0 * np.eye(10)[labels] + np.eye(10)[(labels + 3) % 10]


def test_robustness_is_that_of_the_two_classifiers_that_training_wrote(monkeypatch, tmp_path):
    drawn = {}
    for name in ("raw", "gabor"):
        path = tmp_path / "mnist_svm_gabor" / "train" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    readers = {"raw": Reader(180), "gabor": Reader(36)}
    monkeypatch.setattr(invariance.Classifier, "load", lambda path: readers[path.stem])
    monkeypatch.setattr(invariance, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    monkeypatch.setattr(invariance, "warp", lambda x, **how: x)
    metrics = invariance.main([*DIGITS, "--quick", "--runs-dir", str(tmp_path)])
    assert [metrics[f"{name}_at_30_degrees"] for name in ("raw", "gabor")] == [0.5, 0.9]
    said = drawn["invariance.png"].get_suptitle()
    assert "raw pixels 50 % right, Gabor 90 %;" in said
    assert said.endswith("raw pixels 50 %, Gabor 90 %")


def test_what_each_distortion_does_and_the_seed_of_its_noise():
    x = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), dtype=np.uint8)
    found, other = (invariance.distortions(seed, quick=False) for seed in (1, 2))
    for kind, given in (("rotation", {"degrees": 5.0}), ("scale", {"scale": 1.2}), ("shift", {"shift": 3.0})):
        assert np.array_equal(found[kind][2](x, *given.values()), invariance.warp(x, **given)), kind
    assert not np.array_equal(found["noise"][2](x, 0.3), other["noise"][2](x, 0.3))


def test_answers_name_the_prediction_the_runner_up_and_the_truth(monkeypatch, tmp_path):
    drawn, reader = {}, Reader(2)
    reader.preparation = Preparation(14)
    monkeypatch.setattr(predict.Classifier, "load", lambda path: reader)
    monkeypatch.setattr(predict, "save_figure", lambda figure, path: drawn.update({path.name: figure}))
    metrics = predict.main([*DIGITS, "--model", "any", "--out", str(tmp_path / "out")])
    y = load_images("digits", "test").y[:24]
    assert metrics["accuracy"] == pytest.approx(22 / 24)
    first, third = metrics["predictions"][0], metrics["predictions"][2]
    assert (first["prediction"], first["runner_up"]) == (str((y[0] + 1) % 10), str((y[0] + 4) % 10))
    assert (third["prediction"], third["runner_up"]) == (str(y[2]), str((y[2] + 3) % 10))
    assert "22 of 24 right" in drawn["predictions.png"].get_suptitle()
    words = [text.get_text() for text in drawn["predictions.png"].axes[0].texts]
    assert (words[0], words[2]) == (f"{(y[0] + 1) % 10} (is {y[0]})", str(y[2]))


def test_the_benchmark_counts_every_filter_and_a_multiply_add_as_two(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 13.0])
    ticks = {"perf_counter": staticmethod(lambda: next(clock))}
    monkeypatch.setattr(benchmark, "time", type("Clock", (), ticks))
    monkeypatch.setattr(benchmark.Preparation, "__call__", lambda *given: None)
    row = benchmark.measure(28, "digits", "data", "cpu", repeats=2)
    assert (row["images"], row["best_seconds"], row["images_per_second"]) == (1797, 2.0, 1797 / 2)
    assert row["gflop_per_second"] == pytest.approx(2 * 1797 * 48 * 13**2 * 28**2 / 2 / 1e9)  # 24 quadrature pairs
    monkeypatch.setattr(benchmark, "time", type("Clock", (), {"perf_counter": staticmethod(iter(range(10)).__next__)}))
    assert benchmark.peak_gflops("cpu", n=100) == pytest.approx(2 * 100**3 / 1e9)
