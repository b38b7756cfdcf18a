"""autoencoder's layers, losses, optimizers, models against central differences, autograd and torch.optim."""

import ast
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoencoder.layers import GELU, BatchNorm1d, Dropout, Linear, ReLU, Sigmoid, initial_weights
from autoencoder.losses import mean_squared_error, softmax_cross_entropy
from autoencoder.models import Autoencoder, ManualMLP, Network
from autoencoder.optimizers import SGD, AdamW
from shared_utils.cli import UserError
from shared_utils.gradcheck import check_gradients
from shared_utils.runs import ROOT

DIFFERENCES, AUTOGRAD = 1e-7, 1e-9


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def off_the_kinks(*shape, seed=0):
    x = normal(*shape, seed=seed)
    return x.sign() * (x.abs() + 0.1)


def shaken(network, seed=0):
    """The network in float64 with biases, scales and statistics that no longer are zeros and ones."""
    network.to(torch.float64)
    rng = np.random.default_rng(seed)
    for layer in network.layers:
        for name, value in {**layer.params, **layer.buffers}.items():
            if name != "W":
                value.add_(torch.from_numpy(rng.uniform(0.1, 0.6, value.shape)))
    return network


def differences(network, x, training, dropout_seed=3):
    """Relative errors of every parameter's gradient and of the input's, against central differences."""
    kept = {name: value.clone() for name, value in network.state_dict().items() if "running" in name}

    def forward():
        torch.manual_seed(dropout_seed)
        for name, value in network.state_dict().items():
            if name in kept:
                value.copy_(kept[name])
        return network.forward(x, training).numpy()

    def backward(dy):
        dx = network.backward(torch.from_numpy(dy), need_dx=True)
        found = {f"{i}.{name}": g.numpy() for i, layer in enumerate(network.layers) for name, g in layer.grads.items()}
        return {**found, "x": dx.numpy()}

    arrays = {"x": x.numpy(), **{name: value.numpy() for name, value in network.parameters().items()}}
    return check_gradients(forward, backward, arrays, np.random.default_rng(1))


def twin(network):
    """The same network of torch.nn's own modules, with copies of its weights and statistics."""
    modules = []
    for layer in network.layers:
        p, b = layer.params, layer.buffers
        if isinstance(layer, Linear):
            module = nn.Linear(*p["W"].shape)
            module.weight.data, module.bias.data = p["W"].T.clone(), p["b"].clone()
        elif isinstance(layer, BatchNorm1d):
            module = nn.BatchNorm1d(len(b["running_var"]), affine=bool(p), dtype=torch.float64)
            learned = {"weight": p["gamma"], "bias": p["beta"]} if p else {}
            module.load_state_dict({**learned, **b}, strict=False)  # all but the number of batches
        else:
            module = {ReLU: nn.ReLU, GELU: nn.GELU, Sigmoid: nn.Sigmoid}[type(layer)]()
        modules.append(module)
    return nn.Sequential(*modules)


def without_effect(network, training):
    """Shifts that a BatchNorm takes out again, with nothing but Linear layers in between: their gradient is zero."""
    names, ahead = set(), False  # ahead: a BatchNorm comes next, seen from the end
    for i, layer in reversed(list(enumerate(network.layers))):
        if ahead:
            names |= {f"{i}.{name}" for name in ("b", "beta") if name in layer.params}
        ahead = training and (isinstance(layer, BatchNorm1d) or (ahead and isinstance(layer, Linear)))
    return names


def close(a, b, tolerance=AUTOGRAD):
    scale = max(a.abs().max().item(), b.abs().max().item())
    return (a - b).abs().max().item() <= tolerance * scale


def agrees_with_autograd(network, x, training):
    reference = twin(network).train(training)
    leaf = x.clone().requires_grad_()
    expected = reference(leaf)
    output = network.forward(x, training)
    assert close(output, expected.detach())
    dy = normal(*output.shape, seed=5)
    expected.backward(dy)
    assert close(network.backward(dy, need_dx=True), leaf.grad)
    zero = without_effect(network, training)
    for i, (layer, module) in enumerate(zip(network.layers, reference, strict=True)):
        for name, g in layer.grads.items():
            theirs = (module.weight if name in ("W", "gamma") else module.bias).grad
            if f"{i}.{name}" in zero:
                assert g.abs().max() < 1e-12
            else:
                assert close(g, theirs.T if name == "W" else theirs), (layer, name)
        if isinstance(layer, BatchNorm1d):
            assert close(layer.buffers["running_mean"], module.running_mean)
            assert close(layer.buffers["running_var"], module.running_var)


# --- layers -------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": lambda: Linear(5, 3, "xavier"),
    "batchnorm": lambda: BatchNorm1d(5),
    "batchnorm without γ and β": lambda: BatchNorm1d(5, affine=False),
    "relu": ReLU,
    "gelu": GELU,
    "sigmoid": Sigmoid,
    "dropout": lambda: Dropout(0.4),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradients(name, training):
    network = shaken(Network([LAYERS[name]()], {}))
    assert max(differences(network, off_the_kinks(7, 5), training).values()) < DIFFERENCES
    if name != "dropout":
        agrees_with_autograd(network, off_the_kinks(7, 5, seed=2), training)


def test_gelu_is_exact_far_from_zero():
    layer, x = GELU(), torch.linspace(-8, 8, 201, dtype=torch.float64)[:, None].requires_grad_()
    F.gelu(x).sum().backward()
    assert (layer.forward(x.detach()) - F.gelu(x).detach()).abs().max() < 1e-12
    assert (layer.backward(torch.ones_like(x)) - x.grad).abs().max() < 1e-12


def test_batchnorm_follows_torch_over_batches_and_in_evaluation():
    layer, reference = BatchNorm1d(4), nn.BatchNorm1d(4, dtype=torch.float64)
    layer.to(torch.float64)
    for step, n in enumerate((2, 9, 5, 16, 3)):
        x = 3 * normal(n, 4, seed=step) + step
        assert close(layer.forward(x, training=True), reference(x).detach(), 1e-12)
    assert close(layer.buffers["running_mean"], reference.running_mean, 1e-12)
    assert close(layer.buffers["running_var"], reference.running_var, 1e-12)
    before, x = layer.buffers["running_var"].clone(), normal(6, 4, seed=9)
    assert close(layer.forward(x), reference.eval()(x).detach(), 1e-12)
    assert torch.equal(layer.buffers["running_var"], before)  # evaluation learns nothing
    assert close(layer.scale(), (reference.weight / (reference.running_var + 1e-5).sqrt()).detach(), 1e-12)


def test_dropout_keeps_the_mean_and_does_nothing_in_evaluation():
    torch.manual_seed(0)
    layer, x = Dropout(0.3), torch.ones(1000, 200)
    y = layer.forward(x, training=True)
    assert abs(y.mean().item() - 1) < 0.01
    assert abs((y == 0).double().mean().item() - 0.3) < 0.01
    assert torch.equal(layer.backward(x), y)
    assert torch.equal(layer.forward(x), x)
    assert torch.equal(layer.backward(x), x)


def test_initial_weights_have_their_variance():
    torch.manual_seed(0)
    for init, variance in (("he", 2 / 300), ("xavier", 2 / 1000)):
        w = initial_weights(300, 700, init)
        assert w.shape == (300, 700)
        assert w.var().item() == pytest.approx(variance, rel=0.03)
        assert abs(w.mean().item()) < 5 * math.sqrt(variance / w.numel())


def test_need_dx_false_gives_none_and_all_gradients():
    for network in (shaken(ManualMLP(4, [5], 3, use_batchnorm=True)), Network([BatchNorm1d(4)], {}).to(torch.float64)):
        dy = normal(*network.forward(normal(6, 4), True).shape, seed=1)
        assert network.backward(dy) is None
        assert all(layer.grads.keys() == layer.params.keys() for layer in network.layers)


# --- losses -------------------------------------------------------------------------------------------------------


def test_losses_against_differences_and_torch():
    y, target = torch.tensor([0, 2, 1, 2, 0, 2]), normal(6, 3, seed=2)
    pairs = [(softmax_cross_entropy, F.cross_entropy, y), (mean_squared_error, F.mse_loss, target)]
    for ours, theirs, wanted in pairs:
        logits = normal(6, 3)
        errors = check_gradients(
            lambda ours=ours, logits=logits, wanted=wanted: ours(logits, wanted)[0].numpy(),
            lambda dy, ours=ours, logits=logits, wanted=wanted: {"logits": dy * ours(logits, wanted)[1].numpy()},
            {"logits": logits.numpy()},
            np.random.default_rng(1),
        )
        assert errors["logits"] < DIFFERENCES
        leaf = logits.clone().requires_grad_()
        theirs(leaf, wanted).backward()
        assert close(ours(logits, wanted)[0], theirs(leaf, wanted).detach(), 1e-12)
        assert close(ours(logits, wanted)[1], leaf.grad)


def test_cross_entropy_of_huge_logits_is_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, -1e4, 0.0]])
    loss, gradient = softmax_cross_entropy(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(1e4)  # (0 + 2e4) / 2
    assert torch.equal(gradient, torch.tensor([[0.0, 0, 0], [0.5, -0.5, 0]]))


# --- optimizers ---------------------------------------------------------------------------------------------------


def groups(parameters, decay):
    weights, rest = ([v for name, v in parameters.items() if name.endswith("W") is wanted] for wanted in (True, False))
    return [{"params": weights, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_trajectories_are_those_of_torch(name, decay):
    torch.manual_seed(0)
    network = shaken(ManualMLP(4, [6], 3, use_batchnorm=True))
    copies = {key: nn.Parameter(value.clone()) for key, value in network.parameters().items()}
    momentum = {"sgd": 0.0, "momentum": 0.9}.get(name)
    if name == "adamw":
        ours, theirs = AdamW(network.layers, 0.01, weight_decay=decay), torch.optim.AdamW(groups(copies, decay), 0.01)
    else:
        ours = SGD(network.layers, 0.01, momentum, decay)
        theirs = torch.optim.SGD(groups(copies, decay), 0.01, momentum)
    for step in range(60):
        ours.lr = rate = 0.01 / (1 + step / 20)  # `lr` may be changed between steps
        for group in theirs.param_groups:
            group["lr"] = rate
        for i, layer in enumerate(network.layers):
            layer.grads = {k: normal(*v.shape, seed=100 * step + i) for k, v in layer.params.items()}
            for k, g in layer.grads.items():
                copies[f"{i}.{k}"].grad = g.clone()
        ours.step()
        theirs.step()
    for key, value in network.parameters().items():
        assert (value - copies[key].detach()).abs().max() < 1e-12, key


def test_optimizers_refuse_nonsense():
    layers = [Linear(2, 2)]
    for make in (lambda: SGD(layers, 0.0), lambda: SGD(layers, 0.1, 1.0), lambda: AdamW(layers, 0.1, weight_decay=-1)):
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(ValueError, match="call backward before step"):
        SGD(layers, 0.1).step()


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_batchnorm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "linear"])
@pytest.mark.parametrize("hidden", [[], [6], [6, 5]])
def test_perceptron_gradients(hidden, activation, use_batchnorm, training):
    torch.manual_seed(1)
    network = shaken(ManualMLP(4, hidden, 3, activation, "xavier", use_batchnorm))
    check_network(network, normal(9, 4), training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_batchnorm", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", "linear"])
def test_autoencoder_gradients(activation, use_batchnorm, training):
    torch.manual_seed(2)
    network = shaken(Autoencoder((6, 3), None, activation, "he", use_batchnorm, in_features=8))
    check_network(network, normal(9, 8), training)


def check_network(network, x, training):
    """Central differences and autograd."""
    agrees_with_autograd(network, x, training)
    dead = without_effect(network, training)
    parameters = network.parameters()
    network.parameters = lambda: {name: value for name, value in parameters.items() if name not in dead}
    errors = differences(network, x, training)
    assert len(errors) == len(parameters) - len(dead) + 1
    assert max(errors.values()) < DIFFERENCES, errors


def test_a_network_with_dropout():
    network = shaken(ManualMLP(4, [6, 5], 3, "gelu", dropout=0.4))
    assert max(differences(network, normal(9, 4), True).values()) < DIFFERENCES


def test_parameter_counts_and_shapes():
    def count(network):
        return sum(value.numel() for value in network.parameters().values())

    network = Autoencoder((256, 128))
    expected = 784 * 256 + 256 + 2 * 256 + 256 * 128 + 128 + 128 * 256 + 256 + 2 * 256 + 256 * 784 + 784
    assert count(network) == expected
    assert (network.latent, Autoencoder((9, 5, 2)).config["dec_dims"]) == (128, [5, 9])
    assert count(Autoencoder((256, 128), use_batchnorm=False)) == expected - 4 * 256
    assert count(Autoencoder((9, 2), [5, 7], use_batchnorm=False, in_features=10)) == 99 + 20 + 15 + 42 + 80
    assert count(ManualMLP(4, [6, 5], 3)) == 30 + 35 + 18
    x = torch.rand(3, 784)
    assert network.encode(x).shape == (3, 128)
    assert network.forward(x).shape == (3, 784)
    assert 0 <= network.forward(x).min() <= network.forward(x).max() <= 1
    assert torch.equal(network.decode(network.encode(x)), network.predict(x))
    assert not any(
        isinstance(layer, Sigmoid | ReLU | GELU) for layer in Autoencoder((5, 2), activation="linear").layers
    )


def test_effective_weights_multiply_to_the_jacobian_of_a_linear_encoder():
    network = shaken(Autoencoder((6, 5, 3), activation="linear", in_features=8))
    for _ in range(3):
        network.forward(normal(20, 8, seed=4) * 3, training=True)
    weights = network.effective_weights()
    assert [tuple(w.shape) for w in weights] == [(8, 6), (6, 5), (5, 3)]
    jacobian = network.encode(torch.eye(8, dtype=torch.float64)) - network.encode(torch.zeros(1, 8).double())
    assert close(weights[0] @ weights[1] @ weights[2], jacobian)


def test_predict_in_parts_is_one_pass():
    network, x = shaken(Autoencoder((5, 2), in_features=6)), normal(10_003, 6)
    parts = network.predict(x)
    assert parts.shape == x.shape
    assert close(parts, network.forward(x), 1e-12)


def test_state_makes_the_round_trip_and_refuses_others():
    network = shaken(Autoencoder((5, 2), in_features=6))
    other = Autoencoder(**network.config).to(torch.float64)
    assert other.config == network.config
    x = normal(7, 6)
    assert not close(other.predict(x), network.predict(x))
    other.load_state_dict({name: value.clone() for name, value in network.state_dict().items()})
    assert torch.equal(other.predict(x), network.predict(x))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    spoilt = {name: value + 1 for name, value in before.items()}
    last = list(spoilt)[-1]
    spoilt[last] = torch.full_like(spoilt[last], math.nan)
    wrong = Autoencoder((4, 2), in_features=6).to(torch.float64).state_dict()
    less = {name: value + 1 for name, value in before.items() if name != last}
    for state, message in ((spoilt, "NaN"), (wrong, "another network"), (less, "another network")):
        with pytest.raises(UserError, match=message) as error:
            other.load_state_dict(state)
        assert "\n" not in str(error.value)
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_to_float64_moves_parameters_and_buffers():
    network = Autoencoder((5, 2), in_features=6).to(torch.float64)
    assert {value.dtype for value in network.state_dict().values()} == {torch.float64}
    assert network.forward(normal(4, 6), training=True).dtype == torch.float64


BAD = {
    "batch of one": (lambda: BatchNorm1d(3).forward(torch.zeros(1, 3), training=True), "batch of one"),
    "code above the input": (lambda: Autoencoder((9,), in_features=8), "K = 9 .* input of 8"),
    "no code": (lambda: Autoencoder(()), "at least one"),
    "activation": (lambda: ManualMLP(2, [3], 1, activation="tanh"), "activation must be one of relu, gelu, linear"),
    "init": (lambda: Linear(2, 3, "zeros"), "init must be he or xavier"),
    "no feature": (lambda: Linear(0, 3), "at least one feature"),
    "dropout": (lambda: Dropout(1.0), "below 1"),
    "columns": (lambda: Linear(4, 3).forward(torch.zeros(2, 5)), r"\(N, 4\), got \(2, 5\)"),
    "axes": (lambda: Linear(4, 3).forward(torch.zeros(4)), r"\(N, 4\), got \(4,\)"),
    "mse": (lambda: mean_squared_error(torch.zeros(3, 1), torch.zeros(3)), "differ in shape"),
    "labels": (lambda: softmax_cross_entropy(torch.zeros(3, 2), torch.zeros(4, dtype=torch.long)), "cross-entropy"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_shapes_that_do_not_fit_are_a_bug(name):
    with pytest.raises(ValueError, match=BAD[name][1]) as error:
        BAD[name][0]()
    assert error.type is (ValueError if name in ("columns", "axes", "mse", "labels") else UserError)
    assert "\n" not in str(error.value)


# --- autograd stays out -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "autoencoder").glob("*.py")), ids=lambda path: path.name)
def test_nothing_asks_autograd(path):
    if path.name == "benchmark.py":  # which measures against it
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"requires_grad", "requires_grad_", "autograd", "enable_grad", "zero_grad", "Parameter", "optim"}
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if re.match(r"torch\.(nn|autograd|optim|func)", name)]
    called = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    assert all(call.args for call in called if call.func.attr == "backward")  # a tensor's takes none
