"""The reference's networks hardly ever interpolate: what does it take?

    python nl_regression/what_it_takes.py
    python nl_regression/what_it_takes.py --sizes 256 --trials 5 --epochs 500
    python nl_regression/what_it_takes.py --scale 30

From the reference's configuration (a student project's: raw input, SGD with momentum, a constant rate) to the
interpolating recipe, change by change; every rung says what it changes and in which rung (those with Adam and the one
with 8 times the epochs take a learning rate of their own too). Two of them change the first layer at initialisation:

    h_1 = max(0, s w x + b)             the network of the input s·x: same function class, steeper at the start
    h_1 = max(0, s w (x − c))           and its kinks at c, drawn from [0, 1], where the points are

A network of weights w, b ~ U(−1, 1) has its kinks at x = −b/w: half of them beyond ±1, half of the others below 0. The
factor s alone moves them to −b/(s w), towards 0. The reference's own budget is the rung with 4 times the epochs.

Writes what_it_takes.png, history.csv, metrics.json.
Shapes: T trials, d = width.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator

from nl_regression.model import EnsembleMLP
from nl_regression.recipes import RECIPES, Recipe
from nl_regression.results import FITS
from nl_regression.target import deltas
from shared_utils.cli import at_least, make_parser, positive_float, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything

VARIANCE = 1 / 3  # of the target on [0, 1], rounded: 0.33


@dataclass(frozen=True)
class ScaledRecipe(Recipe):
    """A recipe that may start from another first layer: inputs times `scale`, kinks spread over [0, 1]."""

    scale: float = 1.0
    spread_kinks: bool = False

    def model(self, rngs: Sequence[np.random.Generator]) -> EnsembleMLP:
        """The networks as they start, one for each generator; without changes those of `Recipe`."""
        model = super().model(rngs)
        with torch.no_grad():
            model.weights[0].mul_(self.scale)  # (M, 1, d) with raw input
            if self.spread_kinks:
                kinks = torch.from_numpy(np.stack([rng.uniform(0, 1, (1, self.width)) for rng in rngs]))  # (M, 1, d)
                model.biases[0].copy_(-model.weights[0] * kinks)
        return model


@dataclass(frozen=True)
class Rung:
    """One step of the ladder: `recipe` is that of the rung `of` with `change` applied."""

    name: str
    of: str | None
    change: dict
    recipe: ScaledRecipe


def ladder(epochs: int, scale: float, width: int) -> list[Rung]:
    """The rungs, in order.

    epochs: of every rung but those that name another number, and the last, which has the recipe's own (at most four
    times as many). The rung with 8 times the epochs is the best found for raw input, on other trials than these.
    """
    best = RECIPES["interpolating"]
    inputs = {key: best[key] for key in ("features", "sigma")}
    rungs = {
        "reference": Rung(
            "reference", None, {}, ScaledRecipe(**{**RECIPES["reference"], "epochs": epochs}, width=width)
        )
    }

    def add(name: str, of: str, **change) -> None:
        rungs[name] = Rung(name, of, change, replace(rungs[of].recipe, **change))

    add("4 × the epochs", "reference", epochs=4 * epochs)
    add("learning rate 0.1", "reference", lr=0.1)
    add("Adam", "reference", optimizer="adam", lr=1e-3)
    add("Adam, cosine", "Adam", schedule="cosine")
    add(f"input × {scale:g}", "Adam, cosine", scale=scale)
    kinks = f"input × {scale:g}, kinks in [0, 1]"
    add(kinks, f"input × {scale:g}", spread_kinks=True)
    add(f"{kinks}, β₂ = 0.99, 8 × the epochs", kinks, lr=3e-3, beta2=0.99, epochs=8 * epochs)
    add("Fourier features", "reference", **inputs)
    rest = {key: value for key, value in best.items() if key not in inputs}
    rest["epochs"] = min(best["epochs"], 4 * epochs)
    add("Fourier features, Adam, cosine", "Fourier features", **rest)
    return list(rungs.values())


def build_parser():
    """The command line."""
    quick = {"sizes": [10, 20, 40], "trials": 2, "epochs": 5, "width": 32}
    parser = make_parser(__doc__, dataset=None, quick=quick)
    parser.add_argument("--sizes", type=at_least(2), nargs="+", default=[32, 256, 1000], help="points, 2 or more")
    parser.add_argument("--trials", type=positive_int, default=2, help="networks of each size and rung")
    parser.add_argument(
        "--epochs",
        type=positive_int,
        default=125,
        help="of 16 updates; two rungs have 4 and 8 times as many",
    )
    parser.add_argument("--width", type=positive_int, default=256, help="units of a hidden layer")
    parser.add_argument("--scale", type=positive_float, default=10.0, help="what the input is multiplied by")
    return parser


def main(argv=None) -> dict:
    """Train every rung at every size, draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    sizes = sorted(set(args.sizes))
    device = pick_device(args.device)
    run = start_run(args)
    seed_everything(args.seed)
    rungs = ladder(args.epochs, args.scale, args.width)
    rows = []
    for rung in rungs:
        of_sizes = []
        for n in sizes:
            of_sizes.append({"n": n, **measure(rung.recipe, n, args, device)})
            shown = {key: value for key, value in of_sizes[-1].items() if not isinstance(value, list)}
            run.log(rung=rung.name, epochs=rung.recipe.epochs, **shown)
        meets = all(row["diverged"] == 0 and max(row["train_mse"]) <= FITS for row in of_sizes)
        about = {"rung": rung.name, "of": rung.of, "change": rung.change, "epochs": rung.recipe.epochs}
        rows.append({**about, "all_interpolate": meets, "sizes": of_sizes})
    first = next((row["rung"] for row in rows if row["all_interpolate"]), None)
    save_figure(draw(rows, sizes, first, args), run.path("what_it_takes.png"))
    return run.finish(
        {
            "rungs": len(rungs),
            "first_that_interpolates": first,
            "trials": args.trials,
            "reference_largest_n": sizes[-1],
            "last_train_mse": rows[-1]["sizes"][-1]["median_train_mse"],
            "smallest_raw_train_mse": smallest_raw(rows),
            "ladder": rows,
        }
    )


def measure(recipe: Recipe, n: int, args, device) -> dict:
    """Train the trials of one size; each one's train MSE and δ_in, and their medians, without those that diverged."""
    begin = time.perf_counter()
    _, found = recipe.train([n] * args.trials, range(args.trials), args.seed, device)
    seconds = time.perf_counter() - begin
    fine = found.diverged_at == 0
    row = {"diverged": int((~fine).sum()), "seconds": seconds}
    for name, values in (("train_mse", found.train_mse[fine]), ("delta_in", deltas(found.values[fine])[0])):
        row[f"median_{name}"] = float(np.median(values)) if len(values) else None
        row[name] = values.tolist()
    return row


def smallest_raw(rows: list[dict]) -> float | None:
    """The smallest median train MSE at the largest size of the rungs without Fourier features."""
    found = [row["sizes"][-1]["median_train_mse"] for row in rows if "Fourier" not in row["rung"]]
    return min((mse for mse in found if mse is not None), default=None)


def draw(rows: list[dict], sizes: list[int], first: str | None, args):
    """Train MSE above, δ_in below; a column for each size, a line for each rung, a dot for each trial."""
    figure, axes = new_figure(2, len(sizes), width=4.0 + 3.2 * len(sizes), height=8.4, sharey=True, sharex="row")
    for column, n in enumerate(sizes):
        for ax, key in zip(axes[:, column], ("train_mse", "delta_in"), strict=True):
            ax.set(xscale="log", title=f"n = {n}", ylim=(len(rows) - 0.5, -0.5))
            for at, row in enumerate(rows):
                found = row["sizes"][column]
                ax.plot(found[key], [at] * len(found[key]), "o", color=COLORS[0], markersize=6, alpha=0.7)
                if found["diverged"]:
                    ax.text(
                        0.98,
                        at,
                        f"{found['diverged']} diverged",
                        transform=ax.get_yaxis_transform(),
                        ha="right",
                        fontsize=8,
                    )
        top, bottom = axes[:, column]
        top.axvline(VARIANCE, color="black", linestyle=":", linewidth=1.2, label="variance of the target: 0.33")
        top.axvline(FITS, color=COLORS[1], linestyle="--", linewidth=1.2, label=f"interpolates: {FITS:g}")
        top.set_xlabel("mean squared error on the points")
        bottom.set_xlabel("δ_in, largest error on [0, 1]")
    axes[1, 0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1, 0].xaxis.set_major_formatter("{x:g}")
    axes[1, 0].xaxis.set_minor_locator(NullLocator())
    axes[1, 0].set_xlim(left=min(0.9, axes[1, 0].get_xlim()[0]), right=max(2.2, axes[1, 0].get_xlim()[1]))
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(rows)), [f"{row['rung']}  ({row['epochs']} epochs)" for row in rows], fontsize=8.5)
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    count = args.trials * len(sizes)
    if first is None:
        lead = f"No change brings all {count} networks below a train MSE of {FITS:g}"
    else:
        lead = f"First to bring all {count} networks below a train MSE of {FITS:g}: {first}"
    raw, mse = smallest_raw(rows), rows[-1]["sizes"][-1]["median_train_mse"]
    numbers = [
        f"{name} {value:.1e}" for name, value in (("best raw input", raw), ("last rung", mse)) if value is not None
    ]
    figure.suptitle(f"{lead}\nmedian train MSE at n = {sizes[-1]}: {', '.join(numbers) or 'none'}", fontsize=11)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
