"""How cnn_cifar trains its networks for MNIST: the distortions, the recipes, features that are computed once."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

from cnn_cifar import digit_training, zoo
from cnn_cifar.digit_training import distorted, features_of, fit, optimizer_of, probabilities
from cnn_cifar.inputs import Split, pixels
from shared_utils.cli import UserError
from shared_utils.data import load_images
from shared_utils.dropout import Dropout
from shared_utils.runs import ROOT
from shared_utils.seeding import seed_everything

HOW = {"batch_size": 10, "seed": 0, "strong": False, "amp": False}


def images(n, classes=10):
    generator = Generator().manual_seed(1)
    x = torch.randint(0, 256, (n, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return Split(x, torch.arange(n) % classes)


def spot(x, y):
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, y - 1 : y + 2, x - 1 : x + 2] = 1
    return image.expand(200, -1, -1, -1)


def middles(images):
    """Where the light of each image (N, 1, H, W) is, (N, 2): x and y."""
    axis = torch.arange(28.0)
    mass = images.sum((1, 2, 3))
    return torch.stack([(images.sum((1, 2)) @ axis) / mass, (images.sum((1, 3)) @ axis) / mass], 1)


def only(monkeypatch, **left):
    for name in ("DEGREES", "STRETCH", "SHEAR", "SHIFT"):
        monkeypatch.setattr(digit_training, name, left.get(name, 0.0))


def test_images_are_distorted_as_far_as_it_says(monkeypatch):
    generator = Generator().manual_seed(0)
    only(monkeypatch)
    x = torch.rand(3, 1, 28, 28)
    assert torch.allclose(distorted(x, generator), x, atol=1e-5)
    only(monkeypatch, SHIFT=2.0)
    moved = middles(distorted(spot(10, 18), generator)) - torch.tensor([10.0, 18.0])
    assert moved.abs().max() <= 2.01
    assert (moved.max(0).values > 1.8).all()
    assert (moved.min(0).values < -1.8).all()
    only(monkeypatch, DEGREES=12.0)
    at = middles(distorted(spot(22, 14), generator)) - 13.5  # (8.5, 0.5) off the middle
    radius, angle = at.norm(dim=1), torch.atan2(at[:, 1], at[:, 0]) - math.atan2(0.5, 8.5)
    assert torch.allclose(radius, torch.full_like(radius, math.hypot(8.5, 0.5)), atol=0.1)
    assert math.radians(11) < angle.max() < math.radians(12.5)
    assert -math.radians(12.5) < angle.min() < -math.radians(11)
    only(monkeypatch, STRETCH=0.12)
    at = middles(distorted(spot(22, 22), generator)) - 13.5
    assert 8.5 * 1.1 < at.max() < 8.5 * 1.13
    assert 8.5 / 1.13 < at.min() < 8.5 / 1.1
    assert (at[:, 0] - at[:, 1]).abs().max() > 1  # each direction by itself
    only(monkeypatch, SHEAR=0.15)
    at = middles(distorted(spot(14, 22), generator)) - 13.5
    assert 0.14 * 8.5 < (at[:, 0] - 0.5).abs().max() < 0.16 * 8.5
    assert torch.allclose(at[:, 1], torch.full((200,), 8.5), atol=0.05)


def test_the_optimizers_are_those_of_the_docstring(weights_of):
    found = {}
    for name in ("fcnn", "cnn", "vit"):
        optimizer = optimizer_of(name, zoo.build(name, 10))
        (group,) = optimizer.param_groups
        found[name] = type(optimizer).__name__, group["lr"], group["weight_decay"]
    assert found == {"fcnn": ("Adam", 1e-3, 1e-5), "cnn": ("Adam", 1e-3, 1e-5), "vit": ("AdamW", 1e-3, 0.05)}
    network = zoo.build("alexnet", 10, weights_of("alexnet"))
    (group,) = optimizer_of("alexnet", network).param_groups
    assert (group["lr"], group["weight_decay"]) == (1e-4, 0)
    assert len(group["params"]) == len(list(network.classifier.parameters()))


def trained(name="fcnn", epochs=3, data=None, **other):
    data = data or images(40)
    seed_everything(0)
    network, rates = zoo.build(name, 10), []

    def watched(*args):
        optimizer = optimizer_of(*args)
        optimizer.register_step_pre_hook(lambda made, *_: rates.append(made.param_groups[0]["lr"]))
        return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_training, "optimizer_of", watched)
        found = fit(name, network, data, data, epochs=epochs, **{**HOW, **other})
    return network, found, rates


def test_a_training_is_the_same_from_the_same_seed():
    first, second, third = trained(strong=True), trained(strong=True), trained(strong=True, seed=1)
    assert first[1].losses == second[1].losses != third[1].losses
    weights = [network.state_dict() for network, *_ in (first, second)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_rate_rises_and_falls_once():
    _, found, rates = trained(epochs=10)
    assert len(rates) == 40
    assert max(rates) == rates[3] == pytest.approx(1e-3)  # a tenth of the updates
    assert rates[:4] == sorted(rates[:4])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] < 1e-5
    assert len(found.losses) == len(found.accuracies) == 10


def test_digits_are_learned_by_heart_and_the_accuracy_is_that_of_the_images():
    digits = load_images("digits", "train", "")
    data = Split(torch.from_numpy(digits.x[:60]), torch.from_numpy(digits.y[:60]))
    network, found, _ = trained("cnn", epochs=60, data=data)
    assert found.losses[-1] < 0.5 < found.losses[0]
    right = probabilities(network, data.x, False).argmax(1) == data.y
    assert found.accuracies[-1] == pytest.approx(right.float().mean().item())
    assert found.accuracies[-1] > 0.9
    assert found.seconds > 0


def test_the_strong_recipe_smooths_the_labels_and_distorts(monkeypatch):
    strong = trained(strong=True)[1].losses[0]
    monkeypatch.setattr(digit_training, "distorted", lambda x, generator: x)
    smooth = trained(strong=True)[1].losses[0]
    assert strong != smooth
    network = zoo.build("fcnn", 10)  # a single update at which nothing is random but dropout, which is turned off
    for module in network.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
    data = images(10)
    network.train()
    logits = network(pixels(data.x))
    expected = F.cross_entropy(logits, data.y, label_smoothing=0.1).item()
    found = fit("fcnn", network, data, None, epochs=1, **{**HOW, "strong": True})
    assert found.losses == [pytest.approx(expected, rel=1e-4)]


def test_a_loss_that_is_not_finite_ends_with_one_line():
    network = zoo.build("fcnn", 10)
    with torch.no_grad():
        network[2].weight[0] = np.nan
    with pytest.raises(UserError, match=r"the loss is nan at step 4 .* rate in cnn_cifar/digit_training.py"):
        fit("fcnn", network, images(40), None, epochs=2, **HOW)


def test_frozen_features_are_computed_once(monkeypatch, weights_of):
    network = zoo.build("alexnet", 10, weights_of("alexnet"))
    network.classifier = nn.Linear(9, 10)
    before = {key: value.clone() for key, value in network.convolutions.state_dict().items()}
    asked = []
    monkeypatch.setattr(network, "features", lambda x: asked.append(len(x)) or x.flatten(1)[:, :9])
    data = images(20)
    found = fit("alexnet", network, data, data, epochs=3, **HOW)
    assert asked == [20, 20]  # of the training and of the test images
    assert len(found.accuracies) == 3
    assert all(torch.equal(before[key], value) for key, value in network.convolutions.state_dict().items())


def test_features_are_what_the_classifier_is_given(weights_of):
    network = zoo.build("alexnet", 10, weights_of("alexnet")).eval()
    data = images(2)
    with torch.no_grad():
        x = network.features(pixels(data.x))
        assert torch.allclose(features_of(network, data.x, False).float(), x, rtol=0.01, atol=1e-3)
        assert torch.allclose(network.classifier(x), network(pixels(data.x)))


@pytest.mark.slow
def test_a_cnn_reads_real_digits_after_one_epoch(real_data):
    network, _, _ = trained("cnn", epochs=1, data=real_data("train"), batch_size=64, amp=True)
    test = real_data("test")
    right = probabilities(network, test.x, True).argmax(1) == test.y
    assert right.float().mean() > 0.985


@pytest.fixture
def real_data():
    if not (ROOT / "data" / "MNIST").is_dir():
        pytest.skip("data/ holds no MNIST")

    def split(name):
        found = load_images("mnist", name, ROOT / "data")
        return Split(torch.from_numpy(found.x), torch.from_numpy(found.y))

    return split
