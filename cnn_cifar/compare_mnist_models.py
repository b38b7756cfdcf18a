"""Which network reads digits best, and at what cost: dense layers, convolutions, a transformer, or ImageNet's veterans?

    python cnn_cifar/compare_mnist_models.py --amp
    python cnn_cifar/compare_mnist_models.py --models slim_cnn --recipe strong --amp --out runs/cnn_cifar/strong
    python cnn_cifar/compare_mnist_models.py --models vgg16 alexnet --pretrained --amp --out runs/cnn_cifar/pretrained

Each network of zoo.py is trained as digit_training.py says, on all training images; the last epoch's weights count, and
nothing is chosen by the test images. Compared are test accuracy and macro F1, loss, parameters, seconds of training and
images a second at inference. McNemar's test compares two networks by the images that only one of them gets right. The
networks trained from several seeds are also judged as an ensemble: by the mean of their probabilities.

`--pretrained` takes torchvision's ImageNet weights for vgg16 and alexnet, from `--weights-dir` or by download, under
torchvision's own file names. `--recipe strong` distorts the images. The curves show the error on the test images,
or with `--val-size` on held-out training images.

Writes model_comparison.png, training_curves.png, sample_images.png, confusion_matrices.png, shared_errors.png,
table.md, history.csv, metrics.json. With a vit also vit_attention.png and vit_positions.png; of each training
<model>_<seed>.npz (arrays probabilities, losses, accuracies, seconds, …) and <model>_<seed>.pth.
With --resume a comparison that was stopped goes on with the trainings that are missing.
Sources: see zoo.py, digit_training.py and vit.py; McNemar 1947; Wilson 1927.
Shapes: N images, K classes.
"""

import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import confusion_matrix as counted
from sklearn.metrics import f1_score, log_loss
from torch import Tensor

from cnn_cifar.digit_figures import (
    draw_attention,
    draw_comparison,
    draw_confusions,
    draw_curves,
    draw_errors,
    draw_positions,
    draw_samples,
)
from cnn_cifar.digit_training import RECIPES, fit, probabilities
from cnn_cifar.inputs import Data, add_data_flags, load
from cnn_cifar.pretrained import imagenet_weights
from cnn_cifar.zoo import MODELS, TORCHVISION, build, title_of
from shared_utils import checkpoint
from shared_utils.checkpoint import load_arrays, save_arrays
from shared_utils.cli import UserError, add_amp, add_seeds, make_parser, positive_int, run_main
from shared_utils.device import pick_device
from shared_utils.plotting import save_figure
from shared_utils.runs import Run, start_run, write_text
from shared_utils.seeding import seed_everything
from shared_utils.stats import mcnemar, wilson_interval

SIX = ["fcnn", "cnn", "deep_cnn", "vit", "vgg16", "alexnet"]  # those of the comparison without further flags
KEPT = ("probabilities", "losses", "accuracies", "seconds", "images_per_second", "parameters", "title")


def build_parser():
    """The command line."""
    quick = {"models": ["fcnn", "cnn", "deep_cnn", "vit"], "epochs": 1}
    parser = make_parser(__doc__, quick=quick)
    add_data_flags(parser, batch_size=64, val_size=0)
    parser.add_argument("--models", nargs="+", default=SIX, help=f"which networks of zoo.py: {' '.join(MODELS)}")
    parser.add_argument("--epochs", type=positive_int, default=10, help="passes over the training images")
    parser.add_argument("--torchvision-epochs", type=positive_int, default=5, help="epochs of vgg16 and alexnet")
    parser.add_argument("--recipe", choices=RECIPES, default="plain", help="strong: distorted images, smoothed labels")
    add_seeds(parser, [0], "one training of each network")
    parser.add_argument("--pretrained", action="store_true", help="vgg16 and alexnet begin with ImageNet's weights")
    parser.add_argument("--weights-dir", help="where those are, or are downloaded to (default: weights in --data-dir)")
    add_amp(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the trainings that are missing")
    return parser


def main(argv=None) -> dict:
    """Train each, compare; returns the metrics."""
    args = build_parser().parse_args(argv)
    if unknown := [name for name in args.models if name not in MODELS]:
        raise UserError(f"--models {' '.join(unknown)}: unknown; there are {', '.join(MODELS)}")
    if len(set(args.models)) < len(args.models):
        raise UserError(f"--models {' '.join(args.models)}: each once")
    if args.pretrained and not set(args.models) & set(TORCHVISION):
        raise UserError(f"--pretrained: for {' and '.join(TORCHVISION)}, which are not among --models")
    if args.batch_size < 2:
        raise UserError("--batch-size 1: BatchNorm learns from how images differ, give at least 2")
    device = pick_device(args.device)
    used = [name for name in args.models if name in TORCHVISION and args.pretrained]
    instead = "say where it is with --weights-dir, or train from scratch: leave --pretrained out"
    folder = args.weights_dir or Path(args.data_dir) / "weights"
    weights = {name: imagenet_weights(name, folder, instead) for name in used}
    for name in used:
        build(name, 10, weights[name])  # another network's are refused before the run begins
    data = load(args, device, shape=(1, 28, 28))
    run = start_run(args)
    found = {
        name: [trained(name, seed, weights.get(name), data, args, run) for seed in args.seeds] for name in args.models
    }
    y = data.test.y.cpu().numpy()
    rows = [row_of(name, outcomes, y) for name, outcomes in found.items()]
    right = {name: outcomes[0]["probabilities"].argmax(1) == y for name, outcomes in found.items()}
    pairs = [compared(a, b, right) for a, b in combinations(right, 2)]
    passes = {args.torchvision_epochs if name in TORCHVISION else args.epochs for name in args.models}
    epochs = f"{' or '.join(map(str, sorted(passes)))} epoch{'s' if passes != {1} else ''}"
    about = f"{data.title}, {len(data.train):,} images, {epochs}, {args.recipe} recipe"
    save_figure(draw_comparison(rows, pairs, about), run.path("model_comparison.png"))
    save_figure(draw_curves(found, rows, "validation" if data.val else "test", about), run.path("training_curves.png"))
    save_figure(draw_samples(data, args.recipe, args.seed), run.path("sample_images.png"))
    matrices = {
        row["label"]: counted(y, outcomes[0]["probabilities"].argmax(1), labels=range(len(data.classes)))
        for row, outcomes in zip(rows, found.values(), strict=True)
    }
    save_figure(draw_confusions(matrices, data), run.path("confusion_matrices.png"))
    save_figure(draw_errors(found, data), run.path("shared_errors.png"))
    if "vit" in args.models:
        network = build("vit", len(data.classes)).to(device).eval()
        network.load_state_dict(checkpoint.load(run.path(f"vit_{args.seeds[0]}.pth"), device=device)["model"])
        save_figure(draw_attention(network, data), run.path("vit_attention.png"))
        save_figure(draw_positions(network), run.path("vit_positions.png"))
    write_text(run.path("table.md"), markdown(rows))
    best = max(rows, key=lambda row: row["accuracy"])
    return run.finish(
        {
            "data": data.title,
            "recipe": args.recipe,
            "epochs": args.epochs,
            "torchvision_epochs": args.torchvision_epochs,
            "seeds": args.seeds,
            "trainings": len(args.seeds),
            "train_images": len(data.train),
            "test_images": len(y),
            "best": best["model"],
            "best_accuracy": best["accuracy"],
            "by_model": {row["model"]: row for row in rows},
            "models": rows,
            "pairs": pairs,
        }
    )


def trained(name: str, seed: int, weights: dict[str, Tensor] | None, data: Data, args, run: Run) -> dict:
    """What <model>_<seed>.npz holds of a training, which is run unless history.csv has it."""
    path = run.path(f"{name}_{seed}.npz")
    if run.row(model=name, seed=seed):
        return load_arrays(path, KEPT)
    seed_everything(args.seed + seed)  # the network's first weights
    network = build(name, len(data.classes), weights).to(data.train.x.device, memory_format=torch.channels_last)
    how = {"epochs": args.torchvision_epochs if name in TORCHVISION else args.epochs, "batch_size": args.batch_size}
    how |= {"seed": args.seed + seed, "strong": args.recipe == "strong", "amp": args.amp}
    outcome = fit(name, network, data.train, data.val or data.test, **how)
    started = time.perf_counter()
    found = probabilities(network, data.test.x, args.amp).cpu().numpy()
    rate = len(found) / (time.perf_counter() - started)
    checkpoint.save(run.path(f"{name}_{seed}.pth"), model=network.state_dict())
    about = {"losses": outcome.losses, "accuracies": outcome.accuracies, "seconds": outcome.seconds}
    size = sum(p.numel() for p in network.parameters())
    title = title_of(name, weights is not None)
    save_arrays(path, probabilities=found, images_per_second=rate, parameters=size, title=title, **about)
    accuracy = float((found.argmax(1) == data.test.y.cpu().numpy()).mean())
    run.log(model=name, seed=seed, loss=outcome.losses[-1], accuracy=accuracy, seconds=outcome.seconds)
    return load_arrays(path, KEPT)


def row_of(name: str, outcomes: list[dict], y: np.ndarray) -> dict:
    """A network's numbers in the comparison: means over its trainings, and their ensemble where there are several."""
    chosen = [each["probabilities"].argmax(1) for each in outcomes]
    accuracies = [float((one == y).mean()) for one in chosen]
    low, high = wilson_interval(int((chosen[0] == y).sum()), len(y))
    mean = np.mean([each["probabilities"] for each in outcomes], axis=0)
    classes = range(mean.shape[1])
    return {
        "model": name,
        "label": str(outcomes[0]["title"]),
        "accuracy": float(np.mean(accuracies)),
        "accuracies": accuracies,
        "low": low,
        "high": high,
        "f1": float(np.mean([f1_score(y, one, average="macro") for one in chosen])),
        "loss": float(np.mean([log_loss(y, each["probabilities"], labels=classes) for each in outcomes])),
        "ensemble_accuracy": float((mean.argmax(1) == y).mean()) if len(outcomes) > 1 else None,
        "parameters": int(outcomes[0]["parameters"]),
        "training_seconds": float(np.mean([each["seconds"] for each in outcomes])),
        "images_per_second": float(np.mean([each["images_per_second"] for each in outcomes])),
    }


def compared(a: str, b: str, right: dict[str, np.ndarray]) -> dict:
    """McNemar's test of two networks' first trainings."""
    a_alone, b_alone, p = mcnemar(right[a], right[b])
    return {"a": a, "b": b, "only_a_right": a_alone, "only_b_right": b_alone, "p": p}


def markdown(rows: list[dict]) -> str:
    """The comparison as a Markdown table."""
    lines = ["| network | accuracy | macro F1 | loss | parameters | training | images/s |", "| --- " * 7 + "|"]
    for row in rows:
        cells = [row["label"], f"{row['accuracy']:.2%}", f"{row['f1']:.4f}", f"{row['loss']:.4f}"]
        cells += [f"{row['parameters']:,}", f"{row['training_seconds']:.0f} s", f"{row['images_per_second']:,.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main, build_parser)
