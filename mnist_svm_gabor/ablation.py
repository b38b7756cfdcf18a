"""What does each step from raw pixels to the best SVM bring, and what does it cost?

    python mnist_svm_gabor/ablation.py
    python mnist_svm_gabor/ablation.py --train-size 10000

Seven rungs at 28×28, each changing one thing in the one before: raw pixels; deskewing; rectified Gabor responses at 6×6
places; the energy of quadrature pairs instead; Gaussian pooling around those places; the cube root; whitening by half.
Every rung feeds 100 principal components to an RBF SVM whose C and gamma were chosen on validation. McNemar's
exact test says whether a rung differs from the one before.

Writes ablation.png, history.csv, metrics.json.
"""

import time
from dataclasses import replace

import numpy as np

from mnist_svm_gabor.features import BANKS, Preparation
from mnist_svm_gabor.protocol import accuracy_metrics, choose_and_fit, default_grid, folds, load
from shared_utils.cli import make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything
from shared_utils.stats import mcnemar


def build_parser():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--train-size", type=positive_int, help="training images, stratified (default: all)")
    return parser


def rungs() -> list[tuple[str, Preparation, float]]:
    """Name, preparation and whitening, from raw pixels to the best."""
    best = BANKS[28]
    energy = replace(best, window=0.0, power=1.0)
    return [
        ("raw pixels", Preparation(28), 0.0),
        ("deskewed", Preparation(28, True), 0.0),
        ("Gabor, rectified", Preparation(28, True, replace(energy, energy=False)), 0.0),
        ("energy instead", Preparation(28, True, energy), 0.0),
        ("pooled", Preparation(28, True, replace(best, power=1.0)), 0.0),
        ("cube root", Preparation(28, True, best), 0.0),
        ("whitened by half", Preparation(28, True, best), 0.5),
    ]


def main(argv=None) -> dict:
    """Climb the ladder; returns the metrics."""
    args = build_parser().parse_args(argv)
    rng, device = seed_everything(args.seed), pick_device(args.device)
    train, test = load(args, rng)
    parts = folds(train.y, rng, len(train.classes))
    run = start_run(args)
    rows, before = [], None
    for name, prepare, whitening in rungs():
        started = time.perf_counter()
        x, x_test = prepare(train.x, device), prepare(test.x, device)
        featured = time.perf_counter()
        grid = replace(default_grid("rbf"), whitenings=[whitening], components=[100])
        fitted = choose_and_fit(x, train.y, parts, "rbf", grid)
        predicting = time.perf_counter()
        right = fitted.predict(x_test) == test.y
        row = {
            "step": name,
            "numbers": x.shape[1],
            **accuracy_metrics(np.where(right, test.y, -1), test.y),
            "mcnemar_p": None if before is None else mcnemar(right, before)[2],
            "chosen": fitted.trials[0],
            "features_seconds": featured - started,
            "fit_seconds": fitted.fit_seconds,
            "predict_seconds": time.perf_counter() - predicting,
        }
        rows.append(row)
        before = right
        run.log(step=name, test_errors=row["test_errors"], features_s=featured - started, fit_s=fitted.fit_seconds)
    save_figure(draw(rows, len(train), len(test), test.title), run.path("ablation.png"))
    return run.finish({"train_size": len(train), "steps": rows})


def draw(rows: list[dict], n_train: int, n_test: int, title: str):
    """Errors of each rung with their 95 % interval, McNemar's p between neighbours, and the seconds."""
    figure, axes = new_figure(1, 2, width=12, height=4.6, width_ratios=[2, 1], sharey=True)
    errors, places = np.array([row["test_errors"] for row in rows]), np.arange(len(rows))
    low, high = (n_test * (1 - np.array([row["interval"][side] for row in rows])) for side in (1, 0))
    ax = axes[0, 0]
    ax.errorbar(errors, places, xerr=[errors - low, high - errors], fmt="o", color=COLORS[0], capsize=3)
    for place, row in enumerate(rows):
        ax.annotate(str(row["test_errors"]), (errors[place], place), (0, 6), textcoords="offset points", ha="center")
        if place:
            p = row["mcnemar_p"]
            verdict = f"p = {p:.2g}" + (" (not resolved)" if p > 0.05 else "")
            ax.annotate(verdict, (1.01, place - 0.5), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    ax.set_yticks(places, [("+ " if place else "") + row["step"] for place, row in enumerate(rows)])
    ax.invert_yaxis()
    ax.set(
        xlabel=f"wrong of {n_test:,} test images (95 % Wilson interval)",
        title="errors; p: McNemar, against the row above",
    )
    left = np.zeros(len(rows))
    for index, part in enumerate(("features", "fit", "predict")):
        seconds = np.array([row[f"{part}_seconds"] for row in rows])
        axes[0, 1].barh(places, seconds, left=left, height=0.6, color=COLORS[index], label=part)
        left += seconds
    axes[0, 1].set(xlabel="time (s)", title="cost (the search apart)")
    axes[0, 1].legend()
    figure.suptitle(
        f"{title}, {n_train:,} training images: from {errors[0]} errors on raw pixels to {errors[-1]}, step by step"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
