"""What does each ingredient of the fast recipe bring?

    python cnn_cifar/fast_cifar_ladder.py
    python cnn_cifar/fast_cifar_ladder.py --widths 64 256 256 --epochs 10 --device cuda

The small network of `fast_cifar.py` is trained without any ingredient (by SGD with Nesterov's momentum, at the best of
`--sgd-lrs`), then with one more on every rung, each time from the same seeds and for the same number of updates. What a
rung brings is the mean over the seeds of the difference from the rung before, with Student's 95 % interval: a seed
gives both the same images in the same order. Everything is measured on validation images. Averaging at test time is the
last rung and needs no training of its own.

Writes ladder.png, history.csv, metrics.json.
With --resume a ladder that was stopped goes on with the trainings that are missing.
Source: Jordan 2024, arXiv 2404.00498 (its table of what each feature saves).
"""

import math
import time
from dataclasses import replace

import numpy as np

from cnn_cifar.fast_training import INGREDIENTS, FastTraining, Recipe, accuracies
from cnn_cifar.inputs import Data, add_data_flags, load
from shared_utils.cli import add_amp, add_seeds, make_parser, positive_float, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import Run, check_finite, start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import half_width

TRAINED = [name for name in INGREDIENTS if name != "tta"]  # in the order in which they are added
BARE = "none of them"


def build_parser():
    """The command line."""
    small = {"epochs": 1, "widths": [8, 8, 8], "batch_size": 100, "train_size": 500, "val_size": 500}
    parser = make_parser(__doc__, dataset="cifar10", quick=small | {"seeds": [0, 1], "sgd_lrs": [0.1]})
    add_data_flags(parser, batch_size=Recipe.batch_size, val_size=5000)
    parser.add_argument("--train-size", type=positive_int, help="images to train on (default: all)")
    parser.add_argument("--epochs", type=positive_int, default=4, help="passes over the training images")
    widths = {"type": positive_int, "nargs": 3, "default": [32, 64, 128], "metavar": "C"}
    parser.add_argument("--widths", **widths, help="channels of the three blocks")
    add_seeds(parser, [0, 1, 2], "one training of each rung for each", least=2)
    tried = {"type": positive_float, "nargs": "+", "default": [0.03, 0.1, 0.3, 1.0]}
    parser.add_argument("--sgd-lrs", **tried, help="SGD's learning rates; the best for the first seed is used")
    add_amp(parser, by_machine=True)
    parser.add_argument("--resume", action="store_true", help="go on with the trainings that history.csv lacks")
    return parser


def main(argv=None) -> dict:
    """Train every rung from every seed; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load(args, device, args.train_size)
    run = start_run(args)
    without_all = Recipe(args.epochs, args.batch_size, tuple(args.widths), without=tuple(TRAINED))
    rates = {lr: trained(replace(without_all, sgd_lr=lr), BARE, args.seeds[0], data, args, run) for lr in args.sgd_lrs}
    # A learning rate that diverges is a result, unless it is the chosen one.
    finite = {lr: math.isfinite(float(row["train_loss"])) for lr, row in rates.items()}
    right = {lr: float(row["accuracy plain"]) if finite[lr] else 0.0 for lr, row in rates.items()}
    sgd_lr, updates = max(right, key=right.get), args.epochs * (len(data.train) // args.batch_size)
    rows = {}
    for seed in args.seeds:
        for i, rung in enumerate([BARE, *TRAINED]):
            recipe = replace(without_all, sgd_lr=sgd_lr, without=tuple(TRAINED[i:]))
            rows[rung, seed] = row = trained(recipe, rung, seed, data, args, run)
            lr, flag = (recipe.lr, "lr in cnn_cifar/fast_training.py") if recipe.has("muon") else (sgd_lr, "--sgd-lrs")
            check_finite(float(row["train_loss"]), updates, lr, flag)

    def over_seeds(rung: str, column: str) -> np.ndarray:
        return np.array([float(rows[rung, seed][column]) for seed in args.seeds])

    rungs = [BARE, *TRAINED]
    steps = [(rung, over_seeds(rung, "accuracy plain"), over_seeds(rung, "seconds")) for rung in rungs]
    last = steps[-1]
    steps.append(("tta", over_seeds(last[0], "accuracy mirrored and shifted"), last[2]))
    table = []
    for i, (rung, values, seconds) in enumerate(steps):
        row = {"rung": rung, "what": INGREDIENTS.get(rung, "SGD, random flips and crops"), "accuracy": values.mean()}
        row |= {"accuracies": values, "half_width": half_width(values), "mean_seconds": seconds.mean()}
        if i:
            gain = values - steps[i - 1][1]
            row |= {"gain": gain.mean(), "gain_half_width": half_width(gain)}
        table.append(row)
    about = f"{data.title}, {'-'.join(map(str, args.widths))} channels, {args.epochs} epochs, {len(args.seeds)} seeds"
    save_figure(draw(table, about), run.path("ladder.png"))
    gains = {"first": table[0]["accuracy"], "last": table[-1]["accuracy"]}
    shown = ", ".join(row["rung"] for row in table[1:] if row["gain"] > row["gain_half_width"]) or "none"
    worse = ", ".join(row["rung"] for row in table[1:] if -row["gain"] > row["gain_half_width"]) or "none"
    return run.finish(
        {
            "epochs": args.epochs,
            "seeds": args.seeds,
            "sgd_lr": sgd_lr,
            "sgd_lrs": [{"sgd_lr": lr, "accuracy": accuracy} for lr, accuracy in right.items()],
            **gains,
            "gains_shown_for": shown,
            "losses_shown_for": worse,
            "rungs": table,
        }
    )


def trained(recipe: Recipe, rung: str, seed: int, data: Data, args, run: Run) -> dict:
    """The row of history.csv of one training, which is run unless the row is there."""
    key = {"rung": rung, "seed": seed, "sgd_lr": recipe.sgd_lr}
    if row := run.row(**key):
        return row
    seed_everything(args.seed + seed)
    started = time.perf_counter()
    training = FastTraining(recipe, data.train, len(data.classes), args.seed + seed, amp=args.amp)
    for epoch in range(recipe.epochs):
        loss = training.epoch(epoch)
    seconds = time.perf_counter() - started
    found = {f"accuracy {name}": value for name, value in accuracies(training.network, data.val, args.amp).items()}
    run.log(**key, train_loss=loss, **found, seconds=round(seconds, 1))
    return run.history()[-1]


def draw(table: list[dict], about: str):
    """The accuracy of each rung, from the barest on top, and what each ingredient adds."""
    figure, axes = new_figure(1, 2, width=11.2, height=0.45 * len(table) + 1.6, sharey=True)
    at = np.arange(len(table))
    for row, y in zip(table, at, strict=True):
        axes[0, 0].plot(100 * row["accuracies"], [y] * len(row["accuracies"]), "|", color="black", markersize=12)
        axes[0, 0].plot(100 * row["accuracy"], y, "o", color=COLORS[0])
        axes[0, 0].annotate(f"{row['accuracy']:.1%}", (100 * row["accuracy"], y), (0, 7), textcoords="offset points")
        if "gain" in row:
            sure = abs(row["gain"]) > row["gain_half_width"]
            style = {"color": COLORS[1] if sure else "#888888", "fmt": "s", "capsize": 4}
            axes[0, 1].errorbar(100 * row["gain"], y, xerr=100 * row["gain_half_width"], **style)
    names = [("+ " if "gain" in row else "") + row["what"] for row in table]
    axes[0, 0].set_yticks(at, names)
    axes[0, 0].invert_yaxis()
    axes[0, 0].set(xlabel="validation accuracy (%), mean and seeds", title="with all ingredients down to here")
    axes[0, 1].axvline(0, color="black", linewidth=1)
    gain = "points over the rung above, 95 % interval"
    axes[0, 1].set(xlabel=gain, title="what it adds; grey: no difference shown")
    first, last = table[0]["accuracy"], table[-1]["accuracy"]
    largest = max(table[1:], key=lambda row: row["gain"])
    step = f"{100 * largest['gain']:+.1f} ± {100 * largest['gain_half_width']:.1f} points"
    figure.suptitle(
        f"{about}: from {first:.1%} to {last:.1%} in the same number of updates;\n"
        f"the largest step: {largest['what']}, {step}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
