"""mnist_svm_gabor: filters against their formula, the SVM against scikit-learn, the protocol."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.signal import correlate2d
from sklearn.svm import SVC, LinearSVC

from mnist_svm_gabor import protocol
from mnist_svm_gabor.features import BANKS, Preparation, deskew, principal_axes
from mnist_svm_gabor.gabor import CHUNK, GaborBank, pooling_windows
from mnist_svm_gabor.protocol import Grid, choose_and_fit, folds
from mnist_svm_gabor.svm import choose_svm, fit_svm
from shared_utils.cli import UserError
from shared_utils.data import load_images


def grating(size, f, theta, phase=0.0):
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    return 0.5 + 0.5 * np.cos(2 * np.pi * f * (x * np.cos(theta) + y * np.sin(theta)) + phase)


# --- the bank -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", [GaborBank(), BANKS[28], GaborBank(3, 2, 5, ratio=1.0)])
def test_kernels_have_zero_mean_and_unit_norm(bank):
    kernels = bank.kernels
    assert kernels.shape == (bank.orientations * bank.frequencies, bank.kernel_size, bank.kernel_size)
    np.testing.assert_allclose(kernels.sum((1, 2)), 0, atol=1e-12)
    np.testing.assert_allclose((kernels**2).sum((1, 2)), 1, rtol=1e-12)


def test_the_default_bank_has_twelve_kernels_and_they_follow_the_formula():
    bank = GaborBank(orientations=4, frequencies=3)
    assert len(bank.kernels) == 12
    f, theta, sigma = bank.cycles[1], bank.angles[3], bank.envelope / bank.cycles[1]
    assert (f, theta) == (pytest.approx(0.3), pytest.approx(3 * np.pi / 4))
    x = y = np.arange(-3, 4)
    expected, envelope = np.empty((7, 7)), np.empty((7, 7))
    for i in range(7):
        for j in range(7):
            along = x[j] * np.cos(theta) + y[i] * np.sin(theta)
            envelope[i, j] = np.exp(-(x[j] ** 2 + y[i] ** 2) / (2 * sigma**2))
            expected[i, j] = envelope[i, j] * np.cos(2 * np.pi * f * along)
    expected -= envelope * expected.sum() / envelope.sum()
    np.testing.assert_allclose(bank.kernels[4 + 3], expected / np.linalg.norm(expected), atol=1e-12)


def test_the_odd_partner_answers_to_the_edge_on_its_right():
    bank = GaborBank(orientations=1, frequencies=1)
    edge = np.tile(np.where(np.arange(7) > 3, 1.0, -1.0), (7, 1))
    odd = bank._kernels(-np.pi / 2)[0]
    assert (odd * edge).sum() > 0.5
    np.testing.assert_allclose(odd, -odd[:, ::-1], atol=1e-12)


@pytest.mark.parametrize("frequency", [0, 1, 2])
@pytest.mark.parametrize("resolution", BANKS)
def test_each_kernel_of_the_banks_answers_most_to_its_own_orientation(resolution, frequency):
    bank = replace(BANKS[resolution], energy=True)
    waves = np.stack([grating(40, bank.cycles[frequency], theta) for theta in bank.angles])
    energy = bank.maps(waves)[:, :, 10:30, 10:30].mean((2, 3)).numpy()  # (wave, kernel)
    own = energy[:, frequency * bank.orientations : (frequency + 1) * bank.orientations]
    assert own.argmax(1).tolist() == list(range(bank.orientations))


def test_each_kernel_answers_most_to_its_own_frequency():
    bank = GaborBank(orientations=1, frequencies=3, highest=0.4, ratio=0.5, kernel_size=15, envelope=0.7, energy=True)
    waves = np.stack([grating(40, f, 0.0) for f in bank.cycles])
    energy = bank.maps(waves)[:, :, 10:30, 10:30].mean((2, 3)).numpy()
    assert energy.argmax(1).tolist() == [0, 1, 2]


def test_energy_does_not_see_where_the_crests_are_and_rectified_maps_do():
    settings = {"orientations": 1, "frequencies": 1, "highest": 0.2, "kernel_size": 21, "envelope": 0.8}
    waves = np.stack([grating(40, 0.2, 0.0, phase) for phase in (0, np.pi / 3, np.pi / 2)])
    spread = {}
    for energy in (False, True):
        middle = GaborBank(**settings, energy=energy).maps(waves)[:, 0, 20, 20].numpy()
        spread[energy] = np.ptp(middle) / middle.max()
    assert spread[True] < 0.02
    assert spread[False] > 0.3


@pytest.mark.parametrize("energy", [False, True])
def test_features_equal_plain_loops(energy):
    bank = GaborBank(orientations=3, frequencies=2, kernel_size=5, pooling=3, power=0.5, energy=energy)
    image = np.random.default_rng(0).random((9, 12))
    maps = []
    even = [correlate2d(image, k, mode="same") for k in bank.kernels]
    if energy:
        odd = [correlate2d(image, k, mode="same") for k in bank._kernels(-np.pi / 2)]
        maps = [np.sqrt(e**2 + o**2) for e, o in zip(even, odd, strict=True)]
    else:
        maps = [np.maximum(e, 0) for e in even] + [np.maximum(-e, 0) for e in even]
    rows, columns = pooling_windows(9, 3, bank.window), pooling_windows(12, 3, bank.window)
    expected = [
        sum(m[i, j] * rows[i, p] * columns[j, q] for i in range(9) for j in range(12)) ** 0.5
        for m in maps
        for p in range(3)
        for q in range(3)
    ]
    found = bank.features(image[None])
    assert found.shape == (1, bank.n_features)
    np.testing.assert_allclose(found[0], expected, rtol=2e-5)


def test_chunks_change_nothing():
    images = np.random.default_rng(0).random((CHUNK + 3, 14, 14), dtype=np.float32)
    together = GaborBank().features(images)
    np.testing.assert_allclose(together[-3:], GaborBank().features(images[-3:]), rtol=1e-5, atol=1e-6)
    assert np.array_equal(together, GaborBank().features(images[:, None]))


def test_pooling_windows():
    weights = pooling_windows(28, 6, 0.6)
    np.testing.assert_allclose(weights.sum(0), 1, rtol=1e-6)
    assert np.allclose(weights, weights[::-1, ::-1])
    picked = pooling_windows(28, 7, 0)
    assert picked.argmax(0).tolist() == [1, 5, 9, 13, 17, 21, 25]
    assert picked.sum() == 7


@pytest.mark.parametrize(
    "wrong",
    [
        *({"kernel_size": 8}, {"kernel_size": 1}, {"orientations": 0}, {"highest": 0.6}, {"pooling": 0}, {"ratio": 2}),
        *({"ratio": -0.5}, {"envelope": 0}, {"window": -1}, {"power": 0}),
    ],
)
def test_a_bank_that_cannot_be(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GaborBank(**wrong)


def test_more_windows_than_pixels_are_refused():
    with pytest.raises(ValueError, match="20 pooling windows do not fit into 14"):
        GaborBank(pooling=20).features(np.zeros((1, 14, 14)))


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\)"):
        GaborBank().features(np.zeros((2, 3, 8, 8)))


# --- deskewing, projection ----------------------------------------------------------------------------------------


def moments(image):
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    mass = image.sum()
    my, mx = (image * y).sum() / mass, (image * x).sum() / mass
    return my, mx, (image * (y - my) * (x - mx)).sum() / mass


def test_deskewing_takes_the_slant_away_and_centres():
    y, x = np.mgrid[:28, :28]
    # Centred between two rows, so that reading between rows, which blurs, plays no part; faded before the edge.
    slanted = np.exp(-((x - 10 - 0.6 * (y - 15.5)) ** 2) / 4 - (y - 15.5) ** 2 / 16) * 255
    assert abs(moments(slanted)[2]) > 4
    upright = deskew(slanted[None, None])[0, 0]
    my, mx, covariance = moments(upright)
    assert (my, mx) == (pytest.approx(13.5, abs=0.05), pytest.approx(13.5, abs=0.05))
    assert abs(covariance) < 0.02
    np.testing.assert_allclose(deskew(upright[None, None])[0, 0], upright, atol=2)


def test_an_empty_image_and_one_of_a_single_row_survive_deskewing():
    images = np.zeros((2, 1, 28, 28), dtype=np.uint8)
    images[1, 0, 5, 3:20] = 200
    out = deskew(images)
    assert np.isfinite(out).all()
    assert out[0].max() == 0
    assert out[1].sum() == pytest.approx(images[1].sum(), rel=0.01)


def test_projection_whitens_as_much_as_asked():
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((5000, 6)) * [5, 4, 3, 2, 1, 0.5] @ np.linalg.qr(rng.standard_normal((6, 6)))[0]).astype(
        np.float32
    )
    variance = np.sort(np.linalg.eigvalsh(np.cov(x.T, bias=True)))[::-1]
    axes = principal_axes(x)
    for whitening in (0.0, 0.5, 1.0):
        z = axes.projection(6, whitening)(x)
        np.testing.assert_allclose(np.cov(z.T, bias=True), np.diag(variance ** (1 - whitening)), atol=2e-3)
        np.testing.assert_allclose(z.mean(0), 0, atol=1e-4)
    plain = axes.projection(6, 0.0)(x)
    np.testing.assert_allclose(np.linalg.norm(plain[0] - plain[1]), np.linalg.norm(x[0] - x[1]), rtol=1e-4)
    assert axes.projection(3, 0.5).matrix.shape == (6, 3)


def test_projection_leaves_out_directions_without_variance():
    x = np.random.default_rng(0).standard_normal((100, 5)).astype(np.float32)
    x[:, 3] = 7
    assert principal_axes(x).projection(5, 1.0).matrix.shape == (5, 4)


def test_fewer_images_than_numbers_leave_no_direction_that_is_only_rounding():
    x = Preparation(14)(load_images("digits", "train").x[:84])
    assert len(principal_axes(x[:84]).variances) <= 83
    z = principal_axes(x[:60]).projection(100, 1.0)(x)
    assert z.shape[1] <= 59
    assert z[60:].std(0).max() < 100 * z[:60].std(0).max()


@pytest.mark.parametrize("resolution", [14, 28])
def test_images_are_in_units_of_one(resolution):
    white = np.full((1, 1, 28, 28), 255, dtype=np.uint8)
    assert Preparation(resolution).images(white).min() == 1


# --- the SVM ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    y = np.arange(600) % 5
    x = (rng.standard_normal((5, 8))[y] * 1.2 + rng.standard_normal((600, 8))).astype(np.float32)
    return x[:400], y[:400], x[400:], y[400:]


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("kernel", ["rbf", "poly", "linear-ovo"])
def test_our_predictions_are_scikit_learns(blobs, kernel, n_classes):
    x, y, x_test, _ = blobs
    x, y = x[y < n_classes], y[y < n_classes]
    machine = fit_svm(x, y, kernel, C=2.0, gamma=0.7)
    gamma = 0.7 / x.var(0, dtype=np.float64).sum()
    name = kernel.removesuffix("-ovo")
    theirs = SVC(C=2.0, kernel=name, gamma=gamma, coef0=1.0, break_ties=n_classes > 2, decision_function_shape="ovr")
    theirs.fit(x, y)
    assert np.array_equal(machine.predict(x_test), theirs.predict(x_test))
    theirs.set_params(decision_function_shape="ovo", break_ties=False)
    decisions = theirs.decision_function(x_test)
    ours = machine.decide(x_test)
    if n_classes == 2:
        decisions = -decisions[:, None]
    np.testing.assert_allclose(ours, decisions, atol=2e-3)


@pytest.mark.parametrize("n_classes", [2, 5])
def test_one_against_the_rest_is_linear_svc(blobs, n_classes):
    x, y, x_test, _ = blobs
    x, y = x[y < n_classes], y[y < n_classes]
    theirs = LinearSVC(C=0.3, dual=False, tol=1e-3).fit(x, y)
    assert np.array_equal(fit_svm(x, y, "linear", C=0.3).predict(x_test), theirs.predict(x_test))


def test_a_missing_class_is_refused(blobs):
    x, y, _, _ = blobs
    with pytest.raises(ValueError, match="every class"):
        fit_svm(x[y != 2], y[y != 2], "rbf", C=1.0)


def test_an_unknown_kernel_is_refused(blobs):
    with pytest.raises(ValueError, match="kernel must be one of"):
        fit_svm(blobs[0], blobs[1], "sigmoid", C=1.0)


def test_the_search_puts_the_fewest_errors_first(blobs):
    x, y, x_val, y_val = blobs
    rows = choose_svm(x, y, x_val, y_val, "rbf", [0.01, 1.0], [0.1, 1.0])
    assert [row["val_errors"] for row in rows] == sorted(row["val_errors"] for row in rows)
    best = fit_svm(x, y, "rbf", rows[0]["C"], rows[0]["gamma"])
    assert rows[0]["val_errors"] == (best.predict(x_val) != y_val).sum()
    assert len(choose_svm(x, y, x_val, y_val, "linear", [0.1, 1.0], [0.1, 1.0])) == 2


def test_folds_are_disjoint_complete_and_few_images_get_five():
    y = np.arange(1200) % 10
    for n, count in ((1200, 1), (500, 5)):
        parts = folds(y[:n], np.random.default_rng(0), 10)
        assert len(parts) == count
        for train_at, val_at in parts:
            assert sorted([*train_at, *val_at]) == list(range(n))
            assert len(np.unique(y[train_at])) == 10
        if count == 5:
            assert sorted(np.concatenate([val_at for _, val_at in parts])) == list(range(n))
    with pytest.raises(UserError, match="too few"):
        folds(np.array([0, 0, 0, 0, 0, 0, 1]), np.random.default_rng(0), 2)
    with pytest.raises(UserError, match="too few"):
        folds(np.arange(50) % 2, np.random.default_rng(0), 3)  # a class that the subset has not at all


def test_the_protocol_counts_on_images_it_did_not_fit_and_refits_what_it_chose(blobs, monkeypatch):
    x, y, _, _ = blobs
    parts = [(np.arange(0, 300), np.arange(300, 350)), (np.arange(100, 400), np.arange(0, 50))]
    fitted_to, counted_on, refits = [], [], []

    def axes(vectors):
        fitted_to.append(vectors)
        return principal_axes(vectors)

    def trial(x_fit, y_fit, x_val, y_val, kernel, Cs, gammas):
        counted_on.append((len(x_fit), y_fit, y_val))
        return [{"C": C, "gamma": g, "val_errors": int(g != 0.7), "seconds": 0.0} for C in Cs for g in gammas]

    def refit(x, y, kernel, C, gamma):
        refits.append((len(x), x.shape[1], kernel, C, gamma))
        return fit_svm(x, y, kernel, C, gamma)

    monkeypatch.setattr(protocol, "principal_axes", axes)
    monkeypatch.setattr(protocol, "choose_svm", trial)
    monkeypatch.setattr(protocol, "fit_svm", refit)
    fitted = choose_and_fit(x, y, parts, "rbf", Grid([2.0], [0.1, 0.7], [0.5], [3]))
    assert [np.array_equal(a, b) for a, b in zip(fitted_to, (x[:300], x[100:], x), strict=True)] == [True] * 3
    assert all(np.array_equal(b, y[q]) for (_, _, b), (_, q) in zip(counted_on, parts, strict=True))
    assert all(np.array_equal(a, y[p]) for (_, a, _), (p, _) in zip(counted_on, parts, strict=True))
    assert refits == [(400, 3, "rbf", 2.0, 0.7)]
    assert fitted.trials[0] == {
        **{"components": 3, "whitening": 0.5, "C": 2.0, "gamma": 0.7},
        **{"val_errors": 0, "val_accuracy": 1.0, "seconds": 0.0},
    }
    assert fitted.trials[1]["val_errors"] == 2
