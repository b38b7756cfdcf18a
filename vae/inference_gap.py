"""How much of the gap between ELBO and likelihood is the encoder's fault, and how much the Gaussian's?

    python vae/inference_gap.py
    python vae/inference_gap.py --ckpt runs/vae/train_z2_long/best.pth --out runs/vae/inference_gap_z2

The ELBO falls short of log p(x) by KL(q(z|x) ‖ p(z|x)), for two reasons. No Gaussian with independent latents is the
true posterior; and the encoder does not even find the best one. With q* the Gaussian that maximises the ELBO of that
one image (found by Adam on its mean and log-variance, from the encoder's):

    log p(x) − ELBO(q)  =  [log p(x) − ELBO(q*)]  +  [ELBO(q*) − ELBO(q)]
                             approximation gap         amortisation gap

An encoder that has overfitted its training images has a larger amortisation gap on others. The decoder is held fixed.
log p(x) is exact for one or two latents (exact.py); otherwise it is IWAE-k with draws from q*, which is a little low,
as is the ELBO of a q* that the search has not quite found.

Writes inference_gap.png, metrics.json. With two latents also posteriors.png, the true posteriors and both Gaussians.
Source: Cremer, Li and Duvenaud 2018.
Shapes: N images, S samples of the latent, d latents, G points along an axis of a grid.
"""

import math

import numpy as np
import torch
from torch import Tensor

from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import mean_std
from vae.exact import exact_log_likelihood
from vae.inputs import SIDE, add_data_flags, load_binary
from vae.model import VAE, add_ckpt_flag, kl_to_prior, load_model, log_bernoulli

LR = 0.05  # of the search for the best Gaussian, falling to 0
STEP_SAMPLES = 16  # draws of the latent in each of its steps
EVAL_SAMPLES = 500
CONTOURS = 6  # images whose posteriors are drawn
GRID = 121  # points of their plots along an axis


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, quick={"per_class": 100, "val_size": 100, "images": 100, "steps": 100, "k": 500})
    add_data_flags(parser)
    add_ckpt_flag(parser)
    parser.add_argument("--images", type=positive_int, default=1000, help="training images, and as many test images")
    parser.add_argument("--steps", type=positive_int, default=500, help="of the search for the best Gaussian")
    parser.add_argument("--k", type=positive_int, default=5000, help="samples of the latent to estimate log p(x)")
    return parser


def gaussian_elbo(model: VAE, x: Tensor, mu: Tensor, log_var: Tensor, n_samples: int) -> Tensor:
    """The ELBO of images x (N, D) with q = N(mu, diag exp log_var), (N, d) each → (N,), in nats."""
    total = torch.zeros_like(mu[:, 0])
    for done in range(0, n_samples, STEP_SAMPLES):
        z = model.reparameterize(mu, log_var, min(STEP_SAMPLES, n_samples - done))  # (S, N, d)
        total = total + log_bernoulli(x, model.decode(z)).sum(0)
    return total / n_samples - kl_to_prior(mu, log_var)


def best_gaussian(model: VAE, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, (N, d) each, that maximise each image's own ELBO, started from the encoder's."""
    mu, log_var = (value.detach().clone().requires_grad_() for value in model.encode(x))
    optimizer = torch.optim.Adam([mu, log_var], lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = -gaussian_elbo(model, x, mu, log_var, STEP_SAMPLES).sum()  # each image's own, no mean
        mu.grad, log_var.grad = torch.autograd.grad(loss, (mu, log_var))
        optimizer.step()
        schedule.step()
    return mu.detach(), log_var.detach()


def gaps(model: VAE, x: Tensor, steps: int, k: int) -> dict[str, np.ndarray]:
    """Per image of x (N, D), in nats: `likelihood`, `elbo` of the encoder's q, `best_elbo` of the best Gaussian."""
    best = best_gaussian(model, x, steps)
    with torch.no_grad():
        if model.z_dim <= 2:
            likelihood = exact_log_likelihood(model, x)
        else:
            parts = zip(x.split(100), best[0].split(100), best[1].split(100), strict=True)
            likelihood = torch.cat([model.iwae_bound(part, k, (mu, log_var)) for part, mu, log_var in parts])
        values = []
        for q in (model.encode(x), best):
            with torch.random.fork_rng():  # the same noise for both: their difference is what is asked for
                values.append(gaussian_elbo(model, x, *q, EVAL_SAMPLES))
        elbo, best_elbo = values
    found = {"likelihood": likelihood, "elbo": elbo, "best_elbo": best_elbo}
    return {name: value.cpu().double().numpy() for name, value in found.items()}


@cpu_threads(1)
def main(argv=None) -> dict:
    """Split the gap on training and on test images; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    model = load_model(args, device)
    data = load_binary(args)
    run = start_run(args)
    seed_everything(args.seed)

    parts = {"training images": data.x_train, "test images": data.x_test}
    table = []
    for name, images in parts.items():
        x = torch.from_numpy(images[: args.images]).to(device)
        table.append(row := gap_row(name, gaps(model, x, args.steps, args.k)))
        run.log(**row)
    title = f"{data.title}, {model.size}"
    likelihood = "log p(x)" if model.z_dim <= 2 else f"IWAE-{args.k:,}"
    save_figure(draw_gaps(table, title, likelihood), run.path("inference_gap.png"))
    if model.z_dim == 2:
        x = torch.from_numpy(data.x_test[:CONTOURS]).to(device)
        save_figure(draw_posteriors(model, x, best_gaussian(model, x, args.steps), title), run.path("posteriors.png"))
    return run.finish({"z_dim": model.z_dim, "k": args.k, "exact": model.z_dim <= 2, "gaps": table})


def gap_row(name: str, nats: dict[str, np.ndarray]) -> dict:
    """Means over the images of what `gaps` found, with the standard errors of the two gaps."""
    approximation = nats["likelihood"] - nats["best_elbo"]
    amortisation = nats["best_elbo"] - nats["elbo"]
    root = math.sqrt(len(approximation))
    return {
        "images": name,
        "log_likelihood": nats["likelihood"].mean(),
        "elbo": nats["elbo"].mean(),
        "approximation_gap": approximation.mean(),
        "approximation_gap_se": mean_std(approximation)[1] / root,
        "amortisation_gap": amortisation.mean(),
        "amortisation_gap_se": mean_std(amortisation)[1] / root,
    }


def draw_gaps(table: list[dict], title: str, likelihood: str):
    """A bar for training and one for test images: from the encoder's ELBO up to the likelihood."""
    figure, axes = new_figure(width=8.4, height=3.2)
    ax = axes[0, 0]
    for at, row in enumerate(table):
        left = row["elbo"]
        for part, color in (("amortisation", COLORS[1]), ("approximation", COLORS[0])):
            width = row[f"{part}_gap"]
            ax.barh(at, width, left=left, color=color, label=f"{part} gap" if at == 0 else None)
            ax.text(left + width / 2, at, f"{width:.2f}", ha="center", va="center", color="white", fontsize=10)
            left += width
        ax.text(row["elbo"], at, f"ELBO {row['elbo']:.2f} ", ha="right", va="center", fontsize=9)
        ax.text(left, at, f" {likelihood}\n {left:.2f}", ha="left", va="center", fontsize=9)
    low, high = min(row["elbo"] for row in table), max(row["log_likelihood"] for row in table)
    ax.set_xlim(low - 0.3 * (high - low), high + 0.3 * (high - low))
    ax.set_yticks(range(len(table)), [row["images"] for row in table])
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlabel("nats per image")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    seen, unseen = (row["amortisation_gap"] for row in table)
    figure.suptitle(f"{title}\nthe encoder loses {seen:.2f} nats on images it has learned, {unseen:.2f} on others")
    return figure


@torch.no_grad()
def draw_posteriors(model: VAE, x: Tensor, best: tuple[Tensor, Tensor], title: str):
    """For images x (N, D), two latents: the true posterior (shaded), the encoder's Gaussian and the best one (2σ)."""
    q = model.encode(x)
    figure, axes = new_figure(2, -(-len(x) // 2), width=11, height=7.6)
    for at, ax in enumerate(axes.flat[: len(x)]):
        center, reach = best[0][at], 5 * (0.5 * best[1][at].max()).exp()  # (2,) and five standard deviations
        axis = torch.linspace(-1, 1, GRID, device=x.device) * reach
        z = torch.cartesian_prod(axis, axis) + center  # (G², 2)
        log_joint = log_bernoulli(x[at], model.decode(z)) - 0.5 * (z**2).sum(-1)  # (G²,)
        posterior = (log_joint - log_joint.max()).exp().reshape(GRID, GRID).T.cpu().numpy()  # z₂ by row
        z1, z2 = ((axis + c).cpu().numpy() for c in center)
        ax.contourf(z1, z2, posterior, levels=10, cmap="Greys")
        for (mu, log_var), color, dash, label in (
            (q, COLORS[1], "--", "the encoder's"),
            (best, COLORS[0], "-", "the best with independent latents"),
        ):
            angle = np.linspace(0, 2 * np.pi, 100)
            (m1, m2), (s1, s2) = mu[at].tolist(), (0.5 * log_var[at]).exp().tolist()
            ax.plot(m1 + 2 * s1 * np.cos(angle), m2 + 2 * s2 * np.sin(angle), color=color, linestyle=dash, label=label)
        ax.set(xlabel="z₁", ylabel="z₂", aspect="equal")
        ax.grid(False)
        inset = ax.inset_axes((0.02, 0.76, 0.22, 0.22))
        inset.imshow(x[at].reshape(SIDE, SIDE).cpu().numpy(), interpolation="nearest")
        inset.axis("off")
    axes[0, 0].legend(loc="lower left", fontsize=8)
    figure.suptitle(f"{title}: true posteriors p(z|x) of test images (grey), and two Gaussians for each (ellipses: 2σ)")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
