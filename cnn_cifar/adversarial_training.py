"""Can a network be trained so that no small change misleads it, and what does that cost?

    python cnn_cifar/adversarial_training.py
    python cnn_cifar/adversarial_training.py --recipe fast --steps 2 --batch-size 500 --epochs 10
    python cnn_cifar/adversarial_training.py --model resnet18 --epochs 30 --device cuda
    python cnn_cifar/adversarial_training.py --model allcnn --epochs 30 --steps 7 --device cuda

Two networks of one architecture begin with the same weights and see the same images in the same order. One learns from
the images, the other from images perturbed so that its own loss rises (Madry et al. 2018):

    standard     min_θ E L(f_θ(x), y)              adversarial     min_θ E max_{‖δ‖∞ ≤ ε} L(f_θ(x + δ), y)

`--steps 1` takes one step from a noisy start, δ = η + ε sign ∇ₓ L(f(x + η), y) with η uniform in ±2ε, not projected
to the ball: with projection a network may learn to resist that single step and no other attack ("catastrophic
overfitting"; de Jorge et al. 2022). With more steps it is PGD, within the ball. After each epoch PGD-10 attacks
validation images: it would reveal such a collapse, and it chooses the adversarial network's epoch. At the end both
networks are tested under FGSM, PGD-20 and, on the images that are still classified correctly, 10 random starts of
PGD-50; noise of the same size is the control.

Both are trained by SGD with one cycle of the learning rate, or with `--recipe fast` as in fast_cifar.py (whitening,
Muon), but without smoothed labels.

Writes standard_best.pth, standard_last.pth, adversarial_best.pth, adversarial_last.pth, robustness.png,
input_gradients.png, history.csv, metrics.json.
With --resume a run that was stopped goes on from the last epoch and ends with the same weights.
Sources: Goodfellow et al. 2015; Madry et al. 2018; Wong, Rice and Kolter 2020; de Jorge et al. 2022, arXiv 2202.01181;
Tsipras et al. 2019 (the gradients of robust networks).
Shapes: N images, B batch, K classes.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from cnn_cifar.attack_measures import noise, survivors
from cnn_cifar.attacks import fgsm, input_gradient, pgd
from cnn_cifar.augment import random_crop, random_flip
from cnn_cifar.checkpoints import NETWORKS, load_network
from cnn_cifar.fast_training import FastTraining, Recipe
from cnn_cifar.inputs import Data, Split, add_data_flags, load, loss_and_accuracy, pixels, share
from cnn_cifar.models import get_param_groups
from shared_utils import checkpoint
from shared_utils.cli import UserError, add_amp, make_parser, non_negative_float, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.device import autocast, pick_device
from shared_utils.plotting import COLORS, image_grid, line_style, new_figure, save_figure
from shared_utils.runs import Run, check_finite, start_run
from shared_utils.schedules import one_cycle
from shared_utils.seeding import derived_seed, seed_everything
from shared_utils.stats import wilson_interval

KINDS = ("standard", "adversarial")
EPSILONS = (0, 1, 2, 4, 8, 12, 16)  # of 255
SHOWN = 8  # images in the picture of gradients


def build_parser():
    """The command line."""
    quick = {"epochs": 1, "width": 8, "val_size": 3000, "watched": 40, "images": 20, "restarts": 1}
    parser = make_parser(__doc__, dataset="cifar10", quick=quick)
    add_data_flags(parser, batch_size=128, val_size=5000)
    parser.add_argument(
        "--model", choices=("fast_net", "allcnn", "resnet18"), default="fast_net", help="architecture of both"
    )
    parser.add_argument(
        "--width", type=positive_int, help="channels of its first block (default: allcnn 96, others 64)"
    )
    parser.add_argument("--epochs", type=positive_int, default=12, help="passes over the training images, for each")
    recipes = "onecycle: SGD, its learning rate goes up and down once; fast: fast_cifar.py's, for fast_net"
    parser.add_argument("--recipe", choices=("onecycle", "fast"), default="onecycle", help=recipes)
    parser.add_argument(
        "--lr", type=positive_float, help=f"the highest learning rate (default: SGD's 0.2, fast: Muon's {Recipe.lr})"
    )
    decays = "with onecycle, not of biases and BatchNorm"
    parser.add_argument("--weight-decay", type=non_negative_float, default=5e-4, help=decays)
    parser.add_argument("--eps", type=positive_float, default=8.0, help="largest change of a pixel, in units of 1/255")
    parser.add_argument("--steps", type=positive_int, default=1, help="of the attack used in training; above 1: PGD")
    watched = "validation images that PGD-10 attacks after each epoch"
    parser.add_argument("--watched", type=positive_int, default=500, help=watched)
    parser.add_argument("--images", type=positive_int, default=1000, help="test images that PGD attacks")
    parser.add_argument("--restarts", type=positive_int, default=10, help="random starts of PGD-50 at the end")
    add_amp(parser, "train in bfloat16, with float32 parameters", by_machine=True)
    parser.add_argument("--resume", action="store_true", help="go on from the last epoch")
    return parser


def network_config(model: str, width: int | None, num_classes: int) -> dict:
    """The `config` in a checkpoint of the network that the flags ask for."""
    w = width or (96 if model == "allcnn" else 64)
    sizes = {
        "fast_net": {"network": "fast_net", "widths": [w, 2 * w, 4 * w]},
        "allcnn": {"network": "allcnn_t", "c1": w, "c2": 2 * w},
        "resnet18": {"network": "resnet", "blocks": 2, "width": w},
    }
    return {**sizes[model], "num_classes": num_classes}


class OneCycle:
    """SGD with momentum, whose learning rate goes up and down once; used as `FastTraining`."""

    def __init__(self, network: nn.Module, train: Split, args: argparse.Namespace):
        self.network, self.train, self.args = network, train, args
        self.per_epoch = len(train) // args.batch_size
        groups = get_param_groups(network, args.weight_decay)
        self.optimizers = (torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True),)

    def epoch(self, number: int, perturb: Callable[[Tensor, Tensor], Tensor] | None) -> float:
        """See `FastTraining.epoch`."""
        args, (optimizer,), (x, y) = self.args, self.optimizers, (self.train.x, self.train.y)
        # All that is random in an epoch follows from seed and epoch: a resumed run needs no random states.
        order = minibatches(len(y), args.batch_size, np.random.default_rng([args.seed, number]), drop_last=True)
        batches = torch.from_numpy(np.stack(list(order))).to(x.device)  # (updates, B)
        epoch_seed = derived_seed(args.seed, number)
        torch.manual_seed(epoch_seed)  # dropout's, in All-CNN
        generator = Generator(x.device).manual_seed(epoch_seed)
        self.network.train()
        total = torch.zeros((), device=x.device)  # read once an epoch
        for step, batch in enumerate(batches, start=number * self.per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(step, args.epochs * self.per_epoch, args.lr)
            images, labels = pixels(random_crop(random_flip(x[batch], generator), generator)), y[batch]
            with autocast(x.device, args.amp):
                logits = self.network(perturb(images, labels) if perturb else images)  # (B, K)
            loss = F.cross_entropy(logits.float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return total.item() / self.per_epoch


def training_of(config: dict, data: Data, args: argparse.Namespace) -> OneCycle | FastTraining:
    """A training that has not begun, on the training images' device."""
    if args.recipe == "fast":
        recipe = Recipe(args.epochs, args.batch_size, tuple(config["widths"]), args.lr, without=("smoothing",))
        return FastTraining(recipe, data.train, config["num_classes"], args.seed, args.amp)
    network = NETWORKS[config["network"]](**{key: value for key, value in config.items() if key != "network"})
    return OneCycle(network.to(data.train.x.device, memory_format=torch.channels_last), data.train, args)


def moved(network: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, generator: Generator) -> Tensor:
    """What the adversarial network learns from in place of the images x (B, 3, H, W) of [0, 1]."""
    if steps > 1:
        return pgd(network, x, y, eps, 2.5 * eps / steps, steps, generator=generator)
    noisy = x + 2 * eps * (2 * torch.rand(x.shape, generator=generator, device=x.device) - 1)
    return noisy + eps * input_gradient(network, noisy, y).sign()


def main(argv=None) -> dict:
    """Train both, attack both; returns the metrics."""
    args = build_parser().parse_args(argv)
    if args.recipe == "fast" and args.model != "fast_net":
        raise UserError(f"--recipe fast trains fast_net, not {args.model}: leave out one of the two")
    args.lr = args.lr or (Recipe.lr if args.recipe == "fast" else 0.2)
    device = pick_device(args.device)
    data = load(args, device)
    run = start_run(args)
    config = network_config(args.model, args.width, len(data.classes))
    states = {kind: last_state(run, kind, config) if args.resume else None for kind in KINDS}
    run.rewind(sum(state["epochs"] for state in states.values() if state))
    seconds = {kind: train(kind, states[kind], config, data, args, run) for kind in KINDS}

    some = Split(data.test.x[: args.images], data.test.y[: args.images])
    networks = {kind: load_network(run.path(f"{kind}_best.pth"), device)[0] for kind in KINDS}
    rows = []
    for kind, network in networks.items():
        network.to(memory_format=torch.channels_last)
        rows.append({"network": kind, **measure(network, data.test, some, args), "seconds": seconds[kind]})
        print(
            "  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items() if isinstance(value, float)), flush=True
        )
    standard, adversarial = rows
    size = sum(p.numel() for p in networks["standard"].parameters())
    about = f"{data.title}, {args.model} with {size:,} parameters, {args.epochs} epochs"
    save_figure(draw_robustness(rows, run.history(), len(some), args.eps, about), run.path("robustness.png"))
    save_figure(draw_gradients(networks, data.test, data.title), run.path("input_gradients.png"))
    return run.finish(
        {
            "model": args.model,
            "parameters": size,
            "recipe": args.recipe,
            "epochs": args.epochs,
            "eps": args.eps,
            "steps": args.steps,
            "test_images": len(data.test),
            "images": len(some),
            "restarts": args.restarts,
            "networks": rows,
            "clean": adversarial["clean"],
            "robust": adversarial["PGD-20"],
            "robust_interval": list(wilson_interval(round(adversarial["PGD-20"] * len(some)), len(some))),
            "strongest": adversarial["strongest"],
            "standard_clean": standard["clean"],
            "standard_robust": standard["PGD-20"],
            "training_seconds": sum(seconds.values()),
            "minutes": sum(seconds.values()) / 60,
        }
    )


def last_state(run: Run, kind: str, config: dict) -> dict | None:
    """The last checkpoint that a stopped run left of one network, or None."""
    path = run.path(f"{kind}_last.pth")
    return checkpoint.load(path, expect=config) if path.exists() else None


def train(kind: str, state: dict | None, config: dict, data: Data, args: argparse.Namespace, run: Run) -> float:
    """Fit one network, from `state` on; its best and last weights go to the run's folder. Returns the seconds."""
    seed_everything(args.seed)  # both begin with the same weights
    training, eps = training_of(config, data, args), args.eps / 255
    network = training.network
    watched = Split(data.val.x[: args.watched], data.val.y[: args.watched])
    first, best, seconds = 0, {"score": -1.0}, 0.0
    if state:
        network.load_state_dict(state["model"])
        for optimizer, saved in zip(training.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, best, seconds = state["epochs"], state["best"], state["seconds"]

    about = {"config": config, "classes": list(data.classes), "title": data.title}
    for epoch in range(first, args.epochs):
        started = time.perf_counter()
        perturb = None
        if kind == "adversarial":  # the attack's starts have their own generator: crops and flips stay its twin's
            starts = Generator(data.train.x.device).manual_seed(derived_seed(args.seed, epoch) + 1)
            perturb = partial(moved, network, eps=eps, steps=args.steps, generator=starts)
        train_loss = training.epoch(epoch, perturb)
        check_finite(train_loss, (epoch + 1) * training.per_epoch, args.lr)
        seconds += time.perf_counter() - started
        _, val_accuracy = loss_and_accuracy(network, data.val, args.amp)
        network.eval()
        val_pgd = share(survivors(network, watched, lambda x, y: pgd(network, x, y, eps, eps / 4, 10)))
        row = {"network": kind, "epoch": epoch + 1, "train_loss": train_loss}
        run.log(**row, val_accuracy=val_accuracy, val_pgd10=val_pgd, seconds=round(seconds, 1))
        score = val_pgd if kind == "adversarial" else val_accuracy
        if score >= best["score"]:
            best = {"score": score, "epoch": epoch + 1}
            checkpoint.save(run.path(f"{kind}_best.pth"), model=network.state_dict(), **about, **best)
        states = [optimizer.state_dict() for optimizer in training.optimizers]
        progress = {"optimizers": states, "epochs": epoch + 1, "best": best, "seconds": seconds}
        checkpoint.save(run.path(f"{kind}_last.pth"), model=network.state_dict(), **about, **progress)
    return seconds


def measure(network: nn.Module, test: Split, some: Split, args: argparse.Namespace) -> dict:
    """The network's accuracies: on all test images as they are and under FGSM, on some of them under the rest.

    strongest: on those of `some` still classified correctly after PGD-20 and every start of PGD-50 at `--eps`.
    """
    generator, eps = Generator().manual_seed(args.seed), args.eps / 255
    found = {
        "clean": share(survivors(network, test)),
        "FGSM": share(survivors(network, test, lambda x, y: fgsm(network, x, y, eps))),
        "noise": share(survivors(network, some, lambda x, y: noise(x, eps, generator))),
    }
    by_eps, standing = [], None
    for size in sorted({*EPSILONS, args.eps}):

        def twenty_steps(x: Tensor, y: Tensor, size=size / 255) -> Tensor:
            return pgd(network, x, y, size, 2.5 * size / 20, 20, generator=generator)

        right = survivors(network, some, twenty_steps if size else None)
        by_eps.append({"eps": float(size), "accuracy": share(right)})
        if size == args.eps:
            found["PGD-20"], standing = share(right), right
    left = Split(some.x[standing], some.y[standing])  # one already misclassified need not be attacked again
    found["strongest"] = 0.0
    if len(left):
        right = survivors(
            network, left, lambda x, y: pgd(network, x, y, eps, 2.5 * eps / 50, 50, args.restarts, generator)
        )
        found["strongest"] = right.sum().item() / len(some)
    return {**found, "by_eps": by_eps}


def draw_robustness(rows: list[dict], history: list[dict[str, str]], n: int, eps: float, about: str):
    """Accuracy against the size of the change, and what the adversarial network learned, epoch by epoch."""
    figure, axes = new_figure(1, 2, width=10.8, height=4.4)
    ax = axes[0, 0]
    for index, row in enumerate(rows):
        sizes, values = zip(*((point["eps"], point["accuracy"]) for point in row["by_eps"]), strict=True)
        bounds = np.array([wilson_interval(round(value * n), n) for value in values])  # (sizes, 2)
        label = f"{row['network']} training: {row['PGD-20']:.1%} at ε = {eps:g}"
        ax.plot(sizes, 100 * np.array(values), marker="o", label=label, **line_style(index))
        ax.fill_between(sizes, *(100 * bounds.T), color=COLORS[index], alpha=0.2, linewidth=0)
    ax.set(xlabel="ε (grey levels of 255)", ylabel="accuracy under PGD-20 (%), 95 % band", ylim=(-2, 100))
    ax.set_title(f"the first {n:,} test images")
    ax.legend()
    ax = axes[0, 1]
    drawn = [(kind, column) for kind in KINDS for column in ("val_accuracy", "val_pgd10")]
    for index, (kind, column) in enumerate(drawn):
        points = [(int(row["epoch"]), 100 * float(row[column])) for row in history if row["network"] == kind]
        what = "as they are" if column == "val_accuracy" else "under PGD-10"
        style = {**line_style(index // 2), "linestyle": "-" if column == "val_accuracy" else ":"}
        ax.plot(*zip(*points, strict=True), marker=".", label=f"{kind}, {what}", **style)
    ax.set(xlabel="epoch", ylabel="accuracy (%)", ylim=(-2, 100), title="validation images while they train")
    ax.legend()
    standard, adversarial = rows
    figure.suptitle(
        f"{about}: of {n:,} test images under PGD-20 at ε = {eps:g}\n{standard['PGD-20']:.1%} → "
        f"{adversarial['PGD-20']:.1%} are recognised, of all as they are {standard['clean']:.1%} → "
        f"{adversarial['clean']:.1%}"
    )
    return figure


def draw_gradients(networks: dict[str, nn.Module], test: Split, title: str):
    """Images, and for each network the gradient of the loss with respect to the pixels, scaled to its largest value."""
    x, y = pixels(test.x[:SHOWN]), test.y[:SHOWN]
    rows = {"image": test.x[:SHOWN].cpu().numpy()}
    for kind, network in networks.items():
        gradient = input_gradient(network, x, y)  # (n, 3, H, W)
        largest = gradient.flatten(1).abs().amax(1).clamp(min=1e-30)[:, None, None, None]
        rows[f"gradient,\n{kind}"] = (0.5 + gradient / largest / 2).mul(255).byte().cpu().numpy()
    figure, axes = new_figure(len(rows), width=8.6, height=4.0)
    for ax, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        image_grid(ax, images, len(images))
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(
        f"{title}: the gradient of the loss by the pixels, without and with adversarial training\n"
        "(grey: 0; each image's largest value is black or white)"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
