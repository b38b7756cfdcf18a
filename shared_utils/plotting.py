"""One style for every figure: `new_figure` … draw … `save_figure`. No window is ever opened.

Colours are Okabe and Ito's eight, which colour-blind readers tell apart; curves also differ in dash.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shared_utils.runs import replacing

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DASHES = ("-", "--", "-.", ":")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "figure.titlesize": 12,
    "image.cmap": "gray",
}


def new_figure(
    rows: int = 1, columns: int = 1, *, width: float = 6.4, height: float = 4.0, title: str = "", **subplots
) -> tuple[Figure, np.ndarray]:
    """A figure of `rows` × `columns` axes, `width` × `height` inches in all; returns (figure, axes (rows, columns)).

    title: the figure's finding, above all axes. Further keywords go to `Figure.subplots` (`sharey=True`, …).
    """
    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **subplots)
    if title:
        figure.suptitle(title)
    return figure, axes


def save_figure(figure: Figure, path: str | Path, dpi: int = 110) -> None:
    """Write `figure` as a PNG, atomically. The same figure gives the same bytes."""
    with replacing(path) as beside:
        figure.savefig(beside, format="png", dpi=dpi, metadata={"Software": None})


def curves(
    ax: Axes, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str
) -> None:
    """Draw each named (x, y) with its own colour and dash, and the legend."""
    for index, (name, (x, y)) in enumerate(series.items()):
        ax.plot(x, y, label=name, **line_style(index))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend()


def line_style(index: int) -> dict[str, str]:
    """Colour and dash of the index-th curve: neighbours differ in both, and the first 32 are all different."""
    return {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[(index + index // len(COLORS)) % len(DASHES)]}


def mean_band(
    ax: Axes, x: Sequence[float], values: np.ndarray, *, label: str, index: int = 0, marker: str | None = "o"
) -> None:
    """Draw the mean of `values` (runs, len(x)) against x, with a band of one sample standard deviation.

    The band ends at the lowest run: on a logarithmic axis mean − deviation may lie below 0. index: which colour and
    dash. A run that is NaN at an x is left out there; one run alone has no band.
    """
    values = np.ma.masked_invalid(np.asarray(values, dtype=np.float64))
    mean, n = values.mean(axis=0), values.count(axis=0)
    squares = ((values - mean) ** 2).sum(axis=0)
    std = np.sqrt(squares / np.maximum(n - 1, 1)).filled(0)
    mean, lowest, style = mean.filled(np.nan), values.min(axis=0).filled(np.nan), line_style(index)
    ax.plot(x, mean, label=label, marker=marker, markersize=4, **style)
    ax.fill_between(x, np.maximum(mean - std, lowest), mean + std, color=style["color"], alpha=0.2, linewidth=0)


def running_mean(values: np.ndarray) -> np.ndarray:
    """For each update, the mean of `values`, (U, …), over the updates up to 10 % before and after it."""
    step = np.arange(1, len(values) + 1)
    first, end = np.ceil(step / 1.1).astype(int) - 1, np.minimum((step * 1.1).astype(int), len(values))
    sums = np.concatenate([np.zeros_like(values[:1], dtype=np.float64), values.cumsum(0, dtype=np.float64)])
    return (sums[end] - sums[first]) / (end - first).reshape(-1, *(1,) * (values.ndim - 1))


def image_grid(
    ax: Axes,
    images: np.ndarray,
    columns: int,
    *,
    labels: Sequence[str] | None = None,
    vmin=None,
    vmax=None,
    cmap="gray",
) -> None:
    """Draw images (N, H, W), (N, 1, H, W) or (N, 3, H, W) as one mosaic of `columns` columns, read row by row.

    labels: a word under each image. vmin, vmax: the values shown black and white (the range of all images by default).
    """
    images = np.asarray(images)
    if images.ndim == 3:
        images = images[:, None]
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    gap, under = 1, (0 if labels is None else max(3, height // 4))
    tall, wide = height + gap + under, width + gap
    color = channels == 3
    scale = 255 if images.dtype == np.uint8 else 1
    mosaic = np.full((rows * tall, columns * wide, 3 if color else 1), 1.0 if color else np.nan)
    for i, image in enumerate(images):
        top, left = i // columns * tall, i % columns * wide
        mosaic[top : top + height, left : left + width] = image.transpose(1, 2, 0) / (scale if color else 1)
        if labels is not None:
            ax.text(left + width / 2 - 0.5, top + height + under / 2, labels[i], ha="center", va="center", fontsize=8)
    ax.imshow(
        mosaic if color else np.ma.masked_invalid(mosaic[..., 0]),
        vmin=vmin,
        vmax=vmax,
        cmap=cmap,
        interpolation="nearest",
    )
    ax.axis("off")


def confusion_matrix(ax: Axes, matrix: np.ndarray, classes: Sequence[str], *, title: str, vmax: float | None = None):
    """Draw counts (K, K), true class by row: errors shaded on a scale from 0 to vmax, the diagonal left white.

    Shading the diagonal would hide the errors: it is a hundred times as large. Returns the image, for a colour bar.
    """
    matrix = np.asarray(matrix)
    errors = matrix * (1 - np.eye(len(matrix), dtype=matrix.dtype))
    vmax = float(vmax if vmax is not None else max(1, errors.max()))
    image = ax.imshow(errors, cmap="Blues", vmin=0, vmax=vmax)
    for (row, column), count in np.ndenumerate(matrix):
        if count:
            color = "#666666" if row == column else ("white" if count > 0.6 * vmax else "black")
            ax.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    ax.set(xlabel="predicted class", ylabel="true class", title=title)
    ax.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 3 else 0)
    ax.set_yticks(range(len(classes)), classes)
    ax.grid(False)
    return image
