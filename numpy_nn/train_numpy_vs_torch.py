"""Is the network written by hand the same as PyTorch's, step by step, and how fast is each?

    python numpy_nn/train_numpy_vs_torch.py
    python numpy_nn/train_numpy_vs_torch.py --updates 2000 --lr 0.05

PatchEmbedding (4×4 pixels → 8 numbers) → ReLU → Linear → softmax cross-entropy, minibatch SGD, from the same initial
weights on the same batches, once with numpy_nn's layers and once as nn.Conv2d and nn.Linear. In float64 the two losses
stay together to the last digits for `--parity-updates`; in float32 rounding errors grow, and both learn equally well.

Writes train_loss.png, train_error.png, val_loss_vs_updates.png, val_error_vs_updates.png, divergence.png, history.csv,
metrics.json.
"""

import time
from collections.abc import Callable

import numpy as np
import torch

from numpy_nn.embedding import batch_order, embedding_network, stepper
from numpy_nn.inputs import Inputs, evaluate, load_inputs
from numpy_nn.losses import NotFinite, stopping
from numpy_nn.twin import torch_twin
from shared_utils.cli import make_parser, positive_float, positive_int, run_main
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import start_run
from shared_utils.seeding import seed_everything

NAMES = {"numpy": "NumPy", "torch": "PyTorch"}


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, device=False, quick={"updates": 400, "parity_updates": 100, "every": 50})
    parser.add_argument("--updates", type=positive_int, default=10_000, help="updates of each network")
    parser.add_argument("--parity-updates", type=positive_int, default=1000, help="updates compared in float64")
    parser.add_argument("--batch-size", type=positive_int, default=32, help="images per update")
    parser.add_argument("--lr", type=positive_float, default=0.1, help="learning rate")
    parser.add_argument("--every", type=positive_int, default=250, help="updates between two validations")
    return parser


def torch_stepper(network: torch.nn.Module, x: np.ndarray, y: np.ndarray, lr: float) -> Callable:
    """The same in PyTorch."""
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.SGD(network.parameters(), lr)

    def step(batch: np.ndarray) -> tuple[float, float]:
        positions = torch.from_numpy(batch)
        logits = network(x[positions])
        value = torch.nn.functional.cross_entropy(logits, y[positions])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return value.item(), (logits.argmax(1) != y[positions]).double().mean().item()

    return step


def torch_evaluate(network: torch.nn.Module, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(mean cross-entropy in nats, accuracy)."""
    with torch.no_grad():
        logits = network(torch.from_numpy(x))
        labels = torch.from_numpy(y)
        value = torch.nn.functional.cross_entropy(logits, labels)
    return value.item(), (logits.argmax(1) == labels).double().mean().item()


def train_both(data: Inputs, args, run) -> tuple[dict, dict, dict]:
    """Train the twins in float32; returns networks, the history of each, and the seconds each spent in its updates."""
    ours = embedding_network(np.random.default_rng(args.seed), len(data.classes))
    theirs = torch_twin(ours)
    steppers = {
        "numpy": stepper(ours, data.x_train, data.y_train, args.lr),
        "torch": torch_stepper(theirs, data.x_train, data.y_train, args.lr),
    }
    histories = {name: {"loss": [], "error": [], "at": [], "val_loss": [], "val_error": []} for name in NAMES}
    seconds = dict.fromkeys(NAMES, 0.0)
    order = batch_order(len(data.x_train), args.updates, args.batch_size, args.seed)
    for start in range(0, args.updates, args.every):
        for name, step in steppers.items():  # in turns, so that a busy machine slows both
            began = time.perf_counter()
            batches = enumerate(order[start : start + args.every], start + 1)
            done = [finite(step, update, args.lr, batch) for update, batch in batches]
            seconds[name] += time.perf_counter() - began
            history = histories[name]
            history["loss"] += [loss for loss, _ in done]
            history["error"] += [error for _, error in done]
            look, network = (evaluate, ours) if name == "numpy" else (torch_evaluate, theirs)
            val_loss, val_accuracy = finite(look, start + len(done), args.lr, network, data.x_val, data.y_val)
            history["at"].append(start + len(done))
            history["val_loss"].append(val_loss)
            history["val_error"].append(1 - val_accuracy)
        pair = {f"{name}_val_error": histories[name]["val_error"][-1] for name in NAMES}
        run.log(update=histories["numpy"]["at"][-1], **pair)
    return {"numpy": ours, "torch": theirs}, histories, seconds


def finite(call: Callable, update: int, lr: float, *inputs) -> tuple[float, float]:
    """What an update, or an evaluation after it, gives: (loss, share). Errors: `Diverged`, of PyTorch's loss too."""
    with stopping(update, lr, lr):
        loss, share = call(*inputs)
        if not np.isfinite(loss):
            raise NotFinite("the loss is not finite")
    return loss, share


def divergence(data: Inputs, args, dtype, updates: int) -> np.ndarray:
    """|loss of NumPy − loss of PyTorch| at each of `updates`, both in `dtype`; (updates,)."""
    x = data.x_train.astype(dtype)
    ours = embedding_network(np.random.default_rng(args.seed), len(data.classes), dtype)
    steps = (stepper(ours, x, data.y_train, args.lr), torch_stepper(torch_twin(ours), x, data.y_train, args.lr))
    order = batch_order(len(x), updates, args.batch_size, args.seed)
    losses = [[finite(step, update, args.lr, batch)[0] for step in steps] for update, batch in enumerate(order, 1)]
    return np.abs(np.diff(losses)[:, 0])


def main(argv=None) -> dict:
    """Train both and compare them; returns the metrics."""
    args = build_parser().parse_args(argv)
    seed_everything(args.seed)
    data = load_inputs(args)
    run = start_run(args)
    networks, histories, seconds = train_both(data, args, run)
    test = {
        "numpy": evaluate(networks["numpy"], data.x_test, data.y_test)[1],
        "torch": torch_evaluate(networks["torch"], data.x_test, data.y_test)[1],
    }
    gaps = {
        "float32": np.abs(np.subtract(histories["numpy"]["loss"], histories["torch"]["loss"])),
        "float64": divergence(data, args, np.float64, args.parity_updates),
    }

    ratio = seconds["torch"] / seconds["numpy"]
    where = f"{data.title}, {args.updates:,} updates"
    for part, label in (("loss", "cross-entropy (nats)"), ("error", "error (share of 1)")):
        title = f"{where}: training {part}; the losses differ by {gaps['float32'].max():.0e} nats at most"
        save_figure(draw_training(histories, part, label, title), run.path(f"train_{part}.png"))
        title = f"{where}: NumPy {test['numpy']:.2%}, PyTorch {test['torch']:.2%} of the test images right"
        save_figure(draw_validation(histories, part, label, title), run.path(f"val_{part}_vs_updates.png"))
    save_figure(draw_divergence(gaps), run.path("divergence.png"))
    return run.finish(
        {
            "test_accuracy": test,
            "largest_loss_gap": {name: float(gap.max()) for name, gap in gaps.items()},
            "parity_updates": args.parity_updates,
            "numpy_seconds": seconds["numpy"],
            "torch_seconds": seconds["torch"],
            "torch_over_numpy_seconds": ratio,
        }
    )


def draw_training(histories: dict, part: str, label: str, title: str):
    """Training loss or error of both against updates, each point the mean over the batches before it."""
    figure, axes = new_figure(width=7.5, title=title)
    for index, (name, shown) in enumerate(NAMES.items()):
        values = histories[name][part]
        window = min(50, len(values))
        means = np.convolve(values, np.full(window, 1 / window), mode="valid")
        updates = np.arange(window, len(values) + 1)
        axes[0, 0].plot(updates, means, label=shown, linewidth=2.5 - 1.2 * index, **line_style(index))
    axes[0, 0].set(xlabel="update", ylabel=f"{label}, mean over {window} batches", yscale="log")
    axes[0, 0].legend()
    return figure


def draw_validation(histories: dict, part: str, label: str, title: str):
    """Validation loss or error of both against updates."""
    figure, axes = new_figure(width=7.5, title=title)
    for index, (name, shown) in enumerate(NAMES.items()):
        x, y = histories[name]["at"], histories[name][f"val_{part}"]
        axes[0, 0].plot(x, y, label=shown, linewidth=3 - 1.6 * index, **line_style(index))
    axes[0, 0].set(xlabel="update", ylabel=f"validation {label}", yscale="log")
    axes[0, 0].legend()
    return figure


def draw_divergence(gaps: dict[str, np.ndarray]):
    """|loss difference| against updates, in both precisions."""
    worst = {name: gap.max() for name, gap in gaps.items()}
    figure, axes = new_figure(
        title=f"The losses differ by at most {worst['float64']:.0e} in float64, {worst['float32']:.0e} in float32"
    )
    for index, (name, gap) in enumerate(gaps.items()):
        axes[0, 0].plot(1 + np.arange(len(gap)), np.maximum(gap, 1e-18), color=COLORS[index], label=name, linewidth=0.8)
    axes[0, 0].set(xlabel="update", ylabel="|NumPy loss − PyTorch loss| (nats)", xscale="log", yscale="log")
    axes[0, 0].legend()
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
