"""cnn_cifar's comparison of networks on MNIST, and how many images they need."""

import urllib.error

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.metrics import f1_score
from torch import nn

from cnn_cifar import compare_mnist_models, data_efficiency
from cnn_cifar.data_efficiency import ARMS, epochs_for, network_of
from shared_utils.checkpoint import load_arrays
from shared_utils.data import load_images
from shared_utils.runs import read_json
from shared_utils.stats import mcnemar, wilson_interval

COMPARE = ["--models", "fcnn", "cnn", "--seeds", 3, 5, "--epochs", 2, "--batch-size", 20, "--device", "cpu"]
EFFICIENCY = ["--sizes", 40, 20, "--seeds", 3, 5, "--epochs", 1, "--least-updates", 3, "--batch-size", 16]
EFFICIENCY += ["--device", "cpu"]
FLAGS = {compare_mnist_models: COMPARE, data_efficiency: EFFICIENCY}


@pytest.fixture(autouse=True, scope="module")
def small_networks():
    """The study of few images trains its arms on small networks; `network_of` below is the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_efficiency, "network_of", lambda arm, n: nn.Sequential(nn.Flatten(), nn.Linear(784, n)))
        yield


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of 60 digits to learn from and 40 for the test."""
    top = tmp_path_factory.mktemp("digits")
    for split, n in (("train", 60), ("test", 40)):
        found = load_images("digits", split, "")
        for i in range(n):
            path = top / split / str(found.y[i]) / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(found.x[i, 0]).save(path)
    return top


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    """A finished run of each script."""
    top = tmp_path_factory.mktemp("runs")
    for module in FLAGS:
        ran(module, "--dataset", digits, "--out", top / named(module))
    return {module: top / named(module) for module in FLAGS}


def named(module):
    return module.__name__.rpartition(".")[2]


def ran(module, *flags):
    return module.main([str(flag) for flag in (*FLAGS[module], *flags)])


def labels(folder):
    """Of the test images, in the order in which they are loaded."""
    return load_images(str(folder), "test", "").y


def without_times(metrics):
    """What is the same for each run of a seed."""
    if isinstance(metrics, dict):
        return {key: without_times(value) for key, value in metrics.items() if "second" not in key and key != "run"}
    return [without_times(value) for value in metrics] if isinstance(metrics, list) else metrics


@pytest.mark.parametrize("module", FLAGS, ids=named)
def test_the_seed_is_added_to_each_of_the_seeds(module, folders, digits, tmp_path):
    metrics = ran(module, "--dataset", digits, "--out", tmp_path, "--seed", 2, "--seeds", 1, 3)  # those above: 3 and 5
    whole = read_json(folders[module] / "metrics.json")
    assert (metrics.pop("seeds"), whole.pop("seeds")) == ([1, 3], [3, 5])
    assert without_times(metrics) == without_times(whole)


# --- the comparison -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["plain", "strong"])
def test_the_recipe_is_the_one_that_was_asked_for(recipe, digits, tmp_path, monkeypatch):
    fit, strong = compare_mnist_models.fit, []
    monkeypatch.setattr(
        compare_mnist_models, "fit", lambda *given, **how: strong.append(how["strong"]) or fit(*given, **how)
    )
    ran(compare_mnist_models, "--dataset", digits, "--out", tmp_path, "--models", "fcnn", "--recipe", recipe)
    assert strong == 2 * [recipe == "strong"]  # two seeds


def test_the_rows_are_made_of_the_trainings(folders, digits):
    folder, y = folders[compare_mnist_models], labels(digits)
    metrics = read_json(folder / "metrics.json")
    assert [row["model"] for row in metrics["models"]] == ["fcnn", "cnn"]
    for row in metrics["models"]:
        found = [load_arrays(folder / f"{row['model']}_{seed}.npz")["probabilities"] for seed in (3, 5)]
        chosen = [one.argmax(1) for one in found]
        assert row["accuracies"] == [np.mean(one == y) for one in chosen]
        assert row["accuracy"] == pytest.approx(np.mean(row["accuracies"]))
        assert (row["low"], row["high"]) == wilson_interval(int((chosen[0] == y).sum()), len(y))
        assert row["f1"] == pytest.approx(np.mean([f1_score(y, one, average="macro") for one in chosen]))
        losses = [-np.log(one[np.arange(len(y)), y]).mean() for one in found]
        assert row["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert row["ensemble_accuracy"] == np.mean(np.mean(found, axis=0).argmax(1) == y)
        assert metrics["by_model"][row["model"]] == row
    (pair,) = metrics["pairs"]
    right = [load_arrays(folder / f"{name}_3.npz")["probabilities"].argmax(1) == y for name in ("fcnn", "cnn")]
    assert (pair["only_a_right"], pair["only_b_right"], pair["p"]) == mcnemar(*right)
    table = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 4
    assert table[2].startswith(f"| FCNN | {metrics['models'][0]['accuracy']:.2%} |")


def test_the_last_curve_point_is_the_accuracy(folders, digits):
    for path in folders[compare_mnist_models].glob("*.npz"):
        found = load_arrays(path)
        assert len(found["losses"]) == len(found["accuracies"]) == 2
        assert found["accuracies"][-1] == np.mean(found["probabilities"].argmax(1) == labels(digits))
        assert found["probabilities"].sum(1) == pytest.approx(np.ones(40), abs=1e-5)


@pytest.mark.parametrize("module", FLAGS, ids=named)
def test_a_stopped_study_goes_on_with_what_is_missing(module, folders, digits, tmp_path, monkeypatch):
    fit, calls = module.fit, []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(*args, **options)

    monkeypatch.setattr(module, "fit", counted)
    flags = ("--dataset", digits, "--out", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        ran(module, *flags)
    ran(module, *flags, "--resume")
    whole = len(list(folders[module].glob("*.npz")))
    assert len(calls) == whole + 1
    first, second = (read_json(folder / "metrics.json") for folder in (folders[module], tmp_path))
    assert without_times(first) == without_times(second)


def test_a_new_run_does_not_take_an_old_ones_trainings(digits, tmp_path):
    flags = ("--dataset", digits, "--out", tmp_path, "--models", "fcnn", "--seeds", 3)
    first = ran(compare_mnist_models, *flags)
    second = ran(compare_mnist_models, *flags, "--epochs", 1)
    assert first["models"][0]["loss"] != second["models"][0]["loss"]


@pytest.mark.parametrize("module", FLAGS, ids=named)
def test_a_resumed_run_takes_nothing_of_a_run_before_it(module, digits, folders, tmp_path, monkeypatch):
    """A finished run with other flags; another in its folder, stopped at once, and resumed."""
    flags = ("--dataset", digits, "--out", tmp_path)
    ran(module, *flags, "--batch-size", 8)
    with monkeypatch.context() as patch:
        patch.setattr(module, "fit", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ran(module, *flags)
    assert without_times(ran(module, *flags, "--resume")) == without_times(read_json(folders[module] / "metrics.json"))


def test_a_class_without_a_training_image_is_no_obstacle(digits, tmp_path):
    ran(compare_mnist_models, "--dataset", digits, "--out", tmp_path, "--val-size", 51, "--batch-size", 9)
    assert (tmp_path / "sample_images.png").exists()


def test_networks_with_imagenets_weights_are_compared(digits, tmp_path, weights_of):
    """The whole path, with weights of the right shapes under torchvision's own file name."""
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    url = torchvision.models.AlexNet_Weights.IMAGENET1K_V1.url
    torch.save(weights_of("alexnet"), cache / url.rpartition("/")[2])
    flags = ["--models", "alexnet", "--pretrained", "--weights-dir", cache, "--torchvision-epochs", 1, "--seeds", 3]
    metrics = ran(compare_mnist_models, *flags, "--dataset", digits, "--out", tmp_path / "out")
    (row,) = metrics["models"]
    assert row["label"] == "AlexNet, ImageNet's, frozen"
    assert row["ensemble_accuracy"] is None
    assert len(load_arrays(tmp_path / "out" / "alexnet_3.npz")["losses"]) == 1
    state = torch.load(tmp_path / "out" / "alexnet_3.pth", weights_only=True)["model"]
    given = weights_of("alexnet")
    assert torch.equal(state["convolutions.0.0.weight"], given["features.0.weight"])
    assert state["classifier.6.weight"].shape == (10, 4096)


def test_a_comparison_that_cannot_be_made_gets_one_line(digits, tmp_path, fails, monkeypatch, weights_of):
    out = tmp_path / "out"
    flags = [*COMPARE, "--dataset", digits, "--out", out]
    said = fails(compare_mnist_models, [*flags, "--models", "cnn", "resnet"], out)
    assert "--models resnet: unknown; there are fcnn, cnn, deep_cnn, slim_cnn, vit, vgg16, alexnet" in said
    assert "--models cnn cnn: each once" in fails(compare_mnist_models, [*flags, "--models", "cnn", "cnn"], out)
    assert "different seeds, 1 or more, got 1 1" in fails(compare_mnist_models, [*flags, "--seeds", 1, 1], out)
    assert "--pretrained: for vgg16 and alexnet" in fails(compare_mnist_models, [*flags, "--pretrained"], out)
    said = fails(compare_mnist_models, [*flags, "--batch-size", 61], out)
    assert "--batch-size 61: there are 60 images to train on" in said
    assert "28" in fails(compare_mnist_models, [*flags, "--dataset", "shapes"], out)
    assert "--batch-size 1: BatchNorm" in fails(compare_mnist_models, [*flags, "--batch-size", 1], out)

    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    pretrained = [*flags, "--models", "vgg16", "--pretrained", "--weights-dir", tmp_path]
    said = fails(compare_mnist_models, pretrained, out)
    missing = f"vgg16-397923af.pth is not in {tmp_path} and could not be downloaded from https://download.pytorch.org"
    assert missing in said
    assert "leave --pretrained out" in said
    (tmp_path / "vgg16-397923af.pth").write_text("weights")
    assert "is damaged or no file of weights" in fails(compare_mnist_models, pretrained, out)
    torch.save(weights_of("alexnet"), tmp_path / "vgg16-397923af.pth")
    assert "these are no weights of VGG16" in fails(compare_mnist_models, pretrained, out)


# --- how many images ----------------------------------------------------------------------------------------------


def test_the_study_is_made_of_its_trainings(folders, digits):
    folder, y = folders[data_efficiency], labels(digits)
    metrics = read_json(folder / "metrics.json")
    assert [row["images"] for row in metrics["sizes"]] == [20, 40]
    right = {
        (arm, size): [load_arrays(path)["chosen"] == y for path in sorted(folder.glob(f"{stem}_{size}_*.npz"))]
        for size in (20, 40)
        for arm, stem in zip(
            ARMS, ("cnn", "deep_cnn", "vit", "cnn_distorted", "vit_distorted", "vit_conv_stem"), strict=True
        )
    }
    for row in metrics["rows"]:
        mine = [one.mean() for one in right[row["arm"], row["images"]]]
        assert row["accuracies"] == mine
        assert row["accuracy"] == pytest.approx(np.mean(mine))
    for pair in metrics["pairs"]:
        a, b = (right[pair[side], pair["images"]] for side in "ab")
        assert pair["gain"] == pytest.approx(
            np.mean([one.mean() - other.mean() for one, other in zip(a, b, strict=True)])
        )
        assert (pair["only_a_right"], pair["only_b_right"], pair["p"]) == mcnemar(a[0], b[0])


def test_one_vit_gets_its_patches_from_convolutions():
    kinds = {arm: type(getattr(network_of(arm, 10), "stem", None)).__name__ for arm in ARMS}
    assert kinds["ViT"] == kinds["ViT, distorted"] == "Conv2d"
    assert kinds["ViT, conv stem"] == "Sequential"


def test_every_size_gets_enough_updates():
    args = data_efficiency.build_parser().parse_args(["--least-updates", "400", "--epochs", "2"])
    assert epochs_for(100, args) == 400
    assert epochs_for(1000, args) == 27  # 15 updates each
    assert epochs_for(60000, args) == 2
    assert epochs_for(30, args) == 400  # fewer images than a batch


def test_the_arms_learn_from_the_same_images_and_larger_sizes_contain_smaller(digits, tmp_path, monkeypatch):
    fit, given, strong = data_efficiency.fit, {}, []

    def seen(name, network, train, test, **how):
        assert test is None  # read once, at the end
        given.setdefault((len(train), how["seed"]), []).append(train.x)
        strong.append(how["strong"])
        return fit(name, network, train, test, **{**how, "epochs": 1})

    monkeypatch.setattr(data_efficiency, "fit", seen)
    ran(data_efficiency, "--dataset", digits, "--out", tmp_path)
    assert set(given) == {(20, 3), (20, 5), (40, 3), (40, 5)}
    for images in given.values():
        assert len(images) == len(ARMS)
        assert all(torch.equal(images[0], other) for other in images)
    assert strong == 2 * [of_arm for _, of_arm in ARMS.values() for _ in (3, 5)]  # --seeds
    assert torch.equal(given[40, 3][0][:20], given[20, 3][0])
    assert not torch.equal(given[20, 3][0], given[20, 5][0])


def test_a_study_that_cannot_be_made_gets_one_line(digits, tmp_path, fails):
    out = tmp_path / "out"
    flags = [*EFFICIENCY, "--dataset", digits, "--out", out]
    for wrong, said in (
        (["--seeds", 1], "different seeds, 2 or more"),
        (["--seeds", 1, 1], "different seeds, 2 or more"),
        (["--sizes", 61], "--sizes 61: there are 60 images to train on"),
        (["--sizes", 1], "--sizes: must be a whole number, 2 or more"),
        (["--batch-size", 1], "--batch-size: must be a whole number, 2 or more"),
        (["--dataset", "shapes"], "28"),
    ):
        assert said in fails(data_efficiency, [*flags, *wrong], out)
