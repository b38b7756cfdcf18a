"""Which digit is in this picture?

    python mnist_svm_gabor/predict.py
    python mnist_svm_gabor/predict.py my_digit.png folder_of_pictures
    python mnist_svm_gabor/predict.py --model runs/mnist_svm_gabor/train/raw.npz my_digit.png

Classifies image files, or all images of a folder, with a classifier that train.py wrote; without either, the first 24
test images. A picture of another size than 28×28 is brought into MNIST's form first: light on dark, cropped to the ink,
its longer side 20 pixels, its centre of mass in the middle of 28×28 (LeCun et al. 1998). The figure shows what the
classifier saw.

Writes predictions.png, predictions.csv, metrics.json.
"""

import numpy as np
from PIL import Image

from mnist_svm_gabor.classifier import Classifier
from shared_utils.cli import UserError, make_parser, run_main
from shared_utils.data import image_files, load_images, read_image
from shared_utils.device import pick_device
from shared_utils.plotting import image_grid, new_figure, save_figure
from shared_utils.runs import find_output, start_run, write_csv

SHOWN = 48  # pictures in the figure, at most


def build_parser():
    """The command line."""
    parser = make_parser(__doc__)
    parser.add_argument("paths", nargs="*", metavar="PICTURE", help="image files, or folders of them")
    parser.add_argument("--model", metavar="FILE", help="a classifier (default: train.py's gabor.npz)")
    return parser


def as_mnist(picture: np.ndarray, name: str) -> np.ndarray:
    """A grey picture, uint8 (1, H, W), in MNIST's form: uint8 (1, 28, 28), light on black.

    Dark on light is inverted and the rim's grey subtracted; a picture of 28×28 is otherwise left alone.
    Errors: `UserError` for a blank one.
    """
    grey = picture[0].astype(np.float32)
    rim = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    if np.median(rim) > 127:
        grey, rim = 255 - grey, 255 - rim
    grey = np.clip(grey - np.median(rim), 0, None)
    if grey.max() < 25:
        raise UserError(f"{name}: nothing is drawn on it")
    if grey.shape == (28, 28):
        return np.rint(grey).astype(np.uint8)[None]
    grey *= 255 / grey.max()
    rows, columns = (np.flatnonzero((grey > 64).any(axis)) for axis in (1, 0))
    ink = Image.fromarray(grey[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.uint8))
    factor = 20 / max(ink.size)
    size = tuple(max(1, round(side * factor)) for side in ink.size)
    small = np.asarray(ink.resize(size, Image.Resampling.BILINEAR), dtype=np.float64)  # (h, w), the longer side 20
    mass = small.sum()
    offsets = [
        int(np.clip(round(13.5 - float((small.sum(1 - axis) * np.arange(n)).sum() / mass)), 0, 28 - n))
        for axis, n in enumerate(small.shape)
    ]
    out = np.zeros((1, 28, 28), dtype=np.uint8)
    out[0, offsets[0] : offsets[0] + small.shape[0], offsets[1] : offsets[1] + small.shape[1]] = small
    return out


def main(argv=None) -> dict:
    """Classify what is asked for; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    classifier = Classifier.load(args.model or find_output(args, "train", "gabor.npz"))
    labels, source = None, "the pictures given"
    if args.paths:
        names = [str(path) for path in image_files(args.paths)]
        x = np.stack([as_mnist(read_image(name, channels=1), name) for name in names])
    else:
        test = load_images(args.dataset, "test", args.data_dir, shape=(1, 28, 28))[:24]
        classifier.check_classes(test)
        source = test.title
        names, x, labels = [f"{args.dataset} test image {i}" for i in range(len(test))], test.x, test.y
    run = start_run(args)

    scores = classifier.scores(x, device)  # (N, K)
    first, second = np.argsort(-scores, axis=1, kind="stable")[:, :2].T
    rows = [
        {"picture": name, "prediction": classifier.classes[a], "runner_up": classifier.classes[b]}
        for name, a, b in zip(names, first, second, strict=True)
    ]
    for row in rows:
        print(f"{row['picture']}: {row['prediction']} (runner-up {row['runner_up']})")
    write_csv(run.path("predictions.csv"), rows)

    shown = min(len(x), SHOWN)
    columns = min(shown, 12)
    counted = f"{shown} of {len(x)} shown" if labels is None else f"{(first == labels).sum()} of {len(x)} right"
    figure, axes = new_figure(
        width=max(5.0, 0.75 * columns),
        height=0.7 + 0.85 * -(-shown // columns),
        title=f"What the classifier saw of {source}, and its answers ({counted})",
    )
    answers = [row["prediction"] for row in rows[:shown]]
    if labels is not None:
        true = [classifier.classes[label] for label in labels]
        answers = [a if a == t else f"{a} (is {t})" for a, t in zip(answers, true, strict=True)]
    image_grid(axes[0, 0], classifier.preparation.images(x[:shown]), columns, labels=answers)
    save_figure(figure, run.path("predictions.png"))
    accuracy = {} if labels is None else {"accuracy": float((first == labels).mean())}
    return run.finish({"pictures": len(x), **accuracy, "predictions": rows[:SHOWN]})


if __name__ == "__main__":
    run_main(main, build_parser)
