"""Is the network better than the data allow, and does an ensemble of networks know where its data end?

    python nl_regression/coverage_study.py
    python nl_regression/coverage_study.py --n 400 --members 5

The phase of the target is θ(x) = 10πx⁴. Across a gap from a to b between neighbouring points it advances by
g = (θ(b) − θ(a)) / π half-periods (the gaps from 0 to the first point and from the last to 1 count too). Where g ≥ 1,
a half-period of +sin or of −sin fits into the gap, and neither oscillates there faster than the target does. Where the
gap's ends are the sine's zeros, the two agree on all points and differ by 2 between them: no method can guarantee an
error below 1. That is the worst case: ends on a crest leave less open, a method that suits this target may do better.

Compared with the networks of sweep.py, on the same points: a cubic spline; a Gaussian process with an RBF kernel, its
length scale and variance chosen by marginal likelihood; and the function of least norm ‖w‖ among all f(x) = φ(x)ᵀw
on 1,000 random Fourier features φ (of the networks' σ) that meet the points. Then `--members` networks with weights and
features of their own learn from the same n points, by the sweep's recipe: they should disagree where they are wrong.

Writes coverage.png, extrapolation.png, coverage.csv, history.csv, metrics.json. Sources: Rahimi and Recht 2007 (random
Fourier features); Rasmussen and Williams 2006, section 5.4.1; Lakshminarayanan et al. 2017 (deep ensembles).
Shapes: M networks, T trials, S sizes, n points, G grid points, F frequencies, L length scales.
"""

import argparse

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.linalg import LinAlgError, cho_solve, cholesky
from sklearn.metrics import roc_auc_score

from nl_regression.fitting import Fit, fit
from nl_regression.recipes import HOW, Recipe, points_of
from nl_regression.results import KNOWS, Networks, rows_of
from nl_regression.target import GRID, IN_POINTS, deltas, target
from shared_utils.cli import UserError, at_least, make_parser, run_main
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import find_output, read_json, start_run, write_csv
from shared_utils.seeding import seed_everything

FREQUENCIES = 1000  # of the least-norm solution
LENGTHS = np.geomspace(0.003, 1, 30)  # of the Gaussian process, candidates (L,)
JITTER = 1e-8  # on its diagonal, as a share of the variance: the kernel of close points is singular in float64
METHODS = ("network", "cubic spline", "Gaussian process", "least norm")


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"n": 60, "members": 3})
    parser.add_argument("--n", type=at_least(2), default=200, help="points of the ensemble's networks, 2 or more")
    parser.add_argument("--members", type=at_least(2), default=10, help="networks of the ensemble, 2 or more")
    return parser


def largest_gap(x: np.ndarray) -> float:
    """The most half-periods that the target advances between neighbouring points x (n,) of [0, 1], edges included."""
    edges = np.concatenate([[0], np.sort(x), [1]])  # (n + 2,)
    return float(np.diff(10 * edges**4).max())


def spline(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The cubic spline (not-a-knot) through the points x, y (n,), n ≥ 2, at `at` (G,)."""
    order = np.argsort(x)
    return CubicSpline(x[order], y[order])(at)


def rbf(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    """exp(−(a − b)² / 2·length²), (n, m)."""
    return np.exp(-0.5 * ((a[:, None] - b) / length) ** 2)


def gaussian_process(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, float]:
    """Posterior mean at `at` (G,) given y at x (n,), and the length scale of the largest marginal likelihood.

    With the variance at its best value s² = yᵀK⁻¹y / n, twice the negative logarithm of the likelihood is
    n·log s² + log det K up to a constant.
    """
    best, found = np.inf, None
    for length in LENGTHS:
        try:
            chol = cholesky(rbf(x, x, length) + JITTER * np.eye(len(x)), lower=True)
        except LinAlgError:  # too smooth for these points: not positive definite in float64
            continue
        alpha = cho_solve((chol, True), y)  # (n,)
        loss = len(x) * np.log(max(y @ alpha / len(x), 1e-300)) + 2 * np.log(np.diag(chol)).sum()
        if loss < best:
            best, found = loss, (alpha, length)
    alpha, length = found
    return rbf(at, x, length) @ alpha, float(length)


def fourier(x: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """cos(2πbx), sin(2πbx) at the frequencies b (F,), scaled to rows of length 1: (n, 2F)."""
    phase = 2 * np.pi * np.outer(x, frequencies)  # (n, F)
    return np.concatenate([np.cos(phase), np.sin(phase)], axis=1) / np.sqrt(len(frequencies))


def least_norm(x: np.ndarray, y: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """The weights w (2F,) of least norm with φ(x)ᵀw = y at the points (n,)."""
    return np.linalg.lstsq(fourier(x, frequencies), y, rcond=None)[0]


@cpu_threads(1)
def train_ensemble(recipe: Recipe, x: np.ndarray, members: int, seed: int, device) -> Fit:
    """`members` networks on the same points x (n,), each with features, weights and batches of its own."""
    rngs = [np.random.default_rng([seed, len(x), member, 1]) for member in range(members)]  # 4 numbers: no sweep's own
    return fit(recipe.model(rngs).to(device), [x] * members, rngs, **{key: getattr(recipe, key) for key in HOW})


def band_metrics(mean: np.ndarray, std: np.ndarray) -> dict:
    """Does the band mean ± 2 std (G,) hold the target, and does std tell x > 1 from x ≤ 1?"""
    outside = GRID > 1
    error, metrics = np.abs(mean - target(GRID)), {}
    for name, part in (("inside", ~outside), ("outside", outside)):
        metrics[f"in_band_{name}"] = float((error[part] <= 2 * std[part]).mean())
        metrics[f"mean_std_{name}"] = float(std[part].mean())
        metrics[f"largest_error_{name}"] = float(error[part].max())
        metrics[f"mean_error_{name}"] = float(error[part].mean())
    return {**metrics, "auroc_of_std": float(roc_auc_score(outside, std))}


def from_which(sizes: list[int], values: np.ndarray, bound: float) -> int | None:
    """The first size from which on all values (S,) are below `bound`; None where the last is not."""
    first = len(sizes)
    while first and values[first - 1] < bound:
        first -= 1
    return int(sizes[first]) if first < len(sizes) else None


def measure(
    networks: Networks, frequencies: np.ndarray, seed: int
) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """On each network's points, of the sweep's `seed`: what every method makes of them.

    Returns the largest gap in half-periods (M,), method → δ_in (M,), and how far the least-norm function on the
    features of `frequencies` (F,) is off its points at most (M,).
    """
    grid = GRID[:IN_POINTS]
    truth, features_of_grid = target(grid), fourier(grid, frequencies)
    gaps, residuals, errors = [], [], {name: [] for name in METHODS[1:]}
    for n, trial in zip(networks.n, networks.trial, strict=True):
        _, x = points_of(n, trial, seed)
        y = target(x)
        w = least_norm(x, y, frequencies)
        fits = {
            "cubic spline": spline(x, y, grid),
            "Gaussian process": gaussian_process(x, y, grid)[0],
            "least norm": features_of_grid @ w,
        }
        gaps.append(largest_gap(x))
        residuals.append(np.abs(fourier(x, frequencies) @ w - y).max())
        for name, values in fits.items():
            errors[name].append(np.abs(values - truth).max())
    errors = {"network": deltas(networks.values)[0]} | {name: np.array(own) for name, own in errors.items()}
    return np.array(gaps), errors, np.array(residuals)


def keyed(table: dict) -> dict:
    """With the methods' names as metrics.json and history.csv have them."""
    return {name.replace(" ", "_"): value for name, value in table.items()}


def counts(gaps: np.ndarray, errors: dict[str, np.ndarray]) -> dict:
    """On how many sets of points, with a gap of a half-period (M,) or without, each method's δ_in (M,) is how small."""
    wide = gaps >= 1

    def below(bound: float, where: np.ndarray) -> dict:
        return keyed({name: (own[where] < bound).sum() for name, own in errors.items()})

    no_worse = {name: (errors["network"] <= errors[name]).sum() for name in METHODS[1:]}
    return {
        "networks": len(gaps),
        "with_a_gap_of_a_half_period": int(wide.sum()),
        "of_these_delta_in_below_1": below(1, wide),
        "of_these_delta_in_below_a_tenth": below(KNOWS, wide),
        "of_the_others_delta_in_below_a_tenth": below(KNOWS, ~wide),
        "network_no_worse_than": keyed(no_worse),
    }


def ensemble(recipe: Recipe, x: np.ndarray, args, device) -> tuple[np.ndarray, dict]:
    """Train the ensemble on x (n,): the values (M, G) of the networks that did not diverge, and its metrics.

    Errors: `UserError` when fewer than two are left.
    """
    found = train_ensemble(recipe, x, args.members, args.seed, device)
    fine = found.diverged_at == 0
    values = found.values[fine]
    if len(values) < 2:
        raise UserError(f"all but {len(values)} of the ensemble's networks diverged at learning rate {recipe.lr:g}")
    return values, {
        "n": args.n,
        "members": len(values),
        "largest_gap": largest_gap(x),
        "median_delta_in_of_members": np.median(deltas(values)[0]),
        "median_train_mse_of_members": np.median(found.train_mse[fine]),
        **band_metrics(values.mean(0), values.std(0, ddof=1)),
    }


def main(argv=None) -> dict:
    """Measure all methods on the sweep's points, train the ensemble, draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    networks = Networks.load(find_output(args, "sweep", "last.npz"))
    flags = argparse.Namespace(**read_json(find_output(args, "sweep", "config.json"))["flags"])
    recipe = Recipe.of(flags)
    networks = networks[networks.diverged_at == 0]
    run = start_run(args)
    rng = seed_everything(args.seed)

    # The least-norm function is the network's features without its hidden layers; x alone has no such counterpart.
    frequencies = rng.normal(0, recipe.sigma, FREQUENCIES)  # (F,)
    gaps, errors, residuals = measure(networks, frequencies, flags.seed)
    # A line for each set of points: its largest gap in half-periods, δ_in of each method.
    table = rows_of({"n": networks.n, "trial": networks.trial, "gap": gaps, **errors})
    write_csv(run.path("coverage.csv"), table)

    sizes, rows = networks.sizes(), []
    medians = {name: np.array([np.median(v[networks.n == n]) for n in sizes]) for name, v in errors.items()}  # (S,)
    gap = np.array([np.median(gaps[networks.n == n]) for n in sizes])
    for index, n in enumerate(sizes):
        row = keyed({name: medians[name][index] for name in METHODS})
        run.log(n=n, gap=gap[index], **row)
        rows.append({"n": n, "median_gap": gap[index], **row})
    from_gap = from_which(sizes, gap, 1)
    from_n = {name: from_which(sizes, of_sizes, KNOWS) for name, of_sizes in medians.items()}

    _, x = points_of(args.n, 0, flags.seed)
    values, band = ensemble(recipe, x, args, device)
    save_figure(draw_coverage(networks.n, gaps, errors, medians, from_gap, from_n, recipe), run.path("coverage.png"))
    save_figure(draw_band(x, values, band, recipe), run.path("extrapolation.png"))
    return run.finish(
        {
            "recipe": str(recipe),
            "median_gap_below_a_half_period_from_n": from_gap,
            "median_delta_in_below_a_tenth_from_n": keyed(from_n),
            **counts(gaps, errors),
            "largest_residual_of_least_norm": residuals.max(),
            "sizes": rows,
            "ensemble": band,
        }
    )


def from_text(n: int | None) -> str:
    """`from n = 127 on`, or that no size is."""
    return "at no n" if n is None else f"from n = {n:,} on"


def draw_coverage(ns, gaps, errors, medians, from_gap, from_n, recipe: Recipe):
    """δ_in of all methods against n, medians and ranges, with the largest gap; and against that gap."""
    figure, axes = new_figure(1, 2, width=12.5, height=6.4, sharey=True)
    left, right = axes[0]
    sizes = np.unique(ns)
    for index, name in enumerate(METHODS):
        own, style = errors[name], line_style(index)
        low, high = (np.array([f(own[ns == n]) for n in sizes]) for f in (np.min, np.max))
        left.fill_between(sizes, low, high, color=style["color"], alpha=0.13, linewidth=0)
        left.plot(sizes, medians[name], label=f"{name}: δ_in", marker="o", markersize=3.5, **style)
        right.plot(gaps, own, linestyle="", marker="osD^"[index], markersize=4, alpha=0.7, color=style["color"])
        right.plot([], [], linestyle="", marker="osD^"[index], color=style["color"], label=name)
    gap = [np.median(gaps[ns == n]) for n in sizes]
    left.plot(sizes, gap, color="black", linewidth=1.2, label="largest gap, half-periods")
    for ax in (left, right):
        ax.axhline(KNOWS, color="#777777", linestyle=":", linewidth=1)
        ax.axhline(1, color="#777777", linestyle="--", linewidth=1)
    right.axvline(1, color="black", linewidth=1)
    right.fill_betweenx([1e-12, 1], 1, max(2, 2 * gaps.max()), color="#E4E4E4", label="beyond the points alone")
    lowest = min(own[own > 0].min() for own in errors.values())
    left.set(
        xscale="log", yscale="log", xlabel="n, points on [0, 1]", ylabel="largest error on [0, 1]; gap in half-periods"
    )
    left.set(title="medians and ranges over the trials", ylim=(lowest / 2, 3 * max(v.max() for v in errors.values())))
    right.set(xscale="log", xlabel="largest gap between points, half-periods of the target")
    right.set(xlim=(gaps.min() / 1.5, gaps.max() * 1.5), title="one mark a set of points")
    for ax in (left, right):
        ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=3)
    wide = gaps >= 1
    reached = ", ".join(f"{name} {from_text(from_n[name])}" for name in METHODS)
    lucky = ", ".join(f"{name} {(errors[name][wide] < 1).sum()}" for name in METHODS)
    figure.suptitle(
        f"The median largest gap is below a half-period {from_text(from_gap)}\nmedian δ_in is < {KNOWS}: {reached}\n"
        f"of {wide.sum()} sets of points with a gap of a half-period or more, δ_in is < 1 on: {lucky}\n"
        f"(networks: {recipe})",
        fontsize=10,
    )
    return figure


def draw_band(x: np.ndarray, fits: np.ndarray, band: dict, recipe: Recipe):
    """The ensemble's mean and band on [0, 1.5] with the target, and below it its std and its error."""
    mean, std = fits.mean(0), fits.std(0, ddof=1)
    figure, axes = new_figure(2, 1, width=11, height=6.4, sharex=True, height_ratios=[1.6, 1])
    top, bottom = axes[:, 0]
    top.plot(GRID, target(GRID), color="black", linewidth=0.8, label="target")
    top.fill_between(GRID, mean - 2 * std, mean + 2 * std, color=COLORS[0], alpha=0.25, linewidth=0, label="± 2 std")
    top.plot(GRID, mean, color=COLORS[0], linewidth=1.2, label=f"mean of {len(fits)} networks")
    top.plot(x, target(x), "o", markersize=2.5, color=COLORS[1], label=f"{len(x)} points")
    reach = np.abs(mean).max() + 2 * std.max()
    top.set(ylabel="y", ylim=(-min(reach, 5) - 0.1, min(reach, 5) + 0.1))
    bottom.plot(GRID, np.abs(mean - target(GRID)), label="|error| of the mean", linewidth=0.9, color=COLORS[1])
    bottom.plot(GRID, std, label="std of the networks", linewidth=1.3, color=COLORS[0])
    bottom.set(yscale="log", xlabel="x", ylabel="error, std", ylim=(1e-5, None))
    for ax in (top, bottom):
        ax.axvspan(1, GRID[-1], color="#EEEEEE", zorder=0, label="beyond the points" if ax is top else None)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.suptitle(
        f"std is {band['mean_std_inside']:.2g} on [0, 1], {band['mean_std_outside']:.2g} beyond: AUROC of telling them "
        f"apart {band['auroc_of_std']:.3f}\nthe band of ± 2 std holds the target on {band['in_band_outside']:.0%} of "
        f"(1, 1.5], on {band['in_band_inside']:.0%} of [0, 1] (n = {len(x)})\n({recipe})",
        fontsize=10,
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
