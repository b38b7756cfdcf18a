"""How does the gain from Gabor features shrink with the number of training images, and with the kernel?

    python mnist_svm_gabor/learning_curve.py
    python mnist_svm_gabor/learning_curve.py --sizes 100 1000 --seeds 0 1 2 3 4

For each size and seed a stratified subset of the training images is drawn; components, whitening, C and gamma are
chosen on images of that subset alone (a sixth of it, or by five folds below 1,000), then the machine is refitted
to all of it and tested on all test images. The filters themselves were chosen once, with many more labels (README).
Raw pixels and Gabor features, linear (one against the rest) and RBF kernel, at 14×14.

Writes learning_curve.png, history.csv, metrics.json.
With --resume a study that was stopped goes on with the machines that are missing.
"""

import numpy as np

from mnist_svm_gabor.features import BANKS, Preparation
from mnist_svm_gabor.protocol import Fold, choose_and_fit, default_grid, folds
from shared_utils.cli import UserError, add_seeds, make_parser, positive_int, run_main
from shared_utils.data import Images, load_images, stratified_order
from shared_utils.device import pick_device
from shared_utils.plotting import mean_band, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import mean_std

KERNELS = ("linear", "rbf")
CLAIM = (8, 12)  # points: what a student project's report gives for Gabor features


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, quick={"sizes": [100, 1000], "seeds": [0]})
    sizes = [100, 300, 1000, 3000, 10_000, 30_000, 60_000]
    parser.add_argument("--sizes", type=positive_int, nargs="+", default=sizes, help="training images")
    add_seeds(parser, [0, 1, 2], "one subset of each size per seed")
    parser.add_argument("--resume", action="store_true", help="go on with the machines that history.csv lacks")
    return parser


def main(argv=None) -> dict:
    """Train every machine; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    seed_everything(args.seed)
    train = load_images(args.dataset, "train", args.data_dir, shape=(1, 28, 28))
    test = load_images(args.dataset, "test", args.data_dir, shape=(1, 28, 28))
    sizes = sorted(set(args.sizes))
    if sizes[-1] > len(train) or sizes[0] < 5 * len(train.classes):
        low = 5 * len(train.classes)
        raise UserError(f"--sizes must lie between {low} (five images a class) and the {len(train)} of {args.dataset}")
    # All training images are the same subset whatever the seed: there one seed is enough.
    seeds = {size: args.seeds[:1] if size == len(train) else args.seeds for size in sizes}
    drawn = {(size, seed): draw_images(train, size, [args.seed, seed]) for size in sizes for seed in seeds[size]}
    run = start_run(args)

    preparations = {"raw": Preparation(14), "gabor": Preparation(14, bank=BANKS[14])}
    vectors = {name: (prepare(train.x, device), prepare(test.x, device)) for name, prepare in preparations.items()}
    error = {key: np.full((len(args.seeds), len(sizes)), np.nan) for key in ((f, k) for f in vectors for k in KERNELS)}
    for s, size in enumerate(sizes):
        for r, seed in enumerate(seeds[size]):
            chosen, parts = drawn[size, seed]
            for features, (x, x_test) in vectors.items():
                for kernel in KERNELS:
                    key = {"size": size, "seed": seed, "features": features, "kernel": kernel}
                    if not run.row(**key):
                        fitted = choose_and_fit(x[chosen], train.y[chosen], parts, kernel, default_grid(kernel))
                        run.log(**key, wrong=int((fitted.predict(x_test) != test.y).sum()))
                    error[features, kernel][r, s] = 100 * int(run.row(**key)["wrong"]) / len(test)
    rows = table(error, sizes)
    save_figure(draw(error, sizes, test.title), run.path("learning_curve.png"))
    return run.finish({"rows": rows, "seeds": args.seeds})


def draw_images(train: Images, size: int, seed: list[int]) -> tuple[np.ndarray, list[Fold]]:
    """Positions of `size` training images, stratified, and the folds of these. Errors: `UserError` as `folds`."""
    rng = np.random.default_rng(seed)
    chosen = stratified_order(train.y, rng)[:size]
    return chosen, folds(train.y[chosen], rng, len(train.classes))


def table(error: dict, sizes: list[int]) -> list[dict]:
    """A row per size and kernel: mean accuracy of both (in %), and the gain in points with its deviation over seeds."""
    rows = []
    for s, size in enumerate(sizes):
        for kernel in KERNELS:
            raw, gabor = error["raw", kernel][:, s], error["gabor", kernel][:, s]
            gains = (raw - gabor)[~np.isnan(raw)]
            gain, spread = mean_std(gains)
            accuracies = {"raw": 100 - np.nanmean(raw), "gabor": 100 - np.nanmean(gabor)}
            rows.append(
                {
                    "training_images": size,
                    "kernel": kernel,
                    **accuracies,
                    "gain": gain,
                    "gain_std": spread if len(gains) > 1 else None,
                }
            )
    return rows


def draw(error: dict, sizes: list[int], title: str):
    """Test error against size, and the gain (points) against size."""
    figure, axes = new_figure(1, 2, width=12, height=4.8)
    names = {"raw": "raw pixels", "gabor": "Gabor features", "linear": "linear", "rbf": "RBF"}
    for index, ((features, kernel), values) in enumerate(error.items()):
        mean_band(axes[0, 0], sizes, values, label=f"{names[features]}, {names[kernel]}", index=index)
    axes[0, 0].set(
        xscale="log",
        yscale="log",
        xlabel="training images",
        ylabel="test error (%)",
        title="error, mean ± std over subsets",
    )
    low, high = axes[0, 0].get_ylim()
    ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= tick <= high]
    axes[0, 0].set_yticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes[0, 0].minorticks_off()
    axes[0, 0].legend()
    axes[0, 1].axhspan(*CLAIM, color="#999999", alpha=0.25, label="claimed: +8 to +12", linewidth=0)
    gains = {}
    for index, kernel in enumerate(KERNELS):
        gains[kernel] = error["raw", kernel] - error["gabor", kernel]
        mean_band(axes[0, 1], sizes, gains[kernel], label=names[kernel], index=index)
    axes[0, 1].axhline(0, color="black", linewidth=0.8)
    axes[0, 1].set(xscale="log", xlabel="training images", ylabel="gain (percentage points)", title="Gabor minus raw")
    axes[0, 1].legend()
    for ax in axes.flat:
        ax.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
        ax.minorticks_off()
    first, last = (
        ", ".join(f"{np.nanmean(gains[kernel][:, at]):+.1f} {names[kernel]}" for kernel in KERNELS) for at in (0, -1)
    )
    figure.suptitle(
        f"{title}, 14×14: points gained by Gabor features: {first} at {sizes[0]:,}; {last} at {sizes[-1]:,}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
