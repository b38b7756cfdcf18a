"""nl_regression's three studies of training: what they measure, which rungs the ladder has, what a wrong flag gets."""

import csv
import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from nl_regression import spectral_bias, what_it_takes, width_depth_study
from nl_regression.fitting import Fit
from nl_regression.model import EnsembleMLP
from nl_regression.recipes import RECIPES, Recipe, points_of
from nl_regression.spectral_bias import EDGES, X, by_place, by_spectrum, first_below, in_bins
from nl_regression.target import GRID, local_frequency, target
from nl_regression.what_it_takes import ScaledRecipe, ladder
from shared_utils.cli import run_main
from shared_utils.runs import read_json

CPU = torch.device("cpu")
TINY = {
    spectral_bias: ["--n", "20", "--epochs", "3", "--features", "6"],
    width_depth_study: ["--n", "9", "--epochs", "2", "--widths", "8", "4", "--depths", "1", "2", "--width", "8"],
    what_it_takes: ["--sizes", "9", "5", "--epochs", "1"],
}
COMMON = ["--width", "8", "--trials", "2", "--device", "cpu"]


def run(module, out, *flags):
    return module.main([*COMMON, *TINY[module], "--out", str(out), *flags])


def numbers(value):
    """Every number in a tree of metrics."""
    if isinstance(value, dict | list):
        return [n for item in (value.values() if isinstance(value, dict) else value) for n in numbers(item)]
    return [value] if isinstance(value, int | float) else []


# --- frequency bins -----------------------------------------------------------------------------------------------


def test_bins_partition_the_interval_by_local_frequency():
    inside = in_bins(local_frequency(X), EDGES)
    assert inside.shape == (5, 1001)
    assert (inside.sum(0) == 1).all()
    assert inside[0, 0]
    assert inside[-1, -1]  # 20 cycles per unit, at x = 1
    for row, (low, high) in zip(inside, [(0, 1), (1, 2), (2, 5), (5, 10), (10, 20)], strict=True):
        first, last = X[row][[0, -1]]
        assert first == pytest.approx((low / 20) ** (1 / 3), abs=1.1e-3)
        assert last == pytest.approx((high / 20) ** (1 / 3), abs=1.1e-3)
    assert in_bins(np.array([0.0, 1.0, 20.0, 20.1]), EDGES).T.tolist() == [
        [True, False, False, False, False],
        [False, True, False, False, False],
        [False, False, False, False, True],
        [False, False, False, False, False],
    ]


@pytest.mark.parametrize("split", [by_place, by_spectrum])
def test_the_target_has_no_residual_the_zero_function_all_of_it(split):
    residuals = np.stack([target(X) * factor for factor in (0, -1, 0.3)])[None]  # (1, 3, G)
    relative = split(residuals, EDGES)
    assert relative.shape == (1, 3, 5)
    np.testing.assert_allclose(relative[0], np.outer([0, 1, 0.3], np.ones(5)), atol=1e-12)


@pytest.mark.parametrize("bin_", range(5))
def test_an_error_shows_in_its_bin_only(bin_):
    here = in_bins(local_frequency(X), EDGES)[bin_]
    relative = by_place(np.where(here, 0.5, 0.0), EDGES)
    assert relative[bin_] == pytest.approx(0.5 / np.sqrt(np.mean(target(X)[here] ** 2)))
    assert (np.delete(relative, bin_) == 0).all()

    cycles = (EDGES[bin_] + EDGES[bin_ + 1]) / 2
    wave = 0.1 * np.cos(2 * np.pi * cycles * X)
    power = by_spectrum(wave, EDGES) ** 2 * spectrum_of_target()
    assert power[bin_] > 0.98 * power.sum()
    # Parseval: the bins together hold the wave's energy on the grid.
    assert power.sum() == pytest.approx((wave**2).sum(), rel=0.02)


def spectrum_of_target():
    """The target's energy in each bin, by cosine sums written out."""
    j = np.arange(len(X))
    k = np.arange(int(2.002 * 20) + 1)  # (K,): up to 20 cycles per unit
    basis = np.cos(np.pi * (2 * j + 1) * k[:, None] / (2 * len(X))) * np.sqrt(2 / len(X))
    basis[0] /= np.sqrt(2)
    return in_bins(k * 1000 / 1001 / 2, EDGES).astype(float) @ (basis @ target(X)) ** 2


def test_a_constant_and_a_ramp_are_slow_in_the_spectrum():
    """A discrete Fourier transform without a window would see the ramp's jump at all frequencies."""
    constant, ramp = by_spectrum(np.stack([np.ones_like(X), X - 0.5]), EDGES)
    np.testing.assert_allclose(constant[1:], 0, atol=1e-12)
    energy = ramp**2 * spectrum_of_target()
    assert energy[0] > 0.98 * energy.sum()


def test_first_below_is_the_first_epoch_or_none():
    relative = np.array([[0.6, 0.6, 0.05], [0.4, 0.5, 0.9], [0.7, 0.6, 0.9]])
    assert first_below(relative, np.array([1, 10, 100]), 0.5) == [10, None, 1]


def test_the_methods_differ_in_features_alone_and_the_reference_keeps_its_optimiser():
    recipe = Recipe(**RECIPES["interpolating"])
    (raw_name, raw), (fourier_name, fourier), (_, reference) = spectral_bias.methods_of(recipe)
    assert (raw_name, fourier_name) == ("raw input, Adam", "Fourier features, Adam")
    assert fourier == recipe
    assert {f.name for f in fields(Recipe) if getattr(raw, f.name) != getattr(fourier, f.name)} == {"features"}
    assert raw.features == 0
    assert str(reference) == str(Recipe(**{**RECIPES["reference"], "epochs": recipe.epochs}))


def test_what_is_recorded_is_what_the_training_went_through():
    recipe = Recipe(**{**RECIPES["interpolating"], "features": 4, "epochs": 7}, width=8)
    course = spectral_bias.watch("", recipe, 12, 2, 0, CPU)
    assert course.epochs.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert course.values.shape == (7, 2, len(GRID))
    _, fit = recipe.train([12] * 2, range(2), 0, CPU)
    np.testing.assert_array_equal(course.values[-1], fit.values)
    np.testing.assert_array_equal(course.train_mse[-1], fit.train_mse)
    assert (course.values[0] != course.values[1]).any()
    inside = course.values[..., : len(X)]
    both = by_place(inside - target(X), EDGES)  # (R, T, K)
    np.testing.assert_allclose(course.relative(), both.mean(1))  # the median of two is their mean


# --- the ladder ---------------------------------------------------------------------------------------------------


def test_rungs_differ_from_their_predecessor_exactly_as_named():
    rungs = {rung.name: rung for rung in ladder(30, 7.0, 64)}
    start = rungs["reference"]
    assert start.of is None
    assert start.recipe == ScaledRecipe(**{**RECIPES["reference"], "epochs": 30}, width=64)
    for rung in list(rungs.values())[1:]:
        before = rungs[rung.of].recipe
        names = [field.name for field in fields(ScaledRecipe)]
        changed = {n: getattr(rung.recipe, n) for n in names if getattr(rung.recipe, n) != getattr(before, n)}
        assert changed
        assert changed == {key: value for key, value in rung.change.items() if getattr(before, key) != value}
    expected = {
        "4 × the epochs": ("reference", {"epochs": 120}),
        "learning rate 0.1": ("reference", {"lr": 0.1}),
        "Adam": ("reference", {"optimizer": "adam", "lr": 1e-3}),
        "Adam, cosine": ("Adam", {"schedule": "cosine"}),
        "input × 7": ("Adam, cosine", {"scale": 7.0}),
        "input × 7, kinks in [0, 1]": ("input × 7", {"spread_kinks": True}),
        "input × 7, kinks in [0, 1], β₂ = 0.99, 8 × the epochs": (
            "input × 7, kinks in [0, 1]",
            {"lr": 3e-3, "beta2": 0.99, "epochs": 240},
        ),
        "Fourier features": ("reference", {key: RECIPES["interpolating"][key] for key in ("features", "sigma")}),
    }
    assert {name: (rung.of, rung.change) for name, rung in rungs.items() if name in expected} == expected
    assert len(rungs) == len(expected) + 2


def test_the_last_rung_is_the_interpolating_recipe():
    last = ladder(10_000, 7.0, 256)[-1]
    assert last.recipe == ScaledRecipe(**RECIPES["interpolating"])
    assert ladder(1, 7.0, 256)[-1].recipe.epochs == 4  # a short ladder stays short


def generators():
    return [points_of(9, trial, 0)[0] for trial in range(3)]


def test_scaling_the_first_layer_is_feeding_the_network_a_scaled_input():
    recipe = ScaledRecipe(**RECIPES["reference"], width=16, scale=4.0)
    x = torch.linspace(0, 1, 50).expand(3, -1)
    plain = EnsembleMLP(3, 16, rngs=generators())
    torch.testing.assert_close(recipe.model(generators())(x), plain(4.0 * x))
    assert (recipe.model(generators())(x) - plain(x)).abs().max() > 1e-2


def test_kinks_are_spread_over_the_interval_of_the_points():
    plain = EnsembleMLP(3, 400, rngs=generators())
    model = ScaledRecipe(**RECIPES["reference"], width=400, scale=4.0, spread_kinks=True).model(generators())
    torch.testing.assert_close(model.weights[0], 4 * plain.weights[0])
    kinks = (-model.biases[0] / model.weights[0]).detach()  # (3, 1, 400)
    assert kinks.min() > -1e-6
    assert kinks.max() < 1 + 1e-6
    np.testing.assert_allclose(np.histogram(kinks, 4, (0, 1))[0] / kinks.numel(), 0.25, atol=0.05)
    assert (kinks[0] != kinks[1]).any()
    torch.testing.assert_close(model.biases[1], plain.biases[1])


@pytest.mark.parametrize("features", [0, 5])
def test_without_its_changes_a_scaled_recipe_is_the_recipe(features):
    how = {**RECIPES["interpolating"], "features": features, "epochs": 3, "width": 8}
    _, scaled = ScaledRecipe(**how).train([9] * 2, range(2), 0, CPU)
    _, plain = Recipe(**how).train([9] * 2, range(2), 0, CPU)
    np.testing.assert_array_equal(scaled.values, plain.values)


# --- width and depth ----------------------------------------------------------------------------------------------


def shape(width, *deltas):
    fine = [delta for delta in deltas if not math.isnan(delta)]
    mean = float(np.mean(fine)) if fine else math.nan
    return {"width": width, "delta_in": mean, "trials_delta_in": list(deltas), "diverged": len(deltas) - len(fine)}


def test_it_hurts_where_the_same_trials_are_worse_by_more_than_their_differences_vary():
    rows = [shape(16, 0.5, 0.9, 0.4), shape(64, 0.1, 0.7, 0.1), shape(256, 0.15, 0.76, 0.14)]
    found = width_depth_study.finding(rows, "width")
    assert found.pop("best_delta_in") == pytest.approx(0.3)
    assert found.pop("largest_delta_in") == pytest.approx(0.35)
    assert found == {"best": 64, "largest": 256, "hurts": True}
    for deltas, hurts in [((0.05, 0.76, 0.24), False), ((0.05, math.nan, 0.9), False), ((0.3, math.nan, 0.7), True)]:
        assert width_depth_study.finding([*rows[:2], shape(256, *deltas)], "width")["hurts"] is hurts, deltas
    assert width_depth_study.finding([shape(16, 0.1), shape(64, 0.5)], "width")["hurts"] is False  # one trial
    lost = shape(512, math.nan, math.nan, math.nan)
    assert width_depth_study.finding([*rows, lost], "width")["largest"] == 256
    nothing = width_depth_study.finding([lost], "width")
    assert set(nothing.values()) == {None}
    assert "diverged" in width_depth_study.told(nothing, "width")


def test_shapes_are_those_asked_for_with_their_parameters(tmp_path):
    metrics = run(width_depth_study, tmp_path, "--depth", "2")
    assert [(row["width"], row["depth"]) for row in metrics["by_width"]] == [(4, 2), (8, 2)]
    assert [(row["width"], row["depth"]) for row in metrics["by_depth"]] == [(8, 1), (8, 2)]
    assert metrics["shapes"] == 3  # 8 × 2 is trained once
    inputs = 2 * RECIPES["interpolating"]["features"]
    assert metrics["by_width"][1]["parameters"] == (inputs + 1) * 8 + 9 * 8 + 9
    assert metrics["by_width"][1] == metrics["by_depth"][1]
    row = metrics["by_depth"][0]
    assert row["delta_in"] == pytest.approx(np.mean(row["trials_delta_in"]))
    assert row["delta_in_std"] == pytest.approx(np.std(row["trials_delta_in"], ddof=1))
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 4


# --- runs ---------------------------------------------------------------------------------------------------------

WRITTEN = {
    spectral_bias: {"spectral_bias.png", "training_film.png"},
    width_depth_study: {"width_depth.png"},
    what_it_takes: {"what_it_takes.png"},
}


@pytest.mark.parametrize("module", TINY, ids=lambda module: module.__name__)
def test_a_tiny_run_gives_finite_metrics(module, tmp_path):
    metrics = run(module, tmp_path)
    found = numbers({key: value for key, value in metrics.items() if key != "run"})
    assert len(found) > 20
    assert np.isfinite(found).all()
    assert {*WRITTEN[module], "history.csv", "metrics.json"} <= {path.name for path in tmp_path.iterdir()}
    assert read_json(tmp_path / "metrics.json") == metrics


def test_the_ladders_rows_hold_each_size_and_trial(tmp_path):
    metrics = run(what_it_takes, tmp_path)
    assert [[at["n"] for at in row["sizes"]] for row in metrics["ladder"]] == [[5, 9]] * 10
    for row in metrics["ladder"]:
        for at in row["sizes"]:
            assert len(at["train_mse"]) == 2
            assert at["median_delta_in"] == pytest.approx(np.median(at["delta_in"]))
            assert at["seconds"] > 0
    assert metrics["smallest_raw_train_mse"] == min(
        row["sizes"][1]["median_train_mse"] for row in metrics["ladder"] if "Fourier" not in row["rung"]
    )
    assert [row["rung"] for row in csv.DictReader((tmp_path / "history.csv").read_text().splitlines())][::2] == [
        row["rung"] for row in metrics["ladder"]
    ]


def found_fit(mse, diverged_at=(0, 0)):
    values = np.tile(target(GRID), (2, 1))
    values[np.array(diverged_at) > 0] = np.nan
    return Fit(np.array(mse, dtype=float), values, np.array(diverged_at))


def test_the_first_rung_at_which_all_interpolate_is_named_and_a_diverged_network_does_not(tmp_path, monkeypatch):
    def train(self, sizes, trials, seed, device, after_epoch=None):
        if self.lr == 0.1:
            return None, found_fit([np.nan, 1e-9], (7, 0))
        if self.schedule == "constant":
            return None, found_fit([1e-9, 2e-4])
        return None, found_fit([1e-9, 1e-4])

    monkeypatch.setattr(ScaledRecipe, "train", train)
    metrics = run(what_it_takes, tmp_path)
    assert metrics["first_that_interpolates"] == "Adam, cosine"
    lr = metrics["ladder"][2]
    assert not lr["all_interpolate"]
    assert lr["sizes"][0]["diverged"] == 1
    assert lr["sizes"][0]["train_mse"] == [1e-9]


def test_no_rung_and_nothing_but_divergence_still_end(tmp_path, monkeypatch):
    monkeypatch.setattr(ScaledRecipe, "train", lambda *_: (None, found_fit([np.nan, np.nan], (7, 8))))
    metrics = run(what_it_takes, tmp_path)
    assert metrics["first_that_interpolates"] is None
    assert metrics["ladder"][0]["sizes"][0]["median_train_mse"] is None


@pytest.mark.parametrize(
    ("module", "flags", "word"),
    [
        (spectral_bias, ["--n", "1"], "--n: must be"),
        (spectral_bias, ["--features", "0"], "--features 0"),
        (spectral_bias, ["--recipe", "reference", "--features", "0"], "--features 0"),
        (spectral_bias, ["--trials", "0"], "--trials"),
        (spectral_bias, ["--sigma", "-1"], "--sigma"),
        (width_depth_study, ["--n", "1"], "--n: must be"),
        (width_depth_study, ["--widths", "0"], "--widths"),
        (width_depth_study, ["--depths", "0", "1"], "--depths"),
        (width_depth_study, ["--widths"], "--widths"),
        (what_it_takes, ["--sizes", "1", "9"], "--sizes: must be"),
        (what_it_takes, ["--scale", "0"], "--scale"),
        (what_it_takes, ["--epochs", "x"], "--epochs"),
    ],
)
def test_wrong_flags_are_one_line(module, flags, word, tmp_path, capsys):
    assert word in fails(module, [*flags, "--out", tmp_path / "run"], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", [spectral_bias, width_depth_study])
def test_a_study_in_which_all_diverge_is_one_line(module, tmp_path, capsys):
    flags = ["--optimizer", "sgd", "--lr", "1e9", "--epochs", "4", "--out", tmp_path]
    assert "every network diverged at learning rate 1e+09" in fails(module, flags, capsys)


def fails(module, flags, capsys):
    """The one line that `module` ends with; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: module.main([*COMMON, *TINY[module], *map(str, flags)]), module.build_parser)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    return error
