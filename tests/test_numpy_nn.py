"""numpy_nn's layers: finite differences, autograd, torch.optim, shapes that do not fit."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from numpy_nn.activations import ReLU, Sigmoid, Tanh
from numpy_nn.conv import AvgPool2d, Conv2d, MaxPool2d
from numpy_nn.layers import BatchNorm1d, BatchNorm2d, Dropout, Flatten, Linear, PatchEmbedding, initial_weights
from numpy_nn.losses import MSE, SoftmaxCrossEntropy
from numpy_nn.network import Sequential
from numpy_nn.optimizers import SGD, Adam, RMSprop
from shared_utils.cli import UserError
from shared_utils.gradcheck import check_gradients, relative_error


def rng(seed=0):
    return np.random.default_rng(seed)


def off_kinks(shape, seed=0, margin=0.05):
    """Values at least `margin` from 0 and from each other, so that no finite step crosses a kink or a tie."""
    n = int(np.prod(shape))
    values = (np.arange(n) + 0.5 - n // 2) * 2 * margin
    return rng(seed).permutation(values).reshape(shape)


def layer_errors(layer, x, training=True, seed=1):
    """Relative error of dx and of every parameter's gradient, by central differences."""
    return check_gradients(
        lambda: layer.forward(x, training),
        lambda dy: {"x": layer.backward(dy), **layer.grads},
        {"x": x, **layer.params},
        rng(seed),
    )


def randomise(layer, seed=2):
    for i, name in enumerate(layer.params):
        layer.params[name] = rng(seed + i).standard_normal(layer.params[name].shape)
    return layer


LAYERS = {
    "Linear": (lambda: Linear(5, 3, rng=rng(), dtype=np.float64), (4, 5)),
    "Linear, batch 1": (lambda: Linear(2, 7, rng=rng(), dtype=np.float64), (1, 2)),
    "PatchEmbedding": (lambda: PatchEmbedding(2, 3, rng=rng(), dtype=np.float64), (3, 1, 6, 4)),
    "Flatten": (Flatten, (2, 3, 2, 2)),
    "ReLU": (ReLU, (3, 4)),
    "Sigmoid": (Sigmoid, (3, 4)),
    "Tanh": (Tanh, (3, 4)),
    "BatchNorm1d": (lambda: BatchNorm1d(4, dtype=np.float64), (6, 4)),
    "BatchNorm2d": (lambda: BatchNorm2d(3, dtype=np.float64), (2, 3, 3, 4)),
    "MaxPool2d overlapping": (lambda: MaxPool2d(3, 2), (2, 2, 7, 8)),
    "MaxPool2d": (lambda: MaxPool2d(2), (1, 2, 6, 5)),
    "AvgPool2d": (lambda: AvgPool2d(3), (1, 2, 6, 7)),
    "AvgPool2d overlapping": (lambda: AvgPool2d(3, 1), (2, 2, 5, 4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_by_finite_differences(name, training):
    make, shape = LAYERS[name]
    layer = randomise(make())
    for error in layer_errors(layer, off_kinks(shape), training).values():
        assert error < 1e-7


def autograd(function, arrays, dy):
    """Gradients of ⟨dy, function(arrays)⟩ by PyTorch, and the output."""
    tensors = {name: torch.tensor(array, requires_grad=True) for name, array in arrays.items()}
    y = function(tensors)
    gradients = torch.autograd.grad((y * torch.tensor(dy(y.shape))).sum(), list(tensors.values()))
    return y.detach().numpy(), {name: g.numpy() for name, g in zip(tensors, gradients, strict=True)}


def compare_with_autograd(layer, x, function, training=True):
    y = layer.forward(x, training)
    dy = rng(3).standard_normal(y.shape)
    expected, gradients = autograd(function, {"x": x, **layer.params}, lambda shape: dy)
    assert relative_error(y, expected) < 1e-12
    ours = {"x": layer.backward(dy), **layer.grads}
    for name, gradient in gradients.items():
        assert relative_error(ours[name], gradient) < 1e-9, name


CONVOLUTIONS = [
    (n, c, o, k, s, p, size)
    for (n, c, o), k, s, p, size in itertools.product(
        [(1, 1, 2), (3, 2, 3)], [1, 2, 3, 5], [1, 2, 3], [0, 1, 2], [(5, 7), (6, 6)]
    )
]


@pytest.mark.parametrize(("n", "c", "o", "k", "s", "p", "size"), CONVOLUTIONS)
def test_convolution_equals_autograd(n, c, o, k, s, p, size):
    layer = randomise(Conv2d(c, o, k, s, p, rng=rng(), dtype=np.float64))
    compare_with_autograd(
        layer, rng(1).standard_normal((n, c, *size)), lambda t: F.conv2d(t["x"], t["W"], t["b"], stride=s, padding=p)
    )


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(("k", "s", "p"), [*itertools.product([2, 3], [1, 2, 3], [0, 1, 2]), (1, 2, 0), (5, 1, 2)])
def test_convolution_by_finite_differences(k, s, p, n):
    layer = randomise(Conv2d(2, 3, k, s, p, rng=rng(), dtype=np.float64))
    for error in layer_errors(layer, rng(1).standard_normal((n, 2, 5, 6))).values():
        assert error < 1e-7


@pytest.mark.parametrize(("k", "s"), [(2, None), (2, 1), (3, 2), (3, 3), (2, 3), (1, 2)])
@pytest.mark.parametrize("size", [(6, 6), (7, 9)])
def test_pooling_equals_autograd_also_at_ties(k, s, size):
    x = rng(1).integers(0, 3, (2, 3, *size)).astype(np.float64)  # three values: most windows have a tie
    compare_with_autograd(MaxPool2d(k, s), x, lambda t: F.max_pool2d(t["x"], k, s))
    compare_with_autograd(AvgPool2d(k, s), x, lambda t: F.avg_pool2d(t["x"], k, s))


def test_linear_equals_autograd():
    for n in (1, 4):
        layer = randomise(Linear(5, 3, dtype=np.float64))
        compare_with_autograd(layer, rng(1).standard_normal((n, 5)), lambda t: t["x"] @ t["W"] + t["b"])


def test_patch_embedding_is_a_strided_convolution():
    layer = randomise(PatchEmbedding(4, 8, dtype=np.float64))
    x = rng(1).standard_normal((3, 1, 28, 28))
    assert PatchEmbedding().forward(x.astype(np.float32)).shape == (3, 7, 7, 8)
    compare_with_autograd(
        layer, x, lambda t: F.conv2d(t["x"], t["W"].T.reshape(8, 1, 4, 4), t["b"], stride=4).permute(0, 2, 3, 1)
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape"), [(BatchNorm1d, (5, 3)), (BatchNorm2d, (2, 3, 4, 5)), (BatchNorm2d, (1, 3, 1, 2))]
)
def test_batch_norm_equals_pytorch_with_its_running_statistics(kind, shape, training):
    layer = randomise(kind(3, dtype=np.float64))
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for seed in range(3):  # move the running statistics first
        x = rng(seed).standard_normal(shape) * 3 + 1
        layer.forward(x, training=True)
        F.batch_norm(torch.tensor(x), mean, var, training=True)
        np.testing.assert_allclose(layer.buffers["mean"], mean.numpy(), rtol=1e-12)
        np.testing.assert_allclose(layer.buffers["var"], var.numpy(), rtol=1e-12)
    frozen = mean.clone(), var.clone()
    compare_with_autograd(
        layer,
        rng(7).standard_normal(shape),
        lambda t: F.batch_norm(t["x"], *(f.clone() for f in frozen), t["gamma"], t["beta"], training=training),
        training,
    )


@pytest.mark.parametrize(("kind", "function"), [(ReLU, torch.relu), (Sigmoid, torch.sigmoid), (Tanh, torch.tanh)])
def test_activations_equal_autograd(kind, function):
    compare_with_autograd(kind(), off_kinks((4, 5)) * 10, lambda t: function(t["x"]))


def test_sigmoid_overflows_nowhere():
    with np.errstate(all="raise"):
        assert Sigmoid().forward(np.array([-1e4, 0, 1e4], dtype=np.float32)).tolist() == [0, 0.5, 1]


def test_dropout_keeps_the_mean_and_uses_one_mask_for_both_ways():
    layer = Dropout(0.3, rng=rng())
    x = np.ones((200, 500), dtype=np.float32)
    y = layer.forward(x, training=True)
    assert (y == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert y.mean() == pytest.approx(1, abs=0.01)
    assert np.array_equal(layer.backward(x), y)
    assert layer.forward(x) is x
    assert layer.backward(x) is x


def test_losses_equal_autograd_and_do_not_overflow():
    logits, labels = rng().standard_normal((6, 4)), rng().integers(0, 4, 6)
    loss = SoftmaxCrossEntropy()
    t = torch.tensor(logits, requires_grad=True)
    expected = F.cross_entropy(t, torch.tensor(labels))
    expected.backward()
    assert loss.forward(logits, labels) == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(loss.backward(), t.grad.numpy()) < 1e-9
    assert np.isfinite(loss.forward(logits * 1e4, labels))
    target, mse = rng(5).standard_normal((6, 4)), MSE()
    t = torch.tensor(logits, requires_grad=True)
    expected = F.mse_loss(t, torch.tensor(target))
    expected.backward()
    assert mse.forward(logits, target) == pytest.approx(expected.item(), rel=1e-12)
    assert relative_error(mse.backward(), t.grad.numpy()) < 1e-9


@pytest.mark.parametrize("kind", [SoftmaxCrossEntropy, MSE])
def test_losses_by_finite_differences(kind):
    logits, loss = rng().standard_normal((3, 4)), kind()
    target = rng().integers(0, 4, 3) if kind is SoftmaxCrossEntropy else rng(1).standard_normal((3, 4))
    error = check_gradients(
        lambda: np.array([loss.forward(logits, target)]),
        lambda dy: {"x": loss.backward() * dy},
        {"x": logits},
        rng(),
    )
    assert error["x"] < 1e-7


def small_cnn(dtype=np.float64):
    g = rng()
    return Sequential(
        Conv2d(1, 3, 3, padding=1, rng=g, dtype=dtype),
        BatchNorm2d(3, dtype=dtype),
        ReLU(),
        MaxPool2d(2),
        Conv2d(3, 4, 3, stride=2, rng=g, dtype=dtype),
        Tanh(),
        Flatten(),
        Linear(16, 3, rng=g, dtype=dtype),
    )


def test_a_whole_network_by_finite_differences():
    network, loss = small_cnn(), SoftmaxCrossEntropy()
    x, labels = rng(1).standard_normal((4, 1, 10, 10)), np.array([0, 1, 2, 1])

    def backward(dy):
        dx = network.backward(loss.backward() * dy, need_dx=True)
        grads = {f"{i}.{name}": g for i, layer in enumerate(network.layers) for name, g in layer.grads.items()}
        return {"x": dx, **grads}

    # A convolution's bias before BatchNorm has no effect; its gradient is zero, and proves nothing.
    arrays = {"x": x, **{name: a for name, a in network.parameters().items() if name != "0.b"}}
    errors = check_gradients(
        lambda: np.array([loss.forward(network.forward(x, training=True), labels)]), backward, arrays, rng()
    )
    assert max(errors.values()) < 1e-7
    assert np.abs(network.layers[0].grads["b"]).max() < 1e-12


OPTIMIZERS = [
    (SGD, torch.optim.SGD, {"lr": 0.1}),
    (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (RMSprop, torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.01}),
    (Adam, torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.01}),
]


@pytest.mark.parametrize(("ours", "theirs", "settings"), OPTIMIZERS)
def test_trajectories_equal_torch_optim(ours, theirs, settings):
    layer = Linear(4, 3, rng=rng(), dtype=np.float64)
    tensors = {name: torch.tensor(array.copy(), requires_grad=True) for name, array in layer.params.items()}
    optimizer, oracle = ours([layer], **settings), theirs(tensors.values(), **settings)
    for step in range(30):
        layer.grads = {name: rng(step).standard_normal(array.shape) for name, array in layer.params.items()}
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(layer.grads[name])
        optimizer.step()
        oracle.step()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(layer.params[name], tensor.detach().numpy(), rtol=1e-12, atol=1e-14)


def test_adam_steps_by_lr_under_a_constant_gradient():
    layer = Linear(1, 1, dtype=np.float64)
    optimizer = Adam([layer], lr=0.1)
    before = layer.params["W"].copy()
    for step in range(1, 6):
        layer.grads = {"W": np.full((1, 1), 3.0), "b": np.zeros(1)}
        optimizer.step()
        assert before - layer.params["W"] == pytest.approx(0.1 * step, rel=1e-6)


def test_a_step_before_any_gradient_is_said():
    with pytest.raises(ValueError, match="call backward before step"):
        SGD([Linear(2, 2)], lr=0.1).step()


def test_weights_that_are_not_finite_are_not_loaded():
    network = Sequential(Linear(2, 2))
    with pytest.raises(UserError, match="NaN or infinity"):
        network.restore({name: array * np.nan for name, array in network.arrays().items()})


def test_initial_weights_keep_the_variance():
    for init, variance in (("he", 2 / 400), ("xavier", 2 / 500)):
        W = initial_weights((400, 100), 400, 100, init, rng(), np.float32)
        assert W.var() == pytest.approx(variance, rel=0.03)
        assert W.dtype == np.float32
    with pytest.raises(ValueError, match="he or xavier"):
        Linear(2, 2, init="zero")


def test_a_stored_network_computes_the_same(tmp_path):
    network, x = small_cnn(), rng(1).standard_normal((3, 1, 10, 10))
    network.forward(x, training=True)
    network.save(tmp_path / "best.npz")
    other = small_cnn()
    other.load(tmp_path / "best.npz")
    assert np.array_equal(other.forward(x), network.forward(x))
    wider = Sequential(Linear(2, 3))
    kept = wider.layers[0].params["W"].copy()
    with pytest.raises(ValueError, match="another network"):
        wider.load(tmp_path / "best.npz")
    assert np.array_equal(wider.layers[0].params["W"], kept)
    with pytest.raises(UserError, match="no such file"):
        wider.load(tmp_path / "absent.npz")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Linear(5, 3).forward(np.zeros((2, 4))), r"Linear\(W \(5, 3\).*\(N, 5\), got \(2, 4\)"),
        (lambda: Conv2d(3, 4, 3).forward(np.zeros((2, 1, 8, 8))), r"\(N, 3, H, W\), got \(2, 1, 8, 8\)"),
        (lambda: Conv2d(1, 4, 5).forward(np.zeros((2, 1, 4, 9))), "leaves no output of 4×9"),
        (lambda: MaxPool2d(3).forward(np.zeros((2, 1, 2, 2))), "leaves no output of 2×2"),
        (lambda: PatchEmbedding(4).forward(np.zeros((2, 1, 27, 28))), "27×28 pixels cannot be cut"),
        (lambda: BatchNorm1d(3).forward(np.zeros((1, 3)), training=True), "at least two values"),
        (lambda: BatchNorm2d(3).forward(np.zeros((2, 3))), r"\(N, 3, H, W\), got \(2, 3\)"),
        (lambda: Conv2d(1, 1, 3, stride=0), "1 or more"),
        (lambda: PatchEmbedding(0), "1 or more"),
        (lambda: Linear(0, 3), "1 or more"),
        (lambda: Dropout(1.0), r"in \[0, 1\)"),
        (lambda: SoftmaxCrossEntropy().forward(np.zeros((2, 3)), np.array([0, 3])), "from 0 to 2"),
        (lambda: SoftmaxCrossEntropy().forward(np.zeros((2, 3)), np.array([0, -1])), "from 0 to 2"),
        (lambda: SoftmaxCrossEntropy().forward(np.zeros((2, 3)), np.array([0.5, 1])), "whole numbers"),
        (lambda: SoftmaxCrossEntropy().forward(np.full((2, 3), np.nan), np.array([0, 1])), "not finite"),
        (lambda: MSE().forward(np.zeros((2, 3)), np.zeros(2)), "one shape"),
        (lambda: Sequential(ReLU()).forward(np.array([np.nan])), "NaN"),
        (lambda: SGD([], lr=0), "lr must be above 0"),
        (lambda: SGD([], lr=0.1, nesterov=True), "above 0 for Nesterov"),
    ],
)
def test_what_does_not_fit_is_said(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", LAYERS)
def test_float32_stays_float32(name):
    make, shape = LAYERS[name]
    layer = make()
    layer.dtype = np.dtype(np.float32)
    layer.params = {key: array.astype(np.float32) for key, array in layer.params.items()}
    layer.buffers = {key: array.astype(np.float32) for key, array in layer.buffers.items()}
    y = layer.forward(off_kinks(shape).astype(np.float32), training=True)
    assert y.dtype == np.float32
    assert layer.backward(y).dtype == np.float32
    assert all(gradient.dtype == np.float32 for gradient in layer.grads.values())
