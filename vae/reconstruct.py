"""What of an image survives the way through the latents and back?

    python vae/reconstruct.py
    python vae/reconstruct.py --n 12

Test images x above their reconstructions sigmoid(decode(mu)), mu the mean of q(z|x), and those cut at one half. On the
left the first `--n` test images, in the middle those with the highest ELBO, on the right those with the lowest.

Writes reconstructions.png, metrics.json. Source: Kingma and Welling 2014.
Shapes: N test images, 196 pixels, d latents; ELBO in nats per image.
"""

import numpy as np
import torch

from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import image_grid, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from vae.inputs import SIDE, add_data_flags, load_binary
from vae.model import add_ckpt_flag, load_model

SAMPLES = 20  # draws for the ELBO of each image


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, quick={"per_class": 100, "val_size": 100})
    add_data_flags(parser)
    add_ckpt_flag(parser)
    parser.add_argument("--n", type=positive_int, default=8, help="images in each panel")
    return parser


@torch.inference_mode()
def main(argv=None) -> dict:
    """Reconstruct all test images, show some; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    model = load_model(args, device)
    data = load_binary(args)
    run = start_run(args)
    seed_everything(args.seed)

    x = torch.from_numpy(data.x_test).to(device)  # (N, 196)
    mu, _ = model.encode(x)
    p = model.decode(mu).sigmoid()  # (N, 196)
    terms = [model.elbo_terms(part, SAMPLES) for part in x.split(1000)]
    elbo = torch.cat([reconstruction - kl for reconstruction, kl in terms]).cpu().numpy()  # (N,)
    x, p = x.cpu().numpy(), p.cpu().numpy()
    wrong = ((p > 0.5) != x).sum(1)  # (N,) pixels

    n = min(args.n, len(x))
    order = np.argsort(elbo, kind="stable")
    chosen = {"the first": np.arange(n), "the highest ELBO": order[::-1][:n], "the lowest ELBO": order[:n]}
    figure, axes = new_figure(1, 3, width=13.5, height=2.8)
    for ax, (name, at) in zip(axes[0], chosen.items(), strict=True):
        rows = np.concatenate([x[at], p[at], p[at] > 0.5]).reshape(-1, SIDE, SIDE)  # (3n, 14, 14)
        image_grid(ax, rows, n, vmin=0, vmax=1)
        ax.set_title(f"{name}: {elbo[at].max():.0f} to {elbo[at].min():.0f} nats, {wrong[at].mean():.1f} pixels wrong")
    for row, label in enumerate(("image", "probability", "cut at ½")):
        axes[0, 0].text(-1.5, 7 + 15 * row, label, ha="right", va="center", fontsize=9)
    finding = f"{wrong.mean():.1f} of {x.shape[1]} pixels of a test image come back wrong"
    figure.suptitle(f"{data.title}, {model.size}: {finding}")
    save_figure(figure, run.path("reconstructions.png"))
    return run.finish(
        {
            "z_dim": model.z_dim,
            "test_images": len(x),
            "test_elbo": float(elbo.mean()),
            "wrong_pixels": float(wrong.mean()),
            "pixels": x.shape[1],
            "images_without_a_wrong_pixel": float((wrong == 0).mean()),
        }
    )


if __name__ == "__main__":
    run_main(main, build_parser)
