"""When does a classifier gain from an autoencoder's codes in place of raw pixels?

    python autoencoder/ft_compare_raw_vs_ae.py
    python autoencoder/ft_compare_raw_vs_ae.py --labels 100 1000 --hidden 64 --seeds 0 1 2

The same classifiers, a multilayer perceptron (MLP) and softmax regression (no hidden layer), learn from n labelled
images, given as raw pixels, as codes of the trained autoencoder and of the denoising one, and as PCA codes of the same
size. Autoencoders and PCA saw all training images, without a label: with few labels, that is the codes' advantage. For
each seed the labelled images are a stratified draw, and a smaller draw is part of a larger one. Inputs are standardised
with the labelled images alone: pixels by one mean and deviation, codes column by column.

The recipe (network, dropout, decay, learning rates, updates) is one for all inputs and all n: with few labels nothing
is tuned, since none are left to tune with. It was set on the validation images, with all labels; the learning rate of
softmax regression with 1,000 too, where a lower one stops short of the optimum on codes, and makes them look bad.
Codes win at n when the 95 % interval of accuracy(codes) − accuracy(raw), paired by seed (Student's t), lies above 0.
It covers draws of labels, of weights and of batches; not the autoencoder's own training: there is only one.

Writes ft_val_acc_fashion_verbose.png, ft_test_acc_fashion_verbose.png, label_efficiency.png, history.csv,
metrics.json.
Sources: Wilson 1927; McNemar 1947. Shapes: N images, D features of an input, n labelled images.
"""

import math
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from autoencoder.fitting import codes
from autoencoder.inputs import Inputs, add_data_flags, load_pixels, pixels
from autoencoder.models import Classifier
from autoencoder.optimizers import AdamW
from autoencoder.pca import fit_pca
from autoencoder.trained import find_trained, load_trained
from shared_utils.cli import (
    UserError,
    add_seeds,
    make_parser,
    non_negative_float,
    positive_float,
    positive_int,
    run_main,
    share_below_1,
)
from shared_utils.data import endless_minibatches, stratified_order
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, line_style, mean_band, new_figure, save_figure
from shared_utils.runs import check_finite, start_run
from shared_utils.schedules import one_cycle
from shared_utils.seeding import seed_everything
from shared_utils.stats import half_width, mcnemar, mean_std, wilson_interval

NAMES = {"raw": "raw pixels", "pca": "PCA codes", "codes": "autoencoder's codes", "denoising": "denoising codes"}


def build_parser():
    """The command line."""
    small = {"val_size": 200, "labels": [50, 200], "seeds": [0, 1], "hidden": [32], "epochs": 12, "updates": 150}
    parser = make_parser(__doc__, dataset="fashion", quick=small | {"batch_size": 64})
    add_data_flags(parser)
    parser.add_argument("--ckpt", metavar="FILE", help="autoencoder (default: ae_experiments.py's)")
    parser.add_argument("--ckpt-denoising", metavar="FILE", help="the denoising one (default: its --variant denoising)")
    few = [100, 300, 1000, 3000, 10000]
    parser.add_argument("--labels", type=positive_int, nargs="+", default=few, help="labelled images, besides all")
    add_seeds(parser, [0, 1, 2, 3, 4], "draws of labels, weights")
    parser.add_argument("--hidden", type=positive_int, nargs="+", default=[256, 128], help="the MLP's hidden layers")
    parser.add_argument("--dropout", type=share_below_1, default=0.2, help="after each hidden layer")
    parser.add_argument("--weight-decay", type=non_negative_float, default=0.01, help="AdamW's decay")
    parser.add_argument("--lr", type=positive_float, default=3e-3, help="highest learning rate of the MLP")
    parser.add_argument("--linear-lr", type=positive_float, default=0.02, help="that of softmax regression")
    parser.add_argument("--epochs", type=positive_int, default=12, help="passes over the labelled images, at least")
    parser.add_argument("--updates", type=positive_int, default=500, help="updates, at least")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="images per update")
    return parser


# --- inputs -------------------------------------------------------------------------------------------------------


def load_features(args, data: Inputs) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Kind of input → float32 (N, D) of the training, validation and test images.

    Errors: `UserError` in one line for a missing checkpoint, or one of another data set or other dimensions.
    """
    parts, size = (data.x_train, data.x_val, data.x_test), data.x_train.shape[1]
    ckpt = args.ckpt or find_trained(args)
    denoising = args.ckpt_denoising or find_trained(args, "denoising")
    models = [load_trained(path, args, size, data.x_train.device).model for path in (ckpt, denoising)]
    pca = fit_pca(data.x_train, models[0].latent)
    inputs = {"raw": pixels, "pca": pca.project}
    inputs |= {"codes": lambda x: codes(models[0], x), "denoising": lambda x: codes(models[1], x)}
    return {name: tuple(make(part) for part in parts) for name, make in inputs.items()}


def label_order(y: Tensor, seed: int) -> Tensor:
    """Positions in y (N,), int64 (N,), the first n of which are this seed's labelled images: stratified, nested."""
    return torch.from_numpy(stratified_order(y.cpu().numpy(), np.random.default_rng(seed))).to(y.device)


def standardise(name: str, labelled: Tensor, *others: Tensor) -> list[Tensor]:
    """`labelled` (n, D) and `others` (·, D) by the mean and deviation of `labelled`, for codes column by column."""
    axes = (0, 1) if name == "raw" else (0,)
    mean, deviation = labelled.mean(axes), labelled.std(axes, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1)  # a column that is constant stays so
    return [(x - mean) / deviation for x in (labelled, *others)]


# --- classifier ---------------------------------------------------------------------------------------------------


def fit_classifier(x: Tensor, y: Tensor, classes: int, hidden, args, seed: int, val=None) -> tuple[Classifier, list]:
    """A classifier trained on x (n, D), y (n,); and, with val = (x, y), its accuracy there after each epoch."""
    torch.manual_seed(seed)
    options = {"use_batchnorm": bool(hidden), "dropout": args.dropout if hidden else 0.0}
    model = Classifier(x.shape[1], hidden, classes, **options).to(x.device)
    # Codes have few columns: softmax regression needs large weights for them, which a low rate reaches too late.
    lr = args.lr if hidden else args.linear_lr
    optimizer, curve = AdamW(model.layers, lr, weight_decay=args.weight_decay), []
    per_epoch = max(1, len(x) // args.batch_size)
    updates = max(args.updates, args.epochs * per_epoch)
    batches = endless_minibatches(len(x), args.batch_size, np.random.default_rng(seed))
    for step, batch in enumerate(islice(batches, updates), start=1):
        optimizer.lr = one_cycle(step - 1, updates, lr)
        batch = torch.from_numpy(batch).to(x.device)
        loss, gradient = model.loss(model.forward(x[batch], training=True), y[batch])
        check_finite(loss.item(), step, lr)
        model.backward(gradient)
        optimizer.step()
        if step % per_epoch == 0 and val:
            curve.append(model.accuracy(*val))
    return model, curve


def study(args, data: Inputs, features: dict, log) -> tuple[dict, dict, dict]:
    """Train every classifier on every input, number of labels and seed.

    Returns accuracies[classifier][n][input], a list over seeds; and for the MLP with all labels curves[input],
    (seeds, epochs) on validation, and right[input], bool (N,) of the test images, of the first seed.
    """
    total, classes = len(data.y_train), len(data.classes)
    accuracies, curves, right = {}, {name: [] for name in features}, {}
    for kind, hidden in {"MLP": args.hidden, "softmax regression": []}.items():
        for n in sorted({*args.labels, total}):
            found = accuracies.setdefault(kind, {}).setdefault(n, {})
            for name, (train, val, test) in features.items():
                for seed in (args.seed + one for one in args.seeds):
                    labelled = label_order(data.y_train, seed)[:n]
                    x, x_val, x_test = standardise(name, train[labelled], val, test)
                    watched = (x_val, data.y_val) if hidden and n == total else None
                    model, curve = fit_classifier(x, data.y_train[labelled], classes, hidden, args, seed, watched)
                    correct = model.predict(x_test).argmax(1) == data.y_test
                    found.setdefault(name, []).append(correct.sum().item() / len(correct))
                    if watched:
                        curves[name].append(curve)
                        right.setdefault(name, correct.cpu().numpy())
            log(classifier=kind, labels=n, **{name: float(np.mean(values)) for name, values in found.items()})
    return accuracies, curves, right


# --- what came out ------------------------------------------------------------------------------------------------


def paired(values: list[float], rivals: list[float]) -> dict:
    """Mean and deviation of values − rivals, the mean's 95 % interval (Student's t), and who wins by it."""
    difference = np.subtract(values, rivals)
    mean, std = mean_std(difference)
    half = half_width(difference)
    wins = None if half is None or abs(mean) <= half else mean > 0  # None: the seeds' noise is larger
    return {"difference": mean, "difference_std": std, "half_width": half, "wins": wins}


def summarise(accuracies: dict) -> list[dict]:
    """A row for each classifier and number of labels: means, deviations and the differences from raw pixels."""
    rows = []
    for kind, by_labels in accuracies.items():
        for n, found in by_labels.items():
            row = {"classifier": kind, "labels": n}
            for name, values in found.items():
                row[name], row[f"{name}_std"] = mean_std(values)
                if name != "raw":
                    row |= {f"{name}_{key}": value for key, value in paired(values, found["raw"]).items()}
            rows.append(row)
    return rows


def conclusion(rows: list[dict], kind: str, name: str = "codes") -> str:
    """In words: at which numbers of labels this input beats raw pixels and at which it loses to them."""
    ours = [row for row in rows if row["classifier"] == kind]
    said = []
    for verb, outcome in (("win", True), ("lose", False), ("neither", None)):
        where = [f"{row['labels']:,}" for row in ours if row[f"{name}_wins"] is outcome]
        if where:
            said.append(f"{verb} at {', '.join(where)}")
    return "; ".join(said)


def draw_validation(curves: dict, args, title: str):
    """Validation accuracy of the MLP after each epoch, all labels."""
    last = {name: np.mean([curve[-1] for curve in found]) for name, found in curves.items()}
    figure, axes = new_figure(width=7.6, height=4.8)
    for index, (name, found) in enumerate(curves.items()):
        values = 100 * np.array(found)  # (seeds, epochs)
        mean_band(axes[0, 0], range(1, values.shape[1] + 1), values, label=NAMES[name], index=index)
    axes[0, 0].set(xlabel="epoch", ylabel=f"validation accuracy (%), {len(args.seeds)} seeds")
    axes[0, 0].legend()
    figure.suptitle(
        f"{title}, all labels: the same MLP ends at {last['raw']:.1%} on raw pixels,\n{last['codes']:.1%} on the "
        f"autoencoder's codes, {last['denoising']:.1%} on denoising ones, {last['pca']:.1%} on PCA's"
    )
    return figure


def draw_test(tests: dict, title: str):
    """Test accuracy of the MLP with all labels, first seed, with Wilson's intervals and McNemar's test."""
    p = tests["codes"]["mcnemar_p"]
    sure = f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
    change = f"{100 * (tests['codes']['accuracy'] - tests['raw']['accuracy']):+.1f}"
    figure, axes = new_figure(width=7.6, height=4.8)
    ax, lows, highs = axes[0, 0], [], []
    for index, found in enumerate(tests.values()):
        (low, high), value = (100 * np.array(found["interval"])), 100 * found["accuracy"]
        ax.bar(index, value, color=COLORS[index], yerr=[[value - low], [high - value]], capsize=6)
        ax.text(index, high, f"{value:.1f} %", ha="center", va="bottom")
        lows.append(low)
        highs.append(high)
    ax.set_xticks(range(len(tests)), [NAMES[name] for name in tests])
    floor = max(0, 5 * math.floor(min(lows) / 5) - 5)
    ax.set(ylim=(floor, math.ceil(max(highs)) + 1), ylabel=f"test accuracy (%), axis from {floor} %; 95 % intervals")
    ax.grid(False, axis="x")
    figure.suptitle(
        f"{title}, all labels, first seed: codes in place of raw pixels change the MLP's\n"
        f"test accuracy by {change} points (McNemar's {sure})"
    )
    return figure


def draw_labels(accuracies: dict, rows: list[dict], title: str):
    """Accuracy, and its difference from raw pixels', against the number of labels: one column a classifier."""
    lines = [f"{kind}: {conclusion(rows, kind)}" for kind in accuracies]
    figure, axes = new_figure(2, len(accuracies), width=10.5, height=7.6, sharex=True, sharey="row")
    for (above, below), (kind, by_labels) in zip(axes.T, accuracies.items(), strict=True):
        labels = list(by_labels)
        for index, name in enumerate(NAMES):
            values = 100 * np.array([by_labels[n][name] for n in labels]).T  # (seeds, labels)
            mean_band(above, labels, values, label=NAMES[name], index=index)
            if name != "raw":
                own = [row for row in rows if row["classifier"] == kind]  # one for each of `labels`
                mean = np.array([100 * row[f"{name}_difference"] for row in own])
                half = np.array([100 * (row[f"{name}_half_width"] or 0) for row in own])  # one seed has no interval
                style = line_style(index)
                below.plot(labels, mean, marker="o", markersize=4, label=f"{NAMES[name]} − raw pixels", **style)
                below.fill_between(labels, mean - half, mean + half, color=style["color"], alpha=0.2, linewidth=0)
        below.axhline(0, color=COLORS[0], linewidth=1)
        above.set(title=kind, xscale="log")
        below.set(xlabel="labelled images")
        below.set_xticks(labels, [f"{n:,}" for n in labels], fontsize=8)
        below.minorticks_off()
        above.legend(fontsize=9)
        below.legend(fontsize=9)
    axes[0, 0].set(ylabel="test accuracy (%), mean ± std over seeds")
    axes[1, 0].set(ylabel="difference (points), 95 % interval")
    said = "\n".join(lines)
    figure.suptitle(f"{title}: at which numbers of labels do the autoencoder's codes beat raw pixels?\n{said}")
    return figure


@cpu_threads(1)
@torch.no_grad()
def main(argv=None) -> dict:
    """Train on every input and number of labels; returns the metrics."""
    args = build_parser().parse_args(argv)
    if min(args.batch_size, *args.labels) < 2:
        raise UserError("--batch-size and --labels: at least two images, BatchNorm learns from how they differ")
    seed_everything(args.seed)
    data = load_pixels(args, pick_device(args.device))
    total = len(data.y_train)
    if max(args.labels) > total:
        raise UserError(f"asked for {max(args.labels)} labelled images, there are {total}")
    features = load_features(args, data)
    run = start_run(args)

    accuracies, curves, right = study(args, data, features, run.log)
    rows = summarise(accuracies)
    tests = {}
    for name, correct in right.items():
        hits = int(correct.sum())
        tests[name] = {"accuracy": hits / len(correct), "interval": wilson_interval(hits, len(correct))}
        tests[name]["mcnemar_p"] = mcnemar(correct, right["raw"])[2]
    save_figure(draw_validation(curves, args, data.title), run.path("ft_val_acc_fashion_verbose.png"))
    save_figure(draw_test(tests, data.title), run.path("ft_test_acc_fashion_verbose.png"))
    save_figure(draw_labels(accuracies, rows, data.title), run.path("label_efficiency.png"))
    said = {kind: {name: conclusion(rows, kind, name) for name in NAMES if name != "raw"} for kind in accuracies}
    by_kind = {kind: [row for row in rows if row["classifier"] == kind] for kind in accuracies}
    metrics = {"rows": by_kind["MLP"], "rows_softmax_regression": by_kind["softmax regression"], "conclusion": said}
    metrics["validation"] = {name: mean_std([curve[-1] for curve in found]) for name, found in curves.items()}
    metrics |= {
        "all_labels": total,
        "test": tests,
        "sizes": {name: parts[0].shape[1] for name, parts in features.items()},
    }
    return run.finish(metrics)


if __name__ == "__main__":
    run_main(main, build_parser)
