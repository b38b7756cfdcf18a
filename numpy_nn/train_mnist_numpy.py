"""How good can a convolutional network get that is written in NumPy alone?

    python numpy_nn/train_mnist_numpy.py --epochs 5 --batch-size 64 --lr 0.01
    python numpy_nn/train_mnist_numpy.py --recipe strong --out runs/numpy_nn/train_mnist_numpy_strong

Two convolutions of 5×5 with max pooling, then two fully connected layers with dropout. The learning rate rises over the
first tenth of the updates to `--lr` and falls to zero along a cosine (Loshchilov and Hutter 2017). Each batch is moved
by up to one pixel. `--recipe strong` has BatchNorm, more channels and epochs, and distorts each image by an affine map
of its own. The epoch with the highest validation accuracy is kept; the test images are read once, at the end.
`--resume` goes on after the last finished epoch, to the very same weights.

Writes curves.png, best.npz, best.json, last.npz, history.csv, metrics.json.
"""

import json
import time

import numpy as np

from numpy_nn.cnn import RECIPES, build_network, random_affine, random_shift
from numpy_nn.inputs import evaluate, load_inputs, predict_logits
from numpy_nn.losses import SoftmaxCrossEntropy, stopping
from numpy_nn.network import Sequential
from numpy_nn.optimizers import SGD, Adam, Optimizer, RMSprop
from shared_utils.checkpoint import load_arrays, save_arrays
from shared_utils.cli import make_parser, non_negative_float, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.plotting import line_style, new_figure, save_figure
from shared_utils.runs import start_run, write_json
from shared_utils.schedules import half_cosine
from shared_utils.seeding import seed_everything
from shared_utils.stats import wilson_interval

OPTIMIZERS = ("sgd", "momentum", "nesterov", "rmsprop", "adam")
EPOCHS = {"plain": 5, "strong": 15}
LR = {"plain": 0.01, "strong": 0.05}  # BatchNorm tolerates a higher one


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, device=False, quick={"epochs": 2})
    parser.add_argument("--recipe", choices=RECIPES, default="plain", help="strong: BatchNorm, augmentation, 15 epochs")
    parser.add_argument("--epochs", type=positive_int, help="passes over the training images (default: 5; strong: 15)")
    parser.add_argument("--batch-size", type=positive_int, default=64, help="images per update")
    parser.add_argument("--lr", type=positive_float, help="the highest learning rate (default: 0.01; strong: 0.05)")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="nesterov", help="adam and rmsprop need --lr 0.002")
    parser.add_argument("--weight-decay", type=non_negative_float, default=5e-4, help="L2 on every parameter")
    parser.add_argument("--resume", action="store_true", help="go on from last.npz")
    return parser


def build_optimizer(name: str, network: Sequential, lr: float, weight_decay: float) -> Optimizer:
    """The optimizer called `name`, over all layers."""
    if name in ("sgd", "momentum", "nesterov"):
        momentum = 0.0 if name == "sgd" else 0.9
        return SGD(network.layers, lr, momentum, nesterov=name == "nesterov", weight_decay=weight_decay)
    return (Adam if name == "adam" else RMSprop)(network.layers, lr, weight_decay=weight_decay)


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear up over a tenth of the `steps`, then half a cosine down to zero; step counts from 0."""
    warm = max(1, steps // 10)
    if step < warm:
        return highest * (step + 1) / warm
    return half_cosine(step - warm, max(1, steps - warm), highest)


def save_last(path, network: Sequential, optimizer: Optimizer, rng: np.random.Generator, **numbers) -> None:
    """Everything a resumed run needs, as arrays: weights, the optimizer's memory, the generator's state, numbers."""
    memory = {
        f"optimizer/{i}/{name}/{slot}": array
        for (i, name), slots in optimizer.state.items()
        for slot, array in slots.items()
    }
    weights = {f"network/{name}": array for name, array in network.arrays().items()}
    save_arrays(path, rng=json.dumps(rng.bit_generator.state), t=optimizer.t, **weights, **memory, **numbers)


def load_last(path, network: Sequential, optimizer: Optimizer, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Put network, optimizer and generator back to where `save_last` found them; returns all arrays."""
    found = load_arrays(path, required=("rng", "t", "epoch", "best", "seconds"))
    network.restore({name[8:]: array for name, array in found.items() if name.startswith("network/")}, path)
    for key, array in found.items():
        if key.startswith("optimizer/"):
            _, i, name, slot = key.split("/")
            optimizer.state.setdefault((int(i), name), {})[slot] = array
    optimizer.t = int(found["t"])
    rng.bit_generator.state = json.loads(str(found["rng"]))
    return found


def main(argv=None) -> dict:
    """Train, keep the best epoch, test it; returns the metrics."""
    args = build_parser().parse_args(argv)
    rng = seed_everything(args.seed)
    data = load_inputs(args)
    epochs, lr = args.epochs or EPOCHS[args.recipe], args.lr or LR[args.recipe]
    network = build_network(args.recipe, rng, len(data.classes))
    optimizer = build_optimizer(args.optimizer, network, lr, args.weight_decay)
    loss = SoftmaxCrossEntropy()
    run = start_run(args)

    first, best, seconds = 1, -1.0, 0.0
    if args.resume and run.path("last.npz").exists():
        found = load_last(run.path("last.npz"), network, optimizer, rng)
        first, best, seconds = int(found["epoch"]) + 1, float(found["best"]), float(found["seconds"])
    run.rewind(first - 1)

    n = len(data.x_train)
    per_epoch = -(-n // args.batch_size)
    for epoch in range(first, epochs + 1):
        started, total, wrong = time.perf_counter(), 0.0, 0
        for i, batch in enumerate(minibatches(n, args.batch_size, rng)):
            step = (epoch - 1) * per_epoch + i
            optimizer.lr = learning_rate(step, epochs * per_epoch, lr)
            x, y = data.x_train[batch], data.y_train[batch]  # (B, 1, 28, 28), (B,)
            x = random_affine(x, rng) if args.recipe == "strong" else random_shift(x, rng)
            with stopping(step + 1, optimizer.lr, lr):
                logits = network.forward(x, training=True)  # (B, K)
                value = loss.forward(logits, y)
                network.backward(loss.backward(), need_dx=False)
                optimizer.step()
            total += float(value) * len(batch)
            wrong += int((logits.argmax(1) != y).sum())
        seconds += time.perf_counter() - started
        with stopping(epoch * per_epoch, optimizer.lr, lr):
            val_loss, val_accuracy = evaluate(network, data.x_val, data.y_val)
        run.log(
            epoch=epoch,
            train_loss=total / n,
            train_accuracy=1 - wrong / n,
            val_loss=val_loss,
            val_accuracy=val_accuracy,
            seconds=seconds,
        )
        if val_accuracy > best:
            best = val_accuracy
            network.save(run.path("best.npz"))
            about = {"recipe": args.recipe, "n_classes": len(data.classes), "epoch": epoch, "val_accuracy": best}
            write_json(run.path("best.json"), about)
        save_last(run.path("last.npz"), network, optimizer, rng, epoch=epoch, best=best, seconds=seconds)

    network.load(run.path("best.npz"))
    right = int((predict_logits(network, data.x_test).argmax(1) == data.y_test).sum())
    accuracy = right / len(data.y_test)
    history = run.history()
    save_figure(draw(history, data.title, args.recipe, accuracy), run.path("curves.png"))
    return run.finish(
        {
            "recipe": args.recipe,
            "epochs": epochs,
            "parameters": sum(array.size for array in network.parameters().values()),
            "best_val_accuracy": best,
            "test_accuracy": accuracy,
            "test_errors": len(data.y_test) - right,
            "interval": wilson_interval(right, len(data.y_test)),
            "training_seconds": seconds,
        }
    )


def draw(history: list[dict], title: str, recipe: str, accuracy: float):
    """Loss and error of training and validation against epochs."""
    figure, axes = new_figure(1, 2, width=10, height=4)
    epochs = [int(row["epoch"]) for row in history]
    for index, part in enumerate(("train", "val")):
        style = {**line_style(index), "marker": "o", "markersize": 4}
        name = ("training (as it goes, with dropout)", "validation")[index]
        axes[0, 0].plot(epochs, [float(row[f"{part}_loss"]) for row in history], label=name, **style)
        axes[0, 1].plot(epochs, [100 * (1 - float(row[f"{part}_accuracy"])) for row in history], label=name, **style)
    axes[0, 0].set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log", title="loss")
    axes[0, 1].set(xlabel="epoch", ylabel="error (%)", yscale="log", title="error")
    axes[0, 0].legend()
    figure.suptitle(f"{title}: a NumPy CNN ({recipe} recipe) gets {accuracy:.2%} of the test images right")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
