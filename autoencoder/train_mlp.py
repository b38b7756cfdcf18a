"""Do batch normalisation and the initialisation matter for a small network trained by hand?

    python autoencoder/train_mlp.py
    python autoencoder/train_mlp.py --hidden 64
    python autoencoder/train_mlp.py --lr 0.03 --out runs/autoencoder/train_mlp_one_rate

Two small synthetic problems, one for each head in models.py: three interleaved spirals to tell apart, and a sine of
rising frequency to fit, both with noise. Each is learnt by {BatchNorm, none} × {He, Xavier}; for one seed all four
start from the same draws of the weights and see the same batches. SGD with momentum minimises

    L = data term + λ/2 · Σ W²,   data term: cross-entropy, or the mean squared error of the standardised y

No learning rate suits all four. Each is shown at the rate of `--lr` with the best final score on the validation points
(mean over the seeds), and the test points are read at that rate alone. After a tenth of the epochs each is compared at
the rate that is best then: one that wins in the end may start slowly. A difference is called clear when its 95 %
interval over the seeds (Student's t of the paired differences) excludes zero. It does not cover another draw of the
points, and one interval in twenty excludes zero by chance.

He's variance is 2/D, Xavier's 2/(D + M). In a square layer He's weights are √2 times as large; in the first layer of
the regression, from 1 input to 64 units, 8 times. As a control there, the two swap first layers.

Two layers hardly test an initialisation. The last figure follows a batch forward, and a random gradient backward,
through `--depth-probe` untrained layers. A ReLU sets half of its input to zero: He's variance makes up for that,
Xavier's does not, and BatchNorm brings the input of each ReLU back to variance 1.

Writes clf_curves_loss.png, clf_curves_acc.png, reg_curves_loss.png, reg_curves_mse.png, decision_regions.png,
fitted_function.png, signal_through_depth.png, history.csv, metrics.json.
Sources: Glorot and Bengio 2010; He et al. 2015; Ioffe and Szegedy 2015.
Shapes: N points, D numbers in, M out, E epochs, S seeds.
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator

from autoencoder.layers import Linear, ReLU
from autoencoder.models import ManualMLP
from autoencoder.optimizers import SGD
from autoencoder.problems import CLASSES, NOISE, Problem, chirp, noisy_chirp, spirals
from shared_utils.cli import UserError, add_seeds, make_parser, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, line_style, mean_band, new_figure, save_figure
from shared_utils.runs import Diverged, check_finite, start_run
from shared_utils.stats import half_width, mean_std

VARIANTS = {
    "no BatchNorm, He": (False, "he"),
    "no BatchNorm, Xavier": (False, "xavier"),
    "BatchNorm, He": (True, "he"),
    "BatchNorm, Xavier": (True, "xavier"),
}
FACTORS = {"batchnorm_minus_none": "BatchNorm − none", "he_minus_xavier": "He − Xavier"}
EARLY = 0.1  # fraction of the epochs after which the variants are compared a first time
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # the latter is λ
PROBE_WIDTH, PROBE_ROWS = 128, 256


def train(
    problem: Problem, use_batchnorm: bool, init: str, seed: int, lr: float, args, first_layer: str | None = None
) -> tuple[ManualMLP, dict[str, np.ndarray]]:
    """Train one network; returns it with its curves, (E + 1,) each: loss and score, on train and val, from epoch 0.

    first_layer: the initialisation of the first layer where it is not `init`. Errors: `Diverged`.
    """
    x, y = problem.x["train"], problem.y["train"]
    torch.manual_seed(seed)  # the same draws for every variant; the initialisation scales them
    network = problem.build(args.hidden, use_batchnorm, init)
    if first_layer:
        torch.manual_seed(seed)
        network.layers[0] = Linear(x.shape[1], args.hidden[0], first_layer)
    network.to(x.device)
    rng, optimizer = np.random.default_rng(seed), SGD(network.layers, lr, MOMENTUM, WEIGHT_DECAY)
    batch_size, step, rows = min(args.batch_size, len(x)), 0, []
    for epoch in range(args.epochs + 1):
        if epoch > 0:
            # A last batch that is not full is left out: BatchNorm cannot learn from a batch of one.
            for batch in minibatches(len(x), batch_size, rng, drop_last=True):
                chosen = torch.from_numpy(batch).to(x.device)  # (B,)
                loss, gradient = network.loss(network.forward(x[chosen], training=True), y[chosen])
                check_finite(loss.item(), step + 1, lr)
                network.backward(gradient)
                optimizer.step()
                step += 1
        weights = [w for name, w in network.parameters().items() if name.endswith("W")]
        row, l2 = {}, WEIGHT_DECAY / 2 * sum(w.square().sum().item() for w in weights)
        for part in ("train", "val"):
            loss, row[f"{part}_score"] = problem.measure(network, part)
            row[f"{part}_loss"] = loss + l2
            check_finite(row[f"{part}_loss"], step, lr)
        rows.append(row)
    return network, {key: np.array([row[key] for row in rows]) for key in rows[0]}


@dataclass(frozen=True)
class Fitted:
    """A variant at `lr`, the rate with the best last validation score: a network for each seed, and their curves.

    curves: train_loss, train_score, val_loss, val_score, (S, E + 1) each. at: the early epoch and the last → val_loss
    and val_score there, (S,) each, at the rate with the best score there. score_by_lr: mean last validation score.
    """

    lr: float
    networks: list[ManualMLP]
    curves: dict[str, np.ndarray]
    at: dict[int, dict[str, np.ndarray]]
    score_by_lr: dict[str, float | None]


def fit_variant(problem: Problem, name: str, seeds: list[int], early: int, args) -> Fitted:
    """The variant called `name` at every rate of `--lr`, and the best of it.

    A rate at which a seed diverges is out (score None). Errors: `UserError` when all are.
    """
    fits, score_by_lr, failed = {}, {}, None
    for lr in dict.fromkeys(args.lr):
        score_by_lr[f"{lr:g}"] = None
        try:
            pairs = [train(problem, *VARIANTS[name], seed, lr, args) for seed in seeds]
        except Diverged as error:
            failed = error
            continue
        curves = {what: np.stack([own[what] for _, own in pairs]) for what in pairs[0][1]}  # (S, E + 1) each
        score_by_lr[f"{lr:g}"] = float(curves["val_score"][:, -1].mean())
        fits[lr] = [network for network, _ in pairs], curves
    if not fits:
        raise UserError(f"{name}: no rate of --lr works: {failed}")
    at, sign = {}, 1 if problem.classifies else -1
    for epoch in (early, args.epochs):
        best = max(fits, key=lambda lr, epoch=epoch: sign * fits[lr][1]["val_score"][:, epoch].mean())
        at[epoch] = {what: fits[best][1][what][:, epoch] for what in ("val_loss", "val_score")}
    return Fitted(best, *fits[best], at, score_by_lr)


def fit_variants(key: str, problem: Problem, early: int, args, run) -> tuple[dict[str, Fitted], dict[str, np.ndarray]]:
    """All variants of the problem `key`, and the test scores (S,) of their networks; both by name."""
    fitted, test = {}, {}
    for name in VARIANTS:
        own = fitted[name] = fit_variant(problem, name, args.seeds, early, args)
        test[name] = np.array([problem.measure(network, "test")[1] for network in own.networks])
        for seed, val, score in zip(args.seeds, own.curves["val_score"][:, -1], test[name], strict=True):
            run.log(problem=key, variant=name, lr=own.lr, seed=seed, val_score=val, test_score=score)
    return fitted, test


def swap_first_layers(problem: Problem, fitted: dict[str, Fitted], args) -> dict[str, list[float]]:
    """Test scores, one a seed, of both networks without BatchNorm with each other's first layer, at their own rates."""
    found = {}
    for name, init, first in (("no BatchNorm, He", "he", "xavier"), ("no BatchNorm, Xavier", "xavier", "he")):
        networks = [train(problem, False, init, seed, fitted[name].lr, args, first)[0] for seed in args.seeds]
        found[f"{init}_with_the_first_layer_of_{first}"] = [problem.measure(own, "test")[1] for own in networks]
    return found


def effect(values: dict[str, np.ndarray], factor: int) -> dict[str, float | bool | None]:
    """What one factor changes in `values`, variant → (S,), the other factor averaged over; paired by seed.

    factor 0: BatchNorm − none; 1: He − Xavier. Returns the mean difference, its standard deviation over seeds, the half
    width of the 95 % interval of the mean (None for one seed, which has none), and whether that excludes zero.
    """
    signs = {name: 1 if levels[factor] in (True, "he") else -1 for name, levels in VARIANTS.items()}
    differences = sum(signs[name] * np.asarray(found) for name, found in values.items()) / 2  # (S,)
    mean, std = mean_std(differences)
    half = half_width(differences)
    return {"mean": mean, "std": std, "half_width": half, "clear": half is not None and abs(mean) > half}


def effects(values: dict[str, np.ndarray]) -> dict[str, dict]:
    """`effect` of both factors."""
    return {key: effect(values, factor) for factor, key in enumerate(FACTORS)}


def after(fitted: dict[str, Fitted], epoch: int, what: str) -> dict[str, np.ndarray]:
    """Each variant's `what`, (S,), after the early epoch or the last."""
    return {name: own.at[epoch][what] for name, own in fitted.items()}


def summaries(values: dict) -> dict[str, dict[str, float]]:
    """Mean and sample standard deviation over seeds of each of the values, (S,) each."""
    return {name: dict(zip(("mean", "std"), mean_std(own), strict=True)) for name, own in values.items()}


def said(found: dict[str, dict], *, scale: float = 1, digits: int = 2) -> str:
    """Both effects in words, times `scale`: with their intervals, and whether these exclude zero."""
    words = []
    for key, label in FACTORS.items():
        mean, half = found[key]["mean"], found[key]["half_width"]
        interval = "(one seed: noise unknown)"
        if half is not None:
            interval = f"± {scale * half:.{digits}f} ({'clear' if found[key]['clear'] else 'within seed noise'})"
        words.append(f"{label} {scale * mean:+.{digits}f} {interval}")
    return "; ".join(words)


def signal_through_depth(use_batchnorm: bool, init: str, depth: int, seed: int) -> tuple[list[float], list[float]]:
    """Standard deviations in an untrained stack of `depth` hidden ReLU layers of 128 units, first layer first.

    Those of each layer's output for a normal batch, and of the gradient there for a normal gradient at the end.
    """
    torch.manual_seed(seed)
    x, dy = torch.randn(PROBE_ROWS, PROBE_WIDTH), torch.randn(PROBE_ROWS, PROBE_WIDTH)
    layers = ManualMLP(PROBE_WIDTH, [PROBE_WIDTH] * depth, PROBE_WIDTH, "relu", init, use_batchnorm).layers
    forward, backward = [], []
    for layer in layers:
        x = layer.forward(x, training=True)
        if isinstance(layer, ReLU):
            forward.append(x.std().item())
    for layer in reversed(layers):
        if isinstance(layer, ReLU):
            backward.append(dy.std().item())
        dy = layer.backward(dy)
    return forward, backward[::-1]


def build_parser():
    """The command line."""
    quick = {"seeds": [0, 1], "epochs": 10, "hidden": [32, 32], "lr": [0.03]}
    parser = make_parser(__doc__, dataset=None, quick=quick)
    parser.set_defaults(device="cpu")  # networks this small gain nothing from a GPU
    add_seeds(parser, [0, 1, 2, 3, 4], "weights, batches")
    parser.add_argument("--hidden", type=positive_int, nargs="+", default=[64, 64], help="widths of the hidden layers")
    parser.add_argument("--epochs", type=positive_int, default=100, help="passes over the training points")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="points per update")
    parser.add_argument(
        "--lr", type=positive_float, nargs="+", default=[0.003, 0.01, 0.03, 0.1], help="learning rates to try"
    )
    parser.add_argument("--depth-probe", type=positive_int, default=20, help="layers of the untrained stack")
    return parser


@cpu_threads(1)
@torch.no_grad()
def main(argv=None) -> dict:
    """Train the four variants on both problems, compare them over seeds, probe the stack; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    run = start_run(args)
    early = max(1, round(EARLY * args.epochs))
    metrics = {"hidden": args.hidden, "seeds": args.seeds, "epochs": args.epochs, "early_epoch": early}
    metrics |= study_spirals(Problem(spirals, args.seed, device), early, args, run)
    metrics |= study_sine(Problem(noisy_chirp, args.seed, device), early, args, run)

    signal = {}
    for name, levels in VARIANTS.items():
        signal[name] = np.array([signal_through_depth(*levels, args.depth_probe, seed) for seed in args.seeds])
    # (S, 2, L) each. Both are ratios along the way that the signal takes: forward last / first, backward first / last.
    metrics["forward_ratio"] = {name: float((s[:, 0, -1] / s[:, 0, 0]).mean()) for name, s in signal.items()}
    metrics["backward_ratio"] = {name: float((s[:, 1, 0] / s[:, 1, -1]).mean()) for name, s in signal.items()}
    save_figure(draw_signal(signal, metrics), run.path("signal_through_depth.png"))
    return run.finish(metrics)


def study_spirals(problem: Problem, early: int, args, run) -> dict:
    """Train all variants on the spirals and draw; returns the metrics."""
    fitted, test = fit_variants("clf", problem, early, args, run)
    figure = draw_curves(fitted, "loss", "three spirals, objective", "objective: cross-entropy (nats) + λ/2 Σ W²")
    save_figure(figure, run.path("clf_curves_loss.png"))
    figure = draw_curves(fitted, "score", "three spirals, accuracy in points", "accuracy (%)", scale=100, digits=1)
    save_figure(figure, run.path("clf_curves_acc.png"))
    save_figure(draw_regions(problem, fitted, test), run.path("decision_regions.png"))
    return {
        "clf_val_score_by_lr": {name: own.score_by_lr for name, own in fitted.items()},
        "clf_early_val_accuracy_effects": effects(after(fitted, early, "val_score")),
        "clf_val_accuracy": summaries(after(fitted, args.epochs, "val_score")),
        "clf_test_accuracy": summaries(test),
        "clf_test_accuracy_effects": effects(test),
    }


def study_sine(problem: Problem, early: int, args, run) -> dict:
    """Train all variants on the sine, then those with swapped first layers, and draw; returns the metrics."""
    fitted, test = fit_variants("reg", problem, early, args, run)
    swapped = swap_first_layers(problem, fitted, args)
    figure = draw_curves(fitted, "loss", "noisy sine, objective", "objective: MSE of standardised y + λ/2 Σ W²")
    save_figure(figure, run.path("reg_curves_loss.png"))
    figure = draw_curves(fitted, "score", "noisy sine, error in (units of y)²", "MSE in (units of y)²")
    save_figure(figure, run.path("reg_curves_mse.png"))
    save_figure(draw_fits(problem, fitted, test, swapped), run.path("fitted_function.png"))
    return {
        "reg_val_score_by_lr": {name: own.score_by_lr for name, own in fitted.items()},
        "reg_early_val_mse_effects": effects(after(fitted, early, "val_score")),
        "reg_val_mse": summaries(after(fitted, args.epochs, "val_score")),
        "reg_test_mse": summaries(test),
        "reg_test_mse_effects": effects(test),
        "reg_test_mse_swapped": summaries(swapped),
    }


def draw_curves(fitted: dict[str, Fitted], what: str, about: str, ylabel: str, *, scale: float = 1, digits: int = 3):
    """Loss or score of the four variants against epochs, training left, validation right: mean and range of seeds."""
    figure, axes = new_figure(1, 2, width=11, height=5, sharey=True)
    for ax, part in zip(axes[0], ("train", "val"), strict=True):
        for index, (name, own) in enumerate(fitted.items()):
            values, style = scale * own.curves[f"{part}_{what}"], line_style(index)  # (S, E + 1)
            ax.plot(values.mean(0), label=f"{name}, lr {own.lr:g}", **style)
            ax.fill_between(range(values.shape[1]), values.min(0), values.max(0), color=style["color"], alpha=0.2)
        ax.set(xlabel="epochs", title={"train": "training points", "val": "validation points"}[part])
        if scale == 1:
            ax.set(yscale="log")
        ax.legend()
    axes[0, 0].set_ylabel(ylabel)
    how = "bands: all seeds; differences on validation points, each at its best rate there, with 95 % intervals"
    lines = [f"{about}; {how}"]
    for epoch in own.at:
        found = effects(after(fitted, epoch, f"val_{what}"))
        lines.append(f"epoch {epoch}: {said(found, scale=scale, digits=digits)}")
    figure.suptitle("\n".join(lines))
    return figure


def draw_regions(problem: Problem, fitted: dict[str, Fitted], test: dict[str, np.ndarray]):
    """The class that each variant's first network gives every point of the plane, and the test points."""
    figure, axes = new_figure(2, 2, width=9, height=9.4, sharex=True, sharey=True)
    side = np.linspace(-1.3, 1.3, 261)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    points, y = problem.drawn["test"]
    for ax, (name, own) in zip(axes.flat, fitted.items(), strict=True):
        regions = own.networks[0].predict(problem.inputs(grid)).argmax(1).cpu().numpy().reshape(len(side), -1)
        ax.contourf(side, side, regions, levels=np.arange(CLASSES + 1) - 0.5, colors=COLORS[:CLASSES], alpha=0.25)
        for k in range(CLASSES):
            style = {"color": COLORS[k], "marker": "os^"[k], "markersize": 2.5, "linestyle": "none"}
            ax.plot(*points[y == k].T, label=f"class {k}", **style)
        mean, std = mean_std(100 * test[name])
        ax.set(title=f"{name}: {mean:.1f} ± {std:.1f} %", aspect="equal")
        ax.grid(False)
    figure.supxlabel("x₁")
    figure.supylabel("x₂")
    axes[0, 0].legend(loc="lower left", markerscale=2, framealpha=0.8, frameon=True)
    seeds = f"mean ± std over {len(own.networks)} seeds; the regions are the first seed's"
    lines = said(effects(test), scale=100).replace("; ", "\n")
    figure.suptitle(f"three spirals: accuracy on {len(y)} test points, {seeds}\nin points: {lines}")
    return figure


def draw_fits(problem: Problem, fitted: dict[str, Fitted], test: dict[str, np.ndarray], swapped: dict):
    """What each variant's networks, one curve a seed, make of the sine, beside the truth and the training points."""
    figure, axes = new_figure(2, 2, width=11, height=7.6, sharex=True, sharey=True)
    x = np.linspace(-0.2, 3.2, 500)[:, None]
    for index, (ax, (name, own)) in enumerate(zip(axes.flat, fitted.items(), strict=True)):
        ax.plot(*problem.drawn["train"], ".", color="#AAAAAA", markersize=3, label="training points")
        ax.plot(x, chirp(x), color="black", linewidth=1, linestyle="--", label="without the noise")
        for number, network in enumerate(own.networks):
            curve = network.predict(problem.inputs(x)).cpu().numpy() * problem.y_std + problem.y_mean
            label = "fitted, one a seed" if number == 0 else None
            ax.plot(x, curve, color=line_style(index)["color"], linewidth=1, alpha=0.7, label=label)
        mean, std = mean_std(test[name])
        ax.set_title(f"{name}: test MSE {mean:.2f} ± {std:.2f}")
    figure.supxlabel("x")
    figure.supylabel("y")
    axes[0, 0].legend(loc="upper left", fontsize=8)
    about = f"noisy sine: mean ± std over {len(own.networks)} seeds; the noise alone gives a test MSE of {NOISE**2:g}"
    he, xavier = (mean_std(mse) for mse in swapped.values())
    control = f"first layers swapped: He with Xavier's {he[0]:.2f} ± {he[1]:.2f}, Xavier with He's "
    control += f"{xavier[0]:.2f} ± {xavier[1]:.2f} (both without BatchNorm)"
    figure.suptitle(f"{about}\n{said(effects(test))}\n{control}")
    return figure


def draw_signal(signal: dict[str, np.ndarray], metrics: dict):
    """Standard deviation of outputs and of gradients against the layer, mean ± std over seeds."""
    figure, axes = new_figure(1, 2, width=11, height=5)
    for index, (name, found) in enumerate(signal.items()):
        for ax, direction in zip(axes[0], (0, 1), strict=True):
            mean_band(ax, range(1, found.shape[2] + 1), found[:, direction], label=name, index=index, marker=None)
    titles = ("forward: each layer's output", "backward: a random gradient put in at the top")
    for ax, title, key in zip(axes[0], titles, ("forward_ratio", "backward_ratio"), strict=True):
        ax.set(xlabel="hidden layer (1 is next to the input)", yscale="log", ylabel="standard deviation", title=title)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles, [f"{name}: × {metrics[key][name]:.2g}" for name in labels])
    depth, lines = found.shape[2], []
    for direction, key in (("outputs", "forward_ratio"), ("gradients", "backward_ratio")):
        he, xavier, *normed = (f"× {metrics[key][name]:.2g}" for name in VARIANTS)
        lines.append(f"{direction}: {he} with He, {xavier} with Xavier; with BatchNorm {' and '.join(normed)}")
    figure.suptitle(f"{depth} untrained ReLU layers, the deviation from one end to the other\n" + "\n".join(lines))
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
