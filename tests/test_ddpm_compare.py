"""ddpm's comparison with the VAE: the same data, the same measure for both, and what is missing."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from ddpm import compare_vae, features
from ddpm.evaluate import distances
from ddpm.inputs import load
from shared_utils.data import load_images
from vae.inputs import binary_vectors

GIVEN = ["--dataset", "digits", "--device", "cpu", "--val-size", "300", "--epochs", "1"]


def args_of(*flags):
    return compare_vae.build_parser().parse_args([*GIVEN, *(str(flag) for flag in flags)])


def write_runs(top, n=40):
    """What the two experiments leave behind, made up but for the images, which are real ones with noise."""
    rng, test = np.random.default_rng(0), load_images("digits", "test")
    x = test.x[rng.permutation(len(test))[:n]]
    small = compare_vae.coarse(x)[:, 0]
    flipped = np.where(rng.random(small.shape) < 0.2, 255 - small, small).astype(np.uint8)
    files = {
        "vae/train": {"z_dim": 8, "training_seconds": 10.0, "parameters": 5000, "train_images": 900},
        "vae/sample": {"z_dim": 8, "generation_seconds": 0.02, "samples": 40},
        "vae/evaluate": {"z_dim": 8, "bits_per_pixel": 0.25},
        "ddpm/train_ddpm": {"training_seconds": 100.0, "parameters": 70_000, "train_images": 800},
        "ddpm/sampling": {"steps": 20, "seconds_per_image": 0.004},
        "ddpm/evaluate": {"bits_per_dimension": 2.5, "model": "m"},
    }
    for name, metrics in files.items():
        (top / name).mkdir(parents=True)
        (top / name / "metrics.json").write_text(json.dumps({**metrics, "run": {"dataset": "digits"}}))
    (top / "vae/train/history.csv").write_text("step,val_reconstruction,val_kl\n1,-30,5\n2,-27,6\n3,-26,8\n4,-22,8\n")
    (top / "ddpm/train_ddpm/history.csv").write_text("epoch,val_loss\n1,0.5\n")
    np.savez(top / "vae/sample/samples.npz", images=flipped, draws=small)
    np.savez(top / "ddpm/sampling/samples.npz", images=x[:, 0], labels=np.full(n, -1), model="m")
    return x, small[:, None], flipped[:, None]


@pytest.fixture
def top(tmp_path):
    write_runs(tmp_path)
    return tmp_path


def test_the_images_are_made_as_the_autoencoders_data():
    images = load_images("digits", "test")
    assert np.array_equal(compare_vae.coarse(images.x).reshape(len(images), -1), 255 * binary_vectors(images))


def test_how_often_and_how_far_a_loss_rose():
    assert compare_vae.steadiness(np.array([4.0, 2.0, 3.0, 3.0, 3.3])) == (2, 4, pytest.approx(0.5))
    assert compare_vae.steadiness(np.array([-4.0, -3.0])) == (1, 1, pytest.approx(0.25))
    assert compare_vae.steadiness(np.array([2.0, 1.0])) == (0, 1, 0)
    assert compare_vae.steadiness(np.array([2.0])) == (0, 0, 0)


def test_all_are_measured_in_the_same_way(tmp_path):
    x, small, flipped = write_runs(tmp_path)
    metrics = compare_vae.main([*GIVEN, "--runs-dir", str(tmp_path), "--n", "30"])
    data = load(args_of())
    train = replace(data.train, x=compare_vae.coarse(data.train.x))
    classifier = features.trained(train, 10, 1, 0, torch.device("cpu"))
    real, test = compare_vae.coarse(data.val.x)[:30], compare_vae.coarse(data.test.x)
    right = (features.seen(classifier, test)[1].argmax(1) == data.test.y).mean()
    assert metrics["accuracy"] == pytest.approx(right, abs=0.01)
    known = {"real": features.seen(classifier, real)[0], "test": features.seen(classifier, test)[0]}
    for name, images in (("vae", flipped), ("vae_drawn", small), ("diffusion", compare_vae.coarse(x))):
        found = distances({"samples": features.seen(classifier, images[:30])[0], **known})
        assert metrics[f"frechet_of_{name}"] == pytest.approx(found["frechet_of_samples"], rel=1e-3)
        assert metrics["floor"] == pytest.approx(found["frechet_of_real"], rel=1e-3)
    assert metrics["frechet_of_vae_drawn"] == pytest.approx(metrics["frechet_of_diffusion"])  # the same images
    assert metrics["diffusion_against_vae"] == metrics["frechet_of_diffusion"] / metrics["frechet_of_vae"] < 1
    assert metrics["images"] == 30
    rows = {row["measured"]: (row["VAE"], row["diffusion"]) for row in metrics["table"]}
    assert rows["latent space"] == ("8 numbers", "784 numbers, noise as large as the image")
    assert rows["generation"] == ("the decoder, once", "the network, 20 times")
    # The VAE's loss is its KL less its reconstruction: 35, 33, 34, 30.
    assert rows["stability: the held-out loss"] == (
        "rose at 1 of 3 looks, by 3.0% at most",
        "rose at 0 of 0 looks, by 0.0% at most",
    )
    assert rows["speed: 1,000 images"] == ("0.5000 s", "4.0 s")
    assert (tmp_path / "ddpm" / "compare_vae" / "side_by_side.png").exists()


def test_the_table_and_the_title_tell_each_its_own_numbers():
    about = {
        compare_vae.VAE: [
            {"z_dim": 8, "training_seconds": 10.0, "parameters": 5000, "train_images": 900},
            {"generation_seconds": 0.02, "samples": 40},
            {"bits_per_pixel": 0.25},
        ],
        compare_vae.DIFFUSION: [
            {"training_seconds": 100.0, "parameters": 70_000, "train_images": 800},
            {"steps": 20, "seconds_per_image": 0.004},
            {"bits_per_dimension": 2.5},
        ],
    }
    kinds = (compare_vae.VAE, compare_vae.DRAWN, compare_vae.DIFFUSION)
    quality = {
        name: {"frechet_of_samples": at, "precision_of_samples": at / 10, "recall_of_samples": at / 20}
        | {"frechet_of_real": 0.5, "precision_of_real": 0.9, "recall_of_real": 0.8}
        for name, at in zip(kinds, (4.0, 6.0, 1.0), strict=True)
    }
    stability = {compare_vae.VAE: (3, 9, 0.25), compare_vae.DIFFUSION: (1, 4, 0.5)}
    data = Namespace(test=Namespace(x=np.zeros((2, 1, 28, 28))))
    table = compare_vae.table(about, quality, stability, data)
    rows = {row["measured"]: (row["VAE"], row["diffusion"]) for row in table}
    assert rows["quality: Fréchet distance (real images 0.50)"] == ("4.00; pixels drawn 6.00", "1.00")
    assert rows["quality: precision (real images 90.0%)"] == ("40.0%; pixels drawn 60.0%", "10.0%")
    assert rows["quality: recall (real images 80.0%)"] == ("20.0%; pixels drawn 30.0%", "5.0%")
    assert rows["stability: the held-out loss"] == (
        "rose at 3 of 9 looks, by 25.0% at most",
        "rose at 1 of 4 looks, by 50.0% at most",
    )
    assert rows["likelihood, of different images"] == (
        "0.250 bits at most for a pixel of 2 shades",
        "2.50 bits at most for one of 256",
    )
    assert rows["speed: training"] == ("10 s, 5,000 parameters, 900 images", "100 s, 70,000, 800")
    small, found = np.zeros((64, 1, 14, 14), np.uint8), {name: quality[name]["frechet_of_samples"] for name in kinds}
    images = {"real": small, **dict.fromkeys(kinds, small)}
    figure = compare_vae.draw(images, np.zeros((64, 1, 28, 28), np.uint8), found, 0.5, "x")
    assert figure.get_suptitle().endswith("the diffusion's Fréchet distance to test images is 0.25 of the VAE's")
    told = [ax.get_title().split("\n")[1] for ax in figure.axes]
    assert told == ["as many others 0.50", "4.00", "6.00", "1.00", "(not compared)"]


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("vae/sample/samples.npz", "`python vae/sample.py"),
        ("vae/train/metrics.json", "`python vae/train.py"),
        ("vae/train/history.csv", "`python vae/train.py"),
        ("ddpm/sampling/samples.npz", "`python ddpm/sampling.py"),
        ("ddpm/evaluate/metrics.json", "`python ddpm/evaluate.py"),
    ],
)
def test_what_is_missing_is_named_with_what_makes_it(top, fails, missing, said):
    (top / missing).unlink()
    assert said in fails(compare_vae, [*GIVEN, "--runs-dir", top], top / "ddpm" / "compare_vae")


def test_other_images_get_one_line(top, fails):
    out = top / "ddpm" / "compare_vae"
    path, given = top / "vae" / "train" / "metrics.json", [*GIVEN, "--runs-dir", top]
    before = path.read_text()
    path.write_text(before.replace("digits", "fashion"))
    assert "--dataset digits: the VAE was trained on fashion" in fails(compare_vae, given, out)
    path.write_text(before.replace("z_dim", "zdim"))
    assert "lacks z_dim: run `python vae/train.py`" in fails(compare_vae, given, out)
    path.write_text(before.replace('"z_dim": 8', '"z_dim": 2'))
    assert "different numbers of latents (train: 2, sample: 8, evaluate: 8)" in fails(compare_vae, given, out)
    path.write_text(before)
    assert "--n 9: a distance needs 10" in fails(compare_vae, [*given, "--n", 9], out)
    np.savez(top / "ddpm/sampling/samples.npz", images=np.zeros((40, 28, 28), np.uint8), model="other")
    assert "another model than evaluate.py measured" in fails(compare_vae, given, out)
    np.savez(top / "ddpm/sampling/samples.npz", images=np.zeros((40, 32, 32), np.uint8), model="m")
    assert "not 10 or more images of 28×28" in fails(compare_vae, given, out)
    np.savez(top / "vae/sample/samples.npz", images=np.zeros((9, 14, 14), np.uint8), draws=np.zeros((9, 14, 14)))
    assert "not 10 or more images of 14×14" in fails(compare_vae, given, out)
