"""How good is the autoencoder: what likelihood does it give unseen digits, and do its samples look like digits?

    python vae/evaluate.py
    python vae/evaluate.py --ckpt runs/vae/train_z2/best.pth --out runs/vae/evaluate_z2

Likelihood, in nats per test image: the ELBO, the tighter bound IWAE-k for k up to `--k`, and for a model of one or two
latents the exact value by quadrature (exact.py), which both must stay below:

    ELBO ≤ IWAE-k ≤ log p(x);      bits per pixel = −log p(x) / (196 log 2)

IWAE-k draws from the encoder's Gaussian: where that is narrow and sits beside the true posterior, or on one of several
modes, no affordable k makes up for it, and the bound stays low. The exact value shows by how much.

Beside it stand three models without a network whose likelihood is exact (baselines.py): independent pixels, a mixture
of Bernoullis (its size chosen on a fifth of the training images), a Chow-Liu tree.

Samples: a small classifier trained on the same real digits classifies 10,000 samples of each model. A model whose
samples it classifies with confidence, each class as often as in the data, can draw digits; confidence alone says
little, since noise is classified with confidence too.

Writes likelihood.png, iwae.png, sample_quality.png, metrics.json.
Sources: Burda, Grosse and Salakhutdinov 2016; Chow and Liu 1968.
Shapes: N test images, k samples of the latent, G values of k, K classes, D = 196 pixels.
"""

import math

import numpy as np
import torch
from torch import Tensor

from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.data import split_positions
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, image_grid, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import mean_std
from vae.baselines import BernoulliMixture, ChowLiuTree, IndependentBernoulli
from vae.classifier import class_probabilities, train_classifier
from vae.exact import exact_log_likelihood
from vae.inputs import SIDE, Inputs, add_data_flags, load_binary
from vae.model import ROWS, VAE, add_ckpt_flag, load_model

BATCH = 100  # images whose bounds are computed at once
ELBO_SAMPLES = 100  # draws of the latent for each image
GRID_POINTS = 401  # of the quadrature, along each latent
CLASSIFIER_EPOCHS = 12
SHOWN = 12  # samples of each model in the figure


@torch.inference_mode()
def bounds(model: VAE, x: Tensor, ks: list[int]) -> np.ndarray:
    """IWAE-k of every image for each k: x (N, D) → (G, N), in nats; k = 1 estimates the ELBO.

    The weights drawn for the largest k serve the smaller ones too: IWAE-k is the mean over all full groups of k.
    """
    most, parts = max(ks), []
    for batch in x.split(BATCH):
        at_once = max(1, ROWS // len(batch))
        sizes = [min(at_once, most - done) for done in range(0, most, at_once)]
        weights = torch.cat([model.log_weights(batch, size) for size in sizes])  # (k, B)
        rows = []
        for k in ks:
            groups = weights[: most // k * k].reshape(-1, k, len(batch))  # (groups, k, B)
            rows.append(groups.logsumexp(1).cpu().double().mean(0) - math.log(k))  # (B,)
        parts.append(torch.stack(rows))  # (G, B)
    return torch.cat(parts, dim=1).cpu().numpy()


def fit_baselines(data: Inputs, sizes: list[int], rng: np.random.Generator) -> dict:
    """Name → fitted baseline; the mixture's number of components is chosen on held-out images."""
    fit_at, held_at = split_positions(data.y_train, max(1, len(data.y_train) // 5))
    held = {
        size: BernoulliMixture(size).fit(data.x_train[fit_at], rng).log_likelihood(data.x_train[held_at]).mean()
        for size in sizes
    }
    best = max(held, key=held.get)
    return {
        "independent pixels": IndependentBernoulli().fit(data.x_train),
        f"mixture of {best} Bernoullis": BernoulliMixture(best).fit(data.x_train, rng),
        "Chow-Liu tree": ChowLiuTree().fit(data.x_train),
    }


@torch.inference_mode()
def measure(model: VAE, x: Tensor, ks: list[int]) -> dict[str, np.ndarray]:
    """Per image, in nats: `reconstruction`, `kl`, `elbo` (N,), `iwae` (G, N); with ≤ 2 latents `exact`, `coarse` (N,).

    `coarse` has half the points along each axis. The relative error of the sum is about 2 exp(−2π²s²/h²) for a
    posterior of standard deviation s, points h apart: that of `exact` is about the fourth power of that of `coarse`.
    """
    terms = [torch.stack(model.elbo_terms(part, ELBO_SAMPLES)) for part in x.split(BATCH)]  # (2, B) each
    reconstruction, kl = torch.cat(terms, dim=1).cpu().double().numpy()  # (N,) each
    found = {"reconstruction": reconstruction, "kl": kl, "elbo": reconstruction - kl, "iwae": bounds(model, x, ks)}
    if model.z_dim <= 2:
        for name, points in (("exact", GRID_POINTS), ("coarse", GRID_POINTS // 2)):
            found[name] = exact_log_likelihood(model, x, points).cpu().double().numpy()
    return found


def bits_per_pixel(nats: float) -> float:
    """−log₂ p(x) / D of a log-likelihood in nats per image."""
    return -nats / (SIDE * SIDE * math.log(2))


def likelihood_row(name: str, nats: np.ndarray, parameters: int) -> dict:
    """The mean of the images' log-likelihoods (N,), its standard error, and the model's size."""
    return {
        "model": name,
        "parameters": parameters,
        "test_log_likelihood": float(nats.mean()),
        "standard_error": mean_std(nats)[1] / math.sqrt(len(nats)),
        "bits_per_pixel": bits_per_pixel(float(nats.mean())),
    }


def read_samples(
    model: VAE, baselines: dict, data: Inputs, n: int, rng: np.random.Generator, device: torch.device
) -> tuple[list[dict], float, dict[str, np.ndarray]]:
    """How a classifier trained on the real digits labels n samples of each model.

    Returns a row for each source, the classifier's accuracy on the test images, and `SHOWN` samples of each source.
    """
    classifier = train_classifier(data.x_train, data.y_train, len(data.classes), CLASSIFIER_EPOCHS, device, rng)
    accuracy = float((class_probabilities(classifier, data.x_test).argmax(1) == data.y_test).mean())
    with torch.inference_mode():
        p = model.decode(torch.randn(n, model.z_dim, device=device)).sigmoid().cpu().numpy()  # (n, D)
    sources = {"test images": data.x_test, "VAE, cut at ½": p > 0.5, "VAE": rng.random(p.shape) < p}
    sources |= {name: baseline.sample(n, rng) for name, baseline in reversed(baselines.items())}
    rows = []
    for name, images in sources.items():
        p = class_probabilities(classifier, images.astype(np.float32))  # (n, K)
        shares = np.bincount(p.argmax(1), minlength=len(data.classes)) / len(p)
        entropy = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
        row = {
            "source": name,
            "mean_confidence": float(p.max(1).mean()),
            "above_90_percent": float((p.max(1) > 0.9).mean()),
        }
        rows.append({**row, "effective_classes": float(np.exp(entropy)), "class_shares": shares})
    return rows, accuracy, {name: images[:SHOWN] for name, images in sources.items()}


def build_parser():
    """The command line."""
    quick = {"per_class": 100, "val_size": 100, "k": 500, "images": 100, "mixture_sizes": [10, 20], "samples": 1000}
    parser = make_parser(__doc__, quick=quick)
    add_data_flags(parser)
    add_ckpt_flag(parser)
    parser.add_argument("--k", type=positive_int, default=5000, help="samples of the latent in the tightest bound")
    parser.add_argument("--images", type=positive_int, help="test images of the likelihoods (default: all)")
    parser.add_argument("--samples", type=positive_int, default=10_000, help="samples of each model")
    parser.add_argument(
        "--mixture-sizes",
        type=positive_int,
        nargs="+",
        default=[50, 100, 200, 400, 800, 1600, 3200],
        help="numbers of components to choose from",
    )
    return parser


@cpu_threads(1)
def main(argv=None) -> dict:
    """Evaluate the model and the baselines; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    model = load_model(args, device)
    data = load_binary(args)
    sizes = [size for size in dict.fromkeys(args.mixture_sizes) if size <= 0.8 * len(data.x_train)]
    if not sizes:
        raise UserError(f"--mixture-sizes: {len(data.x_train)} training images are too few for any of these sizes")
    run = start_run(args)
    rng = seed_everything(args.seed)

    x_test = data.x_test[: args.images]
    ks = sorted({k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000) if k < args.k} | {args.k})
    nats = measure(model, torch.from_numpy(x_test).to(device), ks)
    baselines = fit_baselines(data, sizes, rng)

    vae, decoder = f"VAE, {model.size}", sum(p.numel() for p in model.decoder.parameters())
    table = [likelihood_row(name, b.log_likelihood(x_test), b.parameters) for name, b in baselines.items()]
    table += [likelihood_row(f"{vae}: ELBO", nats["elbo"], decoder)]
    table += [likelihood_row(f"{vae}: IWAE-{args.k:,}", nats["iwae"][-1], decoder)]
    if "exact" in nats:
        table.append(likelihood_row(f"{vae}: exact", nats["exact"], decoder))
    quality, accuracy, shown = read_samples(model, baselines, data, args.samples, rng, device)
    for row in table:
        print(f"{row['model']:32}{row['test_log_likelihood']:9.3f} ± {row['standard_error']:.3f} nats per test image")
    for row in quality:
        print(f"{row['source']:32}{row['mean_confidence']:9.1%} sure, {row['effective_classes']:.1f} effective classes")

    title = f"{data.title}, {model.size}"
    save_figure(draw_likelihoods(table, title), run.path("likelihood.png"))
    save_figure(draw_bounds(ks, nats, title), run.path("iwae.png"))
    save_figure(draw_quality(shown, quality, data, accuracy, model.size), run.path("sample_quality.png"))
    metrics = {
        "z_dim": model.z_dim,
        "test_images": len(x_test),
        "k": args.k,
        "test_elbo": nats["elbo"].mean(),
        "test_reconstruction": nats["reconstruction"].mean(),
        "test_kl": nats["kl"].mean(),
        "test_iwae": nats["iwae"][-1].mean(),
        "gap": (nats["iwae"][-1] - nats["elbo"]).mean(),
        "bits_per_pixel": bits_per_pixel(nats["iwae"][-1].mean()),
        "iwae_by_k": {str(k): value for k, value in zip(ks, nats["iwae"].mean(1), strict=True)},
        "likelihoods": table,
        "classifier_test_accuracy": accuracy,
        "samples": quality,
    }
    if "exact" in nats:
        metrics["test_exact"] = nats["exact"].mean()
        metrics["exact_minus_iwae"] = (nats["exact"] - nats["iwae"][-1]).mean()
        metrics["exact_minus_elbo"] = (nats["exact"] - nats["elbo"]).mean()
        metrics["quadrature_change_at_half_the_points"] = np.abs(nats["exact"] - nats["coarse"]).max()
    return run.finish(metrics)


def draw_likelihoods(table: list[dict], title: str):
    """A bar for each model: how many nats an unseen image costs, the fewer the better."""
    figure, axes = new_figure(width=8.6, height=0.55 * len(table) + 1.6)
    ax = axes[0, 0]
    names, cost = [row["model"] for row in table], np.array([-row["test_log_likelihood"] for row in table])
    colors = [COLORS[0] if name.startswith("VAE") else "#999999" for name in names]
    ax.barh(range(len(table)), cost, color=colors, xerr=[1.96 * row["standard_error"] for row in table])
    for at, (row, value) in enumerate(zip(table, cost, strict=True)):
        text = f"{value:.2f}  ({row['bits_per_pixel']:.3f} bits per pixel)"
        ax.text(value + 1.96 * row["standard_error"] + 0.01 * cost.max(), at, text, va="center", fontsize=9)
    ax.set_yticks(range(len(table)), names)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set(xlabel="−log p(x) or its bound, nats per test image (line: 95 %)", xlim=(0, 1.4 * cost.max()))
    others = [value for name, value in zip(names, cost, strict=True) if not name.startswith("VAE")]
    figure.suptitle(
        f"{title}\nan image costs {cost[-1]:.1f} nats, {min(others):.1f} with the best model without a network"
    )
    return figure


def draw_bounds(ks: list[int], nats: dict[str, np.ndarray], title: str):
    """The mean bound against k, with the ELBO and, where it is known, the exact value."""
    figure, axes = new_figure(width=7.4, height=4.4)
    ax, mean = axes[0, 0], nats["iwae"].mean(1)
    ax.plot(ks, mean, marker="o", markersize=4, color=COLORS[0], label="IWAE-k")
    elbo = nats["elbo"].mean()
    ax.axhline(elbo, color=COLORS[1], linestyle="--", label=f"ELBO: {elbo:.3f}")
    if "exact" in nats:
        exact = nats["exact"].mean()
        ax.axhline(exact, color="black", linestyle=":", label=f"exact, by quadrature: {exact:.3f}")
        left = f"IWAE-{ks[-1]:,} is {exact - mean[-1]:.3f} nats below the exact likelihood, the ELBO {exact - elbo:.2f}"
    else:
        left = f"IWAE-{ks[-1]:,} is {mean[-1]:.2f} nats, {mean[-1] - elbo:.2f} above the ELBO"
    ax.set(xscale="log", xlabel="k, samples of the latent per image", ylabel="log-likelihood (nats per test image)")
    ax.legend(loc="center right")
    figure.suptitle(f"{title}\n{left}")
    return figure


def draw_quality(shown: dict[str, np.ndarray], quality: list[dict], data: Inputs, accuracy: float, size: str):
    """Samples of each source, the classes that the classifier gives them, and how sure it is."""
    figure, axes = new_figure(1, 2, width=12.5, height=0.5 * len(shown) + 1.2, width_ratios=(1.25, 1))
    images = np.concatenate(list(shown.values())).reshape(-1, SIDE, SIDE)
    image_grid(axes[0, 0], images, SHOWN, vmin=0, vmax=1)
    for at, row in enumerate(quality):
        label = f"{row['source']}\n{row['mean_confidence']:.1%} sure"
        axes[0, 0].text(-2, 7 + (SIDE + 1) * at, label, ha="right", va="center", fontsize=9)
    shares = 100 * np.array([row["class_shares"] for row in quality])  # (sources, K)
    ax = axes[0, 1]
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=max(30, shares.max()), aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        color = "white" if share > 0.6 * max(30, shares.max()) else "black"
        ax.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=8, color=color)
    ax.set_xticks(range(len(data.classes)), data.classes)
    ax.set_yticks([])
    ax.grid(False)
    ax.set(xlabel="class read by the classifier", title="samples of each class (%)")
    sure = {row["source"]: f"{row['mean_confidence']:.0%}" for row in quality}
    said = f"{sure['test images']} sure on real digits, {sure['VAE, cut at ½']} on the autoencoder's, cut at ½"
    figure.suptitle(f"{data.title}, {size}: a classifier ({accuracy:.1%} right) is {said}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
