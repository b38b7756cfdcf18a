"""Training an autoencoder: forward, loss, backward, step, in plain sight.

Shapes: N images, B batch, D pixels.
"""

import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from autoencoder.inputs import pixels
from autoencoder.models import PART, Autoencoder
from autoencoder.optimizers import SGD, AdamW
from shared_utils.cli import UserError
from shared_utils.data import minibatches
from shared_utils.device import autocast
from shared_utils.runs import check_finite
from shared_utils.schedules import one_cycle

BETAS = (0.9, 0.99)  # of AdamW: the usual 0.999 averages over a thousand updates, of only a few thousand
OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Recipe:
    """How an autoencoder is built and trained; by default what won the grid of ae_experiments.py.

    lr: the highest learning rate of the cycle. noise, code_noise: standard deviations, in training, of the noise on
    the input (the target stays clean) and on the code.
    patience: epochs without a better validation error after which training stops.
    amp: products in bfloat16 (None: where the machine has it).
    """

    enc_dims: tuple[int, ...] = (1024, 512, 32)
    activation: str = "gelu"
    init: str = "xavier"
    use_batchnorm: bool = True
    optimizer: str = "adamw"
    lr: float = 4e-3
    weight_decay: float = 0.0
    noise: float = 0.0
    code_noise: float = 0.0
    epochs: int = 20
    batch_size: int = 256
    patience: int = 10
    amp: bool | None = False

    def __post_init__(self):
        if (self.use_batchnorm or self.code_noise) and self.batch_size < 2:
            raise UserError("BatchNorm cannot be trained on batches of one image: --batch-size 2 or more")

    def build(self, seed: int, in_features: int) -> Autoencoder:
        """A fresh model, its weights drawn from `seed`; on the CPU."""
        torch.manual_seed(seed)
        noise = {"noise": self.noise, "code_noise": self.code_noise}
        shape = (self.enc_dims, None, self.activation, self.init, self.use_batchnorm)
        return Autoencoder(*shape, **noise, in_features=in_features)

    @property
    def sizes(self) -> str:
        """The encoder's layers: `512-256-32`."""
        return "-".join(map(str, self.enc_dims))

    def __str__(self) -> str:
        parts = [self.sizes, self.activation, self.init, "BatchNorm" if self.use_batchnorm else "no BatchNorm"]
        parts += [f"{self.optimizer} {self.lr:g}", f"decay {self.weight_decay:g}"]
        parts += [f"noise {self.noise:g}"] if self.noise else []
        return ", ".join([*parts, f"code noise {self.code_noise:g}"] if self.code_noise else parts)

    def as_dict(self) -> dict:
        """Plain values, for a checkpoint."""
        return asdict(self) | {"enc_dims": list(self.enc_dims)}


@dataclass(frozen=True)
class Fit:
    """What came of a training: per epoch {"epoch", "lr", "train_loss", "val_recon"}, the best epoch, and seconds."""

    rows: list[dict[str, float]]
    best_epoch: int
    val_recon: float
    seconds: float


@torch.no_grad()
def fit(model: Autoencoder, recipe: Recipe, x_train: Tensor, x_val: Tensor, seed: int) -> Fit:
    """Minimise the mean squared error on x_train; `model` ends with the weights of the best epoch on x_val.

    x_train, x_val: uint8 (N, D) on the model's device. The order of the images comes from `seed`, noise from PyTorch's
    generator.
    Errors: `Diverged` with step and learning rate when the loss is not finite.
    """
    started = time.perf_counter()
    rng = np.random.default_rng(seed)
    device = x_train.device
    if recipe.optimizer == "sgd":
        optimizer = SGD(model.layers, recipe.lr, weight_decay=recipe.weight_decay)
    else:
        optimizer = AdamW(model.layers, recipe.lr, BETAS, weight_decay=recipe.weight_decay)
    batch_size = min(recipe.batch_size, len(x_train))
    per_epoch = len(x_train) // batch_size  # a last batch that is not full waits for the next epoch's shuffle
    step, rows, best = 0, [], {"epoch": 0, "val_recon": math.inf}
    for epoch in range(1, recipe.epochs + 1):
        losses = torch.zeros(per_epoch, device=device)
        for i, batch in enumerate(minibatches(len(x_train), batch_size, rng, drop_last=True)):
            optimizer.lr = one_cycle(step, recipe.epochs * per_epoch, recipe.lr)
            x = pixels(x_train[torch.from_numpy(batch).to(device)])  # (B, D)
            with autocast(device, recipe.amp):
                output = model.forward(x, training=True)  # (B, D)
                losses[i], gradient = model.loss(output, x)
                model.backward(gradient)
            optimizer.step()
            step += 1
        check_epoch(losses, step, recipe.lr)
        row = {"epoch": epoch, "lr": optimizer.lr, "train_loss": losses.mean().item()}
        row["val_recon"] = reconstruction_errors(model, x_val).mean().item()
        check_finite(row["val_recon"], step, recipe.lr)
        rows.append(row)
        if row["val_recon"] < best["val_recon"]:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            best = {"epoch": epoch, "val_recon": row["val_recon"], "weights": weights}
        elif epoch - best["epoch"] >= recipe.patience:
            break
    model.load_state_dict(best["weights"])
    return Fit(rows, best["epoch"], best["val_recon"], time.perf_counter() - started)


def check_epoch(losses: Tensor, step: int, lr: float) -> None:
    """`check_finite` for the losses of the updates before `step`, (n,): one synchronisation an epoch, not n."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        check_finite(losses[first].item(), step - len(losses) + first + 1, lr)


@torch.no_grad()
def reconstruction_errors(model: Autoencoder, x: Tensor) -> Tensor:
    """The mean squared error of each image of x, uint8 (N, D), over its pixels in [0, 1]: (N,)."""
    parts = []
    for part in x.split(PART):
        part = pixels(part)
        parts.append((model.predict(part) - part).square_().mean(1))
    return torch.cat(parts)


@torch.no_grad()
def codes(model: Autoencoder, x: Tensor) -> Tensor:
    """The codes of the images x, uint8 (N, D): float32 (N, K)."""
    return torch.cat([model.encode(pixels(part)) for part in x.split(PART)])
