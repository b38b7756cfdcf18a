"""How far does a network of nothing but convolutions get on CIFAR-10?

    python cnn_cifar/allcnn.py
    python cnn_cifar/allcnn.py --data ./data --batch-size 128 --epochs 100 --amp
    python cnn_cifar/allcnn.py --epochs 10 --schedule onecycle --amp --out runs/cnn_cifar/allcnn_10
    python cnn_cifar/allcnn.py --c1 48 --c2 96 --epochs 20 --amp --cutout --out runs/cnn_cifar/allcnn_half
    torchrun --nproc_per_node 2 cnn_cifar/allcnn.py --amp

All-CNN (models.py) on images that are flipped, shifted and recoloured at random (augment.py), by SGD with Nesterov's
momentum; weights decay, biases and BatchNorm's parameters do not:

    g ← ∇L + λ W,   v ← μ v + g,   W ← W − η (g + μ v)          μ = 0.9, λ = 0.001

With `--schedule step` η is 0.1, then 0.01 from 40 % of the updates on and 0.001 from 80 % on, for any number of epochs.
The epoch is chosen on the validation images; the test images come last, for the chosen weights and for those of the
last epoch. All images are on the device, where each batch is augmented as a whole. `--amp` computes in bfloat16, which
is about twice as fast on a CPU that has it (benchmark.py). The seconds include validation.

Writes allcnn_t_best.pth, allcnn_t_last.pth, training_curves.png, training_curves.json, augmentations_grid.png,
history.csv, metrics.json.
With --resume a run that was stopped goes on from allcnn_t_last.pth and ends with the same weights. With several
processes (torchrun) the batch is split among them, and BatchNorm's statistics are those of each process's part.
Sources: Springenberg et al. 2015; Sutskever et al. 2013 for Nesterov's momentum; Smith 2018 for the cycle.
Shapes: N images, B batch of one process, K classes.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cnn_cifar.augment import random_color_jitter, random_crop, random_cutout, random_flip
from cnn_cifar.inputs import add_data_flags, load, loss_and_accuracy, pixels
from cnn_cifar.models import allcnn_t, get_param_groups
from shared_utils import checkpoint
from shared_utils.cli import UserError, add_amp, make_parser, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.device import autocast
from shared_utils.distributed import main_first, process_group, shard, total, wrap
from shared_utils.plotting import curves, image_grid, new_figure, save_figure
from shared_utils.runs import check_finite, start_run, write_json
from shared_utils.schedules import half_cosine, one_cycle
from shared_utils.seeding import derived_seed, seed_everything
from shared_utils.stats import wilson_interval

CUTOUT = 8  # pixels: the side of the square


def build_parser():
    """The command line."""
    quick = {"epochs": 2, "schedule": "onecycle", "c1": 16, "c2": 32, "batch_size": 50, "val_size": 3000}
    parser = make_parser(__doc__, dataset="cifar10", quick=quick)
    add_data_flags(parser, batch_size=128, val_size=5000)
    parser.add_argument("--c1", type=positive_int, default=96, help="channels before the first stride of 2")
    parser.add_argument("--c2", type=positive_int, default=192, help="channels after the first stride of 2")
    parser.add_argument("--epochs", type=positive_int, default=100, help="passes over the training images")
    parser.add_argument("--lr", type=positive_float, default=0.1, help="the highest learning rate")
    parser.add_argument(
        "--schedule", choices=("step", "cosine", "onecycle"), default="step", help="of the learning rate"
    )
    parser.add_argument("--cutout", action="store_true", help="also erase a square of each training image")
    add_amp(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step's network")
    parser.add_argument("--resume", action="store_true", help="go on from allcnn_t_last.pth")
    return parser


def learning_rate(schedule: str, step: int, updates: int, peak: float) -> float:
    """The learning rate of update `step`, from 0, of `updates`.

    step: peak, peak / 10 from 40 % on, peak / 100 from 80 % on. cosine: half a cosine from peak to 0. onecycle: up for
    a quarter of the updates, then down to 0.
    """
    if schedule == "onecycle":
        return one_cycle(step, updates, peak)
    if schedule == "cosine":
        return half_cosine(step, updates, peak)
    return peak * 0.1 ** ((step >= 0.4 * updates) + (step >= 0.8 * updates))


def augmented(x: Tensor, generator: Generator, cutout: bool) -> Tensor:
    """uint8 images (B, 3, 32, 32), each flipped, shifted, recoloured at random, with `cutout` a square erased."""
    x = random_color_jitter(random_crop(random_flip(x, generator), generator), generator)
    return random_cutout(x, generator, CUTOUT) if cutout else x


def main(argv=None) -> dict:
    """Train, choose on validation, test once; returns the metrics."""
    args = build_parser().parse_args(argv)
    with process_group(args.device) as world:
        return train(args, world)


def train(args, world) -> dict:
    """What `main` does, in one process of `world`."""
    device = world.device
    world.check(args.batch_size)
    with main_first(world):
        data = load(args, device)
    run = start_run(args, writes=world.is_main)
    seed_everything(args.seed)
    model = allcnn_t(args.c1, args.c2, len(data.classes)).to(device, memory_format=torch.channels_last)
    config = {"network": "allcnn_t", **model.config}
    ddp = wrap(model, world)
    network = torch.compile(ddp) if args.compile else ddp  # what is trained; `model` holds its weights
    groups = get_param_groups(model, weight_decay=1e-3)
    optimizer = torch.optim.SGD(groups, lr=args.lr, momentum=0.9, nesterov=True, fused=True)
    n = len(data.train)
    per_epoch = n // args.batch_size  # the images left out differ from epoch to epoch
    updates = args.epochs * per_epoch
    first, best, seconds = 0, {"val_accuracy": -1.0}, 0.0

    if args.resume and run.path("allcnn_t_last.pth").exists():
        state = checkpoint.load(run.path("allcnn_t_last.pth"), expect=config)
        if state["processes"] != world.size:
            raise UserError(f"--resume: the run had {state['processes']} process(es), now there are {world.size}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, best, seconds = state["epochs"], state["best"], state["seconds"]
    run.rewind(first)

    for epoch in range(first, args.epochs):
        started = time.perf_counter()
        # All that is random in an epoch follows from seed, epoch and, but for the order, process: a resumed run needs
        # no random states, and processes draw different crops and dropout.
        order = minibatches(n, args.batch_size, np.random.default_rng([args.seed, epoch]), drop_last=True)
        batches = torch.from_numpy(np.stack([shard(batch, world) for batch in order])).to(device)  # (updates, B)
        noise_seed = derived_seed(args.seed, epoch, world.rank)
        torch.manual_seed(noise_seed)
        generator = Generator(device).manual_seed(noise_seed)
        total_loss, right = torch.zeros((), device=device), torch.zeros((), device=device)  # read once an epoch
        network.train()
        for step, batch in enumerate(batches, start=epoch * per_epoch):
            lr = learning_rate(args.schedule, step, updates, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            x, y = pixels(augmented(data.train.x[batch], generator, args.cutout)), data.train.y[batch]
            with autocast(device, args.amp):
                logits = network(x)  # (B, K)
            loss = F.cross_entropy(logits.float(), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total_loss += loss.detach()
            right += (logits.detach().argmax(1) == y).sum()
        train_loss = total(total_loss, world).item() / (per_epoch * world.size)
        train_accuracy = total(right, world).item() / (per_epoch * args.batch_size)
        check_finite(train_loss, (epoch + 1) * per_epoch, lr)
        val_loss, val_accuracy = loss_and_accuracy(model, data.val, args.amp)
        seconds += time.perf_counter() - started
        row = {"epoch": epoch + 1, "lr": lr, "train_loss": train_loss, "train_accuracy": train_accuracy}
        run.log(**row, val_loss=val_loss, val_accuracy=val_accuracy, seconds=round(seconds, 1))
        if not world.is_main:
            continue
        about = {"config": config, "classes": list(data.classes), "title": data.title}
        if val_accuracy > best["val_accuracy"]:
            best = {"val_accuracy": val_accuracy, "epoch": epoch + 1}
            checkpoint.save(run.path("allcnn_t_best.pth"), model=model.state_dict(), **about, **best)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epochs": epoch + 1}
        state |= {"best": best, "seconds": seconds, "processes": world.size}
        checkpoint.save(run.path("allcnn_t_last.pth"), **about, **state)

    if not world.is_main:
        return {}
    _, last_accuracy = loss_and_accuracy(model, data.test, args.amp)
    model.load_state_dict(checkpoint.load(run.path("allcnn_t_best.pth"), device=device, expect=config)["model"])
    _, test_accuracy = loss_and_accuracy(model, data.test, args.amp)
    low, high = wilson_interval(round(test_accuracy * len(data.test)), len(data.test))

    rows = run.numbers()
    history = {name: [row[name] for row in rows] for name in rows[0]}
    about = f"{data.title}, All-CNN {args.c1}-{args.c2}"
    write_json(run.path("training_curves.json"), history)
    save_figure(draw_curves(history, best, test_accuracy, about), run.path("training_curves.png"))
    save_figure(draw_augmentations(data.train.x[:8].cpu(), args.seed, data.title), run.path("augmentations_grid.png"))
    return run.finish(
        {
            "c1": args.c1,
            "c2": args.c2,
            "parameters": sum(p.numel() for p in model.parameters()),
            "epochs": args.epochs,
            "full_run_epochs": build_parser().get_default("epochs"),
            "processes": world.size,
            "train_images": n,
            "train_accuracy": history["train_accuracy"][-1],
            "best_epoch": best["epoch"],
            "val_accuracy": best["val_accuracy"],
            "test_accuracy": test_accuracy,
            "test_error": 1 - test_accuracy,
            "test_error_interval": [1 - high, 1 - low],
            "test_accuracy_of_the_last_weights": last_accuracy,
            "training_seconds": seconds,
            "images_per_second": args.epochs * per_epoch * args.batch_size / seconds,
        }
    )


def draw_curves(history: dict[str, list[float]], best: dict, test_accuracy: float, about: str):
    """Loss and accuracy by epoch."""
    figure, axes = new_figure(1, 2, width=10.4, height=4.4)
    epoch = history["epoch"]
    losses = {"training, augmented": "train_loss", "validation": "val_loss"}
    curves(
        axes[0, 0],
        {name: (epoch, history[key]) for name, key in losses.items()},
        xlabel="epoch",
        ylabel="cross-entropy (nats per image)",
    )
    accuracies = {"training, augmented": "train_accuracy", "validation": "val_accuracy"}
    curves(
        axes[0, 1],
        {name: (epoch, [100 * value for value in history[key]]) for name, key in accuracies.items()},
        xlabel="epoch",
        ylabel="accuracy (%)",
    )
    axes[0, 1].plot(best["epoch"], 100 * best["val_accuracy"], "k^", label=f"chosen: epoch {best['epoch']}")
    axes[0, 1].axhline(100 * test_accuracy, color="black", linewidth=1, linestyle=":", label="test, chosen weights")
    axes[0, 1].legend(loc="lower right")
    figure.suptitle(
        f"{about}: {test_accuracy:.2%} of the test images right\n"
        f"after {len(epoch)} epochs: {history['train_accuracy'][-1]:.1%} of the augmented training images, "
        f"{history['val_accuracy'][-1]:.1%} of the validation images"
    )
    return figure


def draw_augmentations(x: Tensor, seed: int, title: str):
    """The first images x (n, 3, 32, 32), and what each augmentation makes of them."""
    generator = Generator().manual_seed(seed)
    rows = {"as they are": x}
    rows["flip"] = random_flip(x, generator)
    rows["crop"] = random_crop(x, generator)
    rows["colour jitter"] = random_color_jitter(x, generator)
    rows["together"] = augmented(x, generator, cutout=False)
    rows["again"] = augmented(x, generator, cutout=False)
    rows["Cutout"] = random_cutout(x, generator, CUTOUT)
    figure, axes = new_figure(len(rows), width=7.4, height=0.78 * len(rows) + 0.6)
    for ax, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        image_grid(ax, images.numpy(), len(x))
        ax.text(-0.02, 0.5, name, transform=ax.transAxes, ha="right", va="center", fontsize=9)
    figure.suptitle(f"{title}: each image gets random parameters of its own, anew in each epoch")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
