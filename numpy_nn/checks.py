"""Seven checks of each part of the library, by independent means.

Each takes a subject (the name of a layer, loss or optimiser; `He` for the initial weights, `Sequential` for whole
networks) and a seed, and returns whether the subject passes, or None where the check does not apply.
Shapes: N batch, C channels, H W pixels, K classes.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from numpy_nn.activations import ReLU, Sigmoid, Tanh
from numpy_nn.complex_step import (
    F64,
    Method,
    build_cases,
    build_cnn,
    build_embedding,
    build_mlp,
    central_difference,
    complex_step,
    gradient_errors,
)
from numpy_nn.conv import AvgPool2d, Conv2d, MaxPool2d
from numpy_nn.layers import BatchNorm1d, Dropout, Layer, Linear, PatchEmbedding
from numpy_nn.losses import MSE, SoftmaxCrossEntropy
from numpy_nn.network import Sequential
from numpy_nn.optimizers import SGD, Adam, RMSprop
from shared_utils.gradcheck import relative_error

FINITE_BAR, COMPLEX_BAR = 1e-7, 1e-12  # a gradient with a larger relative error is wrong
EXACT = 1e-10  # two ways to compute one number
OPTIMIZERS: Mapping[str, Callable] = {
    "SGD": lambda layers: SGD(layers, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "RMSprop": lambda layers: RMSprop(layers, 0.005, weight_decay=1e-3),
    "Adam": lambda layers: Adam(layers, 0.02, weight_decay=1e-3),
}
Pairs = Iterator[tuple[object, object]]  # (by the library, by hand)


def _random(layer: Layer, rng: np.random.Generator) -> Layer:
    layer.params = {key: rng.standard_normal(array.shape) for key, array in layer.params.items()}
    return layer


def _linear(rng) -> Pairs:
    layer, x = _random(Linear(4, 3, dtype=F64), rng), rng.standard_normal((5, 4))
    W, b = layer.params["W"], layer.params["b"]
    by_hand = [[b[m] + sum(x[n, d] * W[d, m] for d in range(4)) for m in range(3)] for n in range(5)]
    yield layer.forward(x), by_hand


def _patch_embedding(rng) -> Pairs:
    layer, x = _random(PatchEmbedding(2, 3, dtype=F64), rng), rng.standard_normal((2, 1, 4, 6))
    by_hand = np.empty((2, 2, 3, 3))
    for n, i, j in np.ndindex(2, 2, 3):
        patch = x[n, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        by_hand[n, i, j] = layer.params["b"] + patch.ravel() @ layer.params["W"]
    yield layer.forward(x), by_hand


def _conv(rng) -> Pairs:
    for k, s, p, size in ((3, 1, 0, (5, 6)), (3, 2, 1, (6, 5)), (2, 3, 2, (4, 5))):
        layer, x = _random(Conv2d(2, 3, k, s, p, dtype=F64), rng), rng.standard_normal((2, 2, *size))
        padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
        by_hand = np.empty((2, 3, *((n + 2 * p - k) // s + 1 for n in size)))
        for n, o, i, j in np.ndindex(by_hand.shape):
            window = padded[n, :, i * s : i * s + k, j * s : j * s + k]
            by_hand[n, o, i, j] = layer.params["b"][o] + (layer.params["W"][o] * window).sum()
        yield layer.forward(x), by_hand


def _pooling(kind: type[Layer]) -> Callable[[np.random.Generator], Pairs]:
    def pairs(rng) -> Pairs:
        for k, s in ((2, 2), (3, 2), (2, 1)):
            layer, x = kind(k, s), rng.integers(0, 3, (2, 2, 6, 7)).astype(F64)  # few values: many ties
            y = layer.forward(x)
            dy, by_hand, dx = rng.standard_normal(y.shape), np.empty(y.shape), np.zeros(x.shape)
            for n, c, i, j in np.ndindex(y.shape):
                window = np.s_[n, c, i * s : i * s + k, j * s : j * s + k]
                if kind is MaxPool2d:  # the first maximum, row by row, takes the whole gradient
                    by_hand[n, c, i, j] = x[window].max()
                    dx[window].flat[x[window].argmax()] += dy[n, c, i, j]
                else:
                    by_hand[n, c, i, j] = x[window].sum() / k**2
                    dx[window] += dy[n, c, i, j] / k**2
            yield y, by_hand
            yield layer.backward(dy), dx

    return pairs


def _batch_norm(rng) -> Pairs:
    layer, x, other = _random(BatchNorm1d(3, dtype=F64), rng), rng.standard_normal((5, 3)), rng.standard_normal((4, 3))
    gamma, beta = layer.params["gamma"], layer.params["beta"]
    mean, var = sum(x) / 5, sum((x - sum(x) / 5) ** 2) / 5
    yield layer.forward(x, training=True), gamma * (x - mean) / np.sqrt(var + 1e-5) + beta
    running_mean, running_var = 0.1 * mean, 0.9 + 0.1 * var * 5 / 4  # unbiased, as PyTorch's
    yield layer.forward(other), gamma * (other - running_mean) / np.sqrt(running_var + 1e-5) + beta


def _dropout(rng) -> Pairs:
    x = rng.standard_normal((40, 50))
    y = Dropout(0.4, rng, F64).forward(x, training=True)
    yield y, np.where(y == 0, 0, x / 0.6)


def _activation(kind: type[Layer], f: Callable[[float], float]) -> Callable[[np.random.Generator], Pairs]:
    def pairs(rng) -> Pairs:
        x = rng.standard_normal(20) * 3
        yield kind().forward(x), [f(value) for value in x]

    return pairs


def _cross_entropy(rng) -> Pairs:
    for scale in (1, 1000):  # e^1000 overflows: the maximum has to come off first
        logits, labels = scale * rng.standard_normal((5, 4)), rng.integers(0, 4, 5)
        by_hand = 0.0
        for z, label in zip(logits.tolist(), labels, strict=True):
            by_hand -= z[label] - max(z) - math.log(sum(math.exp(value - max(z)) for value in z))
        yield SoftmaxCrossEntropy().forward(logits, labels), by_hand / 5


def _mse(rng) -> Pairs:
    x, target = rng.standard_normal((5, 3)), rng.standard_normal((5, 3))
    yield MSE().forward(x, target), sum((a - b) ** 2 for a, b in zip(x.flat, target.flat, strict=True)) / 15


def _network(rng) -> Pairs:
    network, x = build_mlp(rng), rng.standard_normal((5, 6))
    W = [layer.params["W"] for layer in network.layers if "W" in layer.params]  # the biases are zero
    hidden = 1 / (1 + np.exp(-np.tanh(x @ W[0]) @ W[1]))
    yield network.forward(x), hidden / math.sqrt(1 + 1e-5) @ W[2]


def _sgd(w, g, t, memory):
    g = g + 1e-3 * w
    memory["v"] = g if t == 1 else 0.9 * memory["v"] + g
    return w - 0.05 * (g + 0.9 * memory["v"])


def _rmsprop(w, g, t, memory):
    g = g + 1e-3 * w
    memory["s"] = 0.99 * memory.get("s", 0.0) + 0.01 * g * g
    return w - 0.005 * g / (math.sqrt(memory["s"]) + 1e-8)


def _adam(w, g, t, memory):
    g = g + 1e-3 * w
    memory["g"] = [*memory.get("g", []), g]  # both means as weighted sums over all gradients so far
    m = sum(0.1 * 0.9 ** (t - 1 - i) * old for i, old in enumerate(memory["g"]))
    v = sum(0.001 * 0.999 ** (t - 1 - i) * old**2 for i, old in enumerate(memory["g"]))
    return w - 0.02 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)


def _trajectory(name: str, rule: Callable) -> Callable[[np.random.Generator], Pairs]:
    def pairs(rng) -> Pairs:
        layer, memories = _random(Linear(2, 2, dtype=F64), rng), [{} for _ in range(6)]
        optimizer, by_hand = OPTIMIZERS[name]([layer]), [*layer.params["W"].ravel(), *layer.params["b"]]
        for t in range(1, 11):
            g = rng.standard_normal(6) * 10.0 ** rng.integers(-6, 1)  # tiny ones too, where eps matters
            layer.grads = {"W": g[:4].reshape(2, 2), "b": g[4:]}
            optimizer.step()
            by_hand = [rule(*each, t, memory) for *each, memory in zip(by_hand, g, memories, strict=True)]
            yield np.concatenate([array.ravel() for array in layer.params.values()]), by_hand

    return pairs


def _he(rng) -> Pairs:
    for layer, variance in ((Linear(400, 100, rng=rng), 2 / 400), (Conv2d(8, 200, 5, rng=rng), 2 / 200)):
        within = abs(layer.params["W"].var() / variance - 1) < 0.05  # 40,000 draws: 0.007 by chance
        yield float(within), 1.0


PLAIN: Mapping[str, Callable[[np.random.Generator], Pairs]] = {
    "Linear": _linear,
    "PatchEmbedding": _patch_embedding,
    "Conv2d": _conv,
    "MaxPool2d": _pooling(MaxPool2d),
    "AvgPool2d": _pooling(AvgPool2d),
    "BatchNorm": _batch_norm,
    "Dropout": _dropout,
    "ReLU": _activation(ReLU, lambda v: max(v, 0.0)),
    "Sigmoid": _activation(Sigmoid, lambda v: 1 / (1 + math.exp(-v))),
    "Tanh": _activation(Tanh, lambda v: (math.exp(v) - math.exp(-v)) / (math.exp(v) + math.exp(-v))),
    "SoftmaxCrossEntropy": _cross_entropy,
    "MSE": _mse,
    "Sequential": _network,
    "SGD": _trajectory("SGD", _sgd),
    "RMSprop": _trajectory("RMSprop", _rmsprop),
    "Adam": _trajectory("Adam", _adam),
    "He": _he,
}


def central_differences(subject: str, seed: int, h: float = 1e-5) -> bool | None:
    """All gradients of the subject's cases within 1e-7 of central differences."""
    return _gradients_agree(subject, seed, central_difference, h, FINITE_BAR)


def complex_steps(subject: str, seed: int, h: float = 1e-30) -> bool | None:
    """All gradients of the subject's cases within 1e-12 of the complex step."""
    return _gradients_agree(subject, seed, complex_step, h, COMPLEX_BAR)


def _gradients_agree(subject: str, seed: int, method: Method, h: float, bar: float) -> bool | None:
    cases, rng = build_cases(seed, subject), np.random.default_rng([seed, 2])
    return all(max(gradient_errors(case, method, h, rng).values()) < bar for case in cases) if cases else None


def plain_formulas(subject: str, seed: int) -> bool:
    """The numbers of the definition, by Python loops over single elements."""
    pairs = PLAIN[subject](np.random.default_rng([seed, 3]))
    return all(relative_error(np.asarray(ours), np.asarray(theirs)) < EXACT for ours, theirs in pairs)


def one_alone(subject: str, seed: int) -> bool | None:
    """In evaluation mode an example's output does not depend on its batch; dropout acts in training alone."""
    if subject in (*OPTIMIZERS, "SoftmaxCrossEntropy", "MSE", "He"):
        return None
    network, x, *_ = problem(subject, np.random.default_rng([seed, 4]))
    network.forward(x, training=True)
    first = network.forward(x)
    alone = network.forward(x[:1])
    if subject in ("Dropout", "Sequential"):
        masked = Sequential(Dropout(0.5, np.random.default_rng(seed), F64))
        draws = np.stack([masked.forward(first, training=True) for _ in range(400)])
        off = np.abs(draws.mean(0) - first).mean() / np.abs(first).mean()  # 1/√400 = 0.05 by chance
        if off > 0.1 or np.array_equal(draws[0], first) or not np.array_equal(masked.forward(first), first):
            return False
    return relative_error(alone, first[:1]) < EXACT


def batch_twice(subject: str, seed: int) -> bool | None:
    """Means do not change when every example counts twice: the loss and each parameter's gradient stay."""
    if subject in (*OPTIMIZERS, "Dropout", "He"):
        return None
    network, x, loss, target = problem(subject, np.random.default_rng([seed, 5]))
    found = []
    for copies in (1, 2):
        value = loss.forward(network.forward(np.concatenate([x] * copies), True), np.concatenate([target] * copies))
        network.backward(loss.backward(), need_dx=False)
        found.append([np.array(value), *(np.array(g) for layer in network.layers for g in layer.grads.values())])
    return all(relative_error(once, twice) < EXACT for once, twice in zip(*found, strict=True))


def first_step_lowers(subject: str, seed: int) -> bool:
    """One small step of the optimiser against the gradient makes the loss on the same batch smaller."""
    network, x, loss, target = problem(subject, np.random.default_rng([seed, 6]))
    optimizer = OPTIMIZERS.get(subject, lambda layers: SGD(layers, 1e-2))(network.layers)
    optimizer.lr /= 10
    values = []
    for _ in range(2):
        for layer in network.layers:
            if isinstance(layer, Dropout):
                layer._rng = np.random.default_rng(seed)  # the same mask
        values.append(loss.forward(network.forward(x, training=True), target))
        network.backward(loss.backward(), need_dx=False)
        optimizer.step()
    return bool(values[1] < values[0])


def learns_by_heart(subject: str, seed: int, updates: int = 100) -> bool:
    """After `updates` updates on 16 examples with random labels the loss is below a fifth of what it was."""
    network, x, loss, target = problem(subject, np.random.default_rng([seed, 7]))
    optimizer, first = OPTIMIZERS.get(subject, OPTIMIZERS["SGD"])(network.layers), None
    for _ in range(updates):
        value = loss.forward(network.forward(x, training=True), target)
        first = value if first is None else first
        network.backward(loss.backward(), need_dx=False)
        optimizer.step()
    return bool(loss.forward(network.forward(x), target) < first / 5)


def problem(subject: str, rng: np.random.Generator) -> tuple[Sequential, np.ndarray, object, np.ndarray]:
    """A small network with the subject in it, 16 random examples, a loss and its target (four random classes)."""
    labels = rng.permutation(np.arange(16) % 4)
    if subject in ("Linear", "BatchNorm", "Sigmoid", "Tanh", "Dropout", "MSE", *OPTIMIZERS):
        network = build_mlp(rng)
        if subject == "Dropout":
            network.layers.insert(-1, Dropout(0.1, rng, F64))
        return network, rng.standard_normal((16, 6)), MSE(), np.eye(4)[labels]
    build = build_embedding if subject == "PatchEmbedding" else build_cnn
    return build(rng), rng.standard_normal((16, 1, 8, 8)), SoftmaxCrossEntropy(), labels


CHECKS: dict[str, Callable[..., bool | None]] = {
    "central\ndifferences": central_differences,
    "complex\nstep": complex_steps,
    "plain\nformulas": plain_formulas,
    "one example\nalone": one_alone,
    "the batch\ntwice": batch_twice,
    "first step\nlowers": first_step_lowers,
    "learns by\nheart": learns_by_heart,
}
