"""What does a transformer's lack of inductive bias for images cost, and what makes up for it?

    python cnn_cifar/data_efficiency.py --amp
    python cnn_cifar/data_efficiency.py --sizes 100 1000 --least-updates 200 --seeds 0 1 2 --amp

A convolution has it built in that near pixels belong together and that a stroke is the same wherever it lies; a ViT has
to learn both. So the CNN, the deep CNN and the ViT of zoo.py learn from few images and from many, and beside them a ViT
whose patches come from two convolutions, and the CNN and the ViT on images distorted anew each time (the strong recipe
of digit_training.py, with smoothed labels). All see the same images, drawn anew for each seed in the class
proportions of the whole set, and at each size get the same number of updates: `--epochs` passes, at least
`--least-updates`. Test images are read once for each training. McNemar's test compares two networks of one seed by the
images that only one of them gets right.

Writes data_efficiency.png, history.csv, metrics.json, and of each training <arm>_<size>_<seed>.npz (array chosen, the
predicted classes of the test images).
With --resume a study that was stopped goes on with the trainings that are missing.
Sources: Dosovitskiy et al. 2021 (a ViT needs more images); Xiao et al. 2021 (the convolutional stem).
Shapes: S seeds.
"""

import argparse
import math

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator
from torch import nn

from cnn_cifar.digit_training import fit, probabilities
from cnn_cifar.inputs import Data, Split, load_splits
from cnn_cifar.vit import ViT
from cnn_cifar.zoo import OURS
from shared_utils.checkpoint import load_arrays, save_arrays
from shared_utils.cli import UserError, add_amp, add_seeds, at_least, make_parser, positive_int, run_main
from shared_utils.data import stratified_order
from shared_utils.device import pick_device
from shared_utils.plotting import line_style, new_figure, save_figure
from shared_utils.runs import Run, start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import half_width, mcnemar

ARMS = {  # name: model of zoo.py, whether the images are distorted
    "CNN": ("cnn", False),
    "deep CNN": ("deep_cnn", False),
    "ViT": ("vit", False),
    "CNN, distorted": ("cnn", True),
    "ViT, distorted": ("vit", True),
    "ViT, conv stem": ("vit", False),
}
PAIRS = (
    ("CNN", "ViT"),
    ("deep CNN", "CNN"),
    ("CNN, distorted", "CNN"),
    ("ViT, distorted", "ViT"),
    ("ViT, conv stem", "ViT"),
)


def build_parser():
    """The command line."""
    quick = {"sizes": [32, 64], "epochs": 1, "least_updates": 2, "batch_size": 32, "seeds": [0, 1]}
    parser = make_parser(__doc__, quick=quick)
    parser.add_argument("--batch-size", type=at_least(2), default=64, help="images per update, at most")
    counts = "images to learn from, of all classes together"
    parser.add_argument("--sizes", type=at_least(2), nargs="+", default=[100, 1000, 10000, 60000], help=counts)
    parser.add_argument("--epochs", type=positive_int, default=2, help="passes over the images")
    least = "fewest updates; where the epochs give fewer, the images are passed over more often"
    parser.add_argument("--least-updates", type=positive_int, default=400, help=least)
    add_seeds(parser, [0, 1, 2], "each with its own images and initial weights", least=2)
    add_amp(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the trainings that are missing")
    return parser


def main(argv=None) -> dict:
    """Train every arm on every size from every seed; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load_splits(args.dataset, args.data_dir, device, shape=(1, 28, 28))
    sizes = sorted(set(args.sizes))
    if sizes[-1] > len(data.train):
        raise UserError(f"--sizes {sizes[-1]}: there are {len(data.train)} images to train on")
    run = start_run(args)
    found = {
        (arm, size): [trained(arm, size, seed, data, args, run) for seed in args.seeds]
        for size in sizes
        for arm in ARMS
    }
    y = data.test.y.cpu().numpy()
    right = {key: [each["chosen"] == y for each in trainings] for key, trainings in found.items()}
    rows = [row_of(arm, size, right, found) for size in sizes for arm in ARMS]
    pairs = [compared(a, b, size, right) for size in sizes for a, b in PAIRS]
    ends = [row for row in pairs if row["images"] in (sizes[0], sizes[-1]) and (row["a"], row["b"]) == PAIRS[0]]
    conclusion = "; ".join(f"with {row['images']:,} images {said(row)}" for row in ends)
    updates = {size: epochs_for(size, args) * (size // min(args.batch_size, size)) for size in sizes}
    accuracies = {size: {row["arm"]: row["accuracy"] for row in rows if row["images"] == size} for size in sizes}
    about = f"{data.title}, {len(args.seeds)} seeds"
    save_figure(draw(rows, updates, about, conclusion), run.path("data_efficiency.png"))
    return run.finish(
        {
            "seeds": args.seeds,
            "test_images": len(y),
            "conclusion": conclusion,
            "sizes": [{"images": size, "updates": updates[size], **accuracies[size]} for size in sizes],
            "rows": rows,
            "pairs": pairs,
        }
    )


def epochs_for(size: int, args: argparse.Namespace) -> int:
    """The number of passes over `size` images."""
    return max(args.epochs, math.ceil(args.least_updates / (size // min(args.batch_size, size))))


def network_of(arm: str, num_classes: int) -> nn.Module:
    """The arm's network with random weights."""
    return ViT(num_classes, stem="conv") if arm == "ViT, conv stem" else OURS[ARMS[arm][0]](num_classes)


def trained(arm: str, size: int, seed: int, data: Data, args: argparse.Namespace, run: Run) -> dict:
    """What the .npz of a training holds, which is run unless history.csv has it."""
    path = run.path(f"{arm.lower().replace(', ', '_').replace(' ', '_')}_{size}_{seed}.npz")
    if run.row(arm=arm, images=size, seed=seed):
        return load_arrays(path, ("chosen", "seconds"))
    name, strong = ARMS[arm]
    order = stratified_order(data.train.y.cpu().numpy(), np.random.default_rng(args.seed + seed))[:size]
    order = torch.from_numpy(order).to(data.train.y.device)
    few = Split(data.train.x[order], data.train.y[order])
    seed_everything(args.seed + seed)  # the network's first weights
    network = network_of(arm, len(data.classes)).to(data.train.x.device, memory_format=torch.channels_last)
    how = {"epochs": epochs_for(size, args), "batch_size": min(args.batch_size, size), "seed": args.seed + seed}
    outcome = fit(name, network, few, None, **how, strong=strong, amp=args.amp)
    chosen = probabilities(network, data.test.x, args.amp).argmax(1).cpu().numpy()
    save_arrays(path, chosen=chosen, seconds=outcome.seconds)
    accuracy = float((chosen == data.test.y.cpu().numpy()).mean())
    run.log(arm=arm, images=size, seed=seed, loss=outcome.losses[-1], accuracy=accuracy, seconds=outcome.seconds)
    return load_arrays(path, ("chosen", "seconds"))


def row_of(arm: str, size: int, right: dict, found: dict) -> dict:
    """An arm at a size: mean accuracy with its 95 % interval over seeds, mean seconds."""
    accuracies = [float(each.mean()) for each in right[arm, size]]
    row = {"arm": arm, "images": size, "accuracy": float(np.mean(accuracies)), "half_width": half_width(accuracies)}
    seconds = float(np.mean([each["seconds"] for each in found[arm, size]]))
    return {**row, "accuracies": accuracies, "training_seconds": seconds}


def compared(a: str, b: str, size: int, right: dict) -> dict:
    """Two arms at a size: the mean difference with its 95 % interval over seeds, McNemar's test of the first seed."""
    gains = [float(one.mean() - other.mean()) for one, other in zip(right[a, size], right[b, size], strict=True)]
    a_alone, b_alone, p = mcnemar(right[a, size][0], right[b, size][0])
    row = {"images": size, "a": a, "b": b, "gain": float(np.mean(gains)), "gain_half_width": half_width(gains)}
    return {**row, "only_a_right": a_alone, "only_b_right": b_alone, "p": p}


def said(pair: dict) -> str:
    """A difference in words."""
    points, width = 100 * pair["gain"], 100 * pair["gain_half_width"]
    shown = "" if abs(points) > width else " (inconclusive)"
    return f"the {pair['a']} is {points:+.1f} ± {width:.1f} points over the {pair['b']}{shown}"


def draw(rows: list[dict], updates: dict[int, int], about: str, conclusion: str):
    """Test error against the number of images, and against the seconds of training. updates: for each size."""
    sizes = list(updates)
    figure, axes = new_figure(1, 2, width=11.6, height=5.0, sharey=True)
    for index, arm in enumerate(ARMS):
        mine = [row for row in rows if row["arm"] == arm]
        error = np.array([100 * (1 - np.array(row["accuracies"])) for row in mine])  # (sizes, S)
        style = {**line_style(index), "marker": "osD^vX"[index], "markersize": 5}
        axes[0, 0].plot(sizes, error.mean(1), label=arm, **style)
        axes[0, 0].plot(sizes, error, "_", color=style["color"], markersize=7)
        axes[0, 1].plot([row["training_seconds"] for row in mine], error.mean(1), **style)
    axes[0, 0].set(
        xscale="log",
        yscale="log",
        xlabel="images to learn from, and below it the updates",
        ylabel="test error (%), mean and seeds",
    )
    axes[0, 0].set_xticks(sizes, [f"{size:,}\n{updates[size]:,}" for size in sizes])
    axes[0, 0].xaxis.set_minor_locator(NullLocator())
    axes[0, 0].legend()
    axes[0, 1].set(xscale="log", xlabel="training (s); each point is one of the sizes")
    axes[0, 1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0, 1].xaxis.set_major_formatter("{x:g}")
    axes[0, 1].xaxis.set_minor_locator(NullLocator())
    figure.suptitle(f"{about}: " + conclusion.replace("; ", ";\n"))
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
