"""A multilayer perceptron through noisy points, against a polynomial by least squares: which is nearer the truth?

    python numpy_nn/mlp_regression.py
    python numpy_nn/mlp_regression.py --noise 0.5 --train-points 60

Two functions with Gaussian noise on their training and validation values: on a line a damped wave with a corner, and on
a square Franke's surface (1979), two hills and a dip. The MLP is trained by Adam on the mean squared error and keeps
the weights of its best validation epoch; the polynomial's degree is chosen on the same validation points. Both are
judged by the root mean squared distance to the function without noise, at points that neither has seen; each seed draws
points, noise and weights anew. A fit that reproduces the noise would be off by the noise itself. He's initialisation
and the ten seeds were settled after a first look at these very distances: read the comparison as an illustration, not
as a benchmark.

Writes regression_1d.png, regression_2d.png, history.csv, metrics.json.
Shapes: N points, D inputs (1 or 2).
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np

from numpy_nn.activations import ReLU, Tanh
from numpy_nn.layers import Linear
from numpy_nn.losses import MSE, NotFinite, stopping
from numpy_nn.network import Sequential
from numpy_nn.optimizers import Adam
from shared_utils.cli import (
    add_seeds,
    make_parser,
    non_negative_float,
    positive_float,
    positive_int,
    run_main,
)
from shared_utils.data import minibatches
from shared_utils.plotting import COLORS, curves, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.schedules import half_cosine
from shared_utils.seeding import seed_everything
from shared_utils.stats import mcnemar, mean_std

ACTIVATIONS = {"tanh": Tanh, "relu": ReLU}
DEGREES = {1: range(21), 2: range(13)}
GRID = 61  # points a side at which surfaces are tested and drawn


def wave(x: np.ndarray) -> np.ndarray:
    """A damped wave with a corner at 0.3: x (N, 1) in [−1, 1] → (N, 1)."""
    return np.exp(-1.5 * x**2) * np.sin(9 * x) + 1.5 * np.maximum(0, x - 0.3)


def franke(x: np.ndarray) -> np.ndarray:
    """Franke's surface, its square moved to [−1, 1]²: (N, 2) → (N, 1)."""
    u, v = (9 * (x + 1) / 2).T  # (N,) each, in [0, 9]
    hills = 0.75 * np.exp(-((u - 2) ** 2 + (v - 2) ** 2) / 4) + 0.75 * np.exp(-((u + 1) ** 2) / 49 - (v + 1) / 10)
    return (hills + 0.5 * np.exp(-((u - 7) ** 2 + (v - 3) ** 2) / 4) - 0.2 * np.exp(-((u - 4) ** 2) - (v - 7) ** 2))[
        :, None
    ]


FUNCTIONS = {1: ("wave", wave), 2: ("Franke's surface", franke)}


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, device=False, quick={"epochs": 100, "seeds": [0, 1]})
    parser.add_argument("--widths", type=positive_int, nargs="+", default=[32, 32], help="units of each hidden layer")
    parser.add_argument("--activation", choices=ACTIVATIONS, default="tanh", help="of the hidden units")
    parser.add_argument("--epochs", type=positive_int, default=300, help="passes over the training points")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="points per update")
    parser.add_argument(
        "--lr", type=positive_float, default=0.01, help="Adam's learning rate at the start; a cosine from there"
    )
    parser.add_argument("--train-points", type=positive_int, default=200, help="for the wave; twice as many in 2-D")
    parser.add_argument("--noise", type=non_negative_float, default=0.2, help="standard deviation; half of it in 2-D")
    add_seeds(parser, list(range(10)), "one fit for each")
    return parser


@dataclass(frozen=True)
class Points:
    """Noisy points to fit and to choose by, and points with the true values to be judged by. x (N, D), y (N, 1)."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def draw_points(dim: int, n: int, noise: float, rng: np.random.Generator) -> Points:
    """n training and n/2 validation points, uniform over [−1, 1]^dim; the test points are a grid."""
    f, half = FUNCTIONS[dim][1], max(1, n // 2)
    x = rng.uniform(-1, 1, (n + half, dim))
    y = f(x) + noise * rng.standard_normal((n + half, 1))
    line = np.linspace(-1, 1, 601 if dim == 1 else GRID)
    x_test = np.stack(np.meshgrid(*[line] * dim, indexing="ij"), -1).reshape(-1, dim)
    return Points(x[:n], y[:n], x[n:], y[n:], x_test, f(x_test))


def rmse(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Root of the mean squared difference."""
    return float(np.sqrt(np.mean((prediction - truth) ** 2)))


def build_network(dim: int, widths: list[int], activation: str, rng: np.random.Generator) -> Sequential:
    """dim → widths → 1. float64: at this size it costs nothing."""
    layers = []
    for before, after in itertools.pairwise([dim, *widths]):
        layers += [Linear(before, after, "he", rng, np.float64), ACTIVATIONS[activation]()]
        layers[-2].params["b"] = rng.uniform(-1, 1, after)  # or every unit of the first layer bends at the origin
    return Sequential(*layers, Linear(widths[-1], 1, "xavier", rng, np.float64))


def train(points: Points, args, rng: np.random.Generator) -> tuple[Sequential, dict[str, list[float]]]:
    """The network at its best validation epoch, and the RMSE on training and validation points after each epoch.

    Errors: `Diverged` when the loss does not stay finite.
    """
    network = build_network(points.x_train.shape[1], args.widths, args.activation, rng)
    loss, optimizer = MSE(), Adam(network.layers, args.lr)
    history: dict[str, list[float]] = {"training": [], "validation": []}
    best, total = {}, args.epochs * math.ceil(len(points.x_train) / args.batch_size)
    for _ in range(args.epochs):
        for at in minibatches(len(points.x_train), args.batch_size, rng):
            optimizer.lr = max(half_cosine(optimizer.t, total, args.lr), 1e-12)
            with stopping(optimizer.t + 1, optimizer.lr, args.lr):
                loss.forward(network.forward(points.x_train[at], training=True), points.y_train[at])
                network.backward(loss.backward(), need_dx=False)
                optimizer.step()
        with stopping(optimizer.t, optimizer.lr, args.lr):
            history["training"].append(rmse(network.forward(points.x_train), points.y_train))
            history["validation"].append(rmse(network.forward(points.x_val), points.y_val))
            if not np.isfinite(history["validation"][-1]):
                raise NotFinite("the outputs are not finite")
        if history["validation"][-1] == min(history["validation"]):
            best = {name: array.copy() for name, array in network.parameters().items()}
    for name, array in network.parameters().items():
        array[...] = best[name]
    return network, history


def polynomial_features(x: np.ndarray, degree: int) -> np.ndarray:
    """All products of Legendre polynomials of total degree ≤ degree: (N, D) → (N, terms). Spans the monomials'."""
    single = np.stack([np.polynomial.legendre.legvander(column, degree) for column in x.T])  # (D, N, degree + 1)
    powers = [p for p in itertools.product(range(degree + 1), repeat=x.shape[1]) if sum(p) <= degree]
    return np.stack([np.prod([single[d][:, k] for d, k in enumerate(p)], axis=0) for p in powers], axis=1)


def fit_polynomial(points: Points) -> tuple[int, np.ndarray]:
    """(degree with the least validation error, its prediction at the test points (N, 1))."""
    found = []
    for degree in DEGREES[points.x_train.shape[1]]:
        features = polynomial_features(points.x_train, degree)
        if features.shape[1] > len(features):
            break
        weights, *_ = np.linalg.lstsq(features, points.y_train, rcond=None)
        error = rmse(polynomial_features(points.x_val, degree) @ weights, points.y_val)
        found.append((error, degree, weights))
    _, degree, weights = min(found, key=lambda each: each[0])
    return degree, polynomial_features(points.x_test, degree) @ weights


def main(argv=None) -> dict:
    """Fit both functions by both means with every seed; returns the metrics."""
    args = build_parser().parse_args(argv)
    seed_everything(args.seed)
    seeds = args.seeds
    run = start_run(args)
    metrics: dict = {"seeds": seeds, "widths": args.widths, "activation": args.activation}
    for dim, (name, _) in FUNCTIONS.items():
        noise, n, shown, rows = args.noise / dim, args.train_points * dim, None, []
        for seed in seeds:
            rng = np.random.default_rng([args.seed, seed, dim])
            points = draw_points(dim, n, noise, rng)
            network, history = train(points, args, rng)
            degree, polynomial = fit_polynomial(points)
            prediction = network.forward(points.x_test)
            errors = {"mlp": rmse(prediction, points.y_test), "polynomial": rmse(polynomial, points.y_test)}
            best_epoch = 1 + int(np.argmin(history["validation"]))
            rows.append({**errors, "degree": degree, "best_epoch": best_epoch})
            run.log(function=name, seed=seed, **rows[-1])
            shown = shown or (points, history, prediction, polynomial, degree)
        found = {}
        for kind in ("mlp", "polynomial"):
            found[f"{kind}_rmse"], found[f"{kind}_std"] = mean_std([row[kind] for row in rows])
        nearer = np.array([row["mlp"] < row["polynomial"] for row in rows])
        wins, _, p = mcnemar(nearer, ~nearer)  # on pairs of which one wins each time it is the sign test
        found |= {"mlp_wins": wins, "sign_test_p": p, "noise": noise, "points": n, "rows": rows}
        metrics["line" if dim == 1 else "surface"] = found
        title = (
            f"{name[0].upper()}{name[1:]}, noise {noise:g}: test RMSE "
            f"{found['mlp_rmse']:.3f} ± {found['mlp_std']:.3f} by the MLP, "
            f"{found['polynomial_rmse']:.3f} ± {found['polynomial_std']:.3f} by polynomials; "
            f"the MLP is nearer with {wins} of {len(rows)} seeds (p = {p:.2g})"
        )
        draw = draw_line if dim == 1 else draw_surface
        save_figure(draw(title, noise, *shown), run.path(f"regression_{dim}d.png"))
    return run.finish(metrics)


def draw_history(ax, history: dict[str, list[float]], noise: float) -> None:
    """RMSE against epochs, the noise as the floor, the epoch that was kept."""
    epochs = range(1, len(history["training"]) + 1)
    series = {name: (epochs, values) for name, values in history.items()}
    curves(ax, series, xlabel="epoch", ylabel="RMSE on noisy points")
    best = int(np.argmin(history["validation"]))
    ax.plot(best + 1, history["validation"][best], "D", color=COLORS[2], label="weights kept")
    if noise > 0:
        ax.axhline(noise, color="#777777", linestyle=":", label="noise")
    ax.set(ylim=(0, None), title="training")
    ax.legend()


def draw_line(title: str, noise: float, points: Points, history, prediction, polynomial, degree: int):
    """The fits with the points, their distance from the truth, and the training curves (first seed)."""
    figure, axes = new_figure(1, 3, width=14, height=4.6, title=title, width_ratios=[1.4, 1.2, 1])
    x, name = points.x_test[:, 0], f"polynomial of degree {degree}"
    ax = axes[0, 0]
    ax.plot(points.x_train[:, 0], points.y_train[:, 0], ".", color="#AAAAAA", ms=4, label="training points")
    ax.plot(x, points.y_test[:, 0], color="black", linewidth=1, label="truth")
    ax.plot(x, prediction[:, 0], color=COLORS[0], label="MLP")
    ax.plot(x, polynomial[:, 0], "--", color=COLORS[1], label=name)
    ax.set(xlabel="x", ylabel="y", title="fits (first seed)")
    ax.legend(fontsize=8)
    ax = axes[0, 1]
    ax.axhspan(-noise, noise, color="#999999", alpha=0.2, linewidth=0, label="± noise")
    for values, label, color, dash in ((prediction, "MLP", COLORS[0], "-"), (polynomial, name, COLORS[1], "--")):
        off = values - points.y_test
        ax.plot(x, off[:, 0], dash, color=color, label=f"{label}: RMSE {rmse(off, 0):.3f}")
    ax.set(xlabel="x", ylabel="fit − truth", title="residuals at points not seen")
    ax.legend(fontsize=8)
    for ax in axes[0, :2]:
        ax.set_xticks((-1, -0.5, 0, 0.5, 1))
    draw_history(axes[0, 2], history, noise)
    return figure


def draw_surface(title: str, noise: float, points: Points, history, prediction, polynomial, degree: int):
    """Truth and both fits, their distances from it on one scale, and the training curves (first seed)."""
    figure, axes = new_figure(2, 3, width=12, height=7.2, title=title)
    truth = points.y_test.reshape(GRID, GRID).T  # (x₂, x₁)
    fits = {"MLP": prediction.reshape(GRID, GRID).T, f"polynomial of degree {degree}": polynomial.reshape(GRID, GRID).T}
    reach = max(np.quantile(np.abs(fit - truth), 0.99) for fit in fits.values())  # corners may be off by far more
    style = {"origin": "lower", "extent": (-1, 1, -1, 1)}
    panels = [(axes[0, 0], truth, "truth, and the training points")]
    panels += [(ax, fit, f"{name} (first seed)") for ax, (name, fit) in zip(axes[0, 1:], fits.items(), strict=True)]
    for ax, values, label in panels:
        image = ax.imshow(values, cmap="cividis", vmin=truth.min(), vmax=truth.max(), **style)
        ax.set(title=label)
    axes[0, 0].plot(*points.x_train.T, ".", color="white", ms=1.5)
    figure.colorbar(image, ax=axes[0, -1], label="height")
    for ax, (name, fit) in zip(axes[1, 1:], fits.items(), strict=True):
        image = ax.imshow(fit - truth, cmap="RdBu_r", vmin=-reach, vmax=reach, **style)
        ax.set(title=f"{name.split(' of')[0]} − truth: RMSE {rmse(fit, truth):.3f}")
    figure.colorbar(image, ax=axes[1, -1], label="fit − truth", extend="both")
    for ax in (*axes[0], *axes[1, 1:]):
        ax.set(xlabel="x₁", ylabel="x₂", xticks=(-1, 0, 1), yticks=(-1, 0, 1))
        ax.grid(False)
    draw_history(axes[1, 0], history, noise)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
