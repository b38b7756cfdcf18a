"""numpy_nn's own checks: the complex step, the planted bugs, receptive fields, the two regressions."""

import csv
import json

import numpy as np
import pytest

from numpy_nn import gradient_checking, mlp_regression, receptive_field, universal_approximation
from numpy_nn.activations import ReLU
from numpy_nn.checks import CHECKS, COMPLEX_BAR, FINITE_BAR, PLAIN
from numpy_nn.complex_step import (
    build_cases,
    central_difference,
    complex_step,
    gradient_errors,
    off_kinks,
    one_sided_difference,
)
from numpy_nn.layers import Linear
from numpy_nn.losses import MSE
from numpy_nn.mutations import build_mutations, planted
from shared_utils.cli import UserError, run_main


def rng(seed=0):
    return np.random.default_rng(seed)


# --- the complex step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [case.name for case in build_cases(0)])
def test_central_differences_and_the_complex_step_agree_with_backward(name):
    case = next(case for case in build_cases(3) if case.name == name)
    before = {name: holder[key].copy() for name, (holder, key) in case.places.items()}
    assert max(gradient_errors(case, central_difference, 1e-5, rng()).values()) < FINITE_BAR
    assert max(gradient_errors(case, complex_step, 1e-30, rng()).values()) < COMPLEX_BAR
    for name, (holder, key) in case.places.items():  # what was perturbed is put back, as real numbers
        assert np.array_equal(holder[key], before[name])
        assert holder[key].dtype == np.float64


@pytest.mark.parametrize("method", [complex_step, central_difference, one_sided_difference])
def test_the_methods_on_a_function_whose_derivative_is_known(method):
    holder = {"x": rng().uniform(0.5, 2, (2, 3))}
    x = holder["x"].copy()
    found = method(lambda: np.sum(np.exp(holder["x"]) / holder["x"]), holder, "x")
    tolerance = {complex_step: 1e-15, central_difference: 1e-9, one_sided_difference: 1e-6}[method]
    np.testing.assert_allclose(found, np.exp(x) * (x - 1) / x**2, rtol=tolerance, atol=tolerance)


def test_the_array_is_put_back_after_an_exception():
    holder = {"x": np.ones(2)}
    with pytest.raises(ZeroDivisionError):
        complex_step(lambda: 1 / 0, holder, "x")
    assert holder["x"].dtype == np.float64


def test_inputs_off_the_kinks():
    for shape in ((4, 5), (3, 3), (1,)):
        x = np.sort(off_kinks(shape, rng()).ravel())
        assert np.abs(x).min() >= 0.049
        assert len(x) == 1 or np.diff(x).min() >= 0.049


def test_the_table_has_every_layer_and_loss():
    subjects = {case.subject for case in build_cases(0)}
    assert subjects == set(PLAIN) - {"SGD", "RMSprop", "Adam", "He"} | {"Flatten"}
    assert {mutation.subject for mutation in build_mutations()} == set(PLAIN)


# --- planted bugs -------------------------------------------------------------------------------------------------


def outcome(subject):
    return [gradient_checking.verdict(check, subject, seed=1) for check in CHECKS.values()]


@pytest.mark.parametrize("subject", PLAIN)
def test_healthy_code_passes_every_check(subject):
    assert False not in outcome(subject)


def attributes(mutation):
    return [vars(owner)[name] for owner, name, _ in mutation.patches]


@pytest.mark.parametrize("mutation", build_mutations(), ids=lambda m: f"{m.subject}: {m.name}")
def test_every_bug_is_caught_and_leaves_no_trace(mutation):
    before = attributes(mutation)
    with planted(mutation):
        assert all(now is not then for now, then in zip(attributes(mutation), before, strict=True))
        assert False in outcome(mutation.subject)
    assert all(now is then for now, then in zip(attributes(mutation), before, strict=True))


def test_a_bug_is_taken_out_after_an_exception():
    bug = next(mutation for mutation in build_mutations() if mutation.subject == "ReLU")
    true = ReLU.backward
    with pytest.raises(ZeroDivisionError), planted(bug):
        1 / (ReLU.backward is true)
    assert ReLU.backward is true


def test_a_bug_is_in_the_library_only_while_it_is_planted():
    layer, x, dy = Linear(3, 2, rng=rng()), rng(1).standard_normal((4, 3)), rng(2).standard_normal((4, 2))

    def dW():
        layer.forward(x)
        layer.backward(dy)
        return layer.grads["W"]

    true = dW()
    with planted(build_mutations()[0]):
        assert np.array_equal(dW(), -true)
    assert np.array_equal(dW(), true)


def test_bugs_have_names_of_their_own_and_there_are_enough():
    names = [(mutation.subject, mutation.name) for mutation in build_mutations()]
    assert len(set(names)) == len(names) >= 22


def test_gradient_checking_reports_what_it_found(tmp_path):
    metrics = gradient_checking.main(["--quick", "--out", str(tmp_path)])
    assert metrics["caught"] == metrics["mutations"] >= 22
    assert metrics["false_alarms"] == 0
    assert metrics["worst_central"] < 1e-7
    assert metrics["worst_complex"] < 1e-12
    with (tmp_path / "mutations.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == metrics["mutations"]
    assert all("caught" in row.values() for row in rows)


def test_a_coarse_h_is_reported_as_the_false_alarm_that_it_is(tmp_path):
    metrics = gradient_checking.main(["--quick", "--h", "0.1", "--out", str(tmp_path)])
    assert metrics["worst_central"] > 1e-4
    assert metrics["false_alarms"] > 5


# --- receptive fields ---------------------------------------------------------------------------------------------


def test_the_recurrence_gives_the_known_fields():
    sizes = {name: receptive_field.theory(specs)[-1].size for name, specs in receptive_field.ARCHITECTURES.items()}
    assert sizes == {"lenet": 16, "three": 7, "strided": 15, "overlap": 21, "vgg": 40, "deep": 33}
    assert receptive_field.theory([("conv", 3, 1, 1)] * 3)[-1].of_unit(5) == (2, 8)


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("second", [("conv", 3, 1, 1), ("max", 2, 2, 0), ("avg", 3, 2, 0), ("conv", 2, 3, 2)])
def test_the_measured_field_is_the_theoretical_one(kernel, stride, second):
    specs = [("conv", kernel, stride, kernel // 2), second]
    size = receptive_field.image_size(specs)
    maps = receptive_field.measure(specs, 6, 6, 6, rng(kernel + 10 * stride))
    for field, at, image in zip(
        receptive_field.theory(specs), receptive_field.middle_units(specs, size), maps, strict=True
    ):
        top, bottom, left, right = receptive_field.support(image)
        assert (top, bottom) == (left, right) == field.of_unit(at)
        assert 0 < top <= bottom < size - 1  # the image's border is not what ends it
        assert image.sum() == pytest.approx(1)


def test_the_effective_size_of_known_maps():
    even = np.full((20, 20), 1 / 400)
    assert receptive_field.effective_size(even) == pytest.approx(np.sqrt(0.9545 * 400), abs=0.05)
    point = np.zeros((5, 5))
    point[2, 2] = 1
    assert receptive_field.effective_size(point) == 1
    i = np.arange(-40, 41)
    gauss = np.exp(-(i[:, None] ** 2 + i**2) / 2 / 6**2)
    # The disc that holds a share q of a 2-D Gaussian has the area −2π σ² ln(1 − q).
    assert receptive_field.effective_size(gauss / gauss.sum()) == pytest.approx(
        np.sqrt(-2 * np.pi * 36 * np.log(1 - 0.9545)), rel=0.01
    )


# --- regressions --------------------------------------------------------------------------------------------------


def test_more_units_fit_better_and_solving_the_last_layer_never_hurts_much(tmp_path):
    flags = ["--widths", "2", "16", "--seeds", "0", "1", "--epochs", "100", "--out", str(tmp_path)]
    metrics = universal_approximation.main(flags)
    rows = {(row["target"], row["width"]): row for row in metrics["rows"]}
    for target in universal_approximation.TARGETS:
        assert rows[target, 16]["rmse"] < rows[target, 2]["rmse"]
        assert rows[target, 16]["rmse_least_squares"] < 1.05 * rows[target, 16]["rmse"]
    assert rows["step", 16]["largest_error"] > 0.9  # no continuous function does better than 1 at a jump of 2
    assert json.loads((tmp_path / "metrics.json").read_text())["slope"]["sine"] < 0


def test_units_bend_inside_the_interval():
    network = universal_approximation.build_network(200, "relu", rng())
    W, b = (network.layers[0].params[key] for key in "Wb")
    bends = -b / W[0]
    assert np.abs(bends).max() <= 1
    assert bends.std() == pytest.approx(1 / np.sqrt(3), rel=0.1)


@pytest.mark.parametrize(("dim", "degree", "terms"), [(1, 5, 6), (2, 3, 10)])
def test_polynomials_of_a_degree_fit_a_polynomial_of_it_exactly(dim, degree, terms):
    x = rng().uniform(-1, 1, (60, dim))
    y = (x**degree).sum(1) - 2 * x[:, 0]
    features = mlp_regression.polynomial_features(x, degree)
    assert features.shape == (60, terms)
    weights, *_ = np.linalg.lstsq(features, y, rcond=None)
    np.testing.assert_allclose(features @ weights, y, atol=1e-12)


def test_the_regression_learns_and_keeps_its_best_epoch(tmp_path):
    args = mlp_regression.build_parser().parse_args(["--epochs", "120"])
    points = mlp_regression.draw_points(1, 200, 0.2, rng())
    network, history = mlp_regression.train(points, args, rng(1))
    kept = mlp_regression.rmse(network.forward(points.x_val), points.y_val)
    assert kept == pytest.approx(min(history["validation"]), rel=1e-12)
    assert mlp_regression.rmse(network.forward(points.x_test), points.y_test) < 0.15
    assert mlp_regression.rmse(points.y_test, points.y_test.mean()) > 0.5


def test_without_noise_the_points_lie_on_the_function():
    points = mlp_regression.draw_points(2, 50, 0.0, rng())
    assert np.array_equal(points.y_train, mlp_regression.franke(points.x_train))
    top = np.full((1, 2), 2 * 2 / 9 - 1)  # where Franke's own coordinates are 9x = 9y = 2
    terms = [0.75, 0.75 * np.exp(-9 / 49 - 3 / 10), 0.5 * np.exp(-25 / 4 - 1 / 4), -0.2 * np.exp(-4 - 25)]
    assert mlp_regression.franke(top)[0, 0] == pytest.approx(sum(terms), rel=1e-12)


@pytest.mark.parametrize("module", [mlp_regression, universal_approximation])
def test_a_bug_in_a_fit_keeps_its_traceback(module, tmp_path, monkeypatch):
    def bug(loss, prediction, target):
        raise ValueError("shapes (3,) and (4,) not aligned")

    monkeypatch.setattr(MSE, "forward", bug)
    with pytest.raises(ValueError, match="not aligned") as raised:
        module.main(["--quick", "--out", str(tmp_path / "out")])
    assert not isinstance(raised.value, UserError)


# --- bad input ----------------------------------------------------------------------------------------------------


def fails(module, flags, capsys, out):
    """The one line that `module` ends with; exit code 2."""
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: module.main([*flags, "--out", str(out)]), module.build_parser)
    assert stop.value.code == 2
    written = capsys.readouterr()
    assert len(written.err.strip().splitlines()) == 1, written.err
    return written.err


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (gradient_checking, ["--h", "0"], "finite number above 0"),
        (gradient_checking, ["--updates", "-1"], "whole number, 1 or more"),
        (gradient_checking, ["--dataset", "mnist"], "unrecognized arguments"),
        (receptive_field, ["--architecture", "resnet"], "invalid choice"),
        (receptive_field, ["--architecture", "all", "vgg"], "give it alone"),
        (receptive_field, ["--draws", "0"], "whole number, 1 or more"),
        (universal_approximation, ["--widths", "0"], "whole number, 1 or more"),
        (universal_approximation, ["--activation", "sigmoid"], "invalid choice"),
        (universal_approximation, ["--quick", "--lr", "1e30"], "not finite"),
        (mlp_regression, ["--noise", "-1"], "0 or more"),
        (mlp_regression, ["--lr", "nan"], "finite number above 0"),
        (mlp_regression, ["--quick", "--activation", "relu", "--lr", "1e300"], "try --lr 1e+299"),
    ],
)
def test_bad_input_ends_with_one_line(module, flags, message, tmp_path, capsys):
    assert message in fails(module, flags, capsys, tmp_path / "out")
