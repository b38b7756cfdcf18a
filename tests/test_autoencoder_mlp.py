"""autoencoder's train_mlp.py, and the networks in training: without autograd, in bfloat16, down to zero loss."""

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from autoencoder import train_mlp
from autoencoder.layers import Linear
from autoencoder.models import Autoencoder, Classifier, Regressor
from autoencoder.optimizers import SGD, AdamW
from autoencoder.problems import NOISE, Problem, chirp, noisy_chirp, spirals
from autoencoder.train_mlp import VARIANTS, effect, said, signal_through_depth
from shared_utils.device import autocast


def all_tensors(thing):
    for value in vars(thing).values():
        yield from value.values() if isinstance(value, dict) else [value] if isinstance(value, torch.Tensor) else []


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.set_grad_enabled(False), torch.enable_grad])
def test_a_training_step_needs_no_autograd(context):
    with context():
        network, x = Autoencoder((5, 2), in_features=6), torch.rand(8, 6)
        optimizer = AdamW(network.layers, 0.01, weight_decay=0.1)
        before = network.loss(network.forward(x, True), x)[0].item()
        for _ in range(30):
            loss, gradient = network.loss(network.forward(x, True), x)
            network.backward(gradient)
            optimizer.step()
        assert loss.item() < before
        memory = [tensor for state in optimizer.state.values() for tensor in state.values()]
        seen = [tensor for layer in network.layers for tensor in all_tensors(layer)] + memory
        assert len(seen) > 40
        assert not any(tensor.requires_grad for tensor in [*seen, loss, gradient])


def test_bfloat16_products_leave_float32_gradients_close():
    torch.manual_seed(0)
    network, x = Autoencoder((64, 16), activation="gelu", in_features=100), torch.rand(128, 100)
    found = {}
    for amp in (False, True):
        with autocast(torch.device("cpu"), amp):
            output = network.forward(x, training=True)
            network.backward(network.loss(output, x)[1])
        assert output.dtype == torch.float32
        found[amp] = {(i, k): g for i, layer in enumerate(network.layers) for k, g in layer.grads.items()}
    differs = False
    for key, full in found[False].items():
        half = found[True][key]
        assert half.dtype == torch.float32
        if full.norm() > 1e-6:  # a bias before BatchNorm: zero up to rounding
            error = ((half - full).norm() / full.norm()).item()
            assert error < 0.05, key
            differs |= error > 1e-4
    assert differs  # bfloat16 was used


def test_overfits_a_batch():
    torch.manual_seed(0)
    network, x = Autoencoder((64, 32), activation="gelu", in_features=196), torch.rand(8, 196)
    optimizer = AdamW(network.layers, 5e-3)
    for _ in range(800):
        loss, gradient = network.loss(network.forward(x, training=True), x)
        network.backward(gradient)
        optimizer.step()
    assert loss.item() < 1e-4  # the variance of the pixels is 1/12


def test_a_classifier_and_a_regressor_learn():
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((60, 2))).float()
    y = (x[:, 0] * x[:, 1] > 0).long()
    torch.manual_seed(0)
    for network, target in ((Classifier(2, [32], 2), y), (Regressor(2, [32], 1), x[:, :1] * x[:, 1:])):
        optimizer = SGD(network.layers, 0.1)
        for _ in range(500):
            loss, gradient = network.loss(network.forward(x, training=True), target)
            network.backward(gradient)
            optimizer.step()
        assert loss.item() < 0.05
        if isinstance(network, Classifier):
            assert network.accuracy(x, y) == 1
            assert network.accuracy(x, 1 - y) == 0


# --- the problems -------------------------------------------------------------------------------------------------


def problem(draw, seed=0):
    return Problem(draw, seed, torch.device("cpu"))


def arguments(*flags):
    return train_mlp.build_parser().parse_args(["--hidden", "8", "--epochs", "3", *flags])


def test_spirals_are_balanced_repeatable_and_curved():
    x, y = spirals(600, np.random.default_rng(0))
    assert np.bincount(y).tolist() == [200] * 3
    assert np.array_equal(x, spirals(600, np.random.default_rng(0))[0])
    assert not np.array_equal(x, spirals(600, np.random.default_rng(1))[0])
    design = np.c_[x, np.ones(600)]
    line = np.linalg.lstsq(design, np.eye(3)[y], rcond=None)[0]
    assert ((design @ line).argmax(1) == y).mean() < 0.7  # no straight boundaries
    distance = ((x[:, None] - x[None]) ** 2).sum(-1) + np.diag(np.full(600, np.inf))
    assert (y[distance.argmin(1)] == y).mean() > 0.95


def test_the_sine_s_noise_and_standardisation():
    x, y = noisy_chirp(50_000, np.random.default_rng(0))
    assert (y - chirp(x)).std() == pytest.approx(NOISE, rel=0.02)
    found = problem(noisy_chirp)
    assert abs(found.y["train"].mean().item()) < 1e-6
    assert found.y["train"].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    restored = found.y["test"].numpy() * found.y_std + found.y_mean
    np.testing.assert_allclose(restored, found.drawn["test"][1], atol=1e-5)
    assert {len(found.x[part]) for part in ("train", "val")} == {300}
    parts = [set(map(float, found.x[part][:, 0])) for part in ("train", "val", "test")]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_scores_are_in_their_units():
    found = problem(noisy_chirp)
    network = found.build([], False, "he")
    for layer in network.layers:
        layer.params = {name: torch.zeros_like(value) for name, value in layer.params.items()}
    loss, mse = found.measure(network, "train")  # the mean is predicted
    assert loss == pytest.approx(1, rel=1e-4)
    assert mse == pytest.approx(found.drawn["train"][1].var(), rel=1e-4)
    found = problem(spirals)
    network = found.build([], False, "he")
    for layer in network.layers:
        layer.params = {name: torch.zeros_like(value) for name, value in layer.params.items()}
    network.layers[0].params["b"][1] = 5.0  # always class 1
    assert found.measure(network, "val")[1] == pytest.approx(1 / 3)


# --- training and comparing ---------------------------------------------------------------------------------------


def test_the_objective_is_data_term_and_l2_and_training_lowers_it(monkeypatch):
    monkeypatch.setattr(train_mlp, "WEIGHT_DECAY", 0.1)
    found, args = problem(noisy_chirp), arguments("--epochs", "20")
    network, curves = train_mlp.train(found, False, "xavier", 0, 0.01, args)
    squares = sum(layer.params["W"].square().sum().item() for layer in network.layers if isinstance(layer, Linear))
    for part in ("train", "val"):
        loss, score = found.measure(network, part)
        assert curves[f"{part}_loss"][-1] == pytest.approx(loss + 0.05 * squares, rel=1e-5)
        assert curves[f"{part}_score"][-1] == pytest.approx(score)
    assert {len(values) for values in curves.values()} == {21}
    assert curves["train_loss"][-1] < curves["train_loss"][0]


def test_variants_share_their_draws_and_a_swap_changes_the_first_layer_alone():
    found, args = problem(noisy_chirp), arguments()
    args.epochs = 0
    he, xavier, swapped = (
        train_mlp.train(found, False, init, 0, 0.01, args, first)[0].parameters()
        for init, first in (("he", None), ("xavier", None), ("he", "xavier"))
    )
    assert torch.allclose(he["0.W"] / xavier["0.W"], torch.tensor(((1 + 8) / 1) ** 0.5))  # D = 1, M = 8
    assert torch.equal(swapped["0.W"], xavier["0.W"])
    assert torch.equal(swapped["2.W"], he["2.W"])


def test_the_rate_is_chosen_on_validation(monkeypatch):
    last, soon = {0.1: 5.0, 0.2: 2.0, 0.3: 3.0}, {0.1: 6.0, 0.2: 7.0, 0.3: 8.0}

    def train(found, use_batchnorm, init, seed, lr, args):
        if lr == 0.4:
            raise train_mlp.Diverged("diverged")
        scores = np.array([0.0, soon[lr] + seed, last[lr] + seed])
        return f"network at {lr}", {"val_score": scores, "val_loss": 10 * scores}

    monkeypatch.setattr(train_mlp, "train", train)
    args = arguments("--lr", "0.1", "0.4", "0.2", "0.3", "--epochs", "2")
    for draw, best, early in ((noisy_chirp, 0.2, 0.1), (spirals, 0.1, 0.3)):  # a small error, a large accuracy
        found = train_mlp.fit_variant(problem(draw), "BatchNorm, He", [0, 1], 1, args)
        assert found.lr == best
        assert found.curves["val_score"][:, -1].tolist() == [last[best], last[best] + 1]
        assert list(found.at) == [1, 2]
        for epoch, score in ((1, soon[early]), (2, last[best])):
            assert found.at[epoch]["val_score"].tolist() == [score, score + 1]
            assert found.at[epoch]["val_loss"].tolist() == [10 * score, 10 * score + 10]
        assert found.networks == [f"network at {best}"] * 2
        assert found.score_by_lr == {"0.1": 5.5, "0.4": None, "0.2": 2.5, "0.3": 3.5}
    with pytest.raises(train_mlp.UserError, match=r"no rate of --lr works: diverged"):
        train_mlp.fit_variant(problem(spirals), "BatchNorm, He", [0], 1, arguments("--lr", "0.4"))


def test_a_mistake_or_a_bug_is_not_taken_for_a_rate_that_diverges(monkeypatch):
    args = arguments("--lr", "0.1", "0.2")
    args.batch_size = 1
    with pytest.raises(train_mlp.UserError, match=r"^BatchNorm cannot be trained on a batch of one image"):
        train_mlp.fit_variant(problem(spirals), "BatchNorm, He", [0], 1, args)

    def columns_missing(layer, x, training=False):
        return forward(layer, x[:, 1:], training)

    forward = Linear.forward
    monkeypatch.setattr(Linear, "forward", columns_missing)
    with pytest.raises(ValueError, match="takes an input of shape") as error:
        train_mlp.fit_variant(problem(spirals), "BatchNorm, He", [0], 1, args)
    assert error.type is ValueError


def test_effects_are_paired_and_their_intervals_student_s():
    rng = np.random.default_rng(0)
    seeds = 10 * rng.standard_normal(5)  # shared by the variants: pairing takes it out
    shift = {(True, "he"): 5.0, (True, "xavier"): 3.0, (False, "he"): 1.0, (False, "xavier"): 1.0}
    values = {name: seeds + shift[levels] + 0.1 * rng.standard_normal(5) for name, levels in VARIANTS.items()}
    batchnorm, he = effect(values, 0), effect(values, 1)
    assert batchnorm["mean"] == pytest.approx(3, abs=0.3)
    assert he["mean"] == pytest.approx(1, abs=0.3)
    assert batchnorm["clear"]
    with_, without = ([values[n] for n, levels in VARIANTS.items() if levels[0] is on] for on in (True, False))
    interval = ttest_1samp(np.mean(with_, 0) - np.mean(without, 0), 0).confidence_interval(0.95)
    assert batchnorm["mean"] - batchnorm["half_width"] == pytest.approx(interval.low)
    noise = {name: rng.standard_normal(3) for name in VARIANTS}
    assert not effect({**noise, "BatchNorm, He": np.array([9.0, -9.0, 0.5])}, 0)["clear"]
    words = said({"batchnorm_minus_none": batchnorm, "he_minus_xavier": effect(noise, 1)})
    assert "BatchNorm − none +" in words
    assert "(clear); He − Xavier" in words
    one = effect({name: value[:1] for name, value in values.items()}, 0)
    assert (one["half_width"], one["clear"]) == (None, False)
    assert "one seed" in said({"batchnorm_minus_none": one, "he_minus_xavier": one})


def test_the_signal_halves_its_power_a_layer_with_xavier_alone():
    depth = 10
    found = {name: np.mean([signal_through_depth(*v, depth, s) for s in range(4)], 0) for name, v in VARIANTS.items()}
    power = {name: (values[0, -1] / values[0, 0]) ** 2 for name, values in found.items()}
    assert power["no BatchNorm, Xavier"] == pytest.approx(0.5 ** (depth - 1), rel=0.5)
    assert power["no BatchNorm, He"] == pytest.approx(1, rel=0.5)
    assert power["BatchNorm, Xavier"] == pytest.approx(1, rel=0.1)
    back = {name: (values[1, 0] / values[1, -1]) ** 2 for name, values in found.items()}
    assert back["no BatchNorm, Xavier"] == pytest.approx(0.5 ** (depth - 1), rel=0.5)
    assert back["no BatchNorm, He"] == pytest.approx(1, rel=0.5)
    # Through BatchNorm and ReLU the gradient's power grows by π / (π − 1) a layer: Yang et al. 2019.
    assert back["BatchNorm, He"] ** (1 / (depth - 1)) == pytest.approx(np.pi / (np.pi - 1), rel=0.1)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "0"], "finite number above 0"),
        (["--hidden", "0"], "1 or more"),
        (["--seeds", "-1"], "from 0 to"),
        (["--depth-probe", "0"], "1 or more"),
    ],
)
def test_wrong_flags(flags, message, fails, tmp_path):
    assert message in fails(train_mlp, [*flags, "--out", tmp_path / "out"], tmp_path / "out")


@pytest.mark.parametrize(("flags", "message"), [(["--lr", 1e30], "step"), (["--batch-size", 1], "batch of one")])
def test_what_cannot_be_trained_ends_in_one_line(flags, message, fails, tmp_path):
    flags = ["--quick", "--seeds", 0, "--epochs", 2, "--hidden", 4, *flags, "--out", tmp_path / "out"]
    assert message in fails(train_mlp, flags)
