"""Gradients without subtraction, and the table of everything whose gradient is checked.

The complex step (Squire and Trapp 1998) writes f(x + i h) = f(x) + i h f′(x) − h² f″(x)/2 − …, so that

    f′(x) = Im f(x + i h) / h + O(h²),

and as nothing is subtracted nothing cancels: h = 1e-30 leaves no truncation error and only the round-off of one forward
pass. f must be written for complex numbers: comparisons by the real part, no `abs`, no conjugate.

A `Case` is one thing to check: how to run it forward and backward, and in which dict each of its arrays lies.
Shapes: N batch, C channels, H W pixels, K classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from numpy_nn.activations import ReLU, Sigmoid, Tanh
from numpy_nn.conv import AvgPool2d, Conv2d, MaxPool2d
from numpy_nn.layers import BatchNorm1d, BatchNorm2d, Dropout, Flatten, Layer, Linear, PatchEmbedding
from numpy_nn.losses import MSE, SoftmaxCrossEntropy
from numpy_nn.network import Sequential
from shared_utils.gradcheck import numerical_gradient, relative_error

F64 = np.float64
DROPOUT_SEED = 5
Method = Callable[[Callable, dict, str, float], np.ndarray]


def complex_step(f: Callable[[], complex], holder: dict, key: str, h: float = 1e-30) -> np.ndarray:
    """Im f / h for each element of holder[key], which `f` reads; the real array is put back. Shaped like the array."""
    real = holder[key]
    gradient, perturbed = np.empty(real.shape), real.astype(complex)
    holder[key] = perturbed
    try:
        for index in np.ndindex(real.shape):
            perturbed[index] = complex(real[index], h)
            gradient[index] = np.imag(f()) / h
            perturbed[index] = real[index]
    finally:
        holder[key] = real
    return gradient


def central_difference(f: Callable[[], float], holder: dict, key: str, h: float = 1e-5) -> np.ndarray:
    """(f(x + h) − f(x − h)) / 2h for each element of holder[key] (float64)."""
    return numerical_gradient(f, holder[key], h)


def one_sided_difference(f: Callable[[], float], holder: dict, key: str, h: float = 1e-8) -> np.ndarray:
    """(f(x + h) − f(x)) / h for each element of holder[key] (float64)."""
    x, here = holder[key], f()
    gradient = np.empty(x.shape)
    for index in np.ndindex(x.shape):
        kept = x[index]
        x[index] = kept + h
        gradient[index] = (f() - here) / h
        x[index] = kept
    return gradient


@dataclass(frozen=True)
class Case:
    """forward() reads the arrays as they lie in `places` (name → dict and key); backward(dy) names their gradients."""

    name: str
    subject: str
    forward: Callable[[], np.ndarray]
    backward: Callable[[np.ndarray], Mapping[str, np.ndarray]]
    places: Mapping[str, tuple[dict, str]]


def gradient_errors(case: Case, method: Method, h: float, rng: np.random.Generator) -> dict[str, float]:
    """Relative error of each analytic gradient of ⟨dy, forward⟩ against `method` with step h, for one random dy.

    As `shared_utils.gradcheck.check_gradients`, apart from two things: a complex step puts another array in the place
    of the real one, so it needs the places; and a gradient that is all zero has the error 1 where the true one is not,
    since a planted bug may make it so and is then caught.
    """
    dy = rng.standard_normal(np.shape(case.forward()))
    analytic = {name: np.array(gradient) for name, gradient in case.backward(dy).items()}

    def objective():
        return np.sum(dy * case.forward())

    return {
        name: relative_error(analytic[name], method(objective, holder, key, h))
        for name, (holder, key) in case.places.items()
    }


def off_kinks(shape: tuple[int, ...], rng: np.random.Generator, margin: float = 0.05) -> np.ndarray:
    """Shuffled values, at least `margin` from 0 and from each other: no finite step crosses a kink or makes a tie."""
    n = int(np.prod(shape))
    return rng.permutation((np.arange(n) + 0.5 - n // 2) * 2 * margin).reshape(shape)


def layer_case(name: str, layer: Layer, shape: tuple[int, ...], rng: np.random.Generator, training=True) -> Case:
    """A layer with random parameters. It has seen another batch, so that any state it wrongly keeps shows up."""
    layer.params = {key: rng.standard_normal(array.shape) for key, array in layer.params.items()}
    y = layer.forward(off_kinks(shape, rng), training=True)
    layer.backward(rng.standard_normal(y.shape))
    inputs = {"x": off_kinks(shape, rng)}

    def forward():
        if isinstance(layer, Dropout):
            layer._rng = np.random.default_rng(DROPOUT_SEED)  # the same mask in each forward pass
        return layer.forward(inputs["x"], training)

    places = {"x": (inputs, "x"), **{key: (layer.params, key) for key in layer.params}}
    subject = type(layer).__name__.replace("1d", "").replace("BatchNorm2d", "BatchNorm")
    return Case(name, subject, forward, lambda dy: {"x": layer.backward(dy), **layer.grads}, places)


def loss_case(loss, prediction: np.ndarray, target: np.ndarray) -> Case:
    """A loss as a function of the prediction; its output is one number."""
    name, inputs = type(loss).__name__, {"x": prediction}

    def forward():
        return np.reshape(loss.forward(inputs["x"], target), 1)

    return Case(name, name, forward, lambda dy: {"x": loss.backward() * dy}, {"x": (inputs, "x")})


def network_case(name: str, network: Sequential, x: np.ndarray, loss, target: np.ndarray) -> Case:
    """The loss of a whole network in training, as a function of its input and of every parameter."""
    inputs = {"x": x}

    def forward():
        return np.reshape(loss.forward(network.forward(inputs["x"], training=True), target), 1)

    def backward(dy):
        dx = network.backward(loss.backward() * dy, need_dx=True)
        grads = {f"{i}.{key}": g for i, layer in enumerate(network.layers) for key, g in layer.grads.items()}
        return {"x": dx, **grads}

    places = {f"{i}.{key}": (layer.params, key) for i, layer in enumerate(network.layers) for key in layer.params}
    return Case(name, "Sequential", forward, backward, {"x": (inputs, "x"), **places})


def build_mlp(rng: np.random.Generator) -> Sequential:
    """(N, 6) → (N, 4); smooth, so that its error against h has no kink in it."""
    layers = [Linear(6, 8, "xavier", rng, F64), Tanh(), Linear(8, 8, "xavier", rng, F64), Sigmoid()]
    return Sequential(*layers, BatchNorm1d(8, dtype=F64), Linear(8, 4, "xavier", rng, F64))


def build_cnn(rng: np.random.Generator) -> Sequential:
    """(N, 1, 8, 8) → (N, 4), with each kind of layer for images.

    BatchNorm follows the ReLU: right behind a layer with a bias it would make that bias's true gradient zero.
    """
    return Sequential(
        Conv2d(1, 3, 3, padding=1, rng=rng, dtype=F64),  # (N, 3, 8, 8)
        ReLU(),
        BatchNorm2d(3, dtype=F64),
        MaxPool2d(3, 2),  # (N, 3, 3, 3)
        Conv2d(3, 4, 3, 2, 2, rng=rng, dtype=F64),  # (N, 4, 3, 3)
        Tanh(),
        AvgPool2d(2, 1),  # (N, 4, 2, 2)
        Flatten(),
        Linear(16, 4, rng=rng, dtype=F64),
    )


def build_embedding(rng: np.random.Generator) -> Sequential:
    """(N, 1, 8, 8) → (N, 4): patches of 4×4, the small twin of the network in train_numpy_vs_torch.py."""
    return Sequential(PatchEmbedding(4, 3, rng=rng, dtype=F64), ReLU(), Flatten(), Linear(12, 4, rng=rng, dtype=F64))


def build_cases(seed: int, subject: str | None = None) -> list[Case]:
    """Every layer, loss and network of the table, made anew from `seed`; or those of one subject alone."""
    layers = [
        ("Linear 4→4", lambda: Linear(4, 4, dtype=F64), (3, 4), True),
        ("Linear 5→3, batch 1", lambda: Linear(5, 3, dtype=F64), (1, 5), True),
        ("PatchEmbedding 2×2→3", lambda: PatchEmbedding(2, 3, dtype=F64), (2, 1, 4, 6), True),
        ("Conv2d 3×3", lambda: Conv2d(2, 3, 3, dtype=F64), (2, 2, 5, 6), True),
        ("Conv2d 3×3, padding 1", lambda: Conv2d(2, 2, 3, padding=1, dtype=F64), (2, 2, 4, 5), True),
        ("Conv2d 3×3, stride 2, padding 1", lambda: Conv2d(2, 2, 3, 2, 1, dtype=F64), (2, 2, 6, 5), True),
        ("Conv2d 2×2, stride 3, padding 2", lambda: Conv2d(1, 2, 2, 3, 2, dtype=F64), (2, 1, 5, 4), True),
        ("Conv2d 1×1, stride 2", lambda: Conv2d(2, 2, 1, 2, dtype=F64), (2, 2, 4, 4), True),
        ("MaxPool2d 2×2", lambda: MaxPool2d(2), (2, 2, 4, 5), True),
        ("MaxPool2d 3×3, stride 2", lambda: MaxPool2d(3, 2), (2, 2, 5, 6), True),
        ("AvgPool2d 2×2", lambda: AvgPool2d(2), (2, 2, 4, 5), True),
        ("AvgPool2d 3×3, stride 1", lambda: AvgPool2d(3, 1), (2, 2, 4, 5), True),
        ("BatchNorm1d, training", lambda: BatchNorm1d(3, dtype=F64), (5, 3), True),
        ("BatchNorm1d, evaluation", lambda: BatchNorm1d(3, dtype=F64), (5, 3), False),
        ("BatchNorm2d, training", lambda: BatchNorm2d(2, dtype=F64), (2, 2, 3, 3), True),
        ("BatchNorm2d, evaluation", lambda: BatchNorm2d(2, dtype=F64), (2, 2, 3, 3), False),
        ("Dropout 0.4, fixed mask", lambda: Dropout(0.4, dtype=F64), (4, 5), True),
        ("Flatten", Flatten, (2, 2, 2, 3), True),
        ("ReLU", ReLU, (4, 5), True),
        ("Sigmoid", Sigmoid, (4, 5), True),
        ("Tanh", Tanh, (4, 5), True),
    ]
    rng = np.random.default_rng([seed, 1])
    cases = [layer_case(name, make(), shape, rng, training) for name, make, shape, training in layers]
    labels = rng.integers(0, 4, 5)
    cases += [
        loss_case(SoftmaxCrossEntropy(), rng.standard_normal((5, 4)), labels),
        loss_case(MSE(), rng.standard_normal((5, 3)), rng.standard_normal((5, 3))),
    ]
    pixels, vectors = rng.standard_normal((5, 1, 8, 8)), rng.standard_normal((5, 6))
    cases += [
        network_case("MLP with BatchNorm1d, MSE", build_mlp(rng), vectors, MSE(), rng.standard_normal((5, 4))),
        network_case("PatchEmbedding network", build_embedding(rng), pixels, SoftmaxCrossEntropy(), labels),
        network_case("CNN with BatchNorm2d", build_cnn(rng), pixels, SoftmaxCrossEntropy(), labels),
    ]
    return [case for case in cases if subject in (None, case.subject)]
