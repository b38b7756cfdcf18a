"""How many labels does pretraining on other images save?

    python cnn_cifar/transfer_learning.py --epochs 5 --batch-size 64 --resize 224 --device cuda
    python cnn_cifar/transfer_learning.py --weights resnet18-f37072fd.pth --resize 224 --device cuda
    python cnn_cifar/transfer_learning.py --source fashion --dataset mnist --resize 32

A ResNet-18 learns the classes of `--dataset` from few labelled images, in three ways:

    scratch       all weights from a random start
    frozen        a pretrained network whose weights and BatchNorm statistics stay; only a new linear layer learns
    fine-tuned    the pretrained network and a new linear layer, all of it learns

The pretrained weights are torchvision's for ImageNet (downloaded when they are not in `--data-dir`), those of
`--weights FILE` (a state dict with torchvision's names), or, with `--source`, made here on another data set; they are
saved as source.pth, which `--weights` reads. All three ways get the same labelled images and the same number of
updates, without augmentation, each with the one of `--lrs` that is best on validation images for the first seed (these
are labelled too, and not counted among the few); test images are read once for each training. A frozen network sees
each image once: the linear layer then learns from the stored features.

Grey images become three equal channels; all are resized to `--resize` pixels and normalised with ImageNet's statistics.
At 32 pixels the stem and the stages leave a single position, which is enough for digits.

Writes transfer.png, source.png, source.pth, history.csv, metrics.json.
With --resume a study that was stopped goes on with the trainings that are missing.
Sources: Yosinski et al. 2014 (how transferable features are); He, Zhang, Ren and Sun 2016 for the network.
Shapes: N images, B batch, K classes, F features.
"""

import argparse
import math
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ticker import LogFormatter, NullLocator
from torch import Tensor, nn

from cnn_cifar.inputs import SMALLEST, Data, Split, add_data_flags, load, load_splits, pixels, resized, share
from cnn_cifar.models import IMAGENET, Normalize, get_param_groups
from cnn_cifar.pretrained import backbone, imagenet_weights, read_weights
from cnn_cifar.resnet import ResNet
from shared_utils import checkpoint
from shared_utils.cli import (
    UserError,
    add_amp,
    add_seeds,
    at_least,
    make_parser,
    positive_float,
    positive_int,
    run_main,
)
from shared_utils.data import endless_minibatches, stratified_order
from shared_utils.device import autocast, pick_device
from shared_utils.modes import evaluating
from shared_utils.plotting import COLORS, image_grid, line_style, new_figure, save_figure
from shared_utils.runs import Run, check_finite, start_run
from shared_utils.schedules import one_cycle
from shared_utils.seeding import seed_everything
from shared_utils.stats import half_width

WAYS = ("scratch", "frozen", "fine-tuned")


def build_parser():
    """The command line."""
    quick = {"source": "digits", "source_size": 200, "source_epochs": 1, "resize": 32, "width": 4, "labels": [20, 40]}
    quick |= {"epochs": 1, "least_updates": 4, "batch_size": 16, "val_size": 300, "seeds": [0, 1], "lrs": [0.05]}
    parser = make_parser(__doc__, dataset="cifar10", quick=quick)
    add_data_flags(parser, batch_size=64, val_size=5000)
    parser.add_argument("--weights", metavar="FILE", help="state dict of a pretrained ResNet-18, torchvision's names")
    parser.add_argument("--source", metavar="NAME", help="pretrain here, on this data set (names as for --dataset)")
    parser.add_argument("--source-epochs", type=positive_int, default=2, help="with --source: passes over its images")
    parser.add_argument("--source-size", type=positive_int, help="with --source: how many of its images (default: all)")
    parser.add_argument("--source-lr", type=positive_float, default=0.02, help="with --source: highest learning rate")
    counts = "labelled images to learn from, of all classes together"
    parser.add_argument("--labels", type=positive_int, nargs="+", default=[100, 500, 2500], help=counts)
    parser.add_argument("--epochs", type=positive_int, default=5, help="passes over the labelled images")
    least = "fewest updates; where the epochs give fewer, the images are passed over more often"
    parser.add_argument("--least-updates", type=positive_int, default=250, help=least)
    parser.add_argument("--resize", type=at_least(SMALLEST), default=224, help="side, in pixels, that the network sees")
    parser.add_argument("--width", type=positive_int, default=64, help="channels of the first stage (ResNet-18's: 64)")
    rates = {"type": positive_float, "nargs": "+", "default": [0.01, 0.1]}
    parser.add_argument("--lrs", **rates, help="highest learning rates of one cycle; each way gets the better one")
    add_amp(parser, by_machine=True)
    add_seeds(parser, [0, 1, 2], "each with its own images and initial weights", least=2)
    parser.add_argument("--resume", action="store_true", help="go on with the trainings that history.csv lacks")
    return parser


def main(argv=None) -> dict:
    """Pretrain or read weights, train every way from every seed; returns the metrics."""
    args = build_parser().parse_args(argv)
    if args.weights and args.source:
        raise UserError("--weights and --source: give one of them, both say where the pretrained network comes from")
    if args.source == args.dataset:
        raise UserError(f"--source {args.source}: pretraining on --dataset itself would use all of its labels")
    if min(args.batch_size, *args.labels) < 2:
        raise UserError("--batch-size and --labels: at least two images, BatchNorm learns from how they differ")
    device = pick_device(args.device)
    data = load(args, device, shape=None)
    if max(args.labels) > len(data.train):
        raise UserError(f"--labels {max(args.labels)}: there are {len(data.train)} images to train on")
    given, origin = None, "ImageNet"
    if args.weights:
        given, origin = read_weights(args.weights), Path(args.weights).name
    elif not args.source:
        instead = "name a file with --weights, or pretrain here: --source fashion --dataset mnist --resize 32"
        given = imagenet_weights("resnet18", Path(args.data_dir) / "weights", instead)
    if given is not None:
        backbone(args.width, given, origin)  # refused before the run begins, not after
    source = None  # to pretrain on: nothing of it is held out
    if args.source:
        source = load_splits(args.source, args.data_dir, device, train_size=args.source_size, shape=None)
    run = start_run(args)
    if not args.resume:
        run.path("source.pth").unlink(missing_ok=True)  # of an earlier run, perhaps from another source
    found = {}
    if source:
        origin = source.title
        given, found = pretrained(source, args, run)
    else:
        checkpoint.save(run.path("source.pth"), model=given, origin=origin)
    save_figure(draw_filters(given["conv1.weight"], origin), run.path("source.png"))

    seen_by = dict.fromkeys(WAYS, data) | {"frozen": features_of(data, given, args)}
    rows, rates = {}, {}
    for count in sorted(set(args.labels)):
        for way in WAYS:
            tried = {lr: trained(way, count, args.seeds[0], lr, given, seen_by[way], args, run) for lr in args.lrs}
            lr = max(args.lrs, key=lambda lr: float(tried[lr]["val_accuracy"]))
            rest = (trained(way, count, seed, lr, given, seen_by[way], args, run) for seed in args.seeds[1:])
            rows[way, count], rates[way, count] = [tried[lr], *rest], lr
            for row in rows[way, count]:  # a rate that diverges is a result, unless it is the chosen one
                check_finite(float(row["train_loss"]), updates_for(count, args), lr, "--lrs")
    table = []
    for count in sorted(set(args.labels)):
        right = {way: np.array([float(row["test_accuracy"]) for row in rows[way, count]]) for way in WAYS}
        row = {"labels": count, "updates": updates_for(count, args)}
        for way in WAYS:
            row |= {way: right[way].mean(), f"{way}_half_width": half_width(right[way])}
            row |= {f"{way}_accuracies": right[way], f"{way}_lr": rates[way, count]}
            row[f"{way}_mean_seconds"] = np.mean([float(one["seconds"]) for one in rows[way, count]])
        for way in WAYS[1:]:
            gain = right[way] - right["scratch"]
            row |= {f"{way}_gain": gain.mean(), f"{way}_gain_half_width": half_width(gain)}
        table.append(row)
    about = f"{data.title} at {args.resize}×{args.resize} after {origin}, ResNet-18 of {args.width} channels and up"
    conclusion = "; ".join(said(row) for row in (table if len(table) == 1 else (table[0], table[-1])))
    save_figure(draw(table, f"{about}, {len(args.seeds)} seeds", conclusion), run.path("transfer.png"))
    return run.finish(
        {
            "origin": origin,
            "resize": args.resize,
            "width": args.width,
            "epochs": args.epochs,
            "seeds": args.seeds,
            "test_images": len(data.test),
            **found,
            "labels": table,
            "conclusion": conclusion,
        }
    )


# --- pretraining --------------------------------------------------------------------------------------------------


def pretrained(source: Data, args: argparse.Namespace, run: Run) -> tuple[dict[str, Tensor], dict]:
    """A ResNet-18 trained on all of the source, which is kept as source.pth, and its metrics."""
    path = run.path("source.pth")
    if not (args.resume and path.exists()):
        seed_everything(args.seed)
        updates = max(1, args.source_epochs * (len(source.train) // args.batch_size))
        network = complete(backbone(args.width, None, ""), args.width, len(source.classes), source.train.x.device)
        loss = fit(network, source.train, args.source_lr, updates, args.seed, args)
        check_finite(loss, updates, args.source_lr, "--source-lr")
        right = accuracy(network, source.test, args)
        print(f"pretrained on {source.title}: {right:.2%} of its test images", flush=True)
        weights = {name: value.cpu() for name, value in network[1].state_dict().items()}
        checkpoint.save(path, model=weights, origin=source.title, found={"source_accuracy": right})
    state = checkpoint.load(path)
    return state["model"], state["found"]


# --- training -----------------------------------------------------------------------------------------------------


def trained(way: str, count: int, seed: int, lr: float, given: dict[str, Tensor], data: Data, args, run: Run) -> dict:
    """The row of history.csv of one training, run unless the row is there. data: features where frozen."""
    key = {"way": way, "labels": count, "seed": seed, "lr": lr}
    if row := run.row(**key):
        return row
    started = time.perf_counter()
    device = data.train.y.device
    chosen = stratified_order(data.train.y.cpu().numpy(), np.random.default_rng(args.seed + seed))[:count]
    chosen = torch.from_numpy(chosen).to(device)
    labelled = Split(data.train.x[chosen], data.train.y[chosen])
    seed_everything(args.seed + seed)
    if way == "frozen":
        network = nn.Linear(data.train.x.shape[1], len(data.classes)).to(device)  # all that learns
    else:
        features = backbone(args.width, None if way == "scratch" else given, "")
        network = complete(features, args.width, len(data.classes), device)
    loss = fit(network, labelled, lr, updates_for(count, args), args.seed + seed, args)
    seconds = round(time.perf_counter() - started, 2)
    train, val, test = (accuracy(network, split, args) for split in (labelled, data.val, data.test))
    right = {"train_accuracy": train, "val_accuracy": val if math.isfinite(loss) else 0.0, "test_accuracy": test}
    run.log(**key, train_loss=loss, **right, seconds=seconds)
    return run.history()[-1]


def complete(features: ResNet, width: int, num_classes: int, device: torch.device) -> nn.Sequential:
    """Normalisation, the backbone and a new linear layer: images of [0, 1] (B, 3, H, W) → logits (B, K)."""
    network = nn.Sequential(Normalize(**IMAGENET), features, nn.Linear(8 * width, num_classes))
    return network.to(device, memory_format=torch.channels_last)


def updates_for(count: int, args) -> int:
    """How many updates a training on so many images gets."""
    return max(args.least_updates, args.epochs * (count // args.batch_size))


def seen(x: Tensor, side: int) -> Tensor:
    """What the network is given: uint8 images (B, 1 or 3, H, W) → floats of [0, 1] (B, 3, side, side).

    Features (B, F), which a linear layer learns from, stay as they are.
    """
    return x if x.ndim == 2 else resized(pixels(x.expand(-1, 3, -1, -1)), side)


def fit(network: nn.Module, split: Split, lr: float, updates: int, seed: int, args) -> float:
    """Train in place by SGD with Nesterov's momentum and a one-cycle learning rate; the updates' mean loss (nats)."""
    device = split.y.device
    optimizer = torch.optim.SGD(get_param_groups(network, 5e-4), lr=lr, momentum=0.9, nesterov=True)
    network.train()
    total = torch.zeros((), device=device)  # read once
    batches = endless_minibatches(len(split), args.batch_size, np.random.default_rng(seed))
    for step, batch in enumerate(islice(batches, updates)):
        batch = torch.from_numpy(batch).to(device)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, updates, lr)
        with autocast(device, args.amp):
            logits = network(seen(split.x[batch], args.resize))  # (B, K)
        loss = F.cross_entropy(logits.float(), split.y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return total.item() / updates


@torch.no_grad()
def features_of(data: Data, given: dict[str, Tensor], args) -> Data:
    """The frozen network's features (N, F) in place of all images, in evaluation mode: BatchNorm's statistics stay."""
    device = data.train.x.device
    network = complete(backbone(args.width, given, ""), args.width, 1, device)[:2].eval()

    def features(split: Split) -> Split:
        with autocast(device, args.amp):
            return Split(torch.cat([network(seen(x, args.resize)).float() for x in split.x.split(250)]), split.y)

    return replace(data, train=features(data.train), val=features(data.val), test=features(data.test))


@torch.no_grad()
def accuracy(network: nn.Module, split: Split, args) -> float:
    """The fraction of the images, or of features, classified right."""
    with evaluating(network), autocast(split.y.device, args.amp):
        logits = torch.cat([network(seen(part, args.resize)).float() for part in split.x.split(250)])  # (N, K)
    return share(logits.argmax(1) == split.y)


# --- what is shown ------------------------------------------------------------------------------------------------


def said(row: dict) -> str:
    """One row of the table in words."""
    parts = []
    for way in WAYS[1:]:
        gain, half = row[f"{way}_gain"], row[f"{way}_gain_half_width"]
        verdict = "" if abs(gain) > half else " (inconclusive)"
        parts.append(f"{way} {100 * gain:+.1f} ± {100 * half:.1f} points{verdict}")
    return f"with {row['labels']:,} labels " + ", ".join(parts) + " against scratch"


def draw(table: list[dict], about: str, conclusion: str):
    """Errors against the number of labels, and what pretraining brings."""
    figure, axes = new_figure(1, 2, width=11.2, height=4.6)
    counts = [row["labels"] for row in table]
    for index, way in enumerate(WAYS):
        errors = np.array([1 - row[f"{way}_accuracies"] for row in table])  # (counts, seeds)
        axes[0, 0].plot(counts, 100 * errors.mean(1), marker="o", label=way, **line_style(index))
        axes[0, 0].plot(counts, 100 * errors, "_", color=COLORS[index], markersize=9)
        if way in WAYS[1:]:
            gain = [100 * row[f"{way}_gain"] for row in table]
            half = [100 * row[f"{way}_gain_half_width"] for row in table]
            at = np.array(counts) * 1.05 ** (index - 1.5)
            axes[0, 1].errorbar(at, gain, half, marker="o", capsize=4, label=way, **line_style(index))
    axes[0, 1].axhline(0, color="black", linewidth=1)
    axes[0, 0].set(xscale="log", yscale="log", ylabel="test error (%), mean and seeds")
    axes[0, 1].set(xscale="log", ylabel="points of accuracy over scratch, 95 % interval")
    for formatter in (axes[0, 0].yaxis.set_major_formatter, axes[0, 0].yaxis.set_minor_formatter):
        formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.5)))
    for ax in axes.flat:
        ax.set(xlabel="labelled images")
        ax.set_xticks(counts, [f"{count:,}" for count in counts])
        ax.xaxis.set_minor_locator(NullLocator())
        ax.legend()
    figure.suptitle(f"{about}:\n" + conclusion.replace("; ", ";\n"))
    return figure


def draw_filters(filters: Tensor, origin: str):
    """The first layer's filters (C, 3, 7, 7), each scaled to its largest value."""
    figure, axes = new_figure(width=6.4, height=2.6)
    filters = filters.float()
    largest = filters.flatten(1).abs().amax(1)[:, None, None, None]
    image_grid(axes[0, 0], (0.5 + filters / (2 * largest)).numpy(), min(16, len(filters)))
    figure.suptitle(f"The first layer's {len(filters)} filters after {origin} (grey: 0)")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
