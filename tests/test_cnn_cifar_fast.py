"""cnn_cifar's fast recipe: Muon, whitening, the training, test-time averaging; images in, networks as files."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnn_cifar import fast_cifar, fast_training, inputs
from cnn_cifar.checkpoints import load_network
from cnn_cifar.fast_net import FastNet, start_as_identity_, whiten_
from cnn_cifar.fast_training import INGREDIENTS, FastTraining, Recipe, accuracies, averaged_logits
from cnn_cifar.inputs import Split, load, load_splits, logits_of, loss_and_accuracy, pixels
from cnn_cifar.models import CIFAR10_MEAN, CIFAR10_STD, allcnn_t
from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.data import Images
from shared_utils.embedded import shapes
from shared_utils.muon import Muon

WIDTHS = (6, 8, 10)


def images(n, split="train"):
    x, y, *_ = shapes(split, n=n)
    return Split(torch.from_numpy(x), torch.from_numpy(y))


def started(train, seed=0, **changed):
    """A training with small batches of a small network that begins with the same weights whatever the seed."""
    torch.manual_seed(0)
    recipe = Recipe(**({"epochs": 2, "batch_size": 20, "widths": WIDTHS} | changed))
    return FastTraining(recipe, train, 10, seed, amp=False)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def random_network(seed=0, widths=WIDTHS):
    """A network in evaluation mode in which nothing is as it begins, and whose logits depend on the image."""
    torch.manual_seed(seed)
    network = FastNet(widths)
    for name, values in network.state_dict().items():
        if values.ndim == 4:
            nn.init.kaiming_normal_(values, nonlinearity="relu")
        elif name.startswith(("whiten", "head")):
            nn.init.normal_(values)
        elif "num_batches" not in name and "normalize" not in name:
            values.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def train():
    return images(60)


@pytest.mark.parametrize("eps", [1e-9, 0.3])
def test_whitened_outputs_are_uncorrelated_with_mean_square_one(eps, train):
    network, x = FastNet(WIDTHS), pixels(train.x)
    nn.init.ones_(network.whiten.bias)
    whiten_(network, x, eps)
    weight, bias = network.whiten.weight, network.whiten.bias
    normal = (x.double().numpy() - np.array(CIFAR10_MEAN)[:, None, None]) / np.array(CIFAR10_STD)[:, None, None]
    corners = [normal[:, c, i : i + 31, j : j + 31].ravel() for c in range(3) for i in (0, 1) for j in (0, 1)]
    patches = np.stack(corners, axis=1)  # (patches, 12)
    variances = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    outputs = patches @ weight[:12].flatten(1).double().numpy().T  # by decreasing share of ε
    expected = np.diag(variances / (variances + eps))  # ε holds back the directions that are hardly there
    np.testing.assert_allclose(outputs.T @ outputs / len(outputs), expected, rtol=0, atol=1e-4)
    assert torch.equal(weight[12:], -weight[:12])
    assert not bias.any()
    assert (weight.requires_grad, bias.requires_grad) == (False, True)


@pytest.mark.parametrize("widths", [(26, 30, 30), (6, 30, 8)])
def test_channels_pass_through_a_network_that_starts_as_the_identity(widths):
    network = FastNet(widths)
    start_as_identity_(network)
    for block in network.blocks:
        for conv in (block.conv1, block.conv2):
            x, same = torch.randn(2, conv.in_channels, 5, 7), min(conv.in_channels, conv.out_channels)
            torch.testing.assert_close(conv(x)[:, :same], x[:, :same])
            assert (conv.weight[conv.in_channels :] != 0).all()  # the others stay random


@pytest.mark.parametrize(("widths", "classes"), [(WIDTHS, 10), ((16, 8, 4), 3)])
def test_the_network_has_the_parameters_of_its_formula(widths, classes):
    network = FastNet(widths, classes)
    convolutions = sum(9 * (a * b + b * b) for a, b in pairwise([24, *widths]))
    assert len(weights(network)) == 13 * 24 + convolutions + 4 * sum(widths) + widths[2] * classes
    assert network.config == {"widths": list(widths), "num_classes": classes}
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, classes)
    scales = [block.bn1.weight for block in network.blocks] + [block.bn2.weight for block in network.blocks]
    assert not any(scale.requires_grad for scale in scales)
    with pytest.raises(ValueError, match=r"pixels from 0 to 1 as floats, got torch.uint8"):
        network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_the_network_is_its_formula_written_with_the_functional_forms():
    network, x = random_network(), torch.rand(3, 3, 32, 32)
    y = (x - torch.tensor(CIFAR10_MEAN).view(3, 1, 1)) / torch.tensor(CIFAR10_STD).view(3, 1, 1)
    y = F.gelu(F.conv2d(y, network.whiten.weight, network.whiten.bias))
    for block, side in zip(network.blocks, (15, 7, 3), strict=True):
        for conv, bn in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
            y = F.conv2d(y, conv.weight, padding=1)
            y = F.max_pool2d(y, 2) if conv is block.conv1 else y
            y = F.gelu(F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias))
        assert y.shape[2:] == (side, side)
    torch.testing.assert_close(network(x), y.amax((2, 3)) @ network.head.weight.T)


def test_weights_follow_from_the_seed_and_an_epochs_number_alone(train):
    found = []
    for seed, disturbed in ((3, False), (3, True), (4, False)):
        training = started(train, seed, without=("alternating",))  # coins are tossed in each epoch then
        training.epoch(0)
        if disturbed:
            torch.manual_seed(99)
            np.random.seed(99)
        training.epoch(1)
        found.append(weights(training.network))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("ingredient", [name for name in INGREDIENTS if name != "tta"])
def test_each_ingredient_counts(ingredient, train):
    found = []
    for without in ((), (ingredient,)):
        training = started(train, without=without)
        for epoch in range(2):
            training.epoch(epoch)
        found.append(weights(training.network))
    assert not torch.equal(*found)


@pytest.mark.parametrize("left_out", [False, True])
def test_whitening_is_set_on_the_training_images_and_not_trained(left_out, train):
    whiten = started(train, without=("whitening",) if left_out else ()).network.whiten
    expected = FastNet(WIDTHS)
    whiten_(expected, pixels(train.x))
    assert torch.allclose(whiten.weight, expected.whiten.weight) == (not left_out)
    assert whiten.weight.requires_grad == left_out
    assert whiten.bias.requires_grad


@pytest.mark.parametrize("without", [(), ("muon",), ("whitening",), ("whitening", "muon")])
def test_muon_or_sgd_trains_the_filters_and_adam_the_rest(without, train):
    training = started(train, without=without)
    main, rest = training.optimizers
    assert (type(main), type(rest)) == (torch.optim.SGD if "muon" in without else Muon, torch.optim.Adam)
    assert main.param_groups[0].get("nesterov", True)
    names = {id(p): name for name, p in training.network.named_parameters()}
    of = [[names[id(p)] for group in one.param_groups for p in group["params"]] for one in (main, rest)]
    filters = [f"blocks.{i}.conv{j}.weight" for i in range(3) for j in (1, 2)]
    assert sorted(of[0]) == filters + (["whiten.weight"] if "whitening" in without else [])
    offsets = [f"blocks.{i}.bn{j}.bias" for i in range(3) for j in (1, 2)]
    assert sorted(of[1]) == [*offsets, "head.weight", "whiten.bias"]
    before = {name: p.detach().clone() for name, p in training.network.named_parameters()}
    training.epoch(0)
    changed = {name for name, p in training.network.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {*of[0], *of[1]}


@pytest.mark.parametrize("left_out", [False, True])
def test_labels_are_smoothed_unless_left_out_and_the_loss_is_the_mean(left_out, train, monkeypatch):
    seen = []

    def watched(logits, y, label_smoothing):
        seen.append(label_smoothing)
        return logits.sum() * 0 + len(seen)

    monkeypatch.setattr(F, "cross_entropy", watched)
    assert started(train, without=("smoothing",) if left_out else ()).epoch(0) == pytest.approx((1 + 2 + 3) / 3)
    assert all((smoothing == 0) == left_out for smoothing in seen)


@pytest.mark.parametrize("alternates", [True, False])
def test_an_epoch_shows_each_image_once_and_two_both_ways(alternates, train, monkeypatch):
    batches, noise, orders, ways = [], set(), set(), []  # ways: of each epoch, which images were mirrored

    def watched(x, generator, padding):
        noise.add(generator.initial_seed())
        batches.append(x)
        return x

    monkeypatch.setattr(fast_training, "random_crop", watched)
    both = {False: train.x, True: train.x.flip(-1)}
    looks = {image.numpy().tobytes(): (i, way) for way, x in both.items() for i, image in enumerate(x)}
    for seed, epoch in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0)):
        batches.clear()
        started(train, seed, without=() if alternates else ("alternating",)).epoch(epoch)
        order, mirrored = zip(*(looks[image.numpy().tobytes()] for image in torch.cat(batches)), strict=True)
        assert sorted(order) == list(range(len(train)))
        orders.add(order)
        ways.append(np.array(mirrored)[np.argsort(order)])
    assert len(noise) == len(orders) == 5  # another order and other crops in each epoch and from each seed
    assert all(0 < (way == ways[0]).sum() < len(train) for way in ways[1 if not alternates else 4 :])
    if alternates:
        assert all(np.array_equal(ways[epoch], ways[0] ^ (epoch % 2 == 1)) for epoch in range(4))


def test_the_network_learns_from_what_perturb_makes_of_a_batch(train):
    training, given, seen = started(train), [], []

    def perturb(x, y):
        given.append((x, y))
        return 1 - x

    training.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    training.epoch(0, perturb)
    assert len(seen) == len(given) == training.per_epoch
    assert all(torch.equal(then, 1 - x) and y.shape == (20,) for then, (x, y) in zip(seen, given, strict=True))


@pytest.mark.parametrize("without", [(), ("whitening", "muon")])
def test_learning_rates_fall_in_a_straight_line_and_whitenings_sooner(without, train):
    training, updates = started(train, epochs=8, without=without), 24
    early = training.network.whiten.bias if not without else None

    def by_parameter(step):
        return {p: lr for group, lr in training.rates(step) for p in group["params"]}

    first = by_parameter(0)
    assert set(first) == {p for p in training.network.parameters() if p.requires_grad}
    assert min(first.values()) > 0
    for step in range(updates + 1):
        for p, lr in by_parameter(step).items():
            left = max(0, 1 - step / 9) if p is early else 1 - step / updates  # 9 is 3/8 of 24
            assert lr == pytest.approx(first[p] * left, abs=1e-12)
    found = []

    def watch(optimizer, *given):
        found.append({p: group["lr"] for group in optimizer.param_groups for p in group["params"]})

    for optimizer in training.optimizers:
        optimizer.register_step_pre_hook(watch)
    training.epoch(2)
    assert [found[i] | found[i + 1] for i in (0, 2, 4)] == [by_parameter(step) for step in (6, 7, 8)]


@pytest.mark.parametrize(("without", "below"), [((), 0.3), (("muon", "smoothing"), 0.2), (tuple(INGREDIENTS), 0.08)])
def test_the_training_learns(without, below):
    train = images(100)
    training = started(train, epochs=10, without=without)
    losses = [training.epoch(epoch) for epoch in range(10)]
    assert losses[-1] < losses[0] - below
    assert loss_and_accuracy(training.network, train)[1] > 0.18


# row, column and weight of windows of the image padded by a pixel
PLACES = {"mirrored": [(1, 1, 1.0)], "mirrored and shifted": [(1, 1, 0.5), (0, 0, 0.25), (2, 2, 0.25)]}


@pytest.mark.parametrize("way", PLACES)
def test_averaged_logits_are_those_of_a_loop_over_images(way):
    network, x = random_network(), images(5, "test").x
    expected = torch.zeros(5, 10)
    for mean, image in zip(expected, x.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect")
        for i, j, weight in PLACES[way]:
            window = padded[:, i : i + 32, j : j + 32]
            for copy in (window, window[..., ::-1].copy()):
                mean += weight / 2 * network(torch.from_numpy(copy[None]) / 255)[0].detach()
    found, of_mirrors = averaged_logits(network, x), averaged_logits(network, x.flip(-1))
    assert torch.equal(found["plain"], logits_of(network, x))
    torch.testing.assert_close(found[way], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_mirrors["mirrored"], found["mirrored"], rtol=1e-4, atol=1e-4)


def test_accuracies_are_the_part_right_in_each_way():
    network, test = random_network(), images(40, "test")
    ways = averaged_logits(network, test.x)
    labels = ways["mirrored and shifted"].argmax(1)
    labels[:25] = (labels[:25] + 1) % 10
    found = accuracies(network, Split(test.x, labels), amp=False)
    assert found == pytest.approx({name: (way.argmax(1) == labels).numpy().mean() for name, way in ways.items()})
    assert found["mirrored and shifted"] == pytest.approx(15 / 40)


def test_load_holds_out_validation_images_that_are_not_trained_on(monkeypatch):
    drawn = {split: Images(*shapes(split, n=100)) for split in ("train", "test")}
    monkeypatch.setattr(inputs, "load_images", lambda name, split, root, shape: drawn[split])
    cpu, parse = torch.device("cpu"), fast_cifar.build_parser().parse_args

    def asked(batch_size, val_size):
        return parse(["--dataset", "shapes", "--batch-size", str(batch_size), "--val-size", str(val_size)])

    whole, held = (load(asked(70, size), cpu) for size in (0, 30))
    assert whole.val is None
    for found, expected in ((whole.train, drawn["train"]), (held.test, drawn["test"])):
        np.testing.assert_array_equal(found.x, expected.x)
        np.testing.assert_array_equal(found.y, expected.y)
    assert (len(held.train), len(held.val), held.train.x.dtype) == (70, 30, torch.uint8)
    label = {image.tobytes(): y for image, y in zip(drawn["train"].x, drawn["train"].y.tolist(), strict=True)}
    a, b = ({x.numpy().tobytes(): y for x, y in zip(s.x, s.y.tolist(), strict=True)} for s in (held.train, held.val))
    assert not set(a) & set(b)
    assert a | b == label
    for size, message in ((30, "--batch-size 71: there are 70 images"), (100, "cannot hold out 100 of 100")):
        with pytest.raises(UserError, match=message):
            load(asked(71, size), cpu)
    few = load_splits("shapes", "data", cpu, train_size=40)  # without flags there is no batch to compare with
    assert (len(few.train), few.val, len(few.test)) == (40, None, 100)


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_of_evaluation_and_the_mode_is_put_back(training, train, monkeypatch):
    torch.manual_seed(0)
    network, x = allcnn_t(4, 6, 5), train.x.float() / 255  # with dropout and BatchNorm
    assert torch.equal(pixels(train.x), x)
    assert pixels(train.x).is_contiguous(memory_format=torch.channels_last)
    network(x)  # statistics of its own
    expected = network.eval()(x).detach()
    network.train(training)
    before = [value.clone() for value in network.state_dict().values()]
    for together in (inputs.EVALUATED_TOGETHER, 7, 1):
        monkeypatch.setattr(inputs, "EVALUATED_TOGETHER", together)
        found = logits_of(network, train.x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert network.training is training
    assert all(map(torch.equal, before, network.state_dict().values()))
    half = logits_of(network, train.x, amp=True)  # float32 as well
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.05)
    assert not torch.equal(half, found)


def test_loss_and_accuracy_by_hand(train):
    network = random_network(1)
    z = logits_of(network, train.x).double().numpy()
    y = np.where(np.arange(60) < 24, z.argmax(1), z.argmin(1))
    loss, accuracy = loss_and_accuracy(network, Split(train.x, torch.from_numpy(y)))
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert accuracy == pytest.approx(24 / 60)
    assert loss == pytest.approx(-np.log(p[np.arange(60), y]).mean(), rel=1e-5)


@pytest.mark.parametrize("name", ["allcnn_t", "fast_net"])
def test_a_stored_network_comes_back(name, train, tmp_path):
    network = allcnn_t(3, 5, 4) if name == "allcnn_t" else random_network(widths=(4, 5, 7))
    network.train()(pixels(train.x))
    path, about = tmp_path / "net.pth", {"classes": list("abcd"), "title": "a title"}
    checkpoint.save(path, model=network.state_dict(), config={"network": name, **network.config}, **about)
    found, state = load_network(path)
    assert (type(found), found.config, found.training) == (type(network), network.config, False)  # widths of the file
    assert (state["classes"], state["title"]) == (about["classes"], about["title"])
    assert torch.equal(found(pixels(train.x)), network.eval()(pixels(train.x)))


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    for state in ({"config": {"network": "vae"}, "model": {}}, {"model": {}}, {"config": {"network": "fast_net"}}):
        checkpoint.save(path, **state)
        with pytest.raises(UserError, match=r"other\.pth holds no network of cnn_cifar \(allcnn_t, fast_net, resnet\)"):
            load_network(path)
