"""nl_regression's yardsticks: gaps in half-periods, the methods beside the network, its band; the benchmark's twins."""

import csv
import json
from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from nl_regression import benchmark, coverage_study, sweep
from nl_regression.coverage_study import band_metrics, fourier, from_which, gaussian_process, largest_gap, least_norm
from nl_regression.fitting import fit
from nl_regression.model import EnsembleMLP
from nl_regression.recipes import Recipe, points_of
from nl_regression.target import GRID, IN_POINTS, deltas, target

RECIPE = Recipe(features=8, sigma=5.0, optimizer="adam", lr=2e-3, schedule="cosine", epochs=3, width=16)


# --- gaps ---------------------------------------------------------------------------------------------------------


def at_half_periods(*g):
    """The points at which the target's phase is g half-periods: 10x⁴ = g."""
    return (np.array(g) / 10) ** 0.25


@pytest.mark.parametrize(
    ("points", "gap"),
    [
        ((1, 3.5, 4, 6, 8, 9.5), 2.5),
        ((9.5, 1, 6, 4, 8, 3.5), 2.5),  # in the order drawn
        ((3.2, 5, 7, 9), 3.2),  # from 0 to the first
        ((2, 4, 6.6), 3.4),  # from the last to 1
    ],
)
def test_the_largest_gap_is_counted_in_half_periods_edges_included(points, gap):
    x = at_half_periods(*points)
    assert largest_gap(x) == pytest.approx(gap)


def test_a_half_period_is_from_zero_to_zero_of_the_target():
    x = at_half_periods(*range(10))
    np.testing.assert_allclose(target(x), 0, atol=1e-12)
    assert largest_gap(x) == pytest.approx(1)
    assert np.abs(target(at_half_periods(*np.arange(0.5, 10)))) == pytest.approx(np.ones(10))


def test_from_which_size_on_all_are_below():
    assert from_which([8, 16, 32, 64], np.array([0.05, 0.2, 0.09, 0.01]), 0.1) == 32
    assert from_which([8, 16], np.array([0.05, 0.02]), 0.1) == 8
    assert from_which([8, 16], np.array([0.05, 0.1]), 0.1) is None


# --- methods ------------------------------------------------------------------------------------------------------


def some_points(n, trial=0):
    _, x = points_of(n, trial, seed=3)
    return x, target(x)


def test_the_spline_meets_its_points_and_reproduces_a_cubic_between_and_beyond_them():
    x, y = some_points(30)
    np.testing.assert_allclose(coverage_study.spline(x, y, x), y, atol=1e-12)
    cubic = np.polynomial.Polynomial([0.3, -1, 2, 5])
    found = coverage_study.spline(x, cubic(x), np.linspace(0, 1, 50))
    np.testing.assert_allclose(found, cubic(np.linspace(0, 1, 50)), atol=1e-9)


def test_the_gaussian_process_meets_its_points_and_finds_the_length_scale_of_a_function_of_its_own():
    x, y = some_points(60)
    mean, _ = gaussian_process(x, y, x)
    np.testing.assert_allclose(mean, y, atol=1e-3)
    rng, x = points_of(80, 0, seed=4)
    for length in (0.03, 0.15):
        kernel = coverage_study.rbf(x, x, length) + 1e-8 * np.eye(80)
        for scale in (0.01, 100):  # the variance is found too: the length scale does not depend on it
            drawn = scale * np.linalg.cholesky(kernel) @ rng.standard_normal(80)
            assert gaussian_process(x, drawn, x)[1] == pytest.approx(length, rel=0.25)


def test_the_length_scale_is_that_of_the_largest_likelihood_of_its_candidates():
    assert coverage_study.rbf(np.array([0.2]), np.array([0.2, 0.5]), 0.3)[0] == pytest.approx([1, np.exp(-0.5)])
    rng, x = points_of(12, 0, seed=5)
    for _ in range(8):
        y, found = rng.standard_normal(12).cumsum()[np.argsort(np.argsort(x))], []
        for length in coverage_study.LENGTHS:
            kernel = coverage_study.rbf(x, x, length) + coverage_study.JITTER * np.eye(12)
            variance = y @ np.linalg.solve(kernel, y) / 12  # the density's maximum over the variance
            found.append(multivariate_normal.logpdf(y, np.zeros(12), variance * kernel, allow_singular=True))
        assert gaussian_process(x, y, x)[1] == coverage_study.LENGTHS[np.argmax(found)]


def test_the_least_norm_solution_meets_its_points_with_less_norm_than_others_that_do():
    rng = np.random.default_rng(0)
    x, y = some_points(12)
    frequencies = rng.normal(0, 10, 200)
    features = fourier(x, frequencies)
    w = least_norm(x, y, frequencies)
    np.testing.assert_allclose(features @ w, y, atol=1e-9)
    # Another: the first 30 features alone. And its difference from the least one is orthogonal to that.
    other = np.zeros_like(w)
    other[:30] = np.linalg.lstsq(features[:, :30], y, rcond=None)[0]
    np.testing.assert_allclose(features @ other, y, atol=1e-6)
    assert np.linalg.norm(w) < 0.9 * np.linalg.norm(other)
    assert abs(w @ (other - w)) < 1e-6 * np.linalg.norm(other) ** 2


def test_the_features_inner_products_approach_the_kernel_that_they_stand_for():
    frequencies = np.random.default_rng(0).normal(0, 10, 20_000)
    x = np.array([0.5])
    for distance in (0.0, 0.01, 0.02):
        found = (fourier(x, frequencies) @ fourier(x + distance, frequencies).T).item()
        assert found == pytest.approx(np.exp(-2 * (np.pi * 10 * distance) ** 2), abs=0.02)


# --- the band -----------------------------------------------------------------------------------------------------


def test_the_band_is_judged_by_where_it_holds_the_target_and_where_it_is_wide():
    outside = GRID > 1
    mean = target(GRID) + np.where(outside, 0.3, 0.03)
    found = band_metrics(mean, np.where(outside, 0.2, 0.01))
    assert (found["in_band_inside"], found["in_band_outside"], found["auroc_of_std"]) == (0, 1, 1)
    assert (found["mean_std_inside"], found["mean_std_outside"]) == pytest.approx((0.01, 0.2))
    assert (found["largest_error_inside"], found["mean_error_outside"]) == pytest.approx((0.03, 0.3))
    assert band_metrics(mean, np.where(outside, 0.01, 0.2))["auroc_of_std"] == 0
    assert outside.sum() == len(GRID) - IN_POINTS


def test_the_ensembles_networks_share_their_points_and_nothing_else():
    x, _ = some_points(6)
    recipe = Recipe(**{**vars(RECIPE), "epochs": 20, "lr": 1e-2})
    found = coverage_study.train_ensemble(recipe, x, 3, 0, torch.device("cpu"))
    meets = np.abs(np.array([np.interp(x, GRID, values) for values in found.values]) - target(x)).max(1)
    assert (meets < 0.1).all()
    spread = found.values.std(0)
    assert spread[GRID > 1].mean() > 0.05
    again = coverage_study.train_ensemble(recipe, x, 2, 0, torch.device("cpu"))
    np.testing.assert_allclose(again.values, found.values[:2], atol=1e-4)


# --- the scripts --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A runs folder with a tiny sweep, and the study's metrics on it."""
    folder = tmp_path_factory.mktemp("runs")
    flags = ["--runs-dir", str(folder), "--device", "cpu"]
    shape = ["--sizes", "30", "90", "--table", "8", "--trials", "2", "--epochs", "3", "--width", "16", "--seed", "7"]
    sweep.main([*flags, *shape])
    return folder, coverage_study.main([*flags, "--n", "20", "--members", "3"])


def test_the_study_measures_all_methods_on_the_points_of_the_sweep(swept):
    folder, metrics = swept
    rows = list(csv.DictReader((folder / "nl_regression" / "coverage_study" / "coverage.csv").open()))
    assert [(row["n"], row["trial"]) for row in rows] == [(n, t) for n in ("8", "30", "90") for t in ("0", "1")]
    _, x = points_of(90, 1, seed=7)  # the sweep's seed, not the study's
    assert float(rows[5]["gap"]) == pytest.approx(largest_gap(x), rel=1e-5)
    spline = np.abs(coverage_study.spline(x, target(x), GRID) - target(GRID))[:IN_POINTS].max()
    assert float(rows[5]["cubic spline"]) == pytest.approx(spline, rel=1e-4)
    process, _ = gaussian_process(x, target(x), GRID)
    assert float(rows[5]["Gaussian process"]) == pytest.approx(deltas(process[None])[0][0], rel=1e-3)
    with np.load(folder / "nl_regression" / "sweep" / "last.npz") as found:
        assert float(rows[5]["network"]) == pytest.approx(deltas(found["values"])[0][5], rel=1e-5)
    wide = [float(row["gap"]) >= 1 for row in rows]
    assert metrics["with_a_gap_of_a_half_period"] == sum(wide)
    for name in coverage_study.METHODS:
        lucky = sum(float(row[name]) < 1 for row, gap in zip(rows, wide, strict=True) if gap)
        assert metrics["of_these_delta_in_below_1"][name.replace(" ", "_")] == lucky
    assert metrics["largest_residual_of_least_norm"] < 1e-6
    assert metrics["ensemble"]["members"] == 3


def test_a_missing_sweep_names_the_command_that_makes_it(tmp_path, fails):
    error = fails(coverage_study, ["--quick", "--runs-dir", tmp_path])
    assert f"`python nl_regression/sweep.py --quick --runs-dir {tmp_path}` makes it" in error
    assert not (tmp_path / "nl_regression").exists()


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (coverage_study, ["--n", "1"], "2 or more"),
        (coverage_study, ["--members", "1"], "2 or more"),
        (coverage_study, ["--members", "two"], "--members"),
        (benchmark, ["--groups", "0"], "--groups"),
        (benchmark, ["--groups"], "--groups"),
        (benchmark, ["--threads", "0"], "--threads"),
        (benchmark, ["--epochs", "1"], "2 or more"),
        (benchmark, ["--n", "1"], "2 or more"),
        (benchmark, ["--device", "tpu"], "--device tpu"),
    ],
)
def test_wrong_flags(script, flags, said, tmp_path, fails):
    assert said in fails(script, [*flags, "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


# --- the benchmark ------------------------------------------------------------------------------------------------


def test_the_ensembles_losses_are_those_of_torch_nn_layers():
    assert benchmark.parity(RECIPE, (5, 64, 70, 150), epochs=4, seed=0) < 1e-10
    assert benchmark.parity(Recipe(**{**vars(RECIPE), "features": 0}), (70, 20), epochs=2, seed=1) < 1e-10


def test_a_twin_trained_alone_ends_with_the_ensembles_weights():
    rngs, points = zip(*(points_of(n, 0, seed=0) for n in (40, 100)), strict=True)
    model = EnsembleMLP(2, 16, 2, 8, sigma=5.0, rngs=rngs, dtype=torch.float64)
    net, rng, before = benchmark.twin_of(model, 1), deepcopy(rngs[1]), model.weights[1][1].detach().clone()
    how, epochs = {"epochs": 4, "lr": 1e-2, "batch_size": 64}, []
    fit(model, points, rngs, **how)
    benchmark.train_alone(net, points[1], rng, fused=False, after_epoch=lambda epoch, _: epochs.append(epoch), **how)
    assert epochs == [1, 2, 3, 4]
    torch.testing.assert_close(net[3].weight, model.weights[1][1].T, rtol=1e-8, atol=1e-10)
    assert (net[3].weight.T - before).abs().max() > 0.01


def test_the_work_of_an_update_is_that_of_its_products_and_of_adam():
    operations, traffic = benchmark.work(RECIPE)  # 16 inputs, 3 layers of 16, 1 output; batches of 64
    weights = [16 * 16, 16 * 16, 16 * 16, 16]
    assert operations == 2 * 64 * (3 * sum(weights) - weights[0])
    assert traffic == 32 * (sum(weights) + 3 * 16 + 1)


def test_the_benchmark_writes_what_it_measured(tmp_path):
    flags = ["--quick", "--width", "16", "--groups", "1", "3", "--out", str(tmp_path), "--device", "cpu"]
    metrics = benchmark.main(flags)
    assert json.loads((tmp_path / "metrics.json").read_text())["cases"] == metrics["cases"]
    own = [row for row in metrics["cases"] if row["threads"] == 1]
    assert [row["way"] for row in own if not row["alone"]] == ["1 together", "3 together"]
    looped = min(row["update_seconds"] for row in own if row["alone"])
    for row in own:
        assert row["times_as_fast_as_alone"] == pytest.approx(looped / row["update_seconds"])
        assert 0 < row["share_of_the_limit"] < 1
    assert metrics["largest_relative_difference_of_losses"] < 1e-5
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_a_time_is_that_of_one_update_of_one_network(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(benchmark, "clock_of", lambda *_: lambda: float(next(ticks)))  # an epoch takes a second
    for alone, group, seconds in ((False, 4, 1 / 64), (True, 2, 1 / 16)):
        found = benchmark.time_updates(RECIPE, 20, group, alone, True, 0, 1, torch.device("cpu"))
        assert found == pytest.approx(seconds)
