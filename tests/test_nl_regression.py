"""nl_regression's networks: each is the same alone as in an ensemble, and the same as PyTorch's own layers."""

import csv
import math

import numpy as np
import pytest
import torch

from nl_regression import sweep, train
from nl_regression.fitting import UPDATES_PER_EPOCH, epoch_batches, fit
from nl_regression.model import EnsembleMLP
from nl_regression.recipes import points_of
from nl_regression.results import Networks
from nl_regression.target import GRID, IN_POINTS, deltas, local_frequency, target

TINY = ["--epochs", "3", "--width", "16", "--device", "cpu"]


def networks(trials, n=(9, 70, 200), **shape):
    """A float64 ensemble of the given trials' networks, with their points and generators."""
    rngs, points = zip(*(points_of(n[t % len(n)], t, seed=0) for t in trials), strict=True)
    model = EnsembleMLP(len(trials), rngs=rngs, dtype=torch.float64, **shape)
    return model, points, rngs


# --- model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [0, 5])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_network_alone_is_the_same_as_in_the_ensemble(features, optimizer):
    shape, how = {"width": 32, "depth": 3, "features": features}, {"epochs": 7, "lr": 1e-2, "optimizer": optimizer}
    together, points, rngs = networks(range(6), **shape)
    all_fits = fit(together, points, rngs, **how)  # 112 updates
    for i in (0, 1, 4, 5):
        alone, own, rng = networks([i], **shape)
        own_fit = fit(alone, own, rng, **how)
        for name, value in alone.named_parameters():
            others = together.get_parameter(name)[i : i + 1]
            error = (value - others).abs().max() / others.abs().max()
            assert error < 1e-10, (i, name, error.item())
        np.testing.assert_allclose(own_fit.train_mse[0], all_fits.train_mse[i], rtol=1e-9)


def test_the_ensemble_computes_what_nn_linear_does_and_starts_from_its_distribution():
    model = EnsembleMLP(3, width=7, depth=2, dtype=torch.float64)
    x = torch.rand(3, 11, dtype=torch.float64)
    found = model(x)
    for i in range(3):
        h = x[i, :, None]
        for layer, (weight, bias) in enumerate(zip(model.weights, model.biases, strict=True)):
            h = torch.nn.functional.linear(h, weight[i].T, bias[i, 0])
            h = h.relu() if layer < 2 else h
        torch.testing.assert_close(found[i], h[:, 0])
    large = EnsembleMLP(1, width=400, depth=2)
    for weight, fan_in in zip(large.weights, (1, 400, 400), strict=True):
        assert weight.abs().max() <= 1 / math.sqrt(fan_in)
        assert weight.abs().max() > 0.98 / math.sqrt(fan_in)
        if weight.numel() > 400:
            assert weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.02)


def test_a_trained_network_follows_the_loop_that_a_module_would():
    model, points, rngs = networks([1], width=8, depth=1)
    twin = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)).double()
    with torch.no_grad():
        for at, layer in ((0, 0), (1, 2)):
            twin[layer].weight.copy_(model.weights[at][0].T)
            twin[layer].bias.copy_(model.biases[at][0, 0])
    fit(model, points, rngs, epochs=2, lr=0.05, optimizer="sgd", schedule="constant", batch_size=100)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    x = torch.from_numpy(points[0])[:, None]
    y = torch.from_numpy(target(points[0]))[:, None]
    for _ in range(2 * UPDATES_PER_EPOCH):  # 70 points fit into a batch of 100
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(twin(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(model.weights[0][0].T, twin[0].weight)
    torch.testing.assert_close(model.biases[1][0, 0], twin[2].bias)


def test_fourier_features_are_cosines_and_sines_of_the_frequencies():
    model = EnsembleMLP(2, width=4, depth=1, features=3, sigma=2.0, dtype=torch.float64)
    x = torch.tensor([[0.3, 0.7], [0.1, 0.9]], dtype=torch.float64)
    b = model.frequencies[1]
    phi = torch.cat([torch.cos(2 * math.pi * 0.9 * b), torch.sin(2 * math.pi * 0.9 * b)])
    h = (phi @ model.weights[0][1] + model.biases[0][1, 0]).relu()
    expected = h @ model.weights[1][1] + model.biases[1][1, 0]
    torch.testing.assert_close(model(x)[1, 1], expected[0])
    assert EnsembleMLP(1, features=5000, sigma=3.0).frequencies.std().item() == pytest.approx(3, rel=0.05)


# --- batches, target, errors --------------------------------------------------------------------------------------


def test_batches_pass_over_all_points_before_one_comes_again():
    sizes = [5, 64, 130]
    batches, weights = epoch_batches(sizes, 64, [np.random.default_rng(i) for i in range(3)])
    assert batches.shape == (UPDATES_PER_EPOCH, 3, 64)
    torch.testing.assert_close(weights.sum(1), torch.ones(3, dtype=torch.float64))
    assert (weights[0, :5] == 0.2).all()
    assert (weights[0, 5:] == 0).all()
    assert (batches[:, 0, :5] == torch.arange(5)).all()
    stream = batches[:, 2].reshape(-1).tolist()
    for start in range(0, len(stream) - 130, 130):
        assert sorted(stream[start : start + 130]) == list(range(130))
    assert stream[:130] != sorted(stream[:130])


def test_the_target_and_its_frequency():
    assert target(np.array([0.0, 0.05**0.25, 1.0])) == pytest.approx([0, 1, 0], abs=1e-12)
    x, h = np.array([0.3, 0.9]), 1e-6
    phase = lambda x: 10 * np.pi * x**4  # noqa: E731
    np.testing.assert_allclose(local_frequency(x), (phase(x + h) - phase(x - h)) / (4 * np.pi * h), rtol=1e-8)


def test_deltas_are_the_largest_errors_inside_and_all_over():
    fits = np.tile(target(GRID), (3, 1))
    fits[1, IN_POINTS - 1] += 0.5  # x = 1 belongs to the inside
    fits[2, IN_POINTS] -= 0.7
    delta_in, delta_out = deltas(fits)
    np.testing.assert_allclose(delta_in, [0, 0.5, 0], atol=1e-12)
    np.testing.assert_allclose(delta_out, [0, 0.5, 0.7], atol=1e-12)
    assert GRID[IN_POINTS - 1] == 1
    assert GRID[-1] == 1.5


# --- the sweep ----------------------------------------------------------------------------------------------------


def run_sweep(out, *flags):
    return sweep.main([*TINY, "--sizes", "5", "30", "90", "--table", "8", "--trials", "2", "--out", str(out), *flags])


def without_run(metrics):
    return {key: value for key, value in metrics.items() if key != "run"}


def test_a_resumed_sweep_ends_as_one_that_was_not_stopped(tmp_path, monkeypatch):
    whole = run_sweep(tmp_path / "whole")
    real = sweep.Recipe.train

    def stopped(self, sizes, *rest):
        if 30 in sizes:
            raise KeyboardInterrupt
        return real(self, sizes, *rest)

    monkeypatch.setattr(sweep.Recipe, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(tmp_path / "cut")
    monkeypatch.setattr(sweep.Recipe, "train", real)
    resumed = run_sweep(tmp_path / "cut", "--resume")
    assert without_run(resumed) == without_run(whole)
    for name in ("results.csv", "history.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "cut" / name).read_text()


def test_results_hold_a_line_for_each_network(tmp_path):
    metrics = run_sweep(tmp_path)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [(row["n"], row["trial"]) for row in rows] == [(n, t) for n in ("5", "8", "30", "90") for t in ("0", "1")]
    found = Networks.load(tmp_path / "last.npz")
    assert float(rows[3]["delta_in"]) == pytest.approx(deltas(found.values)[0][3], rel=1e-5)
    assert metrics["networks"] == 8
    assert [row["n"] for row in metrics["table"]] == [8]
    assert [row["n"] for row in metrics["sweep"]] == [5, 30, 90]


def test_networks_that_diverge_are_named_and_the_others_go_on(tmp_path, capsys):
    flags = ["--recipe", "reference", "--width", "64", "--epochs", "20", "--lr", "1.2"]
    metrics = run_sweep(tmp_path, *flags)
    printed = capsys.readouterr().out
    assert 0 < len(metrics["diverged"]) < 8
    n, trial, update = metrics["diverged"][0]
    assert f"n = {n}, trial {trial}: the loss was not finite at update {update}" in printed
    fine = [row for row in metrics["sweep"] + metrics["table"] if row["diverged"] < 2]
    assert fine
    assert all(row["train_mse"] is not None for row in fine)


@pytest.mark.parametrize(
    "flags",
    [["--sizes", "1"], ["--sizes", "0"], ["--trials", "0"], ["--lr", "0"], ["--recipe", "best"], ["--table", "x"]],
)
def test_wrong_flags(flags, tmp_path, fails):
    fails(sweep, [*TINY, *flags, "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


def test_a_sweep_in_which_all_diverge_is_one_line(tmp_path, fails):
    flags = [*TINY, "--recipe", "reference", "--lr", "1e6", "--sizes", "20", "--table", "--out", tmp_path]
    assert "every network diverged at learning rate 1e+06" in fails(sweep, flags)


def test_resuming_with_other_flags_is_refused_and_the_flag_named(tmp_path, fails):
    run_sweep(tmp_path)
    flags = [*TINY, "--sizes", "5", "30", "90", "--table", "8", "--trials", "2", "--out", tmp_path, "--resume"]
    assert "--lr" in fails(sweep, [*flags, "--lr", "0.5"])
    (tmp_path / "last.npz").write_bytes(b"PK damaged")
    assert "last.npz" in fails(sweep, flags)


def test_the_verdict_goes_by_the_largest_error_on_the_points_and_the_median_errors_between():
    row = {
        "train_mse": 1e-6,
        "largest_train_mse": 1e-6,
        "median_delta_in": 0.05,
        "median_delta_out": 1.4,
        "diverged": 0,
    }
    zero_beyond = deltas(np.where(GRID <= 1, target(GRID), 0)[None])[1][0]
    assert zero_beyond <= 1
    for change, said in (
        ({}, "knows the function on [0, 1], misses it beyond"),
        ({"median_delta_out": zero_beyond}, "knows the function on [0, 1], misses it beyond"),
        ({"median_delta_out": 0.3, "diverged": 2}, "knows the function on [0, 1], and roughly beyond; 2 diverged"),
        ({"median_delta_in": 0.2}, "meets its points, misses the function between them"),
        ({"largest_train_mse": 1e-2}, "does not meet its points"),
        (
            {"largest_train_mse": 0.6, "train_mse": 0.5},
            "does not meet its points and is no better on them than their mean would be",
        ),
        ({"train_mse": np.nan}, "diverged"),
    ):
        assert sweep.verdict({**row, **change}) == said


@pytest.mark.parametrize(("epochs", "noted"), [(3, [1, 2, 3]), (150, [*range(2, 151, 2)])])
def test_a_training_notes_its_errors_at_most_a_hundred_times(epochs, noted, tmp_path):
    train.main(["--n", "4", "--trials", "1", "--width", "4", "--epochs", str(epochs), "--out", str(tmp_path)])
    with (tmp_path / "history.csv").open(encoding="utf-8") as file:
        assert [int(row["epoch"]) for row in csv.DictReader(file)] == noted
