"""What the studies of this folder share: a model from a seed, its training with any loss, its evaluation, pictures.

However a model was trained, it is evaluated with the correct terms: sums over pixels and latents, a mean over images.
Shapes: B batch, N images, D pixels, d latents.
"""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from shared_utils.cli import ExperimentParser, UserError, positive_float, positive_int
from shared_utils.data import minibatches
from shared_utils.plotting import image_grid
from shared_utils.runs import check_finite
from shared_utils.schedules import one_cycle
from shared_utils.stats import mean_std
from vae.inputs import SIDE
from vae.model import VAE, mean_terms

EVAL_SAMPLES = 20  # draws of the latent for each image that is measured
ACTIVE = 0.01  # variance of a posterior mean over images above which Burda et al. call a latent active
SHOWN = 8  # samples, and reconstructions, in a row of pictures

Loss = Callable[[Tensor, Tensor], Tensor]  # reconstruction (B,), kl (B,) → what is minimised


def add_fit_flags(parser: ExperimentParser, epochs: int) -> None:
    """The flags of `new_model` and `fit` that all studies have; `epochs` is the default of `--epochs`."""
    parser.add_argument("--hidden", type=positive_int, default=128, help="hidden units of encoder and decoder")
    parser.add_argument("--epochs", type=positive_int, default=epochs, help="passes over the training images")
    parser.add_argument("--batch-size", type=positive_int, default=100, help="images per update")
    parser.add_argument("--samples", type=positive_int, default=2, help="draws of the latent for each image")
    parser.add_argument("--lr", type=positive_float, default=1e-2, help="the highest learning rate")


def new_model(seed: Sequence[int], x_dim: int, hidden: int, z_dim: int, device) -> tuple[VAE, np.random.Generator]:
    """A fresh model and the generator of its batches, both from `seed`, which also seeds PyTorch's noise.

    Models of one size and one seed start from the same weights and see the same batches and noise, whatever their loss.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(int(rng.integers(2**32)))
    return VAE(x_dim, hidden, z_dim).to(device), rng


def fit(
    model: VAE,
    x_train: Tensor,
    loss: Loss,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    rng: np.random.Generator,
    samples: int = 2,
) -> float:
    """Minimise `loss` on the images x_train (N, D) with Adam and a one-cycle learning rate; returns the seconds taken.

    Errors: `UserError` with step and learning rate when the loss is not finite.
    """
    started = time.perf_counter()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    updates, step = epochs * math.ceil(len(x_train) / batch_size), 0
    for _ in range(epochs):
        for batch in minibatches(len(x_train), batch_size, rng):
            rate = one_cycle(step, updates, lr)
            for group in optimizer.param_groups:
                group["lr"] = rate
            x = x_train[torch.from_numpy(batch).to(x_train.device)]  # (B, D)
            value = loss(*model.elbo_terms(x, samples))
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            check_finite(value.item(), step, rate)
            step += 1
    return time.perf_counter() - started


@torch.no_grad()
def active_units(model: VAE, x: Tensor, threshold: float = ACTIVE) -> Tensor:
    """Which latents are active: bool (d,), whether Var_x(E_q(z|x)[z_u]) > threshold over the images x (N, D).

    An inactive latent has (nearly) the same posterior mean for every image: it tells nothing about the image.
    Source: Burda, Grosse and Salakhutdinov 2016, section 5.2.
    """
    mu = torch.cat([model.encode(part)[0] for part in x.split(1000)])  # (N, d)
    return mu.cpu().double().var(0, correction=0) > threshold


def measure(model: VAE, x: Tensor) -> dict[str, float]:
    """The bound of model.py on the images x (N, D), whatever the model was trained with: means in nats per image.

    Returns {"elbo", "reconstruction", "kl", "active_units"}. Errors: `UserError` when it is not finite.
    """
    reconstruction, kl = mean_terms(model, x, EVAL_SAMPLES)
    elbo = reconstruction - kl
    if not math.isfinite(elbo):
        raise UserError(f"the ELBO of the trained model is {elbo}: try a lower --lr")
    active = int(active_units(model, x).sum())
    return {"elbo": elbo, "reconstruction": reconstruction, "kl": kl, "active_units": active}


def summary(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean and sample standard deviation over seeds of every value in rows: {"elbo", "elbo_std", …}."""
    found = {}
    for key in rows[0]:
        found[key], found[f"{key}_std"] = mean_std([row[key] for row in rows])
    return found


def shown_images(x: Tensor, y: np.ndarray) -> tuple[Tensor, np.ndarray]:
    """The test images that are shown, of x (N, D) with the labels y (N,): (to be reconstructed, first row of pictures).

    Reconstructed is the first image of each class, at most `SHOWN`: (≤ SHOWN, D). The row has other images beside them.
    """
    first = torch.from_numpy(np.unique(y, return_index=True)[1][:SHOWN]).to(x.device)
    others = torch.arange(-SHOWN, 0, device=x.device) % len(x)
    return x[first], picture_row(x[others], x[first])


@torch.no_grad()
def model_pictures(model: VAE, x: Tensor, seed: int) -> np.ndarray:
    """A row of probabilities: `SHOWN` samples from the prior, and the images x (N, D) decoded from posterior means.

    The same seed draws the same latents for every model of one size.
    """
    z = torch.randn(SHOWN, model.z_dim, generator=torch.Generator().manual_seed(seed)).to(x.device)
    return picture_row(model.decode(z).sigmoid(), model.decode(model.encode(x)[0]).sigmoid())


def picture_row(left: Tensor, right: Tensor) -> np.ndarray:
    """Images (M, D), a blank, images (N, D) as one row: (M + 1 + N, 14, 14)."""
    blank = torch.full_like(left[:1], torch.nan)
    return torch.cat([left, blank, right]).reshape(-1, SIDE, SIDE).cpu().numpy()


def draw_pictures(ax: Axes, rows: Sequence[np.ndarray]) -> np.ndarray:
    """Draw rows of `picture_row` below each other, the one of test images first.

    Returns the height of each row's middle on the axis, (rows,).
    """
    image_grid(ax, np.concatenate(rows), len(rows[0]), vmin=0, vmax=1)
    pitch, n_right = SIDE + 1, len(rows[0]) - SHOWN - 1
    for middle, name in ((SHOWN / 2, "samples from the prior"), (SHOWN + 1 + n_right / 2, "reconstructions")):
        ax.text(middle * pitch - 1, -2, f"test images; below: {name}", ha="center", va="bottom", fontsize=10)
    return np.arange(len(rows)) * pitch + (SIDE - 1) / 2
