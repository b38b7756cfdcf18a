"""Where does the best multilayer perceptron of train_mlp.py go wrong, and how sure is it then?

    python numpy_nn/evaluate_mlp.py
    python numpy_nn/evaluate_mlp.py --ckpt runs/numpy_nn/train_mlp/best.npz --worst 40

Rebuilds the network from best.json beside the weights, and shows the confusion matrix of the test images and the
mistakes that it gave the highest probability: some of them a person would make too, some labels are doubtful.

Writes confusion_matrix.png, worst_mistakes.png, metrics.json. Source: Wilson 1927 for the interval.
Shapes: N images, K classes.
"""

from pathlib import Path

import numpy as np

from numpy_nn.inputs import Inputs, load_inputs, predict_logits
from numpy_nn.losses import log_softmax
from numpy_nn.mlp import ACTIVATIONS, build_mlp
from numpy_nn.network import Sequential
from shared_utils import plotting
from shared_utils.cli import UserError, make_parser, positive_int, run_main
from shared_utils.runs import find_output, read_json, start_run
from shared_utils.stats import wilson_interval


def load_network(weights: Path, data: Inputs) -> Sequential:
    """The network in `weights` (.npz) with the architecture in the .json beside it. Errors: `UserError`, one line."""
    if weights.is_dir():
        raise UserError(f"{weights} is a folder, not a file of weights")
    described = weights.with_suffix(".json")
    about = read_json(described)
    try:
        hidden, activation, inputs, classes = (about[key] for key in ("hidden", "activation", "inputs", "classes"))
        sizes = [*hidden, inputs, len(classes)]
        known = activation in ACTIVATIONS and all(isinstance(size, int) and size > 0 for size in sizes)
    except (KeyError, TypeError):
        known = False
    if not known:
        raise UserError(f"{described} describes no network of train_mlp.py")
    network = build_mlp(hidden, activation, inputs, len(classes))
    network.load(weights)
    if inputs != data.x_test[0].size or tuple(classes) != data.classes:
        raise UserError(f"{weights} was trained on the classes {', '.join(classes)}, not on those of this --dataset")
    return network


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, device=False)
    parser.add_argument("--ckpt", metavar="FILE", help="weights (default: train_mlp.py's best.npz)")
    parser.add_argument("--worst", type=positive_int, default=24, help="mistakes shown")
    return parser


def main(argv=None) -> dict:
    """Evaluate and draw; returns the metrics."""
    args = build_parser().parse_args(argv)
    weights = Path(args.ckpt) if args.ckpt else find_output(args, "train_mlp", "best.npz")
    data = load_inputs(args)
    network = load_network(weights, data)
    run = start_run(args)

    p = np.exp(log_softmax(predict_logits(network, data.x_test)))  # (N, K)
    predicted, confidence = p.argmax(1), p.max(1)
    wrong = np.flatnonzero(predicted != data.y_test)
    worst = wrong[np.argsort(-confidence[wrong], kind="stable")][: args.worst]
    n, right = len(data.y_test), len(data.y_test) - len(wrong)
    matrix = np.zeros((len(data.classes),) * 2, dtype=int)
    np.add.at(matrix, (data.y_test, predicted), 1)

    metrics = {
        "test_accuracy": right / n,
        "test_errors": len(wrong),
        "interval": wilson_interval(right, n),
        "mean_confidence_right": float(confidence[predicted == data.y_test].mean()) if right else None,
        "mean_confidence_wrong": float(confidence[wrong].mean()) if len(wrong) else None,
        "confusion_matrix": matrix,
        "worst": [
            {
                "test_image": i,
                "true": data.classes[data.y_test[i]],
                "predicted": data.classes[predicted[i]],
                "confidence": float(confidence[i]),
            }
            for i in worst
        ],
    }
    plotting.save_figure(draw_matrix(matrix, data, metrics), run.path("confusion_matrix.png"))
    plotting.save_figure(draw_worst(worst, predicted, confidence, data, metrics), run.path("worst_mistakes.png"))
    return run.finish(metrics)


def draw_matrix(matrix: np.ndarray, data: Inputs, metrics: dict):
    """The confusion matrix, its largest entry off the diagonal named in the title."""
    errors = matrix * (1 - np.eye(len(matrix), dtype=int))
    a, b = np.unravel_index(errors.argmax(), errors.shape)
    low, high = metrics["interval"]
    figure, axes = plotting.new_figure(width=6.6, height=6.2)
    title = f"most frequent: {data.classes[a]} read as {data.classes[b]} ({errors[a, b]} times)"
    title = title if errors.any() else "no mistake"
    image = plotting.confusion_matrix(axes[0, 0], matrix, data.classes, title=title)
    figure.colorbar(image, ax=axes, shrink=0.75, label="test images (errors only)")
    accuracy = f"{metrics['test_accuracy']:.2%} right (95 %: {100 * low:.2f} to {100 * high:.2f})"
    figure.suptitle(f"{data.title}, MLP: {accuracy}, {metrics['test_errors']} wrong", fontsize=11)
    return figure


def draw_worst(worst: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, data: Inputs, metrics: dict):
    """The mistakes of the highest confidence, with what they are, what was read, and the probability given to it."""
    columns = 8
    rows = max(1, -(-len(worst) // columns))
    figure, axes = plotting.new_figure(width=9.6, height=0.8 + 1.45 * rows)
    ax = axes[0, 0]
    if len(worst):
        names = data.classes
        labels = [f"{names[data.y_test[i]]} read as {names[predicted[i]]}\n{confidence[i]:.1%}" for i in worst]
        plotting.image_grid(ax, data.x_test[worst], columns, labels=labels)
        sure = (confidence[worst] > 0.99).sum()
        title = f"the {len(worst)} surest of {metrics['test_errors']} mistakes; {sure} with more than 99 %"
    else:
        ax.axis("off")
        title = "no mistake at all"
    figure.suptitle(f"{data.title}, MLP: {title}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
