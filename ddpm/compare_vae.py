"""A variational autoencoder or diffusion: whose digits are nearer to real ones, and at what cost?

    python ddpm/compare_vae.py
    python ddpm/compare_vae.py --n 2000 --out runs/ddpm/compare_2000

The autoencoder's images have 14×14 pixels, black or white, so the diffusion's are reduced to that: the mean of each
2×2 block, cut at one half, which is how the autoencoder's data were made. A classifier of such images, trained here,
gives the features (features.py); as many held-out real images give the floor. The autoencoder's images are of two
kinds: its most probable pixels, and pixels drawn with the probabilities that it gives them, as its likelihood assumes.

Training is stable when the held-out loss falls from one evaluation to the next: how often did it rise, and how far? The
VAE's is evaluated often, with its current weights and new draws each time; the diffusion's after each epoch, with its
mean weights and always the same noise, which is steadier by itself. The likelihoods are of different images, with
pixels of 2 and of 256 shades: they cannot be compared.

Reads what vae/train.py, vae/sample.py, vae/evaluate.py and here train_ddpm.py, sampling.py, evaluate.py wrote.
Writes side_by_side.png, metrics.json (in it the table of both). Source: Heusel et al. 2017 (the distance).
Shapes: N images uint8 (N, 1, S, S), S = 14.
"""

import argparse
from dataclasses import replace

import numpy as np

from ddpm.evaluate import distances
from ddpm.features import seen, trained
from ddpm.inputs import FEWEST, Data, add_data_flags, load
from shared_utils.checkpoint import load_arrays
from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.data import binarize, downsample
from shared_utils.device import pick_device
from shared_utils.plotting import image_grid, new_figure, save_figure
from shared_utils.runs import find_output, read_json, start_run

GRID = 8  # images of each kind in each direction
VAE, DRAWN, DIFFUSION = "VAE", "VAE, pixels drawn", "diffusion"
READ = {  # experiment, and what is read from the metrics of its training, sampling and evaluation
    VAE: (
        "vae",
        {
            "train": ("z_dim", "training_seconds", "parameters", "train_images"),
            "sample": ("z_dim", "generation_seconds", "samples"),
            "evaluate": ("z_dim", "bits_per_pixel"),
        },
    ),
    DIFFUSION: (
        "ddpm",
        {
            "train_ddpm": ("training_seconds", "parameters", "train_images"),
            "sampling": ("steps", "seconds_per_image"),
            "evaluate": ("bits_per_dimension", "model"),
        },
    ),
}


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, quick={"epochs": 1, "n": 20})
    add_data_flags(parser)
    parser.add_argument("--n", type=positive_int, default=10_000, help="images of each kind, at most")
    parser.add_argument("--epochs", type=positive_int, default=5, help="of the classifier")
    return parser


def main(argv=None) -> dict:
    """Measure both, show them side by side; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    about, losses = {}, {}
    for name, (experiment, runs) in READ.items():
        about[name] = [metrics_of(args, experiment, run, keys) for run, keys in runs.items()]
        learned = about[name][0]["run"].get("dataset")
        if learned != args.dataset:
            raise UserError(f"--dataset {args.dataset}: the {name} was trained on {learned}")
        path = find_output(args, next(iter(runs)), "history.csv", experiment)
        history = np.genfromtxt(path, delimiter=",", names=True, ndmin=1)
        losses[name] = history["val_kl"] - history["val_reconstruction"] if name == VAE else history["val_loss"]
    if len({metrics["z_dim"] for metrics in about[VAE]}) > 1:
        numbers = ", ".join(f"{run}: {metrics['z_dim']}" for run, metrics in zip(READ[VAE][1], about[VAE], strict=True))
        raise UserError(f"the runs of vae are of models with different numbers of latents ({numbers})")
    if args.n < FEWEST:
        raise UserError(f"--n {args.n}: a distance needs {FEWEST} images or more")
    data = load(args)
    images, large = samples_of(args, data, about[DIFFUSION][-1]["model"])
    run = start_run(args)
    train, val, test = (coarse(part.x) for part in (data.train, data.val, data.test))
    classifier = trained(replace(data.train, x=train), len(data.classes), args.epochs, args.seed, device)
    n = min(args.n, len(val), *(len(each) for each in images.values()))
    (real, _), (features, probabilities) = seen(classifier, val[:n]), seen(classifier, test)
    quality = {
        name: distances({"samples": seen(classifier, x[:n])[0], "real": real, "test": features})
        for name, x in images.items()
    }
    floor = quality[VAE]["frechet_of_real"]
    found = {name: quality[name]["frechet_of_samples"] for name in images}
    save_figure(draw({"real": test, **images}, large, found, floor, data.title), run.path("side_by_side.png"))
    return run.finish(
        {
            "images": n,
            "accuracy": float((probabilities.argmax(1) == data.test.y).mean()),
            "floor": floor,
            "frechet_of_vae": found[VAE],
            "frechet_of_vae_drawn": found[DRAWN],
            "frechet_of_diffusion": found[DIFFUSION],
            "diffusion_against_vae": found[DIFFUSION] / found[VAE],
            "table": table(about, quality, {name: steadiness(loss) for name, loss in losses.items()}, data),
        }
    )


def metrics_of(args: argparse.Namespace, experiment: str, run: str, keys: tuple[str, ...]) -> dict:
    """metrics.json of a run. Errors: `UserError` with the command that makes it, when it is missing or lacks a key."""
    path = find_output(args, run, "metrics.json", experiment)
    metrics = read_json(path)
    if missing := [key for key in (*keys, "run") if key not in metrics]:
        raise UserError(f"{path} lacks {', '.join(missing)}: run `python {experiment}/{run}.py` of this version")
    return metrics


def samples_of(args: argparse.Namespace, data: Data, model: str) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """What is compared, uint8 (N, 1, S, S) of 0 and 255, and the diffusion's images as they are, (N, 1, 2 S, 2 S).

    model: the fingerprint of the one that evaluate.py measured. Errors: `UserError` when a file is missing, holds other
    images, or the diffusion's were drawn by another model.
    """
    files = {
        "vae": find_output(args, "sample", "samples.npz", "vae"),
        "ddpm": find_output(args, "sampling", "samples.npz"),
    }
    small, large = load_arrays(files["vae"], ["images", "draws"]), load_arrays(files["ddpm"], ["images", "model"])
    side = data.test.x.shape[-1]
    for key, x, wanted in (
        ("vae", small["images"], side // 2),
        ("vae", small["draws"], side // 2),
        ("ddpm", large["images"], side),
    ):
        if x.dtype != np.uint8 or x.shape[1:] != (wanted, wanted) or len(x) < FEWEST:
            raise UserError(f"{files[key]} holds {x.dtype} {x.shape}, not {FEWEST} or more images of {wanted}×{wanted}")
    if str(large["model"]) != model:
        raise UserError(f"{files['ddpm']} was drawn by another model than evaluate.py measured: run evaluate.py again")
    large = large["images"][:, None]
    return {VAE: small["images"][:, None], DRAWN: small["draws"][:, None], DIFFUSION: coarse(large)}, large


def coarse(x: np.ndarray) -> np.ndarray:
    """Images (N, 1, 2 S, 2 S) as the autoencoder's data are: the mean of each 2×2 block, cut at one half; 0 or 255."""
    return 255 * binarize(downsample(x))


def steadiness(loss: np.ndarray) -> tuple[int, int, float]:
    """Of a held-out loss: how often it rose, of how many evaluations after the first, and the largest relative rise."""
    rises = np.diff(loss) / np.abs(loss[:-1])
    return int((rises > 0).sum()), len(rises), float(rises.max(initial=0.0))


def table(about: dict, quality: dict[str, dict], stability: dict, data: Data) -> list[dict]:
    """What was measured of both, in words; a row for each question."""
    (train, sample, measured), (train_ddpm, sampling, measured_ddpm) = about[VAE], about[DIFFUSION]
    each_ddpm, each_vae = sampling["seconds_per_image"], sample["generation_seconds"] / sample["samples"]
    rows = [
        ("latent space", f"{train['z_dim']} numbers", f"{data.test.x[0].size} numbers, noise as large as the image"),
        ("generation", "the decoder, once", f"the network, {sampling['steps']} times"),
    ]
    for key, spec in (("frechet", ".2f"), ("precision", ".1%"), ("recall", ".1%")):
        mine, drawn, other = (format(quality[name][f"{key}_of_samples"], spec) for name in (VAE, DRAWN, DIFFUSION))
        name = {"frechet": "Fréchet distance"}.get(key, key)
        real = format(quality[VAE][f"{key}_of_real"], spec)
        rows.append((f"quality: {name} (real images {real})", f"{mine}; pixels drawn {drawn}", other))
    rose = []
    for name in (VAE, DIFFUSION):
        rises, looks, most = stability[name]
        rose.append(f"rose at {rises} of {looks} looks, by {most:.1%} at most")
    rows += [
        ("stability: the held-out loss", *rose),
        (
            "likelihood, of different images",
            f"{measured['bits_per_pixel']:.3f} bits at most for a pixel of 2 shades",
            f"{measured_ddpm['bits_per_dimension']:.2f} bits at most for one of 256",
        ),
        (
            "speed: training",
            f"{train['training_seconds']:.0f} s, {train['parameters']:,} parameters, {train['train_images']:,} images",
            f"{train_ddpm['training_seconds']:.0f} s, {train_ddpm['parameters']:,}, {train_ddpm['train_images']:,}",
        ),
        ("speed: 1,000 images", f"{1000 * each_vae:.4f} s", f"{1000 * each_ddpm:.1f} s"),
    ]
    return [dict(zip(("measured", VAE, DIFFUSION), row, strict=True)) for row in rows]


def draw(kinds: dict[str, np.ndarray], large: np.ndarray, found: dict[str, float], floor: float, title: str):
    """The first images of each kind, unselected; the diffusion's also as large as it draws them."""
    figure, axes = new_figure(1, 5, width=13.5, height=3.6)
    above = {"real": f"test images\nas many others {floor:.2f}"}
    above |= {name: f"{name}\n{distance:.2f}" for name, distance in found.items()}
    for ax, (name, x) in zip(axes[0], [*kinds.items(), ("large", large)], strict=True):
        image_grid(ax, x[: GRID**2], GRID, vmin=0, vmax=255)
        ax.set_title(above.get(name, "diffusion, as it draws\n(not compared)"), fontsize=10)
    share, side = found[DIFFUSION] / found[VAE], kinds["real"].shape[-1]
    figure.suptitle(
        f"{title}, {side}×{side} of black and white: "
        f"the diffusion's Fréchet distance to test images is {share:.2f} of the VAE's"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
