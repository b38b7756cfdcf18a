"""How much does an autoencoder gain over PCA with a code of the same size, and when does it gain nothing?

    python autoencoder/pca_baseline.py
    python autoencoder/pca_baseline.py --latents 16 32 64 --epochs 40

1. For each size K of the code: the mean squared error of the test images (per pixel, of values in [0, 1]) of an
   autoencoder and of PCA, both fitted to the same training images; and the accuracy of a 5-nearest-neighbour vote among
   the codes of training and validation images. PCA's output may leave [0, 1]: its error after clipping is given too.
2. With Linear layers alone, x̂ = x W_e W_d, the autoencoder can do no better than PCA: every local minimum of the
   error is a global one, where the rows of W_d span PCA's u_1 … u_K; its other critical points are saddles (Baldi and
   Hornik 1989). The axes are not found: W_e A and A⁻¹ W_d give the same x̂ for every invertible A. AdamW, with the same
   hand-written backward pass, reaches such a minimum here.
   The mean squared error over all images, tr((I − W_e W_d)ᵀ C (I − W_e W_d)) / D with centred pixels, and so its
   gradient, depends on the images through their covariance C alone. So R + 1 pseudo-images of mean zero and covariance
   C, R ≤ D its rank, stand for all N of them: the same full-batch gradient for a seventieth of the time.
   The encoder's subspace is measured as that of C W_e. Directions in which the images hardly vary are hardly determined
   in W_e itself; and the best decoder for given codes is W_d = (W_eᵀ C W_e)⁻¹ W_eᵀ C, whose rows span just that.

Writes mse_vs_k.png, knn_vs_k.png, linear_ae_is_pca.png, history.csv, metrics.json.
Sources: Baldi and Hornik 1989; Eckart and Young 1936; Hinton and Salakhutdinov 2006 for the comparison.
Shapes: N images, D pixels, K numbers of the code, R + 1 pseudo-images.
"""

import time

import joblib
import numpy as np
import torch
from matplotlib.ticker import LogLocator
from torch import Tensor

from autoencoder.embedding import vote_accuracy
from autoencoder.fitting import Recipe, codes, fit, reconstruction_errors
from autoencoder.inputs import SIDE, Inputs, add_data_flags, load_pixels, pixels
from autoencoder.models import Autoencoder
from autoencoder.optimizers import AdamW
from autoencoder.pca import PCA, fit_pca, moments, pca_of, principal_angles
from shared_utils.cli import UserError, add_amp, make_parser, positive_float, positive_int, run_main
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, image_grid, line_style, new_figure, save_figure
from shared_utils.runs import check_finite, start_run
from shared_utils.schedules import one_cycle
from shared_utils.seeding import seed_everything
from shared_utils.stats import wilson_interval

ANGLE_BAR, EXCESS_BAR = 1e-3, 1e-3  # radians; fraction of PCA's error


def build_parser():
    """The command line."""
    small = {"val_size": 200, "latents": [2, 8, 32], "hidden": [64], "epochs": 10, "jobs": 1}
    parser = make_parser(
        __doc__, dataset="fashion", quick=small | {"batch_size": 64, "linear_updates": 500, "linear_lr": 0.05}
    )
    add_data_flags(parser)
    sizes = [2, 4, 8, 16, 32, 64, 128]
    parser.add_argument("--latents", type=positive_int, nargs="+", default=sizes, help="numbers in the code, K")
    parser.add_argument("--hidden", type=positive_int, nargs="*", default=[1024, 512], help="encoder's hidden layers")
    parser.add_argument("--epochs", type=positive_int, default=15, help="passes over the training images")
    parser.add_argument("--lr", type=positive_float, default=Recipe.lr, help="highest learning rate")
    parser.add_argument("--batch-size", type=positive_int, default=Recipe.batch_size, help="images per update")
    add_amp(parser, "products in bfloat16", by_machine=True)
    parser.add_argument("--jobs", type=positive_int, help="trainings at once (default: the CPU's cores; 1 on a GPU)")
    parser.add_argument("--linear-latent", type=positive_int, default=8, help="K of the linear autoencoder")
    parser.add_argument("--linear-updates", type=positive_int, default=2500, help="updates of the linear autoencoder")
    parser.add_argument("--linear-lr", type=positive_float, default=0.01, help="its highest learning rate")
    return parser


# --- 1. autoencoder against PCA -----------------------------------------------------------------------------------


def compare(k: int, recipe: Recipe, data: Inputs, pca: PCA, seed: int) -> dict:
    """Train an autoencoder with a code of k numbers; test errors and 5-NN accuracies of it and of PCA."""
    with cpu_threads(1), torch.no_grad():
        model = recipe.build(seed, data.x_train.shape[1]).to(data.x_train.device)
        fitted = fit(model, recipe, data.x_train, data.x_val, seed)
        found = reconstruction_errors(model, data.x_test).mean().item()
        rival = pca.first(k)
        reconstructed = rival.reconstruct(rival.project(data.x_test))  # (N, D)
        x_test = pixels(data.x_test)
        mse, clipped = ((image - x_test).square().mean().item() for image in (reconstructed, reconstructed.clamp(0, 1)))
        return {
            "k": k,
            "pca_mse": mse,
            "pca_clipped_mse": clipped,
            "ae_mse": found,
            "below_pca": 1 - found / mse,
            "pca_knn": vote_accuracy(rival.project, data),
            "ae_knn": vote_accuracy(lambda x: codes(model, x), data),
            "val_mse": fitted.val_recon,
            "best_epoch": fitted.best_epoch,
            "training_seconds": fitted.seconds,
        }


def raw_neighbours(data: Inputs) -> float:
    """5-NN accuracy of the pixels themselves."""
    with cpu_threads(1):
        return vote_accuracy(pixels, data)


def compare_all(args, data: Inputs, pca: PCA, log) -> tuple[float, list[dict]]:
    """Raw pixels' 5-NN accuracy, and a row for each K; `--jobs` of these at once, one thread each.

    log(**row) is called as soon as a row and those before it are there.
    """
    jobs = args.jobs or (joblib.cpu_count() if data.x_train.device.type == "cpu" else 1)
    rest = {"lr": args.lr, "epochs": args.epochs, "batch_size": args.batch_size, "amp": args.amp}
    tasks = [joblib.delayed(raw_neighbours)(data)]
    for k in sorted(set(args.latents)):
        tasks.append(joblib.delayed(compare)(k, Recipe(enc_dims=(*args.hidden, k), **rest), data, pca, args.seed))
    results, rows = joblib.Parallel(n_jobs=min(jobs, len(tasks)), return_as="generator")(tasks), []
    raw = next(results)
    for row in results:
        log(**row)
        rows.append(row)
    return raw, rows


# --- 2. the linear autoencoder is PCA -----------------------------------------------------------------------------


def pseudo_images(covariance: Tensor) -> Tensor:
    """R + 1 rows of mean 0 whose covariance, divided by R + 1, is `covariance` (D, D) of rank R: (R + 1, D).

    With C = U Λ Uᵀ they are √(R + 1) Q Λ^½ Uᵀ, where Q has R orthonormal columns, each of mean zero, drawn from
    PyTorch's generator.
    """
    pca = pca_of(torch.zeros(len(covariance)), covariance, len(covariance))
    kept = pca.variances > 1e-10 * pca.variances[0]  # the others are rounding errors
    root = (pca.components * pca.variances.sqrt())[:, kept]  # (D, R)
    noise = torch.randn(root.shape[1] + 1, root.shape[1], dtype=root.dtype)  # (R + 1, R)
    q = torch.linalg.qr(noise - noise.mean(0)).Q
    return len(q) ** 0.5 * q @ root.T


def fit_linear(covariance: Tensor, k: int, updates: int, lr: float, seed: int) -> tuple[Autoencoder, list[dict]]:
    """Train a linear autoencoder with a code of k numbers on centred images of this covariance (D, D), in float64.

    Returns it, and rows of the largest principal angle to PCA's subspace and of the training error's excess over
    PCA's, at about 60 numbers of updates. Errors: `UserError` when the loss is not finite.
    """
    torch.manual_seed(seed)
    x = pseudo_images(covariance)  # (R + 1, D)
    pca = pca_of(x.mean(0), covariance, k)
    model = Autoencoder((k,), (), "linear", "xavier", use_batchnorm=False, in_features=len(covariance)).to(x.dtype)
    optimizer, rows = AdamW(model.layers, lr), []
    looks = {0, updates, *np.geomspace(1, updates, 60).astype(int).tolist()}
    for update in range(updates + 1):
        loss, gradient = model.loss(model.forward(x, training=True), x)
        check_finite(loss.item(), update + 1, lr, "--linear-lr")
        if update in looks:
            encoder, decoder = (layer.params["W"] for layer in model.layers)  # (D, K), (K, D)
            angles = [principal_angles(a, pca.components)[0].item() for a in (decoder.T, covariance @ encoder)]
            rows.append({"updates": update, "decoder_angle": angles[0], "encoder_angle": angles[1]})
            rows[-1]["excess"] = loss.item() / pca.training_error - 1
        model.backward(gradient)
        if update < updates:
            optimizer.lr = one_cycle(update, updates, lr, rise=0.1)
            optimizer.step()
    return model, rows


def reached(row: dict) -> bool:
    """Whether both angles and the error are PCA's to within the bars."""
    return max(row["decoder_angle"], row["encoder_angle"]) < ANGLE_BAR and row["excess"] < EXCESS_BAR


def linear_study(args, data: Inputs, covariance: Tensor, pca: PCA) -> tuple[Autoencoder, list[dict], dict]:
    """The trained linear autoencoder, its rows, and its metrics, on the test images too."""
    started = time.perf_counter()
    model, rows = fit_linear(covariance, args.linear_latent, args.linear_updates, args.linear_lr, args.seed)
    x_test = pixels(data.x_test.cpu(), torch.float64) - pca.mean
    mse = (model.predict(x_test) - x_test).square().mean().item()
    inside = x_test @ pca.components
    pca_mse = (x_test - inside @ pca.components.T).square().mean().item()
    gap = 1 - pca.variances[args.linear_latent] / pca.variances[args.linear_latent - 1]
    metrics = {"k": args.linear_latent, **rows[-1], "reached": reached(rows[-1]), "eigengap": gap}
    metrics["reached_at"] = next((row["updates"] for row in rows if reached(row)), None)
    metrics |= {"test_mse": mse, "pca_test_mse": pca_mse, "test_excess": mse / pca_mse - 1}
    return model, rows, metrics | {"seconds": time.perf_counter() - started}


# --- figures ------------------------------------------------------------------------------------------------------


def signed(part: float, digits: int = 0) -> str:
    """A fraction as a signed percentage."""
    return f"{100 * part:+.{digits}f} %"


def draw_mse(rows: list[dict], title: str):
    """Test error against K on log axes, with what the autoencoder's is relative to PCA's at each."""
    k, first, last = [row["k"] for row in rows], rows[0], rows[-1]
    change = f"{signed(-first['below_pca'])} at K = {first['k']}, {signed(-last['below_pca'])} at K = {last['k']}"
    figure, axes = new_figure(width=7.6, height=5, title=f"{title}: the autoencoder's error against PCA's:\n{change}")
    ax = axes[0, 0]
    series = {"ae_mse": "autoencoder", "pca_mse": "PCA", "pca_clipped_mse": "PCA, clipped to [0, 1]"}
    for index, (key, label) in enumerate(series.items()):
        ax.plot(k, [row[key] for row in rows], marker="o", markersize=4, label=label, **line_style(index))
    for row in rows:
        place = {"xytext": (0, -14), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        ax.annotate(signed(-row["below_pca"]), (row["k"], row["ae_mse"]), color=COLORS[0], **place)
    ax.set(xscale="log", yscale="log", xlabel="numbers in the code, K", ylabel="mean squared error per pixel, test")
    ax.margins(0.08, 0.12)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ticks(ax, k)
    ax.legend()
    return figure


def draw_knn(rows: list[dict], raw: float, n_test: int, title: str):
    """5-NN accuracy on n_test images against K."""
    above_pca = sum(row["ae_knn"] > row["pca_knn"] for row in rows)
    above_raw = sum(row["ae_knn"] > raw for row in rows)
    finding = f"above PCA's at {above_pca} of {len(rows)} sizes and above raw pixels' at {above_raw} of {len(rows)}"
    figure, axes = new_figure(width=7.6, height=4.6, title=f"{title}: 5-NN accuracy on the codes is\n{finding}")
    low, high = wilson_interval(round(raw * n_test), n_test)
    ax, k, half = axes[0, 0], [row["k"] for row in rows], 50 * (high - low)
    for index, (key, label) in enumerate({"ae_knn": "autoencoder's codes", "pca_knn": "PCA's codes"}.items()):
        ax.plot(k, [100 * row[key] for row in rows], marker="o", markersize=4, label=label, **line_style(index))
    ax.axhline(100 * raw, label=f"raw pixels ({raw:.1%})", **line_style(2))
    ax.set(xscale="log", xlabel="numbers in the code, K", ylabel=f"5-NN accuracy, test (%); 95 %: about ±{half:.1f}")
    ticks(ax, k)
    ax.legend()
    return figure


def ticks(ax, k: list[int]) -> None:
    """The sizes themselves on the x axis."""
    ax.set_xticks(k, [str(value) for value in k])
    ax.minorticks_off()


def draw_linear(model: Autoencoder, rows: list[dict], metrics: dict, pca: PCA, title: str):
    """Angle and excess error against updates, and the decoder's rows beside PCA's components."""
    k, angle = metrics["k"], max(metrics["decoder_angle"], metrics["encoder_angle"])
    is_pca = "has found" if metrics["reached"] else "has not yet found"
    title = f"{title}: a linear autoencoder (K = {k}) {is_pca} PCA's subspace\nafter {metrics['updates']:,} updates: "
    title += f"largest angle {angle:.1e} rad, error {signed(metrics['excess'], 4)} against PCA's"
    figure, axes = new_figure(2, 2, width=10, height=6, height_ratios=[3, 1.1], title=title)
    later = rows[1:]  # update 0 has no place on a log axis
    updates = [row["updates"] for row in later]
    for index, part in enumerate(("decoder", "encoder")):
        angles = [row[f"{part}_angle"] for row in later]
        axes[0, 0].plot(updates, angles, label=f"{part}'s subspace", **line_style(index))
    axes[0, 0].set(ylabel="largest angle to PCA's subspace (rad)")
    excess = [max(row["excess"], 1e-12) for row in later]
    axes[0, 1].plot(updates, excess, label="training images", **line_style(0))
    axes[0, 1].set(ylabel="excess over PCA's error (part of it)")
    for ax, bar, label in zip(axes[0], (ANGLE_BAR, EXCESS_BAR), ("0.001 rad", "0.1 %"), strict=True):
        ax.axhline(bar, color="black", linewidth=1, linestyle=":", label=f"the bar, {label}")
        ax.set(xscale="log", yscale="log", xlabel="updates")
        ax.legend()
    shown = min(k, 8)
    found = {"the decoder's rows": model.layers[1].params["W"], "PCA's components": pca.components.T}
    for ax, (name, images) in zip(axes[1], found.items(), strict=True):
        images = images[:shown] / images[:shown].abs().amax(1, keepdim=True)
        image_grid(ax, images.reshape(-1, SIDE, SIDE).numpy(), shown, vmin=-1, vmax=1)
        ax.set_title(f"{name}: one subspace, other axes" if "decoder" in name else name, fontsize=10)
    return figure


@cpu_threads(1)
@torch.no_grad()
def main(argv=None) -> dict:
    """Compare at every K, then train the linear autoencoder; returns the metrics."""
    args = build_parser().parse_args(argv)
    seed_everything(args.seed)
    data = load_pixels(args, pick_device(args.device))
    pca = fit_pca(data.x_train, max(*args.latents, args.linear_latent))
    if pca.first(args.linear_latent).training_error < 1e-9 * pca.first(0).training_error:
        raise UserError(f"--linear-latent {args.linear_latent}: PCA leaves no error there to compare with")
    run = start_run(args)

    _, covariance = moments(data.x_train)
    rival = pca.first(args.linear_latent)
    model, course, linear = linear_study(args, data, covariance, rival)
    save_figure(draw_linear(model, course, linear, rival, data.title), run.path("linear_ae_is_pca.png"))

    raw, rows = compare_all(args, data, pca, run.log)
    save_figure(draw_mse(rows, data.title), run.path("mse_vs_k.png"))
    save_figure(draw_knn(rows, raw, len(data.y_test), data.title), run.path("knn_vs_k.png"))
    return run.finish({"rows": rows, "raw_knn": raw, "linear": linear, "linear_rows": course})


if __name__ == "__main__":
    run_main(main, build_parser)
