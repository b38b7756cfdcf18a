"""Do shortcuts let a deep network learn, and is it the early layers' gradients that plain networks lack?

    python cnn_cifar/resnet_vs_plain.py --epochs 10 --batch-size 128
    python cnn_cifar/resnet_vs_plain.py --epochs 10 --batch-size 128 --width 64 --device cuda
    python cnn_cifar/resnet_vs_plain.py --depths 10 34 --train-size 5000 --epochs 3 --out runs/cnn_cifar/rvp_34

Networks of 8 n + 2 layers (four stages of n blocks of two 3×3 convolutions, BatchNorm after each; resnet.py), with the
shortcuts and without:

    residual   y = relu(F(x) + x)           plain   y = relu(F(x))

Both networks of a depth see the same images in the same order and are trained by SGD with Nesterov's momentum and one
cycle of the learning rate, whose peak is the one of `--lrs` that is better on validation images for the first seed.
They are compared on the test images; a difference is the mean over the seeds of (plain − residual) with Student's 95 %
interval. At every update ‖∂L/∂W‖ of every convolution is recorded: at the first it shows what the initialisation does;
later the networks differ in their loss, their weights and perhaps their learning rate as well, and so do the gradients.
It computes in bfloat16 where the machine has it; `--no-amp` computes in float32.

Writes residual_vs_plain.png, gradient_flow.png, depth_<n>_<kind>_<lr>_<seed>.npz (arrays norms, losses), history.csv,
metrics.json.
With --resume a study that was stopped goes on with the trainings that are missing.
Sources: He, Zhang, Ren and Sun 2016, section 4.2; Balduzzi et al. 2017 and Yang et al. 2019 (gradients of plain and
residual networks at initialisation).
Shapes: N images, B batch, K classes, U updates, L layers.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, nn

from cnn_cifar.augment import random_crop, random_flip
from cnn_cifar.inputs import Data, add_data_flags, load, loss_and_accuracy, pixels
from cnn_cifar.models import get_param_groups, pixel_resnet
from shared_utils.checkpoint import load_arrays, save_arrays
from shared_utils.cli import UserError, add_amp, add_seeds, make_parser, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.device import autocast, pick_device
from shared_utils.plotting import COLORS, line_style, new_figure, save_figure
from shared_utils.runs import Run, check_finite, start_run
from shared_utils.schedules import one_cycle
from shared_utils.seeding import seed_everything
from shared_utils.stats import half_width

KINDS = ("residual", "plain")


def build_parser():
    """The command line."""
    quick = {"depths": [10, 18], "width": 4, "epochs": 1, "train_size": 300, "val_size": 300, "seeds": [0, 1]}
    parser = make_parser(__doc__, dataset="cifar10", quick={**quick, "batch_size": 50, "lrs": [0.1]})
    add_data_flags(parser, batch_size=128, val_size=5000)
    parser.add_argument("--depths", type=positive_int, nargs="+", default=[10, 34, 66], help="layers, 8 n + 2 each")
    parser.add_argument("--width", type=positive_int, default=16, help="channels of the first stage (the paper's: 64)")
    parser.add_argument("--epochs", type=positive_int, default=10, help="passes over the training images")
    parser.add_argument("--train-size", type=positive_int, help="images to train on (default: all)")
    rates = "peak learning rates to try; each network gets the best"
    parser.add_argument("--lrs", type=positive_float, nargs="+", default=[0.03, 0.1], help=rates)
    add_amp(parser, by_machine=True)
    add_seeds(parser, [0, 1, 2], "one training of each network", least=2)
    parser.add_argument("--resume", action="store_true", help="go on with the trainings that are missing")
    return parser


def main(argv=None) -> dict:
    """Train every network from every seed; returns the metrics."""
    args = build_parser().parse_args(argv)
    if wrong := [depth for depth in args.depths if depth % 8 != 2 or depth < 10]:
        raise UserError(f"--depths {wrong[0]}: the networks have 8 n + 2 layers: 10, 18, 26, 34, 42, 50, 58, 66, …")
    if len(set(args.depths)) < len(args.depths):
        raise UserError("--depths: each once")
    device = pick_device(args.device)
    data = load(args, device, args.train_size)
    run = start_run(args)
    table, trained = [], {}
    for depth in sorted(args.depths):
        row = {"depth": depth}
        for kind in KINDS:
            tried = {lr: train(depth, kind, lr, args.seeds[0], data, args, run) for lr in args.lrs}
            lr = max(args.lrs, key=lambda lr: tried[lr]["val_accuracy"])
            found = [tried[lr], *(train(depth, kind, lr, seed, data, args, run) for seed in args.seeds[1:])]
            for one in found:  # a rate that diverges is a result, unless it is the chosen one
                check_finite(one["train_loss"], len(one["losses"]), lr, "--lrs")
            trained[depth, kind] = found
            row |= {f"{kind}_lr": lr, f"{kind}_tried": {f"{lr:g}": one["val_accuracy"] for lr, one in tried.items()}}
            row[kind] = np.mean([one["test_accuracy"] for one in found])
            row[f"{kind}_train_loss"] = np.mean([one["train_loss"] for one in found])
            row[f"{kind}_seconds"] = np.mean([one["seconds"] for one in found])
        residual, plain = (trained[depth, kind] for kind in KINDS)
        difference = [b["test_accuracy"] - a["test_accuracy"] for a, b in zip(residual, plain, strict=True)]
        row |= {"difference": np.mean(difference), "half_width": half_width(difference), "finding": said(difference)}
        pairs = [(a["norms"][:, 1], b["norms"][:, 1]) for a, b in zip(residual, plain, strict=True)]  # first block
        row["first_update_ratio"] = np.exp(np.mean([np.log(b[0] / a[0]) for a, b in pairs]))
        row["training_ratio"] = np.exp(np.mean([np.log(b / a).mean() for a, b in pairs]))
        table.append(row)
        shown = ", ".join(f"{kind} {row[kind]:.1%} at rate {row[f'{kind}_lr']:g}" for kind in KINDS)
        print(f"{depth} layers: {shown}; {row['finding']}", flush=True)
    size = f"{len(data.train):,} images, {args.epochs} epochs, {args.width} channels and up, {len(args.seeds)} seeds"
    about = f"{data.title} at 32×32, {size}"
    save_figure(draw_accuracy(table, trained, about), run.path("residual_vs_plain.png"))
    save_figure(draw_gradients(table[-1], trained, about), run.path("gradient_flow.png"))
    deepest = table[-1]
    return run.finish(
        {
            "width": args.width,
            "epochs": args.epochs,
            "train_images": len(data.train),
            "seeds": args.seeds,
            "depths": table,
            "deepest": deepest["depth"],
            "deepest_residual": deepest["residual"],
            "deepest_plain": deepest["plain"],
            "deepest_finding": deepest["finding"],
            "first_update_ratio": deepest["first_update_ratio"],
            "training_ratio": deepest["training_ratio"],
        }
    )


def said(difference: list[float]) -> str:
    """What the differences in accuracy, plain − residual, show; one for each seed."""
    mean, half = np.mean(difference), half_width(difference)
    size = f"{100 * abs(mean):.1f} ± {100 * half:.1f} points"
    if abs(mean) <= half:
        return f"no difference is shown ({100 * mean:+.1f} ± {100 * half:.1f} points)"
    return f"the plain network is {'worse' if mean < 0 else 'better'} by {size}"


def convolutions(network: nn.Module) -> list[nn.Parameter]:
    """The weights of the convolutions on the path through all blocks, the stem's first; without the shortcuts' W_s."""
    named = network.named_parameters()
    return [weight for name, weight in named if weight.ndim == 4 and "downsample" not in name]


def train(depth: int, kind: str, lr: float, seed: int, data: Data, args, run: Run) -> dict:
    """Train one network unless that is done: its accuracies, train_loss, seconds, norms (U, L), losses (U,)."""
    key = {"depth": depth, "kind": kind, "lr": lr, "seed": seed}
    path = run.path(f"depth_{depth}_{kind}_{lr:g}_{seed}.npz")
    row = run.row(**key)
    if row is None:
        started = time.perf_counter()
        network, norms, losses = fit(depth, kind, lr, args.seed + seed, data, args)
        seconds = time.perf_counter() - started
        last = float(losses[-len(losses) // args.epochs :].mean())
        val, test = (loss_and_accuracy(network, split, args.amp)[1] for split in (data.val, data.test))
        right = {"val_accuracy": val if np.isfinite(last) else 0.0, "test_accuracy": test}
        save_arrays(path, norms=norms, losses=losses)  # before the row, which says that the training is done
        run.log(**key, **right, train_loss=last, seconds=round(seconds, 1))
        row = run.history()[-1]
    numbers = {name: float(row[name]) for name in ("val_accuracy", "test_accuracy", "train_loss", "seconds")}
    return {**numbers, **load_arrays(path)}


def fit(depth: int, kind: str, lr: float, seed: int, data: Data, args) -> tuple[nn.Module, np.ndarray, np.ndarray]:
    """A network of so many layers, trained; ‖∂L/∂W‖ of its convolutions (U, L) and the loss (U,) at each update."""
    seed_everything(seed)
    x, y = data.train.x, data.train.y
    device = x.device
    network = pixel_resnet(len(data.classes), (depth - 2) // 8, args.width, residual=kind == "residual")
    network.to(device, memory_format=torch.channels_last).train()
    weights = convolutions(network)  # depth − 1
    optimizer = torch.optim.SGD(get_param_groups(network, 5e-4), lr=lr, momentum=0.9, nesterov=True)
    rng, generator = np.random.default_rng(seed), Generator(device).manual_seed(seed)
    updates = args.epochs * (len(y) // args.batch_size)
    norms, losses = torch.zeros(updates, len(weights), device=device), torch.zeros(updates, device=device)
    batches = (b for _ in range(args.epochs) for b in minibatches(len(y), args.batch_size, rng, drop_last=True))
    for step, batch in enumerate(batches):
        batch = torch.from_numpy(batch).to(device)
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, updates, lr)
        images = pixels(random_crop(random_flip(x[batch], generator), generator))
        with autocast(device, args.amp):
            logits = network(images)  # (B, K)
        loss = F.cross_entropy(logits.float(), y[batch])
        optimizer.zero_grad()
        loss.backward()
        norms[step] = torch.stack([weight.grad.norm() for weight in weights])
        losses[step] = loss.detach()
        optimizer.step()
    return network, norms.cpu().numpy(), losses.cpu().numpy()


def draw_accuracy(table: list[dict], trained: dict, about: str):
    """Accuracy against depth, and the loss of the deepest while they train."""
    figure, axes = new_figure(1, 2, width=10.8, height=4.4)
    at = np.arange(len(table))
    for index, kind in enumerate(KINDS):
        values = [[one["test_accuracy"] for one in trained[row["depth"], kind]] for row in table]
        values = np.array(values)  # (depths, seeds)
        bars = [100 * half_width(each) for each in values]
        style = {**line_style(index), "marker": "o", "capsize": 4}
        axes[0, 0].errorbar(at + 0.06 * index, 100 * values.mean(1), bars, label=kind, **style)
        for y in values.T:
            axes[0, 0].plot(at + 0.06 * index, 100 * y, "_", color="black", markersize=7)
        losses = np.mean([one["losses"] for one in trained[table[-1]["depth"], kind]], axis=0)
        axes[0, 1].plot(smooth(losses), label=f"{kind}, {table[-1]['depth']} layers", **line_style(index))
    axes[0, 0].set_xticks(at, [str(row["depth"]) for row in table])
    ylabel = "test accuracy (%), 95 % interval"
    axes[0, 0].set(xlabel="layers", ylabel=ylabel, title="black: the seeds")
    axes[0, 1].set(xlabel="update", ylabel="training loss (nats), mean over seeds", title="the deepest, smoothed")
    for ax in axes.flat:
        ax.legend()
    figure.suptitle(f"{about}:\nwith {table[-1]['depth']} layers {table[-1]['finding']}")
    return figure


def draw_gradients(row: dict, trained: dict, about: str):
    """The gradient of the deepest networks' first block through training, and of all layers at its two ends."""
    figure, axes = new_figure(1, 2, width=10.8, height=4.6)
    for index, kind in enumerate(KINDS):
        norms = np.exp(np.mean([np.log(one["norms"]) for one in trained[row["depth"], kind]], axis=0))  # (U, L)
        label = f"{kind}, rate {row[f'{kind}_lr']:g}"
        axes[0, 0].plot(np.exp(smooth(np.log(norms[:, 1]))), label=label, **line_style(index))
        tail = max(1, len(norms) // 10)
        layers = np.arange(1, norms.shape[1] + 1)
        ends = {"first update": norms[0], "last tenth": np.exp(np.log(norms[-tail:]).mean(0))}
        for (when, values), style in zip(ends.items(), ("-", ":"), strict=True):
            axes[0, 1].plot(layers, values, color=COLORS[index], linestyle=style, label=f"{kind}, {when}")
    axes[0, 0].set(xlabel="update", title="the first block's first convolution, smoothed")
    axes[0, 1].set(xlabel="convolution, from the image on", title="every layer, at both ends of training")
    for ax in axes.flat:
        ax.set(yscale="log", ylabel="‖∂L/∂W‖, geometric mean over seeds")
        ax.legend()
    figure.suptitle(
        f"{about}:\nwith {row['depth']} layers the plain network's early gradient is {row['first_update_ratio']:.3g} "
        f"times the residual one's at the first update, {row['training_ratio']:.3g} times in training"
    )
    return figure


def smooth(values: np.ndarray, share: float = 0.03) -> np.ndarray:
    """The mean over a window around each update, of `share` of all updates: (U,) → (U,)."""
    half = int(len(values) * share / 2)
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


if __name__ == "__main__":
    run_main(main, build_parser)
