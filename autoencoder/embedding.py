"""Maps of codes in two dimensions, and how well a map or a code preserves its images' neighbours and classes.

All measures are exact. Distances are taken for `chunk` rows at a time, so no N×N matrix is ever in memory. The
Procrustes disparity of two maps is `scipy.spatial.procrustes(a, b)[2]`: from 0, the same picture once moved, turned,
mirrored and scaled, to 1.

Sources: Venna and Kaski 2001; Rousseeuw 1987; McInnes, Healy and Melville 2018.
Shapes: N rows, D columns of the space compared with, k neighbours.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import sklearn
import torch
from matplotlib.axes import Axes
from sklearn.metrics import silhouette_score
from torch import Tensor

from autoencoder.inputs import Inputs
from shared_utils.cli import UserError
from shared_utils.plotting import COLORS

NEIGHBOURS = 5  # that vote
CHUNK = 500  # rows: 120 MB of float32 distances to 60,000 others
HALF_LETTER = 0.012  # of the width of a letter in a label, as a fraction of the axes
SPARE = 16  # candidates beyond the k nearest whose distances are recomputed
MAP_COLORS = (*COLORS[:7], "#999999", "#8C510A", "#9970AB")  # white paper swallows the yellow


def nearest(
    x_from: Tensor, x_to: Tensor, k: int, exclude_self: bool = False, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of x_to (N, D) to each row of x_from (M, D): distances and int64 positions, (M, k), nearest
    first; of equally distant ones (up to SPARE of them) the smaller position first.

    exclude_self: x_from is x_to, and no row is its own neighbour. Errors: `UserError` when there are not k others.
    """
    k_most = len(x_to) - exclude_self
    if not 0 < k <= k_most:
        raise UserError(f"cannot take {k} neighbours among {k_most} images")
    x_from, x_to = _floating(x_from), _floating(x_to)
    found = []
    for rows, scores in _scores(x_from, x_to, exclude_self, chunk):
        candidates = scores.topk(min(k + SPARE, k_most), largest=False).indices.sort().values  # (chunk, k + SPARE)
        # A difference of products loses the small distances to rounding, a sum of squared differences does not.
        squares = (x_to[candidates] - x_from[rows, None]).square_().sum(-1)
        squares, order = squares.sort(stable=True)
        found.append((squares[:, :k].sqrt(), candidates.gather(1, order[:, :k])))
    distances, positions = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(positions)


def _floating(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scores(x_from: Tensor, x_to: Tensor, exclude_self: bool, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Chunk by chunk ‖b‖² − 2a·b (chunk, N): a row's squared distances less its own ‖a‖², in the same order."""
    if exclude_self and len(x_from) != len(x_to):
        raise ValueError("exclude_self compares a set with itself")
    centre = x_to.mean(0)  # small numbers lose less in the difference
    x_from, x_to = x_from - centre, x_to - centre
    norms = x_to.square().sum(1)  # (N,)
    for start in range(0, len(x_from), chunk):
        rows = slice(start, min(start + chunk, len(x_from)))
        scores = torch.addmm(norms, x_from[rows], x_to.T, alpha=-2)  # (chunk, N)
        if exclude_self:
            scores.diagonal(start).fill_(torch.inf)
        yield rows, scores


def _vote(labels: Tensor) -> Tensor:
    """The most frequent label of each row of (M, k): (M,). Of equally frequent ones the smallest."""
    classes = int(labels.max()) + 1
    counts = torch.nn.functional.one_hot(labels, classes).sum(1)  # (M, classes)
    return (counts * classes - torch.arange(classes, device=labels.device)).argmax(1)


def knn_accuracy(x_train: Tensor, y_train: Tensor, x_test: Tensor, y_test: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of x_test (M, D) whose label is the most frequent one of its k nearest rows of x_train (N, D)."""
    positions = nearest(x_test, x_train, k)[1]
    return (_vote(y_train[positions]) == y_test).sum().item() / len(y_test)


def vote_accuracy(code: Callable[[Tensor], Tensor], data: Inputs) -> float:
    """`knn_accuracy` of the test images among all others, training and validation; code(x): images x → (N, K)."""
    x, y = torch.cat([data.x_train, data.x_val]), torch.cat([data.y_train, data.y_val])
    return knn_accuracy(code(x), y, code(data.x_test), data.y_test)


def knn_accuracy_leave_one_out(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Share of x (N, D) whose label in y (N,) is the most frequent one of its k nearest other rows."""
    positions = nearest(x, x, k, exclude_self=True)[1]
    return (_vote(y[positions]) == y).sum().item() / len(y)


def trustworthiness(x: Tensor, z: Tensor, k: int, neighbours: Tensor | None = None, chunk: int = CHUNK) -> float:
    """Are neighbours in z (N, d) neighbours in x (N, D)? From 0 to 1 (Venna and Kaski 2001):

        T(k) = 1 − 2 / (N k (2N − 3k − 1)) · Σ_i Σ_{j in U_k(i)} (r(i, j) − k)

    U_k(i) are the k nearest of i in z, r(i, j) the rank of j among i's neighbours in x; only ranks above k count.
    neighbours: the k nearest of each row of z, int64 (N, k), where the caller has them.
    Errors: `UserError` when k is not below N / 2, where the sum has no such maximum.
    """
    n = len(x)
    if not 0 < k < n / 2:
        raise UserError(f"trustworthiness over {k} neighbours needs more than {2 * k} images, there are {n}")
    x = _floating(x)
    neighbours = nearest(z, z, k, True, chunk)[1] if neighbours is None else neighbours
    excess = 0
    for rows, scores in _scores(x, x, True, chunk):
        own = scores.gather(1, neighbours[rows]).cpu()  # (chunk, k)
        ordered = torch.from_numpy(np.sort(scores.cpu().numpy(), axis=1))  # some thirty times as fast as torch's
        ranks = torch.searchsorted(ordered, own) + 1
        excess += (ranks - k).clamp_(min=0).sum().item()
    return 1 - 2 * excess / (n * k * (2 * n - 3 * k - 1))


def continuity(x: Tensor, z: Tensor, k: int, neighbours: Tensor | None = None, chunk: int = CHUNK) -> float:
    """Are neighbours in x (N, D) still neighbours in z (N, d)? `trustworthiness` with the two spaces swapped.

    neighbours: the k nearest of each row of x, int64 (N, k), where the caller has them.
    """
    return trustworthiness(z, x, k, neighbours, chunk)


def silhouette(z: Tensor, y: Tensor) -> float:
    """The mean over rows of z (N, d) of (b − a) / max(a, b): a is the mean distance to its own class in y (N,), b that
    to the nearest other class (Rousseeuw 1987). From −1 to 1."""
    with sklearn.config_context(working_memory=64):  # MiB; by default all of 10,000² distances are held at once
        return float(silhouette_score(z.cpu().numpy(), y.cpu().numpy()))


def umap_map(x: Tensor, neighbours: tuple[Tensor, Tensor], seed: int, min_dist: float, init: str) -> np.ndarray:
    """UMAP of x (N, D) from its exact neighbours, `nearest(x, x, k, exclude_self=True)`: float32 (N, 2).

    UMAP counts an image as its own first neighbour, so this is its n_neighbors = k + 1. init: "spectral" (the graph's
    eigenvectors, the same for each seed but for noise of 1e-4) or "random". One thread: same seed, same map.
    """
    import umap  # compiled as it loads, in seconds: whoever imports this module for its measures need not wait

    distances, positions = neighbours
    own = torch.arange(len(x), device=x.device)[:, None]
    positions = torch.cat([own, positions], 1).cpu().numpy()  # (N, k + 1)
    distances = torch.cat([torch.zeros_like(distances[:, :1]), distances], 1).cpu().numpy()
    mapper = umap.UMAP(
        positions.shape[1],
        min_dist=min_dist,
        init=init,
        random_state=seed,
        n_jobs=1,
        precomputed_knn=(positions, distances),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no new points can be placed later: none will be
        return mapper.fit_transform(x.cpu().numpy())


def draw_map(ax: Axes, z: np.ndarray, y: np.ndarray, classes: Sequence[str]) -> None:
    """Draw the map z (N, 2) in the colours of the classes, each class's name at its median."""
    colors = np.array([MAP_COLORS[label % len(MAP_COLORS)] for label in range(len(classes))])
    # Smoothed edges would double the file.
    ax.scatter(*z.T, s=point_size(len(z)), c=colors[y], linewidth=0, antialiased=False)
    present = np.unique(y)
    medians = np.array([np.median(z[y == label], axis=0) for label in present])
    low, span = z.min(0), np.ptp(z, axis=0).max()
    names = [classes[label] for label in present]
    at = low + span * _apart((medians - low) / span, names)
    for name, label, place, median in zip(names, present, at, medians, strict=True):
        ax.plot(*zip(place, median, strict=True), color="black", linewidth=0.7)
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colors[label]}
        ax.text(*place, name, ha="center", va="center", fontsize=8.5, bbox=box)
    bare(ax)


def bare(ax: Axes) -> None:
    """Axes for a map: without units, since it may be turned and mirrored at will, and the same scale both ways."""
    ax.set(xticks=[], yticks=[])
    ax.set_aspect("equal", adjustable="datalim")
    ax.grid(False)


def point_size(n: int) -> float:
    """The area of a point, in points², of a map of n."""
    return float(np.clip(15000 / n, 1.5, 12))


def _apart(at: np.ndarray, names: Sequence[str], height: float = 0.05) -> np.ndarray:
    """Places (n, 2) of labels, as fractions of the axes, moved up and down until no two of them overlap."""
    at = at.copy()
    for _ in range(200):
        moved = False
        for i in range(len(at)):
            for j in range(i):
                gap = at[i] - at[j]
                lacks = height - abs(gap[1])
                if lacks > 1e-6 and abs(gap[0]) < HALF_LETTER * (len(names[i]) + len(names[j])):
                    step = (lacks / 2 + 1e-6) * (1 if gap[1] >= 0 else -1)
                    at[i, 1], at[j, 1], moved = at[i, 1] + step, at[j, 1] - step, True
        if not moved:
            break
    return at
