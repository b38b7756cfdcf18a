"""Does more overparameterisation hurt?

    python nl_regression/width_depth_study.py
    python nl_regression/width_depth_study.py --n 1000 --widths 64 256 1024 --depths 1 3 5
    python nl_regression/width_depth_study.py --recipe reference --out runs/nl_regression/width_depth_study_reference

Networks of 16 to 1,024 units in each hidden layer, and of 1 to 5 hidden layers, learn the same 200 points of
sin(10πx⁴) with the same recipe and number of updates. A trial's points are the same for every shape. Classical wisdom
says that the largest error on [0, 1], δ_in, rises with the number of parameters once it exceeds that of the points. A
shape that does not meet its points (train MSE) is a failure of the optimiser: no learning rate is tuned to a shape.

Writes width_depth.png, history.csv, metrics.json.
Shapes: T trials.
"""

import time
from dataclasses import replace

import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from nl_regression.recipes import Recipe, add_recipe_flags
from nl_regression.results import FITS, plain
from nl_regression.target import deltas
from shared_utils.cli import UserError, at_least, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import mean_band, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import mean_std

WIDTHS = [16, 32, 64, 128, 256, 512, 1024]
DEPTHS = [1, 2, 3, 4, 5]


def build_parser():
    """The command line."""
    quick = {"n": 30, "trials": 2, "epochs": 20, "widths": [8, 32, 64], "depths": [1, 2], "width": 32}
    parser = make_parser(__doc__, dataset=None, quick=quick)
    add_recipe_flags(parser)
    parser.add_argument("--widths", type=positive_int, nargs="+", default=WIDTHS, help="at depth --depth")
    parser.add_argument("--depths", type=positive_int, nargs="+", default=DEPTHS, help="at width --width")
    parser.add_argument("--n", type=at_least(2), default=200, help="points of each network, 2 or more")
    parser.add_argument("--trials", type=positive_int, default=3, help="networks of each shape")
    return parser


def main(argv=None) -> dict:
    """Train every shape, compare, draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    device, recipe = pick_device(args.device), Recipe.of(args)
    run = start_run(args)
    seed_everything(args.seed)
    by_width = [(width, recipe.depth) for width in sorted(set(args.widths))]
    by_depth = [(recipe.width, depth) for depth in sorted(set(args.depths))]
    found: dict[tuple[int, int], dict] = {}
    for width, depth in dict.fromkeys([*by_width, *by_depth]):
        found[width, depth] = measure(replace(recipe, width=width, depth=depth), args, device)
        run.log(**{key: value for key, value in plain(found[width, depth]).items() if not isinstance(value, list)})
    rows = list(found.values())
    for row in rows:
        for trial in np.flatnonzero(np.isnan(row["trials_train_mse"])):
            print(f"width {row['width']}, depth {row['depth']}, trial {trial}: the loss was not finite")
    if all(row["diverged"] == args.trials for row in rows):
        raise UserError(f"every network diverged at learning rate {recipe.lr:g}: try a lower --lr")
    widths, depths = ([found[shape] for shape in shapes] for shapes in (by_width, by_depth))
    outcome = {"width": finding(widths, "width"), "depth": finding(depths, "depth")}
    meet = sum(row["meets_its_points"] for row in rows)
    save_figure(draw(widths, depths, outcome, args.n, recipe), run.path("width_depth.png"))
    return run.finish(
        {
            "recipe": str(recipe),
            "n": args.n,
            "trials": args.trials,
            "shapes": len(rows),
            "shapes_that_meet_their_points": meet,
            **{f"{key}_{name}": value for name, of in outcome.items() for key, value in of.items()},
            "by_width": [plain(row) for row in widths],
            "by_depth": [plain(row) for row in depths],
        }
    )


def measure(recipe: Recipe, args, device) -> dict:
    """Train one shape's trials; their errors, NaN for those that diverged."""
    begin = time.perf_counter()
    model, fit = recipe.train([args.n] * args.trials, range(args.trials), args.seed, device)
    seconds = time.perf_counter() - begin
    fine = fit.diverged_at == 0
    row = {"width": recipe.width, "depth": recipe.depth}
    row["parameters"] = sum(p.numel() for p in model.parameters()) // args.trials
    for name, values in (("train_mse", fit.train_mse), ("delta_in", deltas(fit.values)[0])):
        row[name], row[f"{name}_std"] = mean_std(values[fine]) if fine.any() else (np.nan, np.nan)
        row[f"trials_{name}"] = np.where(fine, values, np.nan).tolist()
    row["diverged"] = int((~fine).sum())
    row["meets_its_points"] = bool(fine.all() and fit.train_mse.max() <= FITS)
    return {**row, "training_seconds": seconds}


def finding(rows: list[dict], what: str) -> dict:
    """The shape with the smallest mean δ_in, the largest shape, and whether its δ_in is worse.

    rows: shapes in rising order. A trial has the same points in both: worse means a mean difference above the standard
    deviation of the trials' differences (two trials at least). A shape of which every network diverged is left out.
    """
    rows = [row for row in rows if row["diverged"] < len(row["trials_delta_in"])]
    if not rows:
        return {"best": None, "best_delta_in": None, "largest": None, "largest_delta_in": None, "hurts": None}
    best, largest = min(rows, key=lambda row: row["delta_in"]), rows[-1]
    differences = np.subtract(largest["trials_delta_in"], best["trials_delta_in"])  # (T,)
    differences = differences[np.isfinite(differences)]
    mean, std = mean_std(differences) if len(differences) > 1 else (0.0, 0.0)
    return {
        "best": best[what],
        "best_delta_in": best["delta_in"],
        "largest": largest[what],
        "largest_delta_in": largest["delta_in"],
        "hurts": mean > std,
    }


def told(found: dict, what: str) -> str:
    """The finding in words."""
    if found["best"] is None:
        return f"{what}: every network diverged"
    if found["best"] == found["largest"]:
        return f"{what}: δ_in is smallest at the largest, {found['best']:,} ({found['best_delta_in']:.3f})"
    said = f"{what}: δ_in is smallest at {found['best']:,} ({found['best_delta_in']:.3f})"
    verdict = "above" if found["hurts"] else "within"
    return f"{said}, {found['largest_delta_in']:.3f} at {found['largest']:,}: {verdict} the trials' deviation"


def draw(widths: list[dict], depths: list[dict], outcome: dict, n: int, recipe: Recipe):
    """δ_in and train MSE against width and against depth, mean ± std and each trial."""
    figure, axes = new_figure(2, 2, width=12, height=7.6, sharey="row", sharex="col")
    for column, rows, what in ((axes[:, 0], widths, "width"), (axes[:, 1], depths, "depth")):
        sizes = [row[what] for row in rows]
        for index, (ax, key) in enumerate(zip(column, ("delta_in", "train_mse"), strict=True)):
            values = np.array([row[f"trials_{key}"] for row in rows]).T  # (T, sizes)
            mean_band(ax, sizes, values, label="mean ± std of the trials", index=index)
            ax.plot(sizes, values.T, ".", color="#555555", markersize=5)
            ax.plot([], [], ".", color="#555555", markersize=5, label="a trial")
            ax.set(yscale="log")
        column[0].set_title(told(outcome[what], what), fontsize=8.5)
        column[1].axhline(FITS, color="#777777", linestyle="--", linewidth=1, label=f"interpolates: {FITS:g}")
        if what == "width":
            column[1].set_xscale("log")
        column[1].minorticks_off()
        column[1].set_xticks(sizes, [f"{row[what]:,}\n{row['parameters']:,}" for row in rows], fontsize=8)
        fixed = f"depth {recipe.depth}" if what == "width" else f"width {recipe.width}"
        column[1].set_xlabel(f"{what} (at {fixed}); below it the parameters of a network")
    for ax, label in zip(
        axes[:, 0], ("δ_in, largest error on [0, 1]", "mean squared error on the points"), strict=True
    ):
        ax.set_ylabel(label)
        ax.legend(fontsize=8)
    axes[0, 0].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes[0, 0].yaxis.set_major_formatter("{x:g}")
    axes[0, 0].yaxis.set_minor_locator(NullLocator())
    rows = list({(row["width"], row["depth"]): row for row in [*widths, *depths]}.values())
    meet, worse = sum(row["meets_its_points"] for row in rows), [k for k, v in outcome.items() if v["hurts"]]
    fewest, most = min(row["parameters"] for row in rows), max(row["parameters"] for row in rows)
    answer = f"more {' and '.join(worse)} hurts" if worse else "no harm seen from more width or depth"
    said = f"{answer}: n = {n}, {fewest:,} to {most:,} parameters, {meet} of {len(rows)} shapes meet their points"
    figure.suptitle(f"{said}\n({recipe})", fontsize=11)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
