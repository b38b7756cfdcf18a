"""The measures of codes and maps against scikit-learn and by hand, and what ae_umap.py refuses."""

import numpy as np
import pytest
import torch
from scipy.spatial import procrustes
from sklearn.manifold import trustworthiness as sklearn_trustworthiness
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from autoencoder import ae_umap, embedding
from autoencoder.embedding import (
    _apart,
    continuity,
    knn_accuracy,
    knn_accuracy_leave_one_out,
    nearest,
    silhouette,
    trustworthiness,
)
from shared_utils import checkpoint
from shared_utils.cli import UserError
from shared_utils.data import load_images


def points(n, d, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)))


def labels(n, classes, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, classes, n))


# --- neighbours ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 97, 500])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_nearest_is_scikit_learns(chunk, exclude_self):
    x = points(97, 5)
    queries = x if exclude_self else points(31, 5, seed=1)
    distances, positions = nearest(queries, x, 6, exclude_self, chunk)
    oracle = NearestNeighbors(n_neighbors=6, algorithm="brute").fit(x)
    expected = oracle.kneighbors(None if exclude_self else queries)
    np.testing.assert_array_equal(positions, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-12)


def test_nearest_is_exact_in_float32_far_from_the_origin():
    # ‖a‖² + ‖b‖² − 2a·b is wrong by 1 here, where squared distances are about 1e-4.
    x = (points(400, 3) / 100 + 1000).float()
    distances, positions = nearest(x, x, 5, exclude_self=True)
    expected = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(x.double().numpy() - 1000).kneighbors()
    np.testing.assert_allclose(distances, expected[0], rtol=1e-5)
    assert (positions.numpy() == expected[1]).mean() > 0.995  # x has steps of 6e-5: a few distances are equal


def test_nearest_of_equally_distant_rows_is_the_first():
    x = torch.tensor([[0.0], [1.0], [1.0], [-1.0], [5.0]])
    assert nearest(x, x, 3, exclude_self=True)[1][0].tolist() == [1, 2, 3]
    assert nearest(x, x, 1, exclude_self=True)[1][:, 0].tolist() == [1, 2, 1, 0, 1]
    grid = torch.from_numpy(np.random.default_rng(0).permutation(np.repeat(np.arange(100) ** 2, 3))[:, None]).float()
    order = (grid - grid.T).abs().sort(stable=True).indices
    np.testing.assert_array_equal(nearest(grid, grid, 8)[1], order[:, :8])
    assert nearest(x.to(torch.uint8)[:3], x.to(torch.uint8)[:3], 1)[0].tolist() == [[0], [0], [0]]


def test_all_others_can_be_neighbours_but_not_more():
    x = points(5, 2)
    for own, row in enumerate(nearest(x, x, 4, exclude_self=True)[1].tolist()):
        assert sorted([*row, own]) == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="5 neighbours among 4"):
        nearest(x, x, 5, exclude_self=True)
    with pytest.raises(ValueError, match="itself"):
        nearest(x[:3], x, 1, exclude_self=True)


@pytest.mark.parametrize("k", [1, 4, 5])  # an even k has ties in the vote
def test_knn_accuracy_is_scikit_learns(k):
    x, y = points(300, 4), labels(300, 3)
    test, y_test = points(201, 4, seed=1), labels(201, 3, seed=1)
    oracle = KNeighborsClassifier(k, algorithm="brute")
    assert knn_accuracy(x, y, test, y_test, k) == oracle.fit(x, y).score(test, y_test)
    votes = [
        oracle.fit(np.delete(x.numpy(), i, 0), np.delete(y.numpy(), i)).predict(x[i : i + 1])[0] for i in range(100)
    ]
    _, found = nearest(x, x, k, exclude_self=True)
    assert embedding._vote(y[found])[:100].tolist() == votes
    with_self = knn_accuracy(x, y, x, y, k)
    assert knn_accuracy_leave_one_out(x, y, k) == (embedding._vote(y[found]) == y).double().mean() < with_self


# --- maps ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 12, 40])
@pytest.mark.parametrize("chunk", [7, 500])
def test_trustworthiness_and_continuity_are_scikit_learns(k, chunk):
    x = points(101, 6)
    z = x[:, :2] + points(101, 2, seed=1)
    # scikit-learn ranks what is equally near in x by position, of which there is nothing here.
    for ours, a, b in ((trustworthiness, x, z), (continuity, z, x)):
        expected = sklearn_trustworthiness(a.numpy(), b.numpy(), n_neighbors=k)
        assert ours(x, z, k, chunk=chunk) == pytest.approx(expected, abs=1e-12)
    assert trustworthiness(x, z, k) != pytest.approx(continuity(x, z, k), abs=1e-3)


def test_neighbours_at_hand_change_nothing():
    x, z = points(80, 6), points(80, 2, seed=1)
    assert trustworthiness(x, z, 7, nearest(z, z, 7, True)[1]) == trustworthiness(x, z, 7)
    assert continuity(x, z, 7, nearest(x, x, 7, True)[1]) == continuity(x, z, 7)


def test_measures_see_neither_rotation_nor_scale():
    x, y = points(150, 6), labels(150, 4)
    z, turned = x[:, :2], x[:, :2] @ torch.tensor([[0.6, 0.8], [0.8, -0.6]], dtype=torch.float64) * 3 + 5
    for measure in (lambda z: trustworthiness(x, z, 9), lambda z: continuity(x, z, 9), lambda z: silhouette(z, y)):
        assert measure(turned) == pytest.approx(measure(z), abs=1e-12)
    assert procrustes(z.numpy(), turned.numpy())[2] == pytest.approx(0, abs=1e-12)


def test_the_same_space_is_perfect_and_a_shuffled_one_is_chance():
    x = points(600, 5)
    shuffled = x[torch.from_numpy(np.random.default_rng(1).permutation(600))]
    assert trustworthiness(x, x, 10) == continuity(x, x, 10) == 1
    # A random rank is above k by (n − k)² / 2n on average, and that a k-th of Σ's largest value is about 1/2.
    assert trustworthiness(x, shuffled, 10) == pytest.approx(0.5, abs=0.02)
    assert continuity(x, shuffled, 10) == pytest.approx(0.5, abs=0.02)
    assert procrustes(x[:, :2].numpy(), shuffled[:, :2].numpy())[2] > 0.97


def test_the_worst_map_has_trustworthiness_zero():
    """Neighbours in z are the farthest in x: each of the k has one of the k last ranks."""
    x, far, k = points(12, 3), [], 2
    for row in torch.cdist(x, x):
        far.append(row.argsort(descending=True)[:k])
    assert trustworthiness(x, x, k, torch.stack(far)) == pytest.approx(0, abs=1e-12)


def test_trustworthiness_refuses_half_of_all_images():
    x = points(20, 3)
    assert 0 < trustworthiness(x, points(20, 2, 1), 9) < 1
    with pytest.raises(UserError, match="more than 20 images, there are 20"):
        trustworthiness(x, x, 10)


def test_silhouette_is_scikit_learns_and_in_chunks():
    z, y = points(3000, 2).float(), labels(3000, 4)
    z[y == 1] += 3
    assert silhouette(z, y) == pytest.approx(silhouette_score(z.numpy(), y.numpy()), abs=1e-6)


def test_no_matrix_of_all_distances_is_ever_held(monkeypatch):
    n, largest = 4000, 0
    scores, sort = embedding._scores, embedding.np.sort

    def watched(*args):
        nonlocal largest
        for rows, values in scores(*args):
            largest = max(largest, values.untyped_storage().nbytes())
            yield rows, values

    def watched_sort(values, axis):
        nonlocal largest
        largest = max(largest, values.nbytes)
        return sort(values, axis=axis)

    monkeypatch.setattr(embedding, "_scores", watched)
    monkeypatch.setattr(embedding.np, "sort", watched_sort)
    x, z = points(n, 20).float(), points(n, 2, seed=1).float()
    trustworthiness(x, z, 5)
    assert 0 < largest < n * n * 4 / 4


def test_labels_are_moved_apart_and_no_further():
    names = ("Shirt", "Coat", "Pullover", "Bag")
    at = np.array([[0.5, 0.5], [0.51, 0.5], [0.49, 0.51], [0.1, 0.1]])
    moved = _apart(at, names, height=0.05)
    np.testing.assert_array_equal(moved[3], at[3])
    np.testing.assert_array_equal(moved[:, 0], at[:, 0])
    assert min(abs(moved[i, 1] - moved[j, 1]) for i in range(3) for j in range(i)) > 0.0499
    assert np.abs(moved - at).max() < 0.1


# --- ae_umap.py ---------------------------------------------------------------------------------------------------


@pytest.fixture
def processed(tmp_path):
    """A function that writes codes of the digits' test images, some keys replaced or (None) left out."""
    digits = load_images("digits", "test")
    x = digits.x.reshape(len(digits), -1) / 255
    good = {"Z": x[:, 100:104], "Yhat": x, "mse": np.zeros(len(x)), "y": digits.y, "dataset": "digits"}

    def write(**changes):
        kept = {name: value for name, value in {**good, **changes}.items() if value is not None}
        checkpoint.save_arrays(tmp_path / "codes.npz", **kept)
        return tmp_path / "codes.npz"

    return write


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"Z": None}, "lacks Z"),
        ({"mse": None, "Yhat": None}, "lacks Yhat, mse"),
        ({"dataset": "fashion"}, "holds codes of --dataset fashion, not digits"),
        ({"Z": np.zeros((7, 4))}, "other labels than the 360 test images"),
        ({"y": np.zeros(360, dtype=np.int64)}, "other labels than the 360 test images"),
        ({"Z": np.full((360, 4), np.nan)}, "NaN"),
        ({"Z": np.zeros((360, 785))}, "PCA cannot give 785"),
        ({"Z": np.zeros((360, 1))}, "codes of 1 number; a map has two dimensions"),
    ],
)
def test_npz_of_something_else(changes, said, processed, fails, tmp_path):
    flags = ["--quick", "--npz", processed(**changes), "--out", tmp_path / "out"]
    assert said in fails(ae_umap, flags, tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--n", 361], "--n 361: there are 360 test images"),
        (["--n", 30], "30 images are too few"),
        (["--neighbors", 360], "360 images are too few"),
        (["--neighbors", 1], "--neighbors"),
        (["--seeds", 3], "different seeds, 2 or more"),
        (["--seeds", 3, 3], "different seeds, 2 or more"),
        (["--min-dist", 2], "--min-dist"),
    ],
)
def test_wrong_flags(flags, said, processed, fails, tmp_path):
    given = ["--quick", "--npz", processed(), "--out", tmp_path / "out", *flags]
    assert said in fails(ae_umap, given, tmp_path / "out")


def test_missing_codes_name_the_script_that_makes_them(fails, tmp_path):
    said = fails(ae_umap, ["--quick", "--runs-dir", tmp_path], tmp_path / "autoencoder/ae_umap")
    assert "ae_process_test.py --quick" in said


def test_what_is_called_better():
    def row(*values):
        return {"silhouette_values": list(values)}

    assert ae_umap.verdict(row(0.3, 0.4), row(0.1, 0.2), "silhouette") == "better"
    assert ae_umap.verdict(row(0.1, 0.2), row(0.3, 0.4), "silhouette") == "worse"
    assert ae_umap.verdict(row(0.1, 0.3), row(0.2, 0.4), "silhouette") == "no difference beyond the seeds"


def test_disparities_name_the_worst_pair():
    a, b = points(50, 2).numpy(), points(50, 2, seed=1).numpy()
    found = ae_umap.disparities([a, b, 2 * a[:, ::-1] + 1])
    assert found["worst_pair"] in ((0, 1), (1, 2))
    assert found["values"][1] == pytest.approx(0, abs=1e-12)
    assert found["values"][0] == pytest.approx(found["values"][2]) == pytest.approx(procrustes(a, b)[2])


def test_a_subset_is_stratified_sorted_and_all_by_default():
    y = np.repeat([0, 1, 2], [60, 30, 10])
    np.testing.assert_array_equal(ae_umap.chosen(y, None, 0), np.arange(100))
    kept = ae_umap.chosen(y, 50, 3)
    assert np.bincount(y[kept]).tolist() == [30, 15, 5]
    assert (np.diff(kept) > 0).all()


def test_the_map_of_one_seed_is_the_same_twice_and_of_another_is_not():
    x = torch.cat([points(40, 5).float(), points(40, 5, seed=1).float() + 20])
    graph = nearest(x, x, 9, exclude_self=True)
    a, b, c = (embedding.umap_map(x, graph, seed, 0.1, "random") for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert procrustes(a, c)[2] > 1e-3
    assert trustworthiness(x, torch.from_numpy(a), 9) > 0.9
    assert knn_accuracy_leave_one_out(torch.from_numpy(a), torch.arange(80) // 40) == 1
