"""Which optimizer descends fastest when each is given its own best learning rate?

    python numpy_nn/compare_optimizers.py
    python numpy_nn/compare_optimizers.py --epochs 100 --hidden 64 --seeds 0 1 2 3 4
    python numpy_nn/compare_optimizers.py --steps 5000

SGD, momentum and Nesterov (μ = 0.9), RMSprop (α = 0.9, Hinton's) and Adam (0.9, 0.999), the ones of `optimizers.py`, on

- toy data sets of two classes in the plane (moons, spirals, circles; each seed draws its own points), with an MLP
  2 → hidden → hidden → 2 (tanh). A seed's points, initial weights and batches are the same for all optimizers. The
  learning rate is the one whose validation loss, the mean over the last tenth of the epochs and the seeds, is lowest;
- surfaces f(x, y) from a fixed start with the exact gradient: an ill-conditioned quadratic, Rosenbrock's valley and
  Beale's plateaus. The learning rate is the one whose f, the median over the last tenth of the steps, is lowest.

A learning rate that diverges, or on a surface ever climbs above the start, is out: a lucky jump is no descent. Both
grids are in metrics.json, with a mark where the choice lies at a grid's edge. Learning rates are constant: RMSprop and
Adam go on taking steps of about lr at the end.

Writes toy_losses.png, decision_regions.png, surface_trajectories.png, surface_losses.png, history.csv and metrics.json.
Source: Sutskever et al. 2013, Hinton 2012, Kingma and Ba 2015; Rosenbrock 1960, Beale 1958.
Shapes: N points, E epochs, T steps.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from numpy_nn.activations import Tanh
from numpy_nn.layers import Linear
from numpy_nn.losses import NotFinite, SoftmaxCrossEntropy
from numpy_nn.network import Sequential
from numpy_nn.optimizers import SGD, Adam, RMSprop
from shared_utils.cli import UserError, add_seeds, make_parser, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.stats import mean_std

OPTIMIZERS = {
    "SGD": lambda layers, lr: SGD(layers, lr),
    "momentum": lambda layers, lr: SGD(layers, lr, momentum=0.9),
    "Nesterov": lambda layers, lr: SGD(layers, lr, momentum=0.9, nesterov=True),
    "RMSprop": lambda layers, lr: RMSprop(layers, lr, alpha=0.9),
    "Adam": lambda layers, lr: Adam(layers, lr),
}
SURFACE_LRS = tuple(factor * 10.0**power for power in range(-5, 1) for factor in (1, 2, 5))
DPI = 80  # wide figures of many colours: a higher one makes large files
N_TRAIN, N_VAL, N_TEST = 400, 400, 2000


# --- toy data sets ------------------------------------------------------------------------------------------------


def moons(n: int, rng: np.random.Generator, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Two half circles, one hooked into the other: x (n, 2) float32, y (n,) with n // 2 ones."""
    y = np.arange(n) % 2
    t = np.pi * rng.random(n)
    x = np.where(y[:, None], np.stack([1 - np.cos(t), 0.5 - np.sin(t)], 1), np.stack([np.cos(t), np.sin(t)], 1))
    return (x + noise * rng.standard_normal((n, 2)) - [0.5, 0.25]).astype(np.float32), y


def spirals(n: int, rng: np.random.Generator, noise: float = 0.06) -> tuple[np.ndarray, np.ndarray]:
    """Two arms of a turn and a half, one the other turned by 180°: x (n, 2) float32, y (n,) with n // 2 ones."""
    y = np.arange(n) % 2
    t = np.sqrt(rng.random(n))  # the root spreads the points evenly along the arm
    angle = 3 * np.pi * t + np.pi * y
    x = 2 * t[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    return (x + noise * rng.standard_normal((n, 2))).astype(np.float32), y


def circles(n: int, rng: np.random.Generator, noise: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    """A circle of radius 1 (class 1) inside one of radius 1.8: x (n, 2) float32, y (n,) with n // 2 ones."""
    y = np.arange(n) % 2
    t = 2 * np.pi * rng.random(n)
    x = np.where(y, 1.0, 1.8)[:, None] * np.stack([np.cos(t), np.sin(t)], 1)
    return (x + noise * rng.standard_normal((n, 2))).astype(np.float32), y


TOYS = {"moons": moons, "spirals": spirals, "circles": circles}


@np.errstate(over="ignore", invalid="ignore")
def train_toy(toy: str, make: Callable, lr: float, seed: int, args) -> tuple[np.ndarray, np.ndarray, Sequential] | None:
    """Train one MLP; returns (training loss after 0 … E epochs (E + 1,), validation loss likewise, network).

    None when the loss does not stay finite: here a learning rate that is too high is an outcome, not a mistake.
    """
    (x, y), (x_val, y_val), _ = toy_data(toy, seed, args)
    rng = np.random.default_rng([args.seed, seed, 1])  # weights and batches: the same for every optimizer
    network = Sequential(
        Linear(2, args.hidden, "xavier", rng),
        Tanh(),
        Linear(args.hidden, args.hidden, "xavier", rng),
        Tanh(),
        Linear(args.hidden, 2, "xavier", rng),
    )
    loss, optimizer = SoftmaxCrossEntropy(), make(network.layers, lr)
    losses = []  # (training, validation)
    try:
        for epoch in range(args.epochs + 1):
            if epoch > 0:
                for batch in minibatches(len(x), args.batch_size, rng):
                    loss.forward(network.forward(x[batch], training=True), y[batch])
                    network.backward(loss.backward(), need_dx=False)
                    optimizer.step()
            losses.append([loss.forward(network.forward(a), b) for a, b in ((x, y), (x_val, y_val))])
    except NotFinite:
        return None
    training, validation = np.array(losses, dtype=np.float64).T  # (E + 1,) each
    return training, validation, network


def toy_data(toy: str, seed: int, args) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training, validation and test points of one seed."""
    rng = np.random.default_rng([args.seed, seed, 0])
    return [TOYS[toy](n, rng) for n in (N_TRAIN, N_VAL, N_TEST)]


# --- surfaces -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """A function of two numbers, its gradient by hand, where to start, and where the minimum (f = 0) lies."""

    formula: str
    value: Callable  # (x, y) -> f, arrays of any shape
    gradient: Callable  # (x, y) -> (∂f/∂x, ∂f/∂y)
    start: tuple[float, float]
    minimum: tuple[float, float]
    window: tuple[float, float, float, float]  # what the figure shows: left, right, bottom, top


def beale_terms(x, y) -> tuple:
    """Beale's function is the sum of these three's squares."""
    return 1.5 - x + x * y, 2.25 - x + x * y**2, 2.625 - x + x * y**3


def beale_gradient(x, y) -> tuple:
    """2 Σ tᵢ ∂tᵢ, with ∂tᵢ/∂x = yⁱ − 1 and ∂tᵢ/∂y = i x yⁱ⁻¹."""
    terms = beale_terms(x, y)
    dx = 2 * sum(t * (y**i - 1) for i, t in enumerate(terms, 1))
    dy = 2 * sum(t * i * x * y ** (i - 1) for i, t in enumerate(terms, 1))
    return dx, dy


SURFACES = {
    "quadratic": Surface(
        "(x² + 100 y²) / 2",
        lambda x, y: (x**2 + 100 * y**2) / 2,
        lambda x, y: (x, 100 * y),
        (-4.0, 1.0),
        (0.0, 0.0),
        (-4.5, 4.5, -1.5, 1.5),
    ),
    "Rosenbrock": Surface(
        "(1 − x)² + 100 (y − x²)²",
        lambda x, y: (1 - x) ** 2 + 100 * (y - x**2) ** 2,
        lambda x, y: (-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)),
        (-1.5, 2.0),
        (1.0, 1.0),
        (-2.0, 2.0, -1.0, 3.0),
    ),
    "Beale": Surface(
        "Σᵢ (cᵢ − x + x yⁱ)²",
        lambda x, y: sum(t**2 for t in beale_terms(x, y)),
        beale_gradient,
        (-1.5, 2.0),
        (3.0, 0.5),
        (-4.5, 4.5, -3.0, 3.0),
    ),
}


class Point:
    """A place on a surface, in the form the optimizers take: `params` and `grads` with one key."""

    def __init__(self, start: tuple[float, float]):
        self.params = {"w": np.array(start, dtype=np.float64)}
        self.grads: dict[str, np.ndarray] = {}


@np.errstate(over="ignore", invalid="ignore")
def descend(surface: Surface, make: Callable, lr: float, steps: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Walk `steps` steps; returns (path (T + 1, 2), f along it (T + 1,)), or None when it climbs above the start."""
    point = Point(surface.start)
    optimizer, path, values = make([point], lr), np.empty((steps + 1, 2)), np.empty(steps + 1)
    for step in range(steps + 1):
        path[step] = point.params["w"]
        values[step] = surface.value(*path[step])
        if not values[step] <= values[0]:  # also when it is NaN
            return None
        point.grads["w"] = np.array(surface.gradient(*path[step]))
        optimizer.step()
    return path, values


# --- the choice of the learning rate, and what came out -------------------------------------------------------------


def choose(scores: dict[float, float], what: str) -> dict:
    """The learning rate of the lowest score, and the grid. Errors: `UserError` when every one diverged."""
    best = min(scores, key=scores.get)
    if not np.isfinite(scores[best]):
        raise UserError(f"{what}: the loss is not finite at any lr down to {min(scores):g}; try lower ones with --lrs")
    grid = [{"lr": lr, "score": score if np.isfinite(score) else None} for lr, score in scores.items()]
    return {"lr": best, "at_edge": len(scores) > 1 and best in (min(scores), max(scores)), "grid": grid}


def build_parser():
    """The command line."""
    quick = {"epochs": 6, "seeds": [0, 1], "lrs": [0.01, 0.1], "steps": 100}
    parser = make_parser(__doc__, dataset=None, device=False, quick=quick)
    add_seeds(parser, [0, 1, 2], "one toy run each")
    parser.add_argument("--epochs", type=positive_int, default=100, help=f"passes over {N_TRAIN} toy points")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="toy points per update")
    parser.add_argument("--hidden", type=positive_int, default=32, help="width of the two hidden layers")
    lrs = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    parser.add_argument("--lrs", type=positive_float, nargs="+", default=lrs, help="learning rates tried on the toys")
    parser.add_argument("--steps", type=positive_int, default=500, help="steps on a surface")
    return parser


def main(argv=None) -> dict:
    """Choose, train and draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    run = start_run(args)
    toys: dict = {toy: {} for toy in TOYS}
    losses, networks = {}, {}
    for toy in TOYS:
        tests = [toy_data(toy, seed, args)[2] for seed in args.seeds]
        for name, make in OPTIMIZERS.items():
            trials = {lr: [train_toy(toy, make, lr, seed, args) for seed in args.seeds] for lr in sorted(set(args.lrs))}
            end = -(-args.epochs // 10)
            scores = {lr: np.mean([t[1][-end:].mean() if t else np.inf for t in found]) for lr, found in trials.items()}
            row = choose(scores, f"{name} on {toy}")
            chosen = trials[row["lr"]]
            losses[toy, name] = np.stack([t[0] for t in chosen])  # (seeds, E + 1)
            networks[toy, name] = chosen[0][2]
            right = [(t[2].forward(x).argmax(1) == y).mean() for t, (x, y) in zip(chosen, tests, strict=True)]
            row["train_loss_median"] = float(np.median(losses[toy, name][:, -end:]))
            row["test_accuracy"], row["test_accuracy_std"] = mean_std(right)
            toys[toy][name] = row
            run.log(problem=toy, optimizer=name, lr=row["lr"], chosen_by=scores[row["lr"]])

    surfaces: dict = {surface: {} for surface in SURFACES}
    walks = {}
    for key, surface in SURFACES.items():
        for name, make in OPTIMIZERS.items():
            trials = {lr: descend(surface, make, lr, args.steps) for lr in SURFACE_LRS}
            end = -(-args.steps // 10)  # the last tenth: a single last step may be luck
            scores = {lr: np.median(t[1][-end:]) if t else np.inf for lr, t in trials.items()}
            row = choose(scores, f"{name} on {key}")
            walks[key, name] = path, values = trials[row["lr"]]
            below = np.flatnonzero(values < 1e-3)
            row |= {"final_value": float(values[-1]), "final_point": path[-1]}
            surfaces[key][name] = row | {"steps_to_0.001": int(below[0]) if len(below) else None}
            run.log(problem=key, optimizer=name, lr=row["lr"], chosen_by=scores[row["lr"]])

    save_figure(draw_toy_losses(losses, toys, args), run.path("toy_losses.png"), dpi=DPI)
    save_figure(draw_regions(networks, toys, args), run.path("decision_regions.png"), dpi=DPI)
    save_figure(draw_trajectories(walks, surfaces, args.steps), run.path("surface_trajectories.png"), dpi=DPI)
    save_figure(draw_surface_losses(walks, surfaces, args.steps), run.path("surface_losses.png"), dpi=DPI)
    return run.finish({"seeds": args.seeds, "toys": toys, "surfaces": surfaces})


# --- figures ------------------------------------------------------------------------------------------------------


def lowest(results: dict[str, dict[str, dict]], key: str) -> str:
    """Which optimizer's `key` is lowest on each problem: for a title."""
    return ", ".join(f"{min(rows, key=lambda n, r=rows: r[n][key])} on {problem}" for problem, rows in results.items())


def draw_toy_losses(losses: dict, toys: dict, args):
    """Training loss of each optimizer at its chosen learning rate, against epochs."""
    figure, axes = new_figure(1, 3, width=14, height=4.6)
    for ax, toy in zip(axes[0], TOYS, strict=True):
        bottom = np.inf
        for index, name in enumerate(OPTIMIZERS):
            values = losses[toy, name]  # (seeds, E + 1)
            middle, epochs = np.median(values, axis=0), np.arange(args.epochs + 1)
            ax.plot(epochs, middle, label=f"{name}, lr {toys[toy][name]['lr']:g}", **line_style(index))
            ax.fill_between(epochs, values.min(0), values.max(0), color=COLORS[index], alpha=0.15, linewidth=0)
            bottom = min(bottom, middle.min())
        ax.set(yscale="log", ylim=(bottom / 3, 1.5), xlabel="epochs", title=f"{toy} (generated, {N_TRAIN} points)")
        ax.legend(fontsize=8, loc="lower left")
    axes[0, 0].set_ylabel(f"training loss (nats): median and range of {len(args.seeds)} seeds")
    said = lowest(toys, "train_loss_median")
    figure.suptitle(f"Lowest training loss at the end (median over the last tenth of {args.epochs} epochs): {said}")
    return figure


def draw_regions(networks: dict, toys: dict, args):
    """What each network of the first seed says of every place in the plane, with the training points."""
    rows, columns = len(TOYS), len(OPTIMIZERS)
    figure, axes = new_figure(rows, columns, width=14, height=8.6)
    for i, toy in enumerate(TOYS):
        x, y = toy_data(toy, args.seeds[0], args)[0]
        (left, bottom), (right, top) = x.min(0) - 0.3, x.max(0) + 0.3
        grid = np.stack(np.meshgrid(np.linspace(left, right, 150), np.linspace(bottom, top, 150)), -1)
        for j, name in enumerate(OPTIMIZERS):
            ax, row = axes[i, j], toys[toy][name]
            logits = networks[toy, name].forward(grid.reshape(-1, 2).astype(np.float32))  # (150·150, 2)
            p = 1 / (1 + np.exp(np.clip(logits[:, 0] - logits[:, 1], -50, 50))).reshape(150, 150)
            extent, levels = (left, right, bottom, top), np.linspace(0, 1, 11)
            image = ax.contourf(p, levels, extent=extent, cmap="PuOr_r", vmin=-0.8, vmax=1.8)
            for label, marker in ((0, "o"), (1, "^")):
                of_class = x[y == label]
                ax.scatter(*of_class.T, s=4, marker=marker, c=COLORS[0] if label == 0 else COLORS[1], linewidths=0)
            tested = f"{100 * row['test_accuracy']:.1f} ± {100 * row['test_accuracy_std']:.1f} %"
            ax.set_title(f"{name}, lr {row['lr']:g}: {tested}", fontsize=9)
            ax.grid(False)
            ax.set(xlabel="x" if i == rows - 1 else "", ylabel=f"{toy}\ny" if j == 0 else "")
    figure.colorbar(image, ax=axes, shrink=0.6, label="probability of class 1 (triangles)")
    best = {toy: max(found, key=lambda n, r=found: r[n]["test_accuracy"]) for toy, found in toys.items()}
    said = ", ".join(f"{name} on {toy} ({toys[toy][name]['test_accuracy']:.1%})" for toy, name in best.items())
    figure.suptitle(f"Best test accuracy, mean of {len(args.seeds)} seeds: {said}; regions of seed {args.seeds[0]}")
    return figure


def draw_trajectories(walks: dict, surfaces: dict, steps: int):
    """The paths on the contours of log f."""
    figure, axes = new_figure(1, 3, width=15, height=5.4)
    for ax, (key, surface) in zip(axes[0], SURFACES.items(), strict=True):
        left, right, bottom, top = surface.window
        x, y = np.meshgrid(np.linspace(left, right, 300), np.linspace(bottom, top, 300))
        f = surface.value(x, y)
        ax.contour(x, y, f, levels=np.logspace(-2, np.log10(f.max()), 18), colors="#AAAAAA", linewidths=0.6)
        for index, name in enumerate(OPTIMIZERS):
            path, row = walks[key, name][0], surfaces[key][name]
            label = f"{name}, lr {row['lr']:g}: f = {row['final_value']:.1e}"
            ax.plot(*path.T, label=label, linewidth=1.3, **line_style(index))
            ax.plot(*path[-1], "s", color=COLORS[index], markersize=5)
        ax.plot(*surface.start, "o", color="black", markersize=6)
        ax.plot(*surface.minimum, "*", color="black", markersize=13)
        ax.set(xlim=(left, right), ylim=(bottom, top), xlabel="x", ylabel="y", title=f"{key}: f = {surface.formula}")
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))
        ax.grid(False)
    said = lowest(surfaces, "final_value")
    figure.suptitle(f"Lowest f at the end of {steps} steps: {said} (● start, ■ end, ★ minimum)")
    return figure


def draw_surface_losses(walks: dict, surfaces: dict, steps: int):
    """f against steps, down to where float64 ends."""
    figure, axes = new_figure(1, 3, width=14, height=4.6)
    for ax, key in zip(axes[0], SURFACES, strict=True):
        for index, name in enumerate(OPTIMIZERS):
            values, row = walks[key, name][1], surfaces[key][name]
            label = f"{name}, lr {row['lr']:g}"
            ax.plot(np.maximum(values, 1e-30), label=label, **line_style(index))
        ax.set(yscale="log", xlabel="steps", title=f"{key}: {SURFACES[key].formula}")
        ax.legend(fontsize=8)
    axes[0, 0].set_ylabel("f − its minimum (no unit)")
    said = []
    for key, rows in surfaces.items():
        arrived = [(row["steps_to_0.001"], name) for name, row in rows.items() if row["steps_to_0.001"] is not None]
        if arrived:
            taken, name = min(arrived)
            said.append(f"{key}: {name} ({taken} steps)")
        else:
            said.append(f"{key}: none")
    figure.suptitle(f"First below f = 0.001 within {steps} steps: {', '.join(said)}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
