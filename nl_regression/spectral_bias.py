"""Which parts of the target are learned when?

    python nl_regression/spectral_bias.py
    python nl_regression/spectral_bias.py --n 256 --epochs 1000
    python nl_regression/spectral_bias.py --sigma 3

Networks learn sin(10πx⁴) from 1,000 points in three ways: from x itself and from Fourier features of it with the same
optimiser, and from x with the reference's. At epochs spaced evenly on a logarithmic axis the residual r = f − f* on
[0, 1] is split by frequency, in two ways:

    by place:     rms(r) / rms(f*) over the x whose local frequency 20x³ lies in the bin
    by spectrum:  sqrt(Σ R_k² / Σ F_k²) over the bin's coefficients of their cosine transforms, at k / 2 cycles per unit

Both are 0 for the target and 1 for the function 0. The cosine transform continues a function by its mirror image: no
jump at the ends, so no window is needed, which would hide the fast end at x = 1.

Writes spectral_bias.png, training_film.png, history.csv, metrics.json.
Sources: Rahaman et al. 2019 (slow parts first); Tancik et al. 2020 (Fourier features).
Shapes: T trials, G grid points on [0, 1], R recorded epochs, K bins.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from matplotlib.colors import LogNorm
from scipy.fft import dct

from nl_regression.fitting import evaluate
from nl_regression.model import EnsembleMLP
from nl_regression.recipes import RECIPES, Recipe, add_recipe_flags, points_of
from nl_regression.target import GRID, IN_POINTS, deltas, local_frequency, target
from shared_utils.cli import UserError, at_least, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything

EDGES = np.array([0, 1, 2, 5, 10, 20])  # cycles per unit
FINE = np.array([0, *np.geomspace(0.5, 20, 13)])  # the heat map's
RECORDS = 40  # recorded epochs, at most
FRAMES = 5  # of the film
SLOW = 5  # cycles per unit: where the film divides [0, 1]
X = GRID[:IN_POINTS]  # (G,)


@dataclass(frozen=True)
class Course:
    """How one method's T networks learned: epochs (R,), train_mse (R, T), values on [0, 1.5] (R, T, grid)."""

    name: str
    recipe: Recipe
    epochs: np.ndarray
    train_mse: np.ndarray
    values: np.ndarray

    def relative(self, edges: np.ndarray = EDGES) -> np.ndarray:
        """Median over trials of the relative residual by place: (R, K)."""
        return np.median(by_place(self.values[..., :IN_POINTS] - target(X), edges), axis=1)

    def relative_spectrum(self) -> np.ndarray:
        """Median over trials of the relative residual by spectrum: (R, K)."""
        return np.median(by_spectrum(self.values[..., :IN_POINTS] - target(X), EDGES), axis=1)


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"n": 200, "trials": 2, "epochs": 20, "width": 64})
    add_recipe_flags(parser)
    parser.set_defaults(epochs=300)  # for all methods: raw input needs longer than the recipe's
    parser.add_argument("--n", type=at_least(2), default=1000, help="points of each network, 2 or more")
    parser.add_argument("--trials", type=positive_int, default=3, help="networks of each method")
    return parser


def in_bins(frequency: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Which of the K bins, bool (K, G), each frequency (G,) lies in: [low, high), the last [low, high]."""
    low, high = edges[:-1, None], edges[1:, None]  # (K, 1)
    return (frequency >= low) & ((frequency < high) | ((high == edges[-1]) & (frequency == high)))


def by_place(residual: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Residuals (…, G) on [0, 1] → their RMS relative to the target's where its local frequency is in a bin: (…, K)."""
    inside = in_bins(local_frequency(X), edges).astype(float)  # (K, G)
    return np.sqrt((residual**2 @ inside.T) / (inside @ target(X) ** 2))


def by_spectrum(residual: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Residuals (…, G) on [0, 1] → amplitude in a bin of their cosine transform, relative to the target's: (…, K)."""
    frequency = np.arange(len(X)) / 2 / (len(X) * X[1])  # (G,), cycles per unit; a sample stands for one step
    inside = in_bins(frequency, edges).astype(float)
    power, full = (dct(f, norm="ortho", axis=-1) ** 2 for f in (residual, target(X)))
    return np.sqrt((power @ inside.T) / (inside @ full))


def first_below(relative: np.ndarray, epochs: np.ndarray, level: float) -> list[int | None]:
    """For each bin of relative (R, K) the first recorded epoch at which it is below `level`, None if it never is."""
    below = relative < level
    return [int(epochs[column.argmax()]) if column.any() else None for column in below.T]


def methods_of(recipe: Recipe) -> list[tuple[str, Recipe]]:
    """The recipe without its Fourier features, with them, and the reference's raw input where that is another one."""
    name = {"adam": "Adam", "sgd": "SGD"}
    found = [("raw input", replace(recipe, features=0)), ("Fourier features", recipe)]
    if recipe.optimizer != RECIPES["reference"]["optimizer"]:
        shape = {key: getattr(recipe, key) for key in ("epochs", "width", "depth", "batch_size")}
        found.append(("raw input", Recipe(**{**RECIPES["reference"], **shape})))
    return [(f"{inputs}, {name[one.optimizer]}", one) for inputs, one in found]


def watch(name: str, recipe: Recipe, n: int, trials: int, seed: int, device) -> Course:
    """Train `trials` networks and keep their values at the recorded epochs. Errors: `UserError` when all diverge."""
    points = [points_of(n, trial, seed)[1] for trial in range(trials)]
    epochs = sorted({round(float(epoch)) for epoch in np.geomspace(1, recipe.epochs, RECORDS)})
    kept: list[tuple[np.ndarray, np.ndarray]] = []

    def note(epoch: int, model: EnsembleMLP) -> None:
        if epoch in epochs:
            kept.append(evaluate(model, points))

    _, fit = recipe.train([n] * trials, range(trials), seed, device, note)
    fine = fit.diverged_at == 0
    for trial in np.flatnonzero(~fine):
        print(f"{name}, trial {trial}: the loss was not finite at update {fit.diverged_at[trial]}")
    if not fine.any():
        raise UserError(f"{name}: every network diverged at learning rate {recipe.lr:g}: try a lower --lr")
    mse, values = (np.stack(parts)[:, fine] for parts in zip(*kept, strict=True))
    return Course(name, recipe, np.array(epochs), mse, values)


def main(argv=None) -> dict:
    """Train each method, split its residuals, draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    recipe = Recipe.of(args)
    if not recipe.features:
        raise UserError("--features 0: the comparison with raw input needs Fourier features")
    device = pick_device(args.device)
    run = start_run(args)
    seed_everything(args.seed)
    courses = []
    for name, one in methods_of(recipe):
        course = watch(name, one, args.n, args.trials, args.seed, device)
        courses.append(course)
        for epoch, mse, row in zip(course.epochs, course.train_mse, course.relative(), strict=True):
            bins = {f"relative_{label.replace('–', '_')}": value for label, value in zip(labels(), row, strict=True)}
            run.log(method=name, epoch=epoch, train_mse=np.median(mse), **bins)
    rows = [summary(course) for course in courses]
    save_figure(draw(courses, rows, args.n), run.path("spectral_bias.png"))
    save_figure(draw_film(courses[:2], args.n), run.path("training_film.png"))
    raw, fourier = (row["tenth_by_place"] for row in rows[:2])
    return run.finish(
        {
            "n": args.n,
            "epochs": recipe.epochs,
            "bins": len(EDGES) - 1,
            "edges": EDGES,
            "raw_bins_below_a_tenth": sum(epoch is not None for epoch in raw),
            "fourier_bins_below_a_tenth": sum(epoch is not None for epoch in fourier),
            "raw_epochs_to_a_tenth": told(raw),
            "fourier_epochs_to_a_tenth": told(fourier),
            "methods": rows,
        }
    )


def summary(course: Course) -> dict:
    """First epochs below 0.5 and 0.1 for each bin, in both readings, and where the method ends (medians)."""
    row = {"method": course.name, "recipe": str(course.recipe), "networks": course.values.shape[1]}
    for reading, relative in (("by_place", course.relative()), ("by_spectrum", course.relative_spectrum())):
        row[f"half_{reading}"] = first_below(relative, course.epochs, 0.5)
        row[f"tenth_{reading}"] = first_below(relative, course.epochs, 0.1)
        row[f"final_{reading}"] = relative[-1]
    row["median_train_mse"] = float(np.median(course.train_mse[-1]))
    row["median_delta_in"] = float(np.median(deltas(course.values[-1])[0]))
    return row


def labels() -> list[str]:
    """The bins in words, cycles per unit."""
    return [f"{low}–{high}" for low, high in pairwise(EDGES)]


def told(epochs: list[int | None]) -> str:
    """The epochs in words."""
    return ", ".join("never" if epoch is None else f"{epoch}" for epoch in epochs)


def draw(courses: list[Course], rows: list[dict], n: int):
    """A column for each method: the relative residual as a heat map, its bins by place, its bins by spectrum."""
    figure, axes = new_figure(3, len(courses), width=4.4 * len(courses), height=10.5, sharex=True, sharey="row")
    for column, course in zip(axes.T, courses, strict=True):
        edges = np.sqrt(
            np.r_[course.epochs[:1] ** 2 / 1.2, course.epochs[:-1] * course.epochs[1:], course.epochs[-1] ** 2]
        )
        heat = column[0].pcolormesh(
            edges,
            np.r_[0.25, FINE[1:]],
            course.relative(FINE).T,
            norm=LogNorm(0.01, 1),
            cmap="cividis",
            rasterized=True,
        )
        column[0].set(yscale="log", title=f"{course.name}\ntrain MSE {np.median(course.train_mse[-1]):.1e} at the end")
        column[0].set_yticks(EDGES[1:], [f"{edge}" for edge in EDGES[1:]])
        column[0].minorticks_off()
        column[0].grid(False)
        for ax, relative in zip(column[1:], (course.relative(), course.relative_spectrum()), strict=True):
            for index, label in enumerate(labels()):
                ax.plot(course.epochs, relative[:, index], label=label, **line_style(index))
            for level in (0.1, 0.5):
                ax.axhline(level, color="#777777", linewidth=0.8)
            ax.set(yscale="log", ylim=(3e-4, 3))
        column[2].set(xscale="log", xlabel="epochs of 16 updates")
    axes[0, 0].set_ylabel("local frequency 20x³, cycles per unit")
    axes[1, 0].set_ylabel("by place: relative residual")
    axes[2, 0].set_ylabel("by spectrum: relative residual")
    axes[1, 0].legend(title="cycles per unit", fontsize=8, ncols=2, loc="lower left")
    bar = figure.colorbar(heat, ax=axes[0, -1], extend="both")
    bar.set_label("relative residual (by place)")
    said = f"n = {n}: first epoch with less than 10 % relative error in the bins {', '.join(labels())} cycles per unit"
    per = [f"{row['method']}: {told(row['tenth_by_place'])}" for row in rows]
    figure.suptitle("\n".join([said, *per]), fontsize=11)
    return figure


def draw_film(courses: list[Course], n: int):
    """A row for each method: the first network's function at epochs spaced evenly on a logarithmic axis."""
    epochs = courses[0].epochs
    frames = sorted({int(np.abs(np.log(epochs / at)).argmin()) for at in np.geomspace(1, epochs[-1], FRAMES)})
    figure, axes = new_figure(len(courses), len(frames), width=14, height=5.2, sharex=True, sharey=True)
    border = X[local_frequency(X) >= SLOW][0]
    said = []
    for row, (ax_row, course) in enumerate(zip(axes, courses, strict=True)):
        own = course.values[frames, 0, :IN_POINTS]  # (frames, G)
        slow, fast = by_place(own - target(X), np.array([0, SLOW, EDGES[-1]])).T  # (frames,) each
        said.append(f"{course.name}: {slow[-1]:.3f} | {fast[-1]:.3f}")
        for at, (ax, frame) in enumerate(zip(ax_row, frames, strict=True)):
            ax.axvspan(border, 1, color="#EEEEEE")
            ax.plot(X, target(X), color="black", linewidth=0.7, label="target")
            ax.plot(X, own[at], color=COLORS[row], linewidth=1.2, label="network")
            ax.set(ylim=(-1.6, 1.6), xlim=(0, 1), title=f"epoch {epochs[frame]}: {slow[at]:.2f} | {fast[at]:.2f}")
        ax_row[0].set_ylabel(f"{course.name}\ny")
        ax_row[0].legend(fontsize=8, loc="lower left")
    for ax in axes[-1]:
        ax.set_xlabel(f"x (grey: above {SLOW} cycles per unit)", fontsize=9)
    title = f"Relative error where the target is slower | faster than {SLOW} cycles per unit (one network, {n} points)"
    figure.suptitle(f"{title}\nafter {epochs[-1]} epochs: {'; '.join(said)}", fontsize=11)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
