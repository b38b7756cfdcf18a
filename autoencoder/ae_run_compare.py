"""What does regularisation change: the error, the codes, or nothing?

    python autoencoder/ae_run_compare.py

The baseline and the regularised autoencoder that `ae_experiments.py` chose, on the same test images: their errors image
by image, their reconstructions, how well the codes keep neighbourhoods and classes, and how large their weights are.
The ± is over test images: it says how sure the difference of these two networks is. It does not cover another training
of either, which moves the error as well (`test_recon_of_seeds` of ae_experiments.py says how far), and where their
recipes differ in more than weight decay (figures and table name them), weight decay need not be the cause.

Writes ae_fashion_test_processed_base.npz, ae_fashion_test_processed_reg.npz, ae_compare_umap.png, ae_compare_mse.png,
ae_compare_recon.png, compare.csv, metrics.json.
Shapes: N images, 784 pixels, K numbers of the code.
"""

from functools import partial

import numpy as np
import torch

from autoencoder.embedding import draw_map, nearest, trustworthiness, umap_map, vote_accuracy
from autoencoder.fitting import codes
from autoencoder.inputs import SIDE, Inputs, add_data_flags, first_of_each, load_pixels, pixels
from autoencoder.trained import Trained, find_trained, load_trained, process
from shared_utils.checkpoint import save_arrays
from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.data import stratified_order
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, image_grid, new_figure, save_figure
from shared_utils.runs import start_run, write_csv

TAGS = {"base": "baseline", "reg": "regularised"}  # tag of the files → variant
TRUST_K, UMAP_NEIGHBOURS = 15, 14  # neighbours; UMAP counts the image itself as a fifteenth


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset="fashion", quick={"val_size": 200, "n": 300})
    add_data_flags(parser)
    parser.add_argument("--ckpt-base", help="the baseline (default: the one that ae_experiments.py writes)")
    parser.add_argument("--ckpt-reg", help="the regularised one (default: that of --variant regularised)")
    parser.add_argument("--n", type=positive_int, default=5000, help="test images for the maps and for trustworthiness")
    return parser


@torch.no_grad()
def main(argv=None) -> dict:
    """Compare; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load_pixels(args, device)
    paths = {"base": args.ckpt_base, "reg": args.ckpt_reg}
    paths = {tag: path or find_trained(args, TAGS[tag]) for tag, path in paths.items()}
    models = {tag: load_trained(path, args, data.x_test.shape[1], device) for tag, path in paths.items()}
    if not 2 * TRUST_K < args.n <= len(data.x_test):
        raise UserError(f"--n {args.n}: must be above {2 * TRUST_K}, and there are {len(data.x_test)} test images")
    run = start_run(args)

    found, rows = {}, []
    shown = np.sort(stratified_order(data.y_test.cpu().numpy(), np.random.default_rng(0))[: args.n])
    for tag, trained in models.items():
        found[tag] = process(trained.model, data.x_test, data.y_test, args.dataset)
        save_arrays(run.path(f"ae_fashion_test_processed_{tag}.npz"), **found[tag])
        rows.append({"variant": TAGS[tag], **measure(trained, found[tag], data, shown)})
    write_csv(run.path("compare.csv"), rows)

    difference = found["reg"]["mse"].astype(np.float64) - found["base"]["mse"]  # (N,), of the same images
    mean, error = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
    change = f"regularised − baseline: {mean:+.6f} ± {error:.6f} per pixel (mean ± standard error over images)"
    save_figure(draw_errors(found, data, f"{data.title}\n{change}"), run.path("ae_compare_mse.png"))
    save_figure(draw_reconstructions(found, models, data), run.path("ae_compare_recon.png"))
    save_figure(draw_maps(found, rows, shown, data, args.seed), run.path("ae_compare_umap.png"))
    return run.finish(
        {
            "variants": rows,
            "mse_difference": mean,
            "mse_difference_standard_error": error,
            "images_that_regularisation_improves": float((difference < 0).mean()),
            "images_on_the_maps": len(shown),
        }
    )


def measure(trained: Trained, found: dict, data: Inputs, shown: np.ndarray) -> dict:
    """A row of the table: errors, what the codes keep, and the size of codes and weights."""
    model = trained.model
    z = torch.from_numpy(found["Z"]).to(data.x_test.device)
    some = torch.from_numpy(shown).to(z.device)
    weights = [layer.params["W"] for layer in model.layers if "W" in layer.params]
    return {
        "recipe": str(trained.recipe),
        "val_recon": trained.val_recon,
        "test_recon": float(found["mse"].mean(dtype=np.float64)),
        "test_recon_median": float(np.median(found["mse"])),
        "knn_accuracy": vote_accuracy(partial(codes, model), data),
        "trustworthiness": trustworthiness(pixels(data.x_test[some]), z[some], TRUST_K),
        "code_std": z.std(0).mean().item(),
        "weight_norm": torch.stack([w.square().sum() for w in weights]).sum().sqrt().item(),
    }


def draw_errors(found: dict, data: Inputs, title: str):
    """A box of the images' errors for each variant, and the mean difference by class."""
    figure, axes = new_figure(1, 2, width=10.5, height=4.8)
    left, right = axes[0]
    boxes = left.boxplot([found[tag]["mse"] for tag in TAGS], whis=(5, 95), showfliers=False, patch_artist=True)
    for line in boxes["medians"]:
        line.set(color="black", linewidth=1.6)
    for patch, color in zip(boxes["boxes"], COLORS, strict=False):
        patch.set(facecolor=color, alpha=0.6)
    left.set_xticks([1, 2], list(TAGS.values()))
    left.set(ylabel="MSE per pixel of a test image", title="box: quartiles and median; whiskers: 5 % and 95 %")
    left.grid(False, axis="x")
    difference, labels = found["reg"]["mse"].astype(np.float64) - found["base"]["mse"], found["base"]["y"]
    own = [difference[labels == label] for label in range(len(data.classes))]
    means = [values.mean() if len(values) else np.nan for values in own]
    errors = [values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan for values in own]
    right.errorbar(1e4 * np.array(means), range(len(own)), xerr=1e4 * np.array(errors), fmt="o", color=COLORS[0])
    right.axvline(0, color="black", linewidth=1)
    right.set_yticks(range(len(own)), data.classes)
    right.invert_yaxis()
    right.set(
        xlabel="regularised − baseline, in 0.0001 of MSE (mean ± standard error)", title="by class: left of 0 it helps"
    )
    figure.suptitle(title)
    return figure


def draw_reconstructions(found: dict, models: dict[str, Trained], data: Inputs):
    """The first two test images of each class, and what each variant makes of them."""
    chosen = first_of_each(data.y_test, 2, len(data.classes)).cpu().numpy()
    figure, axes = new_figure(3, 1, width=10.5, height=3.1)
    x = pixels(data.x_test).cpu().numpy()
    rows = [("test images", x)] + [(f"{TAGS[tag]}: {models[tag].recipe}", found[tag]["Yhat"]) for tag in TAGS]
    for ax, (name, values) in zip(axes[:, 0], rows, strict=True):
        image_grid(ax, values[chosen].reshape(-1, SIDE, SIDE), len(chosen), vmin=0, vmax=1)
        ax.set_title(name, fontsize=10, loc="left")
    base, reg = (found[tag]["Yhat"].astype(np.float64) for tag in TAGS)
    apart = f"the two reconstructions differ by {np.sqrt(((base - reg) ** 2).mean()):.3f} (root mean square)"
    from_image = f"from the image by {np.sqrt(((base - x) ** 2).mean()):.3f} and {np.sqrt(((reg - x) ** 2).mean()):.3f}"
    figure.suptitle(f"{data.title}: {apart},\n{from_image}")
    return figure


def draw_maps(found: dict, rows: list[dict], shown: np.ndarray, data: Inputs, seed: int):
    """UMAP of both variants' codes of the test images at `shown`."""
    figure, axes = new_figure(1, 2, width=11, height=6)
    for ax, tag, row in zip(axes[0], TAGS, rows, strict=True):
        z = torch.from_numpy(found[tag]["Z"][shown])
        z_map = umap_map(z, nearest(z, z, UMAP_NEIGHBOURS, exclude_self=True), seed, min_dist=0.1, init="spectral")
        draw_map(ax, z_map, found[tag]["y"][shown], data.classes)
        ax.set_title(f"{TAGS[tag]}: {row['recipe']}", fontsize=9)
        keeps = f"5-NN accuracy {row['knn_accuracy']:.1%}, trustworthiness {row['trustworthiness']:.3f}"
        ax.set_xlabel(f"the codes themselves: {keeps}")
    accuracies = " and ".join(f"{row['knn_accuracy']:.1%} ({row['variant']})" for row in rows)
    n = len(data.y_test)
    widest = max(1.96 * np.sqrt(p * (1 - p) / n) for p in (row["knn_accuracy"] for row in rows))
    sure = f"95 % interval of each ± {100 * widest:.1f} points"
    figure.suptitle(
        f"{data.title}, UMAP of {len(shown):,} test images' codes\n"
        f"5 neighbours among the codes tell the class in {accuracies}; {sure}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
