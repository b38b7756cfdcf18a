"""How long do an update, 10,000 samples and the bounds take, and how far is each from what this machine can do?

    python vae/benchmark.py

Each is timed several times; the shortest time counts. Beside it stands how long its matrix products alone would take at
the speed of one large product on this machine: the rest is element-wise work (tanh, softplus) and, for the small
products of an update, the overhead of the calls.

Writes speed.png, metrics.json.
Shapes: B batch, S samples of the latent, G grid points.
"""

from collections.abc import Callable

import numpy as np
import torch

from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.device import cpu_threads, pick_device, seconds_of
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from vae.exact import exact_log_likelihood
from vae.model import VAE

SAMPLES = 10_000  # generated, the number that evaluate.py reads
K = 5000
GRID_POINTS = 401


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None, quick={"repeats": 2, "images": 10})
    parser.add_argument("--repeats", type=positive_int, default=10, help="how often each is measured")
    parser.add_argument("--images", type=positive_int, default=100, help="images whose bounds are computed")
    return parser


def least_seconds(call: Callable, repeats: int, device: torch.device) -> float:
    """The least time of `repeats` calls, after one to warm up."""
    return min([seconds_of(call, device) for _ in range(repeats + 1)][1:])


def products(model: VAE, encoded: int, decoded: int) -> float:
    """Floating-point operations of the matrix products for so many rows through encoder and decoder."""
    weights = [sum(p.numel() for p in part.parameters() if p.ndim == 2) for part in (model.encoder, model.decoder)]
    return 2.0 * (encoded * weights[0] + decoded * weights[1])


def update(model: VAE, x: torch.Tensor) -> Callable:
    """One update of train.py as a call: two draws for each image, forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step():
        reconstruction, kl = model.elbo_terms(x, 2)
        optimizer.zero_grad()
        (kl - reconstruction).mean().backward()
        optimizer.step()

    return step


@cpu_threads(1)
def main(argv=None) -> dict:
    """Measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    run = start_run(args)
    rng = seed_everything(args.seed)
    model, plane = VAE().to(device), VAE(z_dim=2).to(device)
    x = torch.from_numpy(rng.integers(0, 2, (max(100, args.images), 196)).astype(np.float32)).to(device)
    some, large = x[: args.images], torch.randn(2048, 2048, device=device)

    @torch.inference_mode()
    def sampled():
        return (model.decode(torch.randn(SAMPLES, model.z_dim, device=device)).sigmoid() > 0.5).cpu()

    @torch.inference_mode()
    def bounded():
        return model.iwae_bound(some, K)

    n, grid = len(some), GRID_POINTS**2
    # Name, call, operations of its matrix products; a backward pass takes twice the forward's, except in the first
    # layer: the gradient of the images is not needed.
    first = 2.0 * 100 * model.encoder[0].weight.numel()
    cases = [
        ("one large product", lambda: large @ large, 2.0 * 2048**3),
        ("update, batch 100, 2 draws", update(model, x[:100]), 3 * products(model, 100, 200) - first),
        (f"{SAMPLES:,} samples", sampled, products(model, 0, SAMPLES)),
        (f"IWAE-{K:,} of {n} images", bounded, products(model, n, n * K)),
        (
            f"exact likelihood of {n} images, {GRID_POINTS}² points",
            lambda: exact_log_likelihood(plane, some, GRID_POINTS),
            products(plane, 0, grid) + 2.0 * n * grid * 196,
        ),
    ]
    table = []
    for name, call, operations in cases:
        seconds = least_seconds(call, args.repeats, device)
        table.append({"what": name, "seconds": seconds, "gflops_per_second": operations / seconds / 1e9})
        table[-1]["share_of_one_large_product"] = table[-1]["gflops_per_second"] / table[0]["gflops_per_second"]
        run.log(**table[-1])
    save_figure(draw(table), run.path("speed.png"))
    return run.finish({"threads": torch.get_num_threads(), "cases": table})


def draw(table: list[dict]):
    """The seconds of each case, and those that its products alone would take at the machine's speed, on a log axis."""
    rows = table[1:]
    figure, axes = new_figure(width=9.6, height=0.55 * len(rows) + 1.7)
    ax, seconds = axes[0, 0], np.array([row["seconds"] for row in rows])
    least = seconds * [row["share_of_one_large_product"] for row in rows]
    ax.hlines(range(len(rows)), least, seconds, color="#BBBBBB")
    ax.plot(least, range(len(rows)), "D", color=COLORS[1], label="its products at the speed of one large product")
    ax.plot(seconds, range(len(rows)), "o", color=COLORS[0], label="measured")
    for at, row in enumerate(rows):
        ax.text(row["seconds"] * 1.1, at, f"{row['seconds']:.2g} s", va="center", fontsize=9)
    ax.set_yticks(range(len(rows)), [row["what"] for row in rows])
    ax.set(ylim=(len(rows) - 0.5, -0.5))
    ax.grid(False, axis="y")
    ax.set(xscale="log", xlabel="seconds", xlim=(least.min() / 2, seconds.max() * 8))
    ax.legend(loc="upper center", bbox_to_anchor=(0.4, -0.22), ncols=2)
    shares = [row["share_of_one_large_product"] for row in rows]
    reached = f"{min(shares):.0%} to {max(shares):.0%} of {table[0]['gflops_per_second']:.0f} GFLOP/s"
    figure.suptitle(f"An autoencoder of small products reaches {reached}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
