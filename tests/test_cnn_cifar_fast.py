"""cnn_cifar's fast recipe: Muon, whitening, the training, test-time averaging; images in, networks as files."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnn_cifar import fast_cifar, fast_training, inputs, muon
from cnn_cifar.augment import flip_coins
from cnn_cifar.checkpoints import load_network
from cnn_cifar.fast_net import FastNet, start_as_identity_, whiten_
from cnn_cifar.fast_training import INGREDIENTS, FastTraining, Recipe, accuracies, averaged_logits
from cnn_cifar.inputs import Split, load, logits_of, loss_and_accuracy, pixels
from cnn_cifar.models import CIFAR10_MEAN, CIFAR10_STD, allcnn_t
from cnn_cifar.muon import Muon, orthogonalize
from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.embedded import shapes

WIDTHS = (6, 8, 10)
BFLOAT16 = 0.05  # of values near 1: some roundings to 8 bits


def images(n, split="train"):
    x, y, *_ = shapes(split, n=n)
    return Split(torch.from_numpy(x), torch.from_numpy(y))


def started(train, seed=0, weights_seed=0, amp=False, **changed):
    """A training with small batches of a small network that begins with the weights of `weights_seed`."""
    torch.manual_seed(weights_seed)
    return FastTraining(Recipe(**({"epochs": 2, "batch_size": 20, "widths": WIDTHS} | changed)), train, 10, seed, amp)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def random_network(seed=0, widths=WIDTHS):
    """A network in evaluation mode whose biases, offsets and running statistics are not those it begins with."""
    torch.manual_seed(seed)
    network = FastNet(widths)
    nn.init.normal_(network.whiten.bias, std=0.1)
    nn.init.normal_(network.head.weight)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                values.data.uniform_(0.5, 1.5)
    return network.eval()


@pytest.fixture(scope="module")
def train():
    return images(60)


# --- Muon ---------------------------------------------------------------------------------------------------------


def matrix_of(m, n, singular_values, rng):
    """A float32 matrix (m, n) with these singular values, and its singular vectors U (m, k), V (n, k)."""
    k = len(singular_values)
    u, v = (np.linalg.qr(rng.standard_normal((side, k)))[0] for side in (m, n))
    return (torch.from_numpy(matrix).float() for matrix in (u * singular_values @ v.T, u, v))


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize(("m", "n"), [(12, 12), (8, 40), (40, 8)])
def test_orthogonalize_keeps_the_vectors_and_changes_the_values_as_published(m, n, steps):
    values = np.geomspace(3.0, 0.2, min(m, n))
    matrix, u, v = matrix_of(m, n, values, np.random.default_rng(0))
    found = orthogonalize(matrix, steps)
    assert (found.dtype, found.shape) == (matrix.dtype, matrix.shape)
    expected = values / np.linalg.norm(values)
    for _ in range(steps):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5  # Jordan et al. 2024
    middle = u.T @ found @ v  # diagonal if the singular vectors are still the same
    torch.testing.assert_close(middle, torch.from_numpy(np.diag(expected)).float(), rtol=0, atol=BFLOAT16)
    if steps == 5:
        exact = (u @ v.T).double()
        assert ((found - exact).norm() / exact.norm()).item() < 0.3
        assert middle.diag().min() > 0.65
        assert middle.diag().max() < 1.25


def test_orthogonalize_takes_each_matrix_of_a_batch_for_itself():
    rng = np.random.default_rng(1)
    batch = torch.from_numpy(rng.standard_normal((2, 3, 6, 4)) * np.array([1, 50, 0.01])[:, None, None]).float()
    found = orthogonalize(batch)
    for i, j in np.ndindex(2, 3):
        torch.testing.assert_close(found[i, j], orthogonalize(batch[i, j]), rtol=0, atol=BFLOAT16)
    torch.testing.assert_close(orthogonalize(batch.mT), found.mT, rtol=0, atol=BFLOAT16)


def test_orthogonalize_knows_no_scale_and_leaves_zero():
    matrix = torch.from_numpy(np.random.default_rng(2).standard_normal((5, 9))).float()
    torch.testing.assert_close(orthogonalize(1000 * matrix), orthogonalize(matrix), rtol=0, atol=BFLOAT16)
    assert torch.equal(orthogonalize(torch.zeros(2, 4, 3)), torch.zeros(2, 4, 3))


def exactly(matrix):
    """U Vᵀ of a matrix."""
    assert matrix.ndim == 2
    u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u @ vh).to(matrix.dtype)


def gradients(shape, n=5):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(n)]


def steps_of(optimizer, weight, grads):
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_follows_its_equation(layout, monkeypatch):
    monkeypatch.setattr(muon, "orthogonalize", exactly)
    weight = nn.Parameter(torch.randn(6, 4, 3, 3).to(memory_format=layout))
    bystander = nn.Parameter(torch.randn(3, 3))
    before = bystander.detach().clone()
    w, momentum = weight.detach().double().numpy().reshape(6, 36), np.zeros((6, 36))
    grads = gradients(weight.shape)
    steps_of(Muon([weight, bystander], lr=0.3, momentum=0.8), weight, grads)
    for grad in grads:
        g = grad.double().numpy().reshape(6, 36)
        momentum = 0.8 * momentum + g
        u, _, vh = np.linalg.svd(g + 0.8 * momentum, full_matrices=False)
        w = np.sqrt(6) * w / np.linalg.norm(w) - 0.3 * u @ vh
    np.testing.assert_allclose(weight.detach().double().reshape(6, 36), w, rtol=0, atol=1e-5)
    assert torch.equal(bystander, before)


def test_muon_steps_with_its_own_orthogonalize():
    weight = nn.Parameter(torch.randn(6, 4, 3, 3))
    start, grad = weight.detach().clone(), gradients(weight.shape)[0]
    steps_of(Muon([weight], lr=0.5), weight, [grad])
    moved = (start * 6**0.5 / start.norm() - weight.detach()).flatten(1) / 0.5
    torch.testing.assert_close(moved, orthogonalize(grad.flatten(1)), rtol=0, atol=BFLOAT16)


def test_muon_goes_on_from_its_state(tmp_path):
    grads, found = gradients((4, 2, 3, 3)), []
    for cut in (0, 2):
        weight = nn.Parameter(torch.ones(4, 2, 3, 3).cumsum(0))
        optimizer = Muon([weight], lr=0.1, momentum=0.9)
        steps_of(optimizer, weight, grads[:cut])
        checkpoint.save(tmp_path / "state.pth", optimizer=optimizer.state_dict())
        optimizer = Muon([weight], lr=5.0, momentum=0.0)
        optimizer.load_state_dict(checkpoint.load(tmp_path / "state.pth")["optimizer"])
        steps_of(optimizer, weight, grads[cut:])
        found.append(weight.detach().clone())
    assert torch.equal(*found)


# --- FastNet ------------------------------------------------------------------------------------------------------


def patches_of(x):
    """The normalised 2×2 patches of images of [0, 1] in float64: (patches, 12)."""
    x = (x.double().numpy() - np.array(CIFAR10_MEAN)[:, None, None]) / np.array(CIFAR10_STD)[:, None, None]
    corners = [x[:, c, i : i + 31, j : j + 31].ravel() for c in range(3) for i in (0, 1) for j in (0, 1)]
    return np.stack(corners, axis=1)


def test_whitened_outputs_are_uncorrelated_with_mean_square_one(train):
    network, x = FastNet(WIDTHS), pixels(train.x)
    nn.init.ones_(network.whiten.bias)
    whiten_(network, x, eps=1e-9)
    weight, bias = network.whiten.weight, network.whiten.bias
    with torch.no_grad():
        outputs = network.whiten(network.normalize(x)).transpose(0, 1).flatten(1).double()  # (24, patches)
    moments = outputs @ outputs.T / outputs.shape[1]
    eye = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(
        moments, torch.cat([torch.cat([eye, -eye]), torch.cat([-eye, eye])], 1), rtol=0, atol=1e-3
    )
    assert torch.equal(weight[12:], -weight[:12])
    assert not bias.any()
    assert (weight.requires_grad, bias.requires_grad) == (False, True)


def test_epsilon_holds_back_the_directions_that_are_hardly_there(train):
    network, x, eps = FastNet(WIDTHS), pixels(train.x), 0.3
    whiten_(network, x, eps=eps)
    patches = patches_of(x)
    variances = np.linalg.eigvalsh(patches.T @ patches / len(patches))
    found = patches @ network.whiten.weight[:12].flatten(1).double().numpy().T
    np.testing.assert_allclose(np.sort((found**2).mean(0)), variances / (variances + eps), rtol=1e-4)


@pytest.mark.parametrize("widths", [(26, 30, 30), (6, 30, 8)])
def test_channels_pass_through_a_network_that_starts_as_the_identity(widths):
    torch.manual_seed(0)
    network = FastNet(widths)
    before = [p.detach().clone() for p in network.parameters()]
    start_as_identity_(network)
    for block in network.blocks:
        for conv in (block.conv1, block.conv2):
            x, same = torch.randn(2, conv.in_channels, 5, 7), min(conv.in_channels, conv.out_channels)
            torch.testing.assert_close(conv(x)[:, :same], x[:, :same])
    for old, new in zip(before, network.parameters(), strict=True):
        if new.ndim == 4 and new.shape[-1] == 3:  # a trained convolution; what is more than its input stays random
            assert torch.equal(new[new.shape[1] :], old[new.shape[1] :])
        else:
            assert torch.equal(new, old)


@pytest.mark.parametrize(("widths", "classes"), [(WIDTHS, 10), ((16, 8, 4), 3)])
def test_the_network_has_the_parameters_of_its_formula(widths, classes):
    network = FastNet(widths, classes)
    convolutions = sum(9 * (a * b + b * b) for a, b in pairwise([24, *widths]))
    assert (
        sum(p.numel() for p in network.parameters()) == 13 * 24 + convolutions + 4 * sum(widths) + widths[2] * classes
    )
    assert network.config == {"widths": list(widths), "num_classes": classes}
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, classes)
    scales = [block.bn1.weight for block in network.blocks] + [block.bn2.weight for block in network.blocks]
    assert not any(scale.requires_grad for scale in scales)
    with pytest.raises(UserError, match=r"pixels from 0 to 1 as floats, got torch.uint8"):
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


# --- the training -------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_and_another_another(train):
    found = []
    for seed in (3, 3, 4):
        training = started(train, seed)
        training.epoch(0)
        found.append(weights(training.network))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_an_epoch_needs_nothing_random_but_its_seed_and_number(train):
    """What a resumed run relies on."""
    found = []
    for disturbed in (False, True):
        training = started(train, without=("alternating",))  # coins are drawn in each epoch then
        training.epoch(0)
        if disturbed:
            torch.manual_seed(99)
            np.random.seed(99)
        training.epoch(1)
        found.append(weights(training.network))
    assert torch.equal(*found)


@pytest.mark.parametrize("ingredient", [name for name in INGREDIENTS if name != "tta"])
def test_each_ingredient_counts(ingredient, train):
    found = []
    for without in ((), (ingredient,)):
        training = started(train, without=without)
        assert training.recipe.has(ingredient) == (not without)
        for epoch in range(2):
            training.epoch(epoch)
        found.append(weights(training.network))
    assert not torch.equal(*found)


@pytest.mark.parametrize("left_out", [False, True])
def test_whitening_is_set_on_the_training_images_and_not_trained(left_out, train):
    training = started(train, without=("whitening",) if left_out else ())
    whiten = training.network.whiten
    expected, bias = FastNet(WIDTHS), whiten.bias.detach().clone()
    whiten_(expected, pixels(train.x))
    assert torch.allclose(whiten.weight, expected.whiten.weight) == (not left_out)
    before = whiten.weight.detach().clone()
    training.epoch(0)
    assert torch.equal(whiten.weight, before) == (not left_out)
    assert not torch.equal(whiten.bias, bias)


def test_convolutions_start_as_the_identity_unless_left_out(train):
    x = torch.randn(1, WIDTHS[0], 4, 4)
    for without in ((), ("identity",)):
        conv = started(train, without=without).network.blocks[0].conv2
        assert torch.allclose(conv(x), x) == (not without)


@pytest.mark.parametrize("left_out", [False, True])
def test_muon_or_sgd_trains_the_filters_and_adam_the_rest(left_out, train):
    training = started(train, without=("muon",) if left_out else ())
    main, rest = training.optimizers
    assert (type(main), type(rest)) == (torch.optim.SGD if left_out else Muon, torch.optim.Adam)
    if left_out:
        assert main.param_groups[0]["nesterov"]
        assert main.param_groups[0]["momentum"] > 0
    names = {id(p): name for name, p in training.network.named_parameters()}
    of = [[names[id(p)] for group in one.param_groups for p in group["params"]] for one in (main, rest)]
    trained = [name for name, p in training.network.named_parameters() if p.requires_grad]
    assert sorted(of[0] + of[1]) == sorted(trained)  # each in one place
    assert of[0] == [f"blocks.{i}.conv{j}.weight" for i in range(3) for j in (1, 2)]
    before = {name: p.detach().clone() for name, p in training.network.named_parameters()}
    training.epoch(0)
    assert {name for name, p in training.network.named_parameters() if not torch.equal(p, before[name])} == set(trained)


@pytest.mark.parametrize("left_out", [False, True])
def test_labels_are_smoothed_unless_left_out_and_the_loss_is_the_mean(left_out, train, monkeypatch):
    seen, cross_entropy = [], F.cross_entropy

    def watched(logits, y, label_smoothing=0.0):
        seen.append((label_smoothing, cross_entropy(logits, y, label_smoothing=label_smoothing)))
        return seen[-1][1]

    monkeypatch.setattr(F, "cross_entropy", watched)
    loss = started(train, without=("smoothing",) if left_out else ()).epoch(0)
    assert len(seen) == 3
    assert all((smoothing == 0) == left_out for smoothing, _ in seen)
    assert loss == pytest.approx(sum(value.item() for _, value in seen) / 3)


@pytest.mark.parametrize("alternates", [True, False])
def test_two_epochs_show_each_image_once_each_and_alternately_both_ways(alternates, train, monkeypatch):
    batches = []
    monkeypatch.setattr(fast_training, "random_crop", lambda x, generator, padding: (batches.append(x), x)[1])
    training = started(train, without=() if alternates else ("alternating",))
    looks = {tuple(image.flatten().tolist()): (i, way) for i, image in enumerate(train.x) for way in (False,)}
    looks |= {tuple(image.flatten().tolist()): (i, True) for i, image in enumerate(train.x.flip(-1))}
    ways = []  # of each epoch: which images were mirrored
    for epoch in range(4):
        batches.clear()
        training.epoch(epoch)
        seen = [looks[tuple(image.flatten().tolist())] for batch in batches for image in batch]
        assert sorted(i for i, _ in seen) == list(range(len(train)))
        ways.append(np.array([mirrored for _, mirrored in sorted(seen)]))
    if alternates:
        coins = flip_coins(len(train), torch.Generator().manual_seed(0)).numpy()
        assert all(np.array_equal(way, coins ^ (epoch % 2 == 1)) for epoch, way in enumerate(ways))
    else:
        assert all(0 < (way == ways[0]).sum() < len(train) for way in ways[1:])


def test_crops_are_the_images_own_and_new_in_each_epoch(train, monkeypatch):
    batches, crop = [], fast_training.random_crop
    monkeypatch.setattr(
        fast_training,
        "random_crop",
        lambda x, *given, **named: batches.append((x, crop(x, *given, **named))) or batches[-1][1],
    )
    training = started(train, batch_size=len(train))
    for epoch in (0, 0, 2):
        training.epoch(epoch)
    assert torch.equal(batches[0][1], batches[1][1])  # the same number, the same images
    shifted = [(crop_ != image).flatten(1).any(1) for image, crop_ in batches]
    assert shifted[0].sum() > len(train) / 2
    assert not torch.equal(batches[0][1].sort(0)[0], batches[2][1].sort(0)[0])


@pytest.mark.parametrize("without", [(), ("whitening", "muon")])
def test_learning_rates_fall_in_a_straight_line_and_whitenings_sooner(without, train):
    training, updates = started(train, epochs=8, without=without), 24
    whitening = {id(p) for p in training.network.whiten.parameters()}

    def by_parameter(step):
        return {id(p): lr for group, lr in training.rates(step) for p in group["params"]}

    first, found = by_parameter(0), []
    assert set(first) == {id(p) for p in training.network.parameters() if p.requires_grad}
    assert min(first.values()) > 0
    for step in range(updates + 1):
        for p, lr in by_parameter(step).items():
            left = max(0, 1 - step / 9) if p in whitening else 1 - step / updates  # 9 is 3/8 of 24
            assert lr == pytest.approx(first[p] * left, abs=1e-12)
    for optimizer in training.optimizers:
        step = optimizer.step
        optimizer.step = lambda step=step, groups=optimizer.param_groups: (
            found.append({id(p): group["lr"] for group in groups for p in group["params"]}),
            step(),
        )
    training.epoch(2)
    expected = [by_parameter(6 + i) for i in range(3)]
    assert [main | rest for main, rest in zip(found[::2], found[1::2], strict=True)] == expected


@pytest.mark.parametrize("without", [(), ("muon", "smoothing"), tuple(INGREDIENTS)])
def test_the_training_learns(without):
    train = images(100)
    training = started(train, epochs=8, without=without)
    losses = [training.epoch(epoch) for epoch in range(8)]
    assert losses[-1] < losses[0] - 0.2
    assert loss_and_accuracy(training.network, train)[1] > 0.35


def test_bfloat16_is_used_where_asked_for(train):
    found = []
    for amp in (False, True):
        training = started(train, amp=amp)
        found.append(training.epoch(0))
        assert all(p.dtype == torch.float32 for p in training.network.parameters())
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)


# --- test-time averaging ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
def test_averaged_logits_are_those_of_a_loop_over_images(shifted):
    network, x = random_network(), images(5, "test").x
    places = [(1, 1, 0.5), (0, 0, 0.25), (2, 2, 0.25)] if shifted else [(1, 1, 1.0)]
    expected = []
    for image in x.numpy():
        padded, mean = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="reflect"), 0
        for i, j, weight in places:
            window = padded[:, i : i + 32, j : j + 32]
            for copy in (window, window[..., ::-1].copy()):
                with torch.no_grad():
                    mean = mean + weight / 2 * network(torch.from_numpy(copy[None]) / 255)[0]
        expected.append(mean)
    torch.testing.assert_close(
        averaged_logits(network, x, shifted=shifted), torch.stack(expected), rtol=1e-4, atol=1e-4
    )


def test_mirror_images_have_the_same_mean():
    network, x = random_network(), images(5, "test").x
    found = averaged_logits(network, x, shifted=False)
    torch.testing.assert_close(averaged_logits(network, x.flip(-1), shifted=False), found, rtol=1e-5, atol=1e-5)
    assert (logits_of(network, x.flip(-1)) - logits_of(network, x)).abs().max() > 0.01


def test_accuracies_are_the_part_right_in_each_way():
    network, test = random_network(), images(40, "test")
    ways = [logits_of(network, test.x), *(averaged_logits(network, test.x, shifted=some) for some in (False, True))]
    labels = ways[2].argmax(1)
    labels[:25] = (labels[:25] + 1) % 10  # 15 right at most
    found = accuracies(network, Split(test.x, labels), amp=False)
    assert list(found) == ["plain", "mirrored", "mirrored and shifted"]
    assert list(found.values()) == pytest.approx([(way.argmax(1) == labels).numpy().mean() for way in ways])
    assert found["mirrored and shifted"] == pytest.approx(15 / 40)


# --- inputs -------------------------------------------------------------------------------------------------------


def flags(*given):
    return fast_cifar.build_parser().parse_args(["--dataset", "shapes", *map(str, given)])


def test_load_holds_out_validation_images_that_are_not_trained_on(monkeypatch):
    drawn = {split: inputs.load_images("shapes", split)[:300] for split in ("train", "test")}
    monkeypatch.setattr(inputs, "load_images", lambda name, split, root, shape: drawn[split])
    cpu = torch.device("cpu")
    whole, held = (load(flags("--batch-size", 10, "--val-size", size), cpu) for size in (0, 70))
    assert whole.val is None
    assert torch.equal(whole.train.x, torch.from_numpy(drawn["train"].x))
    assert torch.equal(held.test.x, torch.from_numpy(drawn["test"].x))
    assert (len(held.train), len(held.val), len(held.test)) == (230, 70, 300)
    labels = {image.tobytes(): label for image, label in zip(drawn["train"].x, drawn["train"].y, strict=True)}
    parts = [[image.numpy().tobytes() for image in part.x] for part in (held.train, held.val)]
    assert not set(parts[0]) & set(parts[1])
    assert set(parts[0]) | set(parts[1]) == set(labels)
    for part, split in zip(parts, (held.train, held.val), strict=True):
        assert [labels[image] for image in part] == split.y.tolist()
    assert (held.classes, held.title) == (drawn["test"].classes, drawn["test"].title)
    assert held.train.x.dtype == torch.uint8
    load(flags("--batch-size", 230, "--val-size", 70), cpu)
    for size, message in ((70, "--batch-size 231: there are 230 images"), (300, "cannot hold out 300 of 300")):
        with pytest.raises(UserError, match=message):
            load(flags("--batch-size", 231, "--val-size", size), cpu)


def test_pixels_are_over_255_and_channels_last(train):
    x = pixels(train.x)
    assert x.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(x.numpy(), train.x.numpy().astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_of_evaluation_and_the_mode_is_put_back(training, train, monkeypatch):
    torch.manual_seed(0)
    network = allcnn_t(4, 6, 5)  # with dropout and BatchNorm
    network(pixels(train.x))  # statistics of its own
    with torch.no_grad():
        expected = network.eval()(train.x.float() / 255)
    network.train(training)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    for together in (inputs.EVALUATED_TOGETHER, 7, 1):
        monkeypatch.setattr(inputs, "EVALUATED_TOGETHER", together)
        found = logits_of(network, train.x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert network.training is training
    assert not found.requires_grad
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    half = logits_of(network, train.x, amp=True)
    assert half.dtype == torch.float32
    assert not torch.equal(half, found)
    torch.testing.assert_close(half, expected, rtol=0.1, atol=0.05)


def test_loss_and_accuracy_by_hand(train):
    network = random_network(1)
    z = logits_of(network, train.x).double().numpy()
    y = np.where(np.arange(60) < 24, z.argmax(1), z.argmin(1))
    loss, accuracy = loss_and_accuracy(network, Split(train.x, torch.from_numpy(y)))
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    assert accuracy == pytest.approx(24 / 60)
    assert loss == pytest.approx(-np.log(p[np.arange(60), y]).mean(), rel=1e-5)


# --- networks as files --------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="no checkpoint at"):
        load_network(path)
    for config, rest in (
        ({"network": "vae", "k": 3}, {"model": {}}),
        ({}, {"model": {}}),
        ({"network": "fast_net"}, {}),
    ):
        checkpoint.save(path, config=config, **rest)
        with pytest.raises(UserError, match=r"other\.pth holds no network of cnn_cifar \(allcnn_t, fast_net\)"):
            load_network(path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match="damaged"):
        load_network(path)
