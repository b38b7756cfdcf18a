"""shared_utils: gradient checks, statistics, plots, several processes."""

import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from shared_utils import device, gradcheck, plotting, runs, stats
from shared_utils.cli import UserError
from shared_utils.distributed import World, shard
from shared_utils.schedules import half_cosine, one_cycle
from shared_utils.seeding import derived_seed

# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 2, 3, 7, 100])
def test_one_cycle_rises_to_its_peak_and_falls(updates):
    rates = [one_cycle(step, updates, 0.5) for step in range(updates)]
    assert all(0 < rate <= 0.5 for rate in rates)
    assert max(rates) == 0.5
    top = int(np.argmax(rates))
    assert top <= 0.25 * updates
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if updates == 100:
        assert top == 24
        assert rates[0] == pytest.approx(0.5 * (1 - math.cos(math.pi / 25)) / 2)
        assert rates[99] < 0.001


def test_half_a_cosine_falls_from_its_peak_to_0():
    rates = [half_cosine(step, 8, 0.5) for step in range(9)]
    assert rates[0] == 0.5
    assert rates[4] == pytest.approx(0.25)
    assert rates[8] == 0
    assert rates == sorted(rates, reverse=True)
    assert [a + b for a, b in zip(rates, rates[::-1], strict=True)] == pytest.approx([0.5] * 9)  # symmetric
    assert rates[2] == pytest.approx(0.5 * (1 + math.sqrt(0.5)) / 2)  # no straight line


# --- seeds ----------------------------------------------------------------------------------------------------------


def test_a_derived_seed_follows_from_all_its_parts():
    assert derived_seed(0, 1) == 3964924996  # published results hang on it
    found = {derived_seed(*parts) for parts in ((0,), (0, 0, 1), (0, 1), (1, 0), (1, 1), (1, 1, 2))}
    assert len(found) == 6
    assert all(0 <= seed < 2**32 for seed in found)


# --- gradcheck ----------------------------------------------------------------------------------------------------


def softmax_check(backward, rng):
    x = rng.standard_normal((3, 4))

    def forward():
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    return gradcheck.check_gradients(forward, lambda dy: {"x": backward(forward(), dy)}, {"x": x}, rng)["x"]


def test_gradcheck_passes_the_true_gradient_and_fails_a_wrong_one():
    rng = np.random.default_rng(0)
    assert softmax_check(lambda p, dy: p * (dy - (p * dy).sum(1, keepdims=True)), rng) < 1e-9
    assert softmax_check(lambda p, dy: p * dy, rng) > 1e-3


def test_gradcheck_refuses_what_would_prove_nothing():
    rng = np.random.default_rng(0)
    x = rng.standard_normal(3)
    zero = {"x": np.zeros(3)}
    with pytest.raises(ValueError, match="all zero"):
        gradcheck.check_gradients(lambda: np.ones(2), lambda dy: zero, {"x": x}, rng)
    with pytest.raises(ValueError, match="float64"):
        gradcheck.check_gradients(lambda: x, lambda dy: {"x": dy}, {"x": x.astype(np.float32)}, rng)
    with pytest.raises(ValueError, match="no gradient for x"):
        gradcheck.check_gradients(lambda: x, lambda dy: {}, {"x": x}, rng)
    with pytest.raises(ValueError, match="shape"):
        gradcheck.check_gradients(lambda: x, lambda dy: {"x": np.ones((3, 1))}, {"x": x}, rng)


def test_relative_error_is_the_worst_element_and_nan_is_no_pass():
    assert gradcheck.relative_error(np.array([1.0, 0, 0, 0]), np.zeros(4)) == 1
    with pytest.raises(ValueError, match="not finite"):
        gradcheck.relative_error(np.array([np.nan]), np.ones(1))


def test_numerical_gradient_restores_its_array():
    x = np.array([[1.0, 2.0], [3.0, 4.0]])
    kept = x.copy()
    gradient = gradcheck.numerical_gradient(lambda: float((x**3).sum()), x)
    assert np.array_equal(x, kept)
    np.testing.assert_allclose(gradient, 3 * kept**2, rtol=1e-8)


def test_gradcheck_reaches_into_a_torch_tensor():
    rng = np.random.default_rng(0)
    W = torch.from_numpy(rng.standard_normal((2, 3)))
    x = torch.from_numpy(rng.standard_normal((4, 2)))
    errors = gradcheck.check_gradients(
        lambda: (x @ W).numpy(), lambda dy: {"W": x.numpy().T @ dy}, {"W": W.numpy()}, rng
    )
    assert errors["W"] < 1e-9


# --- stats --------------------------------------------------------------------------------------------------------


def test_wilson_interval_against_published_values():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611.
    assert stats.wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert stats.wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert stats.wilson_interval(20, 20)[1] == 1.0
    with pytest.raises(ValueError, match="no proportion"):
        stats.wilson_interval(3, 2)


def test_mcnemar_is_the_exact_binomial_test():
    from scipy.stats import binomtest

    rng = np.random.default_rng(0)
    a, b = rng.random(10_000) < 0.995, rng.random(10_000) < 0.9944
    only_a, only_b, p = stats.mcnemar(a, b)
    assert p == pytest.approx(binomtest(only_a, only_a + only_b, 0.5).pvalue, rel=1e-9)
    assert stats.mcnemar(a, a) == (0, 0, 1.0)
    assert 0 <= stats.mcnemar(np.ones(5000, bool), np.zeros(5000, bool))[2] < 1e-300


def test_mean_std():
    assert stats.mean_std([1.0, 2.0, 3.0]) == (2.0, 1.0)
    assert stats.mean_std([4.0]) == (4.0, 0.0)


def test_half_width_is_students():
    # t(0.975; 4 degrees of freedom) = 2.7764, and the standard error of 1 … 5 is √2.5 / √5
    assert stats.half_width([1, 2, 3, 4, 5]) == pytest.approx(2.7764451 * math.sqrt(0.5))
    assert stats.half_width([1, 2, 3], confidence=0.9) == pytest.approx(2.9199856 / math.sqrt(3))
    assert stats.half_width([7.0]) is None


# --- plotting -----------------------------------------------------------------------------------------------------


def test_every_plot_draws_and_saves_the_same_bytes_twice(tmp_path):
    def draw(path):
        figure, axes = plotting.new_figure(2, 2, width=8, height=6, title="A finding")
        plotting.curves(axes[0, 0], {"a": ([1, 2], [1, 2]), "b": ([1], [2])}, xlabel="update", ylabel="loss (nats)")
        plotting.mean_band(axes[0, 1], [1, 2], np.array([[1, 2], [2, 4]]), label="a")
        plotting.image_grid(axes[1, 0], np.zeros((5, 1, 4, 4)), columns=3, labels=np.array(list("abcde")))
        plotting.confusion_matrix(axes[1, 1], np.array([[9, 1], [2, 8]]), ["0", "1"], title="errors")
        plotting.save_figure(figure, path)
        return path.read_bytes()

    first = draw(tmp_path / "a.png")
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert first == draw(tmp_path / "b.png")


def test_curves_are_all_different():
    styles = [tuple(plotting.line_style(index).values()) for index in range(32)]
    assert len(set(styles)) == 32


def test_mean_band_draws_the_sample_deviation_of_the_runs_there_are():
    _, axes = plotting.new_figure()
    plotting.mean_band(axes[0, 0], [1, 2], np.array([[1.0, 5.0], [3.0, np.nan]]), label="a")
    assert axes[0, 0].lines[0].get_ydata().tolist() == [2, 5]
    band = axes[0, 0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.min() == 1  # the lowest run: 2 − √2 is below it
    assert band.max() == 5
    plotting.mean_band(axes[0, 0], [1], np.array([[1.0], [2], [3], [4]]), label="b")
    band = axes[0, 0].collections[1].get_paths()[0].vertices[:, 1]
    assert [band.min(), band.max()] == pytest.approx([2.5 - math.sqrt(5 / 3), 2.5 + math.sqrt(5 / 3)])


def test_a_running_mean_is_that_of_a_loop():
    values = np.random.default_rng(0).random((57, 2))
    near = [[row for n, row in enumerate(values, 1) if at / 1.1 <= n <= at * 1.1] for at in range(1, 58)]
    assert plotting.running_mean(values) == pytest.approx(np.array([np.mean(rows, axis=0) for rows in near]))
    assert plotting.running_mean(values[:, 0]) == pytest.approx(plotting.running_mean(values)[:, 0])


def test_image_grid_is_read_row_by_row():
    _, axes = plotting.new_figure()
    plotting.image_grid(axes[0, 0], np.arange(5.0).reshape(5, 1, 1), columns=3)
    assert axes[0, 0].images[0].get_array()[::2, ::2].tolist() == [[0, 1, 2], [3, 4, None]]


def test_confusion_counts_stand_where_they_belong():
    _, axes = plotting.new_figure()
    plotting.confusion_matrix(axes[0, 0], np.array([[9, 1], [2, 8]]), ["0", "1"], title="")
    assert {text.get_position(): text.get_text() for text in axes[0, 0].texts}[(1, 0)] == "1"


def test_image_grid_places_colour_and_grey():
    _, axes = plotting.new_figure()
    images = np.zeros((2, 3, 2, 2), dtype=np.uint8)
    images[1, 0] = 255
    plotting.image_grid(axes[0, 0], images, columns=2)
    drawn = axes[0, 0].images[0].get_array()
    assert drawn[0, 0].tolist() == [0, 0, 0]
    assert drawn[0, 3].tolist() == [1, 0, 0]


# --- distributed --------------------------------------------------------------------------------------------------


def test_shards_are_disjoint_complete_and_of_one_length():
    batch = np.random.default_rng(0).permutation(12)
    parts = [shard(batch, World(rank, 3, torch.device("cpu"))) for rank in range(3)]
    assert [len(part) for part in parts] == [4, 4, 4]
    assert sorted(np.concatenate(parts)) == sorted(batch)
    World(0, 3, torch.device("cpu")).check(12)
    with pytest.raises(UserError, match="--batch-size 5 does not divide among 3 processes"):
        shard(batch[:5], World(0, 3, torch.device("cpu")))


TWO_PROCESSES = """
import numpy as np, torch, sys
from shared_utils.distributed import process_group, shard, wrap

def main():  # the wrapped model goes with the function: left to the interpreter's end it aborts now and then
    with process_group("cpu") as world:
        torch.manual_seed(0)
        x, y = torch.randn(8, 5), torch.randn(8, 1)
        model = wrap(torch.nn.Linear(5, 1), world)
        part = shard(np.arange(8), world)
        ((model(x[part]) - y[part]) ** 2).mean().backward()
        if world.is_main:
            np.save(sys.argv[1], np.concatenate([p.grad.numpy().ravel() for p in model.parameters()]))

main()
"""


def test_cpu_threads_holds_inside_alone():
    before = torch.get_num_threads()
    with device.cpu_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_the_seconds_of_a_call_are_taken_around_it():
    assert 0.02 <= device.seconds_of(lambda: time.sleep(0.02), torch.device("cpu")) < 1


def test_a_gpus_work_is_waited_for_on_both_sides(monkeypatch):
    said = []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: said.append("mps"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("cuda"))
    for kind in ("mps", "cuda", "cpu"):
        device.seconds_of(lambda: said.append("call"), torch.device(kind))
    assert said == ["mps", "call", "mps", "cuda", "call", "cuda", "call"]


@pytest.mark.slow
def test_torchrun_gives_the_gradient_of_one_process(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    env = {**os.environ, "PYTHONPATH": str(runs.ROOT), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # the host name may lead nowhere
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([sys.executable, str(script), str(tmp_path / "1.npy")], check=True, env=env)
    ended = subprocess.run([*torchrun, script, tmp_path / "2.npy"], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    np.testing.assert_allclose(np.load(tmp_path / "2.npy"), np.load(tmp_path / "1.npy"), rtol=1e-6)
