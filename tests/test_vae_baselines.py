"""vae's baselines with an exact likelihood, and the classifier that judges samples."""

import itertools
from argparse import Namespace

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree

from shared_utils.cli import UserError
from shared_utils.runs import ROOT
from shared_utils.seeding import seed_everything
from vae.baselines import BernoulliMixture, ChowLiuTree, IndependentBernoulli, maximum_spanning_tree
from vae.classifier import bent, class_probabilities, train_classifier
from vae.inputs import load_binary

D = 8
ALL = np.array(list(itertools.product([0, 1], repeat=D)), dtype=np.float32)  # (256, 8): every image there is
BRANCHES = [(0, 3), (3, 1), (3, 5), (5, 2), (5, 7), (0, 4), (4, 6)]  # a tree on 8 pixels
MODELS = ["independent", "tree", "mixture"]


def rng(seed=0):
    return np.random.default_rng(seed)


def tree_images(n, flip=0.2, seed=0):
    """Images whose pixels hang together as BRANCHES say: a child is its parent, flipped with probability `flip`."""
    x = (rng(seed).random((n, D)) < 0.35).astype(np.float32)
    for parent, child in BRANCHES:
        x[:, child] = np.abs(x[:, parent] - (rng([seed, child]).random(n) < flip))
    return x


def fitted(name, x):
    if name == "mixture":
        return BernoulliMixture(3, pseudo_count=1.5, tolerance=1e-4).fit(x, rng(1))
    return {"independent": IndependentBernoulli, "tree": ChowLiuTree}[name]().fit(x)


def bernoulli(x, p):
    """log p(x), pixel by pixel, without matrix products."""
    return np.log(np.where(x == 1, p, 1 - p)).sum(-1)


@pytest.mark.parametrize("n", [5, 400])
@pytest.mark.parametrize("name", MODELS)
def test_the_probabilities_of_all_images_sum_to_one(name, n):
    log_p = fitted(name, tree_images(n)).log_likelihood(ALL)
    assert log_p.shape == (2**D,)
    assert log_p.dtype == np.float64
    assert np.exp(log_p).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_samples_have_the_model_s_frequencies(name):
    n, model = 200_000, fitted(name, tree_images(400))
    p = np.exp(model.log_likelihood(ALL))
    x = model.sample(n, rng(7))
    assert x.dtype == np.uint8
    assert x.shape == (n, D)
    assert np.array_equal(x[:5], model.sample(n, rng(7))[:5])
    sampled = x.astype(np.float64)
    for found, expected in ((sampled.mean(0), p @ ALL), (sampled.T @ sampled / n, (ALL.T * p) @ ALL)):
        assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / n)).all()
    patterns = np.bincount(x @ (1 << np.arange(D)[::-1]), minlength=2**D) / n  # the order of ALL
    often = p * n > 50
    assert (np.abs(patterns - p) <= 5 * np.sqrt(p * (1 - p) / n))[often].all()


@pytest.mark.parametrize("name", MODELS)
def test_the_dtype_of_the_images_changes_nothing(name):
    x = tree_images(400)  # more than 255: a count in uint8 would overflow
    wanted = fitted(name, x).log_likelihood(x)
    for dtype in (np.uint8, bool, np.float64):
        np.testing.assert_array_equal(fitted(name, x.astype(dtype)).log_likelihood(x.astype(dtype)), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_bad_images_are_refused(name):
    x = tree_images(50)
    model = fitted(name, x)
    for value in (0.5, 255, -1, np.nan):
        bad = x.copy()
        bad[3, 2] = value
        for refused in (model.log_likelihood, lambda bad: fitted(name, bad)):
            with pytest.raises(ValueError, match=r"^the images must be binary .*$") as error:
                refused(bad)
            assert error.type is ValueError
    for bad in (x[:, :-1], x[0], x[None], x[:0]):
        with pytest.raises(ValueError, match=r"^the images must be of shape \(N, 8\), .*$"):
            model.log_likelihood(bad)
    for bad in (x[0], x[:0], x[:, :0]):
        with pytest.raises(ValueError, match=r"^the images must be of shape \(N, D\), .*$"):
            fitted(name, bad)


def test_the_parameters_are_counted():
    assert [fitted(name, tree_images(50)).parameters for name in MODELS] == [D, 2 * D - 1, 3 * D + 2]


def test_independent_pixels_are_counts_with_one_of_each_added():
    x = np.array([[1, 0, 1], [1, 0, 0], [1, 0, 1]])
    model = IndependentBernoulli().fit(x)
    np.testing.assert_allclose(model.p, [4 / 5, 1 / 5, 3 / 5], rtol=1e-15)
    np.testing.assert_allclose(model.log_likelihood([[1, 1, 0]]), np.log(4 / 5 * 1 / 5 * 2 / 5), rtol=1e-14)


@pytest.mark.parametrize("size", [1, 2, 5, 30])
def test_the_spanning_tree_is_the_heaviest(size):
    weights = rng(size).standard_normal((size, size))
    weights = weights + weights.T
    order, parent = maximum_spanning_tree(weights)
    assert sorted(order) == list(range(size))
    place = np.argsort(order)
    children = order[1:]
    assert (place[parent[children]] < place[children]).all()
    assert parent[order[0]] == order[0]
    best = -minimum_spanning_tree(-weights).sum()
    assert weights[parent[children], children].sum() == pytest.approx(best, rel=1e-12)


def test_the_tree_finds_the_edges_that_made_the_images():
    for seed in range(3):
        model = ChowLiuTree().fit(tree_images(4000, seed=seed))
        assert {frozenset(edge) for edge in model.edges.tolist()} == {frozenset(edge) for edge in BRANCHES}
        assert model.edges.shape == (D - 1, 2)


@pytest.mark.parametrize("n", [3, 60])
def test_the_tree_s_likelihood_is_the_chain_rule_of_its_counts(n):
    x = tree_images(n)
    model = ChowLiuTree().fit(x)
    (root,) = set(range(D)) - set(model.edges[:, 1].tolist())
    expected = np.array([np.log((np.sum(x[:, root] == image[root]) + 1) / (n + 2)) for image in ALL])
    for parent, child in model.edges:
        for k, image in enumerate(ALL):
            same = x[:, parent] == image[parent]
            expected[k] += np.log((np.sum(same & (x[:, child] == image[child])) + 0.5) / (np.sum(same) + 1))
    np.testing.assert_allclose(model.log_likelihood(ALL), expected, rtol=1e-12)


def test_the_tree_keeps_the_marginals_and_beats_independent_pixels():
    x = tree_images(300)
    tree, independent = ChowLiuTree().fit(x), IndependentBernoulli().fit(x)
    np.testing.assert_allclose(np.exp(tree.log_likelihood(ALL)) @ ALL, independent.p, rtol=1e-12)
    assert tree.log_likelihood(x).mean() > independent.log_likelihood(x).mean() + 0.5
    noise = (rng().random((300, D)) < 0.4).astype(np.float32)
    gain = ChowLiuTree().fit(noise).log_likelihood(noise) - IndependentBernoulli().fit(noise).log_likelihood(noise)
    assert 0 <= gain.mean() < 0.1


def objective(x, weights, p, a):
    """What EM raises, in nats per image, written out from the docstring's formula."""
    m = (x.sum(0, dtype=np.float64) + 1) / (len(x) + 2)
    likelihood = np.exp(bernoulli(x[:, None], p)) @ weights  # (N,)
    prior = np.log(weights).sum() + a * (m * np.log(p) + (1 - m) * np.log(1 - p)).sum()
    return np.log(likelihood).mean() + prior / len(x)


@pytest.mark.parametrize(("components", "a"), [(2, 0.1), (4, 2.0), (12, 30.0)])
def test_em_never_lowers_its_objective(components, a):
    x = tree_images(150)
    model = BernoulliMixture(components, a, tolerance=0, max_iterations=150).fit(x, rng(3))
    assert len(model.log_likelihoods) == len(model.objectives) > 20
    assert np.diff(model.objectives).min() > -1e-12
    last = objective(x, np.exp(model.log_weights), model.p, a)
    assert model.objectives[-1] <= last + 1e-12  # that of the parameters the last iteration began with
    assert last == pytest.approx(model.objectives[-1], abs=1e-3)


def test_em_ends_where_the_objective_is_flat():
    x, a, h = tree_images(300, flip=0.1)[:, :4], 1.5, 1e-5
    model = BernoulliMixture(2, a, tolerance=0, max_iterations=5000).fit(x, rng(2))
    at = np.concatenate([model.log_weights, np.log(model.p / (1 - model.p)).ravel()])

    def value(parameters):
        weights = np.exp(parameters[:2]) / np.exp(parameters[:2]).sum()
        return objective(x, weights, 1 / (1 + np.exp(-parameters[2:].reshape(2, 4))), a)

    slopes = [(value(at + h * e) - value(at - h * e)) / (2 * h) for e in np.eye(len(at))]
    assert np.abs(slopes).max() < 1e-7
    assert np.abs(model.p[0] - model.p[1]).max() > 0.2  # no saddle of two equal components


def test_em_stops_by_its_tolerance_and_at_the_limit():
    x = tree_images(300)
    model = BernoulliMixture(4, tolerance=1e-3).fit(x, rng())
    gains = np.diff(model.objectives)
    assert gains[-1] < 1e-3
    assert (gains[:-1] >= 1e-3).all()
    assert 3 < len(model.objectives) < 200
    assert len(BernoulliMixture(4, tolerance=0, max_iterations=7).fit(x, rng()).objectives) == 7


def test_components_that_start_from_equal_images_part():
    x = np.repeat([[0, 0, 0, 1, 1, 1], [1, 0, 1, 0, 1, 0]], 100, axis=0)  # three components, two kinds of image
    a, b, c = BernoulliMixture(3, max_iterations=1).fit(x, rng()).p
    assert min(np.abs(a - b).max(), np.abs(b - c).max(), np.abs(c - a).max()) > 1e-3


def test_em_finds_two_components_that_are_far_apart():
    p = np.array([[0.95, 0.9, 0.9, 0.9, 0.1, 0.1, 0.05, 0.1], [0.1, 0.05, 0.1, 0.1, 0.9, 0.95, 0.9, 0.9]])
    second = rng(4).random(4000) < 0.3
    x = (rng(5).random((4000, D)) < p[second.astype(int)]).astype(np.float32)
    model = BernoulliMixture(2).fit(x, rng(6))
    order = np.argsort(model.p[:, 4])
    np.testing.assert_allclose(np.exp(model.log_weights)[order], [0.7, 0.3], atol=0.03)
    np.testing.assert_allclose(model.p[order], p, atol=0.03)


def test_one_component_is_independent_pixels():
    x = tree_images(80)
    independent = IndependentBernoulli().fit(x)
    one = BernoulliMixture(1, pseudo_count=3).fit(x, rng())
    np.testing.assert_allclose(one.p[0], (x.sum(0) + 3 * independent.p) / (80 + 3), rtol=1e-12)
    np.testing.assert_allclose(one.log_likelihood(ALL), bernoulli(ALL, one.p[0]), rtol=1e-12)
    np.testing.assert_allclose(np.exp(one.log_weights), 1, rtol=1e-15)
    prior_alone = BernoulliMixture(1, pseudo_count=1e12).fit(x, rng())
    np.testing.assert_allclose(prior_alone.log_likelihood(ALL), independent.log_likelihood(ALL), rtol=1e-9)


def test_images_that_are_all_but_impossible_have_a_finite_likelihood():
    x = np.zeros((500, 900), dtype=np.float32)  # a product of 900 probabilities underflows
    x[:250, :450] = 1
    model = BernoulliMixture(2).fit(x, rng())
    log_p = model.log_likelihood(1 - x)
    assert np.isfinite(log_p).all()
    assert (log_p < -745).all()  # exp of which is 0


def test_a_mixture_that_cannot_be_is_one_line():
    for flags in ({"components": 0}, {"pseudo_count": 0}, {"max_iterations": 0}, {"tolerance": -1}):
        with pytest.raises(UserError, match=r"^a mixture needs .*$"):
            BernoulliMixture(**{"components": 2, **flags})
    with pytest.raises(UserError, match=r"^a mixture of 6 components needs as many images, got 5$"):
        BernoulliMixture(6).fit(tree_images(5), rng())


def data(dataset, **flags):
    return load_binary(Namespace(dataset=dataset, data_dir=ROOT / "data", val_size=100, **flags))


def digits_classifier(epochs, seed=0):
    found = data("digits", per_class=100)
    return found, train_classifier(found.x_train, found.y_train, 10, epochs, "cpu", seed_everything(seed))


def test_the_classifier_knows_the_embedded_digits():
    found, model = digits_classifier(8)
    p = class_probabilities(model, found.x_test)
    assert p.shape == (len(found.x_test), 10)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-5)
    assert (p.argmax(1) == found.y_test).mean() >= 0.88
    # Each image by itself, among others, after a training step's mode, in parts, as a square: the same answer.
    model.train()
    many = np.tile(found.x_test, (4, 1))
    np.testing.assert_allclose(class_probabilities(model, many)[-len(p) :], p, atol=1e-5)
    np.testing.assert_allclose(class_probabilities(model, found.x_test[:1]), p[:1], atol=1e-5)
    squares = found.x_test.reshape(-1, 14, 14).astype(np.uint8)
    np.testing.assert_allclose(class_probabilities(model, squares[:9]), p[:9], atol=1e-5)


def test_the_same_seed_gives_the_same_classifier():
    (found, first), (_, second), (_, other) = (digits_classifier(1, seed) for seed in (0, 0, 1))
    wanted = class_probabilities(first, found.x_test)
    assert np.array_equal(class_probabilities(second, found.x_test), wanted)
    assert not np.array_equal(class_probabilities(other, found.x_test), wanted)


def test_bent_images_are_binary_and_each_by_itself():
    x = torch.from_numpy((rng().random((1, 1, 14, 14)) < 0.5).astype(np.float32)).repeat(20, 1, 1, 1)
    assert torch.equal(bent(x, rng(), amount=0, shift=0), x)
    found = bent(x, rng())
    assert found.shape == x.shape
    assert ((found == 0) | (found == 1)).all()
    assert len(found.flatten(1).unique(dim=0)) == 20
    dot = torch.zeros(500, 1, 14, 14)
    dot[:, :, 6:8, 6:8] = 1
    rows = (bent(dot, rng(), amount=0, shift=2.0).sum((1, 3)) > 0).numpy()  # (500, 14): where the dot is now
    assert rows.any(0).nonzero()[0].tolist() == list(range(4, 10))  # two pixels up, two down, no further


def test_the_classifier_refuses_other_images():
    model = train_classifier(np.zeros((4, 196)), np.zeros(4, dtype=np.int64), 10, 1, "cpu", rng())
    for bad, message in (
        (np.zeros((3, 784)), "14×14"),
        (np.zeros(196), "14×14"),
        (np.full((3, 14, 14), 255), "binary"),
        (np.full((3, 196), np.nan), "binary"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            class_probabilities(model, bad)
        assert error.type is ValueError


needs_mnist = pytest.mark.skipif(not (ROOT / "data/MNIST/raw").is_dir(), reason="data/MNIST/raw is not there")


@needs_mnist
@pytest.mark.slow
def test_real_data_bars():
    found = data("mnist", per_class=1000)
    assert found.x_train.shape == (10_000, 196)
    mean = {
        type(model).__name__: model.log_likelihood(found.x_test).mean()
        for model in (
            IndependentBernoulli().fit(found.x_train),
            ChowLiuTree().fit(found.x_train),
            BernoulliMixture(200).fit(found.x_train, rng()),
        )
    }
    assert mean["IndependentBernoulli"] == pytest.approx(-49.34, abs=0.05)
    assert mean["ChowLiuTree"] == pytest.approx(-40.91, abs=0.1)
    assert mean["BernoulliMixture"] > -34
    model = train_classifier(found.x_train, found.y_train, 10, 16, "cpu", seed_everything(0))
    p = class_probabilities(model, found.x_test)
    assert (p.argmax(1) == found.y_test).mean() >= 0.975
