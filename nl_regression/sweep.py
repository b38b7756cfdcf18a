"""From how many points on does an overparameterised network know the function between them, and beyond them?

    python nl_regression/sweep.py
    python nl_regression/sweep.py --recipe reference --out runs/nl_regression/sweep_reference
    python nl_regression/sweep.py --sizes 50 100 200 --trials 3 --epochs 100 --lr 0.002

Networks of 3 layers of 256 ReLU units, more than a hundred parameters for each point, learn sin(10πx⁴) from n points on
[0, 1]: 20 sizes from 10 to 1,000, 5 trials each with their own points and weights, and the four sizes of the
reference's table. Each is measured by its mean squared error on the points, δ_in (largest error on [0, 1]) and δ_out
(on [0, 1.5]; target.py). All trials of a size train at once; on a GPU, all networks.

Writes dataset_example.png, delta_vs_n.png, fits_vs_n.png, results.csv, last.npz, history.csv, metrics.json. last.npz
holds each network's values on the grid; with --resume a sweep that was stopped goes on with the sizes that it lacks
(on a GPU all are one group: there it begins anew).
Shapes: M networks, T trials, n points, G grid points.
"""

import numpy as np

from nl_regression.recipes import Recipe, add_recipe_flags, points_of
from nl_regression.results import FITS, KNOWS, Networks, plain
from nl_regression.target import GRID, deltas, target
from shared_utils.cli import UserError, at_least, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, line_style, mean_band, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import mean_std

SIZES = sorted({round(float(n)) for n in np.logspace(1, 3, 20)})  # 10 … 1,000
TABLE = [8, 32, 128, 256]
ROUGHLY = 0.5  # largest error below which a network follows the target; that of 0 is 1
FAR = 1.6  # |y| beyond which a figure is cut: the target stays within 1


def build_parser():
    """The command line."""
    quick = {"sizes": [10, 60], "table": [8], "trials": 2, "epochs": 20, "width": 64}
    parser = make_parser(__doc__, dataset=None, quick=quick)
    add_recipe_flags(parser)
    parser.add_argument("--sizes", type=at_least(2), nargs="+", default=SIZES, help="numbers of points, 2 or more")
    parser.add_argument("--table", type=at_least(2), nargs="*", default=TABLE, help="further sizes, for the table")
    parser.add_argument("--trials", type=positive_int, default=5, help="networks for each size")
    parser.add_argument("--resume", action="store_true", help="go on with the sizes that last.npz lacks")
    return parser


def main(argv=None) -> dict:
    """Train the sizes that are missing, group by group; draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    sizes = sorted({*args.sizes, *args.table})
    device, recipe = pick_device(args.device), Recipe.of(args)
    run = start_run(args)
    seed_everything(args.seed)
    found = Networks.load(run.path("last.npz")) if args.resume and run.path("last.npz").exists() else None
    run.rewind(len(found.sizes()) if found else 0)
    todo = [n for n in sizes if found is None or n not in found.sizes()]
    # A CPU's cache holds the networks of one size; a GPU has room for all at once.
    groups = [[n] for n in todo] if device.type == "cpu" or not todo else [todo]
    for group in groups:
        ns, trials = np.repeat(group, args.trials), np.tile(np.arange(args.trials), len(group))
        _, fit = recipe.train(ns, trials, args.seed, device)
        new = Networks(ns, trials, fit.train_mse, fit.diverged_at, fit.values)
        found = new if found is None else found.joined(new)
        found.save(run.path("last.npz"))
        for n in group:
            run.log(**summary(found.of_size(n)))
    found.write_csv(run.path("results.csv"))

    rows = [summary(found.of_size(n)) for n in sizes]
    for row in rows:
        numbers = f"{row['train_mse']:9.1e}{row['delta_in']:9.3f}{row['delta_out']:9.2f}"
        numbers += f"  ({row['diverged']} diverged)" if row["diverged"] else ""
        print(f"n = {row['n']:5}: train MSE, δ_in, δ_out{numbers}  {row['verdict']}")
    bad = found[found.diverged_at > 0]
    for n, trial, update in zip(bad.n, bad.trial, bad.diverged_at, strict=True):
        print(f"n = {n}, trial {trial}: the loss was not finite at update {update}")
    if len(bad) == len(found):
        raise UserError(f"every network diverged at learning rate {recipe.lr:g}: try a lower --lr")
    swept = [row for row in rows if row["n"] in args.sizes]
    fine = found[found.diverged_at == 0]
    save_figure(draw_examples(fine, args, recipe), run.path("dataset_example.png"))
    save_figure(draw_deltas(found, swept, recipe), run.path("delta_vs_n.png"))
    save_figure(draw_fits(fine, recipe), run.path("fits_vs_n.png"))
    metrics = {
        "recipe": str(recipe),
        "networks": len(found),
        "interpolating": int((found.train_mse <= FITS).sum()),
        "largest_train_mse": float(np.nanmax([row["largest_train_mse"] for row in rows])),
        "largest_n": sizes[-1],
        "delta_out_at_the_largest_n": rows[-1]["delta_out"],
        "median_delta_in_at_the_largest_n": rows[-1]["median_delta_in"],
        "first_n_that_knows": next((row["n"] for row in swept if row["median_delta_in"] <= KNOWS), None),
        "table": [plain(row) for row in rows if row["n"] in args.table],
        "sweep": [plain(row) for row in swept],
        "diverged": np.stack([bad.n, bad.trial, bad.diverged_at], axis=1),  # n, trial and update of each that did
    }
    return run.finish(plain(metrics))


def summary(networks: Networks) -> dict:
    """Mean, deviation, median and largest over the networks of one size that did not diverge, and the verdict."""
    fine = networks[networks.diverged_at == 0]
    row = {"n": int(networks.n[0]), "diverged": len(networks) - len(fine)}
    delta_in, delta_out = deltas(fine.values)
    for name, values in (("train_mse", fine.train_mse), ("delta_in", delta_in), ("delta_out", delta_out)):
        mean, std = mean_std(values) if len(fine) else (np.nan, np.nan)
        row |= {name: mean, f"{name}_std": std}
        row |= {f"median_{name}": float(np.median(values)) if len(fine) else np.nan}
        row |= {f"largest_{name}": float(values.max()) if len(fine) else np.nan}
    return {**row, "verdict": verdict(row)}


def verdict(row: dict) -> str:
    """What the numbers of one size say."""
    if np.isnan(row["train_mse"]):
        return "diverged"
    lost = f"; {row['diverged']} diverged" if row["diverged"] else ""
    if row["largest_train_mse"] > FITS:
        guess = " and is no better on them than their mean would be" if row["train_mse"] > 0.4 else ""
        return "does not meet its points" + guess + lost
    if row["median_delta_in"] > KNOWS:
        return "meets its points, misses the function between them" + lost
    beyond = "misses it beyond" if row["median_delta_out"] > ROUGHLY else "and roughly beyond"
    return f"knows the function on [0, 1], {beyond}" + lost


def draw_examples(found: Networks, args, recipe: Recipe):
    """Points, target and all fits of two sizes: a small one and the largest."""
    sizes = found.sizes()
    chosen = sorted({sizes[len(sizes) // 3], sizes[-1]})
    figure, axes = new_figure(len(chosen), 1, width=10, height=3.2 * len(chosen), sharex=True)
    inside = GRID <= 1
    for ax, n in zip(axes[:, 0], chosen, strict=True):
        own = found.of_size(n)
        ax.plot(GRID[inside], target(GRID[inside]), color="black", linewidth=1.2, label="target sin(10πx⁴)")
        for trial, values in zip(own.trial, own.values, strict=True):
            ax.plot(
                GRID[inside], values[inside], linewidth=0.9, alpha=0.8, **line_style(int(trial)), label=f"trial {trial}"
            )
        _, x = points_of(n, int(own.trial[0]), args.seed)
        ax.plot(x, target(x), "o", markersize=3.5, color=COLORS[0], label=f"points of trial {own.trial[0]}")
        delta = np.median(deltas(own.values)[0])
        ax.set(ylim=(-FAR, FAR), ylabel="y", title=f"n = {n}: median δ_in = {delta:.2g}")
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    axes[-1, 0].set_xlabel("x")
    figure.suptitle(f"Points, target and fits ({recipe})", fontsize=10)
    return figure


def draw_deltas(found: Networks, rows: list[dict], recipe: Recipe):
    """Train MSE, δ_in and δ_out against n, mean ± std over the trials, on logarithmic axes."""
    figure, axes = new_figure(1, 2, width=11, height=4.6)
    sizes = [row["n"] for row in rows]
    delta_in, delta_out = deltas(found.values)
    table = {"δ_in, on [0, 1]": delta_in, "δ_out, on [0, 1.5]": delta_out, "train MSE": found.train_mse}
    for index, (name, values) in enumerate(table.items()):
        per_trial = np.array([values[found.n == n] for n in sizes]).T  # (T, sizes)
        mean_band(axes[0, int(index == 2)], sizes, per_trial, label=f"{name}: mean ± std", index=index)
    left, right = axes[0]
    left.plot(sizes, [row["median_delta_in"] for row in rows], color=COLORS[0], linewidth=0.8, label="δ_in: median")
    left.set(xscale="log", yscale="log", xlabel="n, points on [0, 1]", ylabel="largest error")
    right.axhline(1 / 3, color="black", linestyle=":", linewidth=1, label="variance of the target on [0, 1]: 0.33")
    right.axhline(FITS, color="#777777", linestyle="--", linewidth=1, label=f"interpolates: {FITS:g}")
    right.set(xscale="log", yscale="log", xlabel="n, points on [0, 1]", ylabel="mean squared error on the points")
    for ax in axes.flat:
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    meets = sum(row["largest_train_mse"] <= FITS and not row["diverged"] for row in rows)
    last = f"at n = {sizes[-1]} the median δ_in is {rows[-1]['median_delta_in']:.2g}, δ_out"
    said = f"all networks meet their points at {meets} of {len(rows)} sizes; {last} {rows[-1]['median_delta_out']:.2g}"
    figure.suptitle(f"{said}\n({recipe})", fontsize=10)
    return figure


def draw_fits(found: Networks, recipe: Recipe):
    """What the networks of six sizes learned, with the range beyond their points shaded."""
    sizes = found.sizes()
    chosen = sorted({sizes[round(i)] for i in np.linspace(0, len(sizes) - 1, 6)})
    first, last = (tuple(float(np.median(d)) for d in deltas(found.of_size(n).values)) for n in (sizes[0], sizes[-1]))
    columns = min(3, len(chosen))
    figure, axes = new_figure(-(-len(chosen) // columns), columns, width=12, height=5.6, sharex=True, sharey=True)
    for ax in axes.flat[len(chosen) :]:
        ax.axis("off")
    for ax, n in zip(axes.flat, chosen, strict=False):
        own = found.of_size(n)
        ax.axvspan(1, GRID[-1], color="#EEEEEE", label="beyond the points")
        ax.plot(GRID, target(GRID), color="black", linewidth=0.7, label="target")
        middle, low, high = np.median(own.values, 0), own.values.min(0), own.values.max(0)
        ax.fill_between(GRID, low, high, color=COLORS[0], alpha=0.25, linewidth=0, label="range of the trials")
        ax.plot(GRID, middle, color=COLORS[0], linewidth=1.1, label="median of the trials")
        delta_in, delta_out = (np.median(values) for values in deltas(own.values))
        ax.set(ylim=(-2.5, 2.5), title=f"n = {n}: δ_in {delta_in:.2g}, δ_out {delta_out:.2g}")
    for ax in axes[-1]:
        ax.set_xlabel("x")
    for ax in axes[:, 0]:
        ax.set_ylabel("y")
    axes.flat[0].legend(loc="upper left", fontsize=7)
    figure.suptitle(
        f"From n = {sizes[0]:,} to {sizes[-1]:,} the median δ_in goes from {first[0]:.2g} to {last[0]:.2g}, "
        f"δ_out from {first[1]:.2g} to {last[1]:.2g}\n({recipe})",
        fontsize=10,
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
