"""What happens to a VAE when its two terms are reduced wrongly: a mean for a sum, over pixels, latents or the batch?

    python vae/kl_scaling.py

With bce (B, D) = −log p(x_i|z) of each pixel and kl (B, d) of each latent, the bound asks for sums over D and d, as
the likelihood of an image is the product over its pixels; over the images of a batch it takes the mean. Any other
reduction weights the KL against the reconstruction, up to a common factor:

    loss = scale · mean over the batch of (β · KL − reconstruction)

`F.binary_cross_entropy_with_logits`, a mean by default, beside a summed KL means β = D: 196 times the KL. A model is
trained with each reduction from the same weights with the same batches and noise, then evaluated with the correct terms
on the test images. That the gradient is `scale` times that of β · KL − reconstruction is checked too, on one batch.
Adam divides the scale out (up to its ε); plain gradient descent would take steps `scale` times as long.

Writes kl_scaling.png, history.csv, metrics.json.
Sources: Kingma and Welling 2014; Higgins et al. 2017 for β.
Shapes: B batch, D pixels, d latents; all terms in nats per image.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.device import cpu_threads, pick_device
from shared_utils.gradcheck import relative_error
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from vae.fitting import (
    Loss,
    add_fit_flags,
    draw_pictures,
    fit,
    measure,
    model_pictures,
    new_model,
    shown_images,
)
from vae.inputs import add_data_flags, load_binary
from vae.model import VAE


@dataclass(frozen=True)
class Reduction:
    """A way to reduce the two terms: its name, its code, the loss, and the β and scale that it amounts to."""

    name: str
    code: str
    loss: Loss
    beta: float
    scale: float


def reductions(B: int, D: int, d: int) -> list[Reduction]:
    """The right one first, for batches of B images of D pixels and d latents.

    The losses take the terms of the bound, r = reconstruction (B,), summed over pixels, and kl (B,), summed over
    latents: bce.mean() is −r.mean() / D, and the code's kl.mean() is kl.mean() / d.
    """
    return [
        Reduction("right", "bce.sum(1).mean() + kl.sum(1).mean()", lambda r, kl: (kl - r).mean(), 1, 1),
        Reduction("all summed", "bce.sum() + kl.sum()", lambda r, kl: (kl - r).sum(), 1, B),
        Reduction(
            "KL without its ½", "bce.sum(1).mean() + 2 * kl.sum(1).mean()", lambda r, kl: (2 * kl - r).mean(), 2, 1
        ),
        Reduction("pixels: mean", "bce.mean() + kl.sum(1).mean()", lambda r, kl: (kl - r / D).mean(), D, 1 / D),
        Reduction("latents: mean", "bce.sum(1).mean() + kl.mean()", lambda r, kl: (kl / d - r).mean(), 1 / d, 1),
        Reduction("both: mean", "bce.mean() + kl.mean()", lambda r, kl: (kl / d - r / D).mean(), D / d, 1 / D),
        Reduction(
            "pixels: mean, KL over batch: sum",
            "bce.mean() + kl.sum()",
            lambda r, kl: kl.sum() - r.mean() / D,
            B * D,
            1 / D,
        ),
        Reduction(
            "latents: mean, bce over batch: sum",
            "bce.sum() + kl.mean()",
            lambda r, kl: kl.mean() / d - r.sum(),
            1 / (B * d),
            B,
        ),
    ]


def gradients(model: VAE, x: Tensor, loss: Loss) -> tuple[Tensor, ...]:
    """The gradient of `loss` on the images x (B, D) for each array of parameters; the same noise at every call."""
    torch.manual_seed(0)
    return torch.autograd.grad(loss(*model.elbo_terms(x)), list(model.parameters()))


def gradient_error(model: VAE, x: Tensor, reduction: Reduction) -> float:
    """Relative difference of the reduction's gradient on x (B, D) and `scale` times that of β · KL − reconstruction.

    The largest over the arrays of parameters, in float64: a wrong scale shows in the decoder, a wrong β in the encoder.
    """
    model, x = copy.deepcopy(model).cpu().double(), x.cpu().double()
    written = gradients(model, x, reduction.loss)
    weighted = gradients(model, x, lambda r, kl: reduction.scale * (reduction.beta * kl - r).mean())
    return max(relative_error(a.numpy(), n.numpy()) for a, n in zip(written, weighted, strict=True))


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, quick={"epochs": 6, "per_class": 100, "val_size": 100, "batch_size": 50})
    add_data_flags(parser)
    parser.add_argument("--z-dim", type=positive_int, default=8, help="latents")
    add_fit_flags(parser, epochs=120)
    return parser


@cpu_threads(1)
def main(argv=None) -> dict:
    """Train with every reduction and measure each alike; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load_binary(args)
    run = start_run(args)
    x_train, x_test = (torch.from_numpy(x).to(device) for x in (data.x_train, data.x_test))  # (N, 196) each
    settings = {"epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr, "samples": args.samples}
    to_reconstruct, first_row = shown_images(x_test, data.y_test)
    rows, shown = [], [first_row]
    for reduction in reductions(min(args.batch_size, len(x_train)), x_train.shape[1], args.z_dim):
        model, _ = new_model([args.seed], x_train.shape[1], args.hidden, args.z_dim, device)
        error = gradient_error(model, x_train[: args.batch_size], reduction)
        # Made anew, as the gradient check has drawn noise: every reduction sees the same.
        model, rng = new_model([args.seed], x_train.shape[1], args.hidden, args.z_dim, device)
        seconds = fit(model, x_train, reduction.loss, rng=rng, **settings)
        row = {"name": reduction.name, "code": reduction.code, "beta": reduction.beta, "scale": reduction.scale}
        row |= {"gradient_error": error, **measure(model, x_test), "training_seconds": seconds}
        run.log(**row)
        rows.append(row)
        shown.append(model_pictures(model, to_reconstruct, args.seed))
    save_figure(draw(rows, shown, args.z_dim, data.title), run.path("kl_scaling.png"))
    right, *others = rows
    lost = [right["elbo"] - row["elbo"] for row in others if row["beta"] != 1]
    return run.finish(
        {
            "z_dim": args.z_dim,
            "elbo_right": right["elbo"],
            "elbo_worst": right["elbo"] - max(lost),
            "least_nats_lost": min(lost),
            "most_nats_lost": max(lost),
            "largest_gradient_error": max(row["gradient_error"] for row in rows),
            "reductions": rows,
        }
    )


def draw(rows: list[dict], shown: list[np.ndarray], z_dim: int, title: str):
    """A line for each reduction, by its β: its terms, its bound, its active latents, what it draws."""
    order = sorted(range(len(rows)), key=lambda i: rows[i]["beta"])
    rows = [rows[i] for i in order]
    ratios = {"width_ratios": [1.5, 1.5, 0.8, 8]}
    figure, axes = new_figure(1, 4, width=15.5, height=5.6, gridspec_kw=ratios)
    terms, bound, active, images = axes[0]
    at = draw_pictures(images, [shown[0], *(shown[i + 1] for i in order)])
    images.set_aspect("auto")  # as high as the panels beside it, whose lines it continues
    y = at[1:]
    terms.plot([-row["reconstruction"] for row in rows], y, "o", color=COLORS[0], label="−reconstruction")
    terms.plot([row["kl"] for row in rows], y, "s", color=COLORS[1], label="KL")
    bound.plot([row["elbo"] for row in rows], y, "D", color=COLORS[2])
    for row, height in zip(rows, y, strict=True):
        bound.annotate(f"{row['elbo']:.1f}", (row["elbo"], height), (0, 6), textcoords="offset points", ha="center")
    active.barh(y, [row["active_units"] for row in rows], height=6, color=COLORS[0])
    for ax in (terms, bound, active):
        ax.set_ylim(images.get_ylim())
        ax.set_yticks(y, [])
        ax.axhspan(*(y[[row["name"] for row in rows].index("right")] + np.array([-7, 7])), color="#E8F1F8", zorder=0)
    terms.set_yticks(y, [f"{row['name']}, β = {row['beta']:.5g}\n{row['code']}" for row in rows], fontsize=8)
    terms.set(xlabel="nats per image", title="terms")
    terms.legend(loc="upper left", fontsize=8, borderpad=0, handletextpad=0)
    bound.set(xlabel="nats per image", title="ELBO")
    bound.margins(x=0.25)
    active.set(xlabel="latents", title="active", xlim=(0, z_dim), xticks=[0, z_dim])
    right = next(row for row in rows if row["name"] == "right")
    lost = [right["elbo"] - row["elbo"] for row in rows if row["beta"] != 1]
    error = max(row["gradient_error"] for row in rows)
    figure.suptitle(
        f"{title}, {z_dim} latents: a wrong reduction is a β on the KL (gradients agree to {error:.0e})\n"
        f"the right sums reach an ELBO of {right['elbo']:.1f} nats; "
        f"the wrong ones cost {min(lost):.1f} to {max(lost):.1f} nats"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
