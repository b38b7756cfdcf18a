"""nl_regression's numbers and titles against made-up fits, whose answers are known: what a reader is told."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch

from nl_regression import benchmark, coverage_study, fitting, spectral_bias, sweep, train, what_it_takes
from nl_regression import width_depth_study as shapes
from nl_regression.fitting import Fit, fit
from nl_regression.model import EnsembleMLP
from nl_regression.recipes import RECIPES, Recipe, points_of
from nl_regression.results import Networks
from nl_regression.spectral_bias import Course, X
from nl_regression.target import GRID, IN_POINTS, local_frequency, target

CPU = torch.device("cpu")
RECIPE = Recipe(features=4, sigma=5.0, optimizer="adam", lr=2e-3, schedule="cosine", epochs=3, width=8, depth=2)


@pytest.fixture
def titles(monkeypatch):
    """The titles of the figures that the scripts save, none of which is drawn."""
    found = []
    for module in (benchmark, coverage_study, spectral_bias, sweep, train, what_it_takes, shapes):
        monkeypatch.setattr(module, "save_figure", lambda figure, path: found.append(figure.get_suptitle()))
    return found


def off_by(inside, beyond):
    """Values on the grid that are wrong by `inside` up to 1, by `beyond` above: (G,)."""
    return target(GRID) + np.where(np.arange(len(GRID)) < IN_POINTS, inside, beyond)


def fits(rows):
    """A `Fit` of networks (train MSE, error inside, error beyond)."""
    mse, inside, beyond = np.array(rows, dtype=float).T
    values = np.stack([off_by(*each) for each in zip(inside, beyond, strict=True)])
    return Fit(mse, values, np.zeros(len(rows), dtype=np.int64))


# --- recipes and training -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        *({"beta2": 0.5}, {"batch_size": 3}, {"schedule": "constant"}, {"optimizer": "sgd"}, {"lr": 1e-2}),
        *({"epochs": 2}, {"sigma": 1.0}, {"features": 2}, {"width": 4}, {"depth": 1}),
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_a_recipe_reaches_the_training(change):
    one, other = (recipe.train([20], [0], 0, CPU)[1].values for recipe in (RECIPE, replace(RECIPE, **change)))
    assert not np.array_equal(one, other)


def test_every_flag_overrides_its_recipe():
    flags = {"epochs": 7, "lr": 0.5, "optimizer": "sgd", "schedule": "constant", "features": 0, "sigma": 3.0}
    flags |= {"width": 5, "depth": 2, "batch_size": 9}
    given = [text for name, value in flags.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    assert Recipe.of(sweep.build_parser().parse_args(given)) == Recipe(**flags)


def test_points_differ_by_seed_size_and_trial():
    asked = [(n, trial, seed) for n in (5, 6) for trial in (0, 1) for seed in (0, 1)]
    assert len({points_of(*each)[1][0] for each in asked}) == 8


def test_the_first_update_whose_loss_was_not_finite_is_named(monkeypatch):
    rngs, points = zip(*(points_of(9, trial, 0) for trial in range(2)), strict=True)
    model = EnsembleMLP(2, 8, 2, rngs=rngs)
    how = {"epochs": 2, "lr": 1e30, "optimizer": "sgd", "schedule": "constant"}
    assert fit(model, points, rngs, **how).diverged_at.tolist() == [2, 2]  # the first one's loss is the untrained
    monkeypatch.setattr(fitting, "evaluate", lambda model, points: (np.array([np.nan, 0.1]), np.zeros((2, len(GRID)))))
    found = fit(EnsembleMLP(2, 8, 2, rngs=rngs), points, rngs, epochs=2, lr=1e-3)
    assert found.diverged_at.tolist() == [32, 0]  # ruined by the last


def test_a_trainings_numbers_are_medians_of_the_networks_that_did_not_diverge(tmp_path, titles, monkeypatch):
    made_up = fits([(1e-6, 0.1, 0.5), (4e-6, 0.2, 0.7), (9e-6, 0.4, 1.5), (7.0, 3.0, 5.0)])
    made_up = replace(made_up, diverged_at=np.array([0, 0, 0, 9]))

    def trained(self, sizes, trials, seed, device, note):
        model = EnsembleMLP(4, 5)
        note(1, model)
        return model, made_up

    mse = np.array([0.1, 0.3, 0.5, np.nan])
    monkeypatch.setattr(Recipe, "train", trained)
    monkeypatch.setattr(train, "evaluate", lambda model, points: (mse, made_up.values))
    flags = ["--n", "6", "--trials", "4", "--epochs", "1", "--device", "cpu", "--out", str(tmp_path)]
    metrics = train.main(flags)
    assert metrics["median_train_mse"] == pytest.approx(4e-6)
    assert (metrics["median_delta_in"], metrics["median_delta_out"]) == pytest.approx((0.2, 0.7))
    assert metrics["delta_out"] == pytest.approx([0.5, 0.7, 1.5])
    assert metrics["parameters"] == sum(p.numel() for p in EnsembleMLP(1, 5).parameters())
    assert metrics["diverged"] == [{"trial": 3, "update": 9}]
    with (tmp_path / "history.csv").open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert (float(row["train_mse"]), float(row["delta_in"])) == pytest.approx((0.3, 0.3))  # of all four, NaN left out
    assert "the points are met to 4.0e-06, the function on [0, 1] to 0.2 (medians)" in titles[0]
    assert "δ_in = 0.2, δ_out = 0.7 (medians)" in titles[1]


def test_a_training_is_followed_on_its_own_points(tmp_path, titles):
    flags = ["--n", "6", "--trials", "2", "--width", "8", "--epochs", "2", "--seed", "5", "--out", str(tmp_path)]
    train.main([*flags, "--device", "cpu"])
    recipe = Recipe.of(train.build_parser().parse_args(flags))
    wanted = np.median(recipe.train([6] * 2, range(2), 5, CPU)[1].train_mse)
    with (tmp_path / "history.csv").open(encoding="utf-8") as file:
        assert float(list(csv.DictReader(file))[-1]["train_mse"]) == pytest.approx(wanted, rel=1e-5)


# --- the sweep ----------------------------------------------------------------------------------------------------


def test_a_sizes_numbers_are_of_the_networks_that_did_not_diverge():
    rows = fits([(1e-6, 0.1, 0.5), (3e-6, 0.2, 0.6), (8e-6, 0.9, 1.0), (1.0, 5.0, 9.0)])
    diverged = np.array([0, 0, 0, 7])
    found = sweep.summary(Networks(np.full(4, 12), np.arange(4), rows.train_mse, diverged, rows.values))
    assert (found["n"], found["diverged"]) == (12, 1)
    for name, values in (
        ("train_mse", [1e-6, 3e-6, 8e-6]),
        ("delta_in", [0.1, 0.2, 0.9]),
        ("delta_out", [0.5, 0.6, 1]),
    ):
        assert found[name] == pytest.approx(np.mean(values))
        assert found[f"{name}_std"] == pytest.approx(np.std(values, ddof=1))
        assert found[f"median_{name}"] == pytest.approx(np.median(values))
        assert found[f"largest_{name}"] == pytest.approx(max(values))


def test_the_sweeps_metrics_and_titles_are_those_of_its_networks(tmp_path, titles, monkeypatch):
    by_size = {
        5: [(2e-3, 0.8, 1.5), (1e-6, 0.9, 1.6), (1e-6, 0.85, 1.9)],
        20: [(2e-6, 0.05, 1.2), (3e-6, 0.06, 1.3), (9e-6, 0.7, 1.4)],  # the median knows, the mean does not
        50: [(2e-6, 0.01, 0.3), (2e-4, 0.02, 0.4), (9e-6, 0.03, 0.6)],  # the mean meets its points, one does not
    }
    seeds = []

    def made_up(self, sizes, trials, seed, device):
        seeds.append(seed)
        return None, fits([by_size[n][trial] for n, trial in zip(sizes, trials, strict=True)])

    monkeypatch.setattr(Recipe, "train", made_up)
    flags = ["--sizes", "5", "20", "50", "--table", "20", "--trials", "3", "--seed", "4", "--device", "cpu"]
    metrics = sweep.main([*flags, "--out", str(tmp_path)])
    assert set(seeds) == {4}
    assert metrics["interpolating"] == 7
    assert metrics["largest_train_mse"] == 2e-3
    assert metrics["largest_n"] == 50
    assert metrics["delta_out_at_the_largest_n"] == pytest.approx(1.3 / 3)
    assert "all networks meet their points at 1 of 3 sizes" in titles[1]
    assert "at n = 50 the median δ_in is 0.02, δ_out 0.4" in titles[1]
    assert "From n = 5 to 50 the median δ_in goes from 0.85 to 0.02, δ_out from 1.6 to 0.4" in titles[2]


# --- coverage -----------------------------------------------------------------------------------------------------


def test_the_coverage_studys_counts_are_of_the_sets_that_they_name(tmp_path, titles, monkeypatch):
    flags = ["--runs-dir", str(tmp_path), "--device", "cpu"]
    tiny = ["--sizes", "5", "9", "14", "--table", "--trials", "2", "--epochs", "1", "--width", "8", "--seed", "7"]
    sweep.main([*flags, *tiny, "--sigma", "4"])
    error, gaps = {5: 0.05, 9: 0.5, 14: 0.2}, iter([2.0, 1.6, 1.5, 1.1, 0.5, 0.9, 1.2])  # the last: the ensemble's
    frequencies, fourier = [], coverage_study.fourier
    monkeypatch.setattr(coverage_study, "spline", lambda x, y, at: target(at) + error[len(x)])
    monkeypatch.setattr(coverage_study, "largest_gap", lambda x: next(gaps))
    monkeypatch.setattr(coverage_study, "fourier", lambda x, b: frequencies.append(b) or fourier(x, b))
    made_up, learned = fits([(1e-6, 0.3, 0.5), (2e-6, 0.31, 0.9), (3e-6, 0.32, 1.5)]), []
    monkeypatch.setattr(
        coverage_study, "train_ensemble", lambda recipe, x, *given: learned.append((x, given)) or made_up
    )
    metrics = coverage_study.main([*flags, "--n", "20", "--members", "3"])
    assert [row["median_gap"] for row in metrics["sizes"]] == pytest.approx([1.8, 1.3, 0.7])
    assert metrics["with_a_gap_of_a_half_period"] == 4
    assert metrics["median_gap_below_a_half_period_from_n"] == 14
    assert metrics["median_delta_in_below_a_tenth_from_n"]["cubic_spline"] is None
    assert metrics["of_these_delta_in_below_1"]["cubic_spline"] == 4
    assert metrics["of_these_delta_in_below_a_tenth"]["cubic_spline"] == 2
    assert metrics["of_the_others_delta_in_below_a_tenth"]["cubic_spline"] == 0
    assert metrics["network_no_worse_than"]["cubic_spline"] == 0
    assert frequencies[0].std() == pytest.approx(4, rel=0.1)  # the networks' sigma
    (x, given) = learned[0]
    assert np.array_equal(x, points_of(20, 0, seed=7)[1])  # the sweep's
    assert given[:2] == (3, 0)
    band = coverage_study.band_metrics(made_up.values.mean(0), made_up.values.std(0, ddof=1))
    assert {name: metrics["ensemble"][name] for name in band} == pytest.approx(band)
    assert metrics["ensemble"]["median_delta_in_of_members"] == pytest.approx(0.31)
    assert (band["in_band_inside"], band["in_band_outside"]) == (0, 1)
    assert "The median largest gap is below a half-period from n = 14 on" in titles[-2]
    assert f"on {band['in_band_outside']:.0%} of (1, 1.5], on {band['in_band_inside']:.0%} of [0, 1]" in titles[-1]


# --- the ladder ---------------------------------------------------------------------------------------------------


def test_the_ladders_metrics_are_those_of_the_rungs_that_they_name(tmp_path, titles, monkeypatch):
    def made_up(self, sizes, trials, seed, device, after_epoch=None):
        rung = 1 + bool(self.features) + (self.schedule == "cosine")  # 1: the reference, 3: the last
        return None, fits([(10.0 ** (-2 * rung) * n, 0.1 * rung, 0.9) for n in sizes])

    monkeypatch.setattr(what_it_takes.ScaledRecipe, "train", made_up)
    metrics = what_it_takes.main(["--sizes", "5", "9", "--trials", "2", "--device", "cpu", "--out", str(tmp_path)])
    assert metrics["reference_largest_n"] == 9
    assert metrics["last_train_mse"] == pytest.approx(9e-6)
    assert metrics["smallest_raw_train_mse"] == pytest.approx(9e-4)
    assert metrics["first_that_interpolates"] == "Fourier features, Adam, cosine"
    assert "median train MSE at n = 9: best raw input 9.0e-04, last rung 9.0e-06" in titles[0]


# --- spectral bias ------------------------------------------------------------------------------------------------


def course(name, factors, fast=1.0):
    """A method whose residual is the target times a factor at epochs 1, 10, 100; `fast` of it above 5 cycles."""
    share = np.where(local_frequency(X) >= 5, fast, 1.0)
    values = np.zeros((3, 1, len(GRID)))
    values[:, 0, :IN_POINTS] = target(X) * (1 + np.array(factors)[:, None] * share)
    return Course(name, RECIPE, np.array([1, 10, 100]), np.full((3, 1), 0.25), values)


def test_a_method_is_told_by_when_each_bin_was_halved_and_tenthed():
    row = spectral_bias.summary(course("a", (0.9, 0.3, 0.05), fast=2.0))
    assert row["half_by_place"] == [10, 10, 10, 100, 100]
    assert row["tenth_by_place"] == [100, 100, 100, None, None]
    np.testing.assert_allclose(row["final_by_place"], [0.05, 0.05, 0.05, 0.1, 0.1])
    even = spectral_bias.summary(course("a", (0.9, 0.3, 0.05)))
    assert (even["half_by_spectrum"], even["tenth_by_spectrum"]) == ([10] * 5, [100] * 5)
    np.testing.assert_allclose(even["final_by_spectrum"], [0.05] * 5)


def test_the_study_tells_raw_input_from_fourier_features(tmp_path, titles, monkeypatch):
    made_up = {
        "raw input, Adam": course("raw", (0.9, 0.4, 0.06), fast=3.0),
        "Fourier features, Adam": course("Fourier", (0.3, 0.05, 0.01)),
        "raw input, SGD": course("reference", (1.0, 1.0, 0.9)),
    }
    monkeypatch.setattr(spectral_bias, "watch", lambda name, *given: made_up[name])
    metrics = spectral_bias.main(["--device", "cpu", "--out", str(tmp_path)])
    assert metrics["raw_epochs_to_a_tenth"] == "100, 100, 100, never, never"
    assert metrics["fourier_epochs_to_a_tenth"] == "10, 10, 10, 10, 10"
    assert (metrics["raw_bins_below_a_tenth"], metrics["fourier_bins_below_a_tenth"]) == (3, 5)
    assert "raw: 100, 100, 100, never, never" in titles[0]
    assert "after 100 epochs: raw: 0.060 | 0.180; Fourier: 0.010 | 0.010" in titles[1]


def test_the_residuals_are_on_the_points_that_were_learned():
    recipe = replace(RECIPE, epochs=2)
    found = spectral_bias.watch("", recipe, 12, 2, 3, CPU)
    np.testing.assert_array_equal(found.train_mse[-1], recipe.train([12] * 2, range(2), 3, CPU)[1].train_mse)


# --- width and depth ----------------------------------------------------------------------------------------------


def test_a_shape_is_measured_inside_and_by_its_worst_network(monkeypatch):
    args = shapes.build_parser().parse_args(["--n", "9", "--trials", "2"])
    for mse, meets in (((1e-9, 1e-3), False), ((1e-9, 1e-5), True)):
        made_up = fits([(mse[0], 0.1, 0.7), (mse[1], 0.3, 0.9)])
        monkeypatch.setattr(Recipe, "train", lambda *_, made_up=made_up: (EnsembleMLP(2, 4), made_up))
        row = shapes.measure(RECIPE, args, CPU)
        assert row["trials_delta_in"] == pytest.approx([0.1, 0.3])
        assert row["meets_its_points"] is meets


@pytest.mark.parametrize(("hurts", "verdict", "answer"), [(True, "above", "more width"), (False, "within", "no harm")])
def test_what_is_said_of_larger_networks_is_what_was_found(hurts, verdict, answer):
    found = {"best": 4, "best_delta_in": 0.2, "largest": 8, "largest_delta_in": 0.5, "hurts": hurts}
    assert shapes.told(found, "width").endswith(f"0.500 at 8: {verdict} the trials' deviation")
    row = {"delta_in": 0.2, "trials_delta_in": [0.2], "trials_train_mse": [1e-3], "parameters": 7}
    row |= {"width": 4, "depth": 1, "meets_its_points": True}
    outcome = {"width": found, "depth": {**found, "hurts": False}}
    assert shapes.draw([row], [row], outcome, 9, RECIPE).get_suptitle().startswith(answer)


# --- the benchmark ------------------------------------------------------------------------------------------------


def test_the_machines_speed_counts_reads_and_writes(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(benchmark, "clock_of", lambda *_: lambda: float(next(ticks)))  # each takes a second
    monkeypatch.setattr(torch, "randn", lambda *size, device: torch.zeros(2, 2))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda n, device: zeros(n // 2**16))
    assert benchmark.machine_speeds(1, CPU, 1) == (2.0 * 2048**3, 2 * 4 * 2**10)


def test_the_benchmarks_best_is_the_fastest_group_on_one_thread(tmp_path, titles, monkeypatch):
    seconds = {1: 4e-3, 5: 1e-3, 20: 2e-3}

    def timed(recipe, n, group, alone, fused, seed, threads, device):
        return (1e-3 if fused else 3e-3) if alone else seconds[group] / (0.5 if threads == 1 else 1)

    monkeypatch.setattr(benchmark, "time_updates", timed)
    monkeypatch.setattr(benchmark, "machine_speeds", lambda *_: (1e12, 1e11))
    monkeypatch.setattr(benchmark, "parity", lambda *_: 1e-12)
    flags = ["--groups", "1", "5", "20", "--threads", "2", "--n", "10", "--device", "cpu", "--out", str(tmp_path)]
    metrics = benchmark.main(flags)
    assert metrics["best_group_on_one_thread"] == "5 together"
    assert metrics["best_ratio_on_one_thread"] == pytest.approx(1e-3 / 2e-3)  # the loop is faster
    operations, traffic = benchmark.work(Recipe(**RECIPES["interpolating"], batch_size=10))  # all of the 10 points
    assert metrics["megaflops_of_an_update"] == pytest.approx(operations / 1e6)
    assert metrics["best_share_of_the_limit"] == pytest.approx((operations / 1e12 + traffic / 1e11) / 2e-3)
    row = next(row for row in metrics["cases"] if row["way"] == "20 together")
    assert row["share_of_one_large_product"] == pytest.approx(operations / 4e-3 / 1e12)
    assert row["share_of_the_bandwidth"] == pytest.approx(traffic / 4e-3 / 1e11)
    assert "Fastest together: 5 together, 1.00 times as fast as one after another" in titles[0]  # on two threads
