"""What does a trained autoencoder make of images it has never seen, and what do its first weights look for?

    python autoencoder/ae_process_test.py
    python autoencoder/ae_process_test.py --variant denoising
    python autoencoder/ae_process_test.py --ckpt runs/autoencoder/mine/best.pth --dataset fashion

Every test image's code z, its reconstruction ŷ and its error; and the encoder's weights as images. A unit of the first
layer responds to x·w γ/√(σ² + ε) where BatchNorm follows, so w is shown with that scale; the units of the second layer
are traced back to the pixels by the product W0 W1 of the scaled matrices, which leaves out the activation between them.

A code is useful when nearby codes mean similar images: the 5 nearest among the codes of all training images vote for a
test image's class, compared with the 5 nearest in pixels and in PCA's code of the same size (the only use of labels).
Nearest is by Euclidean distance, and for comparison by the angle between codes after the mean code is subtracted.

Writes ae_fashion_test_processed.npz, ae_fashion_filters_l1.png, ae_fashion_filters_l2_backproj.png,
ae_fashion_recon_grid.png, ae_fashion_best_worst.png, metrics.json. In the .npz are Z (N, K), Yhat (N, 784) in [0, 1],
mse (N,), y (N,), all in the data set's own order, and dataset, its name.
Shapes: N images, 784 pixels, K numbers of the code, M units.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from autoencoder.embedding import vote_accuracy
from autoencoder.fitting import codes
from autoencoder.inputs import SIDE, Inputs, add_data_flags, first_of_each, load_pixels, pixels
from autoencoder.models import Autoencoder
from autoencoder.pca import fit_pca
from autoencoder.trained import VARIANTS, find_trained, load_trained, process
from shared_utils.checkpoint import save_arrays
from shared_utils.cli import make_parser, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import image_grid, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.stats import wilson_interval

FILTERS, ACROSS = 56, 14  # how many are shown (those with the largest weights), and in a row


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset="fashion", quick={"val_size": 200})
    add_data_flags(parser)
    parser.add_argument(
        "--variant", choices=VARIANTS, default="baseline", help="whose checkpoint to read; names the folder too"
    )
    parser.add_argument("--ckpt", metavar="FILE", help="another checkpoint of ae_experiments.py")
    return parser


@torch.no_grad()
def main(argv=None) -> dict:
    """Process the test images; returns the metrics."""
    args = build_parser().parse_args(argv)
    args.script = VARIANTS[args.variant].replace("ae_experiments", "ae_process_test")  # each has its own folder
    device = pick_device(args.device)
    data = load_pixels(args, device)
    path = args.ckpt or find_trained(args, args.variant)
    trained = load_trained(path, args, data.x_test.shape[1], device)
    run = start_run(args)

    model = trained.model
    found = process(model, data.x_test, data.y_test, args.dataset)
    save_arrays(run.path("ae_fashion_test_processed.npz"), **found)
    z, output, errors = (torch.from_numpy(found[name]).to(device) for name in ("Z", "Yhat", "mse"))

    about = f"{data.title}: {trained.recipe}"
    weights = model.effective_weights()
    localised = half_energy(weights[0])
    title = f"{about}\nfirst layer: half of a unit's squared weight lies in {localised:.0f} of 784 pixels (median)"
    save_figure(draw_filters(weights[0], title), run.path("ae_fashion_filters_l1.png"))
    traced = weights[0] @ weights[1] if len(weights) > 1 else weights[0]  # (784, M)
    traced_localised = half_energy(traced)
    layer = "second layer, traced back to the pixels" if len(weights) > 1 else "the only layer"
    title = f"{about}\n{layer}: half of a unit's squared weight lies in {traced_localised:.0f} pixels (median)"
    save_figure(draw_filters(traced, title), run.path("ae_fashion_filters_l2_backproj.png"))
    save_figure(draw_reconstructions(data, output, errors, about), run.path("ae_fashion_recon_grid.png"))
    save_figure(draw_extremes(data, output, errors, about), run.path("ae_fashion_best_worst.png"))

    by_class = []
    for label, name in enumerate(data.classes):
        own = errors[data.y_test == label].cpu().double()
        if len(own):
            worst = own.max().item()
            by_class.append({"class": name, "images": len(own), "mse": own.mean().item(), "worst": worst})
    covariance = torch.cov(z.cpu().double().T).reshape(model.latent, model.latent)
    return run.finish(
        {
            "checkpoint": str(trained.recipe),
            "latent": model.latent,
            "val_recon": trained.val_recon,
            "test_recon": errors.mean().item(),
            "test_recon_median": errors.median().item(),
            "share_of_the_worst_tenth": errors.sort().values[-max(1, len(errors) // 10) :].sum().item()
            / errors.sum().item(),
            "by_class": by_class,
            "pixels_of_half_a_filter": localised,
            "pixels_of_half_a_traced_filter": traced_localised,
            # The participation ratio: this many uncorrelated numbers of equal variance would have the same.
            "effective_dimensions": (covariance.trace() ** 2 / covariance.square().sum()).item(),
            "neighbours": neighbour_rows(data, model),
        }
    )


def neighbour_rows(data: Inputs, model: Autoencoder) -> list[dict]:
    """Accuracy of the 5 nearest training images in pixels, PCA's code and the autoencoder's, as rows for a table.

    low, high: Wilson's 95 % interval of "accuracy", by distance; "cosine_accuracy" is by angle.
    """
    pca = fit_pca(data.x_train, model.latent)
    spaces = {"pixels": pixels, f"PCA, {model.latent} numbers": pca.project}
    spaces[f"autoencoder, {model.latent} numbers"] = partial(codes, model)
    n, rows = len(data.y_test), []
    for name, code in spaces.items():
        row = {"space": name, "accuracy": vote_accuracy(code, data)}
        row["low"], row["high"] = wilson_interval(round(row["accuracy"] * n), n)
        mean = code(data.x_train).mean(0)
        row["cosine_accuracy"] = vote_accuracy(partial(directions, code, mean), data)
        rows.append(row)
        interval = f"{row['accuracy']:.2%} ({row['low']:.2%} to {row['high']:.2%})"
        print(f"5 nearest in {name}: {interval}, by angle {row['cosine_accuracy']:.2%}", flush=True)
    return rows


def directions(code: Callable[[Tensor], Tensor], mean: Tensor, x: Tensor) -> Tensor:
    """The codes of x less their mean (K,), scaled to length 1: their distances grow with the angle. (N, K)."""
    centred = code(x) - mean
    return centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-12)


def half_energy(weights: Tensor) -> float:
    """In how many pixels half of a unit's squared weight lies, the largest first: the median over units of (784, M)."""
    energy = weights.square().sort(0, descending=True).values.cumsum(0)  # (784, M)
    return ((energy < energy[-1] / 2).sum(0) + 1).float().median().item()


def draw_filters(weights: Tensor, title: str):
    """The units with the largest weights (784, M), each scaled to its own largest weight."""
    order = weights.norm(dim=0).argsort(descending=True)[:FILTERS]
    shown = (weights / weights.abs().amax(0).clamp(min=1e-12))[:, order].T.reshape(-1, SIDE, SIDE).cpu().numpy()
    columns = min(ACROSS, len(shown))
    figure, axes = new_figure(width=10, height=1.3 + 0.66 * -(-len(shown) // columns))
    image_grid(axes[0, 0], shown, columns, vmin=-1, vmax=1, cmap="RdBu_r")
    figure.colorbar(axes[0, 0].images[0], ax=axes[0, 0], label="weight / largest")
    of = f"{len(shown)} of {weights.shape[1]} units, those with the largest weights first"
    figure.suptitle(f"{title}\n{of}", fontsize=11)
    return figure


def draw_reconstructions(data: Inputs, output: Tensor, errors: Tensor, about: str):
    """The first two test images of each class above their reconstructions, with the error of each."""
    labels = data.y_test.cpu().numpy()
    chosen = first_of_each(data.y_test, 2, len(data.classes)).cpu().numpy()
    figure, axes = new_figure(2, 1, width=12.5, height=2.9)  # two names of two words fit side by side
    named = [data.classes[labels[i]].split("/")[0] for i in chosen]
    for ax, values, under, what in (
        (axes[0, 0], pixels(data.x_test), named, "test images"),
        (axes[1, 0], output, [f"{errors[i]:.4f}" for i in chosen], "reconstructions, and their MSE"),
    ):
        image_grid(ax, images_at(values, chosen), len(chosen), labels=under, vmin=0, vmax=1)
        ax.set_title(what, fontsize=10, loc="left")
        for text in ax.texts:
            text.set_fontsize(7)
    middle = f"the median test image comes back with an MSE of {errors.median():.4f}, the mean is {errors.mean():.4f}"
    figure.suptitle(f"{about}\n{middle}")
    return figure


def draw_extremes(data: Inputs, output: Tensor, errors: Tensor, about: str):
    """The best and the worst reconstructed test image of each class."""
    figure, axes = new_figure(2, 1, width=8.6, height=5.6)
    present = [label for label in range(len(data.classes)) if (data.y_test == label).any()]
    own = [torch.nonzero(data.y_test == label)[:, 0] for label in present]
    best, worst = ([rows[pick(errors[rows])].item() for rows in own] for pick in (torch.argmin, torch.argmax))
    ratios = errors[worst] / errors[best]
    x = pixels(data.x_test)
    for ax, chosen, what in ((axes[0, 0], best, "best"), (axes[1, 0], worst, "worst")):
        shown = np.concatenate([images_at(x, chosen), images_at(output, chosen)])  # (2·classes, 28, 28)
        names = [data.classes[label] for label in present] + [f"{errors[i]:.4f}" for i in chosen]
        image_grid(ax, shown, len(chosen), labels=names, vmin=0, vmax=1)
        ax.set_title(f"{what} of each class: the image, below it its reconstruction and MSE", fontsize=10, loc="left")
    times = f"{ratios.min():.0f} to {ratios.max():.0f} times the error of the best"
    figure.suptitle(f"{about}\nthe worst image of a class has {times}", fontsize=11)
    return figure


def images_at(x: Tensor, chosen) -> np.ndarray:
    """Rows `chosen` of x (N, 784) as images (n, 28, 28)."""
    return x[torch.as_tensor(chosen, device=x.device)].reshape(-1, SIDE, SIDE).cpu().numpy()


if __name__ == "__main__":
    run_main(main, build_parser)
