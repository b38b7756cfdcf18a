"""Does max pooling, average pooling or a strided convolution serve a small CNN better?

    python numpy_nn/pooling_comparison.py --epochs 3
    python numpy_nn/pooling_comparison.py --train-size 50000 --seeds 0 1 2

Conv(1→8, 3×3) → ReLU → ↓2 → Conv(8→16, 3×3) → ReLU → ↓2 → Linear, where ↓2 halves height and width:

- max:      y = max over each 2×2 block
- average:  y = mean over each 2×2 block
- strided:  y = a 2×2 convolution of stride 2, learned (Springenberg et al. 2015); the average is one such convolution

For each seed the layers that the variants share start from the same weights and see the same batches, for the same
number of updates (Adam, its learning rate falling to zero along half a cosine). Which variant wins depends on the
learning rate, so each has its own: the one of `--lrs` with the lowest validation loss, tried with the first seed.
McNemar's exact test compares the predictions of that seed. Boureau et al. found that max pooling separates classes
better where features are rarely active, so the active fraction of what is pooled is measured too, on the validation
images.

Writes curves.png, comparison.csv, history.csv and metrics.json. Source: Boureau et al. 2010, Springenberg et al. 2015.
Shapes: B batch, C channels, H W pixels, K classes.
"""

import itertools
import math
import time

import numpy as np

from numpy_nn.activations import ReLU
from numpy_nn.conv import AvgPool2d, Conv2d, MaxPool2d
from numpy_nn.inputs import CHUNK, Inputs, evaluate, load_inputs, predict_logits
from numpy_nn.layers import Flatten, Layer, Linear
from numpy_nn.losses import SoftmaxCrossEntropy, stopping
from numpy_nn.network import Sequential
from numpy_nn.optimizers import Adam
from shared_utils.cli import UserError, add_seeds, make_parser, positive_float, positive_int, run_main
from shared_utils.data import minibatches, stratified_order
from shared_utils.plotting import COLORS, mean_band, new_figure, save_figure
from shared_utils.runs import Diverged, start_run, write_csv
from shared_utils.schedules import half_cosine
from shared_utils.stats import mcnemar, mean_std, wilson_interval

VARIANTS = ("max", "average", "strided")


def halving(variant: str, channels: int, rng: np.random.Generator) -> Layer:
    """(B, C, H, W) → (B, C, H/2, W/2)."""
    if variant == "strided":
        return Conv2d(channels, channels, 2, stride=2, init="xavier", rng=rng)
    return MaxPool2d(2) if variant == "max" else AvgPool2d(2)


def build_network(variant: str, classes: int, seed: list[int]) -> Sequential:
    """The CNN with one way of halving: (B, 1, 28, 28) → logits (B, K). Each layer has a generator of its own."""
    rngs = [np.random.default_rng([*seed, layer]) for layer in range(5)]
    return Sequential(
        Conv2d(1, 8, 3, padding=1, rng=rngs[0]),  # (B, 8, 28, 28)
        ReLU(),
        halving(variant, 8, rngs[1]),  # (B, 8, 14, 14)
        Conv2d(8, 16, 3, padding=1, rng=rngs[2]),  # (B, 16, 14, 14)
        ReLU(),
        halving(variant, 16, rngs[3]),  # (B, 16, 7, 7)
        Flatten(),  # (B, 784)
        Linear(784, classes, rng=rngs[4]),
    )


def train(variant: str, lr: float, seed: int, data: Inputs, args, run) -> dict:
    """Train one network on the first `--train-size` images of a stratified order; returns it with its curves.

    Errors: `Diverged` when the loss does not stay finite.
    """
    network = build_network(variant, len(data.classes), [args.seed, seed])
    rng = np.random.default_rng([args.seed, seed, 100])  # images and batches: the same for every variant
    chosen = stratified_order(data.y_train, rng)[: args.train_size]
    loss, optimizer = SoftmaxCrossEntropy(), Adam(network.layers, lr)
    updates = args.epochs * math.ceil(len(chosen) / args.batch_size)
    step, rows, seconds = 0, [], 0.0
    for epoch in range(1, args.epochs + 1):
        started, total = time.perf_counter(), 0.0
        for at in minibatches(len(chosen), args.batch_size, rng):
            batch = chosen[at]
            optimizer.lr = half_cosine(step, updates, lr)
            with stopping(step + 1, optimizer.lr, lr, "--lrs", variant):
                value = loss.forward(network.forward(data.x_train[batch], training=True), data.y_train[batch])
                network.backward(loss.backward(), need_dx=False)
                optimizer.step()
            total += float(value) * len(batch)
            step += 1
        seconds += time.perf_counter() - started
        with stopping(step, optimizer.lr, lr, "--lrs", variant):
            val_loss, val_accuracy = evaluate(network, data.x_val, data.y_val)
        row = {"train_loss": total / len(chosen), "val_loss": val_loss, "val_accuracy": val_accuracy}
        run.log(variant=variant, lr=lr, seed=seed, epoch=epoch, **row)
        rows.append(row)
    return {"network": network, "rows": rows, "epoch_seconds": seconds / args.epochs, "updates": updates}


def trial(variant: str, lr: float, seed: int, data: Inputs, args, run) -> dict:
    """As `train`; where it diverges, an infinite validation loss and the error: the other learning rates go on."""
    try:
        return train(variant, lr, seed, data, args, run)
    except Diverged as error:
        print(error, flush=True)
        return {"rows": [{"val_loss": math.inf}], "error": error}


def active_fractions(network: Sequential, x: np.ndarray) -> list[float]:
    """For each ReLU, the fraction of its outputs on x (at most `CHUNK` images) that are above 0."""
    fractions, x = [], x[:CHUNK]
    for layer in network.layers:
        x = layer.forward(x)
        if isinstance(layer, ReLU):
            fractions.append(float((x > 0).mean()))
    return fractions


def build_parser():
    """The command line."""
    quick = {"epochs": 3, "seeds": [0, 1], "train_size": 600, "batch_size": 32, "lrs": [0.003, 0.01]}
    parser = make_parser(__doc__, device=False, quick=quick)
    parser.add_argument("--epochs", type=positive_int, default=3, help="passes over the training images")
    add_seeds(parser, [0, 1, 2, 3, 4], "one run of each variant")
    parser.add_argument("--train-size", type=positive_int, default=20_000, help="training images, stratified")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per update")
    lrs = [0.003, 0.01, 0.03]
    parser.add_argument("--lrs", type=positive_float, nargs="+", default=lrs, help="learning rates to choose from")
    return parser


def main(argv=None) -> dict:
    """Train every variant over the seeds, test them, compare; returns the metrics."""
    args = build_parser().parse_args(argv)
    data = load_inputs(args)
    if args.train_size > len(data.y_train):
        raise UserError(f"--train-size {args.train_size}: {args.dataset} has {len(data.y_train)} beside validation")
    run = start_run(args)
    seeds = args.seeds
    # The variants in turn: a machine that slows down slows all of them.
    lrs = sorted(set(args.lrs))
    trials = {(v, lr): trial(v, lr, seeds[0], data, args, run) for lr in lrs for v in VARIANTS}
    val_losses = {v: [trials[v, lr]["rows"][-1]["val_loss"] for lr in lrs] for v in VARIANTS}
    chosen = {v: lrs[int(np.argmin(losses))] for v, losses in val_losses.items()}
    runs = {(v, seeds[0]): trials[v, chosen[v]] for v in VARIANTS}
    if errors := [found["error"] for found in runs.values() if "error" in found]:  # at every rate
        raise errors[0]
    runs |= {(v, seed): train(v, chosen[v], seed, data, args, run) for seed in seeds[1:] for v in VARIANTS}

    variants, right = {}, {}
    for variant in VARIANTS:
        of_variant = [runs[variant, seed] for seed in seeds]
        correct = [predict_logits(r["network"], data.x_test).argmax(1) == data.y_test for r in of_variant]
        right[variant] = correct[0]
        row = {
            "lr": chosen[variant],
            "lr_grid": lrs,
            "lr_val_losses": [x if math.isfinite(x) else None for x in val_losses[variant]],
        }
        row["parameters"] = sum(a.size for a in of_variant[0]["network"].parameters().values())
        for key, values in {
            "test_accuracy": [c.mean() for c in correct],
            "val_accuracy": [r["rows"][-1]["val_accuracy"] for r in of_variant],
            "train_loss": [r["rows"][-1]["train_loss"] for r in of_variant],
        }.items():
            row[key], row[f"{key}_std"] = mean_std(values)
        row["first_seed_interval"] = wilson_interval(int(correct[0].sum()), len(data.y_test))
        fractions = [active_fractions(r["network"], data.x_val) for r in of_variant]
        row["active_fraction_1"], row["active_fraction_2"] = np.mean(fractions, axis=0)
        row["epoch_seconds"] = float(np.mean([r["epoch_seconds"] for r in of_variant]))
        variants[variant] = row
    tests = []
    for a, b in itertools.combinations(VARIANTS, 2):
        only_a, only_b, p = mcnemar(right[a], right[b])
        tests.append({"a": a, "b": b, "only_a_right": only_a, "only_b_right": only_b, "p": p})

    lists = ("first_seed_interval", "lr_grid", "lr_val_losses")  # in metrics.json alone
    table = [{"variant": v, **{k: x for k, x in row.items() if k not in lists}} for v, row in variants.items()]
    write_csv(run.path("comparison.csv"), table)
    for row in table:
        spread = f"{100 * row['test_accuracy']:.2f} ± {100 * row['test_accuracy_std']:.2f} %"
        print(
            f"{row['variant']:8}  test {spread}  {row['parameters']:,} parameters  {row['epoch_seconds']:.1f} s/epoch"
        )

    best, *_, worst = sorted(VARIANTS, key=lambda v: -variants[v]["test_accuracy"])
    outcome = {"best": best, "worst": worst, "gap_points": 0.0, "updates": runs[best, seeds[0]]["updates"]}
    outcome["gap_points"] = 100 * (variants[best]["test_accuracy"] - variants[worst]["test_accuracy"])
    outcome["largest_std_points"] = 100 * max(row["test_accuracy_std"] for row in variants.values())
    title = f"{data.title}, {args.train_size:,} training images"
    save_figure(draw(runs, variants, tests, outcome, seeds, title), run.path("curves.png"))
    return run.finish(
        {"train_size": args.train_size, "seeds": seeds, **outcome, "variants": variants, "mcnemar": tests}
    )


def draw(runs: dict, variants: dict, tests: list, outcome: dict, seeds: list[int], title: str):
    """Training loss and validation accuracy against epochs; test accuracy with each seed, and the tests' p."""
    figure, axes = new_figure(1, 3, width=14.5, height=4.6)
    for index, variant in enumerate(VARIANTS):
        epochs = range(1, len(runs[variant, seeds[0]]["rows"]) + 1)
        for ax, key, scale in ((axes[0, 0], "train_loss", 1), (axes[0, 1], "val_accuracy", 100)):
            values = scale * np.array([[row[key] for row in runs[variant, seed]["rows"]] for seed in seeds])
            mean_band(ax, epochs, values, label=f"{variant}, lr {variants[variant]['lr']:g}", index=index)
        row = variants[variant]
        low, high = (100 * bound for bound in row["first_seed_interval"])
        mean, std = 100 * row["test_accuracy"], 100 * row["test_accuracy_std"]
        axes[0, 2].errorbar(index, mean, yerr=std, fmt="o", color=COLORS[index], capsize=5)
        axes[0, 2].plot([index + 0.15] * 2, [low, high], color="#999999", linewidth=3, alpha=0.6)
        text = f"{mean:.2f} ± {std:.2f} %\n{row['epoch_seconds']:.1f} s an epoch"
        axes[0, 2].annotate(
            text, (index, min(low, mean - std)), (0, -6), textcoords="offset points", ha="center", va="top", fontsize=8
        )
    axes[0, 0].set(xlabel="epochs", ylabel="training loss (nats)", yscale="log", title="training")
    axes[0, 1].set(xlabel="epochs", ylabel="validation accuracy (%)", title="validation")
    for ax in axes[0, :2]:
        ax.set_xticks(list(epochs))
        ax.legend()
    bottom, top = axes[0, 2].get_ylim()
    axes[0, 2].set(
        xlim=(-0.6, 2.6),
        ylim=(bottom - 0.3 * (top - bottom), top),
        ylabel="test accuracy (%)",
        title=f"● mean ± std; grey: Wilson 95 %, seed {seeds[0]}",
    )
    axes[0, 2].set_xticks(range(len(VARIANTS)), [f"{v}\n{variants[v]['parameters']:,} weights" for v in VARIANTS])
    said = "; ".join(f"{t['a']} against {t['b']} p = {t['p']:.2g}" for t in tests)
    figure.supxlabel(f"McNemar's exact test, predictions of seed {seeds[0]} alone: {said}", fontsize=9)
    gap, spread = outcome["gap_points"], outcome["largest_std_points"]
    verdict = f"{'more' if gap > spread else 'no more'} than the seeds' spread ({spread:.2f})"
    ahead = f"{outcome['best']} {gap:.2f} points ahead of {outcome['worst']}, {verdict}"
    figure.suptitle(f"{title}, {outcome['updates']:,} updates, {len(seeds)} seeds: {ahead}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
