"""Do Gabor features make an SVM robust to rotation, scaling, shift and noise that it was not trained on?

    python mnist_svm_gabor/invariance.py

Reads the two classifiers that train.py wrote (raw.npz, gabor.npz), distorts the 28×28 test images, and counts. Nothing
is retrained: the question is what the features give for free.

Writes invariance.png, metrics.json.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from mnist_svm_gabor.classifier import Classifier
from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.data import load_images, subset
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import find_output, start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import wilson_interval

NAMES = {"raw": "raw pixels", "gabor": "Gabor features"}


def build_parser():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--raw", metavar="FILE", help="classifier on raw pixels (default: train.py's raw.npz)")
    parser.add_argument("--gabor", metavar="FILE", help="classifier on Gabor features (default: train.py's gabor.npz)")
    parser.add_argument("--n", type=positive_int, help="test images (default: all)")
    return parser


def warp(x: np.ndarray, degrees: float = 0.0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Images uint8 (N, 1, H, W), turned counter-clockwise, enlarged about the middle, moved right by `shift` pixels.

    Bilinear; what comes from outside is black.
    """
    a = math.radians(degrees)
    # theta leads from an output position to the input position it shows, both from −1 to 1 across the image.
    inverse = torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) / scale
    offset = inverse @ torch.tensor([-2 * shift / x.shape[3], 0.0])
    theta = torch.cat([inverse, offset[:, None]], dim=1)[None]  # (1, 2, 3)
    grid = F.affine_grid(theta, [1, 1, *x.shape[2:]], align_corners=False)  # (1, H, W, 2)
    # One grid for all images: they are the channels of a single image.
    moved = F.grid_sample(torch.from_numpy(x[:, 0]).float()[None], grid, align_corners=False)  # (1, N, H, W)
    return moved[0, :, None].round().clamp(0, 255).to(torch.uint8).numpy()


def with_noise(x: np.ndarray, sigma: float, seed: int) -> np.ndarray:
    """x plus Gaussian noise of standard deviation `sigma` (in units of [0, 1]), clipped at black and white."""
    noise = np.random.default_rng(seed).standard_normal(x.shape, dtype=np.float32)
    return np.clip(np.rint(x + 255 * sigma * noise), 0, 255).astype(np.uint8)


def distortions(seed: int, quick: bool) -> dict[str, tuple[str, np.ndarray, Callable]]:
    """Name → (axis label, strengths, function of images and strength)."""
    thin = slice(None, None, 3 if quick else 1)  # the middle one, which changes nothing, stays
    return {
        "rotation": ("rotation (degrees)", np.arange(-45, 46, 5.0)[thin], lambda x, v: warp(x, degrees=v)),
        "scale": ("scale (factor)", np.arange(70, 131, 5)[thin] / 100, lambda x, v: warp(x, scale=v)),
        "shift": ("shift to the right (pixels of 28)", np.arange(-6, 7.0)[thin], lambda x, v: warp(x, shift=v)),
        "noise": (
            "noise, standard deviation (of 1)",
            np.arange(0, 0.61, 0.05)[thin],
            lambda x, v: with_noise(x, v, seed),
        ),
    }


def main(argv=None) -> dict:
    """Distort, classify, count; returns the metrics."""
    args = build_parser().parse_args(argv)
    rng, device = seed_everything(args.seed), pick_device(args.device)
    paths = {name: getattr(args, name) or find_output(args, "train", f"{name}.npz") for name in NAMES}
    classifiers = {name: Classifier.load(path) for name, path in paths.items()}
    test = load_images(args.dataset, "test", args.data_dir, shape=(1, 28, 28))
    for classifier in classifiers.values():
        classifier.check_classes(test)
    if args.n is not None:
        test = subset(test, args.n, rng)
    run = start_run(args)

    found: dict[str, dict] = {}
    for kind, (_, strengths, distort) in distortions(args.seed, args.quick).items():
        found[kind] = {"strength": strengths.tolist(), "raw": [], "gabor": []}
        for strength in strengths:
            x = distort(test.x, float(strength))
            for name, classifier in classifiers.items():
                found[kind][name].append(float((classifier.predict(x, device) == test.y).mean()))
            run.log(kind=kind, strength=float(strength), **{name: found[kind][name][-1] for name in NAMES})
    tolerated = [
        {
            "distortion": kind,
            **{name: tolerance(row["strength"], row[name], neutral=float(kind == "scale")) for name in NAMES},
        }
        for kind, row in found.items()
    ]
    save_figure(draw(found, len(test), test.title, args), run.path("invariance.png"))
    summary = {f"{name}_{key}": value for key, by_name in headline(found).items() for name, value in by_name.items()}
    return run.finish({"n": len(test), **summary, "tolerated": tolerated, "accuracy": found})


def tolerance(strengths: list[float], accuracies: list[float], neutral: float, level: float = 0.9) -> str:
    """The unbroken range of strengths around `neutral` in which accuracy stays at `level` or more, as text."""
    low = high = strengths.index(neutral)
    if accuracies[low] < level:
        return "none"
    while low > 0 and accuracies[low - 1] >= level:
        low -= 1
    while high < len(strengths) - 1 and accuracies[high + 1] >= level:
        high += 1
    return f"{strengths[low]:g} … {strengths[high]:g}"


def headline(found: dict) -> dict[str, dict[str, float]]:
    """Accuracies at a rotation of 30° (the mean of both directions) and under noise of 0.3, by kind of features."""
    turned, noisy = found["rotation"], found["noise"]
    at = [turned["strength"].index(angle) for angle in (-30.0, 30.0)]
    strong = int(np.argmin(np.abs(np.array(noisy["strength"]) - 0.3)))
    return {
        "at_30_degrees": {name: float(np.mean([turned[name][i] for i in at])) for name in NAMES},
        "under_noise": {name: noisy[name][strong] for name in NAMES},
    }


def draw(found: dict, n: int, title: str, args):
    """Accuracy against strength, a panel per distortion, with 95 % Wilson bands."""
    figure, axes = new_figure(2, 2, width=11, height=7.5, sharey=True)
    for ax, (kind, (label, _, _)) in zip(axes.flat, distortions(args.seed, args.quick).items(), strict=True):
        for index, (name, shown) in enumerate(NAMES.items()):
            values = np.array(found[kind][name])
            band = np.array([wilson_interval(round(value * n), n) for value in values]) * 100
            x = found[kind]["strength"]
            ax.plot(x, 100 * values, marker="o", markersize=3, label=shown, **line_style(index))
            ax.fill_between(x, band[:, 0], band[:, 1], color=COLORS[index], alpha=0.2, linewidth=0)
        ax.set(xlabel=label, title=kind)
    for ax in axes[:, 0]:
        ax.set_ylabel("test accuracy (%)")
    axes[0, 0].legend()
    turned, noisy = ({name: f"{100 * v:.0f} %" for name, v in part.items()} for part in headline(found).values())
    figure.suptitle(
        f"{title}, {n:,} test images. Turned by ±30°: raw pixels {turned['raw']} right, Gabor {turned['gabor']};\n"
        f"under noise of 0.3: raw pixels {noisy['raw']}, Gabor {noisy['gabor']}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
