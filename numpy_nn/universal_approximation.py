"""How well does one hidden layer approximate a function, and how does the error fall with its width?

    python numpy_nn/universal_approximation.py
    python numpy_nn/universal_approximation.py --activation relu --widths 4 16 64

f̂(x) = Σ_i v_i φ(w_i x + b_i) + c on [−1, 1], fitted to noiseless values of five functions by minibatch Adam on the
mean squared error, its learning rate falling to zero along half a cosine. Cybenko (1989) and Hornik (1991) promise that
some width reaches any error for a continuous function; not that training finds those weights, nor anything for a step,
whose largest error stays at half its height or above. Barron (1993) bounds the error by a constant over the root of the
width.

Beside what training reached stands what the same hidden units could do: the least-squares v and c for them. A gap
between the two is the optimiser's fault and not the width's.

Writes approximation_error.png, fitted_functions.png, history.csv, metrics.json.
Shapes: N points, n width of the hidden layer.
"""

import math

import numpy as np

from numpy_nn.activations import ReLU, Tanh
from numpy_nn.layers import Linear
from numpy_nn.losses import MSE, NotFinite, stopping
from numpy_nn.network import Sequential
from numpy_nn.optimizers import Adam
from shared_utils.cli import add_seeds, make_parser, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.plotting import COLORS, mean_band, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.schedules import half_cosine
from shared_utils.seeding import seed_everything
from shared_utils.stats import mean_std

TARGETS = {
    "sine": lambda x: np.sin(2 * np.pi * x),
    "|x|": lambda x: 2 * np.abs(x) - 1,
    "step": lambda x: np.where(x < 0.1, -1.0, 1.0),
    "bump": lambda x: 2 * np.exp(-50 * (x - 0.2) ** 2) - 1,
    "chirp": lambda x: np.sin(2 * np.pi * (x + 1) ** 2),
}
ACTIVATIONS = {"tanh": Tanh, "relu": ReLU}
TRAIN_POINTS, TEST_POINTS = 256, 1001


def build_parser():
    """The command line."""
    quick = {"epochs": 40, "widths": [2, 8, 32], "seeds": [0, 1]}
    parser = make_parser(__doc__, dataset=None, device=False, quick=quick)
    parser.add_argument("--widths", type=positive_int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="hidden units")
    add_seeds(parser, [0, 1, 2, 3], "one fit for each")
    parser.add_argument("--epochs", type=positive_int, default=1000, help=f"passes over the {TRAIN_POINTS} points")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="points per update")
    parser.add_argument("--lr", type=positive_float, default=0.02, help="Adam's learning rate at the start")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="tanh", help="of the hidden units")
    return parser


def build_network(width: int, activation: str, rng: np.random.Generator) -> Sequential:
    """1 → width → 1, the places where the units bend spread over [−1, 1].

    With all biases zero, as Linear starts, every unit would bend at x = 0, and training would have to move them all.
    """
    hidden, last = Linear(1, width, rng=rng), Linear(width, 1, "xavier", rng)
    slopes = rng.choice([-1, 1], width) * rng.uniform(1, 2 + width / 4, width)  # narrower units where there are more
    hidden.params["W"][:] = slopes
    hidden.params["b"][:] = -slopes * rng.uniform(-1, 1, width)  # unit i bends at x = −b_i / w_i
    last.params["W"] /= np.float32(max(1.0, np.abs(slopes).mean()) if activation == "relu" else 1.0)
    return Sequential(hidden, ACTIVATIONS[activation](), last)


def train(network: Sequential, x: np.ndarray, y: np.ndarray, x_test: np.ndarray, name: str, args, rng) -> np.ndarray:
    """Fit `network`, called `name`, to the points x, y, (N, 1) each; returns its prediction at x_test, of that shape.

    Errors: `Diverged` when loss or prediction are not finite.
    """
    loss, optimizer = MSE(), Adam(network.layers, args.lr)
    total = args.epochs * math.ceil(len(x) / args.batch_size)
    for _ in range(args.epochs):
        for at in minibatches(len(x), args.batch_size, rng):
            optimizer.lr = max(half_cosine(optimizer.t, total, args.lr), 1e-12)
            with stopping(optimizer.t + 1, optimizer.lr, args.lr, name=name):
                loss.forward(network.forward(x[at], training=True), y[at])
                network.backward(loss.backward(), need_dx=False)
                optimizer.step()
    with stopping(optimizer.t, optimizer.lr, args.lr, name=name):
        prediction = network.forward(x_test)
        if not np.isfinite(prediction).all():
            raise NotFinite("the outputs are not finite")
    return prediction


def least_squares(network: Sequential, x: np.ndarray, y: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """The prediction at x_test with the last layer solved for x, y, and the hidden layer as training left it."""

    def features(points: np.ndarray) -> np.ndarray:
        hidden = Sequential(*network.layers[:-1]).forward(points).astype(np.float64)  # (N, n)
        return np.hstack([hidden, np.ones((len(points), 1))])  # (N, n + 1)

    solution, *_ = np.linalg.lstsq(features(x), y, rcond=1e-6)
    return features(x_test) @ solution  # (N, 1)


def rmse(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Root of the mean squared difference."""
    return float(np.sqrt(np.mean((prediction.astype(np.float64) - truth) ** 2)))


def main(argv=None) -> dict:
    """Fit every function with every width and seed; returns the metrics."""
    args = build_parser().parse_args(argv)
    seed_everything(args.seed)
    widths, seeds = sorted(set(args.widths)), args.seeds
    run = start_run(args)
    x = np.linspace(-1, 1, TRAIN_POINTS, dtype=np.float32)[:, None]  # (N, 1)
    x_test = np.linspace(-1, 1, TEST_POINTS, dtype=np.float32)[:, None]  # most of them between the points of x
    errors = {
        key: np.empty((len(seeds), len(widths))) for key in ((t, how) for t in TARGETS for how in ("adam", "lstsq"))
    }
    fitted, rows = {}, []
    for target, f in TARGETS.items():
        y, truth = f(x), f(x_test)  # (N, 1) each
        for w, width in enumerate(widths):
            largest = []
            for s, seed in enumerate(seeds):
                rng = np.random.default_rng([args.seed, seed])
                network = build_network(width, args.activation, rng)
                name = f"{target}, width {width}"
                prediction = train(network, x, y.astype(np.float32), x_test, name, args, rng)  # (TEST_POINTS, 1)
                errors[target, "adam"][s, w] = rmse(prediction, truth)
                errors[target, "lstsq"][s, w] = rmse(least_squares(network, x, y, x_test), truth)
                largest.append(float(np.abs(prediction - truth).max()))
                if s == 0:
                    fitted[target, width] = prediction[:, 0]
            mean, std = mean_std(errors[target, "adam"][:, w])
            row = {"target": target, "width": width, "rmse": mean, "rmse_std": std}
            row |= {"rmse_least_squares": float(errors[target, "lstsq"][:, w].mean())}
            rows.append({**row, "largest_error": float(np.mean(largest))})
            run.log(**rows[-1])
    save_figure(draw_errors(errors, widths, args), run.path("approximation_error.png"))
    save_figure(draw_fits(fitted, errors, widths, x_test[:, 0]), run.path("fitted_functions.png"))
    slopes = {target: slope(errors[target, "adam"], widths) for target in TARGETS}
    return run.finish(
        {
            "activation": args.activation,
            "widths": widths,
            "seeds": seeds,
            "slope": slopes,
            "widest": {row["target"]: row for row in rows if row["width"] == widths[-1]},
            "rows": rows,
        }
    )


def slope(error: np.ndarray, widths: list[int]) -> float | None:
    """The exponent p of the mean error ∝ width^p, −0.5 in Barron's bound; None for one width."""
    if len(widths) < 2:
        return None
    return float(np.polyfit(np.log(widths), np.log(error.mean(0)), 1)[0])


def draw_errors(errors: dict, widths: list[int], args):
    """Error against width: what training reached, and what its hidden units could do."""
    first, last = (np.mean([errors[target, "adam"][:, at].mean() for target in TARGETS]) for at in (0, -1))
    solved = np.mean([errors[target, "lstsq"][:, -1].mean() for target in TARGETS])
    title = (
        f"One hidden layer ({args.activation}): from {widths[0]} to {widths[-1]} units the mean error goes "
        f"from {first:.2f} to {last:.3f}, or {solved:.3f} with the last layer solved exactly"
    )
    figure, axes = new_figure(1, 2, width=11, height=4.8, title=title, sharey=True)
    panels = (("adam", "trained by Adam, mean ± std"), ("lstsq", "last layer by least squares, mean and each"))
    for ax, (how, name) in zip(axes.flat, panels, strict=True):
        for index, target in enumerate(TARGETS):
            values = errors[target, how]
            # With least squares the deviation may exceed the mean, where a band says little: each seed instead.
            mean_band(ax, widths, values if how == "adam" else values.mean(0, keepdims=True), label=target, index=index)
            if how == "lstsq":
                ax.plot(widths, values.T, ".", color=COLORS[index], alpha=0.4, ms=4)
        guide = np.array(widths, dtype=float)
        ax.plot(guide, 0.5 * (guide / guide[0]) ** -0.5, ":", color="#777777", label="∝ 1/√width, as Barron's bound")
        ax.set(xscale="log", yscale="log", xlabel="width (hidden units)", title=f"{name} of {len(args.seeds)} seeds")
        ax.set_xticks(widths, [str(width) for width in widths])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("RMSE on [−1, 1], mean ± std (targets lie in [−1, 1])")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def draw_fits(fitted: dict, errors: dict, widths: list[int], x: np.ndarray):
    """Each target with the fits of up to four widths (the first seed)."""
    shown = [widths[i] for i in sorted({round(i) for i in np.linspace(0, len(widths) - 1, 4)})]
    best = min(TARGETS, key=lambda target: errors[target, "adam"][:, -1].mean())
    worst = max(TARGETS, key=lambda target: errors[target, "adam"][:, -1].mean())
    title = f"With {widths[-1]} units “{best}” is the easiest of the five, “{worst}” the hardest (first seed shown)"
    figure, axes = new_figure(
        len(TARGETS), len(shown), width=3 * len(shown), height=8.5, title=title, sharex=True, sharey=True
    )
    for row, (target, f) in enumerate(TARGETS.items()):
        for column, width in enumerate(shown):
            ax = axes[row, column]
            ax.plot(x, f(x), color="#999999", linewidth=3, label="target")
            ax.plot(x, fitted[target, width], color=COLORS[1], linewidth=1.2, label="network")
            units = f"{width} unit{'s' if width > 1 else ''}, " if row == 0 else ""
            ax.set_title(f"{units}RMSE {rmse(fitted[target, width], f(x)):.3f}", fontsize=9)
        axes[row, 0].set_ylabel(f"{target}: f(x)")
    for ax in axes[-1]:
        ax.set(xlabel="x", ylim=(-1.6, 1.6))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
