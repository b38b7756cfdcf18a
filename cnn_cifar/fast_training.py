"""The recipe that trains `FastNet`, from which every ingredient can be left out, and one epoch of it.

Source: Jordan 2024, arXiv 2404.00498 (the ingredients, and most of the numbers); Jordan et al. 2024 (Muon).
Shapes: N images, B batch, K classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from cnn_cifar.augment import alternating_flip, crop, flip_coins, random_crop, random_flip
from cnn_cifar.fast_net import FastNet, start_as_identity_, whiten_
from cnn_cifar.inputs import Split, logits_of, pixels, share
from shared_utils.data import minibatches
from shared_utils.device import autocast
from shared_utils.muon import Muon
from shared_utils.seeding import derived_seed

INGREDIENTS = {
    "whitening": "a first layer that whitens 2×2 patches",
    "identity": "convolutions that begin as the identity",
    "muon": "Muon instead of SGD with momentum",
    "smoothing": "labels smoothed by 0.2",
    "alternating": "a flip in every other epoch, not at random",
    "tta": "the mean over shifted and mirrored copies at test time",
}


@dataclass(frozen=True)
class Recipe:
    """How `FastNet` is trained. without: names of `INGREDIENTS` to leave out."""

    epochs: int = 12
    batch_size: int = 500
    widths: tuple[int, ...] = (64, 256, 256)
    lr: float = 0.1  # Muon's
    sgd_lr: float = 1.0  # that of SGD, where Muon is left out
    adam_lr: float = 0.03  # of the biases
    head_lr: float = 0.6  # over the width: with Adam each weight of a logit moves by about the learning rate
    without: tuple[str, ...] = ()

    def has(self, ingredient: str) -> bool:
        """Whether it is in the recipe."""
        return ingredient not in self.without


def build(recipe: Recipe, train: Split, num_classes: int) -> FastNet:
    """The network before its first update, on the training images' device."""
    network = FastNet(recipe.widths, num_classes).to(train.x.device, memory_format=torch.channels_last)
    if recipe.has("whitening"):
        whiten_(network, pixels(train.x[:: max(1, len(train) // 2000)]))  # from all over: a folder is sorted by class
    if recipe.has("identity"):
        start_as_identity_(network)
    return network


class FastTraining:
    """A training in progress: `epoch` makes one pass over the images `train`.

    All that is random in an epoch follows from the seed and the epoch's number, so that the weights and the optimizers'
    states are all that a resumed run needs.
    """

    def __init__(self, recipe: Recipe, train: Split, num_classes: int, seed: int, amp: bool | None):
        self.recipe, self.train, self.seed, self.amp = recipe, train, seed, amp
        self.per_epoch = len(train) // recipe.batch_size
        self.network = build(recipe, train, num_classes)
        self.coins = flip_coins(len(train), Generator().manual_seed(seed)).to(train.x.device)
        network = self.network
        filters = [p for p in network.parameters() if p.requires_grad and p.ndim == 4]  # the whitening ones are fixed
        biases = [p for p in network.blocks.parameters() if p.requires_grad and p.ndim == 1]
        if recipe.has("muon"):
            main = Muon(filters, lr=recipe.lr)
        else:
            main = torch.optim.SGD(filters, lr=recipe.sgd_lr, momentum=0.9, nesterov=True)
        groups = [{"params": biases}, {"params": [network.head.weight], "lr": recipe.head_lr / recipe.widths[-1]}]
        groups.append({"params": [network.whiten.bias]})
        rest = torch.optim.Adam(groups, lr=recipe.adam_lr, betas=(0.85, 0.95))
        self.optimizers = (main, rest)
        for group in main.param_groups + rest.param_groups:
            group["initial_lr"] = group["lr"]

    def rates(self, step: int) -> Iterator[tuple[dict, float]]:
        """Each group of parameters with its learning rate at update `step`, from 0: it falls linearly to 0.

        That of the whitening layer's bias is 0 after 3/8 of the updates: later layers then have a steady input.
        """
        main, rest = self.optimizers
        progress = step / (self.recipe.epochs * self.per_epoch)
        early = rest.param_groups[2] if self.recipe.has("whitening") else None
        for group in main.param_groups + rest.param_groups:
            yield group, group["initial_lr"] * max(0.0, 1 - progress * (8 / 3 if group is early else 1))

    def epoch(self, number: int, perturb: Callable[[Tensor, Tensor], Tensor] | None = None) -> float:
        """Pass over the images once; `number` counts from 0. Returns the mean training loss (nats).

        perturb: (images of [0, 1], labels) → the images that the network learns from.
        """
        recipe, device = self.recipe, self.train.x.device
        order = minibatches(
            len(self.train), recipe.batch_size, np.random.default_rng([self.seed, number]), drop_last=True
        )
        batches = torch.from_numpy(np.stack(list(order))).to(device)  # (updates, B)
        generator = Generator(device).manual_seed(derived_seed(self.seed, number))
        self.network.train()
        total = torch.zeros((), device=device)  # read once an epoch
        for step, batch in enumerate(batches, start=number * self.per_epoch):
            for group, lr in self.rates(step):
                group["lr"] = lr
            x, y = self.train.x[batch], self.train.y[batch]
            alternates = recipe.has("alternating")
            x = alternating_flip(x, self.coins[batch], number) if alternates else random_flip(x, generator)
            x = pixels(random_crop(x, generator, padding=2))
            with autocast(device, self.amp):
                logits = self.network(perturb(x, y) if perturb else x)  # (B, K)
            loss = F.cross_entropy(logits.float(), y, label_smoothing=0.2 if recipe.has("smoothing") else 0.0)
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
            total += loss.detach()
        return total.item() / self.per_epoch


def averaged_logits(network: nn.Module, x: Tensor, amp: bool | None = False) -> dict[str, Tensor]:
    """Logits for uint8 images x (N, 3, H, W), (N, K) each: of the images alone, and means over copies of each image.

    `mirrored`: the image and its mirror image. `mirrored and shifted`: half of the weight is on these two, a quarter
    each on the image moved by a pixel up and left, and down and right, with the mirror images of those.
    """

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        return logits_of(network, x, amp), logits_of(network, x.flip(-1), amp)

    plain, mirror = both(x)
    moved = []
    for offset in (0, 2):  # of a crop from x padded by 1 pixel
        at = torch.full((len(x),), offset, device=x.device)
        moved += both(crop(x, at, at, padding=1))
    return {
        "plain": plain,
        "mirrored": (plain + mirror) / 2,
        "mirrored and shifted": (plain + mirror) / 4 + sum(moved) / 8,
    }


def accuracies(network: nn.Module, split: Split, amp: bool | None) -> dict[str, float]:
    """The accuracy in each of the ways of `averaged_logits`."""
    logits = averaged_logits(network, split.x, amp)
    return {name: share(value.argmax(1) == split.y) for name, value in logits.items()}
