"""How does a network learn to take noise out of images, and at which noise levels is that hard?

    python ddpm/train_ddpm.py --prediction v --schedule cosine --optimizer muon --amp
    python ddpm/train_ddpm.py --conditional --out runs/ddpm/train_conditional
    torchrun --nproc_per_node 2 ddpm/train_ddpm.py --amp

Each update takes images, adds to each the noise of a step drawn for it, and lowers the mean squared error of the UNet's
prediction (diffusion.py, unet.py) with AdamW and a one-cycle learning rate. `--optimizer muon` takes orthogonalised
steps in the convolutions between the first and the last, at `--muon-lr`, and leaves the rest to AdamW
(shared_utils/muon.py). Samples are drawn with the mean weights, an exponential moving average (EMA) over updates n:

    w̄ ← d w̄ + (1 − d) w,   d = min(--ema, (1 + n) / (10 + n))

With `--conditional` the network is also told the digit, except for a fraction of the images: so it learns both the
conditional and the unconditional distribution, for sampling.py's --guidance. After each epoch the mean weights' loss is
measured on held-out images, at steps spread over all T, each image with a noise of its own that stays the same, and
without its digit.
Where that is hard depends on what is predicted: ε is hardest where there is little of it, v also where there is hardly
anything else.

Writes ema.pth, last.pth, loss_plot.png, history.csv, metrics.json, and samples_epoch_NNN as pictures.
With --resume a run that was stopped goes on from its last whole epoch and ends with the same weights.
Sources: Ho, Jain and Abbeel 2020; Ho and Salimans 2022 (classes left out); Polyak and Juditsky 1992 (mean weights);
Jordan et al. 2024 (Muon).
Shapes: B images of a batch (B, C, H, W), t int64 (B,).
"""

import argparse
import math
import time

import numpy as np
import torch
from torch import Tensor, nn

from ddpm.diffusion import PREDICTIONS, SCHEDULES, GaussianDiffusion
from ddpm.inputs import Data, add_data_flags, load, scaled, shades
from ddpm.unet import UNet
from shared_utils import checkpoint
from shared_utils.cli import UserError, add_amp, fraction, make_parser, positive_float, positive_int, run_main
from shared_utils.data import Images, minibatches
from shared_utils.device import autocast
from shared_utils.distributed import World, main_first, process_group, shard, total, wrap
from shared_utils.modes import evaluating
from shared_utils.muon import Muon
from shared_utils.plotting import image_grid, new_figure, running_mean, save_figure
from shared_utils.runs import Run, check_finite, start_run
from shared_utils.schedules import one_cycle
from shared_utils.seeding import derived_seed, seed_everything

LEVELS = 10  # parts of the steps in which the validation loss is shown
GRID, GRID_STEPS = 8, 20  # samples of a picture in each direction; DPM-Solver++'s steps for them


def build_parser():
    """The command line."""
    quick = {"epochs": 2, "batch_size": 32, "channels": [32, 32], "timesteps": 100, "val_images": 100}
    parser = make_parser(__doc__, quick=quick)
    add_data_flags(parser)
    parser.add_argument("--timesteps", type=positive_int, default=1000, help="steps from image to noise, 50 or more")
    parser.add_argument("--schedule", choices=SCHEDULES, default="linear", help="how the noise grows with the step")
    parser.add_argument("--prediction", choices=PREDICTIONS, default="eps", help="what the network predicts")
    parser.add_argument("--channels", type=positive_int, nargs=2, default=[64, 96], help="at 14×14 and at 7×7")
    parser.add_argument("--conditional", action="store_true", help="tell the network the class")
    parser.add_argument("--drop-label", type=fraction, default=0.1, help="fraction of the images without their label")
    parser.add_argument("--epochs", type=positive_int, default=20, help="passes through the training images")
    parser.add_argument("--batch-size", type=positive_int, default=128, help="images per update")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="of the inner convolutions")
    parser.add_argument("--lr", type=positive_float, default=2e-3, help="AdamW's highest learning rate")
    parser.add_argument("--muon-lr", type=positive_float, default=0.02, help="Muon's highest, in singular-value units")
    parser.add_argument("--ema", type=fraction, default=0.999, help="decay of the mean weights")
    parser.add_argument("--val-images", type=positive_int, default=2000, help="held-out images in each epoch's loss")
    parser.add_argument("--sample-every", type=positive_int, default=5, help="epochs between two pictures of samples")
    add_amp(parser)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--resume", action="store_true", help="go on from last.pth")
    return parser


def main(argv=None) -> dict:
    """Train; returns the metrics."""
    args = build_parser().parse_args(argv)
    with process_group(args.device) as world:
        return train(args, world)


def train(args: argparse.Namespace, world: World) -> dict:
    """What `main` does, in one process of `world`."""
    device = world.device
    with main_first(world):
        data = load(args)
    world.check(args.batch_size)
    if args.batch_size > len(data.train):
        raise UserError(f"--batch-size {args.batch_size}: there are {len(data.train)} images to train on")
    if min(args.val_images, len(data.val)) < LEVELS:
        raise UserError(
            f"--val-images {args.val_images}: the loss is measured at {LEVELS} levels, with images for each"
        )
    if args.conditional and not args.drop_label:
        raise UserError("--drop-label 0: the network is also used without labels, and has to learn that")
    diffusion = GaussianDiffusion(args.timesteps, args.schedule, args.prediction)
    seed_everything(args.seed)
    _, channels, size, width = data.train.x.shape
    if size != width:
        raise UserError(f"--dataset {args.dataset} has images of {size}×{width}; the UNet takes square ones")
    n_classes = len(data.classes) if args.conditional else None
    model = UNet(size, channels, tuple(args.channels), n_classes).to(device, memory_format=torch.channels_last)
    run = start_run(args, writes=world.is_main)
    x, y = (torch.from_numpy(each).to(device) for each in (data.train.x, data.train.y))
    ema = UNet(**model.config).to(device, memory_format=torch.channels_last).eval()
    ema.load_state_dict(model.state_dict())
    ddp = wrap(model, world)
    network = torch.compile(ddp) if args.compile else ddp  # what is trained; `model` holds its weights
    optimizers = make_optimizers(model, args)
    per_epoch = len(x) // args.batch_size  # the incomplete batch is left out; each epoch shuffles anew
    updates = args.epochs * per_epoch
    losses, levels = torch.zeros(updates), torch.zeros(args.epochs, LEVELS)
    first, seconds = 0, 0.0
    process = {"timesteps": args.timesteps, "schedule": args.schedule, "prediction": args.prediction}
    learned = {"dataset": args.dataset, "val_size": len(data.val)}
    about = {"title": data.title, "config": {**model.config, **process, **learned}}

    if args.resume and run.path("last.pth").exists():  # in any number of processes: all draw the same
        state = checkpoint.load(run.path("last.pth"), expect=about["config"])
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, seconds = state["epoch"], state["seconds"]
        losses[: first * per_epoch], levels[:first] = state["losses"], state["levels"]
    run.rewind(first)

    flag = "--lr or --muon-lr" if args.optimizer == "muon" else "--lr"
    for epoch in range(first, args.epochs):
        started = time.perf_counter()
        order = np.random.default_rng([args.seed, epoch])
        batches = minibatches(len(x), args.batch_size, order, drop_last=True)
        for update, batch in enumerate(batches, start=epoch * per_epoch):
            # What is random in an update follows from seed and update, for the whole batch: processes share it out.
            torch.manual_seed(derived_seed(args.seed, update))
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = one_cycle(update, updates, group["peak"], rise=0.1)
            loss = update_loss(diffusion, network, x, y, batch, n_classes, args, world)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            follow(ema, model, min(args.ema, (1 + update) / (10 + update)))
            losses[update] = loss.item()
            check_finite(losses[update], update + 1, args.lr, flag)
        seconds += time.perf_counter() - started
        trained = total(losses[epoch * per_epoch : update + 1].mean().to(device), world).item() / world.size
        if not world.is_main:
            continue
        levels[epoch] = losses_by_level(diffusion, ema, data.val, args.val_images, args.amp)
        row = {"epoch": epoch + 1, "train_loss": trained, "val_loss": levels[epoch].mean().item()}
        run.log(**row, seconds=round(seconds, 1))
        done = {"epoch": epoch + 1, "seconds": seconds}
        state = {"model": model.state_dict(), "ema": ema.state_dict(), **done}
        state |= {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}
        state |= {"losses": losses[: update + 1], "levels": levels[: epoch + 1]}
        checkpoint.save(run.path("last.pth"), **about, **state)
        checkpoint.save(run.path("ema.pth"), **about, **done, model=ema.state_dict())
        if (epoch + 1) % args.sample_every == 0 or epoch + 1 == args.epochs:
            save_figure(draw_samples(diffusion, ema, args, epoch + 1), run.path(f"samples_epoch_{epoch + 1:03d}.png"))

    if not world.is_main:
        return {}
    return finish(args, run, model, losses, levels, seconds, data)


def make_optimizers(model: UNet, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon if it has the convolutions between the first and the last. A group's "peak": its highest rate."""
    within = [p for name, p in model.named_parameters() if p.ndim == 4 and not name.startswith(("first.", "last."))]
    of_muon = {id(p) for p in within} if args.optimizer == "muon" else set()
    rest = [p for p in model.parameters() if id(p) not in of_muon]
    optimizers = [torch.optim.AdamW([{"params": rest, "peak": args.lr}], betas=(0.9, 0.99), fused=True)]
    if of_muon:  # a block's last convolution starts at 0, so that no norm can be held
        optimizers.append(Muon([{"params": within, "peak": args.muon_lr}], args.muon_lr, momentum=0.9, hold_norm=False))
    return optimizers


def update_loss(
    diffusion: GaussianDiffusion,
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    batch: np.ndarray,
    n_classes: int | None,
    args: argparse.Namespace,
    world: World,
) -> Tensor:
    """The mean loss of this process's part of a batch; steps, noise and dropped labels are drawn for all of it.

    n_classes: None where the network is told no class; else also the label that stands for none.
    """
    at = torch.from_numpy(shard(np.arange(len(batch)), world)).to(x.device)
    chosen = torch.from_numpy(batch).to(x.device)
    t = torch.randint(diffusion.timesteps, (len(batch),), device=x.device)[at]
    noise = torch.randn(len(batch), *x.shape[1:], device=x.device)[at]
    dropped = torch.rand(len(batch), device=x.device)[at] < args.drop_label
    labels = None if n_classes is None else torch.where(dropped, n_classes, y[chosen[at]])
    with autocast(x.device, args.amp):
        return diffusion.losses(lambda x_t, t: network(x_t, t, labels), scaled(x[chosen[at]]), t, noise).mean()


@torch.no_grad()
def follow(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """w̄ ← d w̄ + (1 − d) w for every weight. (The UNet has no buffers, which would stay as they were.)"""
    for mean, weight in zip(ema.parameters(), model.parameters(), strict=True):
        mean.lerp_(weight, 1 - decay)


@torch.no_grad()
def losses_by_level(
    diffusion: GaussianDiffusion, model: UNet, images: Images, n: int, amp: bool, together: int = 250
) -> Tensor:
    """The mean loss in each tenth of the steps, (LEVELS,): n images, each at a step of its own, with its own noise."""
    device = next(model.parameters()).device
    n = min(n, len(images))
    rng = torch.Generator().manual_seed(0)
    t = ((torch.arange(n) + 0.5) * diffusion.timesteps / n).long()[torch.randperm(n, generator=rng)]
    noise = torch.randn(n, *images.x.shape[1:], generator=rng)
    found = []
    with evaluating(model), autocast(device, amp):
        for at in torch.arange(n).split(together):
            x0 = scaled(torch.from_numpy(images.x[at]).to(device))
            found.append(diffusion.losses(model, x0, t[at].to(device), noise[at].to(device)).cpu())
    level = t * LEVELS // diffusion.timesteps
    found = torch.cat(found)
    return torch.stack([found[level == each].mean() for each in range(LEVELS)])


def draw_samples(diffusion: GaussianDiffusion, model: UNet, args: argparse.Namespace, epoch: int):
    """A grid of samples drawn with the mean weights, always from the same noise."""
    device = next(model.parameters()).device
    torch.manual_seed(args.seed)
    shape = (GRID**2, model.config["image_channels"], model.config["size"], model.config["size"])
    with evaluating(model), autocast(device, args.amp):
        images = shades(diffusion.dpm_solver_sample(model, shape, GRID_STEPS, device))
    figure, axes = new_figure(width=5.2, height=5.6)
    image_grid(axes[0, 0], images, GRID, vmin=0, vmax=255)
    figure.suptitle(f"After epoch {epoch}: {GRID_STEPS} steps of DPM-Solver++ from the same noise")
    return figure


def finish(
    args: argparse.Namespace, run: Run, model: UNet, losses: Tensor, levels: Tensor, seconds: float, data: Data
) -> dict:
    """The figure and the metrics."""
    rows = run.numbers()
    size = sum(p.numel() for p in model.parameters())
    about = f"{data.title}, {size:,} parameters, {args.schedule} schedule, T = {args.timesteps}"
    save_figure(draw_losses(losses.numpy(), levels.numpy(), rows, args, about), run.path("loss_plot.png"))
    images = args.epochs * (len(losses) // args.epochs) * args.batch_size
    return run.finish(
        {
            "parameters": size,
            "timesteps": args.timesteps,
            "schedule": args.schedule,
            "prediction": args.prediction,
            "conditional": args.conditional,
            "optimizer": args.optimizer,
            "train_images": len(data.train),
            "epochs": args.epochs,
            "updates": len(losses),
            "train_loss": rows[-1]["train_loss"],
            "val_loss": rows[-1]["val_loss"],
            "val_loss_by_level": levels[-1].tolist(),
            "training_seconds": seconds,
            "images": images,
        }
    )


def draw_losses(losses: np.ndarray, levels: np.ndarray, rows: list[dict], args: argparse.Namespace, about: str):
    """The loss against updates, smoothed, with the validation's; and the validation's by step, epoch for epoch."""
    figure, axes = new_figure(1, 2, width=10.6, height=4.5)
    left, right = axes[0]
    held_out = "held out" + (", not told the digit" if args.conditional else "")
    step = np.arange(1, len(losses) + 1)
    left.plot(step, losses, color="#BBBBBB", linewidth=0.5, label="each update's batch")
    left.plot(step, running_mean(losses), label="mean over ±10 % of the updates")
    per_epoch = len(losses) // args.epochs
    epochs = np.arange(1, args.epochs + 1)
    left.plot(epochs * per_epoch, [row["val_loss"] for row in rows], "k--", label=f"{held_out}, mean weights")
    left.set(xscale="log", yscale="log", xlabel="updates", ylabel=f"mean squared error of {args.prediction}")
    left.legend()
    middle = (np.arange(LEVELS) + 0.5) * args.timesteps / LEVELS
    for epoch in sorted({1, max(1, math.isqrt(args.epochs)), args.epochs}):
        right.plot(middle, levels[epoch - 1], "-o", label=f"epoch {epoch}")
    right.set(yscale="log", xlabel="step t (noise grows to the right)", ylabel=f"the same, {held_out}")
    right.legend()
    hardest = int(middle[levels[-1].argmax()])
    figure.suptitle(
        f"{about}\nheld-out loss {rows[-1]['val_loss']:.4f} after {args.epochs} epochs, highest around step {hardest}"
    )
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
