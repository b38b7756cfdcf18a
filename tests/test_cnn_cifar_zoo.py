"""cnn_cifar's networks for MNIST: the ViT against PyTorch's own layers, the zoo, and how both are trained."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Generator, nn

from cnn_cifar import digit_training, vit, zoo
from cnn_cifar.digit_training import distorted, features_of, fit, optimizer_of, probabilities
from cnn_cifar.inputs import Split, pixels, resized
from cnn_cifar.vit import Attention, Block, ViT, position_similarity, rollout
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


# --- the ViT ------------------------------------------------------------------------------------------------------


def test_attention_is_pytorchs():
    torch.manual_seed(0)
    ours, theirs = Attention(24, 3).double(), nn.MultiheadAttention(24, 3, batch_first=True).double()
    theirs.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight,
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight,
            "out_proj.bias": ours.out.bias,
        }
    )
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    expected, weights = theirs(x, x, x, average_attn_weights=False)
    assert torch.allclose(ours(x), expected, atol=1e-12)
    assert torch.allclose(ours.weights_and_values(x)[0], weights, atol=1e-12)


def test_a_block_is_pytorchs_encoder_layer():
    torch.manual_seed(0)
    ours = Block(24, 3, 4, 0.1).double().eval()
    theirs = nn.TransformerEncoderLayer(24, 3, 96, 0.1, "gelu", batch_first=True, norm_first=True).double().eval()
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj.": "attention.out."}
    names |= {"linear1.": "up.", "linear2.": "down.", "norm1.": "norm1.", "norm2.": "norm2."}
    state = ours.state_dict()
    theirs.load_state_dict({a + end: state[b + end] for a, b in names.items() for end in ("weight", "bias")})
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-12)


def test_dropout_is_in_every_part_of_a_block_in_training_alone():
    torch.manual_seed(0)
    network = ViT(dim=16, depth=1, heads=2)
    calls = []
    for module in network.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(2, 1, 28, 28)
    assert not torch.equal(network(x), network(x))
    assert len(calls) == 2 * (1 + 3)  # the tokens; after attention, the hidden layer and the layer out
    network.eval()
    assert torch.equal(network(x), network(x))


def test_the_vit_has_the_parameters_of_the_formula():
    d, depth, tokens = 128, 6, 50
    block = 4 * d + 3 * d * d + 3 * d + d * d + d + 2 * 4 * d * d + 4 * d + d
    expected = 16 * d + d + d + tokens * d + depth * block + 2 * d + 10 * d + 10
    assert sum(p.numel() for p in ViT().parameters()) == expected == 1199882


def test_the_patches_are_squares_read_row_by_row():
    torch.manual_seed(0)
    network = ViT(dim=16, depth=1, heads=2).eval()
    x = torch.rand(2, 1, 28, 28)
    normalized = (x - 0.1307) / 0.3081
    weight, bias = network.stem.weight.flatten(1), network.stem.bias
    for patch in (0, 9, 47):
        row, column = divmod(patch, 7)
        square = normalized[:, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        expected = square @ weight.T + bias + network.positions[0, patch + 1]
        assert torch.allclose(network.tokens(x)[:, patch + 1], expected, atol=1e-5)
    assert torch.allclose(network.tokens(x)[:, 0], (network.class_token + network.positions[:, :1])[0].expand(2, -1))


def test_without_positions_the_order_of_the_patches_does_not_matter():
    torch.manual_seed(0)
    network = ViT(dim=16, depth=2, heads=2).eval()
    x = torch.rand(1, 1, 28, 28)
    shuffled = x.unflatten(2, (7, 4)).flip(2).flatten(2, 3)  # the rows of patches from below
    assert not torch.allclose(network(x), network(shuffled), atol=1e-4)
    with torch.no_grad():
        network.positions[:, 1:] = 0.3
    assert torch.allclose(network(x), network(shuffled), atol=1e-5)


@pytest.mark.parametrize("stem", vit.STEMS)
def test_every_part_of_the_vit_learns(stem):
    torch.manual_seed(0)
    network = ViT(dim=16, depth=2, heads=2, stem=stem)
    F.cross_entropy(network(torch.rand(4, 1, 28, 28)), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_what_no_vit_can_be_made_of_is_refused():
    for wrong in ({"size": 30}, {"heads": 3}, {"stem": "linear"}, {"stem": "conv", "patch": 7}):
        with pytest.raises(UserError, match="a ViT of"):
            ViT(**wrong)
    with pytest.raises(UserError, match="divide them by 255"):
        ViT(dim=16, depth=1, heads=2)(torch.zeros(1, 1, 28, 28, dtype=torch.uint8))


def test_the_attention_weights_are_those_that_the_network_uses():
    torch.manual_seed(0)
    network = ViT(dim=16, depth=3, heads=2).eval()
    x = torch.rand(2, 1, 28, 28)
    weights = network.attention_weights(x)
    assert weights.shape == (3, 2, 2, 50, 50)
    assert torch.allclose(weights.sum(-1), torch.ones(3, 2, 2, 50), atol=1e-5)
    second = network.blocks[1]
    tokens = network.blocks[0](network.tokens(x))
    assert torch.allclose(network.head(network.norm(network.blocks[2](second(tokens))))[:, 0], network(x), atol=1e-6)
    assert torch.allclose(weights[1], second.attention.weights_and_values(second.norm1(tokens))[0], atol=1e-6)


def test_rollout_by_hand():
    torch.manual_seed(0)
    weights = torch.rand(2, 3, 4, 5, 5).softmax(-1)
    for image in range(3):
        first, second = (0.5 * weights[i, image].mean(0) + 0.5 * torch.eye(5) for i in range(2))
        row = (second @ first)[0, 1:]  # the class token's end looks through the last block first
        assert torch.allclose(rollout(weights)[image], row / row.sum(), atol=1e-6)


def test_a_position_is_like_itself():
    network = ViT(dim=16, depth=1, heads=2)
    likeness = position_similarity(network)
    assert likeness.shape == (49, 49)
    assert torch.allclose(likeness.diagonal(), torch.ones(49))
    assert likeness.abs().max() < 1.0001
    of_patches = network.positions.detach()[0, 1:]  # the first is the class token's
    assert likeness[3, 7] == pytest.approx(F.cosine_similarity(of_patches[3], of_patches[7], dim=0).item(), abs=1e-6)


# --- the zoo ------------------------------------------------------------------------------------------------------


def conv(c_in, c_out):
    return 9 * c_in * c_out + 2 * c_out


def dense(*widths):
    return sum(a * b + b for a, b in pairwise(widths))


def test_the_networks_have_the_parameters_of_the_formulas():
    pairs = ((1, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256))
    expected = {
        "fcnn": 784 * 512 + 2 * 512 + 512 * 256 + 2 * 256 + dense(256, 10),
        "cnn": conv(1, 32) + conv(32, 64) + conv(64, 128) + dense(128 * 9, 256, 128, 10),
        "deep_cnn": sum(conv(*pair) for pair in pairs) + dense(256 * 9, 512, 10),
    }
    for name, count in expected.items():
        assert sum(p.numel() for p in zoo.build(name, 10).parameters()) == count


def test_the_cnn_is_what_the_table_says():
    kinds = [type(layer).__name__ for layer in zoo.cnn()]
    block = ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Dropout"]
    assert kinds == ["Normalize", *3 * block, "Flatten", *2 * ["Linear", "ReLU", "Dropout"], "Linear"]
    dropped = [layer.p for layer in zoo.cnn() if isinstance(layer, Dropout)]
    assert dropped == [0.25, 0.25, 0.25, 0.5, 0.5]


def test_every_network_reads_digits_and_learns_in_every_part():
    x = torch.rand(3, 1, 28, 28)
    for name in (*zoo.OURS, "alexnet", "vgg16"):
        torch.manual_seed(0)
        network = zoo.build(name, 7)
        logits = network(x)
        assert logits.shape == (3, 7)
        F.cross_entropy(logits, torch.arange(3)).backward()
        assert all(p.grad is not None for p in network.parameters()), name


@pytest.mark.parametrize("name", zoo.TORCHVISION)
def test_with_imagenets_weights_the_convolutions_are_torchvisions_and_stay(name, weights_of):
    given = weights_of(name)
    network = zoo.build(name, 10, given).train()
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    theirs.load_state_dict(given)
    x = torch.rand(1, 1, 28, 28)
    mean, std = (torch.tensor(zoo.IMAGENET[key])[:, None, None] for key in ("mean", "std"))
    seen = (resized(x, 224).expand(-1, 3, -1, -1) - mean) / std
    with torch.no_grad():
        assert torch.allclose(network.features(x), theirs.avgpool(theirs.features(seen)).flatten(1), atol=1e-4)
    assert network(x).shape == (1, 10)
    learned = {key for key, p in network.named_parameters() if p.requires_grad}
    assert learned == {key for key, _ in network.named_parameters() if key.startswith("classifier.")}
    assert not network.convolutions.training
    assert network.classifier.training
    assert not network.eval().classifier.training


def test_another_networks_weights_are_refused(weights_of):
    with pytest.raises(UserError, match="these are no weights of VGG16"):
        zoo.build("vgg16", 10, weights_of("alexnet"))
    with pytest.raises(UserError, match="these are no weights of AlexNet"):
        zoo.build("alexnet", 10, weights_of("alexnet", num_classes=10))


def test_a_figure_says_with_what_a_network_begins():
    said = {zoo.title_of(name, pretrained) for name in zoo.TORCHVISION for pretrained in (False, True)}
    assert said == {
        "VGG16, 32×32, from scratch",
        "AlexNet, small stem, from scratch",
        "VGG16, ImageNet's, frozen",
        "AlexNet, ImageNet's, frozen",
    }
    assert [zoo.title_of(name, False) for name in zoo.OURS] == ["FCNN", "CNN", "deep CNN", "ViT"]


# --- training -----------------------------------------------------------------------------------------------------


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


def test_images_are_bent_as_far_as_it_says(monkeypatch):
    only(monkeypatch)
    generator = Generator().manual_seed(0)
    for bend in (0.5, 1.0):
        ways = middles(distorted(spot(14, 14), generator, bend)) - 14  # beside the middle one of the 5×5 points
        assert 0.7 * bend < ways.std(0).min() < ways.std(0).max() < 1.1 * bend
        assert ways.mean(0).abs().max() < 0.2 * bend
        assert abs(np.corrcoef(ways.T)[0, 1]) < 0.2  # x and y each by itself
    slope = torch.arange(28.0).expand(200, 1, 28, 28)  # its change tells how far each place was moved
    far = (distorted(slope, generator, 0.5) - slope)[:, 0, 4:-4, 4:-4]
    assert 0.3 < far.std() < 0.5  # between the points less
    assert abs(np.corrcoef(far[:, 0, 0], far[:, -1, -1])[0, 1]) < 0.2  # places far apart go each its own way
    assert np.corrcoef(far[:, 9, 9], far[:, 10, 10])[0, 1] > 0.8  # neighbours together


def test_the_strong_recipe_bends_and_drops_nothing_for_convolutions_alone(monkeypatch):
    bent = []
    monkeypatch.setattr(digit_training, "distorted", lambda x, generator, bend: bent.append(bend) or x)
    for name, bend, dropout in (("fcnn", 0.0, True), ("cnn", 0.5, False), ("deep_cnn", 0.5, False)):
        network, *_ = trained(name, epochs=1, strong=True, data=images(20))
        assert set(bent) == {bend}
        assert any(module.p > 0 for module in network.modules() if isinstance(module, Dropout)) == dropout
        bent.clear()
    network, *_ = trained("cnn", epochs=1, data=images(20))
    assert {module.p for module in network.modules() if isinstance(module, Dropout)} == {0.25, 0.5}


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
    monkeypatch.setattr(digit_training, "distorted", lambda x, generator, bend: x)
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
