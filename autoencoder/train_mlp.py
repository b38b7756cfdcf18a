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

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from autoencoder.layers import Linear, ReLU
from autoencoder.models import Classifier, ManualMLP, Regressor
from autoencoder.optimizers import SGD
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
SIZES = {"train": 300, "val": 300, "test": 1000}  # points
CLASSES = 3
EARLY = 0.1  # fraction of the epochs after which the variants are compared a first time
MOMENTUM, WEIGHT_DECAY = 0.9, 1e-4  # the latter is λ
NOISE = 0.5  # standard deviation around the sine, in the units of y
PROBE_WIDTH, PROBE_ROWS = 128, 256


class Problem:
    """Points `drawn` by part (train, val, test), and the same as standardised tensors in `x` and `y`.

    Inputs (N, D), and targets that are values (N, 1), get the training part's mean 0 and deviation 1; labels (N,) stay.
    """

    def __init__(self, draw: Callable, seed: int, device: torch.device):
        rng = np.random.default_rng(seed)
        self.device, self.drawn = device, {part: draw(n, rng) for part, n in SIZES.items()}
        x, y = self.drawn["train"]
        self.classifies = y.ndim == 1
        self.centre, self.spread = x.mean(0), x.std(0)
        self.y_mean, self.y_std = (0.0, 1.0) if self.classifies else (float(y.mean()), float(y.std()))
        self.x = {part: self.inputs(x) for part, (x, _) in self.drawn.items()}
        self.y = {part: torch.from_numpy(y).to(device) for part, (_, y) in self.drawn.items()}
        if not self.classifies:
            self.y = {part: ((y - self.y_mean) / self.y_std).float() for part, y in self.y.items()}

    def inputs(self, x: np.ndarray) -> Tensor:
        """Inputs (N, D), as drawn, as the network takes them."""
        return torch.from_numpy((x - self.centre) / self.spread).float().to(self.device)

    def build(self, hidden: list[int], use_batchnorm: bool, init: str) -> ManualMLP:
        """A network for the problem, with weights drawn from PyTorch's generator."""
        head, sizes = (Classifier, (2, hidden, CLASSES)) if self.classifies else (Regressor, (1, hidden, 1))
        return head(*sizes, init=init, use_batchnorm=use_batchnorm)

    def measure(self, network: ManualMLP, part: str) -> tuple[float, float]:
        """Data term of the loss, and score: accuracy (from 0 to 1), or mean squared error in (units of y)²."""
        output, y = network.predict(self.x[part]), self.y[part]
        loss = network.loss(output, y)[0].item()
        return loss, (output.argmax(1) == y).sum().item() / len(y) if self.classifies else loss * self.y_std**2


def spirals(n: int, rng: np.random.Generator, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """n points (n, 2) on three arms, r in [0.05, 1] at the angle 5 r + 2π/3 · class + noise; labels int64 (n,)."""
    y = np.arange(n) % CLASSES
    r = rng.uniform(0.05, 1, n)
    angle = 5 * r + 2 * np.pi / CLASSES * y + noise * rng.standard_normal(n)
    return np.stack([r * np.cos(angle), r * np.sin(angle)], axis=1), y


def chirp(x: np.ndarray) -> np.ndarray:
    """5 sin(2π (0.2 x + 0.2 x²)): on [0, 3] its frequency rises from 0.2 to 1.4."""
    return 5 * np.sin(2 * np.pi * (0.2 * x + 0.2 * x**2))


def noisy_chirp(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """x uniform in [0, 3] and y = chirp(x) + noise, (n, 1) each."""
    x = rng.uniform(0, 3, (n, 1))
    return x, chirp(x) + NOISE * rng.standard_normal((n, 1))


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
        # A last batch that is not full is left out: BatchNorm cannot learn from a batch of one.
        for batch in minibatches(len(x), batch_size, rng, drop_last=True) if epoch else ():
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


def fit_variant(problem: Problem, name: str, seeds: list[int], early: int, args) -> tuple[list[ManualMLP], dict, dict]:
    """The variant at its best rate: networks, curves (S, E + 1) with the rate as "lr", and rate → mean last score.

    Beside the curves "early_lr", the best rate at the epoch `early`, and its "early_val_loss" and "early_val_score"
    there, (S,). A rate at which a seed diverges is out (score None). Errors: `UserError` when all are.
    """
    scores, found, failed = {}, [], None
    for lr in dict.fromkeys(args.lr):
        scores[f"{lr:g}"] = None
        try:
            fits = [train(problem, *VARIANTS[name], seed, lr, args) for seed in seeds]
        except Diverged as error:
            failed = error
            continue
        curves = {what: np.stack([own[what] for _, own in fits]) for what in fits[0][1]}  # (S, E + 1)
        scores[f"{lr:g}"] = float(curves["val_score"][:, -1].mean())
        found.append(([network for network, _ in fits], curves | {"lr": lr}))
    if not found:
        raise UserError(f"{name}: no rate of --lr works: {failed}")
    sign = 1 if problem.classifies else -1
    networks, curves = max(found, key=lambda fit: sign * fit[1]["val_score"][:, -1].mean())
    _, soon = max(found, key=lambda fit: sign * fit[1]["val_score"][:, early].mean())
    at_early = {f"early_{what}": soon[what][:, early] for what in ("val_loss", "val_score")}
    return networks, curves | at_early | {"early_lr": soon["lr"]}, scores


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


def summary(values) -> dict[str, float]:
    """Mean and sample standard deviation over seeds."""
    return dict(zip(("mean", "std"), mean_std(values), strict=True))


def said(found: dict[str, dict], scale: float = 1, digits: int = 2) -> str:
    """Both effects in words, times `scale`: with their intervals, and whether these exclude zero."""
    words = []
    for key, label in FACTORS.items():
        mean, half = (f"{scale * (found[key][name] or 0):+.{digits}f}" for name in ("mean", "half_width"))
        verdict = "clear" if found[key]["clear"] else "within seed noise"
        known = found[key]["half_width"] is not None
        words.append(f"{label} {mean} " + (f"± {half[1:]} ({verdict})" if known else "(one seed: noise unknown)"))
    return "; ".join(words).replace("-", "−")


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
    seeds = args.seeds
    early = max(1, round(EARLY * args.epochs))
    metrics = {"hidden": args.hidden, "seeds": seeds, "epochs": args.epochs, "early_epoch": early}
    for key, draw in (("clf", spirals), ("reg", noisy_chirp)):
        problem = Problem(draw, args.seed, device)
        networks, curves = {}, {}
        values = {name: {} for name in ("early_val_loss", "val_loss", "early_val_score", "val_score", "test_score")}
        for name in VARIANTS:
            networks[name], curves[name], scores = fit_variant(problem, name, seeds, early, args)
            metrics.setdefault(f"{key}_val_score_by_lr", {})[name] = scores
            for rate in ("lr", "early_lr"):
                metrics.setdefault(f"{key}_{rate}", {})[name] = curves[name][rate]
            for what in ("loss", "score"):
                values[f"early_val_{what}"][name] = curves[name][f"early_val_{what}"]
                values[f"val_{what}"][name] = curves[name][f"val_{what}"][:, -1]
            values["test_score"][name] = np.array([problem.measure(network, "test")[1] for network in networks[name]])
            for seed, val, test in zip(seeds, values["val_score"][name], values["test_score"][name], strict=True):
                run.log(problem=key, variant=name, lr=curves[name]["lr"], seed=seed, val_score=val, test_score=test)
        measure = {"clf": "accuracy", "reg": "mse"}[key]
        found = {what: {f: effect(v, i) for i, f in enumerate(FACTORS)} for what, v in values.items()}
        for what, by_variant in values.items():
            label = f"{key}_{what.replace('score', measure)}"
            metrics[label] = {name: summary(v) for name, v in by_variant.items()}
            metrics[f"{label}_effects"] = found[what]
        swapped = {}
        for init, first in (("he", "xavier"), ("xavier", "he")) if key == "reg" else ():
            lr = curves[f"no BatchNorm, {init.capitalize()}"]["lr"]
            fits = [train(problem, False, init, seed, lr, args, first)[0] for seed in seeds]
            swapped[f"{init}_with_the_first_layer_of_{first}"] = [problem.measure(fit, "test")[1] for fit in fits]
        if swapped:
            metrics["reg_test_mse_swapped"] = {name: summary(mse) for name, mse in swapped.items()}
        draw_problem(key, problem, networks, curves, values, found, swapped, early, run)

    signal = {}
    for name, levels in VARIANTS.items():
        signal[name] = np.array([signal_through_depth(*levels, args.depth_probe, seed) for seed in seeds])  # (S, 2, L)
    # Both are ratios along the way that the signal takes: forward last / first, backward first / last.
    metrics["forward_ratio"] = {name: float((s[:, 0, -1] / s[:, 0, 0]).mean()) for name, s in signal.items()}
    metrics["backward_ratio"] = {name: float((s[:, 1, 0] / s[:, 1, -1]).mean()) for name, s in signal.items()}
    save_figure(draw_signal(signal, metrics), run.path("signal_through_depth.png"))
    return run.finish(metrics)


def draw_problem(key, problem, networks, curves, values, found, swapped, early, run) -> None:
    """The three figures of a problem. The objective differs from the score by L2, and in regression by its units."""
    if key == "clf":
        about, scale, digits = "three spirals, accuracy in points", 100, 1
        loss, score, filename = "objective: cross-entropy (nats) + λ/2 Σ W²", "accuracy (%)", "clf_curves_acc.png"
        save_figure(draw_regions(problem, networks, values, found), run.path("decision_regions.png"))
    else:
        about, scale, digits = "noisy sine, error in (units of y)²", 1, 3
        loss = "objective: MSE of standardised y + λ/2 Σ W²"
        score, filename = "MSE in (units of y)²", "reg_curves_mse.png"
        save_figure(draw_fits(problem, networks, values, found, swapped), run.path("fitted_function.png"))
    loss_figure = draw_curves(curves, found, "loss", loss, about.split(",")[0] + ", objective", 1, 3, early)
    save_figure(loss_figure, run.path(f"{key}_curves_loss.png"))
    save_figure(draw_curves(curves, found, "score", score, about, scale, digits, early), run.path(filename))


def draw_curves(curves, found, what: str, ylabel: str, about: str, scale: float, digits: int, early: int):
    """Loss or score of the four variants against epochs, training left, validation right: mean and range of seeds."""
    figure, axes = new_figure(1, 2, width=11, height=5, sharey=True)
    for ax, part in zip(axes[0], ("train", "val"), strict=True):
        for index, (name, of_variant) in enumerate(curves.items()):
            values = scale * of_variant[f"{part}_{what}"]  # (S, E + 1)
            style = line_style(index)
            ax.plot(values.mean(0), label=f"{name}, lr {of_variant['lr']:g}", **style)
            ax.fill_between(range(values.shape[1]), values.min(0), values.max(0), color=style["color"], alpha=0.2)
        ax.set(xlabel="epochs", title={"train": "training points", "val": "validation points"}[part])
        if scale == 1:
            ax.set(yscale="log")
        ax.legend()
    axes[0, 0].set_ylabel(ylabel)
    ends = {early: f"early_val_{what}", values.shape[1] - 1: f"val_{what}"}
    effects_said = [f"epoch {epoch}: {said(found[key], scale, digits)}" for epoch, key in ends.items()]
    what = "bands: all seeds; differences on validation points, each at its best rate there, with 95 % intervals"
    figure.suptitle(f"{about}; {what}\n" + "\n".join(effects_said))
    return figure


def draw_regions(problem: Problem, networks, values, found):
    """The class that each variant's first network gives every point of the plane, and the test points."""
    figure, axes = new_figure(2, 2, width=9, height=9.4, sharex=True, sharey=True)
    side = np.linspace(-1.3, 1.3, 261)
    grid = np.stack(np.meshgrid(side, side), axis=-1).reshape(-1, 2)
    points, y = problem.drawn["test"]
    for ax, (name, of_seeds) in zip(axes.flat, networks.items(), strict=True):
        regions = of_seeds[0].predict(problem.inputs(grid)).argmax(1).cpu().numpy().reshape(len(side), -1)
        ax.contourf(side, side, regions, levels=np.arange(CLASSES + 1) - 0.5, colors=COLORS[:CLASSES], alpha=0.25)
        for k in range(CLASSES):
            style = {"color": COLORS[k], "marker": "os^"[k], "markersize": 2.5, "linestyle": "none"}
            ax.plot(*points[y == k].T, label=f"class {k}", **style)
        mean, std = mean_std(100 * values["test_score"][name])
        ax.set(title=f"{name}: {mean:.1f} ± {std:.1f} %", aspect="equal")
        ax.grid(False)
    figure.supxlabel("x₁")
    figure.supylabel("x₂")
    axes[0, 0].legend(loc="lower left", markerscale=2, framealpha=0.8, frameon=True)
    seeds = f"mean ± std over {len(of_seeds)} seeds; the regions are the first seed's"
    effects = said(found["test_score"], 100, 2).replace("; ", "\n")
    figure.suptitle(f"three spirals: accuracy on {len(y)} test points, {seeds}\nin points: {effects}")
    return figure


def draw_fits(problem: Problem, networks, values, found, swapped):
    """What each variant's networks, one curve a seed, make of the sine, beside the truth and the training points."""
    figure, axes = new_figure(2, 2, width=11, height=7.6, sharex=True, sharey=True)
    x = np.linspace(-0.2, 3.2, 500)[:, None]
    for index, (ax, (name, of_seeds)) in enumerate(zip(axes.flat, networks.items(), strict=True)):
        ax.plot(*problem.drawn["train"], ".", color="#AAAAAA", markersize=3, label="training points")
        ax.plot(x, chirp(x), color="black", linewidth=1, linestyle="--", label="without the noise")
        for number, network in enumerate(of_seeds):
            fitted = network.predict(problem.inputs(x)).cpu().numpy() * problem.y_std + problem.y_mean
            label = "fitted, one a seed" if number == 0 else None
            ax.plot(x, fitted, color=line_style(index)["color"], linewidth=1, alpha=0.7, label=label)
        mean, std = mean_std(values["test_score"][name])
        ax.set_title(f"{name}: test MSE {mean:.2f} ± {std:.2f}")
    figure.supxlabel("x")
    figure.supylabel("y")
    axes[0, 0].legend(loc="upper left", fontsize=8)
    about = f"noisy sine: mean ± std over {len(of_seeds)} seeds; the noise alone gives a test MSE of {NOISE**2:g}"
    he, xavier = (mean_std(mse) for mse in swapped.values())
    control = f"first layers swapped: He with Xavier's {he[0]:.2f} ± {he[1]:.2f}, Xavier with He's "
    control += f"{xavier[0]:.2f} ± {xavier[1]:.2f} (both without BatchNorm)"
    figure.suptitle(f"{about}\n{said(found['test_score'], 1, 2)}\n{control}")
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
