"""mnist_svm_gabor: the file, distortions, pictures, bad input, real-data bars."""

import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_svm_gabor import ablation, invariance, learning_curve, predict, train
from mnist_svm_gabor.classifier import Classifier
from mnist_svm_gabor.features import Preparation
from mnist_svm_gabor.gabor import GaborBank
from mnist_svm_gabor.protocol import choose_and_fit, default_grid, folds
from shared_utils.cli import UserError
from shared_utils.data import load_images
from shared_utils.runs import ROOT

REAL = ROOT / "data"
needs_mnist = pytest.mark.skipif(not (REAL / "MNIST/raw").is_dir(), reason="data/ holds no MNIST")


# --- the file -----------------------------------------------------------------------------------------------------


def moments(image):
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    mass = image.sum()
    my, mx = (image * y).sum() / mass, (image * x).sum() / mass
    return my, mx, (image * (y - my) * (x - mx)).sum() / mass


@pytest.fixture
def rare_class(tmp_path):
    """A folder with 80 images for training of the one class, 80 of the next and one of the third."""
    images = load_images("digits", "train")
    for label, n in ((0, 80), (1, 80), (2, 1)):
        for split in ("train", "test"):
            folder = tmp_path / "rare" / split / f"digit {label}"
            folder.mkdir(parents=True)
            for i in np.flatnonzero(images.y == label)[:n]:
                Image.fromarray(images.x[i, 0]).save(folder / f"{i}.png")
    return tmp_path / "rare"


@pytest.fixture(scope="module")
def fitted():
    images = load_images("digits", "train")
    prepare = Preparation(14, True, GaborBank())
    grid = replace(default_grid("rbf"), components=[100])
    found = choose_and_fit(prepare(images.x), images.y, folds(images.y, np.random.default_rng(0), 10), "rbf", grid)
    return Classifier(prepare, found.projection, found.svm, images.classes)


def test_a_stored_classifier_predicts_the_same(fitted, tmp_path):
    test = load_images("digits", "test")
    fitted.save(tmp_path / "model.npz")
    again = Classifier.load(tmp_path / "model.npz")
    assert again.preparation == fitted.preparation
    assert np.array_equal(again.scores(test.x), fitted.scores(test.x))
    assert (again.predict(test.x) == test.y).mean() > 0.95


def test_a_stored_classifier_that_is_none(fitted, tmp_path):
    fitted.save(tmp_path / "model.npz")
    with np.load(tmp_path / "model.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "other.npz", **{**arrays, "bank_flavour": np.array(3)})
    with pytest.raises(UserError, match="no classifier of this version"):
        Classifier.load(tmp_path / "other.npz")
    del arrays["weights"]
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(UserError, match="lacks weights"):
        Classifier.load(tmp_path / "other.npz")


# --- distortions, pictures ----------------------------------------------------------------------------------------


def test_warp_against_what_numpy_does():
    x = np.random.default_rng(0).integers(0, 256, (3, 1, 28, 28), dtype=np.uint8)
    assert np.array_equal(invariance.warp(x), x)
    assert np.array_equal(invariance.warp(x, degrees=90), np.rot90(x, axes=(2, 3)))
    moved = invariance.warp(x, shift=3)
    assert np.array_equal(moved[..., 3:], x[..., :-3])
    assert moved[..., :3].max() == 0
    dot = np.zeros((1, 1, 28, 28), dtype=np.uint8)
    dot[0, 0, 13:15, 19:21] = 255  # its centre 6 pixels right of the middle
    assert moments(invariance.warp(dot, scale=1.5)[0, 0].astype(float))[1] == pytest.approx(13.5 + 9, abs=0.1)


def test_noise_has_the_strength_asked_for():
    grey = np.full((4, 1, 28, 28), 128, dtype=np.uint8)
    noisy = invariance.with_noise(grey, 0.1, seed=0)
    assert noisy.std() == pytest.approx(25.5, rel=0.05)
    assert np.array_equal(noisy, invariance.with_noise(grey, 0.1, seed=0))
    assert np.array_equal(invariance.with_noise(grey, 0.0, seed=0), grey)


def test_tolerance_is_the_unbroken_range():
    assert invariance.tolerance([-2, -1, 0, 1, 2], [0.95, 0.5, 0.99, 0.91, 0.2], neutral=0) == "0 … 1"
    assert invariance.tolerance([0.9, 1.0, 1.1], [0.95, 0.99, 0.95], neutral=1) == "0.9 … 1.1"
    assert invariance.tolerance([0, 1], [0.5, 0.95], neutral=0) == "none"


def test_the_headline_takes_both_ways_of_turning():
    accuracies = {"raw": [0.1, 0.9, 0.5], "gabor": [0.2, 0.9, 0.4]}
    found = {
        "rotation": {"strength": [-30.0, 0.0, 30.0], **accuracies},
        "noise": {"strength": [0.0, 0.3, 0.6], **accuracies},
    }
    assert invariance.headline(found)["at_30_degrees"] == {"raw": pytest.approx(0.3), "gabor": pytest.approx(0.3)}
    assert invariance.headline(found)["under_noise"] == {"raw": 0.9, "gabor": 0.9}


def test_what_is_counted_are_the_distorted_images(fitted, tmp_path):
    fitted.save(tmp_path / "m.npz")
    model = str(tmp_path / "m.npz")
    flags = ["--quick", "--raw", model, "--gabor", model, "--n", "100", "--out", str(tmp_path / "out")]
    rotation = invariance.main(flags)["accuracy"]["rotation"]
    assert rotation["gabor"][rotation["strength"].index(0.0)] > 0.9
    assert rotation["gabor"][-1] < 0.7
    assert rotation["raw"] == rotation["gabor"]


def test_a_picture_is_cropped_stretched_and_centred_by_its_mass():
    picture = np.full((1, 200, 300), 240, dtype=np.uint8)
    picture[0, 20:120, 200:210] = 180  # a faint L, off the middle
    picture[0, 110:120, 200:240] = 180
    seen = predict.as_mnist(picture, "L")[0].astype(float)
    assert seen.max() == 255
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert (rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1) == (20, 8)
    my, mx, _ = moments(seen)
    assert (my, mx) == (pytest.approx(13.5, abs=0.6), pytest.approx(13.5, abs=0.6))


def test_pictures_of_the_learners_own_are_brought_into_mnists_form(fitted):
    test = load_images("digits", "test")[:60]
    pictures = []
    for image in test.x[:, 0]:
        page = Image.new("L", (400, 300), 230)  # dark ink on a light page, off the middle
        ink = Image.fromarray(230 - (image.astype(int) * 200 // 255).astype(np.uint8)).resize((140, 140))
        page.paste(ink, (220, 30))
        pictures.append(predict.as_mnist(np.asarray(page)[None], "page"))
    pictures = np.stack(pictures)
    assert pictures.shape == (60, 1, 28, 28)
    assert (fitted.predict(pictures) == test.y).mean() > 0.9
    assert np.array_equal(predict.as_mnist(test.x[0], "x"), test.x[0])
    assert np.array_equal(predict.as_mnist(255 - test.x[0], "x"), test.x[0])
    for side in (28, 50):
        with pytest.raises(UserError, match="nothing is drawn"):
            predict.as_mnist(np.full((1, side, side), 255, dtype=np.uint8), "blank")


# --- scripts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "imagenet"], "neither a known set"),
        (["--dataset", "shapes"], "needs 1×28×28"),
        (["--train-size", "0"], "whole number, 1 or more"),
        (["--train-size", "70000", "--dataset", "digits"], "digits has 1437 training images"),
        (["--train-size", "12", "--dataset", "digits"], "at least five for each of 10 classes"),
        (["--C", "-1"], "finite number above 0"),
        (["--gamma", "nan"], "finite number above 0"),
        (["--gamma", "1", "--kernel", "linear", "--dataset", "digits"], "a linear kernel has none"),
        (["--kernel", "cubic"], "invalid choice"),
        (["--kernel-size", "8", "--dataset", "digits"], "kernel_size must be odd"),
        (["--resolution", "13"], "invalid choice"),
        (["--device", "toaster"], "--device toaster"),
        (["--data-dir", "{tmp}/nowhere", "--dataset", "mnist"], "could not download"),
        (["--dataset", "{tmp}"], "needs train/<class>"),
    ],
)
def test_bad_input_to_training(flags, message, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    out = tmp_path / "out"
    assert message in fails(train, [*(flag.format(tmp=tmp_path) for flag in flags), "--out", out], out)


@pytest.mark.parametrize(
    ("module", "flags"),
    [(train, ["--train-size", 30]), (ablation, ["--train-size", 30]), (learning_curve, ["--sizes", 30, "--seeds", 0])],
)
def test_a_class_that_few_images_leave_out_is_said_before_the_run_begins(module, flags, rare_class, tmp_path, fails):
    out = tmp_path / "out"
    said = fails(module, ["--dataset", rare_class, *flags, "--out", out], out)
    assert "30 training images are too few for every class" in said


def test_an_unwritable_folder(tmp_path, fails):
    (tmp_path / "file").write_text("kept")
    flags = ["--dataset", "digits", "--out", tmp_path / "file" / "run"]
    assert "cannot write" in fails(train, flags)
    assert (tmp_path / "file").read_text() == "kept"


@needs_mnist
def test_a_truncated_idx_file(tmp_path, fails):
    shutil.copytree(REAL / "MNIST", tmp_path / "MNIST")
    path = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    out = tmp_path / "out"
    message = fails(train, ["--data-dir", tmp_path, "--out", out], out)
    assert "train-images-idx3-ubyte is damaged" in message


def test_bad_input_to_the_readers(fitted, tmp_path, fails):
    fitted.save(tmp_path / "model.npz")
    (tmp_path / "no_image.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    model, out = ["--model", tmp_path / "model.npz"], tmp_path / "out"
    cases = [
        (predict, [*model, tmp_path / "no_image.png"], "it is no image"),
        (predict, [*model, tmp_path / "absent.png"], "no such file"),
        (predict, [*model, tmp_path / "empty"], "has no image"),
        (predict, ["--model", tmp_path / "no_image.png"], "no .npz file"),
        (predict, ["--runs-dir", tmp_path], "`python mnist_svm_gabor/train.py --runs-dir "),
        (invariance, ["--runs-dir", tmp_path, "--quick"], "`python mnist_svm_gabor/train.py --quick --runs-dir "),
        (learning_curve, ["--sizes", "20", "--dataset", "digits"], "--sizes must lie between 50"),
        (learning_curve, ["--sizes", "2000", "--dataset", "digits"], "the 1437 of digits"),
        (ablation, ["--train-size", "2000", "--dataset", "digits"], "digits has 1437"),
    ]
    for module, flags, message in cases:
        assert message in fails(module, [*flags, "--out", out], out)


def test_the_learners_own_folder_trains_and_predicts(tmp_path):
    test = load_images("digits", "test")
    for i, (image, label) in enumerate(zip(test.x, test.y, strict=True)):
        if label < 3:
            folder = tmp_path / "mine" / ("test" if i % 3 == 0 else "train") / f"digit {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0]).save(folder / f"{i}.png")
    flags = ["--dataset", tmp_path / "mine", "--out", tmp_path / "run"]
    metrics = train.main([str(flag) for flag in flags])
    assert metrics["gabor"]["test_accuracy"] > 0.9
    pictures = sorted((tmp_path / "mine/test/digit 2").iterdir())
    flags = ["--model", tmp_path / "run/gabor.npz", "--out", tmp_path / "answers", *pictures[:3]]
    answers = predict.main([str(flag) for flag in flags])["predictions"]
    with pytest.raises(UserError, match="the data set has 0, 1, 2"):
        predict.main(["--model", str(tmp_path / "run/gabor.npz"), "--quick", "--out", str(tmp_path / "answers")])
    assert [answer["prediction"] for answer in answers] == ["digit 2"] * 3


def test_run_as_a_command(tmp_path):
    command = [sys.executable, "mnist_svm_gabor/train.py", "--train-size", "0", "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "train.py: error: argument --train-size: must be a whole number, 1 or more, got '0'\n"


# --- what it must reach, on the real set --------------------------------------------------------------------------


@needs_mnist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "gabor", "raw"),
    [
        ([], 0.993, 0.985),
        (["--resolution", "28", "--deskew"], 0.995, 0.985),
        (["--kernel", "linear", "--train-size", "10000"], 0.98, 0.90),
    ],
)
def test_real_data_bars(flags, gabor, raw, tmp_path):
    torch.set_num_threads(2)
    metrics = train.main([*flags, "--data-dir", str(REAL), "--out", str(tmp_path / "run")])
    assert metrics["gabor"]["test_accuracy"] >= gabor
    assert metrics["raw"]["test_accuracy"] >= raw
    assert metrics["mcnemar"]["p"] < 1e-4
    if "linear" in flags:
        assert metrics["gain_points"] >= 6
