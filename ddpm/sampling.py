"""What comes out of noise, and how?

    python ddpm/sampling.py
    python ddpm/sampling.py --sampler ddpm --n 64 --out runs/ddpm/sampling_ddpm
    python ddpm/sampling.py --ckpt runs/ddpm/train_conditional/ema.pth --label 7 --guidance 2 --out runs/ddpm/sevens

Noise goes in, and the trained network takes it away step by step: in all T steps of DDPM, each of which adds new noise,
or in fewer, larger ones of DDIM or DPM-Solver++ (diffusion.py). denoising.png follows some images through all T
steps of DDPM: above x_t, below the image x̂_0 that the network sees in it, first the mean of many digits, then one.
noising.png shows the other direction: what each schedule leaves of an image.

With `--label` a conditional model draws one class (without, it draws each equally often). `--guidance w` goes further
in the class's direction: ε = ε_none + w (ε_label − ε_none), so that 1 is no guidance at all and 0 no class.

Writes ddpm_sample.png, denoising.png, noising.png, samples.npz, metrics.json. In samples.npz, for other experiments:
`images` uint8 (N, H, W), `labels` int64 (N,), −1 where none was asked for, `model`, a hash of the weights. Model:
train_ddpm.py.
Sources: Ho, Jain and Abbeel 2020; Song, Meng and Ermon 2021; Lu et al. 2022; Ho and Salimans 2022 (guidance).
Shapes: B images of a batch (B, C, H, W), t int64 (B,).
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.checkpoints import add_ckpt_flag, fingerprint, load_model
from ddpm.diffusion import SCHEDULES, GaussianDiffusion, Model
from ddpm.inputs import scaled, shades
from ddpm.unet import UNet
from shared_utils.checkpoint import save_arrays
from shared_utils.cli import (
    UserError,
    add_amp,
    fraction,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_int,
    run_main,
)
from shared_utils.data import load_images
from shared_utils.device import autocast, pick_device
from shared_utils.plotting import image_grid, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything

NAMES = {"ddpm": "DDPM", "ddim": "DDIM", "dpm": "DPM-Solver++"}
DEFAULT_STEPS = {"ddpm": None, "ddim": 50, "dpm": 20}  # None: all of them
GRID = 10  # images of ddpm_sample.png in each direction
FOLLOWED, MOMENTS = 5, 9  # images of denoising.png, and how often each is shown


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, quick={"n": 20, "batch_size": 10})
    add_ckpt_flag(parser)
    parser.add_argument("--sampler", choices=tuple(DEFAULT_STEPS), default="dpm", help="how to go from noise to image")
    parser.add_argument("--steps", type=positive_int, help="of the sampler (default: ddpm all, ddim 50, dpm 20)")
    parser.add_argument("--eta", type=fraction, default=0.0, help="how much noise DDIM's steps add; 1: as DDPM's")
    parser.add_argument("--n", type=positive_int, default=10_000, help="images to draw")
    parser.add_argument("--batch-size", type=positive_int, default=250, help="images drawn together")
    parser.add_argument("--label", type=non_negative_int, help="the class to draw (default: each equally often)")
    parser.add_argument("--guidance", type=non_negative_float, default=1.0, help="weight w; 1: no guidance")
    add_amp(parser, "compute in bfloat16")
    return parser


def main(argv=None) -> dict:
    """Draw, follow, show; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    model, diffusion, state = load_model(args, device)
    steps = args.steps or DEFAULT_STEPS[args.sampler] or diffusion.timesteps
    check(args, model, diffusion, steps)
    test = load_images(args.dataset, "test", args.data_dir)
    run = start_run(args)
    seed_everything(args.seed)
    labels = wanted_labels(args.n, model.n_classes if args.guidance else None, args.label)
    how = {"eta": args.eta, "guidance": args.guidance}
    images, seconds = draw_all(diffusion, model, labels, args.sampler, steps, args, device, **how)
    images = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    made_by = fingerprint(model)
    save_arrays(run.path("samples.npz"), images=images, labels=labels, model=made_by)
    passes = steps * (1 if args.guidance in (0, 1) else 2)  # guided, each step asks the network with and without label
    rate = len(images) * passes / seconds
    way = f"{steps} steps of {NAMES[args.sampler]}"
    way += f", η = {args.eta:g}" if args.sampler == "ddim" else ""
    way += f", guidance {args.guidance:g}" if args.guidance != 1 else ""
    save_figure(draw_grid(images, f"{state['title']}: {way}", seconds / len(images)), run.path("ddpm_sample.png"))
    save_figure(draw_denoising(*followed(diffusion, model, args, device)), run.path("denoising.png"))
    save_figure(draw_noising(diffusion, torch.from_numpy(test.x[:1]), args.seed), run.path("noising.png"))
    return run.finish(
        {
            "model": made_by,
            "samples": len(images),
            "sampler": args.sampler,
            "steps": steps,
            "eta": args.eta,
            "guidance": args.guidance,
            "label": args.label,
            "sampling_seconds": seconds,
            "image_steps_per_second": rate,
            "seconds_per_image": seconds / len(images),
        }
    )


def check(args: argparse.Namespace, model: UNet, diffusion: GaussianDiffusion, steps: int) -> None:
    """Errors: `UserError` for what this model or sampler cannot do."""
    diffusion.steps_of(steps)
    if args.sampler == "ddpm" and steps != diffusion.timesteps:
        raise UserError(f"--steps {steps}: DDPM takes all {diffusion.timesteps}; ddim and dpm take fewer")
    if args.eta and args.sampler != "ddim":
        raise UserError(f"--eta {args.eta:g} is DDIM's, not {args.sampler}'s")
    if model.n_classes is None and (args.label is not None or args.guidance != 1):
        raise UserError("--label and --guidance need a conditional model: train_ddpm.py --conditional")
    if args.label is not None and not args.guidance:
        raise UserError("--guidance 0 draws no class: leave --label out")
    if args.label is not None and args.label >= model.n_classes:
        raise UserError(f"--label {args.label}: the classes are 0 to {model.n_classes - 1}")


def wanted_labels(n: int, n_classes: int | None, label: int | None) -> np.ndarray:
    """The class of each of n images: the one asked for, each in turn, or −1 for none; int64 (n,)."""
    if n_classes is None:
        return np.full(n, -1, dtype=np.int64)
    return np.arange(n) % n_classes if label is None else np.full(n, label, dtype=np.int64)


def guided(model: UNet, labels: Tensor | None, guidance: float) -> Model:
    """(x_t, t) → the prediction for these labels (B,), moved away from that without any, or just that without any."""
    if labels is None or guidance == 0:
        return model
    if guidance == 1:
        return lambda x_t, t: model(x_t, t, labels)
    both = torch.cat([labels, torch.full_like(labels, model.n_classes)])

    def call(x_t: Tensor, t: Tensor) -> Tensor:
        # In float32 from here: bfloat16's rounding would be multiplied by the guidance.
        with_label, without = model(x_t.repeat(2, 1, 1, 1), t.repeat(2), both).float().chunk(2)
        return without + guidance * (with_label - without)

    return call


def draw_batch(
    diffusion: GaussianDiffusion, model: Model, shape, sampler: str, steps: int, eta: float, device
) -> Tensor:
    """Images of a shape (B, C, H, W) in [−1, 1] by a sampler of `DEFAULT_STEPS`."""
    if sampler == "ddpm":
        return diffusion.ddpm_sample(model, shape, device)
    if sampler == "ddim":
        return diffusion.ddim_sample(model, shape, steps, eta, device)
    return diffusion.dpm_solver_sample(model, shape, steps, device)


def draw_all(
    diffusion: GaussianDiffusion, model: UNet, labels: np.ndarray, sampler: str, steps: int, args, device, **how
) -> tuple[np.ndarray, float]:
    """Images uint8 (N, C, H, W), one for each label (−1: none), in batches, and the seconds it took.

    args: has `batch_size` and `amp`. how: `eta`, `guidance`; without them 0 and 1.
    """
    found, started, side = [], time.perf_counter(), model.config["size"]
    about = {"desc": f"{NAMES[sampler]}, {steps} steps", "unit": "batch", "disable": None}  # on a terminal alone
    for first in tqdm(range(0, len(labels), args.batch_size), **about):
        some = torch.from_numpy(labels[first : first + args.batch_size]).to(device)
        denoiser = guided(model, None if (some < 0).any() else some, how.get("guidance", 1.0))
        shape = (len(some), model.config["image_channels"], side, side)
        with autocast(device, args.amp):
            found.append(shades(draw_batch(diffusion, denoiser, shape, sampler, steps, how.get("eta", 0.0), device)))
    return np.concatenate(found), time.perf_counter() - started


@torch.no_grad()
def followed(
    diffusion: GaussianDiffusion, model: UNet, args: argparse.Namespace, device
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Some images on their way through all of DDPM: the steps shown, and there x_t and x̂_0, uint8 (M, F, C, H, W)."""
    labels = torch.from_numpy(wanted_labels(FOLLOWED, model.n_classes, args.label)).to(device)
    denoiser = guided(model, None if model.n_classes is None else labels, args.guidance)
    side, shown = model.config["size"], set(diffusion.steps_of(MOMENTS))
    x = torch.randn(FOLLOWED, model.config["image_channels"], side, side, device=device)
    moments, noisy, clean = [], [], []
    with autocast(device, args.amp):
        for step in reversed(range(diffusion.timesteps)):
            t = torch.full((FOLLOWED,), step, device=device)
            if step in shown:
                moments.append(step)
                noisy.append(shades(x))
                clean.append(shades(diffusion.denoised(denoiser, x, t)))
            x = diffusion.p_sample(denoiser, x, t)
    return moments, np.stack(noisy), np.stack(clean)


def draw_grid(images: np.ndarray, about: str, seconds: float):
    """The first images that were drawn, as they came."""
    shown = images[: GRID**2]
    figure, axes = new_figure(width=6.0, height=6.6)
    image_grid(axes[0, 0], shown if shown.ndim == 3 else shown.transpose(0, 3, 1, 2), GRID, vmin=0, vmax=255)
    figure.suptitle(f"{about}\nthe first {len(shown)}, unselected; {1000 * seconds:.0f} ms each")
    return figure


def draw_denoising(moments: list[int], noisy: np.ndarray, clean: np.ndarray):
    """A pair of rows for each image: x_t, and below it x̂_0; a column for each moment."""
    figure, axes = new_figure(width=8.4, height=2 * FOLLOWED * 0.88 + 1.3)
    rows = np.stack([noisy, clean], axis=2).swapaxes(0, 1)  # (F, M, 2, C, H, W)
    rows = rows.swapaxes(1, 2).reshape(-1, *noisy.shape[2:])  # image by image, x_t then x̂_0, moment by moment
    image_grid(axes[0, 0], rows, len(moments), vmin=0, vmax=255)
    side = noisy.shape[-1]
    width = axes[0, 0].get_xlim()[1] - axes[0, 0].get_xlim()[0]
    axes[0, 0].set_axis_on()
    axes[0, 0].set_xticks((np.arange(len(moments)) + 0.5) * width / len(moments) - 0.5, [f"{t}" for t in moments])
    height = abs(axes[0, 0].get_ylim()[1] - axes[0, 0].get_ylim()[0])
    ticks = (np.arange(2 * FOLLOWED) + 0.5) * height / (2 * FOLLOWED) - 0.5
    axes[0, 0].set_yticks(ticks, ["$x_t$", "$\\hat x_0$"] * FOLLOWED)
    axes[0, 0].grid(False)
    axes[0, 0].set_xlabel("step t, from noise to image")
    figure.suptitle(f"{FOLLOWED} images of {side}×{side} on their way: what the network sees in the noise")
    return figure


def draw_noising(diffusion: GaussianDiffusion, x: Tensor, seed: int):
    """One image (1, C, H, W) under both schedules, in as many steps as the diffusion's, and its share ᾱ of variance."""
    torch.manual_seed(seed)
    moments = diffusion.steps_of(MOMENTS)[::-1]
    t = torch.tensor(moments)
    x0 = scaled(x).expand(len(moments), -1, -1, -1)
    noise = torch.randn_like(x0[:1]).expand_as(x0)
    figure, axes = new_figure(len(SCHEDULES), 1, width=8.4, height=3.6)
    half = {}
    for ax, schedule in zip(axes[:, 0], SCHEDULES, strict=True):
        process = GaussianDiffusion(diffusion.timesteps, schedule)
        parts = [f"{process.alpha_bars[step]:.3f}" for step in moments]
        image_grid(ax, shades(process.q_sample(x0, t, noise)), len(moments), labels=parts, vmin=0, vmax=255)
        half[schedule] = int((process.alpha_bars > 0.5).sum())
        used = " (this model's)" if schedule == diffusion.schedule else ""
        ax.set_title(f"{schedule} schedule{used}; below, the signal's part ᾱ of the variance", fontsize=10)
    said = ", ".join(f"{schedule} at step {step}" for schedule, step in half.items())
    figure.suptitle(f"Half of the variance is noise: {said}, of {diffusion.timesteps}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
