"""vae's scripts: what a run that was stopped ends with, and what a wrong flag or file gets.

Their files and figures are covered by test_scripts.py, the model by test_vae.py.
"""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image

from shared_utils import checkpoint
from shared_utils.checkpoint import load_arrays
from shared_utils.runs import ROOT
from vae import evaluate, latent_space, reconstruct, sample, train
from vae.inputs import load_binary
from vae.model import VAE

REAL = ROOT / "data"
needs_mnist = pytest.mark.skipif(not (REAL / "MNIST/raw").is_dir(), reason="data/ holds no MNIST")
TINY = [
    "--dataset",
    "digits",
    "--per-class",
    "20",
    "--val-size",
    "100",
    "--epochs",
    "3",
    "--batch-size",
    "16",
    "--device",
    "cpu",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of runs with a small model of train.py's."""
    runs_dir = tmp_path_factory.mktemp("runs")
    metrics = train.main([*TINY, "--runs-dir", str(runs_dir)])
    return runs_dir, metrics


# --- training -----------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE_EVERY", 10)
    monkeypatch.setattr(train, "VALIDATE_EVERY", 5)
    whole = train.main([*TINY, "--out", str(tmp_path / "whole")])
    real = train.check_finite

    def stopped(loss, step, lr):
        if step == 31:
            raise KeyboardInterrupt
        real(loss, step, lr)

    monkeypatch.setattr(train, "check_finite", stopped)
    flags = [*TINY, "--out", str(tmp_path / "cut")]
    with pytest.raises(KeyboardInterrupt):
        train.main(flags)
    monkeypatch.setattr(train, "check_finite", real)
    resumed = train.main([*flags, "--resume"])

    without = {key: value for key, value in whole.items() if key not in ("run", "training_seconds")}
    assert without == {key: resumed[key] for key in without}
    for name in ("best.pth", "last.pth"):
        first, second = (checkpoint.load(tmp_path / run / name) for run in ("whole", "cut"))
        assert all(torch.equal(first["model"][key], second["model"][key]) for key in first["model"])
    histories = [(tmp_path / run / "history.csv").read_text() for run in ("whole", "cut")]
    assert histories[0] == histories[1]
    first, second = (load_arrays(tmp_path / run / "terms.npz") for run in ("whole", "cut"))
    assert all(np.array_equal(first[name], second[name]) for name in ("reconstruction", "kl"))


def test_resuming_a_finished_run_changes_nothing(trained, tmp_path):
    runs_dir, metrics = trained
    before = checkpoint.load(runs_dir / "vae/train/best.pth")["model"]
    again = train.main([*TINY, "--runs-dir", str(runs_dir), "--resume"])
    after = checkpoint.load(runs_dir / "vae/train/best.pth")["model"]
    assert again["test_elbo"] == metrics["test_elbo"]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_terms_of_every_update_are_kept(trained):
    runs_dir, metrics = trained
    terms = load_arrays(runs_dir / "vae/train/terms.npz")
    assert len(terms["kl"]) == len(terms["reconstruction"]) == metrics["updates"] == 3 * 13  # ⌈200 / 16⌉ = 13
    assert (terms["kl"] > 0).all()
    assert (terms["reconstruction"] < 0).all()
    assert metrics["test_elbo"] == pytest.approx(metrics["test_reconstruction"] - metrics["test_kl"])


def test_training_raises_the_bound(tmp_path):
    metrics = train.main([*TINY, "--epochs", "40", "--out", str(tmp_path)])
    terms = load_arrays(tmp_path / "terms.npz")
    assert metrics["test_elbo"] > -45  # −196 log 2 = −136 at the start
    assert (terms["reconstruction"] - terms["kl"])[0] < -120


def test_weight_decay_is_the_encoders_alone(tmp_path):
    norms = {}
    for decay in (0, 30):
        out = tmp_path / str(decay)
        train.main([*TINY, "--encoder-weight-decay", str(decay), "--out", str(out)])
        state = checkpoint.load(out / "last.pth")["model"]
        norms[decay] = {part: state[f"{part}.0.weight"].norm().item() for part in ("encoder", "decoder")}
    assert norms[30]["encoder"] < 0.7 * norms[0]["encoder"]
    assert norms[30]["decoder"] > 0.9 * norms[0]["decoder"]


def test_a_loss_that_is_not_finite_stops_with_step_and_rate(tmp_path, fails):
    error = fails(train, [*TINY, "--lr", "1e30", "--schedule", "constant", "--out", tmp_path / "run"])
    assert "step" in error
    assert "learning rate" in error


@pytest.mark.parametrize(
    "flags",
    [
        *(["--epochs", "0"], ["--z-dim", "0"], ["--z-dim", "2.5"], ["--lr", "nan"], ["--encoder-weight-decay", "-1"]),
        *(["--schedule", "cosine"], ["--samples", "0"], ["--dataset", "nowhere"], ["--val-size", "99999"]),
    ],
)
def test_wrong_flags(flags, tmp_path, fails):
    fails(train, [*TINY, *flags, "--out", tmp_path / "run"])


def test_resuming_with_another_latent_size_is_refused(trained, fails):
    error = fails(train, [*TINY, "--runs-dir", trained[0], "--resume", "--z-dim", "4"])
    assert "--z-dim 8" in error


# --- images -------------------------------------------------------------------------------------------------------


def folder_of_images(root, per_class):
    rng = np.random.default_rng(0)
    for part, n in (("train", per_class), ("test", 2)):
        for name in ("a", "b"):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 256, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_a_folder_with_too_few_of_a_class_is_refused_and_told_what_it_has(tmp_path, fails):
    folder = folder_of_images(tmp_path / "mine", 12)
    flags = ["--dataset", folder, "--val-size", "4", "--out", tmp_path / "run"]
    error = fails(train, flags)
    assert "1000 images of each class" in error
    assert "--per-class 10" in error
    assert not (tmp_path / "run").exists()
    metrics = train.main([*map(str, flags), "--per-class", "10", "--epochs", "1"])
    assert metrics["train_images"] == 20


def test_a_stand_in_gives_what_it_has_and_says_so():
    args = train.build_parser().parse_args(["--dataset", "digits", "--per-class", "1000", "--val-size", "100"])
    data = load_binary(args)
    counts = np.bincount(data.y_train)
    assert (counts == counts[0]).all()
    assert f"{counts[0]} a class" in data.title
    assert len(data.x_val) == 100


@needs_mnist
def test_mnist_gives_a_thousand_of_each_class_and_the_same_ones_for_every_seed():
    first, second = (
        load_binary(train.build_parser().parse_args(["--data-dir", str(REAL), "--seed", seed])) for seed in ("0", "7")
    )
    assert np.bincount(first.y_train).tolist() == [1000] * 10
    assert np.array_equal(first.x_train, second.x_train)
    assert (first.x_train.shape, first.x_val.shape, first.x_test.shape) == ((10_000, 196), (1000, 196), (10_000, 196))
    assert set(np.unique(first.x_train)) == {0, 1}
    train_set = {row.tobytes() for row in first.x_train}
    assert np.mean([row.tobytes() in train_set for row in first.x_val]) < 0.2  # a few 1s look alike when binarised


# --- readers ------------------------------------------------------------------------------------------------------


def test_samples_are_images_of_two_values(trained, tmp_path):
    sample.main(["--runs-dir", str(trained[0]), "--n", "300", "--out", str(tmp_path), "--device", "cpu"])
    found = load_arrays(tmp_path / "samples.npz", ["images", "probabilities", "draws", "z"])
    for name in ("images", "probabilities", "draws"):
        assert (found[name].shape, found[name].dtype) == ((300, 14, 14), np.uint8)
    assert set(np.unique(found["images"])) == {0, 255}
    assert np.array_equal(found["images"] == 255, found["probabilities"] > 127)
    model = VAE(z_dim=8)
    model.load_state_dict(checkpoint.load(trained[0] / "vae/train/best.pth")["model"])
    with torch.no_grad():
        p = model.decode(torch.from_numpy(found["z"])).sigmoid().numpy().reshape(-1, 14, 14)
    np.testing.assert_allclose(found["probabilities"] / 255, p, atol=0.5 / 255 + 1e-6)
    assert (found["draws"] / 255).mean() == pytest.approx(p.mean(), abs=0.01)


@pytest.mark.parametrize("module", [evaluate, latent_space, reconstruct, sample])
def test_a_missing_checkpoint_names_the_command_that_makes_it(module, tmp_path, fails):
    error = fails(module, ["--runs-dir", tmp_path / "empty"])
    assert "python vae/train.py" in error


def test_a_damaged_checkpoint_is_one_line(tmp_path, fails):
    (tmp_path / "bad.pth").write_text("no model")
    assert "damaged" in fails(sample, ["--ckpt", tmp_path / "bad.pth", "--out", tmp_path / "run"])
    assert not (tmp_path / "run").exists()


def test_a_pair_that_does_not_exist(trained, tmp_path, fails):
    flags = [
        "--runs-dir",
        trained[0],
        "--dataset",
        "digits",
        "--per-class",
        "20",
        "--val-size",
        "100",
        "--out",
        tmp_path / "run",
    ]
    assert "--pair 99999" in fails(latent_space, [*flags, "--pair", "0", "99999"])


@pytest.mark.slow
@needs_mnist
def test_the_default_run_reaches_its_bound(tmp_path):
    metrics = train.main(["--data-dir", str(REAL), "--out", str(tmp_path), "--epochs", "100"])
    assert metrics["test_elbo"] > -33.8
    assert json.loads((tmp_path / "metrics.json").read_text())["best_step"] > 0


@pytest.mark.slow
@needs_mnist
def test_with_two_latents_the_bounds_of_a_trained_model_meet_the_exact_likelihood(tmp_path):
    flags = ["--data-dir", str(REAL), "--runs-dir", str(tmp_path)]
    train.main([*flags, "--z-dim", "2", "--epochs", "30"])
    metrics = evaluate.main([*flags, "--images", "1000", "--mixture-sizes", "20", "--samples", "100"])
    bounds = [metrics["test_elbo"], *metrics["iwae_by_k"].values(), metrics["test_exact"]]
    assert all(lower <= upper + 0.01 for lower, upper in itertools.pairwise(bounds))
    assert 0 <= metrics["exact_minus_iwae"] <= 0.02
    assert metrics["exact_minus_elbo"] > 0.2
    assert metrics["quadrature_change_at_half_the_points"] < 1e-3
