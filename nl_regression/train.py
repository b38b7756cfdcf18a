"""What does a network of more than 100,000 weights make of a hundred points of sin(10πx⁴)?

    python nl_regression/train.py
    python nl_regression/train.py --n 1000 --trials 3
    python nl_regression/train.py --n 256 --recipe reference --epochs 2000

`--trials` networks of one size n, each with its own points and weights, are trained at once (recipes.py says how,
sweep.py does it for all sizes). After every epoch (in a long training, at most a hundred times) their mean squared
error on their points and the largest error on [0, 1], δ_in, are noted: whether the first falls and whether the second
follows are two questions.

Writes training.png, fits.png, last.pth, history.csv, metrics.json.
Shapes: M = T trials, n points, G grid points, E epochs.
"""

import numpy as np

from nl_regression.fitting import evaluate
from nl_regression.model import EnsembleMLP
from nl_regression.recipes import Recipe, add_recipe_flags, points_of
from nl_regression.target import GRID, deltas, target
from shared_utils import checkpoint
from shared_utils.cli import UserError, at_least, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, line_style, mean_band, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything

RECORDS = 100  # epochs at which the errors are noted, at most


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"n": 60, "trials": 2, "epochs": 20, "width": 64})
    add_recipe_flags(parser)
    parser.add_argument("--n", type=at_least(2), default=100, help="points of each network, 2 or more")
    parser.add_argument("--trials", type=positive_int, default=5, help="networks")
    return parser


def main(argv=None) -> dict:
    """Train, draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    device, recipe = pick_device(args.device), Recipe.of(args)
    run = start_run(args)
    seed_everything(args.seed)
    points = [points_of(args.n, trial, args.seed)[1] for trial in range(args.trials)]
    every = -(-recipe.epochs // RECORDS)
    curves: list[tuple[int, np.ndarray, np.ndarray]] = []  # epoch, train MSE (T,), δ_in (T,)

    def note(epoch: int, model: EnsembleMLP) -> None:
        if epoch % every == 0 or epoch == recipe.epochs:
            mse, values = evaluate(model, points)
            curves.append((epoch, mse, deltas(values)[0]))
            run.log(epoch=epoch, train_mse=np.nanmedian(mse), delta_in=np.nanmedian(curves[-1][2]))

    model, fit = recipe.train([args.n] * args.trials, range(args.trials), args.seed, device, note)
    bad = np.flatnonzero(fit.diverged_at)
    for trial in bad:
        print(f"trial {trial}: the loss was not finite at update {fit.diverged_at[trial]}")
    if len(bad) == args.trials:
        raise UserError(f"every network diverged at learning rate {recipe.lr:g}: try a lower --lr")
    shape = {"n_models": args.trials, "width": recipe.width, "depth": recipe.depth, "features": recipe.features}
    checkpoint.save(run.path("last.pth"), config=shape, model=model.state_dict())

    fine = fit.diverged_at == 0
    delta_in, delta_out = deltas(fit.values[fine])
    found = {"train_mse": np.median(fit.train_mse[fine]), "delta_in": np.median(delta_in)}
    found["delta_out"] = np.median(delta_out)
    about = f"n = {args.n}, {recipe}"
    save_figure(draw_training(curves, fine, found, about), run.path("training.png"))
    save_figure(draw_fits(fit.values, points, fine, found, about), run.path("fits.png"))
    weights = sum(p.numel() for p in model.parameters()) // args.trials
    return run.finish(
        {
            "recipe": str(recipe),
            "n": args.n,
            "parameters": weights,
            "median_train_mse": found["train_mse"],
            "median_delta_in": found["delta_in"],
            "median_delta_out": found["delta_out"],
            "train_mse": fit.train_mse[fine],
            "delta_in": delta_in,
            "delta_out": delta_out,
            "diverged": [{"trial": trial, "update": fit.diverged_at[trial]} for trial in bad],
        }
    )


def draw_training(curves: list, fine: np.ndarray, found: dict, about: str):
    """Train MSE and δ_in against epochs, mean ± std over the trials that did not diverge."""
    figure, axes = new_figure(1, 2, width=10.5, height=4.4)
    epochs = [epoch for epoch, _, _ in curves]
    for index, (ax, label) in enumerate(zip(axes[0], ("mean squared error on the points", "δ_in"), strict=True)):
        values = np.array([row[index + 1][fine] for row in curves]).T  # (T, E)
        mean_band(ax, epochs, values, label="mean ± std of the trials", index=index, marker=None)
        ax.set(xlabel="epochs of 16 updates", ylabel=label, yscale=("log", "linear")[index])
        ax.legend()
    said = (
        f"the points are met to {found['train_mse']:.1e}, the function on [0, 1] to {found['delta_in']:.2g} (medians)"
    )
    figure.suptitle(f"{said}\n{about}", fontsize=11)
    return figure


def draw_fits(values: np.ndarray, points: list[np.ndarray], fine: np.ndarray, found: dict, about: str):
    """Each trial's function over the target, and the points of the first."""
    figure, axes = new_figure(width=11, height=4.6)
    ax = axes[0, 0]
    ax.axvspan(1, GRID[-1], color="#EEEEEE")
    ax.plot(GRID, target(GRID), color="black", linewidth=0.8, label="target sin(10πx⁴)")
    for trial in np.flatnonzero(fine):
        ax.plot(GRID, values[trial], alpha=0.8, **{**line_style(int(trial)), "linewidth": 1.0}, label=f"trial {trial}")
    first = int(np.flatnonzero(fine)[0])
    x = points[first]
    ax.plot(x, target(x), "o", markersize=3.5, color=COLORS[first % len(COLORS)], label=f"points of trial {first}")
    ax.set(xlabel="x (grey: beyond the points)", ylabel="y", ylim=(-2.5, 2.5))
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.suptitle(f"δ_in = {found['delta_in']:.2g}, δ_out = {found['delta_out']:.2g} (medians): {about}", fontsize=11)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
