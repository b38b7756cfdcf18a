"""Which changes of the training images make a network better on images it has not seen?

    python cnn_cifar/augmentation_study.py --epochs 5 --batch-size 64 --resize 224 --device cuda
    python cnn_cifar/augmentation_study.py --resize 32 --width 16 --train-size 5000 --epochs 8
    python cnn_cifar/augmentation_study.py --resize 32 --width 16 --train-size 1000 --epochs 40 --out runs/cnn_cifar/few

A ResNet-18 is trained without augmentation, with each augmentation of augment.py alone, with flip and crop, as is
usual, and with all seven at once. Every network gets the same number of updates and, for a seed, begins with the same
weights and sees the same images in the same order. Measured are the accuracy on validation images and the
generalisation gap: the accuracy on the unaugmented training images minus that. What an augmentation brings is the mean
over the seeds of the difference from `none`, with Student's 95 % interval. There are nine such comparisons: even if no
augmentation had an effect, about one study in three would show one. The learning rate is tuned for none of them.

Mixup trains on λ x + (1 − λ) x̃ with the loss λ L(y) + (1 − λ) L(ỹ), λ ~ Beta(0.2, 0.2), drawn for each image. The
images are augmented at their own size and resized afterwards (`--resize`). Below 64 pixels the network has the stem for
small images; `--width 16` has a quarter of the paper's channels.

Writes augmentations.png, accuracy_and_gap.png, history.csv, metrics.json.
With --resume a study that was stopped goes on with the trainings that are missing.
Sources: see augment.py; He, Zhang, Ren and Sun 2016 for the network.
Shapes: N images, B batch, K classes.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from cnn_cifar.augment import (
    mixup,
    random_color_jitter,
    random_crop,
    random_cutout,
    random_flip,
    random_rand_augment,
    random_rotation,
)
from cnn_cifar.inputs import SMALLEST, Data, Split, add_data_flags, load, pixels, resized, share
from cnn_cifar.models import get_param_groups, pixel_resnet
from shared_utils.cli import add_amp, add_seeds, at_least, make_parser, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.device import autocast, pick_device
from shared_utils.modes import evaluating
from shared_utils.plotting import COLORS, image_grid, new_figure, save_figure
from shared_utils.runs import Run, check_finite, start_run
from shared_utils.schedules import one_cycle
from shared_utils.seeding import seed_everything
from shared_utils.stats import half_width, mean_std

SINGLE: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "flip": random_flip,
    "crop": random_crop,
    "colour jitter": random_color_jitter,
    "rotation": random_rotation,
    "RandAugment": random_rand_augment,
    "Cutout": random_cutout,
}
ARMS = {  # what is done to each batch, in this order; Mixup comes last, on floats
    "none": [],
    **{name: [name] for name in SINGLE},
    "Mixup": ["Mixup"],
    "flip and crop": ["flip", "crop"],
    "all seven": [*SINGLE, "Mixup"],
}
MIXUP = 0.2  # both parameters of the Beta distribution


def build_parser():
    """The command line."""
    quick = {"resize": 32, "width": 4, "train_size": 200, "val_size": 200, "epochs": 1, "seeds": [0, 1]}
    parser = make_parser(__doc__, dataset="cifar10", quick=quick)
    add_data_flags(parser, batch_size=64, val_size=5000)
    parser.add_argument("--epochs", type=positive_int, default=5, help="passes over the training images")
    parser.add_argument("--resize", type=at_least(SMALLEST), default=224, help="side, in pixels, that the network sees")
    parser.add_argument("--width", type=positive_int, default=64, help="channels of the first stage (the paper's: 64)")
    parser.add_argument("--train-size", type=positive_int, help="images to train on (default: all)")
    parser.add_argument("--lr", type=positive_float, default=0.1, help="the highest learning rate of one cycle")
    add_amp(parser, by_machine=True)
    add_seeds(parser, [0, 1, 2], "one training of each arm for each", least=2)
    parser.add_argument("--resume", action="store_true", help="go on with the trainings that history.csv lacks")
    return parser


def main(argv=None) -> dict:
    """Train every arm from every seed; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load(args, device, args.train_size)
    run = start_run(args)
    rows = {(arm, seed): trained(arm, seed, data, args, run) for seed in args.seeds for arm in ARMS}

    def over_seeds(arm: str, column: str) -> np.ndarray:
        return np.array([float(rows[arm, seed][column]) for seed in args.seeds])

    table = []
    for arm in ARMS:
        accuracy, train_accuracy = over_seeds(arm, "val_accuracy"), over_seeds(arm, "train_accuracy")
        gap, gain = train_accuracy - accuracy, accuracy - over_seeds("none", "val_accuracy")
        row = {"arm": arm, "accuracy": accuracy.mean(), "std": mean_std(accuracy)[1], "accuracies": accuracy}
        row |= {"train_accuracy": train_accuracy.mean(), "gap": gap.mean(), "gap_half_width": half_width(gap)}
        row |= {"val_loss": over_seeds(arm, "val_loss").mean(), "mean_seconds": over_seeds(arm, "seconds").mean()}
        table.append({**row, "gain": gain.mean(), "gain_half_width": half_width(gain)})
    helped = [row for row in table[1:] if row["gain"] > row["gain_half_width"]]
    harmed = [row for row in table[1:] if -row["gain"] > row["gain_half_width"]]
    best = max(table, key=lambda row: row["accuracy"])
    size = f"{len(data.train):,} images at {args.resize}×{args.resize}, {args.epochs} epochs"
    about = f"{data.title}, ResNet-18 of {args.width} channels and up, {size}, {len(args.seeds)} seeds"
    save_figure(draw_examples(data.train.x[:8].cpu(), args.seed, data.title), run.path("augmentations.png"))
    save_figure(draw(table, best, about), run.path("accuracy_and_gap.png"))
    return run.finish(
        {
            "resize": args.resize,
            "width": args.width,
            "epochs": args.epochs,
            "updates": args.epochs * (len(data.train) // args.batch_size),
            "train_images": len(data.train),
            "seeds": args.seeds,
            "arms": table,
            "none": table[0]["accuracy"],
            "best": best["arm"],
            "best_accuracy": best["accuracy"],
            "all_seven": table[-1]["accuracy"],
            "gains_shown_for": ", ".join(row["arm"] for row in helped) or "none",
            "losses_shown_for": ", ".join(row["arm"] for row in harmed) or "none",
        }
    )


def augmented(x: Tensor, arm: str, generator: Generator) -> Tensor:
    """uint8 images (B, 3, H, W) as an arm shows them to the network; Mixup is done later."""
    for name in ARMS[arm]:
        if name in SINGLE:
            x = SINGLE[name](x, generator)
    return x


def trained(arm: str, seed: int, data: Data, args, run: Run) -> dict:
    """The row of history.csv of one training, which is run unless the row is there."""
    key = {"arm": arm, "seed": seed}
    if row := run.row(**key):
        return row
    started = time.perf_counter()
    network, loss = fit(arm, args.seed + seed, data, args)
    seconds = time.perf_counter() - started
    _, train_accuracy = measure(network, data.train, args)
    val_loss, val_accuracy = measure(network, data.val, args)
    found = {"train_accuracy": train_accuracy, "val_accuracy": val_accuracy, "val_loss": val_loss}
    run.log(**key, loss_of_the_last_epoch=loss, **found, seconds=round(seconds, 1))
    return run.history()[-1]


def fit(arm: str, seed: int, data: Data, args) -> tuple[nn.Module, float]:
    """A network trained with one arm's augmentations, and the mean loss of its last epoch (nats)."""
    seed_everything(seed)
    x, y = data.train.x, data.train.y
    device = x.device
    network = pixel_resnet(len(data.classes), width=args.width, cifar_stem=args.resize < 64)
    network.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(get_param_groups(network, 5e-4), lr=args.lr, momentum=0.9, nesterov=True)
    order = np.random.default_rng(seed)
    shares = np.random.default_rng([seed, 1])  # its own: the order of the images is the same in every arm
    generator = Generator(device).manual_seed(seed)
    per_epoch = len(y) // args.batch_size
    step = 0
    for _ in range(args.epochs):
        total = torch.zeros((), device=device)  # read once an epoch
        for batch in minibatches(len(y), args.batch_size, order, drop_last=True):
            batch = torch.from_numpy(batch).to(device)
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(step, args.epochs * per_epoch, args.lr)
            images, labels = pixels(augmented(x[batch], arm, generator)), y[batch]
            if "Mixup" in ARMS[arm]:
                lam = torch.from_numpy(shares.beta(MIXUP, MIXUP, len(batch))).to(device, torch.float32)  # (B,)
                partner = torch.randperm(len(batch), generator=generator, device=device)
                images = mixup(images, partner, lam)
            with autocast(device, args.amp):
                logits = network(resized(images, args.resize)).float()  # (B, K)
            losses = F.cross_entropy(logits, labels, reduction="none")  # (B,)
            if "Mixup" in ARMS[arm]:
                losses = lam * losses + (1 - lam) * F.cross_entropy(logits, labels[partner], reduction="none")
            loss = losses.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
            step += 1
        check_finite(total.item(), step, args.lr)
    return network, total.item() / per_epoch


@torch.no_grad()
def measure(network: nn.Module, split: Split, args) -> tuple[float, float]:
    """Mean cross-entropy (nats) and accuracy on images that are resized but not augmented."""
    logits = []
    with evaluating(network), autocast(split.x.device, args.amp):
        for images in split.x.split(250):
            logits.append(network(resized(pixels(images), args.resize)).float())
    logits = torch.cat(logits)  # (N, K)
    return F.cross_entropy(logits, split.y).item(), share(logits.argmax(1) == split.y)


def draw_examples(x: Tensor, seed: int, title: str):
    """The first images x (n, 3, H, W), and what each arm makes of them."""
    figure, axes = new_figure(len(ARMS), width=7.6, height=0.78 * len(ARMS) + 0.7)
    shares = torch.full((len(x),), 0.7)  # of Mixup; most of the Beta distribution's are nearer to 0 or 1
    for ax, (arm, names) in zip(axes[:, 0], ARMS.items(), strict=True):
        images = augmented(x, arm, Generator().manual_seed(seed))
        if "Mixup" in names:
            images = mixup(images.float(), torch.arange(len(x)).roll(1), shares).byte()
        image_grid(ax, images.numpy(), len(x))
        ax.text(-0.02, 0.5, arm, transform=ax.transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(f"{title}: what the networks are shown\n(Mixup: 70 % of an image, 30 % of its left neighbour)")
    return figure


def draw(table: list[dict], best: dict, about: str):
    """What each arm brings, and how much better it is on the images it was trained on."""
    figure, axes = new_figure(1, 3, width=12.4, height=0.36 * len(table) + 1.8, sharey=True)
    for y, row in enumerate(table):
        axes[0, 0].plot(100 * row["accuracies"], [y] * len(row["accuracies"]), "|", color="black", markersize=11)
        axes[0, 0].plot(100 * row["accuracy"], y, "o", color=COLORS[0])
        axes[0, 0].annotate(f"{row['accuracy']:.1%}", (100 * row["accuracy"], y), (0, 6), textcoords="offset points")
        if y:
            sure = abs(row["gain"]) > row["gain_half_width"]
            style = {"color": COLORS[1] if sure else "#888888", "fmt": "s", "capsize": 4}
            axes[0, 1].errorbar(100 * row["gain"], y, xerr=100 * row["gain_half_width"], **style)
        style = {"color": COLORS[2], "fmt": "D", "capsize": 4}
        axes[0, 2].errorbar(100 * row["gap"], y, xerr=100 * row["gap_half_width"], **style)
    axes[0, 0].set_yticks(range(len(table)), [row["arm"] for row in table])
    axes[0, 0].set_ylim(len(table) - 0.5, -0.7)
    axes[0, 0].set(xlabel="validation accuracy (%), mean and seeds", title="how good")
    axes[0, 1].axvline(0, color="black", linewidth=1)
    axes[0, 1].set(xlabel="points over none, 95 % interval", title="what it adds; grey: no difference shown")
    axes[0, 2].set(xlabel="training − validation accuracy (points)", title="generalisation gap, 95 % interval")
    gain = f"{best['accuracy']:.1%}, {100 * best['gain']:+.1f} ± {100 * best['gain_half_width']:.1f} points over none"
    finding = f"best: {best['arm']} ({gain})" if best["arm"] != "none" else "none of them is better than none"
    figure.suptitle(f"{about}:\n{finding}; every arm in as many updates")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
