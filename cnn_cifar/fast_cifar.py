"""How fast can two CPU cores learn to classify 94 % of CIFAR-10's test images?

    python cnn_cifar/fast_cifar.py
    python cnn_cifar/fast_cifar.py --widths 32 64 128 --epochs 4 --out runs/cnn_cifar/fast_cifar_small
    python cnn_cifar/fast_cifar.py --val-size 5000 --without muon whitening --out runs/cnn_cifar/fast_cifar_without

A small network whose first layer whitens (fast_net.py), Muon (shared_utils/muon.py), flips in every other epoch,
smoothed labels, a learning rate that falls linearly to 0, and at test time the mean over shifted and mirrored copies of
each image (fast_training.py has all of it). Where the machine has bfloat16 it computes in that, with the channels last
in memory, which makes All-CNN more than twice as fast on a CPU with AVX-512 BF16 (benchmark.py). `--without` leaves
ingredients out; fast_cifar_ladder.py measures each one.

Nothing is chosen while it trains, so that it may train on all 50,000 images; the test images are read once, at the end.
Most hyperparameters are the recipe's author's, who could see the test set; those we changed (batch size, epochs,
learning rates) were chosen in trials of narrower networks on 5,000 validation images (`--val-size 5000`, which are then
judged instead of the test images).

Writes best.pth, last.pth, fast_cifar.png, history.csv, metrics.json.
With --resume a run that was stopped goes on from last.pth and ends with the same weights.
Sources: Jordan 2024, arXiv 2404.00498; Jordan et al. 2024 (Muon).
Shapes: N images, K classes.
"""

import time

from cnn_cifar.fast_training import INGREDIENTS, FastTraining, Recipe, accuracies
from cnn_cifar.inputs import add_data_flags, load
from shared_utils import checkpoint
from shared_utils.cli import add_amp, make_parser, positive_float, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import check_finite, start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import wilson_interval


def build_parser():
    """The command line."""
    quick = {"epochs": 2, "widths": [8, 16, 16], "batch_size": 100, "val_size": 3000}
    parser = make_parser(__doc__, dataset="cifar10", quick=quick)
    add_data_flags(parser, batch_size=Recipe.batch_size, val_size=0)
    parser.add_argument("--epochs", type=positive_int, default=Recipe.epochs, help="passes over the training images")
    widths = {"type": positive_int, "nargs": 3, "default": list(Recipe.widths), "metavar": "C"}
    parser.add_argument("--widths", **widths, help="channels of the three blocks")
    parser.add_argument("--lr", type=positive_float, default=Recipe.lr, help="Muon's learning rate at the start")
    parser.add_argument("--sgd-lr", type=positive_float, default=Recipe.sgd_lr, help="SGD's, used with --without muon")
    left_out = "leave out: " + ", ".join(f"{name} ({what})" for name, what in INGREDIENTS.items())
    parser.add_argument("--without", nargs="+", choices=INGREDIENTS, default=[], metavar="INGREDIENT", help=left_out)
    add_amp(parser, by_machine=True)
    parser.add_argument("--resume", action="store_true", help="go on from last.pth")
    return parser


def main(argv=None) -> dict:
    """Train, test once; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load(args, device)
    run = start_run(args)
    seed_everything(args.seed)
    recipe = Recipe(
        epochs=args.epochs,
        batch_size=args.batch_size,
        widths=tuple(args.widths),
        lr=args.lr,
        sgd_lr=args.sgd_lr,
        without=tuple(args.without),
    )
    started = time.perf_counter()
    training = FastTraining(recipe, data.train, len(data.classes), args.seed, args.amp)
    network, first, seconds = training.network, 0, time.perf_counter() - started
    config = {"network": "fast_net", **network.config}

    if args.resume and run.path("last.pth").exists():
        state = checkpoint.load(run.path("last.pth"), expect=config)
        network.load_state_dict(state["model"])
        for optimizer, saved in zip(training.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["epochs"], state["seconds"]
    run.rewind(first)

    about = {"config": config, "classes": list(data.classes), "title": data.title}
    for epoch in range(first, args.epochs):
        started = time.perf_counter()
        loss = training.epoch(epoch)
        lr, flag = (args.lr, "--lr") if recipe.has("muon") else (args.sgd_lr, "--sgd-lr")
        check_finite(loss, (epoch + 1) * training.per_epoch, lr, flag)
        seconds += time.perf_counter() - started
        run.log(epoch=epoch + 1, train_loss=loss, seconds=round(seconds, 1))
        states = [optimizer.state_dict() for optimizer in training.optimizers]
        progress = {"optimizers": states, "epochs": epoch + 1, "seconds": seconds}
        checkpoint.save(run.path("last.pth"), model=network.state_dict(), **about, **progress)
    checkpoint.save(run.path("best.pth"), model=network.state_dict(), **about)

    judged, name = (data.val, "validation") if data.val else (data.test, "test")
    found = accuracies(network, judged, args.amp)
    chosen = "mirrored and shifted" if recipe.has("tta") else "plain"
    accuracy = found[chosen]
    rows = run.numbers()
    save_figure(draw(rows, found, chosen, len(judged), f"{data.title}, {name} images"), run.path("fast_cifar.png"))
    return run.finish(
        {
            "widths": args.widths,
            "parameters": sum(p.numel() for p in network.parameters()),
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "without": args.without,
            "train_images": len(data.train),
            "judged_on": name,
            "accuracy": accuracy,
            "accuracy_interval": list(wilson_interval(round(accuracy * len(judged)), len(judged))),
            "accuracies": found,
            "train_loss": rows[-1]["train_loss"],
            "training_seconds": seconds,
            "images_per_second": args.epochs * training.per_epoch * args.batch_size / seconds,
        }
    )


def draw(rows: list[dict[str, float]], found: dict[str, float], chosen: str, n: int, about: str):
    """The training loss against time, and the accuracy on n images in the three ways to ask the network."""
    figure, axes = new_figure(1, 2, width=9.6, height=4.0)
    minutes = [row["seconds"] / 60 for row in rows]
    axes[0, 0].plot(minutes, [row["train_loss"] for row in rows], marker="o", markersize=4)
    axes[0, 0].set(xlabel="minutes of training (a point: an epoch)", ylabel="training loss (nats per image)")
    axes[0, 0].set_xlim(left=0)
    ax = axes[0, 1]
    for at, value in enumerate(found.values()):
        low, high = wilson_interval(round(value * n), n)
        error = [[100 * (value - low)], [100 * (high - value)]]
        ax.errorbar(at, 100 * value, error, fmt="o", color=COLORS[at], capsize=5)
        ax.annotate(f"{value:.2%}", (at, 100 * value), (10, 0), textcoords="offset points", va="center")
    ax.set_xticks(range(len(found)), [name.replace(" and ", "\nand ") for name in found])
    ax.set(xlim=(-0.4, len(found) - 0.3), ylabel=f"accuracy on {n:,} images (%), 95 % interval")
    figure.suptitle(f"{about}: {found[chosen]:.2%} right ({chosen}) after {minutes[-1]:.1f} minutes of training")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
