"""How many latents does a VAE of these images need, and what becomes of those that it does not need?

    python vae/latent_study.py
    python vae/latent_study.py --z-dims 8 16 32 64 --hidden 256 --out runs/vae/latent_study_wide

Models of 1 to 32 latents are trained with the same loss for as many epochs, and measured on the test images by the ELBO
and by the tighter bound of k samples (IWAE). A latent that does not help costs nothing if its posterior is the prior:
its KL is then 0, and it is not active (its posterior mean does not vary over images). A size too large need not hurt.

Writes latent_study.png, history.csv, metrics.json.
Source: Burda, Grosse and Salakhutdinov 2016, for the bound and the active latents.
Shapes: N images, 196 pixels, d latents; all terms in nats per image.
"""

import numpy as np
import torch

from shared_utils.cli import add_seeds, make_parser, positive_int, run_main
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import mean_band, new_figure, save_figure
from shared_utils.runs import start_run
from vae.fitting import add_fit_flags, fit, measure, new_model, summary
from vae.inputs import add_data_flags, load_binary
from vae.model import VAE


def build_parser():
    """The command line."""
    small = {"epochs": 10, "per_class": 100, "val_size": 100, "batch_size": 50}
    parser = make_parser(__doc__, quick={**small, "z_dims": [1, 2, 8], "seeds": [0, 1], "k": 20})
    add_data_flags(parser)
    parser.add_argument("--z-dims", type=positive_int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="latents")
    add_seeds(parser, [0, 1, 2], "one model each per size")
    parser.add_argument("--k", type=positive_int, default=200, help="samples of the tighter bound")
    add_fit_flags(parser, epochs=80)
    return parser


@torch.no_grad()
def mean_iwae(model: VAE, x: torch.Tensor, k: int) -> float:
    """The bound of k samples as a mean over the images x (N, D), 100 of them at a time."""
    return torch.cat([model.iwae_bound(part, k) for part in x.split(100)]).cpu().double().mean().item()


@cpu_threads(1)
def main(argv=None) -> dict:
    """Train a model for every size and seed, measure all alike; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load_binary(args)
    run = start_run(args)
    x_train, x_val, x_test = (torch.from_numpy(x).to(device) for x in (data.x_train, data.x_val, data.x_test))
    sizes, seeds = sorted(set(args.z_dims)), args.seeds
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "samples": args.samples}
    found, training_seconds = {}, 0.0
    for size in sizes:
        found[size] = []
        for seed in seeds:
            model, rng = new_model([args.seed, seed], x_train.shape[1], args.hidden, size, device)
            seconds = fit(model, x_train, lambda r, kl: (kl - r).mean(), rng=rng, **settings)
            bounds = {"iwae": mean_iwae(model, x_test, args.k), "val_iwae": mean_iwae(model, x_val, args.k)}
            found[size].append({**measure(model, x_test), **bounds})
            run.log(z_dim=size, seed=seed, **found[size][-1], training_seconds=seconds)
            training_seconds += seconds
    table = {size: summary(rows) for size, rows in found.items()}
    outcome = findings(found, table)
    about = f"{data.title}, {args.hidden} hidden units, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    save_figure(draw(found, outcome, args.k, about), run.path("latent_study.png"))
    rows = [{"z_dim": size, **row} for size, row in table.items()]
    metrics = {"k": args.k, "seeds": seeds, "sizes": rows, "training_seconds": training_seconds}
    return run.finish({**outcome, **metrics})


def findings(found: dict[int, list[dict]], table: dict[int, dict]) -> dict:
    """The size of the highest bound on validation images, the smallest as good, the first with unused latents.

    found: sizes in rising order → the measured values of each seed. "As good": below the best by no more than the
    larger of the two sizes' standard deviations over seeds. None: every size uses all its latents.
    """
    best = max(table, key=lambda size: table[size]["val_iwae"])
    enough = next(
        size
        for size, row in table.items()
        if table[best]["val_iwae"] - row["val_iwae"] <= max(row["val_iwae_std"], table[best]["val_iwae_std"])
    )
    unused = [size for size, rows in found.items() if any(row["active_units"] < size for row in rows)]
    return {
        "best_size": best,
        "best_iwae": table[best]["iwae"],
        "enough": enough,
        "first_size_with_an_unused_latent": min(unused, default=None),
        "largest_size": max(table),
        "active_units_of_the_largest_size": table[max(table)]["active_units"],
    }


def draw(found: dict, outcome: dict, k: int, about: str):
    """Bounds, terms and active latents against the number of latents, mean ± std over seeds."""
    figure, axes = new_figure(1, 3, width=14, height=4.8)
    sizes = list(found)

    def against_size(ax, key: str, label: str, index: int, sign: int = 1):
        values = sign * np.array([[row[key] for row in rows] for rows in found.values()]).T  # (seeds, sizes)
        mean_band(ax, sizes, values, label=label, index=index)

    bounds, terms, active = axes[0]
    against_size(bounds, "iwae", f"IWAE, k = {k}", 0)
    against_size(bounds, "elbo", "ELBO", 1)
    bounds.set(title="bounds on log p(x), test images", ylabel="nats per image")
    against_size(terms, "reconstruction", "−reconstruction", 2, sign=-1)
    against_size(terms, "kl", "KL", 3)
    terms.set(title="the two terms of the ELBO", ylabel="nats per image")
    active.plot(sizes, sizes, color="#999999", linewidth=1, label="all of them")
    against_size(active, "active_units", "active", 0)
    active.set(title="active latents", ylabel="latents", yscale="log")
    active.set_yticks(sizes, [f"{size}" for size in sizes])
    for ax in axes[0]:
        ax.set(xscale="log", xlabel="latents of the model")
        ax.set_xticks(sizes, [f"{size}" for size in sizes])
        ax.minorticks_off()
        ax.legend()
    if outcome["enough"] == outcome["best_size"]:
        said = f"the bound is highest with {outcome['best_size']} latents ({outcome['best_iwae']:.2f} nats)"
    else:
        said = f"{outcome['enough']} latents are as good as {outcome['best_size']} ({outcome['best_iwae']:.2f} nats)"
    used = f"of {outcome['largest_size']} latents {outcome['active_units_of_the_largest_size']:.3g} are active"
    figure.suptitle(f"{about}\n{said}; {used}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
