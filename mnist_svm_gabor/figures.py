"""The figures of this folder's scripts that are more than a curve."""

import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import confusion_matrix as count_confusions

from mnist_svm_gabor.gabor import GaborBank
from shared_utils import plotting
from shared_utils.data import Images
from shared_utils.stats import mcnemar


def draw_bank(bank: GaborBank) -> Figure:
    """Every kernel of the bank: a row per frequency, a column per orientation."""
    rows, columns = bank.frequencies, bank.orientations
    kind = "the even half of each quadrature pair" if bank.energy else "zero mean, unit norm"
    figure, axes = plotting.new_figure(
        rows,
        columns,
        width=max(6.0, 1.45 * columns + 1),
        height=1.45 * rows + 1.2,
        title=f"{len(bank.kernels)} Gabor filters of {bank.kernel_size}×{bank.kernel_size} pixels: {kind}",
    )
    limit = np.abs(bank.kernels).max()
    for i, kernel in enumerate(bank.kernels):
        ax = axes[i // columns, i % columns]
        image = ax.imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(False)
        if i < columns:
            ax.set_title(f"{np.degrees(bank.angles[i]):.4g}°")
        if i % columns == 0:
            f = bank.cycles[i // columns]
            ax.set_ylabel(f"{f:.2f} cycles/px\n(wave {1 / f:.1f} px)")
    figure.supxlabel("column: direction in which the wave varies, clockwise from the right", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.8, label="weight")
    return figure


def draw_responses(bank: GaborBank, image: np.ndarray, name: str) -> Figure:
    """One digit through the bank: the image (H, W) in [0, 1], its maps at every pixel, and the pooled features."""
    responses = bank.maps(image[None])  # (1, M, H, W)
    maps, pooled = responses[0].numpy(), bank.pooled(responses)[0].numpy()  # (M, H, W), (M, P, P)
    signs = ["energy"] if bank.energy else ["positive part", "negative part"]
    n_kernels = len(maps) // len(signs)
    groups = []
    for s, sign in enumerate(signs):
        part = slice(s * n_kernels, (s + 1) * n_kernels)
        groups += [(sign, maps[part]), (f"pooled to {bank.pooling}×{bank.pooling}, compressed", pooled[part])]
    figure, axes = plotting.new_figure(
        1,
        1 + len(groups),
        width=2.6 + 0.62 * bank.orientations * len(groups),
        height=1.2 + 0.72 * bank.frequencies,
        width_ratios=[2.2, *[0.62 * bank.orientations] * len(groups)],
        title=f"{name} through the bank: each orientation answers to the strokes across its wave",
    )
    axes[0, 0].imshow(image)
    axes[0, 0].set(title=f"input {image.shape[0]}×{image.shape[1]}")
    axes[0, 0].axis("off")
    for ax, (title, shown) in zip(axes[0, 1:], groups, strict=True):
        # Each frequency is scaled to its own maximum: high ones answer faintly.
        by_frequency = shown.reshape(bank.frequencies, -1)
        scaled = by_frequency / np.maximum(by_frequency.max(1, keepdims=True), 1e-12)
        plotting.image_grid(ax, scaled.reshape(shown.shape), bank.orientations, vmin=0, vmax=1, cmap="magma")
        ax.set_title(title)
    angles = ", ".join(f"{np.degrees(a):.4g}°" for a in bank.angles)
    figure.supxlabel(f"columns: wave along {angles}; rows: frequency, each scaled to its maximum", fontsize=9)
    down = {"transform": axes[0, 1].transAxes, "rotation": 270, "va": "center", "ha": "right"}
    axes[0, 1].text(-0.03, 0.5, "frequency falls →", **down)
    return figure


def draw_comparison(raw: np.ndarray, gabor: np.ndarray, test: Images, title: str) -> Figure:
    """Both confusion matrices on one scale, and what changed between them. raw, gabor: predicted labels (N,)."""
    labels = range(len(test.classes))
    before, after = (count_confusions(test.y, predicted, labels=labels) for predicted in (raw, gabor))
    mended, broken, p = mcnemar(gabor == test.y, raw == test.y)
    off_diagonal = 1 - np.eye(len(before), dtype=int)
    vmax = max(1, (before * off_diagonal).max(), (after * off_diagonal).max())
    figure, axes = plotting.new_figure(
        1,
        3,
        width=15,
        height=5.2,
        title=f"{title}: Gabor features mend {mended} images and break {broken} (McNemar's p = {p:.1g})",
    )
    for ax, matrix, name in ((axes[0, 0], before, "raw pixels"), (axes[0, 1], after, "Gabor features")):
        errors = (matrix * off_diagonal).sum()
        image = plotting.confusion_matrix(
            ax, matrix, test.classes, title=f"{name}: {errors} of {len(test)} wrong", vmax=vmax
        )
    figure.colorbar(image, ax=axes[0, :2], shrink=0.8, label="test images (errors only)")
    change = (after - before) * off_diagonal
    ax, limit = axes[0, 2], max(1, np.abs(change).max())
    image = ax.imshow(change, cmap="PuOr_r", vmin=-limit, vmax=limit)
    for (row, column), value in np.ndenumerate(change):
        if value:
            color = "white" if abs(value) > 0.6 * limit else "black"
            ax.text(column, row, f"{value:+d}", ha="center", va="center", fontsize=7, color=color)
    ax.set(xlabel="predicted class", ylabel="true class", title=f"change: {change.sum():+d} errors in all")
    ax.set_xticks(labels, test.classes, rotation=90 if max(map(len, test.classes)) > 3 else 0)
    ax.set_yticks(labels, test.classes)
    ax.grid(False)
    figure.colorbar(image, ax=ax, shrink=0.8, label="Gabor minus raw (test images)")
    return figure
