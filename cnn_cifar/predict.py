"""What is in this picture?

    python cnn_cifar/predict.py
    python cnn_cifar/predict.py my_cat.jpg folder_of_pictures
    python cnn_cifar/predict.py --ckpt runs/cnn_cifar/fast_cifar/best.pth my_cat.jpg

Classifies image files, or all images of a folder, with a network that allcnn.py or fast_cifar.py trained; without
paths, the first 16 test images. A picture is brought to 32×32 pixels first: its middle square, shrunk by averaging the
pixels that fall together. The figure shows what the network saw, and its three likeliest classes:

    p(class k) = exp(z_k) / Σ_j exp(z_j)        of the logits z

Whatever is in the picture, the network knows only its ten classes, and their probabilities add up to 1.

Writes predictions.png, predictions.csv, metrics.json.
Shapes: N pictures, K classes.
"""

import numpy as np
import torch
from PIL import Image

from cnn_cifar.checkpoints import add_ckpt_flag, find_checkpoint, load_network, load_test
from cnn_cifar.inputs import SHAPE, logits_of
from shared_utils.cli import make_parser, run_main
from shared_utils.data import image_files, read_image
from shared_utils.device import pick_device
from shared_utils.plotting import COLORS, new_figure, save_figure
from shared_utils.runs import start_run, write_csv

SHOWN = 16  # pictures in the figure, at most
TOP = 3


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, dataset="cifar10")
    parser.add_argument("paths", nargs="*", metavar="PICTURE", help="image files, or folders of them")
    add_ckpt_flag(parser)
    return parser


def small(picture: np.ndarray) -> np.ndarray:
    """The middle square of uint8 (3, H, W), as uint8 (3, 32, 32)."""
    side = min(picture.shape[1:])
    top, left = ((length - side) // 2 for length in picture.shape[1:])
    square = Image.fromarray(picture[:, top : top + side, left : left + side].transpose(1, 2, 0))
    shrinks = side > SHAPE[1]
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BILINEAR
    return np.asarray(square.resize(SHAPE[1:], method)).transpose(2, 0, 1)


def main(argv=None) -> dict:
    """Classify what is asked for; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    path = find_checkpoint(args)
    network, state = load_network(path, device)
    classes, labels, source = state["classes"], None, "the pictures given"
    if args.paths:
        names = [str(file) for file in image_files(args.paths)]
        x = np.stack([small(read_image(name, channels=3)) for name in names])  # (N, 3, 32, 32)
    else:
        test = load_test(args, path, state)[:SHOWN]
        names, x, labels = [f"{args.dataset} test image {i}" for i in range(len(test))], test.x, test.y
        source = f"{test.title}'s test images"
    run = start_run(args)

    probabilities = logits_of(network, torch.from_numpy(x).to(device)).softmax(1).cpu().numpy()  # (N, K)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :TOP]  # (N, 3)
    rows = []
    for name, p, likeliest in zip(names, probabilities, order, strict=True):
        top = [{"class": classes[k], "probability": float(p[k])} for k in likeliest]
        print(f"{name}: " + ", ".join(f"{one['class']} {one['probability']:.1%}" for one in top))
        rows.append({"picture": name, "top": top})
    table = []
    for row in rows:
        top = {f"{key}_{i}": value for i, one in enumerate(row["top"], 1) for key, value in one.items()}
        table.append({"picture": row["picture"], **top})
    write_csv(run.path("predictions.csv"), table)
    accuracy = {} if labels is None else {"accuracy": float((order[:, 0] == labels).mean())}
    truth = None if labels is None else [classes[label] for label in labels]
    save_figure(draw(x[:SHOWN], rows, truth, f"{state['title']} network on {source}"), run.path("predictions.png"))
    return run.finish({"pictures": len(x), "trained_on": state["title"], **accuracy, "predictions": rows[:SHOWN]})


def draw(x: np.ndarray, rows: list[dict], truth: list[str] | None, about: str):
    """Each picture x (n, 3, 32, 32) as the network saw it, with bars for its likeliest classes."""
    columns = min(4, len(x))
    lines = -(-len(x) // columns)
    figure, axes = new_figure(
        lines,
        2 * columns,
        width=3.1 * columns,
        height=1.15 * lines + 0.7,
        gridspec_kw={"width_ratios": [1, 1.6] * columns},
    )
    for at, (left, right) in enumerate(axes.reshape(-1, 2)):
        left.axis("off")
        right.axis("off")
        if at >= len(x):
            continue
        left.imshow(x[at].transpose(1, 2, 0), interpolation="nearest")
        for place, one in enumerate(rows[at]["top"]):
            wrong = truth is not None and one["class"] != truth[at]
            right.barh(place, one["probability"], color="#BBBBBB" if wrong else COLORS[0], alpha=0.5)
            right.text(0.02, place, f"{one['class']} {one['probability']:.1%}", va="center", fontsize=8)
        right.set(xlim=(0, 1), ylim=(2.6, -0.6))
    if truth is None:
        finding = (
            f"{len(x)} of {len(rows)} shown"
            if len(x) < len(rows)
            else f"the {min(TOP, len(rows[0]['top']))} likeliest classes"
        )
    else:
        right_ones = sum(row["top"][0]["class"] == name for row, name in zip(rows, truth, strict=True))
        finding = f"{right_ones} of {len(rows)} right (blue: the true class)"
    figure.suptitle(f"{about}: {finding}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
