"""What do the filters of the CNN look for, and what is left of a digit after each layer?

    python numpy_nn/visualize_filters.py
    python numpy_nn/visualize_filters.py --ckpt runs/numpy_nn/train_mnist_numpy/best.npz --digits 3 7

Rebuilds the CNN of train_mnist_numpy.py from best.json beside its weights. The first layer's filters are small enough
to look at; the deeper ones are shown by their responses: the feature maps of every layer up to the first fully
connected one, for one validation image of each digit asked for. On 1,000 validation images a map that is zero
everywhere after its ReLU is counted as dead.

Writes filters.png, feature_maps.png, metrics.json. Source: Zeiler and Fergus 2014.
Shapes: N images, C channels, H W pixels, k kernel.
"""

from pathlib import Path

import numpy as np

from numpy_nn.activations import ReLU
from numpy_nn.cnn import RECIPES, build_network
from numpy_nn.conv import Conv2d
from numpy_nn.inputs import CHUNK, load_inputs, predict_logits
from numpy_nn.losses import log_softmax
from numpy_nn.network import Sequential
from shared_utils.cli import UserError, make_parser, non_negative_int, run_main
from shared_utils.plotting import image_grid, new_figure, save_figure
from shared_utils.runs import find_output, read_json, start_run

FILTER_COLUMNS, MAP_COLUMNS = 8, 16  # side by side


def load_network(weights: Path, described: Path) -> tuple[Sequential, str]:
    """The network of `weights` (.npz) and its recipe, which `described` (.json) names. Errors: `UserError`."""
    about = read_json(described)
    recipe, classes = (about.get("recipe"), about.get("n_classes", 10)) if isinstance(about, dict) else (None, 10)
    if recipe not in RECIPES or not isinstance(classes, int) or classes < 1:
        raise UserError(f"{described} names no recipe or classes: it was not written by train_mnist_numpy.py")
    network = build_network(recipe, np.random.default_rng(0), classes)
    network.load(weights)
    return network, recipe


def feature_maps(network: Sequential, x: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """(name, output (N, C, H, W)) of every layer that gives maps, in evaluation mode; x: (N, 1, H, W)."""
    found = []
    for layer in network.layers:
        x = layer.forward(x)
        if x.ndim != 4:
            break
        found.append((f"{len(found) + 1} {type(layer).__name__}", x))
    return found


def layer_statistics(network: Sequential, x: np.ndarray) -> list[dict]:
    """For each layer with maps, over all images of x: mean, active fraction, and after a ReLU the dead maps."""
    rows = []
    for (name, maps), layer in zip(feature_maps(network, x), network.layers, strict=False):
        row = {"layer": name, "channels": maps.shape[1], "pixels": maps.shape[2], "mean_activation": float(maps.mean())}
        if isinstance(layer, ReLU):
            dead = ~(maps > 0).any((0, 2, 3))  # (C,)
            row |= {"active_fraction": float((maps > 0).mean()), "dead_fraction": float(dead.mean())}
        rows.append(row)
    return rows


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, device=False)
    parser.add_argument("--ckpt", metavar="FILE", help="weights (default: train_mnist_numpy.py's best.npz)")
    parser.add_argument("--digits", type=non_negative_int, nargs="+", default=[3, 7], help="classes shown (0 to 9)")
    return parser


def main(argv=None) -> dict:
    """Draw filters and feature maps; returns the metrics."""
    args = build_parser().parse_args(argv)
    weights = Path(args.ckpt) if args.ckpt else find_output(args, "train_mnist_numpy", "best.npz")
    if weights.is_dir():
        raise UserError(f"{weights} is a folder, not a file of weights")
    described = weights.with_suffix(".json") if args.ckpt else find_output(args, "train_mnist_numpy", "best.json")
    network, recipe = load_network(weights, described)
    data = load_inputs(args)
    digits = list(dict.fromkeys(args.digits))
    if max(digits) >= len(data.classes):
        raise UserError(f"--digits {max(digits)}: {args.dataset} has the classes 0 to {len(data.classes) - 1}")
    if missing := set(digits) - set(data.y_val.tolist()):
        digit = min(missing)
        raise UserError(f"--digits {digit}: none of the validation images is of the class {data.classes[digit]}")
    if network.layers[-1].params["b"].size != len(data.classes):
        raise UserError(f"{weights} tells {network.layers[-1].params['b'].size} classes apart, not {len(data.classes)}")
    run = start_run(args)

    at = np.array([np.flatnonzero(data.y_val == digit)[0] for digit in digits])  # the first of each in validation
    shown = data.x_val[at]  # (N, 1, 28, 28)
    p = np.exp(log_softmax(predict_logits(network, shown)))  # (N, K)
    answers = [
        {"digit": data.classes[d], "read_as": data.classes[row.argmax()], "probability": float(row.max())}
        for d, row in zip(digits, p, strict=True)
    ]
    statistics = layer_statistics(network, data.x_val[:CHUNK])
    rectified = [row for row in statistics if "dead_fraction" in row]
    maps = sum(row["channels"] for row in rectified)
    dead = round(sum(row["channels"] * row["dead_fraction"] for row in rectified))

    first = next(layer for layer in network.layers if isinstance(layer, Conv2d))
    title = f"{data.title}, {recipe} recipe"
    correlation = neighbour_correlation(first.params["W"])
    save_figure(draw_filters(first.params["W"], correlation, title), run.path("filters.png"))
    save_figure(draw_maps(network, shown, answers, statistics, title), run.path("feature_maps.png"))
    return run.finish(
        {
            "recipe": recipe,
            "neighbour_correlation": correlation,
            "maps_after_relu": maps,
            "dead_maps": dead,
            "dead_fraction": dead / maps if maps else 0.0,
            "active_fraction_first_relu": rectified[0]["active_fraction"] if rectified else None,
            "active_fraction_last_relu": rectified[-1]["active_fraction"] if rectified else None,
            "layers": statistics,
            "shown": answers,
        }
    )


def neighbour_correlation(W: np.ndarray) -> float:
    """Correlation of weights that lie side by side in a filter (O, C, k, k), k > 1: about 0 as drawn at random."""
    pairs = ((W[..., :, 1:], W[..., :, :-1]), (W[..., 1:, :], W[..., :-1, :]))
    a, b = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    return float(np.corrcoef(a, b)[0, 1])


def draw_filters(W: np.ndarray, correlation: float, title: str):
    """The first layer's filters (O, C, k, k), first channel, on one scale that is white at 0."""
    filters, limit = W[:, 0], np.abs(W[:, 0]).max()
    rows = -(-len(filters) // FILTER_COLUMNS)
    figure, axes = new_figure(width=8.4, height=0.6 + 0.9 * rows)
    image_grid(axes[0, 0], filters, FILTER_COLUMNS, vmin=-limit, vmax=limit, cmap="RdBu_r")
    figure.colorbar(axes[0, 0].images[0], ax=axes, shrink=0.8, label="weight per\nstandardised grey")
    said = f"{len(W)} filters of {W.shape[2]}×{W.shape[3]}; neighbouring weights correlate by {correlation:.2f}"
    figure.suptitle(f"{title}: {said} (0 when drawn at random)", fontsize=10)
    return figure


def draw_maps(network: Sequential, x: np.ndarray, answers: list[dict], statistics: list[dict], title: str):
    """A column per image, a row per layer; in each the maps of all channels, scaled together."""
    maps = feature_maps(network, x)
    heights = [2.0, *(-(-values.shape[1] // MAP_COLUMNS) for _, values in maps)]
    height = min(30.0, 0.8 + 0.42 * sum(heights) + 0.28 * len(heights))
    width = max(8.0, 6.6 * len(x))
    figure, axes = new_figure(len(heights), len(x), width=width, height=height, height_ratios=heights)
    for j, answer in enumerate(answers):
        axes[0, j].imshow(x[j, 0])
        axes[0, j].axis("off")
        axes[0, j].set_title(f"{answer['digit']}, read as {answer['read_as']} ({answer['probability']:.1%})")
        for i, ((name, values), row) in enumerate(zip(maps, statistics, strict=True), start=1):
            signed = values.min() < 0
            limit = max(float(np.abs(values).max()), 1e-12)
            scale = {"vmin": -limit if signed else 0, "vmax": limit, "cmap": "RdBu_r" if signed else "magma"}
            image_grid(axes[i, j], values[j], MAP_COLUMNS, **scale)
            size = f"{values.shape[1]} maps of {values.shape[2]}×{values.shape[3]}"
            active = f", {row['active_fraction']:.0%} active" if "active_fraction" in row else ""
            axes[i, j].set_title(f"{name}: {size}{active}", fontsize=8)
    for row in axes[1:]:
        figure.colorbar(row[-1].images[0], ax=list(row), shrink=0.9, pad=0.01)
    active = [f"{row['active_fraction']:.0%}" for row in statistics if "active_fraction" in row]
    figure.suptitle(f"{title}: of the outputs of each ReLU in turn {' and '.join(active)} are above 0", fontsize=11)
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
