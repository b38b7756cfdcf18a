"""Which fully connected autoencoder reconstructs clothes best, when every gradient is written by hand?

    python autoencoder/ae_experiments.py
    python autoencoder/ae_experiments.py --variant regularised
    python autoencoder/ae_experiments.py --variant denoising

784 pixels → a code z of K numbers → 784 pixels. Every combination of `--enc-dims`, `--activation`, `--init`,
`--batchnorm`, `--lr`, `--weight-decay`, `--noise` and `--code-noise` is trained for `--epochs`, as many at once as
there are cores; the best on the validation images is then trained anew for `--final-epochs` from each of `--seeds`,
and the best of these on the validation images is kept. What is minimised, over the N images of a batch and D pixels, is

    MSE = 1/(N D) Σ (x̂ − x)²,    RMSE = √MSE,    PSNR = −10 log₁₀ MSE decibels (pixels in [0, 1])

`val_recon` and `test_recon` are the MSE of the validation and of the test images. With noise x̂ is made from the noisy
image and compared with the clean x. AdamW's weight decay λ shrinks each weight by a fraction lr · λ at each update.
Training stops early when `--patience` epochs bring no better validation error, and keeps the best epoch's weights. The
test images are read once, at the end. PCA with the same K is the baseline (pca.py).

Writes best.pth, grid.csv, grid.png, ae_fashion_loss.png, ae_fashion_recon_grid.png, history.csv, metrics.json.
With --resume a grid that was stopped goes on with the first combination that is not in history.csv.
Sources: Hinton and Salakhutdinov 2006; Vincent et al. 2008 for the denoising variant; Smith 2018 for the rate's cycle.
Shapes: N images, 784 pixels, K numbers of the code.
"""

import itertools
import math
from dataclasses import replace
from functools import partial

import joblib
import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullFormatter

from autoencoder.fitting import OPTIMIZERS, Fit, Recipe, fit, reconstruction_errors
from autoencoder.inputs import SIDE, Inputs, add_data_flags, first_of_each, load_pixels, pixels
from autoencoder.layers import ACTIVATIONS, INITS
from autoencoder.models import Autoencoder
from autoencoder.pca import fit_pca
from autoencoder.trained import VARIANTS, Trained, save_trained
from shared_utils.cli import (
    UserError,
    add_amp,
    add_seeds,
    make_parser,
    non_negative_float,
    positive_float,
    positive_int,
    run_main,
)
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import COLORS, curves, image_grid, new_figure, save_figure
from shared_utils.runs import Diverged, start_run, write_csv

FINE = 7  # pixels: a pattern of stripes is finer, a sleeve is not
FACTORS = ("enc_dims", "activation", "init", "batchnorm", "lr", "weight_decay", "noise", "code_noise")
NUMBERS = ("lr", "weight_decay", "noise", "code_noise", "val_recon", "best_epoch", "epochs", "seconds")
BASELINE = {
    "enc_dims": ["512,256,32", "1024,512,32"],
    "activation": ["relu", "gelu"],
    "init": ["he", "xavier"],
    "batchnorm": ["off", "on"],
    "lr": [2e-3, 4e-3],
    "weight_decay": [0.0],
    "noise": [0.0],
    "code_noise": [0.0],
}
# What won the baseline's grid: the variants differ from it in their penalty alone.
BEST = {"enc_dims": ["1024,512,32"], "activation": ["gelu"], "init": ["xavier"], "batchnorm": ["on"], "lr": [4e-3]}
SGD_RATES = [1.0, 4.0]  # the mean over pixels makes gradients small, which Adam does not notice
GRIDS = {
    "baseline": BASELINE,
    "regularised": BASELINE | BEST | {"weight_decay": [0.03, 0.1, 0.3, 1.0]},
    "denoising": BASELINE | BEST | {"weight_decay": [0.03, 0.1], "noise": [0.1], "code_noise": [0.15]},
}


def sizes(text: str) -> str:
    """A list of layer sizes, `512,256,32`, for argparse."""
    return ",".join(str(positive_int(part)) for part in text.split(","))


def build_parser():
    """The command line."""
    quick = {"val_size": 200, "enc_dims": ["64,32"], "lr": [4e-3], "epochs": 10, "final_epochs": 30, "jobs": 1}
    parser = make_parser(__doc__, dataset="fashion", quick=quick)
    add_data_flags(parser)
    parser.add_argument("--variant", choices=VARIANTS, default="baseline", help="which grid; names the folder too")
    several = {"nargs": "+", "metavar": "VALUE"}
    parser.add_argument("--enc-dims", type=sizes, **several, help="the encoder's layers, the code last: 512,256,32")
    parser.add_argument("--latent", type=positive_int, help="K, in place of the last number of each --enc-dims")
    parser.add_argument("--activation", choices=ACTIVATIONS, nargs="+", help="of the hidden layers")
    parser.add_argument("--init", choices=INITS, nargs="+", help="of the weights")
    parser.add_argument("--batchnorm", choices=("off", "on"), nargs="+", help="in the hidden layers")
    parser.add_argument("--lr", type=positive_float, **several, help="highest learning rate of the cycle")
    parser.add_argument("--weight-decay", type=non_negative_float, **several, help="pull of the weights towards 0")
    parser.add_argument("--noise", type=non_negative_float, **several, help="on the input, in training")
    parser.add_argument("--code-noise", type=non_negative_float, **several, help="on the code, in training")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw", help="sgd has momentum 0.9")
    parser.add_argument("--epochs", type=positive_int, default=8, help="of each combination")
    parser.add_argument("--final-epochs", type=positive_int, default=40, help="of the best combination")
    add_seeds(parser, [0, 1], "of the best combination")
    parser.add_argument("--batch-size", type=positive_int, default=256, help="images per update")
    parser.add_argument(
        "--patience", type=positive_int, default=10, help="stop after so many epochs without improvement"
    )
    amp = "matrix products in bfloat16, parameters and sums in float32"
    add_amp(parser, amp, by_machine=True)
    parser.add_argument("--jobs", type=positive_int, help="trainings at once (default: CPU cores; 1 on a GPU)")
    parser.add_argument("--resume", action="store_true", help="go on with what history.csv lacks")
    return parser


@torch.no_grad()
def main(argv=None) -> dict:
    """Train the grid, then the best of it for longer; returns the metrics."""
    args = build_parser().parse_args(argv)
    args.script = VARIANTS[args.variant]  # each variant has its own folder
    device = pick_device(args.device)
    data = load_pixels(args, device)
    grid = combinations(args)
    for recipe in grid:  # what cannot be built is refused before anything is written
        recipe.build(args.seed, data.x_train.shape[1])
    run = start_run(args)
    done = run.history()  # of an earlier process, with --resume
    for recipe, row in zip(grid, done, strict=False):
        if any(str(value) != row[name] for name, value in factors(recipe).items()):
            raise UserError("--resume: history.csv is of another grid; start anew without --resume")
    jobs = args.jobs or (1 if device.type != "cpu" else joblib.cpu_count())
    parallel = joblib.Parallel(n_jobs=jobs, return_as="generator")  # in the order of what it is given
    fit_one = joblib.delayed(partial(train, data.x_train.cpu().numpy(), data.x_val.cpu().numpy(), device))

    rest = grid[len(done) :]
    for recipe, (found, _) in zip(rest, parallel(fit_one(recipe, args.seed) for recipe in rest), strict=True):
        run.log(**as_row(recipe, found))
    rows = [{**row, **{name: float(row[name]) for name in NUMBERS}} for row in run.history()]
    write_csv(run.path("grid.csv"), sorted(rows, key=lambda row: row["val_recon"]))  # best first
    best = min(range(len(grid)), key=lambda i: rows[i]["val_recon"])

    final = replace(grid[best], epochs=args.final_epochs)
    seeds = args.seeds
    print(f"the best of {len(grid)}: {final}; now for {final.epochs} epochs, seeds {seeds}", flush=True)
    fits, weights = zip(*parallel(fit_one(final, seed) for seed in seeds), strict=True)
    chosen = min(range(len(fits)), key=lambda i: fits[i].val_recon)
    if not math.isfinite(fits[chosen].val_recon):
        raise UserError("every training of the best combination diverged: try a lower --lr")
    model = final.build(args.seed, data.x_train.shape[1]).to(device)
    model.load_state_dict(weights[chosen])
    save_trained(run.path("best.pth"), Trained(model, final, fits[chosen].val_recon), args)

    test_recons = []  # of every seed: how far another training moves it; nothing is chosen by these
    for found, state in zip(fits, weights, strict=True):
        if math.isfinite(found.val_recon):
            model.load_state_dict(state)
            test_recons.append(reconstruction_errors(model, data.x_test).mean().item())
        else:
            test_recons.append(None)
    model.load_state_dict(weights[chosen])
    test_recon = test_recons[chosen]
    pca_recon = fit_pca(data.x_train, model.latent).errors(data.x_test).mean().item()
    rmse, psnr = math.sqrt(test_recon), -10 * math.log10(test_recon)
    print(
        f"best val_recon {fits[chosen].val_recon:.5f}, test_recon {test_recon:.5f}, RMSE {rmse:.4f}, PSNR {psnr:.2f} dB"
        f"; PCA with the same {model.latent} numbers: test_recon {pca_recon:.5f}"
    )

    about = f"{data.title}: {final.sizes}, {args.variant}"
    save_figure(draw_losses(fits[chosen], final, test_recon, pca_recon, about), run.path("ae_fashion_loss.png"))
    save_figure(draw_reconstructions(model, data, test_recon, about), run.path("ae_fashion_recon_grid.png"))
    save_figure(draw_grid(rows, args.epochs, data.title), run.path("grid.png"))
    return run.finish(
        {
            "variant": args.variant,
            "best": str(final),
            "sizes": final.sizes,
            "latent": model.latent,
            "parameters": sum(value.numel() for value in model.parameters().values()),
            "final_epochs": final.epochs,
            "best_epoch": fits[chosen].best_epoch,
            "val_recon": fits[chosen].val_recon,
            "seeds": seeds,
            "val_recon_of_seeds": [finite(found.val_recon) for found in fits],
            "test_recon_of_seeds": test_recons,
            "test_recon": test_recon,
            "test_rmse": rmse,
            "test_psnr": psnr,
            "pca_test_recon": pca_recon,
            "below_pca": 1 - test_recon / pca_recon,
            "combinations": len(grid),
            "spreads": spreads(effects(rows)),
            "grid": [row | {"val_recon": finite(row["val_recon"])} for row in rows],
        }
    )


def combinations(args) -> list[Recipe]:
    """The grid: every combination of the values of `FACTORS`, those not given on the command line from `GRIDS`.

    Errors: `UserError` for what no network can be built from.
    """
    defaults = GRIDS[args.variant] | ({"lr": SGD_RATES} if args.optimizer == "sgd" else {})
    values = [getattr(args, name) or defaults[name] for name in FACTORS]
    same = {"optimizer": args.optimizer, "epochs": args.epochs, "batch_size": args.batch_size}
    same |= {"patience": args.patience, "amp": args.amp}
    grid = []
    for enc_dims, activation, init, batchnorm, *numbers in itertools.product(*values):
        dims = [int(size) for size in enc_dims.split(",")]
        dims[-1] = args.latent or dims[-1]
        numbers = dict(zip(FACTORS[4:], numbers, strict=True))
        grid.append(Recipe(tuple(dims), activation, init, batchnorm == "on", **numbers, **same))
    return list(dict.fromkeys(grid))  # --latent may have made two of them the same


def train(x_train: np.ndarray, x_val: np.ndarray, device: torch.device, recipe: Recipe, seed: int) -> tuple[Fit, dict]:
    """Train one autoencoder on one thread; returns its fit and its weights, on the CPU.

    x_train, x_val: uint8 (N, D). One that diverges has an infinite validation error, and does not stop the others.
    """
    with cpu_threads(1):
        x_train, x_val = (torch.from_numpy(np.array(x)).to(device) for x in (x_train, x_val))
        model = recipe.build(seed, x_train.shape[1]).to(device)
        try:
            found = fit(model, recipe, x_train, x_val, seed)
        except Diverged as error:
            print(f"{recipe}: {error}", flush=True)
            found = Fit([], 0, math.inf, 0.0)
    return found, {name: value.cpu() for name, value in model.state_dict().items()}


def finite(value: float) -> float | None:
    """None for what diverged: a JSON file has no infinity."""
    return value if math.isfinite(value) else None


def factors(recipe: Recipe) -> dict:
    """`FACTORS` of a recipe, as they stand in history.csv."""
    names = {"enc_dims": recipe.sizes, "activation": recipe.activation, "init": recipe.init}
    names["batchnorm"] = "on" if recipe.use_batchnorm else "off"
    return names | {name: getattr(recipe, name) for name in ("lr", "weight_decay", "noise", "code_noise")}


def as_row(recipe: Recipe, found: Fit) -> dict:
    """A line of history.csv and grid.csv: the factors, and what came out."""
    return factors(recipe) | {
        "val_recon": found.val_recon,
        "best_epoch": found.best_epoch,
        "epochs": len(found.rows),
        "seconds": found.seconds,
    }


def draw_losses(found: Fit, recipe: Recipe, test_recon: float, pca_recon: float, about: str):
    """Training and validation error by epoch, beside the error of PCA."""
    figure, axes = new_figure(width=7.2, height=4.6)
    ax = axes[0, 0]
    epochs = [row["epoch"] for row in found.rows]
    series = {"training images, as they go": "train_loss", "validation images": "val_recon"}
    curves(
        ax,
        {name: (epochs, [row[key] for row in found.rows]) for name, key in series.items()},
        xlabel="epoch",
        ylabel="mean squared error per pixel",
    )
    ax.plot(found.best_epoch, found.val_recon, "k^", label=f"best on validation: {found.val_recon:.5f}")
    k = recipe.enc_dims[-1]
    ax.plot(found.best_epoch, test_recon, "o", color=COLORS[2], label=f"test images, best weights: {test_recon:.5f}")
    ax.axhline(
        pca_recon, color="black", linewidth=1, linestyle=":", label=f"PCA, K = {k}, test images: {pca_recon:.5f}"
    )
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.legend()
    less = f"{1 - test_recon / pca_recon:.0%} below" if test_recon < pca_recon else "not below"
    figure.suptitle(f"{about}\ntest images are reconstructed to {test_recon:.5f}: {less} PCA with {k} numbers")
    return figure


def draw_reconstructions(model: Autoencoder, data: Inputs, test_recon: float, about: str):
    """Two test images of each class, their reconstructions, and the difference."""
    figure, axes = new_figure(3, 1, width=10, height=3.1)
    x = pixels(data.x_test[first_of_each(data.y_test, 2, len(data.classes))])  # (n, 784)
    output = model.predict(x)
    named = {"test images": (x, 0, 1), "reconstructions": (output, 0, 1), "difference (± 0.5)": (output - x, -0.5, 0.5)}
    for ax, (name, (values, low, high)) in zip(axes[:, 0], named.items(), strict=True):
        image_grid(ax, values.reshape(-1, SIDE, SIDE).cpu().numpy(), len(x), vmin=low, vmax=high)
        ax.set_title(name, fontsize=10, loc="left")
    shares = [
        fine_share(values) for values in (model.predict(pixels(data.x_test)) - pixels(data.x_test), pixels(data.x_test))
    ]
    lost = (
        f"wavelengths under {FINE} pixels hold {shares[0]:.0%} of the error's variance, {shares[1]:.0%} of the images'"
    )
    psnr = -10 * math.log10(test_recon)
    figure.suptitle(f"{about}: test MSE {test_recon:.5f}, PSNR {psnr:.1f} dB\n{lost}")
    return figure


def fine_share(x: torch.Tensor) -> float:
    """The share of the variance over pixels of the images x (N, 784) in wavelengths under `FINE` pixels."""
    power = torch.fft.fft2(x.cpu().reshape(-1, SIDE, SIDE)).abs().square().sum(0)  # (28, 28)
    frequency = torch.fft.fftfreq(SIDE)  # cycles per pixel
    radius = (frequency.square()[:, None] + frequency.square()).sqrt()
    return (power[radius > 1 / FINE].sum() / power[radius > 0].sum()).item()


def effects(rows: list[dict]) -> dict[str, dict]:
    """Factor → level → geometric mean of val_recon over the combinations that all its levels have in common.

    Only factors with several levels; one that diverged at any level is left out at every level. Rows: as `as_row`.
    """
    found = {}
    for factor in FACTORS:
        levels = list(dict.fromkeys(row[factor] for row in rows))
        groups = matched(rows, factor)
        if len(levels) > 1 and groups:
            found[factor] = {level: math.exp(np.mean([math.log(group[level]) for group in groups])) for level in levels}
    return found


def spreads(found: dict[str, dict]) -> dict[str, float]:
    """How far each factor's worst level lies above its best, as a fraction of the best; found: of `effects`."""
    return {factor: max(means.values()) / min(means.values()) - 1 for factor, means in found.items()}


def matched(rows: list[dict], factor: str) -> list[dict]:
    """Groups of combinations that differ in `factor` alone: in each, level → val_recon. None of them diverged."""
    groups = {}
    for row in rows:
        rest = tuple(row[name] for name in FACTORS if name != factor)
        groups.setdefault(rest, {})[row[factor]] = row["val_recon"]
    return [group for group in groups.values() if all(math.isfinite(value) for value in group.values())]


def draw_grid(rows: list[dict], epochs: int, title: str):
    """A panel for each factor: combinations that differ in it alone are joined by a line, the mean is thick."""
    best = min(rows, key=lambda row: row["val_recon"])
    found = effects(rows) or {"enc_dims": {best["enc_dims"]: best["val_recon"]}}
    n = len(found)
    figure, axes = new_figure(1, n, width=max(7.4, 2.6 * n), height=4.4, sharey=True)
    for ax, (factor, means) in zip(axes[0], found.items(), strict=True):
        at = {level: i for i, level in enumerate(means)}
        for group in matched(rows, factor):
            ax.plot(
                [at[level] for level in group], list(group.values()), "o-", color="#BBBBBB", linewidth=0.8, markersize=3
            )
        ax.plot(list(at.values()), list(means.values()), "o-", color=COLORS[0], linewidth=2.2, label="geometric mean")
        ax.set_xticks(list(at.values()), [f"{level:g}" if isinstance(level, float) else level for level in at])
        ax.set(xlabel=factor.replace("_", " "), xlim=(-0.4, len(at) - 0.6))
    axes[0, 0].set_ylabel("validation MSE per pixel")
    ranked = sorted(spreads(found).items(), key=lambda item: -item[1])
    spread = "; ".join(f"{name.replace('_', ' ')} {gain:.1%}" for name, gain in ranked)
    joined = "lines join those that differ in one factor alone, and show what a mean hides\n"
    if n > 1:
        axes[0, 0].legend(loc="best")
    figure.suptitle(
        f"{title}: {len(rows)} combinations of {epochs} epochs, one seed each\n{joined if n > 1 else ''}"
        f"the worst level's mean error is above the best's by: {spread}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
