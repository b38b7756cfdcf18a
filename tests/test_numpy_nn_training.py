"""numpy_nn's training scripts: the twins, the resumed run, the augmentation, bad input, real-data bars."""

import numpy as np
import pytest

from numpy_nn import (
    compare_optimizers,
    failure_modes,
    pooling_comparison,
    train_mlp,
    train_mnist_numpy,
    train_numpy_vs_torch,
)
from numpy_nn.cnn import build_network, random_affine
from numpy_nn.embedding import batch_order, embedding_network, stepper
from numpy_nn.losses import NotFinite, SoftmaxCrossEntropy, stopping
from numpy_nn.train_numpy_vs_torch import torch_stepper
from numpy_nn.twin import torch_twin
from shared_utils.checkpoint import load_arrays
from shared_utils.cli import UserError, run_main
from shared_utils.runs import ROOT, Diverged, Run

REAL = ROOT / "data"
needs_mnist = pytest.mark.skipif(not (REAL / "MNIST/raw").is_dir(), reason="data/ holds no MNIST")


def rng(seed=0):
    return np.random.default_rng(seed)


def test_the_twins_take_the_same_steps_in_float64():
    x, y = rng(1).standard_normal((500, 1, 28, 28)), rng(2).integers(0, 10, 500)
    ours = embedding_network(rng(), 10, np.float64)
    steps = stepper(ours, x, y, 0.1), torch_stepper(torch_twin(ours), x, y, 0.1)
    losses = np.array([[step(batch)[0] for step in steps] for batch in batch_order(500, 200, 32, seed=0)])
    assert np.abs(losses[:, 0] - losses[:, 1]).max() < 1e-9
    assert losses[-1, 0] < losses[0, 0]


def test_batches_are_epoch_after_epoch():
    order = batch_order(100, 7, 32, seed=0)
    assert [len(batch) for batch in order] == [32] * 7
    assert len(set(np.concatenate(order[:3]))) == 96


def test_random_affine_moves_each_image_by_its_own_map_and_keeps_its_range():
    x = rng(1).random((50, 1, 28, 28), dtype=np.float32)
    y = random_affine(x, rng(2))
    assert (y.shape, y.dtype) == (x.shape, np.float32)
    assert x.min() <= y.min() <= y.max() <= x.max()
    same = random_affine(np.repeat(x[:1], 50, axis=0), rng(2))
    assert len({image.tobytes() for image in same}) == 50
    flat = np.full((3, 1, 28, 28), 0.25, dtype=np.float32)
    np.testing.assert_allclose(random_affine(flat, rng(3)), flat, rtol=1e-6)


def test_a_loss_that_is_not_finite_is_said_in_one_line_and_a_bug_is_not():
    line = r"^update 3, learning rate 0\.0333: no number; try --lr 0\.01$"
    with pytest.raises(Diverged, match=line), stopping(3, 1 / 30, 0.1):
        raise NotFinite("no number")
    with pytest.raises(Diverged, match=r"^max: update 1, .*; try --lrs 2$"), stopping(1, 20.0, 20.0, "--lrs", "max"):
        raise NotFinite("no number")
    with pytest.raises(ValueError, match="aligned") as raised, stopping(1, 0.1, 0.1):
        raise ValueError("not aligned")
    assert not isinstance(raised.value, UserError)


class Still:
    """A generator whose every draw is in the middle: no turn, no scale, no shear, the shift given."""

    def __init__(self, shift):
        self.shift = shift

    def uniform(self, low, high, size):
        return np.full(size, self.shift if high == 2 else (low + high) / 2)


def test_random_affine_without_distortion_is_the_identity_and_a_shift_is_a_shift():
    x = rng(1).random((2, 1, 28, 28), dtype=np.float32)
    np.testing.assert_allclose(random_affine(x, Still(0.0))[:, :, :-1, :-1], x[:, :, :-1, :-1], atol=1e-5)
    np.testing.assert_allclose(random_affine(x, Still(1.5))[0, 0, 5, 5], x[0, 0, 6:8, 6:8].mean(), rtol=1e-4)


def test_the_networks_have_the_parameters_the_hand_formula_says():
    plain = sum(a.size for a in build_network("plain", rng()).parameters().values())
    assert plain == (25 * 16 + 16) + (25 * 16 * 32 + 32) + (512 * 128 + 128) + (128 * 10 + 10)
    strong = sum(a.size for a in build_network("strong", rng()).parameters().values())
    convolutions = (25 * 24 + 24) + 2 * 24 + (25 * 24 * 48 + 48) + 2 * 48
    assert strong == convolutions + (768 * 128 + 128) + (128 * 10 + 10)
    with pytest.raises(ValueError, match="recipe"):
        build_network("weak", rng())


@pytest.mark.parametrize(("recipe", "optimizer", "lr"), [("plain", "nesterov", "0.01"), ("strong", "adam", "0.002")])
def test_a_run_that_was_stopped_and_resumed_ends_with_the_same_weights(tmp_path, monkeypatch, recipe, optimizer, lr):
    flags = [
        "--quick",
        "--epochs",
        "3",
        "--recipe",
        recipe,
        "--optimizer",
        optimizer,
        "--lr",
        lr,
        "--batch-size",
        "128",
    ]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    first = train_mnist_numpy.main([*flags, "--out", str(whole)])
    log, rows = Run.log, []

    def stop_in_the_second_epoch(run, **row):
        rows.append(row)
        if len(rows) == 2:
            raise KeyboardInterrupt
        log(run, **row)

    monkeypatch.setattr(Run, "log", stop_in_the_second_epoch)
    with pytest.raises(KeyboardInterrupt):
        train_mnist_numpy.main([*flags, "--out", str(stopped)])
    monkeypatch.setattr(Run, "log", log)
    with pytest.raises(UserError, match="--batch-size 128, not 64"):
        train_mnist_numpy.main([*flags[:-2], "--batch-size", "64", "--out", str(stopped), "--resume"])
    second = train_mnist_numpy.main([*flags, "--out", str(stopped), "--resume"])
    for name in ("best.npz", "last.npz"):
        a, b = load_arrays(whole / name), load_arrays(stopped / name)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a if key != "seconds")
    assert first["test_accuracy"] == second["test_accuracy"]
    assert len((stopped / "history.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (train_mnist_numpy, ["--lr", "0"], "finite number above 0"),
        (train_mnist_numpy, ["--recipe", "weak"], "invalid choice"),
        (train_mnist_numpy, ["--lr", "1e9", "--epochs", "1"], "rate that is too high; try --lr 1e+08"),
        (train_numpy_vs_torch, ["--updates", "0"], "whole number, 1 or more"),
        (train_numpy_vs_torch, ["--lr", "1e9"], "try --lr 1e+08"),
        (train_numpy_vs_torch, ["--lr", "1e45", "--updates", "1"], "update 1, learning rate 1e+45"),
        (train_numpy_vs_torch, ["--lr", "1e6", "--updates", "1", "--parity-updates", "60"], "try --lr 100000"),
        (failure_modes, ["--dataset", "shapes"], "needs 1×28×28"),
    ],
)
def test_bad_input_is_one_line(module, flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: module.main(["--quick", *flags, "--out", str(tmp_path / "out")]), module.build_parser)
    written = capsys.readouterr().err
    assert stop.value.code == 2
    assert len(written.strip().splitlines()) == 1
    assert message in written
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    "module",
    [compare_optimizers, failure_modes, pooling_comparison, train_mlp, train_mnist_numpy, train_numpy_vs_torch],
)
def test_a_bug_in_a_training_loop_keeps_its_traceback(module, tmp_path, monkeypatch):
    def bug(loss, logits, labels):
        raise ValueError("shapes (3,) and (4,) not aligned")

    monkeypatch.setattr(SoftmaxCrossEntropy, "forward", bug)
    with pytest.raises(ValueError, match="not aligned") as raised:
        module.main(["--quick", "--out", str(tmp_path / "out")])
    assert not isinstance(raised.value, UserError)


@needs_mnist
@pytest.mark.slow
def test_real_data_bar_of_the_embedding_network(tmp_path):
    metrics = train_numpy_vs_torch.main(["--data-dir", str(REAL), "--out", str(tmp_path / "run")])
    assert metrics["test_accuracy"]["numpy"] >= 0.96
    assert metrics["largest_loss_gap"]["float64"] < 1e-9


@needs_mnist
@pytest.mark.slow
def test_real_data_bar_of_the_convolutional_network(tmp_path):
    metrics = train_mnist_numpy.main(["--data-dir", str(REAL), "--out", str(tmp_path / "run")])
    assert metrics["test_accuracy"] >= 0.992
