"""What does a weight β on the KL do to a VAE, and from which β does the posterior collapse?

    python vae/beta_study.py
    python vae/beta_study.py --betas 5 6 7 8 9 10 --out runs/vae/beta_study_collapse

Each model minimises

    loss = β · R + D,    rate R = KL(q(z|x) ‖ p(z)),    distortion D = −E_q [log p(x|z)]

and is evaluated by the bound itself, ELBO = −(R + D), which is β = 1. R says how many nats about the image the latents
carry at most, D how many nats the image still costs when they are known. On the curve of the best attainable (R, D),
dD/dR = −β: a nat of rate is spent where it saves β nats of distortion or more. A small β buys detail, but with latents
that the prior rarely draws: good reconstructions, poor samples. At a large β nothing is worth its price: the posterior
of one latent after another is the prior for every image (inactive), until the decoder draws the mean image: collapse.

Writes beta_study.png, rate_distortion.png, samples_by_beta.png, history.csv, metrics.json.
Sources: Higgins et al. 2017 for β; Alemi et al. 2018 for rate and distortion; Burda et al. 2016 for active latents.
Shapes: N images, 196 pixels, d latents; all terms in nats per image.
"""

import numpy as np
import torch

from shared_utils.cli import add_seeds, make_parser, positive_float, positive_int, run_main
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, mean_band, new_figure, save_figure
from shared_utils.runs import start_run
from vae.fitting import (
    add_fit_flags,
    draw_pictures,
    fit,
    measure,
    model_pictures,
    new_model,
    shown_images,
    summary,
)
from vae.inputs import add_data_flags, load_binary


def build_parser():
    """The command line."""
    small = {"epochs": 10, "per_class": 100, "val_size": 100, "batch_size": 50}
    parser = make_parser(__doc__, quick={**small, "betas": [0.1, 1, 10], "seeds": [0, 1]})
    add_data_flags(parser)
    betas = [0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 7, 10]
    parser.add_argument("--betas", type=positive_float, nargs="+", default=betas, help="weights of the KL")
    add_seeds(parser, [0, 1, 2], "one model each per β")
    parser.add_argument("--z-dim", type=positive_int, default=8, help="latents")
    add_fit_flags(parser, epochs=60)
    return parser


@cpu_threads(1)
def main(argv=None) -> dict:
    """Train a model for every β and seed, measure all alike; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load_binary(args)
    run = start_run(args)
    x_train, x_val, x_test = (torch.from_numpy(x).to(device) for x in (data.x_train, data.x_val, data.x_test))
    betas, seeds = sorted(set(args.betas)), args.seeds
    to_reconstruct, first_row = shown_images(x_test, data.y_test)
    found, shown, training_seconds = {}, [first_row], 0.0
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "samples": args.samples}
    for beta in betas:
        found[beta] = []
        for seed in seeds:
            model, rng = new_model([args.seed, seed], x_train.shape[1], args.hidden, args.z_dim, device)
            seconds = fit(model, x_train, lambda r, kl, beta=beta: (beta * kl - r).mean(), rng=rng, **settings)
            found[beta].append({**measure(model, x_test), "val_elbo": measure(model, x_val)["elbo"]})
            run.log(beta=beta, seed=seed, **found[beta][-1], training_seconds=seconds)
            training_seconds += seconds
            if seed == seeds[0]:
                shown.append(model_pictures(model, to_reconstruct, args.seed))
    table = {beta: summary(rows) for beta, rows in found.items()}
    outcome = findings(found, table, args.z_dim)
    about = f"{data.title}, {args.z_dim} latents, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    save_figure(draw_curves(found, outcome, args.z_dim, about), run.path("beta_study.png"))
    save_figure(draw_plane(table, outcome, about), run.path("rate_distortion.png"))
    save_figure(
        draw_samples(found, shown, outcome, f"{data.title}, {args.z_dim} latents, seed {seeds[0]}"),
        run.path("samples_by_beta.png"),
    )
    rows = [{"beta": beta, **row} for beta, row in table.items()]
    return run.finish({**outcome, "seeds": seeds, "betas": rows, "training_seconds": training_seconds})


def findings(found: dict[float, list[dict]], table: dict[float, dict], z_dim: int) -> dict:
    """The β of the highest validation bound, the first that leaves a latent unused, the first from which all are.

    found: β in rising order → the measured terms of each seed. None stands for "at no β here".
    """
    best = max(table, key=lambda beta: table[beta]["val_elbo"])
    unused = [beta for beta, rows in found.items() if any(row["active_units"] < z_dim for row in rows)]
    alive = [beta for beta, rows in found.items() if any(row["active_units"] for row in rows)]
    collapsed = [beta for beta in found if not alive or beta > max(alive)]
    last = max(found)
    return {
        "best_beta": best,
        "best_elbo": table[best]["elbo"],
        "first_beta_with_an_unused_latent": min(unused, default=None),
        "collapsed_from_beta": min(collapsed, default=None),
        "largest_beta": last,
        "active_units_at_the_largest_beta": table[last]["active_units"],
    }


def ending(outcome: dict) -> str:
    """How the posterior ends, in words."""
    if outcome["collapsed_from_beta"] is not None:
        above = " and above" if outcome["largest_beta"] > outcome["collapsed_from_beta"] else ""
        return f"no latent is active at β = {outcome['collapsed_from_beta']:g}{above}"
    return f"at β = {outcome['largest_beta']:g} {outcome['active_units_at_the_largest_beta']:.3g} latents are active"


def draw_curves(found: dict, outcome: dict, z_dim: int, about: str):
    """Distortion, rate, bound and active latents against β, mean ± std over seeds."""
    figure, axes = new_figure(2, 2, width=10, height=7, sharex=True)
    betas = list(found)
    panels = {
        "distortion, −reconstruction": ("reconstruction", -1),
        "rate, KL": ("kl", 1),
        "ELBO = −(rate + distortion)": ("elbo", 1),
        f"active latents, of {z_dim}": ("active_units", 1),
    }
    for index, (ax, (name, (key, sign))) in enumerate(zip(axes.flat, panels.items(), strict=True)):
        values = sign * np.array([[row[key] for row in rows] for rows in found.values()]).T  # (seeds, betas)
        mean_band(ax, betas, values, label="mean ± std over seeds", index=index)
        ax.axvline(1, color="#999999", linewidth=1, linestyle=":")
        ax.set(title=name, ylabel="latents" if key == "active_units" else "nats per image", xscale="log")
        ax.set_xticks(betas, [f"{beta:g}" for beta in betas])
        ax.minorticks_off()
    axes[0, 0].legend(loc="upper left")
    for ax in axes[1]:
        ax.set_xlabel("β, the weight of the KL in training")
    axes[1, 1].set_ylim(-0.3, z_dim + 0.3)
    best = f"the bound is highest with β = {outcome['best_beta']:g} ({outcome['best_elbo']:.1f} nats)"
    figure.suptitle(f"{about}\n{best}; {ending(outcome)}")
    return figure


def draw_plane(table: dict, outcome: dict, about: str):
    """Distortion against rate, a point for the seeds' mean at each β, over lines of equal ELBO."""
    figure, axes = new_figure(width=8, height=6)
    ax = axes[0, 0]
    rate, distortion = [row["kl"] for row in table.values()], [-row["reconstruction"] for row in table.values()]
    ax.plot(rate, distortion, "o-", color=COLORS[0])
    for beta, x, y in zip(table, rate, distortion, strict=True):
        ax.annotate(f"β = {beta:g}", (x, y), (6, 4), textcoords="offset points", fontsize=9)
    ax.margins(0.12)
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    grid_x, grid_y = np.meshgrid(np.linspace(left, right, 50), np.linspace(bottom, top, 50))
    lines = ax.contour(grid_x, grid_y, -(grid_x + grid_y), levels=9, colors=COLORS[1], linewidths=0.8, linestyles=":")
    # Each line is labelled where it crosses the diagonal, which meets the curve only once.
    at = (-lines.levels - left - bottom) / (right + top - left - bottom)  # 0 … 1, from corner to corner
    where = [(left + t * (right - left), bottom + t * (top - bottom)) for t in at if 0.03 < t < 0.97]
    ax.clabel(lines, fmt="ELBO %g", fontsize=8, manual=where)
    ax.set(xlabel="rate R = KL (nats per image)", ylabel="distortion D = −reconstruction (nats per image)")
    ax.grid(False)
    best = f"R + D is least with β = {outcome['best_beta']:g}: {-outcome['best_elbo']:.1f} nats"
    figure.suptitle(f"{about}\n{best}")
    return figure


def draw_samples(found: dict, shown: list[np.ndarray], outcome: dict, about: str):
    """A row of samples and reconstructions for each β (the first seed's), under one of test images."""
    figure, axes = new_figure(width=10.5, height=0.54 * len(shown) + 0.9)
    ax = axes[0, 0]
    at = draw_pictures(ax, shown)
    labels = ["", *(f"β = {beta:g}, ELBO {rows[0]['elbo']:.1f}" for beta, rows in found.items())]
    for height, label in zip(at, labels, strict=True):
        ax.text(-4, height, label, ha="right", va="center", fontsize=9)
    figure.suptitle(f"{about}: what the decoder draws\n{ending(outcome)}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
