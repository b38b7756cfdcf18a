"""How near are the samples to real digits, are they new, and how many bits does a pixel cost?

    python ddpm/evaluate.py
    python ddpm/evaluate.py --samples runs/ddpm/sampling_ddim/samples.npz --out runs/ddpm/evaluate_ddim

A small classifier, trained here on the training images, gives the features (features.py): the Fréchet distance of the
samples to the test images stands beside the floor, the distance of as many held-out real images. The classifier also
says which classes the samples are of, how sure it is, and, where a class was asked for, whether it was drawn. Precision
and recall say whether it is quality or variety that is missing.

Are they copies? Each sample's nearest training image stands beside it (nearest.png), with the distances of test images
to theirs for comparison. And on noisy images the network is compared with the best denoiser of the training set, a
memoriser (memoriser.py): a network that learned by heart would come near to it on training images, and be no better on
others. The variational bound says how many bits a pixel of a test image costs at most (likelihood.py).

Writes classes.png, nearest.png, loss_by_level.png, metrics.json. Model: train_ddpm.py; samples: sampling.py.
Sources: Heusel et al. 2017; Kynkäänniemi et al. 2019; Ho, Jain and Abbeel 2020; Karras et al. 2022.
Shapes: N images uint8 (N, C, H, W), K classes, L noise levels.
"""

from pathlib import Path

import numpy as np
import torch

from ddpm.checkpoints import add_ckpt_flag, fingerprint, load_model
from ddpm.diffusion import GaussianDiffusion, Model
from ddpm.features import covered, frechet_distance, frechet_error, nearest, seen, trained
from ddpm.inputs import FEWEST, Data, add_data_flags, load, scaled
from ddpm.likelihood import bits_per_dimension
from ddpm.memoriser import memoriser
from ddpm.unet import UNet
from shared_utils.checkpoint import load_arrays
from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, image_grid, new_figure, save_figure
from shared_utils.runs import find_output, start_run
from shared_utils.seeding import seed_everything

LEVELS = 20  # steps at which the network and the memoriser are compared
SHOWN = 10  # samples of nearest.png


def build_parser():
    """The command line."""
    quick = {"epochs": 1, "compared": 100, "level_images": 20, "bound_images": 10}
    parser = make_parser(__doc__, quick=quick)
    add_data_flags(parser)
    add_ckpt_flag(parser)
    parser.add_argument("--samples", metavar="FILE", help="what sampling.py wrote (default: its samples.npz)")
    parser.add_argument("--epochs", type=positive_int, default=5, help="of the classifier")
    parser.add_argument("--compared", type=positive_int, default=2000, help="images whose nearest neighbour is found")
    parser.add_argument("--level-images", type=positive_int, default=200, help="images at each noise level")
    parser.add_argument("--bound-images", type=positive_int, default=500, help="test images whose bound is computed")
    return parser


def main(argv=None) -> dict:
    """Measure; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load(args)
    model, diffusion, _ = load_model(args, device, len(data.val))
    path = Path(args.samples) if args.samples else find_output(args, "sampling", "samples.npz")
    samples, labels = read_samples(path, data, fingerprint(model))
    run = start_run(args)
    seed_everything(args.seed)
    classifier = trained(data.train, len(data.classes), args.epochs, args.seed, device)
    features, probabilities = {}, {}
    for name, x in (("samples", samples), ("real", data.val.x), ("test", data.test.x)):
        features[name], probabilities[name] = seen(classifier, x)
    compared = distances(features)
    found = {
        "frechet_error": frechet_error(features["samples"][: compared["compared_images"]], features["test"]),
        "accuracy": float((probabilities["test"].argmax(1) == data.test.y).mean()),
        **compared,
        **classes(probabilities, labels),
    }
    save_figure(draw_classes(probabilities, data, found), run.path("classes.png"))
    rng = np.random.default_rng(args.seed)
    some = rng.permutation(len(samples))[: args.compared], rng.permutation(len(data.test))[: args.compared]
    far = {"samples": nearest(samples[some[0]], data.train.x), "test": nearest(data.test.x[some[1]], data.train.x)}
    found |= {f"nearest_of_{name}": float(np.median(distance)) for name, (distance, _) in far.items()}
    save_figure(draw_nearest(samples[some[0]], far, data, found), run.path("nearest.png"))
    levels = losses_at_levels(diffusion, model, data, args.level_images, device)
    middle = sorted(levels)[len(levels) // 2]
    found |= {"middle_step": middle, **generalisation(levels[middle])}
    save_figure(draw_levels(diffusion, levels, data.title, found), run.path("loss_by_level.png"))
    x0 = scaled(torch.from_numpy(data.test.x[rng.permutation(len(data.test))[: args.bound_images]]).to(device))
    bound = bits_per_dimension(diffusion, model, x0)
    return run.finish(
        {
            "model": fingerprint(model),
            "samples": len(samples),
            **found,
            "bits_per_dimension": bound["sum"],
            "bits_error": bound["standard_error"],
            "bound": bound,
            "levels": [
                {"step": step, **{name: float(loss) for name, loss in at.items()}} for step, at in levels.items()
            ],
        }
    )


def read_samples(path: Path, data: Data, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (N, C, H, W) and the labels asked for, −1 for none, (N,), of sampling.py's file.

    model: the fingerprint of the one that is measured. Errors: `UserError` when another drew them, when they are not
    images like the data's, or fewer than `FEWEST`.
    """
    arrays = load_arrays(path, required=("images", "labels", "model"))
    images, labels = arrays["images"], arrays["labels"]
    images = images[:, None] if images.ndim == 3 else np.moveaxis(images, -1, 1)
    if images.dtype != np.uint8 or images.shape[1:] != data.test.x.shape[1:] or len(images) != len(labels):
        raise UserError(f"{path} holds {images.dtype} {images.shape[1:]}, not images like {data.title}'s")
    if len(images) < FEWEST:
        raise UserError(f"{path} holds {len(images)} images: draw {FEWEST} or more, 10,000 to compare with others")
    if str(arrays["model"]) != model:
        raise UserError(f"{path} was drawn by another model: give that one by --ckpt, or draw again with sampling.py")
    return images, labels


def distances(features: dict[str, np.ndarray]) -> dict[str, float]:
    """Fréchet distance to the test images, precision and recall: of the samples and of as many real images."""
    n = min(len(features["samples"]), len(features["real"]))
    found = {}
    for name in ("samples", "real"):
        some, k = features[name][:n], min(3, n - 1)
        found[f"frechet_of_{name}"] = frechet_distance(some, features["test"])
        found[f"precision_of_{name}"] = covered(some, features["test"], k)
        found[f"recall_of_{name}"] = covered(features["test"], some, k)
    return {"compared_images": n, **found, "times_the_floor": found["frechet_of_samples"] / found["frechet_of_real"]}


def classes(probabilities: dict[str, np.ndarray], labels: np.ndarray) -> dict:
    """The share of each class among the samples, how sure the classifier is, and how many are what was asked for."""
    chosen, k = probabilities["samples"].argmax(1), probabilities["samples"].shape[1]
    share, asked = np.bincount(chosen, minlength=k) / len(chosen), labels >= 0
    return {
        "class_shares": share.tolist(),
        "smallest_share": share.min(),
        "largest_share": share.max(),
        "confidence_of_samples": probabilities["samples"].max(1).mean(),
        "confidence_of_test": probabilities["test"].max(1).mean(),
        "as_asked": float((chosen[asked] == labels[asked]).mean()) if asked.any() else None,
    }


@torch.no_grad()
def losses_at_levels(
    diffusion: GaussianDiffusion, model: UNet, data: Data, n: int, device: torch.device
) -> dict[int, dict[str, float]]:
    """Step → mean squared error of network and memoriser on noisy training and test images, n of each."""
    known = memoriser(diffusion, data.train.x, device)
    rng = np.random.default_rng(0)
    images = {
        name: scaled(torch.from_numpy(part.x[rng.permutation(len(part))[:n]]).to(device))
        for name, part in (("training", data.train), ("test", data.test))
    }

    def loss(denoiser: Model, x0: torch.Tensor, step: int) -> float:
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(step)).to(device)
        t = torch.full((len(x0),), step, device=device)
        # The error of x̂_0 rather than of ε or v, so that all are compared in one unit, that of the pixels.
        x_t = diffusion.q_sample(x0, t, noise)
        return (diffusion.denoised(denoiser, x_t, t) - x0).square().mean().item()

    found = {}
    for step in diffusion.steps_of(min(LEVELS, diffusion.timesteps))[::-1]:
        found[step] = {
            f"{who} on {name} images": loss(denoiser, x0, step)
            for who, denoiser in (("network", model), ("memoriser", known))
            for name, x0 in images.items()
        }
    return found


def generalisation(at: dict[str, float]) -> dict[str, float]:
    """How many times as wrong each is on test images as on training images, at one level of `losses_at_levels`."""
    return {
        f"{who}_on_test_against_training": at[f"{who} on test images"] / max(at[f"{who} on training images"], 1e-12)
        for who in ("network", "memoriser")
    }


def draw_classes(probabilities: dict[str, np.ndarray], data: Data, found: dict):
    """The share of each class among the samples and the test images; how sure the classifier is of each."""
    figure, axes = new_figure(1, 2, width=10.4, height=4.2)
    left, right = axes[0]
    k = len(data.classes)
    at, real = np.arange(k), np.bincount(data.test.y, minlength=k) / len(data.test)
    left.bar(at - 0.2, 100 * np.array(found["class_shares"]), 0.4, label="samples, as classified")
    left.bar(at + 0.2, 100 * real, 0.4, color=COLORS[1], label="test images")
    left.set_xticks(at, data.classes, rotation=0 if k <= 10 and max(map(len, data.classes)) < 3 else 40)
    left.set(xlabel="class", ylabel="share (%)")
    left.set_ylim(top=1.3 * max(left.get_ylim()[1], 100 * real.max()))
    left.legend(loc="upper right")
    for name, color in (("samples", COLORS[0]), ("test", COLORS[1])):
        sure = np.sort(probabilities[name].max(1))
        right.plot(np.linspace(0, 100, len(sure)), sure, color=color, label=f"{name}, mean {sure.mean():.3f}")
    right.set(xlabel="images, the least sure first (%)", ylabel="probability of the likeliest class")
    right.legend(loc="lower right")
    figure.suptitle(
        f"{data.title}: Fréchet distance {found['frechet_of_samples']:.3f} ± {found['frechet_error']:.3f}, "
        f"{found['times_the_floor']:.1f} times real images' own;\n"
        f"classes from {found['smallest_share']:.1%} to {found['largest_share']:.1%} of the samples"
    )
    return figure


def draw_nearest(samples: np.ndarray, far: dict, data: Data, found: dict):
    """Samples above their nearest training images, and how far samples and test images are from theirs."""
    figure, axes = new_figure(2, 1, width=8.4, height=6.2)
    top, bottom = axes[:, 0]
    pairs = np.concatenate([samples[:SHOWN], data.train.x[far["samples"][1][:SHOWN]]])
    image_grid(top, pairs, min(SHOWN, len(samples)), vmin=0, vmax=255)
    top.set_title("samples (above) and the training images nearest to them", fontsize=10)
    bins = np.linspace(0, max(distance.max() for distance, _ in far.values()), 50)
    for name, color in (("samples", COLORS[0]), ("test", COLORS[1])):
        label = f"{name}, median {found[f'nearest_of_{name}']:.2f}"
        bottom.hist(far[name][0], bins, density=True, histtype="step", linewidth=1.6, color=color, label=label)
    bottom.set(xlabel="distance to the nearest training image (pixels from 0 to 1)", ylabel="density")
    bottom.legend()
    nearer = "nearer to" if found["nearest_of_samples"] < found["nearest_of_test"] else "no nearer to"
    figure.suptitle(f"{data.title}: the samples are {nearer} the training images than test images are")
    return figure


def draw_levels(diffusion: GaussianDiffusion, levels: dict[int, dict[str, float]], title: str, found: dict):
    """The error in x_0 of network and memoriser against the noise."""
    figure, axes = new_figure(width=7.6, height=4.6)
    ax, steps = axes[0, 0], list(levels)
    noise = [((1 - diffusion.alpha_bars[step]) / diffusion.alpha_bars[step]) ** 0.5 for step in steps]
    for name in next(iter(levels.values())):
        who, dashed = name.split()[0], "test" in name
        style = {"color": COLORS[0] if who == "network" else COLORS[1], "linestyle": "--" if dashed else "-"}
        ax.plot(noise, [levels[step][name] for step in steps], label=name, **style)
    ax.set(xscale="log", yscale="log", xlabel="noise against signal, √((1 − ᾱ) / ᾱ)", ylabel="mean squared error of x̂₀")
    ax.set_ylim(bottom=1e-6)  # what the memoriser knows for certain lies below
    ax.legend(loc="lower right")
    ax.axvline(noise[steps.index(found["middle_step"])], color="#999999", linewidth=1, linestyle=":")
    figure.suptitle(
        f"{title}: at step {found['middle_step']} the network is "
        f"{found['network_on_test_against_training']:.2f} times as wrong on test as on training images,\n"
        f"the memoriser {found['memoriser_on_test_against_training']:.3g} times"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
