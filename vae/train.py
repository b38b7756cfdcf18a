"""Train a variational autoencoder on binarised 14×14 digits: how high a bound on their likelihood does it reach?

    python vae/train.py
    python vae/train.py --z-dim 2 --epochs 30 --out runs/vae/train_z2
    python vae/train.py --z-dim 2 --out runs/vae/train_z2_long
    python vae/train.py --z-dim 2 --val-size 100 --out runs/vae/train_z2_val100
    python vae/train.py --schedule constant --lr 0.001 --epochs 100 --encoder-weight-decay 0 --out runs/vae/train_plain

196 → 128 (tanh) → mean and log-variance of 8 latents; 8 → 128 (tanh) → 196 logits. Each update raises the ELBO of a
batch (model.py has the equations), its reconstruction term a mean over `--samples` draws of the latent:

    L(x) = E_q(z|x) [log p(x|z)] − KL(q(z|x) ‖ N(0, I))

The learning rate follows one cycle: it rises to `--lr` along half a cosine and falls to zero along another. Weight
decay acts on the encoder alone, which would overfit its images (inference_gap.py). Every 100 updates the bound is
computed on the validation images, and the best weights so far are kept; the test images are read once, at the end.

Writes elbo_terms.png, train_vs_val_ll.png, best.pth, last.pth, terms.npz, history.csv, metrics.json.
With --resume a run that was stopped goes on from last.pth and ends with the same weights.
Sources: Kingma and Welling 2014; Smith 2018 for the cycle.
Shapes: B batch, N images, 196 pixels, d latents; all terms in nats per image.
"""

import math
import time

import numpy as np
import torch

from shared_utils import checkpoint
from shared_utils.cli import make_parser, non_negative_float, positive_float, positive_int, run_main
from shared_utils.data import minibatches
from shared_utils.device import cpu_threads, pick_device
from shared_utils.plotting import curves, new_figure, running_mean, save_figure
from shared_utils.runs import Run, check_finite, start_run
from shared_utils.schedules import one_cycle
from shared_utils.seeding import seed_everything
from vae.inputs import add_data_flags, load_binary
from vae.model import VAE, mean_terms

VALIDATE_EVERY = 100  # updates
SAVE_EVERY = 2000  # updates, at least: a checkpoint is written between epochs
VAL_SAMPLES, TEST_SAMPLES = 5, 20  # draws of the latent for each image


def build_parser():
    """The command line."""
    parser = make_parser(__doc__, quick={"epochs": 80, "per_class": 100, "val_size": 100})
    add_data_flags(parser)
    parser.add_argument("--z-dim", type=positive_int, default=8, help="latents")
    parser.add_argument("--hidden", type=positive_int, default=128, help="hidden units of encoder and decoder")
    parser.add_argument("--epochs", type=positive_int, default=400, help="passes over the training images")
    parser.add_argument("--batch-size", type=positive_int, default=100, help="images per update")
    parser.add_argument("--samples", type=positive_int, default=2, help="draws of the latent for each image")
    parser.add_argument("--lr", type=positive_float, default=3e-3, help="the highest learning rate")
    parser.add_argument("--schedule", choices=("onecycle", "constant"), default="onecycle", help="of the learning rate")
    decay = "AdamW's weight decay of the encoder's parameters"
    parser.add_argument("--encoder-weight-decay", type=non_negative_float, default=0.1, help=decay)
    parser.add_argument("--resume", action="store_true", help="go on from last.pth")
    return parser


@cpu_threads(1)
def main(argv=None) -> dict:
    """Train, choose on validation, test once; returns the metrics."""
    args = build_parser().parse_args(argv)
    device = pick_device(args.device)
    data = load_binary(args)
    run = start_run(args)
    rng = seed_everything(args.seed)
    x_train, x_val = (torch.from_numpy(x).to(device) for x in (data.x_train, data.x_val))  # (N, 196) each
    model = VAE(x_train.shape[1], args.hidden, args.z_dim).to(device)
    groups = [
        {"params": model.encoder.parameters(), "weight_decay": args.encoder_weight_decay},
        {"params": model.decoder.parameters(), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    per_epoch = math.ceil(len(x_train) / args.batch_size)
    updates = args.epochs * per_epoch
    terms = np.zeros((updates, 2))  # reconstruction and KL of every update's batch
    step, best, saved, rows, seconds = 0, {"val_elbo": -math.inf}, 0, 0, 0.0

    if args.resume and run.path("last.pth").exists():
        state = checkpoint.load(run.path("last.pth"), expect=model.config)  # load_state_dict moves them to the device
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        checkpoint.restore_random_states(state, rng)
        step, best, seconds = state["step"], state["best"], state["seconds"]
        terms[:step] = state["terms"].numpy()
        saved, rows = step, state["rows"]
    run.rewind(rows)

    while step < updates:
        started = time.perf_counter()
        for batch in minibatches(len(x_train), args.batch_size, rng):
            lr = one_cycle(step, updates, args.lr) if args.schedule == "onecycle" else args.lr
            for group in optimizer.param_groups:
                group["lr"] = lr
            x = x_train[torch.from_numpy(batch).to(device)]  # (B, 196)
            reconstruction, kl = model.elbo_terms(x, args.samples)  # (B,) each
            loss = (kl - reconstruction).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            check_finite(loss.item(), step, lr)
            terms[step] = reconstruction.mean().item(), kl.mean().item()
            step += 1
            if step % VALIDATE_EVERY == 0 or step == updates:
                since = step - 1 - (step - 1) % VALIDATE_EVERY
                best = validate(model, x_val, step, lr, terms[since:step], best, run)
        seconds += time.perf_counter() - started
        if step - saved >= SAVE_EVERY or step == updates:
            saved = step
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "best": best}
            state |= {"terms": torch.from_numpy(terms[:step]), "rows": len(run.history()), "seconds": seconds}
            check_finite(best["val_elbo"], step, args.lr)
            about = {"config": model.config, "title": data.title}
            about["data"] = {"dataset": args.dataset, "per_class": args.per_class, "val_size": args.val_size}
            checkpoint.save(run.path("last.pth"), rng=rng, **about, **state)
            checkpoint.save(run.path("best.pth"), **about, **best)

    x_test = torch.from_numpy(data.x_test).to(device)
    reconstruction, kl = mean_terms(model, x_test, TEST_SAMPLES)
    last_elbo = reconstruction - kl
    model.load_state_dict(best["model"])
    reconstruction, kl = mean_terms(model, x_test, TEST_SAMPLES)
    checkpoint.save_arrays(run.path("terms.npz"), reconstruction=terms[:, 0], kl=terms[:, 1])

    rows = run.numbers()
    about = f"{data.title}, {model.size}"
    save_figure(draw_terms(terms, about), run.path("elbo_terms.png"))
    save_figure(draw_bounds(rows, best, reconstruction - kl, len(x_val), about), run.path("train_vs_val_ll.png"))
    return run.finish(
        {
            "z_dim": args.z_dim,
            "epochs": args.epochs,
            "updates": updates,
            "parameters": sum(p.numel() for p in model.parameters()),
            "train_images": len(x_train),
            "train_elbo_last_updates": rows[-1]["train_reconstruction"] - rows[-1]["train_kl"],
            "val_elbo": best["val_elbo"],
            "best_step": best["step"],
            "test_elbo": reconstruction - kl,
            "test_reconstruction": reconstruction,
            "test_kl": kl,
            "test_elbo_of_the_last_weights": last_elbo,
            "training_seconds": seconds,
        }
    )


def validate(model: VAE, x_val: torch.Tensor, step: int, lr: float, terms: np.ndarray, best: dict, run: Run) -> dict:
    """Log the bound on the validation images beside the mean of the last updates' `terms` (n, 2).

    Returns the best weights so far: {"val_elbo", "step", "model"}.
    """
    reconstruction, kl = mean_terms(model, x_val, VAL_SAMPLES)
    means = dict(zip(("train_reconstruction", "train_kl"), terms.mean(0).tolist(), strict=True))
    run.log(step=step, lr=lr, **means, val_reconstruction=reconstruction, val_kl=kl)
    if not reconstruction - kl > best["val_elbo"]:  # a NaN is never the best
        return best
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return {"val_elbo": reconstruction - kl, "step": step, "model": weights}


def draw_terms(terms: np.ndarray, about: str):
    """Reconstruction and KL of every update's batch, (updates, 2), each with its mean over neighbouring updates."""
    figure, axes = new_figure(1, 2, width=10.5, height=4.4)
    step = np.arange(1, len(terms) + 1)
    means = running_mean(terms)
    names = ("reconstruction E log p(x|z)", "KL(q(z|x) ‖ p(z))")
    for ax, name, values, mean in zip(axes[0], names, terms.T, means.T, strict=True):
        ax.plot(step, values, color="#BBBBBB", linewidth=0.6, label="each update's batch")
        ax.plot(step, mean, label="mean over ±10 % of the updates")
        ax.set(xscale="log", xlabel="updates", ylabel="nats per image", title=name)
        ax.legend(loc="upper left")
    paid = f"{means[-1, 1]:.1f} nats of KL pay for a reconstruction of {means[-1, 0]:.1f}"
    figure.suptitle(f"{about}\n{paid}: an ELBO of {means[-1, 0] - means[-1, 1]:.1f} on training batches")
    return figure


def draw_bounds(rows: list[dict[str, float]], best: dict, test_elbo: float, n_val: int, about: str):
    """The ELBO of training batches and validation images against updates, and the best weights' on the test images."""
    figure, axes = new_figure(width=7.6, height=4.6)
    ax = axes[0, 0]
    step = [row["step"] for row in rows]
    train, val = ([row[f"{part}_reconstruction"] - row[f"{part}_kl"] for row in rows] for part in ("train", "val"))
    curves(
        ax,
        {"training images, as they go": (step, train), f"{n_val} validation images": (step, val)},
        xlabel="updates",
        ylabel="ELBO (nats per image)",
    )
    ax.axhline(
        test_elbo, color="black", linewidth=1, linestyle=":", label=f"test images, best weights: {test_elbo:.2f}"
    )
    ax.plot(best["step"], best["val_elbo"], "k^", label=f"best on validation: {best['val_elbo']:.2f}")
    top = max(*train, *val, test_elbo)
    ax.set_ylim(max(min(train + val), top - 12), top + 0.5)
    ax.legend(loc="lower right")
    figure.suptitle(f"{about}\nthe last training batches reach {train[-1]:.1f}, images never seen {test_elbo:.1f}")
    return figure


if __name__ == "__main__":
    run_main(main, build_parser)
