"""The figures of compare_mnist_models.py. Shapes: N images, K classes."""

import numpy as np
import torch
from matplotlib.ticker import NullFormatter
from torch import Generator

from cnn_cifar.digit_training import distorted
from cnn_cifar.inputs import Data, pixels
from cnn_cifar.vit import ViT, position_similarity, rollout
from shared_utils.plotting import COLORS, confusion_matrix, image_grid, line_style, new_figure

SHOWN = 10  # images of a row


def draw_comparison(rows: list[dict], pairs: list[dict], about: str):
    """Errors with their interval, seconds of training, images a second, parameters: a bar for each network."""
    figure, axes = new_figure(1, 4, width=13.0, height=2.0 + 0.42 * len(rows), sharey=True)
    at, errors = np.arange(len(rows)), np.array([100 * (1 - row["accuracy"]) for row in rows])
    interval = np.array([[100 * (1 - row["high"]), 100 * (1 - row["low"])] for row in rows])
    one = 100 * (1 - np.array([row["accuracies"][0] for row in rows]))
    axes[0, 0].barh(at, errors, color=COLORS[0], alpha=0.7)
    axes[0, 0].errorbar(one, at, xerr=np.abs(interval - one[:, None]).T, fmt="|", color="black", capsize=3)
    columns = (
        ("training_seconds", "training (s)", "{:,.0f}"),
        ("images_per_second", "images per second in use", "{:,.0f}"),
        ("parameters", "parameters", "{:,}"),
    )
    for y, (row, error) in enumerate(zip(rows, errors, strict=True)):
        axes[0, 0].annotate(f"{error:.2f}", (interval[y, 1], y), (4, -3), textcoords="offset points")
        for ax, (key, _, template) in zip(axes[0, 1:], columns, strict=True):
            ax.annotate(template.format(row[key]), (row[key], y), (7, -3), textcoords="offset points", fontsize=8)
    for index, (ax, (key, label, _)) in enumerate(zip(axes[0, 1:], columns, strict=True), start=1):
        ax.plot([row[key] for row in rows], at, "o", color=COLORS[index], markersize=9)
        ax.set(xscale="log", xlabel=label)
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.margins(x=0.35, y=0.2)
    axes[0, 0].set(xlabel="test error (%), 95 % interval of one training", xlim=(0, 1.25 * interval.max()))
    axes[0, 0].set_yticks(at, [row["label"] for row in rows])
    axes[0, 0].invert_yaxis()
    if many := [(row["ensemble_accuracy"], y) for y, row in enumerate(rows) if row["ensemble_accuracy"] is not None]:
        accuracy, y = np.array(many).T
        label = f"mean of all {len(rows[0]['accuracies'])} trainings' probabilities"
        axes[0, 0].plot(100 * (1 - accuracy), y, "D", color=COLORS[1], label=label)
        figure.legend(loc="outside lower left")
    best, *rest = sorted(rows, key=lambda row: -row["accuracy"])
    error = f"{100 * (1 - best['accuracy']):.2f} %"
    title = f"{about}:\n{best['label']}, {error} wrong"
    if rest:
        title = f"{about}:\n{best['label']} has the fewest errors, {error}"
        both = {best["model"], rest[0]["model"]}
        p = next(pair["p"] for pair in pairs if {pair["a"], pair["b"]} == both)
        shown = "" if p < 0.05 else ", no difference is shown"
        title += f"; next {rest[0]['label']}, {100 * (1 - rest[0]['accuracy']):.2f} % (McNemar: p = {p:.2g}{shown})"
    figure.suptitle(title)
    return figure


def draw_curves(found: dict[str, list[dict]], rows: list[dict], split: str, about: str):
    """Training loss and error after each epoch, of each network's first training. split: on which the error is."""
    figure, axes = new_figure(1, 2, width=10.6, height=4.4)
    for index, (row, outcomes) in enumerate(zip(rows, found.values(), strict=True)):
        losses, accuracies = outcomes[0]["losses"], outcomes[0]["accuracies"]
        epochs = np.arange(1, len(losses) + 1)
        axes[0, 0].plot(epochs, losses, marker="o", label=row["label"], **line_style(index))
        axes[0, 1].plot(epochs, 100 * (1 - accuracies), marker="o", label=row["label"], **line_style(index))
    axes[0, 0].set(yscale="log", xlabel="epoch", ylabel="training loss (nats), as it learns")
    axes[0, 1].set(yscale="log", xlabel="epoch", ylabel=f"{split} error (%); nothing is chosen by it")
    axes[0, 1].legend()
    first, last = (sorted(100 * (1 - one[0]["accuracies"][at]) for one in found.values()) for at in (0, -1))
    if len(rows) == 1:
        said = f"{first[0]:.1f} % wrong after an epoch, {last[0]:.2f} % at the end"
    else:
        said = f"{first[0]:.1f} to {first[-1]:.1f} % wrong after an epoch, {last[0]:.2f} to {last[-1]:.2f} % at the end"
    figure.suptitle(f"{about}:\n{said}")
    return figure


def draw_samples(data: Data, recipe: str, seed: int):
    """A training image of each class, and what the strong recipe makes of it."""
    y = data.train.y.cpu()
    first = torch.stack([(y == label).nonzero()[0, 0] for label in y.unique()])
    x, generator = pixels(data.train.x.cpu()[first]), Generator().manual_seed(seed)
    rows = [x, *(distorted(x, generator) for _ in range(3))]
    figure, axes = new_figure(width=8.6, height=3.9)
    image_grid(axes[0, 0], torch.cat(rows)[:, 0].numpy(), len(x), vmin=0, vmax=1)
    used = "is shown these" if recipe == "strong" else "is shown the first row alone"
    figure.suptitle(
        f"{data.title}: an image of each class, and below\nthree times as the strong recipe distorts it "
        f"(this run's recipe, {recipe}, {used})"
    )
    return figure


def draw_confusions(matrices: dict[str, np.ndarray], data: Data):
    """A matrix (K, K) of counts for each network, its errors shaded on one scale."""
    columns = min(3, len(matrices))
    rows = -(-len(matrices) // columns)
    figure, axes = new_figure(rows, columns, width=max(6.4, 4.4 * columns), height=4.8 * rows + 0.6)
    wrong = {label: int(matrix.sum() - np.trace(matrix)) for label, matrix in matrices.items()}
    most = max((matrix * (1 - np.eye(len(matrix), dtype=int))).max() for matrix in matrices.values())
    for ax in axes.flat[len(matrices) :]:
        ax.set_axis_off()
    for ax, (label, matrix) in zip(axes.flat, matrices.items(), strict=False):
        confusion_matrix(ax, matrix, data.classes, title=f"{label}: {wrong[label]} wrong", vmax=max(1, most))
    total = sum(matrices.values())
    errors = total * (1 - np.eye(len(total), dtype=int))
    row, column = np.unravel_index(errors.argmax(), errors.shape)
    said = f"most often {data.classes[row]} is taken for {data.classes[column]}, {errors[row, column]} times in all"
    figure.suptitle(f"{data.title}, first training of each:\n{said if errors.any() else 'no error'}")
    return figure


def draw_errors(found: dict[str, list[dict]], data: Data):
    """The test images that most networks get wrong, least probable first, with true and predicted class."""
    y = data.test.y.cpu().numpy()
    columns = SHOWN if max(map(len, data.classes)) < 4 else 5  # a long name needs a wide cell
    all_of = np.stack([outcomes[0]["probabilities"] for outcomes in found.values()])  # (models, N, K)
    wrong = (all_of.argmax(2) != y).sum(0)  # (N,)
    mean = all_of.mean(0)
    order = np.lexsort((mean[np.arange(len(y)), y], -wrong))[: 3 * columns]
    order = order[wrong[order] > 0]
    figure, axes = new_figure(width=8.6, height=3.9)
    n = len(all_of)
    said = [f"{data.classes[y[i]]} → {data.classes[mean[i].argmax()]}" for i in order]
    if n > 1:
        said = [f"{each}  {wrong[i]}/{n}" for each, i in zip(said, order, strict=True)]
    if len(order):
        image_grid(axes[0, 0], data.test.x.cpu().numpy()[order], columns, labels=said, vmin=0, vmax=255)
    axes[0, 0].set_axis_off()
    figure.suptitle(
        f"{data.title}: {f'all {n} networks get' if n > 1 else 'the network gets'} {(wrong == n).sum()} of {len(y):,} "
        "test images wrong\n(true → " + ("mean of the networks, and how many of them are wrong)" if n > 1 else "read)")
    )
    return figure


def draw_attention(network: ViT, data: Data):
    """Test images, and how much of each patch reaches the class token."""
    x = pixels(data.test.x[:SHOWN])
    shares = rollout(network.attention_weights(x)).cpu()  # (N, T − 1)
    side = network.side
    maps = shares.view(-1, 1, side, side).repeat_interleave(4, 2).repeat_interleave(4, 3)
    ink = (x.cpu().view(-1, side, 4, side, 4).mean((2, 4)) > 0.1).flatten(1)  # patches with a stroke
    figure, axes = new_figure(2, 1, width=8.6, height=3.0)
    image_grid(axes[0, 0], x.cpu()[:, 0].numpy(), SHOWN, vmin=0, vmax=1)
    image_grid(axes[1, 0], maps[:, 0].numpy(), SHOWN, cmap="viridis")
    inside = (shares * ink).sum(1).mean()
    figure.suptitle(
        f"What reaches the class token (attention rollout, brighter is more): {inside:.0%} comes from patches\n"
        f"with a stroke, which are {ink.float().mean():.0%} of all"
    )
    return figure


def draw_positions(network: ViT):
    """The similarity of each patch's position embedding to all others', laid out as the patches are."""
    side, likeness = network.side, position_similarity(network).cpu()
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij"), -1).view(-1, 2).float()
    distance = torch.cdist(at, at)
    near, far = likeness[(distance > 0) & (distance < 1.5)].mean(), likeness[distance > 3].mean()
    figure, axes = new_figure(width=6.4, height=6.2)
    image_grid(axes[0, 0], likeness.view(-1, side, side).numpy(), side, vmin=-1, vmax=1, cmap="viridis")
    figure.suptitle(
        f"Learned positions: each patch's cosine with all others (yellow: 1)\n"
        f"mean of neighbours {near:.2f}, of patches more than three apart {far:.2f}"
    )
    return figure
