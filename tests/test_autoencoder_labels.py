"""ft_compare_raw_vs_ae: which labels a classifier sees, how inputs are standardised, and what counts as a win."""

import re

import numpy as np
import pytest
import torch
from scipy.stats import ttest_rel

from autoencoder import ft_compare_raw_vs_ae as compare
from autoencoder.fitting import Recipe, codes, reconstruction_errors
from autoencoder.ft_compare_raw_vs_ae import fit_classifier, label_order, paired, standardise
from autoencoder.inputs import load_pixels, pixels
from autoencoder.optimizers import AdamW
from autoencoder.pca import fit_pca
from autoencoder.trained import Trained, save_trained
from shared_utils.runs import ROOT

REAL = ROOT / "data"
needs_fashion = pytest.mark.skipif(not (REAL / "FashionMNIST/raw").is_dir(), reason="data/ holds no Fashion-MNIST")


def arguments(*flags):
    return compare.build_parser().parse_args(["--quick", "--updates", "12", "--epochs", "1", *map(str, flags)])


@pytest.fixture(scope="module")
def data():
    return load_pixels(arguments())


@pytest.fixture(scope="module")
def files(tmp_path_factory, data):
    """Checkpoints of two untrained autoencoders, with codes of 6 and of 4 numbers."""
    folder = tmp_path_factory.mktemp("ckpt")
    for name, size in (("plain", 6), ("denoising", 4)):
        recipe = Recipe((16, size))
        model = recipe.build(0, 784)
        error = reconstruction_errors(model, data.x_val).mean().item()
        save_trained(folder / f"{name}.pth", Trained(model, recipe, error), arguments())
    return folder


def given(files):
    return ["--ckpt", files / "plain.pth", "--ckpt-denoising", files / "denoising.pth"]


@pytest.fixture(scope="module")
def features(files, data):
    return compare.load_features(arguments(*given(files)), data)


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [10, 37, 200])
def test_labelled_images_are_stratified_and_each_seed_has_its_own(data, n):
    orders = [label_order(data.y_train, seed) for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert orders[0].sort().values.tolist() == list(range(len(data.y_train)))
    share = torch.bincount(data.y_train) / len(data.y_train)
    for order in orders:
        counts = torch.bincount(data.y_train[order[:n]], minlength=10)
        assert ((counts - n * share).abs() <= 1).all()
    assert set(orders[0][:n].tolist()) != set(orders[2][:n].tolist())


def seen_by_the_classifier(data, features, monkeypatch, args):
    """(classifier is a perceptron, labels) → the rows of raw pixels that each seed's classifier was given."""
    seen = {}

    def standardised(name, labelled, *others):
        if name == "raw":
            seen.setdefault(len(labelled), []).append(labelled)
        return standardise(name, labelled, *others)

    monkeypatch.setattr(compare, "standardise", standardised)
    compare.study(args, data, features, lambda **row: None)
    return seen


@torch.no_grad()
def test_fewer_labelled_images_are_part_of_more(data, features, monkeypatch):
    args = arguments("--labels", 30, 10, 120, "--seeds", 3, 5)
    seen = seen_by_the_classifier(data, features, monkeypatch, args)
    assert sorted(seen) == [10, 30, 120, len(data.y_train)]
    for given_to_mlp, given_to_regression in ((x[:2], x[2:]) for x in seen.values()):
        assert all(torch.equal(a, b) for a, b in zip(given_to_mlp, given_to_regression, strict=True))
    for seed in range(2):
        rows = [{row.numpy().tobytes() for row in seen[n][seed]} for n in sorted(seen)]
        assert rows[0] < rows[1] < rows[2] < rows[3]
    assert not torch.equal(seen[10][0], seen[10][1])


@torch.no_grad()
def test_unlabelled_images_do_not_reach_the_classifier(data, features):
    args = arguments("--labels", 40, "--seeds", 2)
    labelled = label_order(data.y_train, 2)[:40]
    hidden = torch.ones(len(data.y_train), dtype=torch.bool)
    hidden[labelled] = False

    def spoilt(x):
        return torch.where(hidden[:, None], 100 * torch.randn(x.shape), x)

    changed = {name: (spoilt(train), *rest) for name, (train, *rest) in features.items()}
    found, again = (compare.study(args, data, given, lambda **row: None)[0] for given in (features, changed))
    for kind in found:
        assert found[kind][40] == again[kind][40]
        assert found[kind][len(data.y_train)] != again[kind][len(data.y_train)]


@torch.no_grad()
def test_the_seed_is_added_to_each_of_the_seeds(data, features):
    few = {name: features[name] for name in ("raw", "codes")}
    given = [arguments("--labels", 40, "--seed", seed, "--seeds", *seeds) for seed, seeds in ((0, [3, 5]), (2, [1, 3]))]
    found, moved = (compare.study(args, data, few, lambda **row: None)[0] for args in given)
    assert found == moved


# --- inputs -------------------------------------------------------------------------------------------------------


def test_inputs_are_pixels_and_codes_of_the_same_size(data, features, files):
    assert {name: parts[0].shape[1] for name, parts in features.items()} == {
        "raw": 784, "pca": 6, "codes": 6, "denoising": 4}  # fmt: skip
    for x, *parts in zip((data.x_train, data.x_val, data.x_test), *features.values(), strict=True):
        assert torch.equal(parts[0], pixels(x))
        assert torch.equal(parts[1], fit_pca(data.x_train, 6).project(x))  # of all training images, none else
        for size, found in ((6, parts[2]), (4, parts[3])):
            assert torch.equal(found, codes(Recipe((16, size)).build(0, 784), x))


def test_inputs_are_standardised_by_the_labelled_images_alone():
    generator = torch.manual_seed(0)
    labelled, other = torch.randn(50, 3, generator=generator), torch.randn(70, 3, generator=generator) + 5
    labelled *= torch.tensor([1.0, 10, 0])
    for name, mean, deviation in (
        ("raw", labelled.numpy().mean(), labelled.numpy().std()),
        ("codes", labelled.numpy().mean(0), np.where(labelled.numpy().std(0) > 0, labelled.numpy().std(0), 1)),
    ):
        found = standardise(name, labelled, other)
        for x, standardised in zip((labelled, other), found, strict=True):
            np.testing.assert_allclose(standardised, (x.numpy() - mean) / deviation, rtol=1e-4, atol=1e-6)
        assert torch.equal(standardise(name, labelled, 100 * other)[0], found[0])


# --- classifier ---------------------------------------------------------------------------------------------------


def blobs(n, seed=0):
    """Three clouds of points in the plane, (n, 2) and labels (n,)."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, n)
    x = np.array([[0, 2], [2, -1], [-2, -1]])[y] + 0.5 * rng.standard_normal((n, 2))
    return torch.from_numpy(x).float(), torch.from_numpy(y)


@torch.no_grad()
@pytest.mark.parametrize("hidden", [[], [8]])
def test_the_classifier_learns_and_repeats_itself(hidden):
    args, (x, y), test = arguments("--updates", 200, "--lr", 0.03, "--linear-lr", 0.03), blobs(300), blobs(300, seed=1)
    model, curve = fit_classifier(x, y, 3, hidden, args, 0)
    assert model.accuracy(*test) > 0.95
    assert curve == []
    again, other = (fit_classifier(x, y, 3, hidden, args, seed)[0].predict(test[0]) for seed in (0, 1))
    assert torch.equal(model.predict(test[0]), again)
    assert not torch.equal(again, other)


@torch.no_grad()
@pytest.mark.parametrize(("n", "epochs", "updates", "expected"), [(20, 5, 30, 30), (640, 5, 30, 50), (5, 16, 1, 16)])
def test_updates_with_few_labels_and_epochs_with_many(n, epochs, updates, expected, monkeypatch):
    steps, rates, step = [], [], AdamW.step

    def counted(self):
        steps.append(1)
        rates.append(self.lr)
        step(self)

    monkeypatch.setattr(AdamW, "step", counted)
    args = arguments("--epochs", epochs, "--updates", updates, "--batch-size", 64, "--lr", 0.01)
    x, y = blobs(n)
    curve = fit_classifier(x, y, 3, [4], args, 0, val=(x, y))[1]
    assert len(steps) == expected
    assert len(curve) == expected // max(1, n // 64)
    assert max(rates) == pytest.approx(0.01, rel=0.1)
    assert rates[-1] < 1e-3


# --- what counts as a win -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-0.02, 0.0, 0.004, 0.02])
def test_a_win_lies_beyond_the_noise_of_the_seeds(shift):
    raw = [0.70, 0.74, 0.69, 0.72, 0.71]
    ours = [a + shift + noise for a, noise in zip(raw, (0.01, -0.01, 0.005, -0.004, 0.0), strict=True)]
    test = ttest_rel(ours, raw)
    low, high = test.confidence_interval(0.95)
    found = paired(ours, raw)
    assert found["difference"] - found["half_width"] == pytest.approx(low)
    assert found["difference"] + found["half_width"] == pytest.approx(high)
    assert found["difference_std"] == pytest.approx(np.std(np.subtract(ours, raw), ddof=1))
    assert found["wins"] is (None if test.pvalue > 0.05 else shift > 0)


def test_one_seed_alone_shows_nothing():
    assert paired([0.9], [0.1])["wins"] is None


def test_the_conclusion_says_where_the_codes_win():
    def at(raw, ours):
        return {name: [ours, ours + 0.01] if name == "codes" else [raw, raw + 0.01] for name in compare.NAMES}

    rows = compare.summarise({"MLP": {100: at(0.5, 0.6), 1000: at(0.7, 0.7), 5000: at(0.9, 0.8)}})
    assert compare.conclusion(rows, "MLP") == "win at 100; lose at 5,000; neither at 1,000"
    assert compare.conclusion(rows, "MLP", "pca") == "neither at 100, 1,000, 5,000"
    assert rows[0]["codes_difference"] == pytest.approx(0.1)
    assert (rows[2]["raw"], rows[2]["codes_std"]) == pytest.approx((0.905, 0.01 / 2**0.5))


# --- the script ---------------------------------------------------------------------------------------------------


def test_metrics(files, data, tmp_path):
    flags = [*given(files), "--labels", 20, "--updates", 15, "--epochs", 2, "--hidden", 8, "--out", tmp_path]
    metrics = compare.main(["--quick", *map(str, flags)])
    assert [row["labels"] for row in metrics["rows"]] == [20, len(data.y_train)]
    assert metrics["sizes"] == {"raw": 784, "pca": 6, "codes": 6, "denoising": 4}
    assert metrics["test"]["raw"]["mcnemar_p"] == 1
    for name, found in metrics["test"].items():
        assert found["interval"][0] < found["accuracy"] < found["interval"][1]
        row, other = metrics["rows"][1], metrics["rows_softmax_regression"][1]
        assert abs(found["accuracy"] - row[name]) <= row[f"{name}_std"]  # the first of two seeds
        assert row[name] != other[name]
    for name, said in metrics["conclusion"]["MLP"].items():
        assert sorted(re.findall(r"1,237|20", said)) == ["1,237", "20"], name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--labels", "20", "1238"], "asked for 1238 labelled images, there are 1237"),
        (["--labels", "0"], "1 or more"),
        (["--labels", "1"], "at least two images"),
        (["--val-size", "210"], "was trained with --val-size 200, not 210"),
        (["--ckpt", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--ckpt-denoising", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--dropout", "1"], "below 1"),
        (["--lr", "1e30"], "try a lower --lr"),
    ],
)
def test_wrong_flags_and_files(flags, message, files, fails, tmp_path):
    fast = ["--quick", *given(files), "--labels", 20, "--updates", 30, "--seeds", 0, "--out", tmp_path / "out"]
    assert message in fails(compare, [*fast, *flags], None if "--lr" in flags else tmp_path / "out")


@pytest.mark.parametrize(
    ("pixels", "dataset", "message"),
    [
        (100, "digits", "takes 100 pixels, these images have 784"),
        (784, "mnist", "trained with --dataset mnist, not digits"),
    ],
)
def test_a_checkpoint_of_other_images(pixels, dataset, message, files, fails, tmp_path):
    recipe, odd = Recipe((16, 6)), tmp_path / "odd.pth"
    save_trained(odd, Trained(recipe.build(0, pixels), recipe, 0.1), arguments("--dataset", dataset))
    for flag in ("--ckpt", "--ckpt-denoising"):
        flags = ["--quick", *given(files), flag, odd, "--out", tmp_path / "out"]
        assert message in fails(compare, flags, tmp_path / "out")


def test_a_missing_checkpoint_names_the_command(files, fails, tmp_path):
    flags = ["--quick", "--runs-dir", tmp_path]
    made_by = "`python autoencoder/ae_experiments.py --variant"
    assert f"{made_by} baseline --quick" in fails(compare, flags)
    assert f"{made_by} denoising --quick" in fails(compare, [*flags, "--ckpt", files / "plain.pth"])


@needs_fashion
@pytest.mark.slow
@torch.no_grad()
def test_raw_pixels_reach_their_bar_on_fashion():
    args = compare.build_parser().parse_args(["--data-dir", str(REAL)])
    data = load_pixels(args)
    x, x_test = standardise("raw", pixels(data.x_train), pixels(data.x_test))
    model, _ = fit_classifier(x, data.y_train, 10, args.hidden, args, seed=0)
    assert model.accuracy(x_test, data.y_test) >= 0.89
