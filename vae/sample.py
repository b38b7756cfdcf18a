"""What does the autoencoder draw when nobody shows it an image?

    python vae/sample.py
    python vae/sample.py --n 10000 --columns 16 --rows 8

A latent from the prior, z ~ N(0, I), and one pass of the decoder: p = sigmoid(decode(z)), a probability for each pixel.
The model's own images are draws x_i ~ Bernoulli(p_i), each pixel on its own, hence their ragged edges; cutting p at one
half shows the most probable image for that latent.

Writes samples.png, samples.npz, metrics.json. In samples.npz, for other experiments: `images` uint8 (N, 14, 14), 0 or
255, p cut at one half; of the same shape `probabilities`, 255 p, and `draws`, 0 or 255; `z` float32 (N, d).
Source: Kingma and Welling 2014.
Shapes: N samples, d latents.
"""

import time

import numpy as np
import torch

from shared_utils.checkpoint import save_arrays
from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import image_grid, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from vae.inputs import SIDE
from vae.model import add_ckpt_flag, load_model


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset=None)
    add_ckpt_flag(parser)
    parser.add_argument("--n", type=positive_int, default=10_000, help="samples written to samples.npz")
    parser.add_argument("--rows", type=positive_int, default=6, help="rows of each grid in the figure")
    parser.add_argument("--columns", type=positive_int, default=10, help="columns of each grid in the figure")
    return parser


@torch.inference_mode()
def main(argv=None) -> dict:
    """Draw, write and show; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    model = load_model(args, device)
    run = start_run(args)
    seed_everything(args.seed)

    started = time.perf_counter()
    z = torch.randn(args.n, model.z_dim, device=device)  # (N, d)
    p = model.decode(z).sigmoid()  # (N, 196)
    draws = torch.rand_like(p) < p
    p, draws, z = p.cpu().numpy(), draws.cpu().numpy(), z.cpu().numpy()
    seconds = time.perf_counter() - started

    kinds = {"images": p > 0.5, "probabilities": p, "draws": draws}
    images = {name: np.rint(255.0 * value).astype(np.uint8).reshape(-1, SIDE, SIDE) for name, value in kinds.items()}
    save_arrays(run.path("samples.npz"), **images, z=z)

    figure, axes = new_figure(1, 3, width=12.6, height=1.0 + 4.2 * args.rows / args.columns)
    titles = ("probabilities", "cut at one half", "draws, x ~ Bernoulli(p)")
    for ax, title, name in zip(axes[0], titles, ("probabilities", "images", "draws"), strict=True):
        image_grid(ax, images[name][: args.rows * args.columns], args.columns, vmin=0, vmax=255)
        ax.set_title(title)
    doubtful = float(((p > 0.1) & (p < 0.9)).mean())
    finding = f"samples from the prior; {doubtful:.0%} of their pixels are left open (0.1 < p < 0.9)"
    figure.suptitle(f"{model.trained_on}, {model.size}: {finding}")
    save_figure(figure, run.path("samples.png"))
    return run.finish(
        {
            "z_dim": model.z_dim,
            "samples": args.n,
            "pixels_left_open": doubtful,
            "mean_pixel": float(p.mean()),
            "generation_seconds": seconds,
        }
    )


if __name__ == "__main__":
    run_main(main, build_parser)
