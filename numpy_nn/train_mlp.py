"""Which activation serves a multilayer perceptron best: ReLU, sigmoid or tanh?

    python numpy_nn/train_mlp.py
    python numpy_nn/train_mlp.py --activations relu sigmoid --hidden 64 64 64 64 64 64 --epochs 4 --seeds 0
    python numpy_nn/train_mlp.py --shift 0

784 → hidden → 10, y = φ(x W + b) per layer, softmax cross-entropy, Adam whose learning rate rises over the first
twentieth of the updates and then falls along half a cosine. For one seed all variants start from the same weights
(`--init`) and see the same batches, each image moved by up to `--shift` pixels. The gradient of the weights in layer l
has a factor φ' for every layer from l on; as σ' ≤ 1/4, each sigmoid shrinks it: the norms ‖∂L/∂W‖ of every layer are
recorded.

Validation images choose activation and seed; the test images are read once, at the end.

Writes mlp_curves.png, gradient_norms.png, best.npz, best.json, history.csv and metrics.json.
Source: Glorot and Bengio 2010 for the gradients, Kingma and Ba 2015 for Adam.
Shapes: B batch, D features of a layer, K classes.
"""

import math
import time

import numpy as np

from numpy_nn.inputs import Inputs, evaluate, load_inputs
from numpy_nn.losses import SoftmaxCrossEntropy, stopping
from numpy_nn.mlp import ACTIVATIONS, build_mlp
from numpy_nn.optimizers import Adam
from shared_utils.cli import add_seeds, make_parser, non_negative_int, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.plotting import line_style, mean_band, new_figure, save_figure
from shared_utils.runs import start_run, write_json
from shared_utils.schedules import half_cosine
from shared_utils.stats import mean_std

WARM_UP = 0.05  # of all updates
RECORDS = 60  # times that the gradient norms are recorded in a run


def shifted(x: np.ndarray, pixels: int, rng: np.random.Generator) -> np.ndarray:
    """Each image of x (B, 1, H, W) moved by its own −pixels … pixels in both directions; its edge is repeated."""
    if pixels == 0:
        return x
    n, _, height, width = x.shape
    padded = np.pad(x[:, 0], ((0, 0), (pixels, pixels), (pixels, pixels)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))  # (B, 2p+1, 2p+1, H, W)
    down, right = rng.integers(0, 2 * pixels + 1, (2, n))
    return windows[np.arange(n), down, right][:, None]  # (B, 1, H, W)


def train(activation: str, seed: int, data: Inputs, args, run) -> dict:
    """Train one network; returns it with its curves and gradient norms. Errors: `Diverged`."""
    started = time.perf_counter()
    rng = np.random.default_rng([args.seed, seed])  # weights, batches and shifts: the same for every activation
    network = build_mlp(args.hidden, activation, data.x_train[0].size, len(data.classes), args.init, rng)
    loss, optimizer = SoftmaxCrossEntropy(), Adam(network.layers, args.lr)
    weighted = [layer for layer in network.layers if layer.params]
    updates = args.epochs * math.ceil(len(data.x_train) / args.batch_size)
    every = max(1, updates // RECORDS)
    step, recorded, norms, rows = 0, [], [], []
    for epoch in range(1, args.epochs + 1):
        total = 0.0
        for batch in minibatches(len(data.x_train), args.batch_size, rng):
            rise, fall = min((step + 1) / (WARM_UP * updates), 1), half_cosine(step, updates, 1.0)
            optimizer.lr = args.lr * rise * fall
            x = shifted(data.x_train[batch], args.shift, rng)  # (B, 1, H, W)
            with stopping(step + 1, optimizer.lr, args.lr, name=activation):
                value = loss.forward(network.forward(x, training=True), data.y_train[batch])
                network.backward(loss.backward(), need_dx=False)
                if step % every == 0:
                    recorded.append(step)
                    norms.append([float(np.linalg.norm(layer.grads["W"])) for layer in weighted])
                optimizer.step()
            total += float(value) * len(batch)
            step += 1
        with stopping(step, optimizer.lr, args.lr, name=activation):
            val_loss, val_accuracy = evaluate(network, data.x_val, data.y_val)
        row = {"train_loss": total / len(data.x_train), "val_loss": val_loss, "val_accuracy": val_accuracy}
        run.log(activation=activation, seed=seed, epoch=epoch, **row)
        rows.append(row)
    return {
        "network": network,
        "seed": seed,
        "rows": rows,
        "steps": recorded,
        "norms": np.array(norms),  # (times, layers)
        "seconds": time.perf_counter() - started,
    }


def build_parser():
    """The command line."""
    quick = {"epochs": 6, "seeds": [0, 1], "hidden": [64, 32], "batch_size": 16}
    parser = make_parser(__doc__, device=False, quick=quick)
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS), help="compared")
    add_seeds(parser, [0, 1, 2], "one network each")
    parser.add_argument("--epochs", type=positive_int, default=15, help="passes over the training images")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="images per update")
    parser.add_argument("--lr", type=positive_float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--hidden", type=positive_int, nargs="+", default=[256, 128], help="widths of hidden layers")
    parser.add_argument("--init", choices=("he", "xavier"), default="xavier", help="of the weights of all variants")
    parser.add_argument("--shift", type=non_negative_int, default=1, help="pixels that training images move, at most")
    return parser


def main(argv=None) -> dict:
    """Train every variant, choose the best on validation, test them all once; returns the metrics."""
    args = build_parser().parse_args(argv)
    data = load_inputs(args)
    run = start_run(args)
    activations, seeds = list(dict.fromkeys(args.activations)), args.seeds
    found = {a: [train(a, seed, data, args, run) for seed in seeds] for a in activations}

    table = {}
    for activation, runs in found.items():
        last = {key: [r["rows"][-1][key] for r in runs] for key in ("train_loss", "val_accuracy")}
        last["test_accuracy"] = [evaluate(r["network"], data.x_test, data.y_test)[1] for r in runs]
        table[activation] = {}
        for key, values in last.items():
            table[activation][key], table[activation][f"{key}_std"] = mean_std(values)
        ratios = [r["norms"][:, 0] / np.maximum(r["norms"][:, -1], 1e-30) for r in runs]  # (times,) each
        table[activation]["first_to_last_gradient"] = float(np.median(ratios))
        table[activation]["first_to_last_gradient_at_start"] = float(np.median([ratio[0] for ratio in ratios]))
        table[activation]["epoch_seconds"] = float(np.mean([r["seconds"] for r in runs])) / args.epochs
    best = max(activations, key=lambda a: table[a]["val_accuracy"])
    chosen = max(found[best], key=lambda r: r["rows"][-1]["val_accuracy"])
    chosen["network"].save(run.path("best.npz"))
    architecture = {"hidden": args.hidden, "activation": best, "inputs": data.x_train[0].size}
    write_json(run.path("best.json"), {**architecture, "classes": list(data.classes), "seed": chosen["seed"]})

    print(f"\n{'activation':12}{'validation':>18}{'test':>18}{'train loss':>18}")
    for name, row in table.items():
        cells = (f"{100 * row[k]:.2f} ± {100 * row[k + '_std']:.2f} %" for k in ("val_accuracy", "test_accuracy"))
        print(f"{name:12}" + "".join(f"{c:>18}" for c in cells) + f"{row['train_loss']:>18.4f}")
    shape = "-".join(map(str, [data.x_train[0].size, *args.hidden, len(data.classes)]))
    save_figure(draw_curves(found, table, best, f"{data.title}, {shape}"), run.path("mlp_curves.png"))
    save_figure(draw_norms(found, table, f"{data.title}, {shape}"), run.path("gradient_norms.png"))
    row = {key: table[best][key] for key in ("val_accuracy", "test_accuracy", "test_accuracy_std")}
    return run.finish({"best": best, **row, "shape": shape, "seeds": seeds, "activations": table})


def draw_curves(found: dict, table: dict, best: str, title: str):
    """Training loss and validation accuracy against epochs, mean ± std over seeds."""
    figure, axes = new_figure(1, 2, width=12, height=4.6)
    for index, (activation, runs) in enumerate(found.items()):
        epochs = range(1, len(runs[0]["rows"]) + 1)
        for ax, key, scale in ((axes[0, 0], "train_loss", 1), (axes[0, 1], "val_accuracy", 100)):
            values = scale * np.array([[row[key] for row in r["rows"]] for r in runs])  # (seeds, epochs)
            mean_band(ax, epochs, values, label=activation, index=index)
    axes[0, 0].set(xlabel="epochs", ylabel="training loss (nats)", yscale="log", title="training, as it goes")
    axes[0, 1].set(xlabel="epochs", ylabel="validation accuracy (%)", title="validation")
    for ax in axes.flat:
        ax.legend()
    row = table[best]
    tested = f"{100 * row['test_accuracy']:.2f} ± {100 * row['test_accuracy_std']:.2f} %"
    figure.suptitle(f"{title}: validation chooses {best}; its test accuracy is {tested}")
    return figure


def draw_norms(found: dict, table: dict, title: str):
    """‖∂L/∂W‖ of every layer through training, one panel per activation (mean over seeds)."""
    figure, axes = new_figure(1, len(found), width=max(6.4, 4.6 * len(found)), height=4.6, sharey=True)
    for ax, (activation, runs) in zip(axes[0], found.items(), strict=True):
        norms = np.mean([r["norms"] for r in runs], axis=0)  # (times, layers)
        for layer, values in enumerate(norms.T):
            ax.plot(runs[0]["steps"], values, label=f"layer {layer + 1}", **line_style(layer))
        ratio = table[activation]["first_to_last_gradient"]
        ax.set(xlabel="updates", yscale="log", title=f"{activation}: first / last = {ratio:.2g} (median)")
        ax.legend(ncols=2 if len(norms.T) > 4 else 1, fontsize=8)
    axes[0, 0].set_ylabel("‖∂L/∂W‖ of a batch (nats per unit of W)")
    start = {a: row["first_to_last_gradient_at_start"] for a, row in table.items()}
    least = min(start, key=start.get)
    others = ", ".join(f"{value:.2g} with {a}" for a, value in start.items() if a != least)
    said = f"{start[least]:.2g} of the last one's with {least}" + (f" ({others})" if others else "")
    figure.suptitle(f"{title}: at the start the first layer's gradient is {said}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
